//! The peers by themselves. If one of these fails, the harness or the machine is at fault, not the program.

use std::path::Path;

use serde_json::json;

use crate::need;
use crate::peers::guest::Guest;
use crate::peers::nbd::{Fio, QemuNbd};
use crate::peers::qemu::{EVERY_BLOCK, Machine, Version};
use crate::peers::{disk, seeded};

const MIB: u64 = 1 << 20;

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn stopped(version: Version, path: &Path) -> Option<Machine> {
    Some(Machine::new(version)?.args(["-S"]).disk("disk0", path))
}

#[test]
fn qemu_7_2_migrates_a_disk_to_itself() {
    let dir = temporary();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    let source = need!(stopped(Version::V7_2, &from));
    disk::random(&from, 64 * MIB, &mut seeded());
    disk::sparse(&to, 64 * MIB, &[], &mut fastrand::Rng::with_seed(0));

    let mut source = source.start();
    let mut destination = need!(stopped(Version::V7_2, &to))
        .args(["-incoming", "defer"])
        .start();
    let uri = destination.listen();
    source.limits(EVERY_BLOCK);
    source.migrate_with_disks(&uri);
    source.migrated();
    destination.migrated();
    destination.quit();
    disk::assert_same(&from, &to);
}

#[test]
fn qemu_7_2_writes_a_stream_with_its_disk_into_a_file() {
    let dir = temporary();
    let [from, stream] = ["from", "stream"].map(|name| dir.path().join(name));
    let source = need!(stopped(Version::V7_2, &from));
    disk::random(&from, 8 * MIB, &mut seeded());

    let mut source = source.start();
    source.limits(EVERY_BLOCK);
    source.migrate_with_disks(&format!("exec:cat > {}", stream.display()));
    source.migrated();
    source.quit();
    let bytes = std::fs::read(&stream).expect("the stream can be read");
    assert!(bytes.starts_with(b"QEVM\0\0\0\x03"));
    assert!(
        bytes.len() as u64 > 8 * MIB,
        "{} bytes do not hold the disk",
        bytes.len()
    );
    // The description is the last thing in a stream: it is whole.
    assert!(bytes.ends_with(b"]}"), "no description at the end");
}

#[test]
fn qemu_10_0_answers() {
    let mut qemu = need!(Machine::new(Version::V10_0)).args(["-S"]).start();
    let version = qemu.qmp.execute("query-version", &json!({}));
    assert_eq!(version["qemu"]["major"], 10, "{version}");
    assert_eq!(qemu.run_state(), "prelaunch");
    qemu.quit();
}

#[test]
fn the_linux_guest_ticks_writes_and_moves_between_two_qemu_10_0() {
    let dir = temporary();
    let path = dir.path().join("disk");
    let mut guest = Guest::new();
    let source = need!(guest.host(Version::V10_0, &path, true));
    disk::sparse(&path, 64 * MIB, &[], &mut fastrand::Rng::with_seed(0));

    let mut source = source.start();
    guest.wait_more_ticks(10);
    let mut destination = need!(guest.host(Version::V10_0, &path, true))
        .args(["-incoming", "defer"])
        .start();
    let uri = destination.listen();
    source.qmp.execute("migrate", &json!({"uri": uri}));
    source.migrated();
    destination.migrated();
    destination.qmp.event("RESUME");
    guest.wait_more_ticks(10);
    destination.qmp.execute("stop", &json!({}));
    destination.quit();
    guest.assert_records(&path);
}

#[test]
fn fio_writes_through_qemu_nbd_what_it_reads_back() {
    let dir = temporary();
    let path = dir.path().join("disk");
    disk::sparse(&path, 16 * MIB, &[], &mut fastrand::Rng::with_seed(0));
    let server = need!(QemuNbd::start(&path));
    let options = [
        "rw=randwrite",
        "bs=4k",
        "size=16m",
        "io_size=4m",
        "iodepth=8",
        "verify=crc32c",
    ];
    let report = need!(Fio::start(&server.uri(), options)).finish();
    assert_eq!(report["error"], 0, "{report}");
    assert_eq!(report["write"]["io_bytes"], 4 * MIB, "{report}");
    assert!(
        disk::data_bytes(&path) >= 2 * MIB,
        "nothing arrived on the disk"
    );
}
