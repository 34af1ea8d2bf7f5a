//! `vmferry receive` as the destination of a real QEMU's `migrate -b`.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::need;
use crate::peers::guest::Guest;
use crate::peers::qemu::{EVERY_BLOCK, Machine, Qemu, Version};
use crate::peers::vmferry::Vmferry;
use crate::peers::{disk, long, seeded, until};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A disk on both sides.
struct Moved {
    name: &'static str,
    size: u64,
    from: PathBuf,
    to: PathBuf,
}

impl Moved {
    fn new(dir: &Path, name: &'static str, size: u64) -> Self {
        Self {
            name,
            size,
            from: dir.join(format!("{name}.from")),
            to: dir.join(format!("{name}.to")),
        }
    }
}

/// `vmferry receive` of these disks into new files, and of the rest of the stream into `save`.
fn receive(uri: &str, disks: &[Moved], save: &Path) -> Vmferry {
    let mut args = vec!["receive".to_owned(), uri.to_owned()];
    for Moved { name, size, to, .. } in disks {
        args.extend([
            "--disk".to_owned(),
            format!("{name}={},create=on,size={size}", to.display()),
        ]);
    }
    args.extend(["--save".to_owned(), save.display().to_string()]);
    Vmferry::start(args)
}

/// Three disks of odd shapes arrive whole and as sparse as they were, and what is left of the stream comes up in a QEMU
/// that does not know block migration.
#[test]
fn disks_of_qemu_7_2_arrive_and_qemu_10_0_takes_the_rest() {
    let mut source = need!(Machine::new(Version::V7_2)).args(["-S"]);
    let mut destination = need!(Machine::new(Version::V10_0)).args(["-S", "-incoming", "defer"]);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let save = dir.path().join("rest");
    let disks = [
        Moved::new(dir.path(), "full", if long() { GIB } else { 128 * MIB }),
        Moved::new(dir.path(), "odd", 64 * MIB + 3 * 512),
        Moved::new(dir.path(), "sparse", 2 * GIB),
    ];
    let [full, odd, sparse] = &disks;
    let mut rng = seeded();
    disk::random(&full.from, full.size, &mut rng);
    disk::random(&odd.from, odd.size, &mut rng);
    let data = [
        (0, 64 * KIB),
        (100 * MIB + 4 * KIB, 12 * KIB),
        (700 * MIB, 4 * MIB),
        (2 * GIB - MIB, MIB),
    ];
    disk::sparse(&sparse.from, sparse.size, &data, &mut rng);
    for disk in &disks {
        source = source.disk(disk.name, &disk.from);
        destination = destination.disk(disk.name, &disk.to);
    }

    let mut receiver = receive("tcp:127.0.0.1:0", &disks, &save);
    let mut source = source.start();
    source.limits(EVERY_BLOCK);
    source.migrate_with_disks(&receiver.address());
    source.migrated();
    receiver.succeeds();
    source.quit();
    for disk in &disks {
        disk::assert_same(&disk.from, &disk.to);
    }
    let [before, after] = [&sparse.from, &sparse.to].map(|path| disk::data_bytes(path));
    assert!(
        after.abs_diff(before) <= 2 * MIB,
        "{before} bytes of data became {after}"
    );

    let mut destination = destination.start();
    destination.qmp.execute(
        "migrate-incoming",
        &json!({"uri": format!("file:{}", save.display())}),
    );
    destination.migrated();
    let state = destination.run_state();
    assert!(["paused", "prelaunch"].contains(&state.as_str()), "{state}");
    destination.qmp.execute("cont", &json!({}));
    destination.wait_run_state("running");
}

/// A Linux guest that writes while its disk is on its way goes on in QEMU 10.0 where it was in 7.2, and has every
/// record that it was told is on the disk.
#[test]
fn a_linux_guest_goes_on_in_qemu_10_0() {
    linux_guest_moves(Switchover::GuestStopped);
}

/// The same with a guest that runs until QEMU itself stops it, so that blocks are dirty until the very end.
#[test]
fn the_disk_of_a_running_linux_guest_is_whole() {
    linux_guest_moves(Switchover::GuestRunning);
}

/// What the guest does when the source is through with the disk.
///
/// QEMU 7.2 under TCG loses memory that a running guest changes after it was first sent (seen: every third such guest
/// hung or had bad memory afterwards), but none is sent before the disk's bulk phase is over: stopped then, the memory is
/// exact. Its disk is right in both cases.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Switchover {
    GuestStopped,
    GuestRunning,
}

fn linux_guest_moves(switchover: Switchover) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let disks = [Moved::new(dir.path(), "disk0", 64 * MIB)];
    let [Moved { size, from, to, .. }] = &disks;
    let mut guest = Guest::new();
    let source = need!(guest.host(Version::V7_2, from, false));
    let destination = need!(guest.host(Version::V10_0, to, false)).args(["-incoming", "defer"]);
    let save = dir.path().join("rest");
    disk::random(from, *size, &mut seeded());

    let socket = dir.path().join("socket");
    let mut receiver = receive(&format!("unix:{}", socket.display()), &disks, &save);
    let mut source = source.start();
    guest.wait_more_ticks(3);
    migrate_under_load(&mut source, &guest, &receiver.address());
    if switchover == Switchover::GuestStopped {
        source.qmp.execute("stop", &json!({}));
    }
    source.limits(EVERY_BLOCK);
    source.migrated();
    receiver.succeeds();
    source.quit();
    disk::assert_same(from, to);
    guest.assert_records(to);
    if switchover == Switchover::GuestRunning {
        return;
    }

    let mut destination = destination.start();
    let uri = format!("file:{}", save.display());
    destination
        .qmp
        .execute("migrate-incoming", &json!({"uri": uri}));
    destination.migrated();
    destination.wait_run_state("paused");
    destination.qmp.execute("cont", &json!({}));
    guest.wait_more_ticks(10);
    destination.qmp.execute("stop", &json!({}));
    destination.quit();
    guest.assert_records(to);
}

/// Starts to migrate, too slowly to be through before the guest has written both behind and before the bulk cursor, and
/// returns when it has.
fn migrate_under_load(source: &mut Qemu, guest: &Guest, uri: &str) {
    source.limits((MIB, 1));
    source.migrate_with_disks(uri);
    let ticks = guest.ticks().len();
    until("a guest that writes while its disk is sent", || {
        let answer = source.qmp.execute("query-migrate", &json!({}));
        assert!(
            ["setup", "active"].contains(&answer["status"].as_str()?),
            "{answer}"
        );
        let sent = answer["disk"]["transferred"].as_u64()?;
        (sent >= 4 * MIB && guest.ticks().len() >= ticks + 8).then_some(())
    });
}

/// A source with one disk, which is sent under `name`; an empty name is what `-blockdev` makes of it.
fn source_of(disk: &Moved, name: &str) -> Option<Machine> {
    let machine = Machine::new(Version::V7_2)?.args(["-S"]);
    disk::random(&disk.from, disk.size, &mut seeded());
    if !name.is_empty() {
        return Some(machine.disk(name, &disk.from));
    }
    let node = format!(
        "driver=file,filename={},node-name=node0",
        disk.from.display()
    );
    Some(machine.args(["-blockdev", &node, "-device", "virtio-blk-pci,drive=node0"]))
}

#[test]
fn a_disk_that_is_not_expected_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let disks = [Moved::new(dir.path(), "expected", 8 * MIB)];
    let source = need!(source_of(&disks[0], "surprise"));
    let mut receiver = receive("tcp:127.0.0.1:0", &disks, &dir.path().join("rest"));
    let mut source = source.start();
    source.limits(EVERY_BLOCK);
    source.migrate_with_disks(&receiver.address());
    let message = receiver.fails(1);
    assert!(message.contains("surprise"), "{message}");
    // The guest is still where it was.
    assert_eq!(source.run_state(), "prelaunch");
}

#[test]
fn a_disk_without_a_name_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let disks = [Moved::new(dir.path(), "disk0", 8 * MIB)];
    let source = need!(source_of(&disks[0], ""));
    let mut receiver = receive("tcp:127.0.0.1:0", &disks, &dir.path().join("rest"));
    let mut source = source.start();
    source.limits(EVERY_BLOCK);
    source.migrate_with_disks(&receiver.address());
    let message = receiver.fails(1);
    assert!(message.contains("name"), "{message}");
}

#[test]
fn a_target_that_is_too_small_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut disks = [Moved::new(dir.path(), "disk0", 8 * MIB)];
    let source = need!(source_of(&disks[0], "disk0"));
    disks[0].size = 6 * MIB;
    let mut receiver = receive("tcp:127.0.0.1:0", &disks, &dir.path().join("rest"));
    let mut source = source.start();
    source.limits(EVERY_BLOCK);
    source.migrate_with_disks(&receiver.address());
    let message = receiver.fails(1);
    assert!(message.contains("disk0"), "{message}");
}

/// What a dead source leaves behind does not stop the same command from filling the same disks from another.
#[test]
fn a_source_that_dies_on_the_way_is_a_failure_and_a_retry_is_whole() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let disks = [Moved::new(dir.path(), "disk0", 64 * MIB)];
    let [Moved { from, to, .. }] = &disks;
    let save = dir.path().join("rest");
    let source = need!(source_of(&disks[0], "disk0"));
    let retry = need!(Machine::new(Version::V7_2))
        .args(["-S"])
        .disk("disk0", from);
    let mut receiver = receive("tcp:127.0.0.1:0", &disks, &save);
    let mut source = source.start();
    // Too slow to be through before it is killed.
    source.limits((MIB, 1));
    source.migrate_with_disks(&receiver.address());
    until("the first blocks to arrive", || {
        (disk::data_bytes(to) > 0).then_some(())
    });
    drop(source);
    receiver.fails(1);

    let mut receiver = receive("tcp:127.0.0.1:0", &disks, &save);
    let mut source = retry.start();
    source.limits(EVERY_BLOCK);
    source.migrate_with_disks(&receiver.address());
    source.migrated();
    receiver.succeeds();
    source.quit();
    disk::assert_same(from, to);
}
