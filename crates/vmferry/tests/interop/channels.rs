//! The ways a stream can take, and sockets that somebody else opened.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::hosts::{MIB, disk_flag, let_go, serve};
use crate::need;
use crate::peers::nbd::run_tool;
use crate::peers::qmp::Qmp;
use crate::peers::vmferry::{PROGRAM, Vmferry, run, run_well};
use crate::peers::writer::Writer;
use crate::peers::{PATIENCE, disk, seeded, until};

const SIZE: u64 = 16 * MIB + 512;

/// `--disk` of a new `disk0`.
fn made(path: &Path) -> String {
    format!("{},create=on,size={SIZE}", disk_flag(path))
}

/// `exec:vmferry receive -` at the other end, as ssh would run it: a live migration, with the answers coming back.
#[test]
fn a_command_receives_the_disk_of_a_guest_that_writes() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    let mut rng = seeded();
    disk::random(&from, SIZE, &mut rng);
    let source = serve(dir.path(), "source", &from);
    let writer = Writer::start(&source.nbd("disk0"), &mut rng);
    writer.wait_more(50);
    let command = format!("exec:{PROGRAM} receive - --disk {} 2>/dev/null", made(&to));
    let mut migrate = source.migrate(&command, ["--bandwidth", "256KiB/s"]);
    source.wait_status("active");
    writer.wait_more(100);
    let_go(&source);
    let completed = migrate.event("completed");
    migrate.succeeds();
    assert_eq!(completed["durable"], true, "{completed}");
    let log = writer.left_behind();
    source.end();
    log.verify(&to);
    disk::assert_same(&from, &to);
}

/// A command that fails is a failure, and the source serves on.
#[test]
fn a_command_that_ends_early_is_a_failure() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let from = dir.path().join("from");
    let mut rng = seeded();
    disk::random(&from, SIZE, &mut rng);
    let source = serve(dir.path(), "source", &from);
    let writer = Writer::start(&source.nbd("disk0"), &mut rng);
    let message = source
        .migrate("exec:head -c 5000000 >/dev/null", [])
        .fails(1);
    assert!(message.contains("the migration failed"), "{message}");
    writer.wait_more(50);
    let log = writer.finish();
    source.end();
    log.verify(&from);
}

/// Into a file, behind what is there already, and out of it.
#[test]
fn a_file_keeps_a_migration_until_it_is_received() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [from, to, stream] = ["from", "to", "stream"].map(|name| dir.path().join(name));
    disk::random(&from, SIZE, &mut seeded());
    fs::write(&stream, b"a header of 23 bytes...").expect("a file can be written");
    let source = serve(dir.path(), "source", &from);
    let uri = format!("file:{},offset=23", stream.display());
    let refusal = source.migrate(&uri, []).fails(4);
    assert!(refusal.contains("cannot answer"), "{refusal}");
    let kept = fs::read(&stream).expect("the file can be read");
    assert_eq!(kept, b"a header of 23 bytes...");

    let mut migrate = source.migrate(&uri, ["--one-way"]);
    let completed = migrate.event("completed");
    migrate.succeeds();
    assert!(completed["durable"].is_null(), "{completed}");
    source.end();
    let bytes = fs::read(&stream).expect("the file can be read");
    assert!(bytes.starts_with(b"a header of 23 bytes...QEVM"));

    run_well(["receive", &uri, "--disk", &made(&to)]);
    disk::assert_same(&from, &to);

    // A stream that was cut is refused, and says so.
    File::options()
        .write(true)
        .open(&stream)
        .and_then(|file| file.set_len(bytes.len() as u64 / 2))
        .expect("a file can be cut");
    let again = format!("{},overwrite=on", disk_flag(&to));
    let cut = run(["receive", &uri, "--disk", &again]);
    let errors = String::from_utf8_lossy(&cut.stderr);
    assert_eq!(cut.status.code(), Some(1), "{errors}");
}

/// `migrate - | receive -`, and not without being told that nothing comes back through a pipe.
#[test]
fn a_pipe_carries_a_migration_one_way() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    disk::random(&from, SIZE, &mut seeded());
    let source = serve(dir.path(), "source", &from);
    let control = source.control();
    let refused = run(["migrate", "--qmp", &control, "-"]);
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(4), "{errors}");
    assert!(errors.contains("cannot answer"), "{errors}");

    let script = r#"
        set -e
        { "$0" migrate --qmp "$1" --one-way - || echo "migrate: $?" >&2; } |
            "$0" receive - --disk "$2"
    "#;
    let output = Command::new("/bin/sh")
        .args(["-c", script, PROGRAM, &control, &made(&to)])
        .stdin(Stdio::null())
        .output()
        .expect("a shell can be run");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    assert!(!errors.contains("migrate: "), "{errors}");
    // Its reports make way for the stream.
    assert!(errors.contains("completed"), "{errors}");
    source.end();
    disk::assert_same(&from, &to);
}

/// Both commands are started with an end of one socket.
#[test]
fn descriptors_are_handed_over() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    disk::random(&from, SIZE, &mut seeded());
    let source = serve(dir.path(), "source", &from);
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let receive = ["receive", "fd:0", "--disk", &made(&to)];
    let mut receive = Vmferry::start_with_input(receive, OwnedFd::from(theirs));
    let control = source.control();
    let migrate = ["migrate", "--qmp", &control, "fd:0"];
    let mut migrate = Vmferry::start_with_input(migrate, OwnedFd::from(ours));
    let completed = migrate.event("completed");
    assert_eq!(completed["durable"], true, "{completed}");
    migrate.succeeds();
    receive.succeeds();
    source.end();
    disk::assert_same(&from, &to);
}

/// A child that is killed by its process id when dropped.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // It may have ended already: nothing to do about either error.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// As systemd does it: the sockets are there before the daemon, clients wait in them, and the daemon says when it is
/// ready and when it ends.
#[test]
fn systemd_opens_the_sockets_and_is_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| dir.path().join(name);
    let disk = path("disk");
    disk::random(&disk, SIZE, &mut seeded());
    let [nbd, qmp] = ["nbd", "qmp"].map(|name| UnixListener::bind(path(name)).expect("a socket"));
    let notices = UnixDatagram::bind(path("notify")).expect("a socket");
    notices.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let next_notice = || {
        let mut buffer = [0; 256];
        let length = notices.recv(&mut buffer).expect("a notice for systemd");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };

    let script = r#"export LISTEN_PID=$$; exec "$@" 3<&0 4<&1 </dev/null >/dev/null"#;
    let child = Command::new("/bin/sh")
        .args([
            "-c",
            script,
            "sh",
            PROGRAM,
            "serve",
            "--disk",
            &disk_flag(&disk),
        ])
        .env("LISTEN_FDS", "2")
        .env("LISTEN_FDNAMES", "guests:qmp")
        .env("NOTIFY_SOCKET", path("notify"))
        .stdin(OwnedFd::from(nbd))
        .stdout(OwnedFd::from(qmp))
        .stderr(Stdio::null())
        .spawn()
        .expect("a shell can be run");
    let mut child = Guard(child);
    let mut control = Qmp::connect(&path("qmp"));
    assert_eq!(next_notice().trim(), "READY=1");
    let blocks = control.execute("query-block", &json!({}));
    assert_eq!(blocks[0]["device"], "disk0", "{blocks}");
    let export = format!("nbd+unix:///disk0?socket={}", path("nbd").display());
    let writer = Writer::start(&export, &mut seeded());
    writer.wait_more(20);
    let log = writer.finish();
    let _ = need!(run_tool("nbdinfo", [export.as_str()]));

    let pid = rustix::process::Pid::from_child(&child.0);
    let ended = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    ended.expect("a child can be signalled");
    assert_eq!(next_notice().trim(), "STOPPING=1");
    let status = until("the daemon to end", || child.0.try_wait().expect("a child"));
    assert!(status.success(), "{status}");
    log.verify(&disk);
    // Whoever opened the sockets keeps them.
    assert!(path("nbd").exists() && path("qmp").exists());
}
