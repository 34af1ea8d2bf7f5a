//! qcow2 images behind `serve` and `receive`, judged by `qemu-img`.

use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::hosts::{MIB, lift_limits};
use crate::need;
use crate::peers::guest::Guest;
use crate::peers::image::{self, Format};
use crate::peers::nbd::run_tool;
use crate::peers::qemu::{EVERY_BLOCK, Machine, Version};
use crate::peers::serve::Serve;
use crate::peers::vmferry::Vmferry;
use crate::peers::writer::Writer;
use crate::peers::{disk, seeded, until};

const KIB: u64 = 1 << 10;

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn serve(dir: &Path, name: &str, disk: &Path, format: Format) -> Serve {
    let flag = format!("disk0={},format={}", disk.display(), format.name());
    Serve::start(dir, name, ["--disk", &flag])
}

/// A daemon that waits for `disk0` with a new image.
fn waiting(dir: &Path, disk: &Path, format: Format, size: u64) -> Serve {
    let made = format!(
        "disk0={},format={},create=on,size={size}",
        disk.display(),
        format.name()
    );
    let incoming = ["--disk", &made, "--incoming", "tcp:127.0.0.1:0"];
    Serve::start(dir, "destination", incoming)
}

/// What programs of others write through NBD is what `qemu-img` finds in the image, and nothing is leaked.
#[test]
fn nbdcopy_and_qemu_io_write_a_qcow2() {
    let dir = folder();
    let [image, raw] = ["image", "raw"].map(|name| dir.path().join(name));
    let size = 64 * MIB;
    let data = [
        (0, 9 * MIB),
        (30 * MIB + 4 * KIB, 12 * KIB),
        (63 * MIB, MIB),
    ];
    disk::sparse(&raw, size, &data, &mut seeded());
    let made = format!(
        "disk0={},format=qcow2,create=on,size={size}",
        image.display()
    );
    let daemon = Serve::start(dir.path(), "served", ["--disk", &made]);
    let blocks = daemon.qmp().execute("query-block", &json!({}));
    assert_eq!(blocks[0]["inserted"]["drv"], "qcow2", "{blocks}");
    let export = daemon.nbd("disk0");
    need!(run_tool("nbdcopy", ["--flush", utf8(&raw), &export]));
    let commands = [
        "write -P 9 100 1000",
        "write -P 7 40M 3M",
        "write -z 1M 65536",
        "write -z -u 2M 1M",
        "discard 41M 512K",
        "write -P 5 41M 4k",
        "write -P 8 60M 100k",
    ];
    let commands: Vec<&str> = commands
        .iter()
        .flat_map(|command| ["-c", command])
        .collect();
    for target in [export.as_str(), utf8(&raw)] {
        let all = ["-f", "raw", "-d", "unmap"].into_iter();
        need!(run_tool(
            "qemu-io",
            all.chain(commands.clone()).chain([target])
        ));
    }
    daemon.end();
    need!(image::assert_clean(&image));
    let compare = ["compare", "-f", "raw", "-F", "qcow2"];
    let files = [utf8(&raw), utf8(&image)];
    need!(run_tool("qemu-img", compare.into_iter().chain(files)));
    // The same command line serves what it made.
    let daemon = Serve::start(dir.path(), "served", ["--disk", &made]);
    let back = dir.path().join("back");
    need!(run_tool("nbdcopy", [&daemon.nbd("disk0"), utf8(&back)]));
    daemon.end();
    disk::assert_same(&raw, &back);
}

#[test]
fn a_qcow2_moves_into_a_qcow2_under_load() {
    moves_under_load(Format::Qcow2, Format::Qcow2);
}

#[test]
fn a_raw_disk_moves_into_a_qcow2_under_load() {
    moves_under_load(Format::Raw, Format::Qcow2);
}

#[test]
fn a_qcow2_moves_into_a_raw_disk_under_load() {
    moves_under_load(Format::Qcow2, Format::Raw);
}

/// A disk moves under a guest that writes all over it. Every other one has an odd length, and none is full.
fn moves_under_load(source_format: Format, destination_format: Format) {
    let mut rng = seeded();
    for size in [24 * MIB, 24 * MIB + 3 * 512] {
        let dir = folder();
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        let data = [(0, 10 * MIB), (16 * MIB + 4 * KIB, 3 * MIB)];
        need!(image::create(&from, source_format, size, &data, &mut rng));
        let source = serve(dir.path(), "source", &from, source_format);
        let destination = waiting(dir.path(), &to, destination_format, size);
        let writer = Writer::start(&source.nbd("disk0"), &mut rng);
        writer.wait_more(100);
        let mut migrate = source.migrate(&destination.incoming(), ["--bandwidth", "8MiB/s"]);
        until("the migration to begin", || {
            (source.migration()["status"] != "none").then_some(())
        });
        // Not for ever: on a slow machine it may be over before.
        writer.wait_more_or_end(rng.u64(50..400));
        lift_limits(&source);
        let completed = migrate.event("completed");
        migrate.succeeds();
        assert_eq!(completed["durable"], true, "{completed}");
        let log = writer.left_behind();
        // It is whole in the file now: a daemon that is killed from here on loses nothing.
        log.verify(&need!(image::content_now(&to, destination_format)));
        source.end();
        destination.end();
        let left = need!(image::content(&from, source_format));
        let arrived = need!(image::content(&to, destination_format));
        disk::assert_same(&left, &arrived);
    }
}

/// An idle, sparse disk moves; the new image has no more clusters than the old one.
#[test]
fn a_sparse_qcow2_stays_sparse() {
    let dir = folder();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    let size = 512 * MIB;
    let data = [
        (0, 64 * KIB),
        (100 * MIB + 4 * KIB, 12 * KIB),
        (300 * MIB, 4 * MIB),
        (size - MIB, MIB),
    ];
    need!(image::create(
        &from,
        Format::Qcow2,
        size,
        &data,
        &mut seeded()
    ));
    let source = serve(dir.path(), "source", &from, Format::Qcow2);
    let destination = waiting(dir.path(), &to, Format::Qcow2, size);
    source.migrate(&destination.incoming(), []).succeeds();
    source.end();
    destination.end();
    let [before, after] = [need!(image::allocated(&from)), need!(image::allocated(&to))];
    assert!(after <= before, "{before} bytes in clusters became {after}");
    let left = need!(image::content(&from, Format::Qcow2));
    disk::assert_same(&left, &need!(image::content(&to, Format::Qcow2)));
}

/// A guest disk of QEMU 7.2 that is a qcow2 arrives in a qcow2, and the rest of the stream goes on with it in QEMU 10.0.
#[test]
fn a_qcow2_of_qemu_7_2_arrives_in_a_qcow2() {
    let dir = folder();
    let [from, to, save] = ["from", "to", "rest"].map(|name| dir.path().join(name));
    let source = need!(Machine::new(Version::V7_2)).args(["-S"]);
    let destination = need!(Machine::new(Version::V10_0)).args(["-S", "-incoming", "defer"]);
    let size = 64 * MIB;
    let data = [(0, 20 * MIB), (40 * MIB + 4 * KIB, 12 * KIB)];
    need!(image::create(
        &from,
        Format::Qcow2,
        size,
        &data,
        &mut seeded()
    ));
    let made = format!("disk0={},format=qcow2,create=on,size={size}", to.display());
    let receive = ["receive", "tcp:127.0.0.1:0", "--disk", &made];
    let mut receiver = Vmferry::start(receive.into_iter().chain(["--save", utf8(&save)]));
    let mut source = source.disk_in(Format::Qcow2, "disk0", &from).start();
    source.limits(EVERY_BLOCK);
    source.migrate_with_disks(&receiver.address());
    source.migrated();
    receiver.succeeds();
    source.quit();
    let left = need!(image::content(&from, Format::Qcow2));
    disk::assert_same(&left, &need!(image::content(&to, Format::Qcow2)));

    let mut destination = destination.disk_in(Format::Qcow2, "disk0", &to).start();
    let uri = format!("file:{}", save.display());
    destination
        .qmp
        .execute("migrate-incoming", &json!({"uri": uri}));
    destination.migrated();
    destination.qmp.execute("cont", &json!({}));
    destination.wait_run_state("running");
    destination.quit();
    need!(image::assert_clean(&to));
}

/// A qcow2 that a guest writes to moves into the qcow2 of a QEMU 7.2 that waits.
#[test]
fn a_qcow2_moves_into_qemu_7_2() {
    let dir = folder();
    let mut rng = seeded();
    let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
    let size = 32 * MIB + 3 * 512;
    let data = [(0, 10 * MIB), (20 * MIB, MIB)];
    need!(image::create(&from, Format::Qcow2, size, &data, &mut rng));
    need!(image::create(&to, Format::Qcow2, size, &[], &mut rng));
    let machine = need!(Machine::new(Version::V7_2)).args(["-incoming", "defer"]);
    let mut qemu = machine.disk_in(Format::Qcow2, "disk0", &to).start();
    let source = serve(dir.path(), "source", &from, Format::Qcow2);
    let writer = Writer::start(&source.nbd("disk0"), &mut rng);
    writer.wait_more(100);
    let mut migrate = source.migrate(&qemu.listen(), ["--downtime", "20s"]);
    migrate.succeeds();
    let log = writer.left_behind();
    qemu.migrated();
    qemu.wait_run_state("running");
    qemu.quit();
    source.end();
    let left = need!(image::content(&from, Format::Qcow2));
    let arrived = need!(image::content(&to, Format::Qcow2));
    log.verify(&arrived);
    disk::assert_same(&left, &arrived);
}

/// A raw base, a qcow2 on top of it, and one on top of that.
struct Chain {
    base: PathBuf,
    middle: PathBuf,
    top: PathBuf,
}

impl Chain {
    const SIZE: u64 = 24 * MIB;

    /// Each with something of its own.
    fn new(dir: &Path, rng: &mut fastrand::Rng) -> Option<Self> {
        let [base, middle, top] = ["base", "middle", "top"].map(|name| dir.join(name));
        disk::random(&base, Self::SIZE, rng);
        image::overlay(&middle, &base, Format::Raw)?;
        let writes = ["-c", "write -P 7 1M 1M", "-c", "write -z 5M 1M"];
        let write = |image: &Path| {
            let all = ["-f", "qcow2"].into_iter().chain(writes);
            run_tool("qemu-io", all.chain([utf8(image)]))
        };
        write(&middle)?;
        image::overlay(&top, &middle, Format::Qcow2)?;
        run_tool(
            "qemu-io",
            ["-f", "qcow2", "-c", "write -P 8 1500k 10k", utf8(&top)],
        )?;
        Some(Self { base, middle, top })
    }
}

/// Reads come from wherever they have to, writes go to the top, and the disk moves as a whole.
#[test]
fn a_chain_is_one_disk_and_what_is_below_stays_as_it_is() {
    let dir = folder();
    let mut rng = seeded();
    let chain = need!(Chain::new(dir.path(), &mut rng));
    let below = [&chain.base, &chain.middle].map(|path| std::fs::read(path).expect("an image"));
    let before = need!(image::content(&chain.top, Format::Qcow2));
    let source = serve(dir.path(), "source", &chain.top, Format::Qcow2);
    let copy = dir.path().join("copy");
    need!(run_tool("nbdcopy", [&source.nbd("disk0"), utf8(&copy)]));
    disk::assert_same(&before, &copy);

    let to = dir.path().join("to");
    let destination = waiting(dir.path(), &to, Format::Qcow2, Chain::SIZE);
    let writer = Writer::start(&source.nbd("disk0"), &mut rng);
    writer.wait_more(300);
    source
        .migrate(&destination.incoming(), ["--downtime", "20s"])
        .succeeds();
    let log = writer.left_behind();
    source.end();
    destination.end();
    let left = need!(image::content(&chain.top, Format::Qcow2));
    let arrived = need!(image::content(&to, Format::Qcow2));
    log.verify(&left);
    disk::assert_same(&left, &arrived);
    for (path, before) in [&chain.base, &chain.middle].into_iter().zip(below) {
        let now = std::fs::read(path).expect("an image");
        assert!(now == before, "{} has changed", path.display());
    }
}

/// The guest writes its records 4099 blocks apart, modulo the size: with this one they spread evenly.
const GUEST_SIZE: u64 = 6632 * 4096;

/// A Linux guest runs on an exported qcow2 over a base. The daemon crashes, twice: what the guest has synced is there. Then
/// the disk moves into another qcow2 under it.
#[test]
fn a_linux_guest_runs_on_a_qcow2_that_crashes_and_moves() {
    let dir = folder();
    let [base, from, to] = ["base", "from", "to"].map(|name| dir.path().join(name));
    disk::random(&base, GUEST_SIZE, &mut seeded());
    need!(image::overlay(&from, &base, Format::Raw));
    let mut daemon = serve(dir.path(), "source", &from, Format::Qcow2);
    let mut guest = Guest::new();
    let socket = daemon.nbd_socket().to_owned();
    let mut qemu = need!(guest.host_on_export(&socket, "disk0")).start();
    guest.wait_more_ticks(5);
    for _ in 0..2 {
        daemon.crash();
        let (errors, _) = need!(image::verdict(&from));
        assert_eq!(errors, 0, "after a crash");
        daemon = serve(dir.path(), "source", &from, Format::Qcow2);
        guest.wait_more_ticks(10);
    }
    let destination = waiting(dir.path(), &to, Format::Qcow2, GUEST_SIZE);
    let mut migrate = daemon.migrate(&destination.incoming(), ["--bandwidth", "8MiB/s"]);
    guest.wait_more_ticks(3);
    migrate.succeeds();
    let ticks = guest.ticks().len();
    std::fs::rename(destination.nbd_socket(), &socket).expect("a socket can be renamed");
    daemon.end();
    until("the guest to go on", || {
        if qemu.run_state() == "io-error" {
            qemu.qmp.execute("cont", &json!({}));
        }
        (guest.ticks().len() >= ticks + 10).then_some(())
    });
    qemu.qmp.execute("stop", &json!({}));
    qemu.quit();
    destination.end();
    guest.assert_records(&need!(image::content(&to, Format::Qcow2)));
}
