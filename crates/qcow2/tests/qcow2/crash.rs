//! The machine stops after any write, and any part of what was not flushed survives, in any order.
//! What was flushed must be there, and the image may have lost space, nothing else.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use fastrand::Rng;
use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{BlockDevice, Unmap};
use vmferry_qcow2::header::{BackingFormat, Compression, Header};
use vmferry_qcow2::{
    CreateOptions, OpenOptions, Qcow2Disk, Repair, SnapshotTable, Storage, check, create,
};

use crate::support::{
    Bytes, Event, Folder, MemoryFile, SECTOR, qemu_img, qemu_img_ok, rounds, seed,
};

/// Something that was done to the disk, with what it did to the file.
struct Deed {
    events: Range<usize>,
    what: What,
}

enum What {
    /// These bytes have this value, or nothing of it happened yet.
    Fill(Range<usize>, u8),
    /// All that came before is durable, and this is what the disk holds.
    Durable(Vec<u8>),
    /// The same, and the disk has another length than before.
    Resized { before: usize, model: Vec<u8> },
}

struct History {
    base: Bytes,
    /// What the image's snapshot holds, if it has one.
    snapshot: Option<Vec<u8>>,
    backing: Option<Vec<u8>>,
    start: Vec<u8>,
    log: Vec<Event>,
    deeds: Vec<Deed>,
    options: CreateOptions,
}

fn open(file: &MemoryFile, backing: Option<&[u8]>) -> Qcow2Disk {
    let backing = backing.map(|bytes| {
        let disk: Arc<dyn BlockDevice> = Arc::new(MemoryDisk::from_bytes(bytes));
        disk
    });
    let options = OpenOptions {
        l2_cache_bytes: 0,
        ..OpenOptions::default()
    };
    Qcow2Disk::open(Arc::new(file.clone()), options, backing).unwrap()
}

pub(crate) fn random_range(rng: &mut Rng, length: usize, cluster: usize) -> Range<usize> {
    let mut start = rng.usize(..length);
    if rng.bool() {
        start -= start % cluster;
    }
    let size = match rng.u8(..3) {
        0 => rng.usize(1..=length),
        1 => rng.usize(1..=4) * cluster,
        _ => rng.usize(1..=cluster),
    };
    start..(start + size).min(length)
}

/// So many stops of one history are tried, more or less.
const CUTS_MAX: usize = 100;

/// How the image of a history is made.
#[derive(Clone, Copy, PartialEq)]
enum Shape {
    Any,
    /// A refcount block counts 32 KiB and the first table 2 MiB, of which most is in use.
    NearlyFullTable,
}

fn make_history(rng: &mut Rng, shape: Shape) -> History {
    let nearly_full = shape == Shape::NearlyFullTable;
    let cluster_bits = match nearly_full {
        true => 9,
        false => [9, 9, 9, 10, 12, 16][rng.usize(..6)],
    };
    let version = if !nearly_full && rng.u8(..4) == 0 {
        2
    } else {
        3
    };
    let refcount_order = match version {
        2 => 4,
        _ if nearly_full => 6,
        _ => rng.u32(0..=6),
    };
    let disk_bytes = match (nearly_full, cluster_bits) {
        (true, _) => 5 << 19,
        (_, 16) => rng.usize(1..=1 << 20),
        _ => rng.usize(1..=256 << 10),
    };
    let backing = (rng.u8(..3) == 0).then(|| vec![0xB5; rng.usize(1..=disk_bytes * 2)]);
    let options = CreateOptions {
        disk_bytes: disk_bytes as u64,
        version,
        cluster_bits,
        refcount_order,
        lazy_refcounts: false,
        compression: Compression::Deflate,
        backing: backing
            .is_some()
            .then(|| ("backing.raw".to_owned(), BackingFormat::Raw)),
    };
    let file = MemoryFile::default();
    create(&file, &options).unwrap();
    let mut model = vec![0; disk_bytes];
    if let Some(backing) = &backing {
        let length = backing.len().min(disk_bytes);
        model[..length].copy_from_slice(&backing[..length]);
    }
    if nearly_full {
        let filled = 15 << 17;
        let disk = open(&file, backing.as_deref());
        disk.write_at(&vec![0xF1; filled], 0).unwrap();
        disk.close().unwrap();
        model[..filled].fill(0xF1);
    }
    let mut snapshot = None;
    let file = match options.refcount_order > 0 && rng.u8(..3) == 0 {
        false => file,
        true => {
            let disk = open(&file, backing.as_deref());
            for _ in 0..rng.usize(1..8) {
                let range = random_range(rng, model.len(), 1 << cluster_bits);
                disk.write_at(&vec![0xC4; range.len()], range.start as u64)
                    .unwrap();
                model[range].fill(0xC4);
            }
            disk.close().unwrap();
            snapshot = Some(model.clone());
            MemoryFile::new(with_snapshot(&file.bytes()))
        }
    };
    let mut history = History {
        base: file.bytes(),
        snapshot,
        start: model.clone(),
        log: Vec::new(),
        deeds: Vec::new(),
        options,
        backing,
    };
    file.record();
    let disk = open(&file, history.backing.as_deref());
    let cluster = 1 << cluster_bits;
    let mut tag = 0;
    for _ in 0..rng.usize(3..if nearly_full { 10 } else { 30 }) {
        let first_event = file.log_length();
        let range = random_range(rng, model.len(), cluster);
        let (start, size) = (range.start as u64, range.len() as u64);
        let what = match rng.u8(..12) {
            0..=5 => {
                tag = tag % 250 + 1;
                disk.write_at(&vec![tag; range.len()], start).unwrap();
                model[range.clone()].fill(tag);
                What::Fill(range, tag)
            }
            6 | 7 => {
                let unmap = if rng.bool() { Unmap::May } else { Unmap::Never };
                disk.write_zeroes(start, size, unmap, false).unwrap();
                model[range.clone()].fill(0);
                What::Fill(range, 0)
            }
            8 => {
                disk.discard(start, size).unwrap();
                // Which parts it took is not this test's business.
                disk.read_at(&mut model[range.clone()], start).unwrap();
                What::Fill(range, 0)
            }
            9 => {
                let before = model.len();
                if version == 2 && history.snapshot.is_some() {
                    continue;
                }
                let wanted = rng.usize(1..=before * 3 / 2);
                if wanted == before {
                    continue;
                }
                disk.resize(wanted as u64).unwrap();
                model.resize(wanted, 0);
                What::Resized {
                    before,
                    model: model.clone(),
                }
            }
            _ => {
                disk.flush().unwrap();
                What::Durable(model.clone())
            }
        };
        history.deeds.push(Deed {
            events: first_event..file.log_length(),
            what,
        });
    }
    disk.close().unwrap();
    history.log = file.log();
    history
}

/// The same image with a snapshot of what it holds.
fn with_snapshot(image: &Bytes) -> Bytes {
    let folder = Folder::new();
    let path = folder.path("image.qcow2");
    image.to_file(Path::new(&path));
    std::fs::write(folder.path("backing.raw"), [0; 512]).unwrap();
    qemu_img_ok(&["snapshot", "-c", "kept", &path]);
    Bytes::from_file(Path::new(&path))
}

/// Read the snapshot: the header of a copy leads to its L1 table.
fn read_snapshot(image: &Bytes, backing: Option<&[u8]>) -> Vec<u8> {
    let file = MemoryFile::new(image.clone());
    let header = Header::read(&file).unwrap();
    let table = SnapshotTable::read(&file, &header, u64::MAX).unwrap();
    let entry = &table.entries[0];
    let disk_bytes = entry.disk_bytes.unwrap_or(header.disk_bytes);
    file.write_at(&disk_bytes.to_be_bytes(), 24).unwrap();
    file.write_at(&entry.l1_entries.to_be_bytes(), 36).unwrap();
    file.write_at(&entry.l1_offset.to_be_bytes(), 40).unwrap();
    let disk = open(&file, backing);
    let mut read = vec![0xEE; disk_bytes as usize];
    disk.read_at(&mut read, 0).unwrap();
    read
}

/// What the file may hold if it was `durable` at the last flush and `pending` came after it.
pub(crate) fn survivors(rng: &mut Rng, durable: &Bytes, pending: &[Event]) -> Bytes {
    let mut now = durable.clone();
    match rng.u8(..4) {
        0 => {
            // Whole writes, in their order.
            for event in pending {
                if rng.bool() {
                    event.apply(&mut now);
                }
            }
            now
        }
        1 => {
            for event in pending {
                event.apply(&mut now);
            }
            now
        }
        _ => sector_by_sector(rng, durable, pending),
    }
}

/// Each sector as it was at some moment of its own.
fn sector_by_sector(rng: &mut Rng, durable: &Bytes, pending: &[Event]) -> Bytes {
    let read = |bytes: &Bytes, sector: u64| {
        let mut content = [0; SECTOR as usize];
        bytes.read(&mut content, sector * SECTOR);
        content
    };
    let mut now = durable.clone();
    let mut versions: BTreeMap<u64, Vec<[u8; SECTOR as usize]>> = BTreeMap::new();
    let mut lengths = vec![durable.length];
    for event in pending {
        event.apply(&mut now);
        lengths.push(now.length);
        let (offset, length) = match event {
            Event::Write { offset, bytes } => (*offset, bytes.len() as u64),
            Event::Punch { offset, length } => (*offset, *length),
            Event::SetLength(_) | Event::Flush => continue,
        };
        for sector in offset / SECTOR..(offset + length).div_ceil(SECTOR) {
            let known = versions.entry(sector);
            let known = known.or_insert_with(|| vec![read(durable, sector)]);
            known.push(read(&now, sector));
        }
    }
    let mut result = durable.clone();
    for (sector, versions) in versions {
        result.write(&versions[rng.usize(..versions.len())], sector * SECTOR);
    }
    // The length may lag behind, and so may the data behind it.
    result.set_length(lengths[rng.usize(..lengths.len())]);
    result
}

/// Is the disk what it may be if the machine stopped after so many events?
fn verify(rng: &mut Rng, history: &History, cut: usize, image: &Bytes) {
    let context = format!(
        "stopped after event {cut} of {}: {:?}",
        history.log.len(),
        history.options
    );
    let file = MemoryFile::new(image.clone());
    let report = check(&file, Repair::None).unwrap();
    assert_eq!(
        report.errors + report.flags,
        0,
        "{context}: {:?}",
        report.findings
    );
    let last = history
        .deeds
        .iter()
        .rposition(|deed| deed.events.end <= cut && !matches!(deed.what, What::Fill(..)));
    let flushed = match last.map(|last| &history.deeds[last].what) {
        Some(What::Durable(model) | What::Resized { model, .. }) => model,
        _ => &history.start,
    };
    let since: Vec<&Deed> = history.deeds[last.map_or(0, |last| last + 1)..]
        .iter()
        .take_while(|deed| deed.events.start < cut)
        .collect();
    let disk = open(&file, history.backing.as_deref());
    let mut read = vec![0xEE; disk.disk_bytes() as usize];
    disk.read_at(&mut read, 0).unwrap();
    let mut compared = read.len().min(flushed.len());
    if let Some(Deed {
        what: What::Resized { before, model },
        ..
    }) = since.last()
    {
        assert!(
            read.len() == *before || read.len() == model.len(),
            "{context}"
        );
        assert!(
            read.iter().skip(*before).all(|byte| *byte == 0),
            "{context}"
        );
        compared = compared.min(*before).min(model.len());
    } else {
        assert_eq!(read.len(), flushed.len(), "{context}");
    }
    for at in 0..compared {
        let allowed = read[at] == flushed[at]
            || since.iter().any(|deed| match &deed.what {
                What::Fill(range, value) => range.contains(&at) && *value == read[at],
                _ => false,
            });
        assert!(
            allowed,
            "{context}: byte {at} is {}, was {}",
            read[at], flushed[at]
        );
    }
    go_on(rng, &disk, &mut read, &context);
    disk.close().unwrap();
    if let Some(snapshot) = &history.snapshot {
        for image in [image, &file.bytes()] {
            let read = read_snapshot(image, history.backing.as_deref());
            // QEMU notes whole sectors, and forgets the rest.
            assert!(read.len() / 512 == snapshot.len() / 512, "{context}");
            assert!(
                snapshot.starts_with(&read),
                "{context}: the snapshot changed"
            );
        }
    }
    let report = check(&file, Repair::Leaks).unwrap();
    assert_eq!(
        report.errors + report.flags,
        0,
        "{context}: {:?}",
        report.findings
    );
    let report = check(&file, Repair::None).unwrap();
    assert!(report.is_clean(), "{context}: {:?}", report.findings);
}

/// The next writer must not step on what is there.
fn go_on(rng: &mut Rng, disk: &Qcow2Disk, model: &mut [u8], context: &str) {
    for tag in [251, 252, 253] {
        let range = random_range(rng, model.len(), 4096);
        disk.write_at(&vec![tag; range.len()], range.start as u64)
            .unwrap();
        model[range].fill(tag);
    }
    let mut read = vec![0xEE; model.len()];
    disk.read_at(&mut read, 0).unwrap();
    assert!(
        read == *model,
        "{context}: writing on changed something else"
    );
}

fn check_with_qemu(image: &Bytes) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    image.to_file(&path);
    std::fs::write(folder.path().join("backing.raw"), [0; 512]).unwrap();
    let (status, text) = qemu_img(&["check", "-f", "qcow2", path.to_str().unwrap()]);
    // 3: leaks and nothing else.
    assert!(
        status == 0 || status == 3,
        "qemu-img check: {status}: {text}"
    );
}

fn run(seed: u64, shape: Shape) -> usize {
    let mut rng = Rng::with_seed(seed);
    let history = make_history(&mut rng, shape);
    let mut durable = history.base.clone();
    let mut flushed_until = 0;
    let mut images = 0;
    for cut in 0..=history.log.len() {
        let pending = &history.log[flushed_until..cut];
        // Large images are looked at now and then.
        for _ in 0..if rng.usize(..history.log.len().max(1)) < CUTS_MAX {
            2
        } else {
            0
        } {
            let image = survivors(&mut rng, &durable, pending);
            if rng.u16(..300) == 0 {
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

fn run_all(count: u64, shape: Shape) {
    let first = seed();
    let mut images = 0;
    for number in 0..rounds(count) {
        let seed = first.wrapping_add(number);
        match std::panic::catch_unwind(|| run(seed, shape)) {
            Ok(count) => images += count,
            Err(panic) => {
                println!("history {number}: VMFERRY_SEED={seed}");
                std::panic::resume_unwind(panic);
            }
        }
    }
    println!("{images} crashed images were checked");
}

#[test]
fn whatever_survives_a_crash_is_consistent_and_holds_what_was_flushed() {
    run_all(150, Shape::Any);
}

#[test]
fn tables_that_grow_survive_a_crash() {
    run_all(3, Shape::NearlyFullTable);
}

#[test]
fn a_flush_syncs_no_more_than_the_order_demands() {
    let file = MemoryFile::default();
    create(&file, &CreateOptions::new(1 << 30)).unwrap();
    let disk = open(&file, None);
    let syncs_of = |work: &dyn Fn()| {
        let before = file.syncs();
        work();
        disk.flush().unwrap();
        file.syncs() - before
    };
    let write = |at: u64| disk.write_at(&[1; 4096], at).unwrap();
    assert_eq!(
        syncs_of(&|| write(0)),
        2,
        "a cluster, a table and an L1 entry"
    );
    assert_eq!(syncs_of(&|| write(0)), 1, "in place");
    assert_eq!(syncs_of(&|| {}), 0, "nothing");
    assert_eq!(syncs_of(&|| write(1 << 20)), 2, "a cluster");
    assert_eq!(syncs_of(&|| write(1 << 29)), 2, "a cluster and a table");
    let discard = || disk.discard(1 << 20, 1 << 16).unwrap();
    assert_eq!(syncs_of(&discard), 1, "only an L2 entry");
}

/// What a thread did to a unit of its own, in the order of one clock for all.
struct Written {
    unit: usize,
    value: u8,
    end: u64,
}

/// A flush that ended when the file had seen so many events.
struct Flushed {
    start: u64,
    events: usize,
}

const UNITS: usize = 24;
const UNIT_BYTES: usize = 3000;

fn write_and_flush(
    disk: &Qcow2Disk,
    file: &MemoryFile,
    clock: &AtomicU64,
    mut rng: Rng,
    owner: usize,
) -> (Vec<Written>, Vec<Flushed>) {
    let (mut written, mut flushed) = (Vec::new(), Vec::new());
    for value in 1..40 {
        let unit = rng.usize(..UNITS / 3) * 3 + owner;
        let offset = (unit * UNIT_BYTES) as u64;
        let value = match rng.u8(..6) {
            0 => {
                let start = clock.fetch_add(1, Ordering::SeqCst);
                disk.flush().unwrap();
                let events = file.log_length();
                flushed.push(Flushed { start, events });
                continue;
            }
            1 => {
                let length = UNIT_BYTES as u64;
                disk.write_zeroes(offset, length, Unmap::May, false)
                    .unwrap();
                0
            }
            _ => {
                disk.write_at(&[value; UNIT_BYTES], offset).unwrap();
                value
            }
        };
        let end = clock.fetch_add(1, Ordering::SeqCst);
        written.push(Written { unit, value, end });
    }
    (written, flushed)
}

fn verify_threads(image: &Bytes, cut: usize, written: &[Vec<Written>], flushed: &[Flushed]) {
    let file = MemoryFile::new(image.clone());
    let report = check(&file, Repair::None).unwrap();
    assert_eq!(
        report.errors + report.flags,
        0,
        "{cut}: {:?}",
        report.findings.first()
    );
    let disk = open(&file, None);
    // Everything that ended before this is durable.
    let done = flushed.iter().filter(|flush| flush.events <= cut);
    let durable = done.map(|flush| flush.start).max();
    for unit in 0..UNITS {
        let of_unit = written[unit % 3].iter().filter(|write| write.unit == unit);
        let writes: Vec<&Written> = of_unit.collect();
        let last = writes
            .iter()
            .rposition(|write| durable.is_some_and(|durable| write.end < durable));
        let mut allowed: Vec<u8> = writes[last.unwrap_or(0)..]
            .iter()
            .map(|write| write.value)
            .collect();
        if last.is_none() {
            allowed.push(0);
        }
        let mut read = [0xEE; UNIT_BYTES];
        disk.read_at(&mut read, (unit * UNIT_BYTES) as u64).unwrap();
        let wrong = read.iter().find(|byte| !allowed.contains(byte));
        assert_eq!(
            wrong, None,
            "after event {cut}, unit {unit} may be {allowed:?}"
        );
    }
}

#[test]
fn what_any_thread_flushed_survives() {
    let seed = seed();
    println!("VMFERRY_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    for _ in 0..rounds(20) {
        let file = MemoryFile::default();
        let options = CreateOptions {
            cluster_bits: rng.u32(9..=12),
            ..CreateOptions::new((UNITS * UNIT_BYTES) as u64)
        };
        create(&file, &options).unwrap();
        let mut durable = file.bytes();
        file.record();
        let disk = open(&file, None);
        let clock = AtomicU64::new(1);
        let (mut written, mut flushed) = (Vec::new(), Vec::new());
        thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|owner| {
                    let (disk, file, clock, rng) = (&disk, &file, &clock, rng.fork());
                    scope.spawn(move || write_and_flush(disk, file, clock, rng, owner))
                })
                .collect();
            for thread in threads {
                let (writes, flushes) = thread.join().unwrap();
                written.push(writes);
                flushed.extend(flushes);
            }
        });
        disk.close().unwrap();
        let log = file.log();
        let mut flushed_until = 0;
        for cut in 0..=log.len() {
            let pending = &log[flushed_until..cut];
            let image = survivors(&mut rng, &durable, pending);
            verify_threads(&image, cut, &written, &flushed);
            if matches!(log.get(cut), Some(Event::Flush)) {
                for event in pending {
                    event.apply(&mut durable);
                }
                flushed_until = cut + 1;
            }
        }
    }
}
