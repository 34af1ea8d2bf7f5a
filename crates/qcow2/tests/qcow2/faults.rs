//! The host refuses to write: the caller learns of it, and nothing else is harmed.

use std::sync::Arc;

use fastrand::Rng;
use vmferry_disk::{BlockDevice, Unmap};
use vmferry_qcow2::{CreateOptions, OpenOptions, Qcow2Disk, Repair, check, create};

use crate::support::{MemoryFile, rounds, seed};

fn run(seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let length = 128 << 10;
    let file = MemoryFile::default();
    let options = CreateOptions {
        cluster_bits: rng.u32(9..=12),
        ..CreateOptions::new(length as u64)
    };
    create(&file, &options).unwrap();
    let storage = Arc::new(file.clone());
    let disk = Qcow2Disk::open(storage, OpenOptions::default(), None).unwrap();
    // What a byte may be: the last good write, or a failed one after it.
    let mut sure = vec![0_u8; length];
    let mut maybe: Vec<(std::ops::Range<usize>, u8)> = Vec::new();
    for tag in 1..60 {
        file.fail_writes_after(rng.bool().then(|| rng.usize(..4)));
        let start = rng.usize(..length);
        let size = rng.usize(1..=16 << 10).min(length - start);
        let range = start..start + size;
        let (value, result) = match rng.u8(..4) {
            0 => {
                let unmap = if rng.bool() { Unmap::May } else { Unmap::Never };
                let zeroed = disk.write_zeroes(start as u64, size as u64, unmap, false);
                (0, zeroed)
            }
            1 => {
                // Whether it works or not, nothing changes.
                drop(disk.flush());
                continue;
            }
            _ => (tag, disk.write_at(&vec![tag; size], start as u64)),
        };
        match result {
            Ok(()) => {
                sure[range.clone()].fill(value);
                let mut kept = Vec::new();
                for (other, value) in maybe {
                    // What is left of it on both sides.
                    kept.push((other.start..other.end.min(range.start), value));
                    kept.push((other.start.max(range.end)..other.end, value));
                }
                maybe = kept
                    .into_iter()
                    .filter(|(range, _)| range.start < range.end)
                    .collect();
            }
            Err(error) => {
                assert_eq!(
                    error.source.kind(),
                    std::io::ErrorKind::StorageFull,
                    "{error}"
                );
                maybe.push((range, value));
            }
        }
    }
    file.fail_writes_after(None);
    disk.flush().unwrap();
    let verify = |disk: &Qcow2Disk| {
        let mut read = vec![0xEE; length];
        disk.read_at(&mut read, 0).unwrap();
        for (at, byte) in read.iter().enumerate() {
            let allowed = *byte == sure[at]
                || maybe
                    .iter()
                    .any(|(range, value)| range.contains(&at) && value == byte);
            assert!(allowed, "byte {at} is {byte}, must be {}", sure[at]);
        }
    };
    verify(&disk);
    disk.close().unwrap();
    let report = check(&file, Repair::None).unwrap();
    assert_eq!(report.errors + report.flags, 0, "{:?}", report.findings);
    let storage = Arc::new(file.clone());
    verify(&Qcow2Disk::open(storage, OpenOptions::default(), None).unwrap());
}

#[test]
fn a_full_disk_loses_nothing_that_was_acknowledged() {
    let first = seed();
    for number in 0..rounds(100) {
        let seed = first.wrapping_add(number);
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            println!("run {number}: VMFERRY_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
