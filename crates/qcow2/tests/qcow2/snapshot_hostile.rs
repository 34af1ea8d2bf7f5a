//! Snapshots of broken images: an error that says what is broken where, and nothing worse.

use std::io::Read;
use std::sync::Arc;

use fastrand::Rng;
use vmferry_disk::BlockDevice;
use vmferry_qcow2::{CreateOptions, Error, OpenOptions, Qcow2Disk, create};

use crate::snapshots::{create_with_state, new_snapshot, read_state};
use crate::support::{Bytes, MemoryFile, rounds, seed};

const CLUSTER: u64 = 512;
const DISK_BYTES: usize = 70_000;

fn open(image: &Bytes) -> Result<Qcow2Disk, Error> {
    let file = MemoryFile::new(image.clone());
    Qcow2Disk::open(Arc::new(file), OpenOptions::default(), None)
}

fn be64(image: &Bytes, offset: u64) -> u64 {
    let mut field = [0; 8];
    image.read(&mut field, offset);
    u64::from_be_bytes(field)
}

/// An image with a snapshot; where its table entry, its L1 table and its first L2 table are.
fn image() -> (Bytes, [u64; 3]) {
    let file = MemoryFile::default();
    let options = CreateOptions {
        cluster_bits: CLUSTER.ilog2(),
        ..CreateOptions::new(DISK_BYTES as u64)
    };
    create(&file, &options).unwrap();
    let disk = open_file(&file);
    disk.write_at(&[1; DISK_BYTES], 0).unwrap();
    create_with_state(&disk, "a", &[7; 5000]);
    disk.write_at(&[2; DISK_BYTES], 0).unwrap();
    disk.close().unwrap();
    let image = file.bytes();
    let table = be64(&image, 64);
    let l1 = be64(&image, table);
    let l2 = be64(&image, l1);
    (image, [table, l1, l2])
}

fn open_file(file: &MemoryFile) -> Qcow2Disk {
    Qcow2Disk::open(Arc::new(file.clone()), OpenOptions::default(), None).unwrap()
}

fn assert_unchanged(disk: &Qcow2Disk) {
    let mut read = vec![0; DISK_BYTES];
    disk.read_at(&mut read, 0).unwrap();
    assert!(read.iter().all(|byte| *byte == 2));
}

/// Apply is refused with these words, and nothing has changed.
fn assert_refused(image: &Bytes, expected: &str) {
    let disk = open(image).unwrap();
    let error = disk.apply_snapshot("a").unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
    assert_unchanged(&disk);
}

#[test]
fn tables_of_a_snapshot_may_lead_anywhere() {
    let (good, [_, l1, l2]) = image();
    let with = |at: u64, value: u64| {
        let mut image = good.clone();
        image.write(&value.to_be_bytes(), at);
        image
    };
    let refcount_table = be64(&good, 48);
    let past_end = good.length.next_multiple_of(CLUSTER);
    for place in [refcount_table, be64(&good, refcount_table), be64(&good, 40)] {
        assert_refused(&with(l1, place), "another table lies there");
    }
    assert_refused(&with(l1, l1), "another table lies there");
    assert_refused(&with(l1, past_end), "not in the file");
    let second = be64(&good, l1 + 8);
    assert_refused(&with(l1, second), "two entries of one L1 table lead there");
    let at = format!("L2 entry at byte {l2} ");
    assert_refused(&with(l2, past_end), &at);
    assert_refused(&with(l2, 1 << 55 | 1 << 54), &at);
    // A cluster that nobody counts.
    let mut longer = with(l2, past_end);
    longer.write(&[9; CLUSTER as usize], past_end);
    assert_refused(&longer, "in use, but its refcount is 0");
}

#[test]
fn what_leads_nowhere_is_leaked_and_deleted() {
    let (good, [_, l1, l2]) = image();
    let refcount_table = be64(&good, 48);
    let block = be64(&good, refcount_table);
    for (at, value) in [
        (l1, refcount_table),
        (l1, block),
        (l1, l1),
        (l1, be64(&good, l1 + 8)),
        (l2, 1 << 55),
        (l2, refcount_table),
        (l2, be64(&good, 40)),
    ] {
        let mut image = good.clone();
        image.write(&value.to_be_bytes(), at);
        let disk = open(&image).unwrap();
        disk.delete_snapshot("a").unwrap();
        assert_unchanged(&disk);
        assert!(disk.snapshots().is_empty());
        disk.write_at(&[2; DISK_BYTES], 0).unwrap();
        assert_unchanged(&disk);
    }
}

#[test]
fn sizes_of_a_snapshot_have_limits() {
    let (good, [table, l1, _]) = image();
    let with = |at: u64, value: u64| {
        let mut image = good.clone();
        image.write(&value.to_be_bytes(), table + at);
        image
    };
    let disk = open(&with(40, 1 << 60)).unwrap();
    let error = disk.vm_state_reader("a").unwrap_err().to_string();
    assert!(
        error.contains("bytes of VM state, but tables for"),
        "{error}"
    );
    for size in [u64::MAX, (1 << 48) + 1, 1 << 47] {
        assert_refused(&with(48, size), &format!("of a disk of {size} bytes"));
    }
    // As long as the tables reach: zeroes.
    let coverage = CLUSTER * CLUSTER / 8;
    let mut entries = [0; 4];
    good.read(&mut entries, table + 8);
    let covered = u64::from(u32::from_be_bytes(entries)) * coverage;
    let start = (DISK_BYTES as u64).next_multiple_of(coverage);
    let disk = open(&with(40, covered - start)).unwrap();
    let state = read_state(&disk, "a");
    assert!(state[..5000].iter().all(|byte| *byte == 7));
    assert!(state[5120..].iter().all(|byte| *byte == 0));
    let disk = open(&with(40, covered - start + 1)).unwrap();
    assert!(disk.vm_state_reader("a").is_err());
    let mut image = good.clone();
    image.write(&(1_u64 << 54).to_be_bytes(), l1 + 8 * (start / coverage));
    let disk = open(&image).unwrap();
    let mut reader = disk.vm_state_reader("a").unwrap();
    let error = reader.read(&mut [0; 10]).unwrap_err().to_string();
    assert!(error.contains("L1 table of a snapshot"), "{error}");
}

/// Any bits of the table and the tables behind it, and then everything is tried.
#[test]
fn flipped_bits_do_no_harm() {
    let seed = seed();
    println!("VMFERRY_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let (good, places) = image();
    for _ in 0..rounds(2000) {
        let mut image = good.clone();
        for _ in 0..rng.usize(1..4) {
            let at = places[rng.usize(..3)] + rng.u64(..72);
            let mut byte = [0];
            image.read(&mut byte, at);
            image.write(&[byte[0] ^ (1 << rng.u8(..8))], at);
        }
        let Ok(disk) = open(&image) else {
            continue;
        };
        let name = disk.snapshots().first().map(|known| known.name.clone());
        let name = name.unwrap_or_default();
        if let Ok(reader) = disk.vm_state_reader(&name) {
            let mut state = Vec::new();
            // An error, or as much as is wanted.
            drop(reader.take(1 << 20).read_to_end(&mut state));
        }
        if disk.create_snapshot(&new_snapshot("b")).is_ok() {
            assert_unchanged(&disk);
        }
        if disk.apply_snapshot(&name).is_err() {
            assert_unchanged(&disk);
        }
        drop(disk.delete_snapshot(&name));
        drop(disk.delete_snapshot("b"));
        drop(disk.write_at(&[3; 100], 0));
        drop(disk.close());
    }
}
