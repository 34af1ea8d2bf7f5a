//! The machine stops while snapshots are made, applied and deleted. What was flushed is there, and
//! every snapshot is there as a whole, or not at all, and stays so whatever comes next.

use std::ops::Range;
use std::sync::Arc;

use fastrand::Rng;
use vmferry_disk::{BlockDevice, Unmap};
use vmferry_qcow2::{CreateOptions, Error, OpenOptions, Qcow2Disk, Repair, check, create};

use crate::crash::{random_range, survivors};
use crate::snapshots::{create_with_state, new_snapshot, read_state};
use crate::support::{Bytes, Event, Folder, MemoryFile, qemu_img, rounds, seed};

/// What there is when everything is durable.
#[derive(Clone)]
struct World {
    disk: Vec<u8>,
    snapshots: Vec<Kept>,
}

#[derive(Clone)]
struct Kept {
    name: String,
    disk: Vec<u8>,
    state: Vec<u8>,
}

enum What {
    /// These bytes have this value, or nothing of it happened yet.
    Fill(Range<usize>, u8),
    /// All that came before is durable.
    Durable(World),
    /// The same, by an operation on snapshots.
    Snapshot(World),
    /// The same, and the disk has another length than before.
    Resized(World),
}

impl What {
    fn world(&self) -> Option<&World> {
        match self {
            Self::Fill(..) => None,
            Self::Durable(world) | Self::Snapshot(world) | Self::Resized(world) => Some(world),
        }
    }
}

struct Deed {
    events: Range<usize>,
    what: What,
}

struct History {
    base: Bytes,
    start: World,
    log: Vec<Event>,
    deeds: Vec<Deed>,
    options: CreateOptions,
}

fn open(file: &MemoryFile) -> Qcow2Disk {
    let options = OpenOptions {
        l2_cache_bytes: 0,
        ..OpenOptions::default()
    };
    Qcow2Disk::open(Arc::new(file.clone()), options, None).unwrap()
}

fn read_all(disk: &Qcow2Disk) -> Vec<u8> {
    let mut read = vec![0xEE; disk.disk_bytes() as usize];
    disk.read_at(&mut read, 0).unwrap();
    read
}

fn make_history(rng: &mut Rng) -> History {
    let version = if rng.u8(..4) == 0 { 2 } else { 3 };
    let cluster_bits = [9, 9, 10, 12][rng.usize(..4)];
    let disk_bytes = rng.usize(1..=96 << 10);
    let options = CreateOptions {
        version,
        cluster_bits,
        refcount_order: if version == 2 { 4 } else { rng.u32(2..=6) },
        ..CreateOptions::new(disk_bytes as u64)
    };
    let file = MemoryFile::default();
    create(&file, &options).unwrap();
    let mut world = World {
        disk: vec![0; disk_bytes],
        snapshots: Vec::new(),
    };
    let mut history = History {
        base: file.bytes(),
        start: world.clone(),
        log: Vec::new(),
        deeds: Vec::new(),
        options,
    };
    file.record();
    let disk = open(&file);
    for tag in 1..rng.u8(6..24) {
        let first_event = file.log_length();
        if let Some(what) = act(rng, &disk, &mut world, &history.options, tag) {
            history.deeds.push(Deed {
                events: first_event..file.log_length(),
                what,
            });
        }
    }
    disk.close().unwrap();
    history.log = file.log();
    history
}

fn act(
    rng: &mut Rng,
    disk: &Qcow2Disk,
    world: &mut World,
    options: &CreateOptions,
    tag: u8,
) -> Option<What> {
    let range = random_range(rng, world.disk.len(), 1 << options.cluster_bits);
    let (start, size) = (range.start as u64, range.len() as u64);
    match rng.u8(..14) {
        0..=4 => {
            disk.write_at(&vec![tag; range.len()], start).unwrap();
            world.disk[range.clone()].fill(tag);
            Some(What::Fill(range, tag))
        }
        5 => {
            let unmap = if rng.bool() { Unmap::May } else { Unmap::Never };
            disk.write_zeroes(start, size, unmap, false).unwrap();
            world.disk[range.clone()].fill(0);
            Some(What::Fill(range, 0))
        }
        6 => {
            disk.discard(start, size).unwrap();
            disk.read_at(&mut world.disk[range.clone()], start).unwrap();
            Some(What::Fill(range, 0))
        }
        7 => {
            disk.flush().unwrap();
            Some(What::Durable(world.clone()))
        }
        8 if options.version == 3 || world.snapshots.is_empty() => {
            let length = rng.usize(1..=world.disk.len() * 3 / 2);
            disk.resize(length as u64).unwrap();
            let changes = length != world.disk.len();
            world.disk.resize(length, 0);
            changes.then(|| What::Resized(world.clone()))
        }
        8..=10 if world.snapshots.len() < 2 => {
            let name = format!("s{tag}");
            let state = vec![tag; [0, 700, 9000][rng.usize(..3)]];
            match state.is_empty() {
                true => drop(disk.create_snapshot(&new_snapshot(&name)).unwrap()),
                false => drop(create_with_state(disk, &name, &state)),
            }
            let disk = world.disk.clone();
            world.snapshots.push(Kept { name, disk, state });
            Some(What::Snapshot(world.clone()))
        }
        11 | 12 if !world.snapshots.is_empty() => {
            let kept = &world.snapshots[rng.usize(..world.snapshots.len())];
            disk.apply_snapshot(&kept.name).unwrap();
            world.disk = kept.disk.clone();
            Some(What::Snapshot(world.clone()))
        }
        _ if !world.snapshots.is_empty() => {
            let index = rng.usize(..world.snapshots.len());
            let kept = world.snapshots.remove(index);
            disk.delete_snapshot(&kept.name).unwrap();
            Some(What::Snapshot(world.clone()))
        }
        _ => None,
    }
}

/// Is this what may be found, if `old` was durable and `since` came after it?
fn may_be(read: &[u8], old: &[u8], since: &[&Deed]) -> bool {
    let filled = |at: usize, value: u8| {
        since.iter().any(|deed| match &deed.what {
            What::Fill(range, fill) => range.contains(&at) && *fill == value,
            _ => false,
        })
    };
    let (mut common, mut length) = (old.len(), old.len());
    if let Some(What::Resized(new)) = since.last().map(|deed| &deed.what) {
        common = common.min(new.disk.len()).min(read.len());
        length = if read.len() == old.len() {
            old.len()
        } else {
            new.disk.len()
        };
        if read.iter().skip(old.len()).any(|byte| *byte != 0) {
            return false;
        }
    }
    read.len() == length && (0..common).all(|at| read[at] == old[at] || filled(at, read[at]))
}

fn verify(rng: &mut Rng, history: &History, cut: usize, image: &Bytes) {
    let context = format!(
        "stopped after event {cut} of {}: {:?}",
        history.log.len(),
        history.options
    );
    let last = history
        .deeds
        .iter()
        .rposition(|deed| deed.events.end <= cut && deed.what.world().is_some());
    let old = last.and_then(|last| history.deeds[last].what.world());
    let old = old.unwrap_or(&history.start);
    let since: Vec<&Deed> = history.deeds[last.map_or(0, |last| last + 1)..]
        .iter()
        .take_while(|deed| deed.events.start < cut)
        .collect();
    let under_way = since.last().map(|deed| &deed.what);
    let file = MemoryFile::new(image.clone());
    let report = check(&file, Repair::None).unwrap();
    let flags_may_be = matches!(under_way, Some(What::Snapshot(_)));
    assert_eq!(report.errors, 0, "{context}: {:?}", report.findings);
    assert!(
        report.flags == 0 || flags_may_be,
        "{context}: {:?}",
        report.findings
    );
    let disk = open(&file);
    let read = read_all(&disk);
    let found: Vec<String> = disk
        .snapshots()
        .into_iter()
        .map(|known| known.name)
        .collect();
    let has = |world: &World| {
        let names = world.snapshots.iter().map(|kept| &kept.name);
        found.iter().eq(names)
    };
    let new = under_way.and_then(What::world);
    let world = match new {
        _ if has(old) && may_be(&read, &old.disk, &since) => old,
        Some(new) if has(new) && (read == new.disk || may_be(&read, &old.disk, &since)) => new,
        _ => panic!("{context}: neither what was flushed nor what came next: {found:?}"),
    };
    verify_snapshots(&file, world, &context);
    go_on(rng, &disk, read, &context);
    disk.close().unwrap();
    verify_snapshots(&file, world, &context);
    let repair = if report.flags == 0 {
        Repair::Leaks
    } else {
        Repair::All
    };
    let report = check(&file, repair).unwrap();
    assert_eq!(report.errors, 0, "{context}: {:?}", report.findings);
    // Flags that a leak has hidden show when it is mended.
    let report = check(&file, Repair::All).unwrap();
    assert!(report.is_clean(), "{context}: {:?}", report.findings);
    let report = check(&file, Repair::None).unwrap();
    assert!(report.is_clean(), "{context}: {:?}", report.findings);
    verify_snapshots(&file, world, &context);
}

/// Each snapshot has what it had, state and content.
fn verify_snapshots(file: &MemoryFile, world: &World, context: &str) {
    for kept in &world.snapshots {
        let copy = MemoryFile::new(file.bytes());
        let disk = open(&copy);
        assert!(read_state(&disk, &kept.name) == kept.state, "{context}");
        match disk.apply_snapshot(&kept.name) {
            Ok(()) => assert!(read_all(&disk) == kept.disk, "{context}: {}", kept.name),
            // The crash has leaked users that narrow refcounts had left.
            Err(Error::RefcountOverflow { .. }) => {}
            Err(error) => panic!("{context}: {error}"),
        }
    }
}

/// The next writer, with a snapshot of its own.
fn go_on(rng: &mut Rng, disk: &Qcow2Disk, mut model: Vec<u8>, context: &str) {
    let write = |rng: &mut Rng, model: &mut [u8], tag: u8| {
        let range = random_range(rng, model.len(), 4096);
        disk.write_at(&vec![tag; range.len()], range.start as u64)
            .unwrap();
        model[range].fill(tag);
    };
    write(rng, &mut model, 251);
    let made = match disk.create_snapshot(&new_snapshot("next")) {
        Ok(_) => true,
        Err(Error::RefcountOverflow { .. }) => false,
        Err(error) => panic!("{context}: {error}"),
    };
    let then = model.clone();
    write(rng, &mut model, 252);
    write(rng, &mut model, 253);
    assert!(
        read_all(disk) == model,
        "{context}: writing on changed something else"
    );
    if made {
        if rng.bool() && disk.apply_snapshot("next").is_ok() {
            assert!(read_all(disk) == then, "{context}: the next snapshot");
        }
        disk.delete_snapshot("next").unwrap();
    }
}

fn check_with_qemu(image: &Bytes) {
    let folder = Folder::new();
    let path = folder.path("image.qcow2");
    image.to_file(std::path::Path::new(&path));
    let (status, text) = qemu_img(&["check", "-f", "qcow2", &path]);
    // 3: leaks and nothing else. It counts flags as errors.
    let flags = text.lines().filter(|line| line.starts_with("ERROR"));
    let only_flags = flags.clone().count() > 0 && flags.clone().all(|line| line.contains("COPIED"));
    assert!(
        status == 0 || status == 3 || (status == 2 && only_flags),
        "qemu-img check: {status}: {text}"
    );
}

fn run(seed: u64) -> usize {
    let mut rng = Rng::with_seed(seed);
    let history = make_history(&mut rng);
    let mut durable = history.base.clone();
    let mut flushed_until = 0;
    let mut images = 0;
    for cut in 0..=history.log.len() {
        let pending = &history.log[flushed_until..cut];
        for _ in 0..2 {
            let image = survivors(&mut rng, &durable, pending);
            if rng.u16(..200) == 0 {
                check_with_qemu(&image);
            }
            verify(&mut rng, &history, cut, &image);
            images += 1;
        }
        if matches!(history.log.get(cut), Some(Event::Flush)) {
            for event in pending {
                event.apply(&mut durable);
            }
            flushed_until = cut + 1;
        }
    }
    images
}

#[test]
fn a_crash_leaves_every_snapshot_whole() {
    let first = seed();
    let mut images = 0;
    for number in 0..rounds(60) {
        let seed = first.wrapping_add(number);
        match std::panic::catch_unwind(|| run(seed)) {
            Ok(count) => images += count,
            Err(panic) => {
                println!("history {number}: VMFERRY_SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{images} crashed images were checked");
}
