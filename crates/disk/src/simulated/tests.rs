use std::thread;

use super::*;
use crate::testing::rng;

fn errno<T: std::fmt::Debug>(result: Result<T, DiskError>) -> Option<i32> {
    result.unwrap_err().source.raw_os_error()
}

#[test]
fn only_what_was_flushed_survives_a_crash() {
    let disk = MemoryDisk::new(3 * PAGE_BYTES + 7);
    disk.write_at(&[1; 5000], 3000).unwrap();
    disk.flush().unwrap();
    disk.write_at(&[2; 100], PAGE_BYTES).unwrap();
    disk.write_zeroes(0, PAGE_BYTES, Unmap::May, false).unwrap();
    disk.write_at(&[3; 7], 3 * PAGE_BYTES).unwrap();
    let volatile = disk.snapshot();
    let durable = disk.durable_snapshot();
    assert_ne!(volatile, durable);
    disk.crash_keeping(|page| page == 3);
    let mut expected = durable;
    expected[3 * PAGE_BYTES as usize..].fill(3);
    assert_eq!(disk.snapshot(), expected);
    assert_eq!(disk.durable_snapshot(), expected);
}

#[test]
fn a_failed_flush_forgets_what_it_should_have_kept() {
    let disk = MemoryDisk::new(10);
    disk.write_at(b"x", 0).unwrap();
    disk.fail(Operation::Flush, 1, libc::EIO);
    assert_eq!(errno(disk.flush()), Some(libc::EIO));
    disk.flush().unwrap();
    assert_eq!(disk.durable_snapshot()[0], 0);
}

#[test]
fn faults_strike_the_operation_they_were_planned_for() {
    let disk = MemoryDisk::new(100);
    disk.fail(Operation::Write, 2, libc::ENOSPC);
    disk.fail_after_bytes(Operation::Write, 3, libc::EIO, 2);
    disk.fail_from(Operation::Read, 2, libc::EIO);
    disk.fail(Operation::Status, 1, libc::EIO);
    disk.fail_after_bytes(Operation::WriteZeroes, 1, libc::EIO, 1);
    disk.write_at(b"abcd", 0).unwrap();
    assert_eq!(errno(disk.write_at(b"efgh", 0)), Some(libc::ENOSPC));
    assert_eq!(&disk.snapshot()[..4], b"abcd");
    assert_eq!(errno(disk.write_at(b"ijkl", 0)), Some(libc::EIO));
    assert_eq!(&disk.snapshot()[..4], b"ijcd");
    assert_eq!(
        errno(disk.write_zeroes(0, 4, Unmap::May, false)),
        Some(libc::EIO)
    );
    assert_eq!(&disk.snapshot()[..4], b"\0jcd");
    assert_eq!(errno(disk.status(0, 1)), Some(libc::EIO));
    disk.status(0, 1).unwrap();
    let mut buf = [0; 4];
    assert_eq!(disk.read_cached_at(&mut buf, 0).unwrap(), Cached::Hit(4));
    // A read that must fail is not answered from the cache.
    assert_eq!(disk.read_cached_at(&mut buf, 0).unwrap(), Cached::Miss);
    assert_eq!(errno(disk.read_at(&mut buf, 0)), Some(libc::EIO));
    assert_eq!(errno(disk.read_at(&mut buf, 0)), Some(libc::EIO));
    disk.heal();
    disk.read_at(&mut buf, 0).unwrap();
    assert_eq!(disk.count(Operation::Write), 3);
}

#[test]
fn gates_stop_what_they_are_for() {
    let disk = MemoryDisk::new(3 * PAGE_BYTES);
    let gate = disk.gate_range(Operation::Write, PAGE_BYTES..2 * PAGE_BYTES);
    disk.write_at(b"before", 0).unwrap();
    disk.write_at(b"behind", 2 * PAGE_BYTES).unwrap();
    let page = usize::try_from(PAGE_BYTES).unwrap();
    thread::scope(|scope| {
        for at in [PAGE_BYTES - 1, 2 * PAGE_BYTES - 1] {
            let disk = &disk;
            scope.spawn(move || disk.write_at(b"xx", at).unwrap());
        }
        gate.wait_reached(2);
        assert_eq!(gate.waiting(), 2);
        assert_eq!(disk.snapshot()[page - 1..][..2], [0, 0]);
        gate.open();
    });
    assert_eq!(disk.snapshot()[page - 1..][..2], *b"xx");
    let gate = disk.gate_after(Operation::Read);
    assert_eq!(disk.read_cached_at(&mut [0], 0).unwrap(), Cached::Miss);
    thread::scope(|scope| {
        scope.spawn(|| disk.read_at(&mut [0], 0).unwrap());
        gate.wait_reached(1);
        drop(gate);
    });
}

#[test]
fn random_operations_do_what_they_do_to_an_array() {
    let mut rng = rng();
    let length = 9 * PAGE_BYTES + 77;
    let disk = MemoryDisk::new(length);
    let mut model = vec![0_u8; usize::try_from(length).unwrap()];
    for _ in 0..2000 {
        let offset = rng.u64(0..length);
        let size = rng.u64(1..=length - offset);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + size).unwrap();
        let unmap = [Unmap::May, Unmap::Never][rng.usize(0..2)];
        match rng.u8(0..4) {
            0 => {
                model[range.clone()].fill(rng.u8(..));
                disk.write_at(&model[range], offset).unwrap();
            }
            1 => {
                model[range].fill(0);
                disk.write_zeroes(offset, size, unmap, true).unwrap();
            }
            2 => {
                let mut buf = vec![1; range.len()];
                disk.read_at(&mut buf, offset).unwrap();
                assert_eq!(buf, model[range]);
            }
            _ => {
                let extent = disk.status(offset, size).unwrap();
                assert!((1..=size).contains(&extent.length));
                let run = &model[range.start..][..usize::try_from(extent.length).unwrap()];
                let zero = run.iter().all(|&byte| byte == 0);
                assert!(extent.kind == ExtentKind::Data || zero);
            }
        }
    }
    disk.flush().unwrap();
    assert!(disk.snapshot() == model && disk.durable_snapshot() == model);
}
