use vmferry_disk::simulated::{Logged, MemoryDisk, Operation as Kind};
use vmferry_disk::{
    Allocation, BlockDevice, Cached, DiskError, Extent, Hold, Lease, Limits as DiskLimits, Node,
    Unmap,
};
use vmferry_stream::{Name, RamRecord};

use super::*;
use crate::apply::WRITEBACK_BYTES;

const MIB: u64 = CHUNK_BYTES;

struct Target {
    memories: Vec<MemoryDisk>,
    destination: Destination,
    _leases: Vec<Lease>,
}

fn target(lengths: &[u64]) -> Target {
    incremental_target(lengths, Coverage::Whole, |disk| Box::new(disk))
}

fn incremental_target(
    lengths: &[u64],
    coverage: Coverage,
    device: impl Fn(MemoryDisk) -> Box<dyn BlockDevice>,
) -> Target {
    let memories: Vec<MemoryDisk> = lengths
        .iter()
        .map(|length| MemoryDisk::new(*length))
        .collect();
    let lease = |(index, memory): (usize, &MemoryDisk)| {
        memory.fill(0, &vec![0x55; memory.snapshot().len()]);
        let node = Node::new(format!("disk{index}"), device(memory.clone()), Hold::Writes);
        node.lease("a test").expect("free")
    };
    let leases: Vec<Lease> = memories.iter().enumerate().map(lease).collect();
    let fillers = leases.iter().map(Lease::filler).collect();
    Target {
        memories,
        destination: Destination::without_thread(fillers, coverage).expect("good disks"),
        _leases: leases,
    }
}

fn sector(byte: u64) -> Sector {
    Sector::at_byte(byte).expect("a sector")
}

fn name(disk: usize) -> Name {
    Name::new(&format!("disk{disk}")).expect("short")
}

impl Target {
    fn zero(&mut self, disk: usize, byte: u64) {
        self.record(BlockChunk::Zero {
            sector: sector(byte),
            device: name(disk),
        });
    }

    fn data(&mut self, disk: usize, byte: u64, fill: u8) {
        self.record(BlockChunk::Data {
            sector: sector(byte),
            device: name(disk),
        });
        let room = self.destination.payload(MIB as usize).expect("room");
        room.fill(fill);
        self.destination.payload_filled().expect("written");
    }

    fn record(&mut self, chunk: BlockChunk) {
        self.destination
            .record(&Record::Block(chunk))
            .expect("taken");
    }

    fn end_of_section(&mut self) {
        self.record(BlockChunk::EndOfSection);
    }

    fn log(&self, disk: usize) -> Vec<(Kind, u64, u64)> {
        let entry = |logged: Logged| (logged.operation, logged.offset, logged.length);
        self.memories[disk].log().into_iter().map(entry).collect()
    }
}

#[test]
fn neighbouring_zero_blocks_are_one_operation() {
    let mut target = target(&[4 * MIB + 10, 3 * MIB]);
    for chunk in 0..5 {
        target.zero(0, chunk * MIB);
    }
    assert_eq!(target.log(0), [], "more may come");
    // Another disk, a gap, and one that was there before: each begins anew.
    target.zero(1, 0);
    target.zero(1, 2 * MIB);
    target.zero(1, 2 * MIB);
    target.end_of_section();
    assert_eq!(target.log(0), [(Kind::WriteZeroes, 0, 4 * MIB + 10)]);
    assert_eq!(
        target.log(1),
        [
            (Kind::WriteZeroes, 0, MIB),
            (Kind::WriteZeroes, 2 * MIB, MIB),
            (Kind::WriteZeroes, 2 * MIB, MIB)
        ]
    );
}

#[test]
fn of_several_frames_of_a_block_the_last_one_wins() {
    let mut target = target(&[2 * MIB]);
    target.zero(0, 0);
    target.data(0, 0, 1);
    target.zero(0, 0);
    target.data(0, MIB, 2);
    target.data(0, 0, 3);
    target.zero(0, MIB);
    target.end_of_section();
    let disk = target.memories[0].snapshot();
    let (first, second) = disk.split_at(MIB as usize);
    assert!(first.iter().all(|byte| *byte == 3));
    assert!(second.iter().all(|byte| *byte == 0));
    target.destination.end().expect("whole");
}

#[test]
fn data_that_is_zero_becomes_a_hole() {
    let mut target = target(&[MIB]);
    target.data(0, 0, 0);
    assert_eq!(target.log(0), [(Kind::WriteZeroes, 0, MIB)]);
}

#[test]
fn what_lies_past_the_end_is_dropped() {
    let mut target = target(&[MIB + 1536, 1]);
    target.data(0, MIB, 7);
    target.data(1, 0, 8);
    assert_eq!(target.log(0), [(Kind::Write, MIB, 1536)]);
    assert_eq!(target.log(1), [(Kind::Write, 0, 1)]);
}

/// Ours ends the last block of an odd disk with the disk.
#[test]
fn a_block_that_ends_with_the_disk_completes_its_last_chunk() {
    let mut target = target(&[MIB + 1536]);
    target.data(0, 1536, 7);
    let error = target
        .destination
        .end()
        .expect_err("the first is missing")
        .to_string();
    assert!(
        error.contains("1 of 2 blocks never arrived, first at byte 0"),
        "{error}"
    );
    target.data(0, 0, 6);
    target.destination.end().expect("whole");
    let disk = target.memories[0].snapshot();
    assert_eq!(
        (disk[0], disk[MIB as usize - 1], disk[MIB as usize]),
        (6, 6, 7)
    );
}

#[test]
fn written_data_is_on_its_way_to_the_medium_before_the_sync() {
    let length = 2 * WRITEBACK_BYTES + MIB;
    let mut target = target(&[length]);
    for chunk in 0..length / MIB {
        target.data(0, chunk * MIB, 1);
    }
    assert_eq!(target.memories[0].count(Kind::StartWriteback), 2);
    assert_eq!(target.memories[0].count(Kind::Flush), 0);
    target.destination.syncer().sync().expect("synced");
    assert_eq!(target.memories[0].count(Kind::Flush), 1);
}

#[test]
fn every_disk_must_be_whole() {
    let mut target = target(&[MIB, 70 * MIB]);
    target.zero(0, 0);
    for chunk in (0..70).filter(|chunk| *chunk != 66) {
        target.zero(1, chunk * MIB);
    }
    let error = target
        .destination
        .end()
        .expect_err("one is missing")
        .to_string();
    let place = format!(
        "disk 'disk1': 1 of 70 blocks never arrived, first at byte {}",
        66 * MIB
    );
    assert!(error.starts_with(&place), "{error}");
    assert!(!target.destination.stats().ended.load(Ordering::Relaxed));
    target.zero(1, 66 * MIB);
    target.destination.end().expect("whole");
    assert!(target.destination.stats().ended.load(Ordering::Relaxed));
}

#[test]
fn figures_are_those_of_the_disks() {
    let mut target = target(&[MIB + 1536]);
    let stats = target.destination.stats();
    target.data(0, 0, 1);
    target.data(0, MIB, 1);
    target.zero(0, MIB);
    target.record(BlockChunk::Progress { percent: 42 });
    let arrived = stats.arrived_bytes.load(Ordering::Relaxed);
    assert_eq!(arrived, MIB + 2 * 1536);
    assert_eq!(stats.zero_bytes.load(Ordering::Relaxed), 1536);
    assert_eq!(stats.percent.load(Ordering::Relaxed), 42);
}

#[test]
fn what_is_no_block_is_refused() {
    let mut target = target(&[MIB]);
    let foreign = Record::Ram(RamRecord::EndOfSection);
    assert!(target.destination.record(&foreign).is_err());
    assert!(
        target.destination.payload(MIB as usize).is_err(),
        "not announced"
    );
    target.record(BlockChunk::Data {
        sector: sector(0),
        device: name(0),
    });
    assert!(
        target.destination.payload(4096).is_err(),
        "of another length"
    );
    assert!(target.destination.payload(MIB as usize).is_ok());
}

#[test]
fn after_a_failure_nothing_more_is_written() {
    let mut target = target(&[2 * MIB]);
    target.memories[0].fail(Kind::Write, 1, 28);
    target.record(BlockChunk::Data {
        sector: sector(0),
        device: name(0),
    });
    let room = target.destination.payload(MIB as usize).expect("room");
    room.fill(9);
    let error = target
        .destination
        .payload_filled()
        .expect_err("no space")
        .to_string();
    assert!(error.contains("disk 'disk0': write at byte 0"), "{error}");
    let next = Record::Block(BlockChunk::Zero {
        sector: sector(MIB),
        device: name(0),
    });
    assert_eq!(
        target
            .destination
            .record(&next)
            .expect_err("no space")
            .to_string(),
        error
    );
    assert_eq!(
        target
            .destination
            .syncer()
            .sync()
            .expect_err("no space")
            .to_string(),
        error
    );
    assert!(
        target.memories[0]
            .snapshot()
            .iter()
            .all(|byte| *byte == 0x55)
    );
    assert_eq!(target.memories[0].count(Kind::Flush), 0);
}

/// The same with its thread, which must let waiters go and give buffers back.
#[test]
fn a_thread_that_has_failed_takes_everything_and_writes_nothing() {
    let memory = MemoryDisk::new(100 * MIB);
    memory.fail_from(Kind::Write, 1, 5);
    let node = Node::new("disk0", Box::new(memory.clone()), Hold::Writes);
    let lease = node.lease("a test").expect("free");
    let mut destination =
        Destination::new(vec![lease.filler()], Coverage::Whole).expect("a good disk");
    let syncer = destination.syncer();
    let mut failure = None;
    for chunk in 0..100 {
        let record = Record::Block(BlockChunk::Data {
            sector: sector(chunk * MIB),
            device: name(0),
        });
        let filled = destination.record(&record).and_then(|()| {
            destination.payload(MIB as usize)?.fill(1);
            destination.payload_filled()
        });
        if let Err(error) = filled {
            failure = Some(error.to_string());
            break;
        }
    }
    let failure = failure.expect("noticed before the buffers are used up for ever");
    assert!(
        failure.contains("disk 'disk0': write at byte 0"),
        "{failure}"
    );
    assert_eq!(syncer.sync().expect_err("failed").to_string(), failure);
    drop(destination);
    assert!(syncer.sync().is_err(), "nobody works any more");
    assert_eq!(memory.count(Kind::Write), 1);
    assert_eq!(memory.count(Kind::Flush), 0);
}

/// The block's data is `fill` throughout; returns what the destination says.
fn data_error(target: &mut Target, byte: u64, fill: u8) -> Option<String> {
    target.record(BlockChunk::Data {
        sector: sector(byte),
        device: name(0),
    });
    let room = target.destination.payload(MIB as usize).expect("room");
    room.fill(fill);
    let taken = target.destination.payload_filled();
    taken.err().map(|error| error.to_string())
}

#[test]
fn a_disk_that_is_shorter_than_the_source_s_is_not_cut_silently() {
    for ours in [false, true] {
        let mut target = target(&[MIB + MIB / 2]);
        let stats = target.destination.stats();
        stats.source_is_ours.store(ours, Ordering::Relaxed);
        let error = data_error(&mut target, MIB, 1);
        // What a QEMU pads with is anything, so only our own padding tells.
        assert_eq!(error.is_some(), ours, "{error:?}");
        if let Some(error) = error {
            assert!(error.contains("has data past the end"), "{error}");
            let half = usize::try_from(MIB + 1).expect("small");
            assert_eq!(
                target.memories[0].snapshot()[half],
                0x55,
                "nothing was written"
            );
        }
    }
}

#[test]
fn the_last_block_of_an_odd_disk_tells_its_length() {
    let odd = MIB + 1536;
    assert_eq!(data_error(&mut target(&[odd]), 1536, 1), None);
    // Sectors are whole: a length between two is padded to the next.
    assert_eq!(data_error(&mut target(&[odd - 100]), 1536, 0), None);
    for other in [odd - 512, odd + 512, 3 * MIB] {
        let error = data_error(&mut target(&[other]), 1536, 1).expect("another length");
        assert!(error.contains("is the last one of its disk"), "{error}");
    }
}

/// A disk of which only these ranges are its own. Its allocation is told in pieces of 32 KiB at most,
/// and not at all from some bytes on.
struct Overlay {
    disk: MemoryDisk,
    base: MemoryDisk,
    own: Vec<Range<u64>>,
    fails_from: u64,
}

impl BlockDevice for Overlay {
    fn limits(&self) -> DiskLimits {
        self.disk.limits()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.disk.read_at(buf, offset)
    }
    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError> {
        self.disk.read_cached_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        self.disk.write_at(buf, offset)
    }
    fn write_zeroes(&self, at: u64, length: u64, how: Unmap, fast: bool) -> Result<(), DiskError> {
        self.disk.write_zeroes(at, length, how, fast)
    }
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.disk.discard(offset, length)
    }
    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        self.disk.status(offset, length)
    }
    fn allocation(&self, offset: u64, length: u64) -> Result<Allocation, DiskError> {
        if offset >= self.fails_from {
            let source = std::io::Error::from_raw_os_error(5);
            let operation = "allocation";
            return Err(DiskError {
                operation,
                offset,
                length,
                source,
            });
        }
        let is_own = |byte: u64| self.own.iter().any(|range| range.contains(&byte));
        let ends = self.own.iter().flat_map(|range| [range.start, range.end]);
        let end = ends.filter(|end| *end > offset).min().unwrap_or(u64::MAX);
        let length = (end - offset).min(length).min(32 << 10);
        let is_own = is_own(offset);
        Ok(Allocation { length, is_own })
    }
    fn below(&self) -> Option<&dyn BlockDevice> {
        Some(&self.base)
    }
    fn start_writeback(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.disk.start_writeback(offset, length)
    }
    fn flush(&self) -> Result<(), DiskError> {
        self.disk.flush()
    }
}

fn overlay(length: u64, own: &[(u64, u64)], fails_from: u64) -> Target {
    let own: Vec<_> = own.iter().map(|(start, end)| *start..*end).collect();
    let target = incremental_target(&[length], Coverage::Incremental, |disk| {
        let own = own.clone();
        Box::new(Overlay {
            disk,
            base: MemoryDisk::new(length / 2),
            own,
            fails_from,
        })
    });
    let stats = target.destination.stats();
    stats.source_is_ours.store(true, Ordering::Relaxed);
    target
}

#[test]
fn only_what_is_the_disk_s_own_must_come_incrementally() {
    let length = 70 * MIB + 1536;
    // Nothing is: a fresh overlay.
    let mut target = overlay(length, &[], u64::MAX);
    target.destination.end().expect("the base has everything");
    // A bit in the middle of one block, the end of another and the start of the next, the last.
    let own = [
        (3 * MIB + 512, 3 * MIB + 1024),
        (66 * MIB - 512, 66 * MIB + 512),
        (length - 512, length),
    ];
    let mut target = overlay(length, &own, u64::MAX);
    let mut missing = vec![3, 65, 66, 70];
    while let Some(first) = missing.first().copied() {
        let error = target.destination.end().expect_err("some are missing");
        let place = format!(
            "disk 'disk0': {} blocks never arrived that are not those of its base, first at byte {}",
            missing.len(),
            first * MIB
        );
        assert!(error.to_string().starts_with(&place), "{error}");
        target.zero(0, first * MIB);
        missing.remove(0);
    }
    target.destination.end().expect("all that was its own");
}

#[test]
fn what_cannot_be_asked_counts_as_the_disk_s_own() {
    let mut target = overlay(6 * MIB, &[], 4 * MIB + 512);
    for chunk in [4, 5] {
        let error = target.destination.end().expect_err("missing").to_string();
        assert!(error.contains(&format!("byte {}", chunk * MIB)), "{error}");
        target.zero(0, chunk * MIB);
    }
    target.destination.end().expect("whole");
}

#[test]
fn a_disk_without_a_base_must_come_whole_incrementally_too() {
    let mut target = incremental_target(&[2 * MIB], Coverage::Incremental, |disk| Box::new(disk));
    target.data(0, 0, 1);
    let error = target.destination.end().expect_err("missing").to_string();
    assert!(error.contains("1 blocks never arrived"), "{error}");
}

/// How far a QEMU's cursor was is all that can be known.
#[test]
fn a_qemu_that_ends_an_incremental_first_pass_in_the_middle_is_noticed() {
    let end_after = |percents: &[u8], is_ours| {
        let mut target = overlay(16 * MIB, &[], u64::MAX);
        let stats = target.destination.stats();
        stats.source_is_ours.store(is_ours, Ordering::Relaxed);
        for percent in percents {
            target.record(BlockChunk::Progress { percent: *percent });
        }
        target.destination.end().map_err(|error| error.to_string())
    };
    // Before the very end it may say no more than where the last block starts: 15 of 16 MiB.
    for good in [[0, 93, 100].as_slice(), &[12, 100, 100]] {
        assert_eq!(end_after(good, false), Ok(()));
    }
    for early in [[0, 92, 100].as_slice(), &[0, 100], &[100], &[]] {
        let error = end_after(early, false).expect_err("too early");
        assert!(
            error.contains("the source has ended its migration at"),
            "{error}"
        );
        assert_eq!(end_after(early, true), Ok(()), "ours cannot");
    }
}

/// An earlier attempt has left it there, and the source has no need to send it.
#[test]
fn what_reads_as_the_base_does_need_not_come() {
    let length = 4 * MIB + 512;
    let mut target = overlay(length, &[(0, length)], u64::MAX);
    // The base ends after two blocks and a bit; behind that zeroes show through.
    target.memories[0].fill(0, &vec![0; length as usize]);
    target.memories[0].fill(3 * MIB - 1, &[1]);
    let error = target
        .destination
        .end()
        .expect_err("one differs")
        .to_string();
    assert!(
        error.contains(&format!("first at byte {}", 2 * MIB)),
        "{error}"
    );
    target.memories[0].fill(3 * MIB - 1, &[0]);
    target.memories[0].fail(Kind::Read, 1, 5);
    let error = target
        .destination
        .end()
        .expect_err("unreadable")
        .to_string();
    assert!(error.contains("read at byte"), "{error}");
    target.destination.end().expect("the same");
}
