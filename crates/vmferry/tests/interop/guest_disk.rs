//! A Linux guest in QEMU 10.0, which has no block migration, whose disk is an export of `vmferry serve`.

use serde_json::json;

use crate::hosts::{Hosts, MIB, let_go, serve};
use crate::need;
use crate::peers::guest::Guest;
use crate::peers::vmferry::{Vmferry, run_well};
use crate::peers::{disk, seeded, until};

/// The guest writes its records 4099 blocks apart, modulo the size: with this one they spread evenly.
const SIZE: u64 = 6632 * 4096;

/// Starts to migrate, and returns when the guest has written for a while both behind and before the bulk cursor.
fn migrate_under_load(hosts: &Hosts, guest: &Guest) -> Vmferry {
    let limits = ["--bandwidth", "2MiB/s"];
    let migrate = hosts.source.migrate(&hosts.destination.incoming(), limits);
    until("a part of the disk to arrive", || {
        (disk::data_bytes(&hosts.to) >= 10 * MIB).then_some(())
    });
    // Hardly anything moves now.
    let control = hosts.source.control();
    run_well(["set", "--qmp", &control, "--bandwidth", "16KiB/s"]);
    guest.wait_more_ticks(10);
    migrate
}

/// The guest is stopped before the switch-over. Every record that it printed is on the disk of the second host.
#[test]
fn a_guest_that_is_stopped_for_the_switch_has_every_record_at_the_other_side() {
    let hosts = Hosts::new(SIZE, &mut seeded());
    let mut guest = Guest::new();
    let machine = need!(guest.host_on_export(hosts.source.nbd_socket(), "disk0"));
    let mut qemu = machine.start();
    guest.wait_more_ticks(5);
    let mut migrate = migrate_under_load(&hosts, &guest);
    qemu.qmp.execute("stop", &json!({}));
    let ticks = guest.ticks().len();
    let_go(&hosts.source);
    migrate.succeeds();
    qemu.quit();
    hosts.source.end();
    hosts.destination.end();
    assert_eq!(guest.ticks().len(), ticks);
    guest.assert_records(&hosts.to);
    disk::assert_same(&hosts.from, &hosts.to);
}

/// The guest runs through the switch-over, and its QEMU finds the second host where the first was: the socket of the one
/// takes the place of the other's. Neither loses a record, and the guest sees no error.
#[test]
fn a_guest_that_runs_follows_its_disk() {
    let hosts = Hosts::new(SIZE, &mut seeded());
    let mut guest = Guest::new();
    let socket = hosts.source.nbd_socket().to_owned();
    let mut qemu = need!(guest.host_on_export(&socket, "disk0")).start();
    guest.wait_more_ticks(5);
    let mut migrate = migrate_under_load(&hosts, &guest);
    let_go(&hosts.source);
    migrate.succeeds();
    let completed = hosts.destination.migration();
    assert_eq!(completed["status"], "completed", "{completed}");
    let ticks = guest.ticks().len();
    disk::assert_same(&hosts.from, &hosts.to);

    std::fs::rename(hosts.destination.nbd_socket(), &socket).expect("a socket can be renamed");
    hosts.source.end();
    until("the guest to go on", || {
        if qemu.run_state() == "io-error" {
            qemu.qmp.execute("cont", &json!({}));
        }
        (guest.ticks().len() >= ticks + 20).then_some(())
    });
    qemu.qmp.execute("stop", &json!({}));
    qemu.quit();
    hosts.destination.end();
    guest.assert_records(&hosts.to);
}

/// A daemon that crashes and is started again, twice, is a pause for the guest and nothing else.
#[test]
fn a_crash_of_the_daemon_is_no_error_to_a_guest_whose_qemu_reconnects() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("disk");
    disk::random(&path, SIZE, &mut seeded());
    let mut daemon = serve(dir.path(), "host", &path);
    let mut guest = Guest::new();
    let mut qemu = need!(guest.host_on_export(daemon.nbd_socket(), "disk0")).start();
    guest.wait_more_ticks(5);
    for _ in 0..2 {
        daemon.crash();
        daemon = serve(dir.path(), "host", &path);
        guest.wait_more_ticks(20);
    }
    assert_eq!(qemu.run_state(), "running");
    qemu.qmp.execute("stop", &json!({}));
    qemu.quit();
    daemon.end();
    guest.assert_records(&path);
}
