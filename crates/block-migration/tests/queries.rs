//! A PART ends after 64 questions about what lies below: they make no frames, and commands must be
//! heard.

use std::sync::atomic::Ordering;

use vmferry_block_migration::{QUERY_CHUNKS, Source, SourceOptions, ThreadReads};
use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{
    Allocation, BlockDevice, CHUNK_BYTES, Cached, DiskError, Extent, Hold, Limits, Node, Unmap,
};
use vmferry_savevm::{Progress, SaveHandler};

/// So many questions a PART may ask.
const QUERIES: u64 = 64;

/// An overlay in which nothing was written.
struct Overlay(MemoryDisk);

impl BlockDevice for Overlay {
    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.0.read_at(buf, offset)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError> {
        self.0.read_cached_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        self.0.write_at(buf, offset)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: Unmap,
        fast_only: bool,
    ) -> Result<(), DiskError> {
        self.0.write_zeroes(offset, length, unmap, fast_only)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.0.discard(offset, length)
    }

    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        self.0.status(offset, length)
    }

    fn allocation(&self, _offset: u64, length: u64) -> Result<Allocation, DiskError> {
        Ok(Allocation {
            length,
            is_own: false,
        })
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        self.0.below()
    }

    fn start_writeback(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.0.start_writeback(offset, length)
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.0.flush()
    }
}

/// How the PARTs of a disk end that so many questions are asked about, and what was passed over by
/// the end of each.
fn parts(queries: u64) -> Vec<(Progress, u64)> {
    let disk = Overlay(MemoryDisk::new(queries * QUERY_CHUNKS * CHUNK_BYTES));
    let node = Node::new("disk", Box::new(disk), Hold::Nothing);
    let lease = node.lease("a migration").expect("it is free");
    let options = SourceOptions {
        incremental: true,
        ..SourceOptions::default()
    };
    let source = Source::new(vec![lease.claimer()], ThreadReads::new(), options);
    let mut source = source.expect("a good disk");
    let stats = source.stats();
    let mut parts = Vec::new();
    loop {
        let progress = source
            .iterate(&mut Vec::new())
            .expect("there is room for all");
        let passed = stats.below_bytes.load(Ordering::Relaxed);
        parts.push((progress, passed / (QUERY_CHUNKS * CHUNK_BYTES)));
        if progress == Progress::Finished {
            return parts;
        }
    }
}

#[test]
fn a_part_asks_so_often_and_no_oftener() {
    use Progress::{Finished, Unfinished};
    assert_eq!(parts(QUERIES - 1), [(Finished, QUERIES - 1)]);
    let two = [(Unfinished, QUERIES), (Finished, QUERIES)];
    assert_eq!(parts(QUERIES), two);
    let more = [(Unfinished, QUERIES), (Finished, QUERIES + 1)];
    assert_eq!(parts(QUERIES + 1), more);
}
