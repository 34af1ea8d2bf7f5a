//! A Linux guest in a QEMU that reconnects, while everything around its disk breaks.

use std::time::Duration;

use serde_json::{Value, json};

use crate::link::{Event, Link, Moment};
use crate::need;
use crate::peers::guest::Guest;
use crate::peers::{disk, seeded, until};
use crate::serve::{CommandLine, DISK, Serve};

const MIB: u64 = 1 << 20;
/// Slow enough that the guest writes meanwhile.
const BANDWIDTH: u64 = 16 * MIB;

/// Starts to migrate, and waits until that is over, or the daemon.
fn migrate(source: &Serve, uri: &str) {
    let parameters = json!({"max-bandwidth": BANDWIDTH});
    let parameters = source.query("migrate-set-parameters", &parameters);
    parameters.expect("a daemon that is told how fast");
    let begun = source.query("migrate", &json!({"uri": uri}));
    begun.expect("a migration that begins");
    let is_over = |info: &Value| {
        let status = info["status"].as_str().unwrap_or_default();
        ["completed", "failed"].contains(&status) || info["x-hand-over"] == "undecided"
    };
    until("the migration to end", || {
        let info = source.query("query-migrate", &json!({}));
        info.map_or(Some(()), |info| is_over(&info).then_some(()))
    });
}

/// The daemon is killed in the middle of a migration; another migration is cut behind the barrier, and the daemon killed
/// and told that the disk lives here. To the guest both are a pause, and in the end the disk moves with all it wrote.
#[test]
fn a_guest_sees_no_error_when_migrations_of_its_disk_fail() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let line = CommandLine::new("source", dir.path(), "");
    disk::random(line.image(), 32 * MIB, &mut seeded());
    let target =
        CommandLine::new("destination", dir.path(), "").args(["--incoming", "tcp:127.0.0.1:0"]);
    target.make_image(32 * MIB);
    let mut guest = Guest::new();
    let machine = need!(guest.host_on_export(&line.nbd_socket(), DISK));
    let mut source = line.start().expect("a daemon that starts");
    let mut destination = target.start().expect("a daemon that starts");
    let mut qemu = machine.start();
    guest.wait_more_ticks(5);

    let kill = Event::Kill(vec![source.pid()], Duration::ZERO);
    for (moment, event) in [
        (Moment::Forth(8 * MIB), kill),
        (Moment::Tail(0), Event::Close),
    ] {
        let link = Link::new(&destination.incoming(), moment, event);
        migrate(&source, &link.uri());
        assert!(link.end().struck, "nothing happened at {moment:?}");
        source.kill();
        source = line.start().expect("a daemon that starts again");
        // Nothing that was sent can have made the destination live.
        assert_eq!(destination.hold(), "writes");
        if source.hold() == "everything" {
            let (status, said) = line.run(["resolve", "serve"]);
            assert_eq!(status, Some(0), "{said}");
        }
        guest.wait_more_ticks(10);
        assert_eq!(qemu.run_state(), "running");
    }

    qemu.qmp.execute("stop", &json!({}));
    migrate(&source, &destination.incoming());
    assert_eq!(source.ask("query-migrate")["status"], "completed");
    qemu.quit();
    destination.terminate();
    guest.assert_records(target.image());
    disk::assert_same(line.image(), target.image());
}
