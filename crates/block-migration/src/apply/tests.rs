use vmferry_disk::simulated::{MemoryDisk, Operation as Kind};
use vmferry_disk::{Hold, Limits, Node};

use super::*;
use crate::testing::rng;

const KIB: u64 = 1 << 10;
const MIB: u64 = CHUNK_BYTES;

/// A block with data in these ranges of KiB.
fn block(data: &[(u64, u64)]) -> Vec<u8> {
    let mut block = vec![0; MIB as usize];
    for (start, end) in data {
        block[(start * KIB) as usize..(end * KIB) as usize].fill(7);
    }
    block
}

/// What a disk with such clusters is asked for when `data` is written at `offset`.
fn operations(cluster_bytes: Option<u32>, offset: u64, data: &[u8]) -> Vec<(Kind, u64, u64)> {
    let disk = MemoryDisk::with_limits(Limits {
        length: 4 * MIB,
        preferred_bytes: 4096,
        cluster_bytes,
        read_only: false,
    });
    disk.fill(0, &vec![0x55; 4 * MIB as usize]);
    let node = Node::new("disk0", Box::new(disk.clone()), Hold::Writes);
    let lease = node.lease("a test").expect("free");
    write(&lease.filler(), offset, data).expect("written");
    let (start, end) = (offset as usize, offset as usize + data.len());
    let now = disk.snapshot();
    assert_eq!(&now[start..end], data);
    let others = now[..start].iter().chain(&now[end..]);
    assert!(others.copied().all(|byte| byte == 0x55));
    let entry = |entry: vmferry_disk::simulated::Logged| {
        (
            entry.operation,
            entry.offset / KIB,
            entry.length.div_ceil(KIB),
        )
    };
    disk.log().into_iter().map(entry).collect()
}

#[test]
fn zero_clusters_are_zeroed_and_neighbours_go_together() {
    let data = block(&[(64, 65), (128, 300), (1023, 1024)]);
    assert_eq!(
        operations(Some(64 << 10), MIB, &data),
        [
            (Kind::WriteZeroes, 1024, 64),
            (Kind::Write, 1024 + 64, 256),
            (Kind::WriteZeroes, 1024 + 320, 640),
            (Kind::Write, 1024 + 960, 64),
        ]
    );
}

#[test]
fn a_block_of_one_kind_is_one_operation() {
    for cluster_bytes in [None, Some(512), Some(64 << 10), Some(1 << 20)] {
        assert_eq!(
            operations(cluster_bytes, 0, &block(&[])),
            [(Kind::WriteZeroes, 0, 1024)]
        );
        assert_eq!(
            operations(cluster_bytes, 0, &block(&[(0, 1024)])),
            [(Kind::Write, 0, 1024)]
        );
    }
}

#[test]
fn without_clusters_that_a_block_is_made_of_it_is_written_whole() {
    for cluster_bytes in [None, Some(0), Some(1 << 20), Some(2 << 20), Some(3 << 16)] {
        assert_eq!(
            operations(cluster_bytes, 2 * MIB, &block(&[(500, 501)])),
            [(Kind::Write, 2048, 1024)],
            "{cluster_bytes:?}"
        );
    }
}

/// The last block of an odd disk begins anywhere.
#[test]
fn clusters_are_those_of_the_disk_not_of_the_block() {
    let data = block(&[(60, 61), (1020, 1024)]);
    assert_eq!(
        operations(Some(64 << 10), MIB + 8 * KIB, &data),
        [
            (Kind::WriteZeroes, 1032, 56),
            (Kind::Write, 1088, 64),
            (Kind::WriteZeroes, 1152, 896),
            (Kind::Write, 2048, 8),
        ]
    );
}

#[test]
fn runs_cover_the_data_once_in_order_and_take_turns() {
    let mut rng = rng();
    for _ in 0..2000 {
        let cluster = 512 << rng.u32(0..5);
        let offset = 512 * rng.u64(0..100);
        let mut data = vec![0; rng.usize(0..40_000)];
        for _ in 0..rng.usize(0..6) {
            if !data.is_empty() {
                let at = rng.usize(0..data.len());
                data[at] = 1;
            }
        }
        let mut end = 0;
        let mut before = None;
        for (run, zero) in runs(offset, &data, Some(cluster)) {
            assert_eq!(run.start, end, "no gap");
            assert!(!run.is_empty());
            assert_ne!(before, Some(zero), "neighbours go together");
            let starts_cluster = (offset + run.start as u64).is_multiple_of(cluster);
            assert!(starts_cluster || run.start == 0);
            match zero {
                true => assert!(is_zero(&data[run.clone()])),
                false => {
                    let first = (offset + run.start as u64) / cluster;
                    let last = (offset + run.end as u64 - 1) / cluster;
                    for number in first..=last {
                        let from = (number * cluster).saturating_sub(offset) as usize;
                        let to = ((number + 1) * cluster - offset) as usize;
                        assert!(!is_zero(&data[from..to.min(data.len())]), "{number}");
                    }
                }
            }
            end = run.end;
            before = Some(zero);
        }
        assert_eq!(end, data.len());
    }
}
