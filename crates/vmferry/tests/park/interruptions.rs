//! Machines on their way into a file, when something goes wrong.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::checker::Checker;
use crate::contents::{assert_same_memory, memory_of};
use crate::host::Host;
use crate::link::Link;
use crate::need;
use crate::peers::qemu::Version;
use crate::peers::vmferry::Vmferry;
use crate::peers::{long, seeded, until};
use crate::ways::{FAST, Park, Restore, postcopy};

/// What can be set of a migration.
pub(crate) fn settings(host: &mut Host) -> [Value; 2] {
    ["query-migrate-capabilities", "query-migrate-parameters"]
        .map(|command| host.qemu.qmp.execute(command, &json!({})))
}

/// A connection between a source that was told to make one and a socket.
fn link(listener: &UnixListener, destination: &Path) -> Link {
    let (source, _) = listener.accept().expect("the source connects");
    let destination = until("somebody to listen", || {
        UnixStream::connect(destination).ok()
    });
    Link::new(source, destination)
}

/// A guest that is given up half-way runs on where it was, with the settings it had, and nothing is left of the file.
#[test]
fn a_parking_that_is_stopped_gives_the_guest_back() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    for version in [Version::V10_0, Version::V7_2] {
        let mut checker = Checker::new();
        let mut source = Host::running(need!(checker.host(version)));
        checker.goes_on(2);
        let before = settings(&mut source);
        let (vm, uri) = (source.vm(), format!("file:{}", image.display()));
        for signal in [Signal::INT, Signal::TERM] {
            let words = ["migrate", "--vm", &vm, &uri, "--bandwidth", "4MiB/s"];
            let mut migrate = Vmferry::start(words);
            until("some memory to be parked", || {
                let sent = source.migration()["ram"]["transferred"].as_u64();
                (sent > Some(1 << 20)).then_some(())
            });
            migrate.signal(signal);
            assert_eq!(migrate.wait().code(), Some(130), "{}", migrate.errors());
            println!("{version:?}: {}", migrate.errors());
            source.qemu.wait_run_state("running");
            checker.goes_on(2);
            assert_eq!(settings(&mut source), before);
            let left = fs::read_dir(dir.path())
                .expect("the folder is there")
                .count();
            assert_eq!(left, 0, "something is left");
        }
        // A file that is there is not overwritten, and the guest does not notice.
        fs::write(&image, "mine").expect("room");
        let mut migrate = Vmferry::start(["migrate", "--vm", &vm, &uri]);
        println!("{version:?}: {}", migrate.fails(4));
        assert_eq!(source.qemu.run_state(), "running");
        assert_eq!(fs::read(&image).expect("it is there"), b"mine");
        fs::remove_file(&image).expect("it can be removed");
        // Nothing of all that is in the way.
        Park::Migrate.park(&mut source, &image);
        drop(source);
        let mut host = Host::waiting(need!(checker.host(Version::V10_0)));
        Restore::PRECOPY.restore(&image, &mut host);
        host.qemu.wait_run_state("running");
        checker.goes_on(2);
        for path in [&image, &dir.path().join("image.index")] {
            fs::remove_file(path).expect("it was parked");
        }
    }
}

/// A source that goes away leaves no file that looks like a machine.
#[test]
fn a_source_that_dies_leaves_no_file() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    let mut checker = Checker::new();
    let mut source = Host::running(need!(checker.host(Version::V10_0)));
    checker.goes_on(2);
    let file = image.display().to_string();
    let mut receive = Vmferry::start(["receive", "tcp:127.0.0.1:0", "--save", &*file]);
    let uri = receive.address();
    source.set(&json!({"max-bandwidth": 4 << 20, "downtime-limit": 1}));
    source.qemu.qmp.execute("migrate", &json!({"uri": uri}));
    until("some memory to be sent", || {
        let sent = source.migration()["ram"]["transferred"].as_u64();
        (sent > Some(1 << 20)).then_some(())
    });
    drop(source);
    println!("{}", receive.fails(1));
    let left = fs::read_dir(dir.path())
        .expect("the folder is there")
        .count();
    assert_eq!(left, 0, "something is left");
}

/// Wherever the connection breaks while the rest of a machine's memory comes, nothing is lost: its source still has that,
/// and connects again.
#[test]
fn a_broken_connection_loses_nothing_of_a_machine_that_is_parked() {
    need!(postcopy());
    let mut rng = seeded();
    for round in 0..if long() { 20 } else { 2 } {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let image = dir.path().join("image");
        let from = [Version::V10_0, Version::V7_2][round % 2];
        let mut checker = Checker::new();
        let mut source = Host::running(need!(checker.host(from)));
        checker.goes_on(2);
        source.stop();
        let before = memory_of(&mut source.qemu);
        let [ours, theirs] = ["ours", "theirs"].map(|name| dir.path().join(name));
        let listener = UnixListener::bind(&ours).expect("a socket");
        let uri = format!("unix:{}", ours.display());
        let file = image.display().to_string();
        let mut receive = Vmferry::start([
            "receive",
            &format!("unix:{}", theirs.display()),
            "--save",
            &file,
        ]);
        receive.address();
        source.enable(&["postcopy-ram"]);
        source.set(&json!({"max-bandwidth": 8 << 20, "downtime-limit": 1}));
        source.qemu.qmp.execute("migrate", &json!({"uri": uri}));
        let mut wire = link(&listener, &theirs);
        until("some memory to be sent", || {
            (wire.carried() > 1 << 20).then_some(())
        });
        wire.slow_down();
        source
            .qemu
            .qmp
            .execute("migrate-start-postcopy", &json!({}));
        source.wait_migration("postcopy-active");
        for cut in 0..rng.usize(1..3) {
            // Behind the package; END and EOF are not among it.
            let bytes = rng.u64(200_000..4 << 20);
            println!("round {round}: {from:?}, cut {cut} after {bytes} bytes");
            wire.cut_after(bytes);
            source.wait_migration("postcopy-paused");
            let resume = json!({"uri": uri, "resume": true});
            source.qemu.qmp.execute("migrate", &resume);
            wire = link(&listener, &theirs);
            wire.slow_down();
            let is_over = until("the source to go on", || match source.migration()["status"]
                .as_str()
            {
                Some("postcopy-active") => Some(false),
                Some("completed") => Some(true),
                _ => None,
            });
            if is_over {
                break;
            }
        }
        source.set(&json!({"max-bandwidth": FAST}));
        println!("{}", receive.event("completed"));
        receive.succeeds();
        source.qemu.migrated();
        drop(source);
        let to = [Version::V7_2, Version::V10_0][round % 2];
        let mut host = Host::waiting(need!(checker.host(to)).args(["-S"]));
        Restore::ALL[round % Restore::ALL.len()].restore(&image, &mut host);
        assert_same_memory("restored", &before, &memory_of(&mut host.qemu));
        host.cont();
        checker.goes_on(2);
    }
}
