//! Internal snapshots: our own, and those of images that QEMU made.

use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use vmferry_disk::BlockDevice;
use vmferry_inspect::{Event, VisitError, Visitor, walk};
use vmferry_qcow2::{
    CreateOptions, Error, FileStorage, NewSnapshot, OpenOptions, Qcow2Disk, Repair, Snapshot,
    check, create,
};

use crate::support::{Bytes, Folder, MemoryFile, mixed_bytes, qemu_img_ok, seed};

pub(crate) fn new_snapshot(name: &str) -> NewSnapshot<'_> {
    NewSnapshot {
        name,
        date: (1_700_000_000, 5),
        guest_nanoseconds: 1_234_000_000,
        vm_state_bytes: 0,
        icount: None,
    }
}

/// Write a VM state in pieces of odd lengths, and make a snapshot with it.
pub(crate) fn create_with_state(disk: &Qcow2Disk, name: &str, state: &[u8]) -> Snapshot {
    let mut writer = disk.vm_state_writer().unwrap();
    for piece in state.chunks(70_001) {
        writer.write_all(piece).unwrap();
    }
    let vm_state_bytes = writer.finish().unwrap();
    assert_eq!(vm_state_bytes, state.len() as u64);
    let new = NewSnapshot {
        vm_state_bytes,
        ..new_snapshot(name)
    };
    disk.create_snapshot(&new).unwrap()
}

pub(crate) fn read_state(disk: &Qcow2Disk, name: &str) -> Vec<u8> {
    let mut reader = disk.vm_state_reader(name).unwrap();
    let length = reader.length();
    let mut state = Vec::new();
    reader.read_to_end(&mut state).unwrap();
    assert_eq!(state.len() as u64, length);
    state
}

fn open(file: &MemoryFile) -> Qcow2Disk {
    Qcow2Disk::open(Arc::new(file.clone()), OpenOptions::default(), None).unwrap()
}

fn new_disk(options: &CreateOptions) -> (MemoryFile, Qcow2Disk) {
    let file = MemoryFile::default();
    create(&file, options).unwrap();
    let disk = open(&file);
    (file, disk)
}

fn read_all(disk: &Qcow2Disk) -> Vec<u8> {
    let mut bytes = vec![0xEE; disk.disk_bytes() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn assert_clean(file: &MemoryFile) {
    let report = check(file, Repair::None).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

fn names(disk: &Qcow2Disk) -> Vec<(String, String)> {
    let snapshots = disk.snapshots().into_iter();
    snapshots
        .map(|snapshot| (snapshot.id, snapshot.name))
        .collect()
}

fn capture(name: &str) -> Bytes {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures");
    let packed = std::fs::File::open(folder.join(format!("{name}.qcow2.xz"))).unwrap();
    let mut image = Vec::new();
    xz2::read::XzDecoder::new(packed)
        .read_to_end(&mut image)
        .unwrap();
    let mut bytes = Bytes::default();
    bytes.write(&image, 0);
    bytes
}

/// Counts what a whole stream must have.
#[derive(Default)]
struct Told {
    devices: usize,
    described: bool,
}

impl Visitor for Told {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Device(_) => self.devices += 1,
            Event::Description(description) => self.described = description.parsed.is_ok(),
            _ => {}
        }
        Ok(())
    }
}

pub(crate) fn assert_whole_stream(state: &[u8], name: &str, devices_min: usize) {
    assert!(state.starts_with(b"QEVM"), "{name}");
    let mut told = Told::default();
    let finish = walk(state, &mut told).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(finish.bytes, state.len() as u64, "{name}");
    assert!(
        !finish.is_followed && told.described && told.devices >= devices_min,
        "{name}"
    );
}

struct Expected {
    image: &'static str,
    snapshots: &'static [(&'static str, &'static str, u64, u64)],
    disk_bytes: u64,
    pattern: (std::ops::Range<usize>, u8),
}

/// Sizes are bytes, clocks are milliseconds: `qemu-img snapshot -l` shows the same.
const CAPTURES: [Expected; 6] = [
    Expected {
        image: "savevm-72.diskA",
        snapshots: &[
            ("1", "first", 660_201, 530),
            ("2", "second", 660_201, 830),
            ("3", "third", 660_201, 836),
        ],
        disk_bytes: 1 << 20,
        pattern: (0..0, 0),
    },
    Expected {
        image: "savevm-72.diskB",
        snapshots: &[
            ("1", "first", 0, 530),
            ("2", "second", 0, 830),
            ("3", "third", 0, 836),
        ],
        disk_bytes: 2 << 20,
        pattern: (0..64 << 10, 7),
    },
    Expected {
        image: "savevm-100.diskA",
        snapshots: &[
            ("1", "first", 664_571, 533),
            ("2", "second", 664_571, 834),
            ("3", "third", 664_571, 836),
        ],
        disk_bytes: 1 << 20,
        pattern: (0..0, 0),
    },
    Expected {
        image: "savevm-100.diskB",
        snapshots: &[
            ("1", "first", 0, 533),
            ("2", "second", 0, 834),
            ("3", "third", 0, 836),
        ],
        disk_bytes: 2 << 20,
        pattern: (0..64 << 10, 7),
    },
    Expected {
        image: "handmade-72",
        snapshots: &[("1", "made72", 1_185_520, 123)],
        disk_bytes: 1 << 20,
        pattern: (128 << 10..192 << 10, 9),
    },
    Expected {
        image: "handmade-100",
        snapshots: &[("1", "made100", 1_189_890, 123)],
        disk_bytes: 1 << 20,
        pattern: (128 << 10..192 << 10, 9),
    },
];

impl Expected {
    fn disk(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.disk_bytes as usize];
        bytes[self.pattern.0.clone()].fill(self.pattern.1);
        bytes
    }
}

#[test]
fn captured_snapshots_are_what_qemu_says() {
    for expected in &CAPTURES {
        let file = MemoryFile::new(capture(expected.image));
        let disk = open(&file);
        let found = disk.snapshots();
        let told: Vec<_> = found
            .iter()
            .map(|snapshot| {
                let clock = snapshot.guest_nanoseconds / 1_000_000;
                let (id, name) = (snapshot.id.as_str(), snapshot.name.as_str());
                (id, name, snapshot.vm_state_bytes, clock)
            })
            .collect();
        assert_eq!(told, expected.snapshots, "{}", expected.image);
        for snapshot in &found {
            assert_eq!(snapshot.disk_bytes, Some(expected.disk_bytes));
            assert_eq!(snapshot.icount, None);
            let state = read_state(&disk, &snapshot.name);
            if snapshot.vm_state_bytes > 0 {
                assert_whole_stream(&state, expected.image, 6);
            }
        }
        assert_eq!(file.syncs(), 0, "reading changes nothing");
    }
}

/// What `qemu-img` has as the content of a snapshot.
fn content_by_qemu(folder: &Folder, image: &str, snapshot: &str) -> Vec<u8> {
    let (copy, raw) = (folder.path("copy.qcow2"), folder.path("copy.raw"));
    std::fs::copy(image, &copy).unwrap();
    qemu_img_ok(&["snapshot", "-q", "-a", snapshot, &copy]);
    qemu_img_ok(&["check", "-q", "-f", "qcow2", &copy]);
    qemu_img_ok(&["convert", "-f", "qcow2", "-O", "raw", &copy, &raw]);
    std::fs::read(raw).unwrap()
}

#[test]
fn captured_snapshots_keep_their_content_while_we_work_beside_them() {
    let seed = crate::support::seed();
    println!("VMFERRY_SEED={seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for expected in &CAPTURES {
        let folder = Folder::new();
        let path = folder.path("image.qcow2");
        capture(expected.image).to_file(Path::new(&path));
        let reopen = || {
            let storage = FileStorage::open(&path, false, true).unwrap();
            Qcow2Disk::open(Arc::new(storage), OpenOptions::default(), None).unwrap()
        };
        let disk = reopen();
        let old = expected.disk();
        let states: Vec<_> = expected
            .snapshots
            .iter()
            .map(|snapshot| read_state(&disk, snapshot.1))
            .collect();
        let changed = mixed_bytes(&mut rng, old.len());
        disk.write_at(&changed, 0).unwrap();
        let own_state = mixed_bytes(&mut rng, 3_000_001);
        create_with_state(&disk, "ours", &own_state);
        disk.write_at(&vec![3; old.len() / 2], 0).unwrap();
        disk.apply_snapshot(expected.snapshots[0].1).unwrap();
        assert!(read_all(&disk) == old, "{}", expected.image);
        disk.write_at(&vec![4; old.len() / 2], 0).unwrap();
        // One of QEMU's goes, the others stay.
        let kept = match expected.snapshots {
            [_, deleted, _] => {
                disk.delete_snapshot(deleted.0).unwrap();
                vec![0, 2]
            }
            _ => vec![0],
        };
        disk.close().unwrap();
        qemu_img_ok(&["check", "-q", "-f", "qcow2", &path]);
        let list = qemu_img_ok(&["snapshot", "-l", &path]);
        assert!(list.contains("ours") && !list.contains("second"), "{list}");
        for index in kept {
            let name = expected.snapshots[index].1;
            assert!(content_by_qemu(&folder, &path, name) == old, "{name}");
            let disk = reopen();
            assert!(read_state(&disk, name) == states[index], "{name}");
            disk.close().unwrap();
        }
        assert!(content_by_qemu(&folder, &path, "ours") == changed);
        assert!(read_state(&reopen(), "ours") == own_state);
        // And QEMU deletes and makes some beside ours.
        qemu_img_ok(&["snapshot", "-q", "-d", expected.snapshots[0].1, &path]);
        qemu_img_ok(&["snapshot", "-q", "-c", "theirs", &path]);
        let disk = reopen();
        assert!(read_state(&disk, "ours") == own_state);
        disk.apply_snapshot("ours").unwrap();
        assert!(read_all(&disk) == changed);
        disk.delete_snapshot("ours").unwrap();
        disk.close().unwrap();
        qemu_img_ok(&["check", "-q", "-f", "qcow2", &path]);
    }
}

#[test]
fn ids_count_up_and_come_before_names() {
    let (file, disk) = new_disk(&CreateOptions::new(1 << 20));
    for name in ["a", "3", "c"] {
        disk.create_snapshot(&new_snapshot(name)).unwrap();
    }
    let told = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
        let pairs = pairs.iter();
        pairs
            .map(|(id, name)| ((*id).into(), (*name).into()))
            .collect()
    };
    assert_eq!(names(&disk), told(&[("1", "a"), ("2", "3"), ("3", "c")]));
    disk.delete_snapshot("3").unwrap();
    assert_eq!(names(&disk), told(&[("1", "a"), ("2", "3")]));
    disk.delete_snapshot("1").unwrap();
    disk.create_snapshot(&new_snapshot("d")).unwrap();
    assert_eq!(names(&disk), told(&[("2", "3"), ("3", "d")]));
    disk.delete_snapshot("d").unwrap();
    disk.delete_snapshot("3").unwrap();
    assert_eq!(names(&disk), told(&[]));
    assert_eq!(disk.header().snapshots_offset, 0);
    disk.close().unwrap();
    assert_clean(&file);
}

#[test]
fn what_can_not_be_done_is_refused_by_name() {
    let (file, disk) = new_disk(&CreateOptions::new(1 << 20));
    disk.create_snapshot(&new_snapshot("a")).unwrap();
    let refusal = |new: &NewSnapshot<'_>| disk.create_snapshot(new).unwrap_err().to_string();
    assert_eq!(
        refusal(&new_snapshot("a")),
        "there is a snapshot \"a\" in the image already"
    );
    assert_eq!(
        refusal(&new_snapshot("1")),
        "there is a snapshot \"1\" in the image already"
    );
    assert_eq!(
        refusal(&new_snapshot("")),
        "length of the snapshot's name is 0, must be 1 to 255"
    );
    assert!(refusal(&new_snapshot(&"n".repeat(256))).contains("is 256, must be 1 to 255"));
    assert!(refusal(&new_snapshot("n\0")).contains("a byte of the snapshot's name is 0"));
    let with_state = NewSnapshot {
        vm_state_bytes: 1,
        ..new_snapshot("b")
    };
    assert_eq!(
        refusal(&with_state),
        "size of the VM state is 1, must be no more than was written"
    );
    disk.create_snapshot(&new_snapshot(&"n".repeat(255)))
        .unwrap();
    let missing = "there is no snapshot \"z\" in the image";
    assert_eq!(disk.apply_snapshot("z").unwrap_err().to_string(), missing);
    assert_eq!(disk.delete_snapshot("z").unwrap_err().to_string(), missing);
    assert_eq!(disk.vm_state_reader("z").unwrap_err().to_string(), missing);
    disk.close().unwrap();
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = Qcow2Disk::open(Arc::new(file.clone()), options, None).unwrap();
    for result in [disk.delete_snapshot("a"), disk.apply_snapshot("a")] {
        assert!(matches!(result, Err(Error::ReadOnly)));
    }
    assert!(matches!(
        disk.create_snapshot(&new_snapshot("x")),
        Err(Error::ReadOnly)
    ));
    assert!(matches!(disk.vm_state_writer(), Err(Error::ReadOnly)));
    drop(disk);
    assert_clean(&file);
}

#[test]
fn a_refcount_that_can_not_be_raised_takes_everything_back() {
    for order in [0, 1] {
        let options = CreateOptions {
            refcount_order: order,
            cluster_bits: 12,
            ..CreateOptions::new(4 << 20)
        };
        let (file, disk) = new_disk(&options);
        disk.write_at(&[1; 300_000], 5000).unwrap();
        let mut made = 0;
        let error = loop {
            match disk.create_snapshot(&new_snapshot(&format!("s{made}"))) {
                Ok(_) => made += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::RefcountOverflow { .. }), "{error}");
        assert_eq!(made, (1 << (1 << order)) - 2);
        disk.write_at(&[2; 300_000], 5000).unwrap();
        let mut read = [0; 3];
        disk.read_at(&mut read, 4999).unwrap();
        assert_eq!(read, [0, 2, 2]);
        disk.close().unwrap();
        assert_clean(&file);
    }
}

#[test]
fn the_host_may_refuse_any_write_of_a_snapshot() {
    for fails_after in 0..40 {
        let options = CreateOptions {
            cluster_bits: 9,
            ..CreateOptions::new(100_000)
        };
        let (file, disk) = new_disk(&options);
        disk.write_at(&[1; 100_000], 0).unwrap();
        create_with_state(&disk, "a", &[7; 5000]);
        disk.write_at(&[2; 50_000], 20_000).unwrap();
        let now = read_all(&disk);
        for step in 0..3 {
            file.fail_writes_after(Some(fails_after));
            let result = match step {
                0 => disk.create_snapshot(&new_snapshot("b")).map(drop),
                1 => disk.apply_snapshot("a"),
                _ => disk.delete_snapshot("a"),
            };
            file.fail_writes_after(None);
            let there = |name: &str| disk.snapshots().iter().any(|known| known.name == name);
            match step {
                0 => assert_eq!(there("b"), result.is_ok()),
                1 => {
                    let expected = match result.is_ok() {
                        true => vec![1; 100_000],
                        false => now.clone(),
                    };
                    assert!(read_all(&disk) == expected, "{result:?}");
                }
                _ => assert_eq!(there("a"), result.is_err()),
            }
            if there("a") {
                assert_eq!(read_state(&disk, "a"), [7; 5000]);
            }
        }
        disk.write_at(&[9; 100_000], 0).unwrap();
        if disk.snapshots().iter().any(|known| known.name == "b") {
            disk.apply_snapshot("b").unwrap();
            assert!(read_all(&disk) == now);
        }
        disk.close().unwrap();
        let report = check(&file, Repair::Leaks).unwrap();
        assert_eq!(report.errors, 0, "{report:?}");
        let report = check(&file, Repair::All).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
}

#[test]
fn a_snapshot_brings_its_length_back() {
    let options = CreateOptions {
        cluster_bits: 9,
        ..CreateOptions::new(100_000)
    };
    let (file, disk) = new_disk(&options);
    disk.write_at(&[1; 100_000], 0).unwrap();
    create_with_state(&disk, "long", &[1; 100]);
    disk.resize(700).unwrap();
    create_with_state(&disk, "short", &[2; 200]);
    disk.resize(1_000_000).unwrap();
    create_with_state(&disk, "longer", &[3; 300]);
    disk.apply_snapshot("long").unwrap();
    assert!(read_all(&disk) == vec![1; 100_000]);
    disk.apply_snapshot("short").unwrap();
    assert!(read_all(&disk) == [1; 700]);
    // What was cut off does not come back by itself.
    disk.resize(100_000).unwrap();
    assert!(read_all(&disk)[700..].iter().all(|byte| *byte == 0));
    disk.apply_snapshot("longer").unwrap();
    let longer = read_all(&disk);
    assert_eq!(longer.len(), 1_000_000);
    assert!(longer[..700].iter().all(|byte| *byte == 1));
    assert!(longer[700..].iter().all(|byte| *byte == 0));
    for (name, value, length) in [("long", 1, 100), ("short", 2, 200), ("longer", 3, 300)] {
        assert_eq!(read_state(&disk, name), vec![value; length]);
    }
    disk.close().unwrap();
    assert_clean(&file);
}

#[test]
fn extra_data_that_we_do_not_know_is_kept() {
    let (file, disk) = new_disk(&CreateOptions::new(1 << 20));
    disk.create_snapshot(&new_snapshot("a")).unwrap();
    disk.close().unwrap();
    // 16 bytes of it, as version 3 demands at least, and 1024, as we allow at most.
    for length in [16_usize, 24, 32, 1024] {
        let mut image = file.bytes();
        let mut offset = [0; 8];
        image.read(&mut offset, 64);
        let table = u64::from_be_bytes(offset);
        let mut entry = vec![0; 40 + 24 + 2];
        image.read(&mut entry, table);
        let mut extra = entry[40..64].to_vec();
        extra.resize(length, 0xAB);
        let names = entry.split_off(64);
        entry.truncate(36);
        entry.extend((length as u32).to_be_bytes());
        entry.extend(&extra);
        entry.extend(&names);
        image.write(&entry, table);
        let changed = MemoryFile::new(image);
        let disk = open(&changed);
        assert_eq!(disk.snapshots()[0].disk_bytes, Some(1 << 20));
        disk.create_snapshot(&new_snapshot("b")).unwrap();
        disk.close().unwrap();
        let mut offset = [0; 8];
        changed.bytes().read(&mut offset, 64);
        let moved = u64::from_be_bytes(offset);
        assert_ne!(moved, table);
        let mut kept = vec![0; entry.len()];
        changed.bytes().read(&mut kept, moved);
        assert_eq!(kept, entry);
        assert_clean(&changed);
    }
}

#[test]
fn instructions_are_counted_or_not() {
    let folder = Folder::new();
    let path = folder.path("image.qcow2");
    let (file, disk) = new_disk(&CreateOptions::new(1 << 20));
    let counted = NewSnapshot {
        icount: Some(319_215_818),
        ..new_snapshot("counted")
    };
    disk.create_snapshot(&counted).unwrap();
    disk.create_snapshot(&new_snapshot("not")).unwrap();
    let icounts: Vec<_> = disk.snapshots().iter().map(|known| known.icount).collect();
    assert_eq!(icounts, [Some(319_215_818), None]);
    disk.close().unwrap();
    file.bytes().to_file(Path::new(&path));
    let list = qemu_img_ok(&["snapshot", "-l", &path]);
    let lines: Vec<_> = list.lines().collect();
    assert!(lines[2].ends_with(" 319215818"), "{list}");
    assert!(lines[3].ends_with(" --"), "{list}");
    assert!(lines[3].contains("0000:00:01.234"), "{list}");
}

/// A state that is longer than the L1 table was made for, in all sizes of clusters.
#[test]
fn vm_state_has_any_length() {
    let mut rng = fastrand::Rng::with_seed(4);
    for cluster_bits in [9, 12, 16, 21] {
        let options = CreateOptions {
            cluster_bits,
            ..CreateOptions::new(3 << 20)
        };
        let (file, disk) = new_disk(&options);
        let longest = mixed_bytes(&mut rng, 9_000_001);
        disk.write_at(&longest[..1 << 20], 0).unwrap();
        let cluster = 1 << cluster_bits;
        let lengths = [1, cluster - 1, cluster, cluster + 1, longest.len()];
        for length in lengths {
            create_with_state(&disk, &format!("s{length}"), &longest[..length]);
        }
        disk.close().unwrap();
        assert_clean(&file);
        let disk = open(&file);
        for length in lengths {
            let name = format!("s{length}");
            assert!(read_state(&disk, &name) == longest[..length], "{name}");
        }
        let full = file.bytes().allocated();
        for length in lengths {
            disk.delete_snapshot(&format!("s{length}")).unwrap();
        }
        disk.close().unwrap();
        assert_clean(&file);
        let left = file.bytes().allocated();
        assert!(left < full / 4, "{cluster_bits}: {full}, then {left}");
    }
}

#[test]
fn only_the_last_writer_of_a_state_may_go_on() {
    let (file, disk) = new_disk(&CreateOptions::new(1 << 20));
    let mut first = disk.vm_state_writer().unwrap();
    first.write_all(&[1; 100]).unwrap();
    let mut second = disk.vm_state_writer().unwrap();
    second.write_all(&[2; 100]).unwrap();
    assert!(matches!(first.finish(), Err(Error::VmStateDropped)));
    disk.resize(2 << 20).unwrap();
    assert!(matches!(second.finish(), Err(Error::VmStateDropped)));
    // A state that nobody took is not a part of the next snapshot, and costs nothing after it.
    let mut third = disk.vm_state_writer().unwrap();
    third.write_all(&vec![3; 3 << 20]).unwrap();
    third.finish().unwrap();
    disk.create_snapshot(&new_snapshot("a")).unwrap();
    let before = file.bytes().allocated();
    assert!(before < 1 << 20, "{before}");
    // A reader notices that its snapshot goes away.
    create_with_state(&disk, "b", &[5; 100]);
    let mut reader = disk.vm_state_reader("b").unwrap();
    assert_eq!(reader.read(&mut [0; 10]).unwrap(), 10);
    disk.delete_snapshot("b").unwrap();
    create_with_state(&disk, "b", &[6; 100]);
    let error = reader.read(&mut [0; 10]).unwrap_err();
    assert!(error.to_string().contains("no snapshot \"b\""), "{error}");
    disk.close().unwrap();
    assert_clean(&file);
}

/// Several threads at once, at places of any kind, with clusters so small that tables are forgotten.
#[test]
fn a_state_is_read_at_any_place() {
    let options = CreateOptions {
        cluster_bits: 9,
        ..CreateOptions::new(1 << 20)
    };
    let (_, disk) = new_disk(&options);
    let seed = seed();
    println!("VMFERRY_SEED={seed}");
    let mut state = mixed_bytes(&mut fastrand::Rng::with_seed(seed), 700_001);
    state[100_000..300_000].fill(0);
    create_with_state(&disk, "a", &state);
    let disk = Arc::new(disk);
    let vm_state = Arc::clone(&disk).vm_state("a").unwrap();
    assert_eq!(vm_state.entry().vm_state_bytes, state.len() as u64);
    thread::scope(|scope| {
        for thread in 0..4 {
            let (vm_state, state) = (&vm_state, &state);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed ^ thread);
                for _ in 0..200 {
                    let start = random.usize(..=state.len());
                    let end = random.usize(start..=state.len().min(start + 50_000));
                    let mut bytes = vec![0xEE; end - start];
                    vm_state.read_at(&mut bytes, start as u64).unwrap();
                    assert!(bytes == state[start..end], "{start} to {end}");
                }
            });
        }
    });
    for at in [state.len() as u64 - 1, state.len() as u64, u64::MAX] {
        let error = vm_state.read_at(&mut [0; 2], at).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof, "{at}");
    }
    disk.delete_snapshot("a").unwrap();
    assert!(vm_state.read_at(&mut [0; 2], 0).is_err());
    assert!(disk.vm_state("a").is_err());
}

#[test]
fn version_2_has_snapshots_too() {
    let options = CreateOptions {
        version: 2,
        ..CreateOptions::new(1 << 20)
    };
    let (file, disk) = new_disk(&options);
    disk.write_at(&[1; 1 << 20], 0).unwrap();
    create_with_state(&disk, "a", &[8; 100_000]);
    disk.discard(0, 1 << 19).unwrap();
    disk.write_at(&[2; 1 << 19], 1 << 19).unwrap();
    disk.apply_snapshot("1").unwrap();
    assert!(read_all(&disk) == [1; 1 << 20]);
    assert_eq!(read_state(&disk, "a"), [8; 100_000]);
    disk.close().unwrap();
    assert_clean(&file);
    let folder = Folder::new();
    let path = folder.path("image.qcow2");
    file.bytes().to_file(Path::new(&path));
    assert!(content_by_qemu(&folder, &path, "a") == [1; 1 << 20]);
}

/// Each thread counts up in two clusters, one after the other: no snapshot may hold the second
/// number without the first, or a torn one.
#[test]
fn a_snapshot_is_of_one_moment_of_all_threads() {
    const CLUSTER: u64 = 4096;
    let options = CreateOptions {
        cluster_bits: CLUSTER.ilog2(),
        ..CreateOptions::new(64 * CLUSTER)
    };
    let (file, disk) = new_disk(&options);
    let stop = AtomicBool::new(false);
    let progress = AtomicU32::new(0);
    let pair = |owner: u64| (owner * 8 * CLUSTER, (owner * 8 + 5) * CLUSTER);
    let number = |disk: &Qcow2Disk, at: u64| {
        let mut cluster = [0; CLUSTER as usize];
        disk.read_at(&mut cluster, at).unwrap();
        let (numbers, _) = cluster.as_chunks::<4>();
        assert!(numbers.iter().all(|number| *number == numbers[0]), "torn");
        u32::from_le_bytes(numbers[0])
    };
    let mut states = Vec::new();
    thread::scope(|scope| {
        for owner in 0..3 {
            let (disk, stop, progress) = (&disk, &stop, &progress);
            scope.spawn(move || {
                let (first, second) = pair(owner);
                for count in 1_u32.. {
                    let cluster = count.to_le_bytes().repeat(CLUSTER as usize / 4);
                    disk.write_at(&cluster, first).unwrap();
                    disk.write_at(&cluster, second).unwrap();
                    progress.fetch_add(1, Ordering::Relaxed);
                    if count % 50 == 0 {
                        disk.flush().unwrap();
                    }
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        for round in 0..60_u8 {
            let written = progress.load(Ordering::Relaxed);
            while progress.load(Ordering::Relaxed) == written {
                thread::yield_now();
            }
            let name = format!("s{round}");
            let state = vec![round + 1; 10_000];
            create_with_state(&disk, &name, &state);
            states.push((name, state));
            if round % 3 == 2 {
                let (name, _) = states.remove(usize::from(round) % states.len());
                disk.delete_snapshot(&name).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    let mut before = [0; 3];
    for (name, state) in &states {
        assert!(read_state(&disk, name) == *state, "{name}");
        disk.apply_snapshot(name).unwrap();
        for (owner, before) in (0..3).zip(&mut before) {
            let (first, second) = pair(owner);
            let (first, second) = (number(&disk, first), number(&disk, second));
            assert!(first == second || first == second + 1, "{first}, {second}");
            assert!(second >= *before, "{name} is older than the one before");
            *before = second;
        }
    }
    assert!(before.iter().any(|count| *count > 0));
    disk.close().unwrap();
    assert_clean(&file);
}
