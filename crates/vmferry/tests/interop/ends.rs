//! How migrations end when somebody wants them to, and what the exit status says.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;

use rustix::process::Signal;
use serde_json::Value;

use crate::hosts::{Hosts, MIB, let_go, serve};
use crate::peers::vmferry::{Vmferry, run, run_well};
use crate::peers::writer::Writer;
use crate::peers::{disk, seeded};

/// Runs a short command that must end with this status; the one line that says why.
fn refused<const N: usize>(code: i32, args: [&str; N]) -> String {
    let output = run(args);
    let errors = String::from_utf8(output.stderr).expect("it prints UTF-8");
    assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
    errors.lines().next().unwrap_or_default().to_owned()
}

/// The source has cancelled: it serves on, lost nothing, and can move its disk after all.
fn serves_on_and_can_move(hosts: Hosts, writer: Writer) {
    writer.wait_more(50);
    let limits = ["--bandwidth", "unlimited", "--downtime", "20s"];
    let mut migrate = hosts.source.migrate(&hosts.destination.incoming(), limits);
    let completed = migrate.event("completed");
    migrate.succeeds();
    assert_eq!(completed["durable"], true, "{completed}");
    let log = writer.left_behind();
    hosts.source.end();
    hosts.destination.end();
    log.verify(&hosts.to);
    disk::assert_same(&hosts.from, &hosts.to);
}

#[test]
fn cancel_from_another_terminal() {
    let mut rng = seeded();
    let hosts = Hosts::new(16 * MIB, &mut rng);
    let control = hosts.source.control();
    let nothing = refused(4, ["cancel", "--qmp", &control]);
    assert!(nothing.contains("no migration"), "{nothing}");

    let writer = Writer::start(&hosts.source.nbd("disk0"), &mut rng);
    let mut migrate = hosts.migrate_slowly();
    writer.wait_more(50);
    run_well(["cancel", "--qmp", &control]);
    migrate.event("cancelled");
    migrate.fails(130);
    serves_on_and_can_move(hosts, writer);
}

#[test]
fn ctrl_c_cancels() {
    let mut rng = seeded();
    let hosts = Hosts::new(16 * MIB, &mut rng);
    let writer = Writer::start(&hosts.source.nbd("disk0"), &mut rng);
    let mut migrate = hosts.migrate_slowly();
    migrate.event("progress");
    migrate.signal(Signal::INT);
    migrate.event("cancelled");
    assert_eq!(migrate.wait().code(), Some(130));
    assert!(
        migrate.errors().contains("cancelled"),
        "{}",
        migrate.errors()
    );
    serves_on_and_can_move(hosts, writer);
}

#[test]
fn a_lost_terminal_detaches_and_the_migration_goes_on() {
    let mut rng = seeded();
    let hosts = Hosts::new(16 * MIB, &mut rng);
    let writer = Writer::start(&hosts.source.nbd("disk0"), &mut rng);
    let mut migrate = hosts.migrate_slowly();
    migrate.event("progress");
    migrate.signal(Signal::HUP);
    migrate.succeeds();
    writer.wait_more(50);
    let_go(&hosts.source);
    hosts.source.wait_status("completed");
    let log = writer.left_behind();
    hosts.source.end();
    hosts.destination.end();
    log.verify(&hosts.to);
}

#[test]
fn sigterm_during_a_migration_cancels_it_and_ends_with_the_disk_whole() {
    let mut rng = seeded();
    let hosts = Hosts::new(16 * MIB, &mut rng);
    let writer = Writer::start(&hosts.source.nbd("disk0"), &mut rng);
    let mut migrate = hosts.migrate_slowly();
    writer.wait_more(100);
    hosts.source.signal(Signal::TERM);
    hosts.source.ended();
    let log = writer.cut_off();
    // Whoever watched knows that nothing is undecided.
    migrate.event("cancelled");
    migrate.fails(130);
    log.verify(&hosts.from);

    // It lives here: a daemon that is started again serves it, and moves it.
    let source = serve(hosts.dir.path(), "source", &hosts.from);
    let writer = Writer::start(&source.nbd("disk0"), &mut rng);
    serves_on_and_can_move(Hosts { source, ..hosts }, writer);
}

/// Nobody could say goodbye: the watcher says what it does not know, and a daemon that is started again knows it.
#[test]
fn a_crash_of_the_source_leaves_the_disk_here() {
    let mut rng = seeded();
    let hosts = Hosts::new(16 * MIB, &mut rng);
    let writer = Writer::start(&hosts.source.nbd("disk0"), &mut rng);
    let mut migrate = hosts.migrate_slowly();
    writer.wait_more(100);
    hosts.source.crash();
    let message = migrate.fails(3);
    assert!(message.contains("lost the daemon"), "{message}");
    let log = writer.cut_off();
    log.verify(&hosts.from);

    let source = serve(hosts.dir.path(), "source", &hosts.from);
    let writer = Writer::start(&source.nbd("disk0"), &mut rng);
    serves_on_and_can_move(Hosts { source, ..hosts }, writer);
}

/// Without `--json`: progress on standard error, the outcome on standard output, each as lines.
#[test]
fn a_person_reads_how_it_goes() {
    let hosts = Hosts::new(16 * MIB, &mut seeded());
    let control = hosts.source.control();
    let uri = hosts.destination.incoming();
    let output = run(["migrate", "--qmp", &control, &uri]);
    let errors = String::from_utf8(output.stderr).expect("it prints UTF-8");
    assert!(output.status.success(), "{errors}");
    let said = String::from_utf8(output.stdout).expect("it prints UTF-8");
    assert!(said.starts_with("completed: 16.0 MiB of disks"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        errors.lines().all(|line| line.starts_with("vmferry: ")),
        "{errors}"
    );
}

#[test]
fn sigterm_ends_a_destination_and_the_source_serves_on() {
    let mut rng = seeded();
    let hosts = Hosts::new(16 * MIB, &mut rng);
    let writer = Writer::start(&hosts.source.nbd("disk0"), &mut rng);
    let mut migrate = hosts.migrate_slowly();
    hosts.destination.end();
    let message = migrate.fails(1);
    assert!(message.contains("the migration failed"), "{message}");
    writer.wait_more(50);
    let log = writer.finish();
    hosts.source.end();
    log.verify(&hosts.from);
}

#[test]
fn a_second_migration_of_the_disk_is_refused_and_disturbs_nothing() {
    let mut rng = seeded();
    let hosts = Hosts::new(16 * MIB, &mut rng);
    let writer = Writer::start(&hosts.source.nbd("disk0"), &mut rng);
    let mut migrate = hosts.migrate_slowly();
    let control = hosts.source.control();
    let uri = hosts.destination.incoming();
    for extra in [&[][..], &["--check"], &["--disk", "disk0"]] {
        let args = [["migrate", "--qmp", &control, &uri].as_slice(), extra].concat();
        let output = run(&args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{args:?}: {errors}");
        assert!(errors.contains("migration process in progress"), "{errors}");
    }
    let_go(&hosts.source);
    migrate.succeeds();
    let log = writer.left_behind();
    let gone = refused(4, ["migrate", "--qmp", &control, &uri]);
    assert!(gone.contains("no writable disk"), "{gone}");
    hosts.source.end();
    hosts.destination.end();
    log.verify(&hosts.to);
}

#[test]
fn status_tells_a_program_and_a_person_how_it_stands() {
    let hosts = Hosts::new(16 * MIB, &mut seeded());
    let control = hosts.source.control();
    let status = |json: bool| {
        let args = ["status", "--qmp", &control];
        run_well(args.into_iter().chain(json.then_some("--json")))
    };
    let parsed = || -> Value { serde_json::from_str(&status(true)).expect("JSON") };
    assert_eq!(parsed()["status"], "none");
    let mut migrate = hosts.migrate_slowly();
    let info = parsed();
    assert_eq!(info["status"], "active", "{info}");
    assert_eq!(info["disk"]["total"], 16 * MIB, "{info}");
    assert_eq!(info["x-disks"][0]["name"], "disk0", "{info}");
    assert!(status(false).contains("disk0"), "{}", status(false));
    let_go(&hosts.source);
    migrate.succeeds();
    let info = parsed();
    assert_eq!(info["status"], "completed", "{info}");
    assert_eq!(info["x-durable"], true, "{info}");
    let text = status(false);
    assert!(text.contains("completed"), "{text}");
}

#[test]
fn a_check_says_what_would_go_wrong_and_sends_nothing() {
    let hosts = Hosts::new(MIB, &mut seeded());
    let control = hosts.source.control();
    let there = hosts.destination.incoming();
    let file = format!("file:{}", hosts.dir.path().join("stream").display());
    let check = |code: i32, uri: &str, extra: &[&str]| {
        let args = [
            ["migrate", "--qmp", &control, "--check", uri].as_slice(),
            extra,
        ]
        .concat();
        let output = run(&args);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
        errors
    };
    check(0, &there, &[]);
    check(0, &there, &["--disk", "disk0"]);
    check(0, &file, &["--one-way"]);
    assert!(check(4, &file, &[]).contains("one-way"));
    assert!(check(4, &there, &["--disk", "disk1"]).contains("disk1"));
    assert!(check(4, &there, &["--disk", "disk0", "--disk", "disk0"]).contains("twice"));
    check(2, "carrier-pigeon:coop", &[]);
    assert!(
        !hosts.dir.path().join("stream").exists(),
        "a check made a file"
    );
    for host in [&hosts.source, &hosts.destination] {
        let info = host.migration();
        assert!(
            ["none", "setup"].contains(&info["status"].as_str().unwrap_or("")),
            "{info}"
        );
    }
    // And what it promised holds.
    hosts.source.migrate(&there, []).succeeds();
}

#[test]
fn wrong_usage_and_unreachable_daemons_have_their_status() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let control = format!("unix:{}", dir.path().join("nobody").display());
    refused(2, ["migrate", "tcp:localhost:1"]);
    refused(2, ["serve", "--disk", "a=/nonexistent,size=1MiB"]);
    refused(2, ["frobnicate"]);
    let gone = refused(1, ["status", "--qmp", &control]);
    assert!(gone.contains("cannot reach the daemon"), "{gone}");
}

/// Passes a migration on to `target`, and lets everything back but the last word: whether the destination took the disks.
fn without_the_last_word(target: &str) -> io::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let target = target.trim_start_matches("tcp:").to_owned();
    thread::spawn(move || -> io::Result<()> {
        let (mut source, _) = listener.accept()?;
        let mut destination = TcpStream::connect(target)?;
        let (mut from, mut to) = (source.try_clone()?, destination.try_clone()?);
        thread::spawn(move || {
            io::copy(&mut from, &mut to).and_then(|_| to.shutdown(Shutdown::Write))
        });
        // Of each message: type, length of the rest. Type 1 is the last.
        let mut header = [0; 4];
        loop {
            destination.read_exact(&mut header)?;
            if header[..2] == [0, 1] {
                return source.shutdown(Shutdown::Both);
            }
            let mut rest = vec![0; usize::from(u16::from_be_bytes([header[2], header[3]]))];
            destination.read_exact(&mut rest)?;
            source.write_all(&header)?;
            source.write_all(&rest)?;
        }
    });
    Ok(format!("tcp:{address}"))
}

#[test]
fn a_lost_last_word_is_undecided_and_a_person_decides() {
    let mut rng = seeded();
    let hosts = Hosts::new(16 * MIB, &mut rng);
    let control = hosts.source.control();
    let writer = Writer::start(&hosts.source.nbd("disk0"), &mut rng);
    writer.wait_more(50);
    let relay = without_the_last_word(&hosts.destination.incoming()).expect("a relay");
    let mut migrate = hosts.source.migrate(&relay, ["--downtime", "20s"]);
    migrate.event("undecided");
    let message = migrate.fails(3);
    assert!(
        message.contains("undecided which side has the disks"),
        "{message}"
    );

    let too_late = refused(4, ["cancel", "--qmp", &control]);
    assert!(too_late.contains("too late"), "{too_late}");
    let text = run_well(["status", "--qmp", &control]);
    assert!(text.contains("undecided"), "{text}");
    // The destination has it: its own guests write, and nobody's are lost.
    hosts.destination.wait_status("completed");
    let next = Writer::start(&hosts.destination.nbd("disk0"), &mut rng);
    run_well(["resolve", "give-up", "--qmp", &control]);
    let log = writer.left_behind();
    refused(4, ["resolve", "serve", "--qmp", &control]);
    next.wait_more(50);
    let next = next.finish();
    hosts.source.end();
    hosts.destination.end();
    next.verify(&hosts.to);
    log.verify(&hosts.from);

    // A daemon that is started again with the disk that has moved away refuses to serve it.
    let serve = Vmferry::start([
        "serve",
        "--disk",
        &crate::hosts::disk_flag(&hosts.from),
        "--qmp",
        &control,
    ])
    .fails(4);
    assert!(serve.contains("disk0"), "{serve}");
}
