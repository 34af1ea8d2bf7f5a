//! Writes that their writers tell.

use std::ops::Range;
use std::sync::Arc;

use super::{DirtyLog, DirtyLogError};
use crate::bitmap::PageBitmap;
use crate::block::{BlockIndex, PAGE_BYTES};
use crate::guest::GuestRam;

/// A log of the writes that its [`Marker`]s are told of: those of a VMM's devices, of another process,
/// of memory that was given back.
#[derive(Debug)]
pub struct MarkedLog {
    blocks: Arc<[PageBitmap]>,
}

/// Tells a [`MarkedLog`] of writes, from any thread.
#[derive(Clone, Debug)]
pub struct Marker {
    blocks: Arc<[PageBitmap]>,
}

impl MarkedLog {
    /// A log for the blocks of this memory.
    #[must_use]
    pub fn new(ram: &dyn GuestRam) -> Self {
        Self {
            blocks: ram.blocks().iter().map(crate::RamBlock::bitmap).collect(),
        }
    }

    /// For whoever writes.
    #[must_use]
    pub fn marker(&self) -> Marker {
        Marker {
            blocks: Arc::clone(&self.blocks),
        }
    }
}

impl Marker {
    /// Bytes of a block **have been** written. Told before they are, the write may be lost. What lies
    /// behind the block's end is ignored.
    pub fn mark(&self, block: BlockIndex, offset: u64, bytes: u64) {
        if let Some(bitmap) = self.blocks.get(block.0) {
            let end = offset.saturating_add(bytes).div_ceil(PAGE_BYTES);
            bitmap.set_range(offset / PAGE_BYTES..end);
        }
    }
}

impl DirtyLog for MarkedLog {
    fn start(&mut self, _ram: &dyn GuestRam) -> Result<(), DirtyLogError> {
        for bitmap in &*self.blocks {
            bitmap.clear_range(0..bitmap.pages());
        }
        Ok(())
    }

    fn collect(
        &mut self,
        ram: &dyn GuestRam,
        dirty: &mut dyn FnMut(BlockIndex, Range<u64>),
    ) -> Result<(), DirtyLogError> {
        let blocks = ram.blocks().iter().zip(&*self.blocks);
        for (index, (block, bitmap)) in blocks.enumerate() {
            let pages = block.pages();
            for run in bitmap.runs() {
                // Cleared first: a mark from now on is for the next time.
                bitmap.clear_range(run.clone());
                let run = run.start..run.end.min(pages);
                if !run.is_empty() {
                    dirty(BlockIndex(index), run);
                }
            }
        }
        Ok(())
    }

    /// Marks still cost what they cost, which is little.
    fn stop(&mut self, _ram: &dyn GuestRam) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::AnonymousRam;

    fn collected(log: &mut impl DirtyLog, ram: &AnonymousRam) -> Vec<(usize, Range<u64>)> {
        let mut all = Vec::new();
        log.collect(ram, &mut |block, pages| all.push((block.0, pages)))
            .unwrap();
        all
    }

    #[test]
    fn reports_what_was_marked_once() {
        let ram = AnonymousRam::new(&[("a", 16 << 12), ("b", 4 << 12)]).unwrap();
        let mut log = MarkedLog::new(&ram);
        let marker = log.marker();
        marker.mark(BlockIndex(0), 0, 1);
        log.start(&ram).unwrap();
        assert_eq!(collected(&mut log, &ram), []);
        marker.mark(BlockIndex(0), 4095, 2);
        marker.mark(BlockIndex(0), 5 << 12, 4096);
        marker.mark(BlockIndex(1), 3 << 12, u64::MAX);
        marker.mark(BlockIndex(1), u64::MAX, u64::MAX);
        marker.mark(BlockIndex(1), 0, 0);
        marker.mark(BlockIndex(2), 0, 1);
        assert_eq!(collected(&mut log, &ram), [(0, 0..2), (0, 5..6), (1, 3..4)]);
        assert_eq!(collected(&mut log, &ram), []);
    }

    #[test]
    fn two_logs_are_one() {
        let ram = AnonymousRam::new(&[("a", 16 << 12)]).unwrap();
        let logs = (MarkedLog::new(&ram), MarkedLog::new(&ram));
        let (first, second) = (logs.0.marker(), logs.1.marker());
        let mut log: Box<dyn DirtyLog> = Box::new(logs);
        first.mark(BlockIndex(0), 0, 1);
        second.mark(BlockIndex(0), 0, 1);
        log.start(&ram).unwrap();
        assert_eq!(collected(&mut log, &ram), []);
        second.mark(BlockIndex(0), 4096, 1);
        first.mark(BlockIndex(0), 8192, 1);
        assert_eq!(collected(&mut log, &ram), [(0, 2..3), (0, 1..2)]);
        log.stop(&ram);
    }
}
