use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::thread;

use super::*;
use crate::RawDisk;
use crate::device::ExtentKind;
use crate::dirty::CHUNK_BYTES;
use crate::simulated::{MemoryDisk, Operation};
use crate::testing::{rng, rounds};

/// Only ever waited out by a test that fails.
const PATIENCE: Duration = Duration::from_secs(60);
const ODD_LENGTH: u64 = 3 * CHUNK_BYTES + 1536;

fn disk_and_node(resting: Hold) -> (MemoryDisk, Arc<Node>) {
    let disk = MemoryDisk::new(ODD_LENGTH);
    let node = Node::new("disk0", Box::new(disk.clone()), resting);
    (disk, node)
}

fn write(node: &Arc<Node>, offset: u64, buf: &[u8]) -> Result<(), DiskError> {
    let permit = node.begin_write(offset, buf.len() as u64).unwrap();
    permit.write(buf)
}

fn dirty_chunks(node: &Node) -> Vec<u64> {
    let mut chunks = Vec::new();
    let mut next = node.dirty().next_dirty(Chunk(0));
    while let Some(chunk) = next {
        chunks.push(chunk.0);
        next = node.dirty().next_dirty(Chunk(chunk.0 + 1));
    }
    chunks
}

/// A guest's way to wait: rings with every notice.
struct Bell {
    rung: Mutex<u64>,
    changed: Condvar,
    _subscription: Subscription,
}

impl Bell {
    fn on(node: &Arc<Node>) -> Arc<Self> {
        Arc::new_cyclic(|bell: &std::sync::Weak<Self>| {
            let bell = bell.clone();
            let subscription = node.subscribe(move || {
                if let Some(bell) = bell.upgrade() {
                    *lock(&bell.rung) += 1;
                    bell.changed.notify_all();
                }
            });
            Self {
                rung: Mutex::new(0),
                changed: Condvar::new(),
                _subscription: subscription,
            }
        })
    }

    /// Ask for a write until it is not held any more.
    fn begin_write(&self, node: &Arc<Node>, offset: u64, length: u64) -> WritePermit {
        loop {
            let heard = *lock(&self.rung);
            match node.begin_write(offset, length) {
                Ok(permit) => return permit,
                Err(Refusal::Held) => {}
                Err(refusal) => panic!("{refusal}"),
            }
            let (_rung, timeout) = self
                .changed
                .wait_timeout_while(lock(&self.rung), PATIENCE, |rung| *rung == heard)
                .unwrap();
            assert!(!timeout.timed_out(), "no notice came");
        }
    }
}

#[test]
fn permits_reach_exactly_their_range() {
    let (disk, node) = disk_and_node(Hold::Nothing);
    write(&node, ODD_LENGTH - 3, b"end").unwrap();
    let mut buf = [0; 5];
    let permit = node.begin_read(ODD_LENGTH - 5, 5).unwrap();
    assert_eq!(
        permit.read_cached(2, &mut buf[..3]).unwrap(),
        Cached::Hit(3)
    );
    assert_eq!(&buf[..3], b"end");
    permit.read(&mut buf).unwrap();
    assert_eq!(&buf, b"\0\0end");
    let permit = node.begin_read(ODD_LENGTH - 5, 5).unwrap();
    permit.read_rest(3, &mut buf[..2]).unwrap();
    assert_eq!(&buf[..2], b"nd");
    let permit = node.begin_read(0, ODD_LENGTH).unwrap();
    assert_eq!(permit.status(0, ODD_LENGTH).unwrap().kind, ExtentKind::Hole);
    assert_eq!(disk.count(Operation::Write), 1);
    assert_eq!(dirty_chunks(&node), [3]);
}

#[test]
fn ranges_past_the_end_are_refused() {
    let (disk, node) = disk_and_node(Hold::Nothing);
    for (offset, length) in [
        (ODD_LENGTH, 1),
        (ODD_LENGTH - 1, 2),
        (u64::MAX, 1),
        (1, u64::MAX),
    ] {
        assert_eq!(
            node.begin_write(offset, length).unwrap_err(),
            Refusal::PastEnd
        );
        assert_eq!(
            node.begin_read(offset, length).unwrap_err(),
            Refusal::PastEnd
        );
    }
    drop(node.begin_write(ODD_LENGTH, 0).unwrap());
    drop(node.begin_write(0, ODD_LENGTH).unwrap());
    assert!(disk.log().is_empty());
}

#[test]
fn a_read_only_disk_refuses_writes_and_nothing_else() {
    let mut limits = MemoryDisk::new(4096).limits();
    limits.read_only = true;
    let node = Node::new(
        "cd",
        Box::new(MemoryDisk::with_limits(limits)),
        Hold::Nothing,
    );
    assert_eq!(node.begin_write(0, 1).unwrap_err(), Refusal::ReadOnly);
    node.begin_read(0, 1).unwrap().read(&mut [0]).unwrap();
    node.flush().unwrap();
}

#[test]
#[should_panic(expected = "left: 4")]
fn a_write_of_another_length_than_permitted_never_reaches_the_disk() {
    let (_disk, node) = disk_and_node(Hold::Nothing);
    let _ = node.begin_write(0, 3).unwrap().write(b"four");
}

#[test]
fn held_writes_wait_while_reads_and_flushes_run() {
    let (_disk, node) = disk_and_node(Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    lease.hold(Hold::Writes);
    assert_eq!(node.held(), Some(Hold::Writes));
    assert_eq!(node.begin_write(0, 1).unwrap_err(), Refusal::Held);
    drop(node.begin_read(0, 1).unwrap());
    node.flush().unwrap();
    lease.hold(Hold::Everything);
    assert_eq!(node.begin_write(0, 1).unwrap_err(), Refusal::Held);
    assert_eq!(node.begin_read(0, 1).unwrap_err(), Refusal::Held);
    node.flush().unwrap();
    lease.hold(Hold::Nothing);
    drop(node.begin_write(0, 1).unwrap());
}

#[test]
fn drain_waits_for_a_write_in_flight() {
    let (disk, node) = disk_and_node(Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    let gate = disk.gate(Operation::Write);
    thread::scope(|scope| {
        let guest = scope.spawn(|| write(&node, 10, b"in flight"));
        gate.wait_reached(1);
        lease.hold(Hold::Writes);
        assert!(!lease.drain(Duration::ZERO), "a write is in flight");
        assert_eq!(node.begin_write(0, 1).unwrap_err(), Refusal::Held);
        gate.open();
        assert!(lease.drain(PATIENCE));
        // Both hold from the moment of the drain on, not only after the guest was told.
        assert_eq!(&disk.snapshot()[10..19], b"in flight");
        assert_eq!(dirty_chunks(&node), [0]);
        guest.join().unwrap().unwrap();
    });
}

#[test]
fn a_write_is_in_flight_until_it_is_marked() {
    let (disk, node) = disk_and_node(Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    let gate = disk.gate_after(Operation::Write);
    thread::scope(|scope| {
        scope.spawn(|| write(&node, CHUNK_BYTES, b"x").unwrap());
        gate.wait_reached(1);
        lease.hold(Hold::Writes);
        assert_eq!(disk.snapshot()[CHUNK_BYTES as usize], b'x');
        assert_eq!(dirty_chunks(&node), [0; 0]);
        assert!(!lease.drain(Duration::ZERO));
        gate.open();
        assert!(lease.drain(PATIENCE));
        assert_eq!(dirty_chunks(&node), [1]);
    });
}

#[test]
fn everything_is_marked_when_a_drain_is_over() {
    // So many chunks that marking them takes far longer than a drain.
    let node = Node::new("huge", Box::new(MemoryDisk::new(1 << 40)), Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    thread::scope(|scope| {
        let permit = node.begin_write(0, 1 << 40).unwrap();
        scope.spawn(|| drop(permit));
        lease.hold(Hold::Writes);
        assert!(lease.drain(PATIENCE));
        assert_eq!(node.dirty().count(), 1 << 20);
    });
}

#[test]
fn a_permit_counts_before_it_is_used() {
    let (_disk, node) = disk_and_node(Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    let first = node.begin_write(0, 1).unwrap();
    let second = node.begin_write(0, 1).unwrap();
    lease.hold(Hold::Writes);
    drop(first);
    assert!(!lease.drain(Duration::ZERO));
    drop(second);
    assert!(lease.drain(Duration::ZERO));
}

#[test]
fn every_outcome_of_a_write_is_dirty() {
    let (disk, node) = disk_and_node(Hold::Nothing);
    let taken = |expected: &[u64]| {
        assert_eq!(dirty_chunks(&node), expected);
        node.dirty().clear(0..u64::MAX);
    };
    disk.fail(Operation::Write, 1, libc::EIO);
    write(&node, 0, b"never there").unwrap_err();
    taken(&[0]);
    disk.fail_after_bytes(Operation::Write, 1, libc::ENOSPC, 3);
    let error = write(&node, CHUNK_BYTES - 3, b"halfway").unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(
        &disk.snapshot()[CHUNK_BYTES as usize - 3..][..7],
        b"hal\0\0\0\0"
    );
    taken(&[0, 1]);
    drop(node.begin_write(2 * CHUNK_BYTES, CHUNK_BYTES + 1).unwrap());
    taken(&[2, 3]);
    let permit = node.begin_write(0, ODD_LENGTH).unwrap();
    permit.write_zeroes(Unmap::May, false).unwrap();
    taken(&[0, 1, 2, 3]);
    disk.fail(Operation::Discard, 1, libc::EIO);
    let permit = node.begin_write(0, 1).unwrap();
    permit.discard().unwrap_err();
    taken(&[0]);
    disk.set_quick_zeroes(false);
    let permit = node.begin_write(0, 1).unwrap();
    permit.write_zeroes(Unmap::May, true).unwrap_err();
    taken(&[0]);
    drop(node.begin_write(0, 0).unwrap());
    taken(&[]);
}

#[test]
fn one_lease_at_a_time_and_its_end_restores_what_was() {
    for resting in [Hold::Nothing, Hold::Writes] {
        let (_disk, node) = disk_and_node(resting);
        assert_eq!(node.user(), None);
        let lease = node.lease("migration").unwrap();
        assert_eq!(node.user(), Some("migration"));
        let refusal = node.lease("snapshot").unwrap_err();
        assert_eq!(refusal.to_string(), "in use by migration");
        lease.hold(Hold::Everything);
        drop(lease);
        assert_eq!(node.held(), Some(resting));
        drop(node.lease("snapshot").unwrap());
    }
}

#[test]
fn a_disk_that_arrived_is_live_from_then_on() {
    let (_disk, node) = disk_and_node(Hold::Writes);
    let lease = node.lease("incoming").unwrap();
    assert_eq!(node.begin_write(0, 1).unwrap_err(), Refusal::Held);
    lease.filler().device().write_at(b"moved in", 0).unwrap();
    lease.arrive();
    assert_eq!(node.held(), Some(Hold::Nothing));
    assert_eq!(node.user(), None);
    drop(node.lease("migration").unwrap());
    assert_eq!(node.held(), Some(Hold::Nothing));
}

#[test]
fn a_leaving_disk_that_stays_is_served_on() {
    let (_disk, node) = disk_and_node(Hold::Writes);
    let leaving = node.lease("migration").unwrap().leave();
    assert_eq!(node.held(), Some(Hold::Everything));
    assert_eq!(node.lease("another").unwrap_err().user, "migration");
    leaving.serve_on();
    assert_eq!(node.held(), Some(Hold::Nothing));
    assert_eq!(node.user(), None);
}

#[test]
fn a_disk_that_was_given_up_never_comes_back() {
    let (_disk, node) = disk_and_node(Hold::Nothing);
    node.lease("migration").unwrap().leave().give_up();
    assert_eq!(node.held(), None);
    assert_eq!(node.begin_read(0, 1).unwrap_err(), Refusal::Departed);
    assert_eq!(node.begin_write(0, 1).unwrap_err(), Refusal::Departed);
    let refusal = node.lease("migration").unwrap_err();
    assert_eq!(refusal.to_string(), "in use by another host");
    // Not even by somebody who held on to a lease.
    node.set_level(Hold::Nothing.level());
    assert_eq!(node.held(), None);
}

#[test]
fn a_leaving_disk_without_a_decision_stays_held() {
    let (_disk, node) = disk_and_node(Hold::Nothing);
    drop(node.lease("migration").unwrap().leave());
    assert_eq!(node.held(), Some(Hold::Everything));
    assert_eq!(node.begin_read(0, 1).unwrap_err(), Refusal::Held);
    assert_eq!(node.lease("another").unwrap_err().user, "migration");
}

#[test]
fn notices_come_when_holds_end_until_the_subscription_does() {
    let (_disk, node) = disk_and_node(Hold::Nothing);
    let notices = Arc::new(AtomicUsize::new(0));
    let subscription = node.subscribe({
        let notices = Arc::clone(&notices);
        let node = Arc::downgrade(&node);
        move || {
            // Whoever is told may ask at once, also who has the disk.
            if let Some(node) = node.upgrade() {
                let _ = (node.held(), node.user());
            }
            notices.fetch_add(1, Ordering::SeqCst);
        }
    });
    let heard = || notices.swap(0, Ordering::SeqCst) > 0;
    let lease = node.lease("migration").unwrap();
    assert!(!heard());
    lease.hold(Hold::Writes);
    heard();
    lease.hold(Hold::Nothing);
    assert!(heard());
    lease.hold(Hold::Writes);
    heard();
    drop(lease);
    assert!(heard());
    let leaving = node.lease("migration").unwrap().leave();
    heard();
    leaving.serve_on();
    assert!(heard());
    let leaving = node.lease("migration").unwrap().leave();
    heard();
    leaving.give_up();
    assert!(heard());
    drop(subscription);
    node.notify();
    assert!(!heard());
}

#[test]
fn claims_clear_and_put_back_exactly_their_chunks() {
    let (_disk, node) = disk_and_node(Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    assert_eq!(lease.chunks(), 4);
    drop(node.begin_write(0, ODD_LENGTH).unwrap());
    let mut claim = lease.claim(1..u64::MAX);
    assert_eq!(claim.chunks(), 1..4);
    assert_eq!(claim.bytes(), CHUNK_BYTES..ODD_LENGTH);
    assert_eq!(dirty_chunks(&node), [0]);
    let front = claim.split_front(2);
    assert_eq!((front.chunks(), claim.chunks()), (1..3, 3..4));
    claim.put_back();
    assert_eq!(dirty_chunks(&node), [0, 3]);
    let mut buf = vec![1; 2 << 20];
    front.read(&mut buf).unwrap();
    assert!(buf.iter().all(|&byte| byte == 0));
    assert_eq!(dirty_chunks(&node), [0, 3]);
    let mut rest = front;
    assert_eq!(rest.split_front(9).chunks(), 1..3);
    assert!(rest.chunks().is_empty());
    rest.put_back();
    lease.claim(7..9).put_back();
    assert_eq!(dirty_chunks(&node), [0, 3]);
}

#[test]
fn extents_stay_inside_their_claim() {
    let (disk, node) = disk_and_node(Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    disk.fill(CHUNK_BYTES, &[7; 4096]);
    let claim = lease.claim(0..1);
    let extent = claim.extent(0).unwrap();
    assert_eq!(
        (extent.length, extent.kind),
        (CHUNK_BYTES, ExtentKind::Hole)
    );
    let claim = lease.claim(1..4);
    let extent = claim.extent(CHUNK_BYTES + 4095).unwrap();
    assert_eq!((extent.length, extent.kind), (1, ExtentKind::Data));
    let extent = claim.extent(CHUNK_BYTES + 4096).unwrap();
    assert_eq!(extent.length, ODD_LENGTH - CHUNK_BYTES - 4096);
}

#[test]
fn a_write_that_a_claim_has_missed_is_dirty_afterwards() {
    let (disk, node) = disk_and_node(Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    let mut buf = vec![0; CHUNK_BYTES as usize];
    let gate = disk.gate(Operation::Write);
    thread::scope(|scope| {
        scope.spawn(|| write(&node, 0, b"late").unwrap());
        gate.wait_reached(1);
        let claim = lease.claim(0..1);
        claim.read(&mut buf).unwrap();
        gate.open();
    });
    assert_eq!(&buf[..4], [0; 4], "read before the write");
    assert_eq!(
        dirty_chunks(&node),
        [0],
        "the copy is stale and nobody knows"
    );
}

#[test]
fn a_write_during_an_allocation_query_is_dirty_afterwards() {
    let (disk, node) = disk_and_node(Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    let gate = disk.gate_after(Operation::Status);
    thread::scope(|scope| {
        let query = scope.spawn(|| lease.claim(0..1).extent(0).unwrap().kind);
        gate.wait_reached(1);
        write(&node, 0, b"no hole").unwrap();
        gate.open();
        assert_eq!(query.join().unwrap(), ExtentKind::Hole);
    });
    assert_eq!(dirty_chunks(&node), [0]);
}

/// One random write, zero-write or discard; what it returns is the disk's business.
fn scribble(node: &Arc<Node>, bell: &Bell, rng: &mut fastrand::Rng) {
    let disk_bytes = node.limits().length;
    let length = rng.u64(1..=256 << 10).min(disk_bytes);
    let offset = rng.u64(0..=disk_bytes - length);
    let permit = bell.begin_write(node, offset, length);
    let _ = match rng.u8(0..10) {
        0 => permit.write_zeroes(Unmap::May, false),
        1 => permit.write_zeroes(Unmap::Never, rng.bool()),
        2 => permit.discard(),
        _ => permit.write(&vec![rng.u8(1..); usize::try_from(length).unwrap()]),
    };
}

#[test]
fn nothing_changes_between_drain_and_release() {
    let mut rng = rng();
    let (disk, node) = disk_and_node(Hold::Nothing);
    let lease = node.lease("migration").unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            let mut rng = rng.fork();
            let (node, stop) = (&node, &stop);
            scope.spawn(move || {
                let bell = Bell::on(node);
                while !stop.load(Ordering::SeqCst) {
                    scribble(node, &bell, &mut rng);
                }
            });
        }
        for _ in 0..rounds(40) {
            let written = disk.count(Operation::Write);
            while disk.count(Operation::Write) == written {
                thread::yield_now();
            }
            lease.hold(Hold::Writes);
            assert!(lease.drain(PATIENCE));
            let written = disk.count(Operation::Write);
            let before = disk.snapshot();
            for _ in 0..rng.u8(0..20) {
                thread::yield_now();
            }
            let quiet = disk.snapshot() == before && disk.count(Operation::Write) == written;
            if !quiet {
                stop.store(true, Ordering::SeqCst);
                lease.hold(Hold::Nothing);
                panic!("a write after the drain");
            }
            disk.clear_log();
            lease.hold(Hold::Nothing);
        }
        stop.store(true, Ordering::SeqCst);
    });
}

/// Copy every dirty chunk once.
fn mirror(lease: &Lease, copy: &mut [u8]) {
    let mut next = lease.node().dirty().next_dirty(Chunk(0));
    while let Some(chunk) = next {
        let claim = lease.claim(chunk.0..chunk.0 + 1);
        let bytes = claim.bytes();
        let range = usize::try_from(bytes.start).unwrap()..usize::try_from(bytes.end).unwrap();
        let part = &mut copy[range];
        match claim.extent(bytes.start).unwrap() {
            Extent {
                kind: ExtentKind::Hole | ExtentKind::Zero,
                length,
            } if length == bytes.end - bytes.start => part.fill(0),
            _ => claim.read(part).unwrap(),
        }
        next = lease.node().dirty().next_dirty(Chunk(chunk.0 + 1));
    }
}

/// Writers scribble while a mirror copies what their claims show; now and then all is held and
/// the mirror has to be equal.
fn mirror_misses_nothing(device: Box<dyn BlockDevice>, meanwhile: impl Fn(&mut fastrand::Rng)) {
    let mut rng = rng();
    let node = Node::new("disk0", device, Hold::Nothing);
    let length = usize::try_from(node.limits().length).unwrap();
    let mut copy = vec![0; length];
    let mut truth = vec![0; length];
    let lease = node.lease("migration").unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            let mut rng = rng.fork();
            let (node, stop) = (&node, &stop);
            scope.spawn(move || {
                let bell = Bell::on(node);
                while !stop.load(Ordering::SeqCst) {
                    scribble(node, &bell, &mut rng);
                }
            });
        }
        let mut passes = 0;
        for round in 0..rounds(8) {
            let marked = node.dirty().marked();
            while node.dirty().marked() < marked + 20 {
                if node.dirty().count() == 0 {
                    // Nothing to copy before a writer had its turn.
                    thread::yield_now();
                    continue;
                }
                meanwhile(&mut rng);
                mirror(&lease, &mut copy);
                passes += 1;
            }
            lease.hold(Hold::Writes);
            assert!(lease.drain(PATIENCE));
            mirror(&lease, &mut copy);
            lease.filler().device().read_at(&mut truth, 0).unwrap();
            if copy != truth {
                stop.store(true, Ordering::SeqCst);
                lease.hold(Hold::Nothing);
                let at = copy.iter().zip(&truth).position(|(a, b)| a != b);
                panic!("round {round}: the mirror missed a write at byte {at:?}");
            }
            lease.hold(Hold::Nothing);
        }
        println!("{passes} passes, {} chunks marked", node.dirty().marked());
        stop.store(true, Ordering::SeqCst);
    });
}

#[test]
fn a_mirror_of_a_failing_disk_misses_nothing() {
    let disk = MemoryDisk::new(ODD_LENGTH);
    mirror_misses_nothing(Box::new(disk.clone()), |rng| {
        let errno = [libc::EIO, libc::ENOSPC][rng.usize(0..2)];
        disk.fail_after_bytes(Operation::Write, rng.u64(1..5), errno, rng.u64(0..99_999));
    });
}

#[test]
fn a_mirror_of_a_file_misses_nothing() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = RawDisk::create(folder.path().join("disk"), ODD_LENGTH, true).unwrap();
    mirror_misses_nothing(Box::new(disk), |_| ());
}
