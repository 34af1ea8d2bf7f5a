//! What cannot work is refused with one clear line, and nothing is changed.

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::peers::disk;
use crate::serve::{CommandLine, DISK, Refused, Serve, clear_line};

const MIB: u64 = 1 << 20;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// Fails unless the command line is refused with this status and a line that has all of these words.
fn is_refused(line: &CommandLine, status: i32, words: &[&str]) {
    has_refused(line.start(), status, words);
}

fn has_refused(started: Result<Serve, Refused>, status: i32, words: &[&str]) {
    let Err(refused) = started else {
        panic!("it did start, and should have said {words:?}");
    };
    says(refused.status, &refused.said, status, words);
}

fn says(status: Option<i32>, said: &str, expected: i32, words: &[&str]) {
    assert_eq!(status, Some(expected), "{said}");
    let line = clear_line(said);
    for word in words {
        assert!(line.contains(word), "no {word:?} in: {said}");
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

#[test]
fn a_disk_that_is_missing_or_a_directory_or_empty() {
    let dir = folder();
    let missing = CommandLine::new("missing", dir.path(), "");
    is_refused(&missing, 4, &[DISK, text(missing.image()), "no such file"]);
    let directory = CommandLine::new("directory", dir.path(), "");
    std::fs::create_dir(directory.image()).expect("a folder can be made");
    let words = [DISK, text(directory.image()), "is a directory"];
    is_refused(&directory, 4, &words);
    let empty = CommandLine::new("empty", dir.path(), "");
    empty.make_image(0);
    is_refused(&empty, 4, &[DISK, text(empty.image()), "empty"]);
}

#[test]
fn a_disk_that_another_process_uses() {
    let dir = folder();
    let first = CommandLine::new("first", dir.path(), "");
    first.make_image(MIB);
    let running = first.start().expect("a daemon that starts");
    let second = CommandLine::of_image("second", dir.path(), first.image(), "");
    is_refused(&second, 4, &[DISK, text(first.image()), "another process"]);
    // The first has not noticed anything, and a killed one is in nobody's way.
    assert_eq!(running.hold(), "nothing");
    running.kill();
    drop(second.start().expect("a daemon that starts"));
}

#[test]
fn a_disk_on_a_file_system_that_is_read_only() {
    let dir = folder();
    let mounted = dir.path().join("mounted");
    std::fs::create_dir(&mounted).expect("a folder can be made");
    let image = mounted.join("disk");
    let line = CommandLine::of_image("line", dir.path(), &image, "");
    line.make_image(MIB);
    let Some(program) = in_mount(
        "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\"",
        &mounted,
    ) else {
        return;
    };
    has_refused(
        line.start_in(program),
        1,
        &[DISK, text(&image), "Read-only"],
    );
}

#[test]
fn two_disks_of_one_name() {
    let dir = folder();
    let line = CommandLine::new("line", dir.path(), "");
    line.make_image(MIB);
    let again = format!("{DISK}={}", dir.path().join("other").display());
    is_refused(&line.args(["--disk", &again]), 2, &["two disks", DISK]);
}

#[test]
fn a_port_that_is_in_use() {
    let dir = folder();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("a listener has an address");
    let address = format!("tcp:{address}");
    let line = CommandLine::new("line", dir.path(), "");
    line.make_image(MIB);
    for option in ["--nbd", "--incoming"] {
        let line = line.clone().args([option, &address]);
        is_refused(&line, 1, &[option, &address, "in use"]);
    }
    // A disk that was to be made is not left behind.
    let line = CommandLine::new("made", dir.path(), ",create=on,size=1M");
    let line = line.args(["--incoming", &address]);
    is_refused(&line, 1, &["--incoming", &address, "in use"]);
    assert!(!line.image().exists());
}

#[test]
fn addresses_that_are_none() {
    let dir = folder();
    let line = CommandLine::new("line", dir.path(), "");
    line.make_image(MIB);
    let long = format!("unix:/{}", "x".repeat(108));
    let nonsense = [
        "",
        ":",
        "nonsense",
        "http://host/path",
        "tcp:",
        "tcp:127.0.0.1",
        "tcp:127.0.0.1:",
        "tcp:127.0.0.1:99999",
        "tcp:127.0.0.1:-1",
        "tcp:[::1:5",
        "unix:",
        "exec:",
        "file:",
        "fd:",
        "fd:-1",
        "fd:x",
        &long,
    ];
    let running = line.start().expect("a daemon that starts");
    for address in nonsense {
        for option in ["--nbd", "--incoming"] {
            let line = CommandLine::new("other", dir.path(), "").args([option, address]);
            is_refused(&line, 2, &[option, address]);
        }
        let (status, said) = line.run(["migrate", address]);
        says(status, &said, 2, &[address]);
        if address.starts_with("fd:") {
            // To the daemon that is a descriptor's name.
            continue;
        }
        // A client that does not check by itself.
        let refusal = running.query("migrate", &json!({"uri": address}));
        let refusal = refusal.expect_err("no address").to_string();
        assert!(refusal.contains(address), "{refusal}");
    }
    assert_eq!(running.hold(), "nothing");
}

/// The source of a migration that cannot succeed.
fn source(dir: &Path) -> (CommandLine, Serve) {
    let line = CommandLine::new("source", dir, "");
    disk::random(line.image(), 4 * MIB, &mut crate::peers::seeded());
    let serve = line.start().expect("a daemon that starts");
    (line, serve)
}

/// Migrates: it fails with one clear line, the source serves on, the destination goes on waiting and says why in a line
/// that has these words.
fn does_not_arrive(
    (line, source): &(CommandLine, Serve),
    (target, mut destination): (&CommandLine, Serve),
    words: &[&str],
) {
    let (status, said) = line.run(["migrate", &destination.incoming(), "--json"]);
    says(status, &said, 1, &["the migration failed"]);
    assert_eq!(source.hold(), "nothing");
    assert_eq!(source.ask("query-migrate")["x-hand-over"], "kept");
    assert_eq!(destination.ask("query-status")["status"], "inmigrate");
    let info = destination.ask("query-migrate");
    assert_eq!(info["status"], "failed", "{info}");
    let reason = info["error-desc"].as_str().unwrap_or_default();
    let said = target.said();
    let logged = said.lines().find(|line| line.contains("did not arrive"));
    let logged = logged.unwrap_or_else(|| panic!("not a word in: {said}"));
    for word in words {
        assert!(reason.contains(word), "no {word:?} in: {reason}");
        assert!(logged.contains(word), "no {word:?} in: {logged}");
    }
    destination.terminate();
}

#[test]
fn a_target_that_is_too_small() {
    let dir = folder();
    let source = source(dir.path());
    let line = CommandLine::new("small", dir.path(), "").args(["--incoming", "tcp:127.0.0.1:0"]);
    line.make_image(3 * MIB);
    let destination = line.start().expect("a daemon that starts");
    does_not_arrive(&source, (&line, destination), &[DISK]);
}

#[test]
fn a_target_that_is_read_only_or_has_another_name() {
    let dir = folder();
    let source = source(dir.path());
    let line = CommandLine::new("other", dir.path(), ",readonly=on")
        .args(["--incoming", "tcp:127.0.0.1:0"]);
    line.make_image(4 * MIB);
    // The only disk of that name cannot be filled.
    is_refused(&line, 2, &["--incoming", "readonly=on"]);
    let other = format!(
        "disk1={},create=on,size=4M",
        dir.path().join("disk1").display()
    );
    let line = line.args(["--disk", &other]);
    let destination = line.start().expect("a daemon that starts");
    does_not_arrive(&source, (&line, destination), &[DISK]);
}

#[test]
fn a_target_that_is_full() {
    let dir = folder();
    let mounted = dir.path().join("mounted");
    std::fs::create_dir(&mounted).expect("a folder can be made");
    let image = mounted.join("disk");
    let line = CommandLine::of_image("full", dir.path(), &image, ",create=on,size=4M")
        .args(["--incoming", "tcp:127.0.0.1:0"]);
    let Some(program) = in_mount("mount -t tmpfs -o size=2m none \"$1\"", &mounted) else {
        return;
    };
    let source = source(dir.path());
    let destination = line.start_in(program).expect("a daemon that starts");
    does_not_arrive(&source, (&line, destination), &[DISK, "No space left"]);
}

/// This program in a mount namespace of its own, in which the shell command `mount` was run with `place` as `$1`; `None`
/// where that cannot be had.
fn in_mount(mount: &str, place: &Path) -> Option<Command> {
    let script = format!("{mount} && shift && exec \"$@\"");
    let command = |program: &str| {
        let mut command = Command::new("unshare");
        command.args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            &script,
            "sh",
        ]);
        command.arg(place).arg(program);
        command
    };
    let probe = command("true").stderr(Stdio::null()).status();
    if probe.is_ok_and(|status| status.success()) {
        return Some(command(env!("CARGO_BIN_EXE_vmferry")));
    }
    // Not a peer, so nobody requires it.
    let _ = writeln!(
        std::io::stdout(),
        "left out: needs mount namespaces (unshare)"
    );
    None
}
