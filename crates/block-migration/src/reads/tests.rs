use vmferry_buffer::Pool;
use vmferry_disk::simulated::{CacheMode, MemoryDisk, Operation};
use vmferry_disk::{CHUNK_BYTES, Hold, Lease, Node};

use super::*;
use crate::schedule::{DirtyView, DiskIndex, RunKind, Schedule, Work};

const MIB: usize = CHUNK_BYTES as usize;
const PATIENCE: Duration = Duration::from_secs(60);

struct Clean;

impl DirtyView for Clean {
    fn next_dirty(&self, _: DiskIndex, _: vmferry_disk::Chunk) -> Option<vmferry_disk::Chunk> {
        None
    }
    fn dirty_chunks(&self, _: DiskIndex) -> u64 {
        0
    }
}

/// So many tickets; only a schedule makes them.
fn tickets(count: u64) -> Vec<Ticket> {
    let mut schedule = Schedule::<()>::new(&[count * CHUNK_BYTES], 100);
    schedule.next_work(&Clean);
    schedule.queried([(0..count, RunKind::Data)]);
    let ticket = |work| match work {
        Work::Read { ticket, .. } => ticket,
        Work::Query { .. } => panic!("asked twice"),
    };
    std::iter::from_fn(|| schedule.next_work(&Clean).map(ticket)).collect()
}

fn disk(length: usize) -> (MemoryDisk, Lease) {
    let mut bytes = vec![0; length];
    crate::testing::rng().fill(&mut bytes);
    let memory = MemoryDisk::from_bytes(&bytes);
    let node = Node::new("disk0", Box::new(memory.clone()), Hold::Nothing);
    (memory, node.lease("a test").expect("free"))
}

/// A buffer that was used before.
fn stale(pool: &Pool) -> Buffer {
    let mut buffer = pool.try_take().expect("room");
    buffer.fill(0xee);
    buffer
}

fn holds_chunk(buffer: &[u8], memory: &MemoryDisk, chunk: usize) {
    let snapshot = memory.snapshot();
    let data = &snapshot[chunk * MIB..snapshot.len().min((chunk + 1) * MIB)];
    assert!(&buffer[..data.len()] == data);
    assert!(buffer[data.len()..].iter().all(|byte| *byte == 0), "a leak");
}

#[test]
fn what_is_cached_is_read_at_once_and_padded_with_zeroes() {
    let (memory, lease) = disk(MIB + 700);
    let pool = Pool::new(MIB, 4 * MIB);
    let mut reads = ThreadReads::new();
    assert_eq!(reads.bytes_per_second(), None);
    for (mode, chunk) in [
        (CacheMode::Hit, 0),
        (CacheMode::Hit, 1),
        (CacheMode::Partial(999), 1),
    ] {
        memory.set_cache(mode);
        let mut buffer = stale(&pool);
        let claim = lease.claim(chunk..chunk + 1);
        assert!(matches!(reads.read_now(&claim, &mut buffer), Some(Ok(()))));
        holds_chunk(&buffer, &memory, usize::try_from(chunk).expect("small"));
    }
    assert!(reads.bytes_per_second().is_some());
    assert!(reads.finished(Duration::ZERO).is_none());
    assert!(reads.threads.is_empty());
}

#[test]
fn what_is_not_cached_is_read_by_threads_and_padded_with_zeroes() {
    let (memory, lease) = disk(MIB + 700);
    let pool = Pool::new(MIB, 4 * MIB);
    let mut reads = ThreadReads::new();
    for mode in [CacheMode::Partial(0), CacheMode::Unsupported] {
        memory.set_cache(mode);
        for (chunk, ticket) in (0..).zip(tickets(2)) {
            let mut buffer = stale(&pool);
            let claim = lease.claim(chunk..chunk + 1);
            assert!(reads.read_now(&claim, &mut buffer).is_none());
            reads.submit(ticket, claim, buffer);
            let finished = reads.finished(PATIENCE).expect("in time");
            assert_eq!(finished.ticket, ticket);
            let buffer = finished.result.expect("read");
            holds_chunk(&buffer, &memory, usize::try_from(chunk).expect("small"));
        }
    }
    assert_eq!(reads.threads.len(), 1, "one at a time needs one thread");
    assert!(reads.finished(PATIENCE).is_none(), "nothing is in flight");
}

#[test]
fn reads_wait_beside_each_other() {
    let (memory, lease) = disk(READS_MAX * MIB);
    let pool = Pool::new(MIB, READS_MAX * MIB);
    let mut reads = ThreadReads::new();
    let gate = memory.gate(Operation::Read);
    let tickets = tickets(READS_MAX as u64);
    for (chunk, ticket) in (0..).zip(&tickets) {
        reads.submit(*ticket, lease.claim(chunk..chunk + 1), stale(&pool));
    }
    gate.wait_reached(READS_MAX);
    assert!(reads.finished(Duration::ZERO).is_none());
    drop(gate);
    let mut ended: Vec<Ticket> = (0..READS_MAX)
        .map(|_| reads.finished(PATIENCE).expect("in time").ticket)
        .collect();
    ended.sort_unstable();
    assert_eq!(ended, tickets);
    assert!(reads.bytes_per_second().is_some());
}

#[test]
fn failures_are_told_and_do_not_stop_the_next() {
    let (memory, lease) = disk(MIB);
    let pool = Pool::new(MIB, MIB);
    let mut reads = ThreadReads::new();
    memory.set_cache(CacheMode::Unsupported);
    memory.fail(Operation::Read, 1, 5);
    let tickets = tickets(2);
    reads.submit(tickets[0], lease.claim(0..1), stale(&pool));
    let finished = reads.finished(PATIENCE).expect("in time");
    let error = finished.result.expect_err("planned");
    assert_eq!((error.operation, error.offset), ("read", 0));
    // The buffer went back: the pool has only one.
    reads.submit(tickets[1], lease.claim(0..1), stale(&pool));
    assert!(reads.finished(PATIENCE).expect("in time").result.is_ok());
    memory.set_cache(CacheMode::Hit);
    memory.fail(Operation::Read, 2, 5);
    memory.set_cache(CacheMode::Partial(10));
    let mut buffer = stale(&pool);
    let result = reads.read_now(&lease.claim(0..1), &mut buffer);
    assert!(matches!(result, None | Some(Err(_))), "not called read");
}

#[test]
fn dropping_waits_for_threads() {
    let (memory, lease) = disk(MIB);
    let pool = Pool::new(MIB, MIB);
    let mut reads = ThreadReads::new();
    reads.submit(tickets(1)[0], lease.claim(0..1), stale(&pool));
    drop(reads);
    assert_eq!(memory.count(Operation::Read), 1);
    assert_eq!(pool.buffers_taken(), 0);
}
