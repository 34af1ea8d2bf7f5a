//! Migrations of overlays between hosts that have the same base: QEMU's `migrate -i`.

use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::hosts::{MIB, lift_limits};
use crate::need;
use crate::peers::image::{self, Format};
use crate::peers::nbd::run_tool;
use crate::peers::qemu::{EVERY_BLOCK, Machine, Version};
use crate::peers::serve::Serve;
use crate::peers::vmferry::Vmferry;
use crate::peers::writer::Writer;
use crate::peers::{disk, seeded, until};

/// An overlay that has something of its own, an empty one for the other side, and what lies below both.
struct Pair {
    from: PathBuf,
    to: PathBuf,
    base: PathBuf,
    before: Vec<u8>,
    dir: TempDir,
}

impl Pair {
    /// The base is full of random data, but for some holes. `writes` are `qemu-io` commands for the overlay.
    fn new(size: u64, writes: &[&str], rng: &mut fastrand::Rng) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let [from, to, base] = ["from", "to", "base"].map(|name| dir.path().join(name));
        let data = [(0, 5 * MIB), (7 * MIB + 4096, size - 8 * MIB - 4096)];
        disk::sparse(&base, size, &data, rng);
        image::overlay(&from, &base, Format::Raw)?;
        image::overlay(&to, &base, Format::Raw)?;
        let commands = writes.iter().flat_map(|command| ["-c", command]);
        let args = ["-f", "qcow2", "-d", "unmap"].into_iter().chain(commands);
        run_tool("qemu-io", args.chain([utf8(&from)]))?;
        let before = std::fs::read(&base).expect("a base");
        Some(Self {
            from,
            to,
            base,
            before,
            dir,
        })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn source(&self) -> Serve {
        let flag = flag(&self.from);
        Serve::start(self.path(), "source", ["--disk", &flag])
    }

    /// A daemon that waits, with more arguments.
    fn destination<const N: usize>(&self, args: [&str; N]) -> Serve {
        let flag = flag(&self.to);
        let incoming = ["--disk", &flag, "--incoming", "tcp:127.0.0.1:0"];
        let args = incoming.into_iter().chain(args);
        Serve::start(self.path(), "destination", args)
    }

    /// Both read the same, and nobody has written to the base. Returns the content of the destination.
    fn assert_same(&self) -> Option<PathBuf> {
        let left = image::content(&self.from, Format::Qcow2)?;
        let arrived = image::content(&self.to, Format::Qcow2)?;
        disk::assert_same(&left, &arrived);
        let now = std::fs::read(&self.base).expect("a base");
        assert!(now == self.before, "the base has changed");
        Some(arrived)
    }

    /// The destination's overlay has only the chunks in which the source's has something.
    fn assert_sparse(&self, chunks: u64) -> Option<()> {
        let allocated = image::allocated(&self.to)?;
        assert!(allocated <= chunks * MIB, "{allocated} bytes are allocated");
        Some(())
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn flag(path: &Path) -> String {
    format!("disk0={},format=qcow2", path.display())
}

/// Parts of five chunks: data in three, one of them across a border, zeroes over data in one, over a hole in one.
const WRITES: [&str; 4] = [
    "write -P 7 1M 4k",
    "write -P 8 10200k 100k",
    "write -z 3200k 128k",
    "write -z 5200k 128k",
];
const CHUNKS: u64 = 5;

/// What shows through from the base neither travels nor takes space, and what hides it does.
#[test]
fn only_the_top_layer_travels() {
    for size in [64 * MIB, 64 * MIB + 3 * 512] {
        let pair = need!(Pair::new(size, &WRITES, &mut seeded()));
        let (source, destination) = (pair.source(), pair.destination(["--incremental"]));
        let mut migrate = source.migrate(&destination.incoming(), ["--incremental"]);
        let completed = migrate.event("completed");
        migrate.succeeds();
        assert_eq!(completed["durable"], true, "{completed}");
        let ram = &source.migration()["disk"];
        assert!(
            ram["transferred"].as_u64() < Some((CHUNKS + 1) * MIB),
            "{ram}"
        );
        source.end();
        destination.end();
        need!(pair.assert_same());
        need!(pair.assert_sparse(CHUNKS));
    }
}

/// The same under a guest that writes all over the disk. Every other disk has an odd length.
#[test]
fn an_overlay_moves_under_load() {
    let mut rng = seeded();
    for size in [24 * MIB, 24 * MIB + 3 * 512] {
        let pair = need!(Pair::new(size, &WRITES, &mut rng));
        let (source, destination) = (pair.source(), pair.destination(["--incremental"]));
        let writer = Writer::start(&source.nbd("disk0"), &mut rng);
        writer.wait_more(30);
        let slowly = ["--incremental", "--bandwidth", "8MiB/s"];
        let mut migrate = source.migrate(&destination.incoming(), slowly);
        until("the migration to begin", || {
            (source.migration()["status"] != "none").then_some(())
        });
        writer.wait_more_or_end(rng.u64(50..400));
        lift_limits(&source);
        migrate.succeeds();
        let log = writer.left_behind();
        source.end();
        destination.end();
        log.verify(&need!(pair.assert_same()));
    }
}

/// A destination that counts blocks refuses at once, and tells what to do; a second migration is whole.
#[test]
fn a_destination_that_was_not_told_refuses() {
    let pair = need!(Pair::new(16 * MIB, &WRITES, &mut seeded()));
    let (source, destination) = (pair.source(), pair.destination([]));
    let there = destination.incoming();
    let mut migrate = source.migrate(&there, ["--incremental"]);
    migrate.fails(1);
    let why = destination.migration()["error-desc"].to_string();
    assert!(
        why.contains("only what lies in its disks' top layers"),
        "{why}"
    );
    source.migrate(&there, []).succeeds();
    source.end();
    destination.end();
    need!(pair.assert_same());
}

/// Without a base of its own a disk here must come whole, and does not.
#[test]
fn a_disk_without_the_base_is_refused() {
    let pair = need!(Pair::new(16 * MIB, &WRITES, &mut seeded()));
    let source = pair.source();
    let flag = format!(
        "disk0={},format=qcow2,create=on,size=16MiB",
        pair.path().join("alone").display()
    );
    let waits = ["--incoming", "tcp:127.0.0.1:0", "--incremental"];
    let args = ["--disk", &flag].into_iter().chain(waits);
    let destination = Serve::start(pair.path(), "destination", args);
    let mut migrate = source.migrate(&destination.incoming(), ["--incremental"]);
    migrate.fails(1);
    let why = destination.migration()["error-desc"].to_string();
    assert!(
        why.contains("an empty image over the source's base"),
        "{why}"
    );
    source.end();
    destination.end();
}

/// A file says nothing about itself: whoever reads it has to be told.
#[test]
fn a_stored_stream_of_top_layers_goes_over_the_base_again() {
    let pair = need!(Pair::new(16 * MIB, &WRITES, &mut seeded()));
    let source = pair.source();
    let stream = format!("file:{}", pair.path().join("stream").display());
    source
        .migrate(&stream, ["--incremental", "--one-way"])
        .succeeds();
    source.end();
    let flag = flag(&pair.to);
    let receive = ["receive", &stream, "--disk", &flag];
    let why = Vmferry::start(receive).fails(1);
    assert!(why.contains("this side was not told"), "{why}");
    let told = receive.into_iter().chain(["--incremental"]);
    Vmferry::start(told).succeeds();
    need!(pair.assert_same());
    need!(pair.assert_sparse(CHUNKS));
}

/// The top layer of a QEMU 7.2 arrives over the same base.
#[test]
fn an_overlay_of_qemu_7_2_arrives() {
    for size in [64 * MIB, 64 * MIB + 3 * 512] {
        let pair = need!(Pair::new(size, &WRITES, &mut seeded()));
        let source = need!(Machine::new(Version::V7_2)).args(["-S"]);
        let (flag, save) = (flag(&pair.to), pair.path().join("rest"));
        let receive = ["receive", "tcp:127.0.0.1:0", "--incremental"];
        let into = ["--disk", &flag, "--save", utf8(&save)];
        let mut receiver = Vmferry::start(receive.into_iter().chain(into));
        let mut source = source.disk_in(Format::Qcow2, "disk0", &pair.from).start();
        source.limits(EVERY_BLOCK);
        let arguments = json!({"uri": receiver.address(), "inc": true});
        source.qmp.execute("migrate", &arguments);
        source.migrated();
        receiver.succeeds();
        source.quit();
        need!(pair.assert_same());
        need!(pair.assert_sparse(CHUNKS));
    }
}

/// QEMU 7.2 ends a migration whose first pass is not over if its downtime limit lets it. What is missing cannot be counted
/// here, but that its cursor was in the middle can be seen.
#[test]
fn a_qemu_7_2_that_ends_too_early_is_noticed() {
    let size = 512 * MIB;
    let writes = ["write -P 7 0 200M"];
    let pair = need!(Pair::new(size, &writes, &mut seeded()));
    let source = need!(Machine::new(Version::V7_2)).args(["-S"]);
    let (flag, save) = (flag(&pair.to), pair.path().join("rest"));
    let receive = ["receive", "tcp:127.0.0.1:0", "--incremental"];
    let into = ["--disk", &flag, "--save", utf8(&save)];
    let mut receiver = Vmferry::start(receive.into_iter().chain(into));
    let mut source = source.disk_in(Format::Qcow2, "disk0", &pair.from).start();
    // Slow enough that much is left when it looks at the limit for the first time.
    source.limits((32 << 20, 1_000_000));
    let arguments = json!({"uri": receiver.address(), "inc": true});
    source.qmp.execute("migrate", &arguments);
    let why = receiver.fails(1);
    assert!(why.contains("has ended its migration at"), "{why}");
    source.quit();
}

/// An overlay that a guest writes to moves into the overlay of a QEMU 7.2 that waits.
#[test]
fn an_overlay_moves_into_qemu_7_2() {
    let mut rng = seeded();
    for size in [32 * MIB, 32 * MIB + 3 * 512] {
        let pair = need!(Pair::new(size, &WRITES, &mut rng));
        let machine = need!(Machine::new(Version::V7_2)).args(["-incoming", "defer"]);
        let mut qemu = machine.disk_in(Format::Qcow2, "disk0", &pair.to).start();
        let source = pair.source();
        let writer = Writer::start(&source.nbd("disk0"), &mut rng);
        writer.wait_more(30);
        let flags = ["--incremental", "--downtime", "20s"];
        let mut migrate = source.migrate(&qemu.listen(), flags);
        migrate.succeeds();
        let log = writer.left_behind();
        qemu.migrated();
        qemu.wait_run_state("running");
        qemu.quit();
        source.end();
        log.verify(&need!(pair.assert_same()));
    }
}

/// Idle: what does not travel is not allocated there either.
#[test]
fn qemu_7_2_gets_only_the_top_layer() {
    let pair = need!(Pair::new(64 * MIB, &WRITES, &mut seeded()));
    let machine = need!(Machine::new(Version::V7_2)).args(["-incoming", "defer"]);
    let mut qemu = machine.disk_in(Format::Qcow2, "disk0", &pair.to).start();
    let source = pair.source();
    // As QEMU's clients ask for it.
    let arguments = json!({"uri": qemu.listen(), "inc": true});
    source.qmp().execute("migrate", &arguments);
    source.wait_status("completed");
    qemu.migrated();
    qemu.wait_run_state("running");
    qemu.quit();
    source.end();
    need!(pair.assert_same());
    need!(pair.assert_sparse(CHUNKS));
}
