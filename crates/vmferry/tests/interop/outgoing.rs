//! `vmferry serve` and `vmferry migrate` into a real QEMU 7.2 that waits with `-incoming`.

use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::hosts::{MIB, lift_limits};
use crate::need;
use crate::peers::nbd::Fio;
use crate::peers::qemu::{Machine, Qemu, Version};
use crate::peers::serve::Serve;
use crate::peers::writer::Writer;
use crate::peers::{disk, long, seeded, until};

const KIB: u64 = 1 << 10;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

/// A QEMU 7.2 that waits for a migration of these disks; `None` if there is none.
fn waiting(disks: &[(&str, &Path)]) -> Option<Machine> {
    let mut machine = Machine::new(Version::V7_2)?.args(["-incoming", "defer"]);
    for (name, path) in disks {
        let drive = format!(
            "file={},format=raw,if=virtio,id={name},discard=unmap",
            path.display()
        );
        machine = machine.args(["-drive", &drive]);
    }
    Some(machine)
}

/// The destination has taken the machine over; its disks are closed.
fn comes_up(mut qemu: Qemu) {
    qemu.migrated();
    qemu.wait_run_state("running");
    qemu.quit();
}

/// A disk on both sides: random on this one, empty on the other.
fn pair(dir: &Path, name: &str, size: u64, rng: &mut fastrand::Rng) -> [PathBuf; 2] {
    let [from, to] = ["from", "to"].map(|side| dir.join(format!("{name}.{side}")));
    disk::random(&from, size, rng);
    disk::sparse(&to, size, &[], rng);
    [from, to]
}

fn disk_args(name: &str, path: &Path) -> [String; 2] {
    ["--disk".to_owned(), format!("{name}={}", path.display())]
}

/// Options of `migrate` that keep the bulk phase going for a few seconds.
const SLOWLY: [&str; 2] = ["--bandwidth", "8MiB/s"];

/// Waits for a migration that was just started.
fn begins(source: &Serve) {
    let mut qmp = source.qmp();
    until("the migration to begin", || {
        let info = qmp.execute("query-migrate", &json!({}));
        (info["status"] != "none").then_some(())
    });
}

/// Twenty times in a row: a disk moves under a guest that writes all over it through NBD. QEMU comes up, and has
/// every acknowledged write; nothing else was written after the switch, so it has the very bytes that the source had.
/// Every other disk has an odd length.
#[test]
fn qemu_7_2_comes_up_with_every_acknowledged_write() {
    let mut rng = seeded();
    for round in 0..if long() { 100 } else { 20 } {
        let dir = folder();
        let size = match round % 4 {
            0 => 32 * MIB,
            // Lengths that are no multiple of a chunk, of a page, of anything but a sector.
            1 => 32 * MIB + 3 * 512,
            2 => 24 * MIB,
            _ => rng.u64(20 * 2048..40 * 2048) * 512,
        };
        println!("round {round}: {size} bytes");
        let [from, to] = pair(dir.path(), "disk0", size, &mut rng);
        let mut qemu = need!(waiting(&[("disk0", &to)])).start();
        let source = Serve::start(dir.path(), "source", disk_args("disk0", &from));
        let writer = Writer::start(&source.nbd("disk0"), &mut rng);
        writer.wait_more(100);

        let mut migrate = source.migrate(&qemu.listen(), SLOWLY);
        begins(&source);
        // Not for ever: on a slow machine it may be over before.
        writer.wait_more_or_end(rng.u64(50..400));
        lift_limits(&source);
        let completed = migrate.event("completed");
        migrate.succeeds();
        // A QEMU does not say that what it has loaded is on stable storage.
        assert_eq!(completed["durable"], false, "{completed}");
        let log = writer.left_behind();
        comes_up(qemu);
        source.end();

        log.verify(&to);
        disk::assert_same(&from, &to);
    }
}

/// `fio` as the guest: each block is written once, for half a minute if it were let. What it remembers of its writes when
/// its disk moves away from under it, it checks by itself on the disk of the destination.
#[test]
fn fio_finds_what_it_wrote_on_the_disk_of_qemu_7_2() {
    let dir = folder();
    let [from, to] = pair(dir.path(), "disk0", 64 * MIB, &mut seeded());
    let mut qemu = need!(waiting(&[("disk0", &to)])).start();
    let source = Serve::start(dir.path(), "source", disk_args("disk0", &from));
    let state = format!("aux-path={}", dir.path().display());
    let job = ["rw=randwrite", "bs=4k", "size=64m", "verify=crc32c", &state];
    let load = [
        "iodepth=8",
        "rate_iops=500",
        "do_verify=0",
        "verify_state_save=1",
    ];
    let fio = need!(Fio::start(
        &source.nbd("disk0"),
        job.into_iter().chain(load)
    ));
    until("fio to write", || {
        let disks = source.qmp().execute("query-block", &json!({}));
        (disks[0]["inserted"]["x-dirty-bytes"].as_u64()? >= 8 * MIB).then_some(())
    });
    let mut migrate = source.migrate(&qemu.listen(), SLOWLY);
    begins(&source);
    lift_limits(&source);
    migrate.succeeds();
    let report = fio.interrupted();
    comes_up(qemu);
    source.end();

    let written = report["write"]["total_ios"].as_u64();
    assert!(written > Some(50), "{report}");
    let check = ["verify_only", "verify_state_load=1", "verify_fatal=1"];
    let report = need!(Fio::on_file(&to, job.into_iter().chain(check))).finish();
    let read = report["read"]["total_ios"].as_u64();
    // Those that were under way may be missing.
    assert!(read.map(|read| read + 8) >= written, "{written:?} {report}");
    disk::assert_same(&from, &to);
}

/// Disks of several sizes go to the drives of their names, wherever those stand; one that is read-only stays, and one that
/// `--disk` does not name stays too, and is served on.
#[test]
fn several_disks_find_their_drives_and_others_stay() {
    let dir = folder();
    let mut rng = seeded();
    let [from_a, to_a] = pair(dir.path(), "a", 6 * MIB, &mut rng);
    let [from_b, to_b] = pair(dir.path(), "b", 9 * MIB + 512, &mut rng);
    let [cd, stays] = ["cd", "stays"].map(|name| dir.path().join(name));
    disk::random(&cd, 3 * MIB, &mut rng);
    disk::random(&stays, 5 * MIB, &mut rng);
    let mut qemu = need!(waiting(&[("b", &to_b), ("a", &to_a)])).start();
    let mut args: Vec<String> = [("a", &from_a), ("stays", &stays), ("b", &from_b)]
        .into_iter()
        .flat_map(|(name, path)| disk_args(name, path))
        .collect();
    args.extend([
        "--disk".to_owned(),
        format!("cd={},readonly=on", cd.display()),
    ]);
    let source = Serve::start(dir.path(), "source", args);
    let writers = ["a", "b"].map(|name| Writer::start(&source.nbd(name), &mut rng));
    let stayer = Writer::start(&source.nbd("stays"), &mut rng);
    writers.iter().for_each(|writer| writer.wait_more(50));

    let all = source.qmp().execute("query-block", &json!({}));
    assert_eq!(all[3]["inserted"]["ro"], true, "{all}");
    let options = ["--disk", "b", "--disk", "a", "--downtime", "20s"];
    let mut migrate = source.migrate(&qemu.listen(), options);
    let completed = migrate.event("completed");
    migrate.succeeds();
    assert_eq!(completed["total-bytes"], 15 * MIB + 512, "{completed}");
    let logs = writers.map(Writer::left_behind);
    comes_up(qemu);
    for (log, [from, to]) in logs.iter().zip([[&from_a, &to_a], [&from_b, &to_b]]) {
        assert_ne!(log.count, 0);
        log.verify(to);
        disk::assert_same(from, to);
    }
    stayer.wait_more(20);
    let log = stayer.finish();
    source.end();
    log.verify(&stays);
}

/// An idle disk that is mostly holes stays one, although the destination's drive held data there.
#[test]
fn holes_stay_holes_in_qemu_7_2() {
    let dir = folder();
    let mut rng = seeded();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    let size = 512 * MIB;
    let data = [
        (0, 64 * KIB),
        (100 * MIB + 4 * KIB, 12 * KIB),
        (300 * MIB, 4 * MIB),
        (size - MIB, MIB),
    ];
    disk::sparse(&from, size, &data, &mut rng);
    disk::sparse(&to, size, &[(200 * MIB, 8 * MIB)], &mut rng);
    let mut qemu = need!(waiting(&[("disk0", &to)])).start();
    let source = Serve::start(dir.path(), "source", disk_args("disk0", &from));
    let mut migrate = source.migrate(&qemu.listen(), []);
    migrate.succeeds();
    comes_up(qemu);
    source.end();
    disk::assert_same(&from, &to);
    let [before, after] = [&from, &to].map(|path| disk::data_bytes(path));
    assert!(
        after <= before + 2 * MIB,
        "{before} bytes of data became {after}"
    );
}

/// A QEMU that does not have the disk refuses; the source serves on, and moves to one that has.
#[test]
fn a_qemu_without_the_disk_refuses_and_a_retry_moves_it() {
    let dir = folder();
    let mut rng = seeded();
    let [from, to] = pair(dir.path(), "disk0", 16 * MIB, &mut rng);
    let other = dir.path().join("other");
    disk::sparse(&other, 16 * MIB, &[], &mut rng);
    let mut wrong = need!(waiting(&[("other", &other)])).start();
    let source = Serve::start(dir.path(), "source", disk_args("disk0", &from));
    let writer = Writer::start(&source.nbd("disk0"), &mut rng);
    writer.wait_more(50);
    let message = source.migrate(&wrong.listen(), []).fails(1);
    assert!(message.contains("closed the channel"), "{message}");
    assert!(wrong.errors().contains("disk0"), "{}", wrong.errors());
    drop(wrong);
    writer.wait_more(50);

    let mut right = need!(waiting(&[("disk0", &to)])).start();
    source
        .migrate(&right.listen(), ["--downtime", "20s"])
        .succeeds();
    let log = writer.left_behind();
    comes_up(right);
    source.end();
    log.verify(&to);
    disk::assert_same(&from, &to);
}
