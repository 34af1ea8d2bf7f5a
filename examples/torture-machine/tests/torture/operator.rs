//! What an operator does, and what he is told.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry_ram::Userfault;

use crate::host::{Host, PATIENCE};
use crate::link::{Cut, Link};

/// Longest command in bytes, with its newline.
const COMMAND_BYTES_MAX: usize = 64 << 10;
/// Who may do the least.
const NOBODY: u32 = 65534;

fn folder() -> TempDir {
    tempfile::Builder::new()
        .prefix("torture-")
        .tempdir()
        .expect("a folder")
}

/// A machine that runs, and one that waits for it at `folder/in`.
fn pair(folder: &Path, capabilities: &[(&str, bool)], arguments: &[&str]) -> (Host, Host) {
    let arguments = |more: &[&str]| -> Vec<String> {
        let all = arguments.iter().chain(more);
        all.map(|argument| (*argument).to_owned()).collect()
    };
    let mut here = Host::start(folder, "here".into(), &arguments(&[]));
    let mut there = Host::start(folder, "there".into(), &arguments(&["--incoming=defer"]));
    here.set_capabilities(capabilities);
    there.set_capabilities(capabilities);
    let target = format!("unix:{}", folder.join("in").display());
    there.must("migrate-incoming", json!({"uri": target}));
    (here, there)
}

#[test]
fn a_guest_that_is_too_fast_is_slowed_down() {
    let folder = folder();
    let arguments = ["--memory=4M", "--speed=20000"];
    let (mut here, mut there) = pair(folder.path(), &[("auto-converge", true)], &arguments);
    // All that it writes is written again before it could be sent.
    here.go_on(2000);
    here.must(
        "migrate-set-parameters",
        json!({"max-bandwidth": 4 << 20, "downtime-limit": 30}),
    );
    let target = format!("unix:{}", folder.path().join("in").display());
    here.must("migrate", json!({"uri": target}));
    let mut most = 0;
    here.wait("query-migrate", |state| {
        most = most.max(state["cpu-throttle-percentage"].as_u64().unwrap_or(0));
        state["status"] == "completed"
    });
    assert!(most > 0, "it converged by itself");
    there.wait("query-status", |status| status["running"] == true);
    there.go_on(5000);
    let state = there.must("query-migrate", json!({}));
    assert_eq!(state["cpu-throttle-percentage"], Value::Null);
}

/// Migrate a guest that stands still, so that there is always as much to say.
fn migrate_over(folder: &Path, cut: Cut) -> (Host, Host, Link) {
    let (mut here, there) = pair(folder, &[], &["--memory=4M"]);
    here.go_on(1000);
    here.must("stop", json!({}));
    let link = Link::new(folder.join("link"), &folder.join("in"), cut);
    here.must("migrate", json!({"uri": link.uri()}));
    (here, there, link)
}

/// The destination's last word is lost. Both sides live, and only a person can know that one of them
/// has the guest.
#[test]
fn a_person_decides_when_the_last_word_is_lost() {
    let whole = folder();
    let (mut here, _there, link) = migrate_over(whole.path(), Cut::Never);
    here.wait_for_migration(&["completed"]);
    let folder = folder();
    let cut = Cut::Back(link.answered() - 1);
    let (mut here, mut there, _link) = migrate_over(folder.path(), cut);
    let state = here.wait("query-migrate", |state| {
        state["x-undecided"] == true || state["status"] == "completed"
    });
    assert_eq!(state["x-undecided"], true);
    there.wait_for_migration(&["completed"]);
    there.wait("query-status", |status| status["running"] == true);
    let refused = here.ask("cont", json!({})).expect("it lives");
    assert_eq!(refused, Err("the guest may run elsewhere".into()));
    assert!(!here.is_running(), "two guests");
    here.must("x-resolve", json!({"decision": "give-up"}));
    here.wait_for_migration(&["completed"]);
    let status = here.must("query-status", json!({}));
    assert_eq!(status["status"], "postmigrate");
    assert!(!here.is_running(), "two guests");
    there.go_on(2000);
}

/// Whoever may not receive a postcopy hears of it, and what to do, before anything begins.
#[test]
fn says_what_a_postcopy_needs() {
    let folder = folder();
    let program = folder.path().join("torture-machine");
    fs::copy(env!("CARGO_BIN_EXE_torture-machine"), &program).expect("room for a copy");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).expect("it is ours");
    let mut command = Command::new(&program);
    if Userfault::open_missing().is_ok() {
        if fs::metadata(&program).expect("it is there").uid() != 0 {
            println!("left out: this user may receive a postcopy");
            return;
        }
        command.uid(NOBODY).gid(NOBODY);
    }
    let arguments = ["--memory=4M".into(), "--incoming=defer".into()];
    let mut there = Host::start_program(command, folder.path(), "there".into(), &arguments);
    let target = |name: &str| format!("unix:{}", folder.path().join(name).display());
    there.set_capabilities(&[("postcopy-ram", true)]);
    match there.ask("migrate-incoming", json!({"uri": target("in")})) {
        Some(Err(error)) => assert!(
            error.contains("no permission for userfaultfd: run as root"),
            "{error}"
        ),
        Some(Ok(_)) => println!("left out: everybody may receive a postcopy here"),
        None => panic!("it is dead: {}", there.log()),
    }
    // A precopy needs nothing.
    there.set_capabilities(&[("postcopy-ram", false)]);
    there.ask("migrate-incoming", json!({"uri": target("other")}));
    let mut here = Host::start(folder.path(), "here".into(), &["--memory=4M".into()]);
    here.must("migrate", json!({"uri": target("other")}));
    here.wait_for_migration(&["completed"]);
    there.go_on(2000);
}

#[test]
fn a_command_has_a_limit() {
    let folder = folder();
    let mut here = Host::start(folder.path(), "here".into(), &["--memory=4M".into()]);
    let answers_to = |length: usize| -> bool {
        let client = UnixStream::connect(folder.path().join("here")).expect("it listens");
        client
            .set_read_timeout(Some(PATIENCE))
            .expect("it is a socket");
        let command = r#"{"execute": "qmp_capabilities"}"#;
        let spaces = " ".repeat(length - command.len() - 1);
        // It may hang up before it has read all of it.
        let _ = (&client).write_all(format!("{command}{spaces}\n").as_bytes());
        let mut lines = BufReader::new(&client).lines();
        let greeting = lines.next().expect("a greeting").expect("a line");
        assert!(greeting.contains("QMP"), "{greeting}");
        matches!(lines.next(), Some(Ok(answer)) if answer.contains("return"))
    };
    assert!(answers_to(COMMAND_BYTES_MAX));
    assert!(!answers_to(COMMAND_BYTES_MAX + 1));
    assert!(!answers_to(100 * COMMAND_BYTES_MAX));
    // Brackets without end are no reason to fall over them.
    let mut client = UnixStream::connect(folder.path().join("here")).expect("it listens");
    let _ = client.write_all(format!("{}\n", "[".repeat(60_000)).as_bytes());
    // Nobody reads what this one is told.
    let deaf = UnixStream::connect(folder.path().join("here")).expect("it listens");
    deaf.set_write_timeout(Some(Duration::from_millis(100)))
        .expect("it is a socket");
    let query = b"{\"execute\": \"query-status\"}\n".repeat(1000);
    let begun = Instant::now();
    while (&deaf).write_all(&query).is_ok() && begun.elapsed() < PATIENCE {
        thread::yield_now();
    }
    here.go_on(1000);
}
