//! Which pages to send next: the source's state machine, without memory, clock or log.
//!
//! ```text
//!   precopy   every page ─ pass 1 ─▶ what was written meanwhile ─ pass 2 ─▶ … ─▶ nothing, or the guest stops
//!   postcopy  what the destination lacks ─ requests first, then onwards from there, round and round ─▶ nothing
//! ```
//!
//! One bit for each page says whether it must be sent. Whoever takes a page finds its bit cleared
//! already, and reads the page after that: a write that comes later sets it again, by way of the dirty
//! log. In precopy a pass goes over the bits once, in order, so it sends a page at most once however
//! often it is written. In postcopy nothing sets bits any more: each page leaves once, together with
//! the others of its host page.
//!
//! Rules: `postcopy.md` §2, §4 and §5 of the wire format notes.

use std::collections::VecDeque;
use std::ops::Range;

use crate::bitmap::PageBitmap;
use crate::block::BlockIndex;
use crate::stored::StoredRange;

/// Pages of one block that are to be sent now, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) block: BlockIndex,
    /// Never empty.
    pub(crate) pages: Range<u64>,
}

/// A block, as far as the order of its pages goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockPages {
    /// Guest pages in use.
    pub(crate) pages: u64,
    /// Guest pages in each of the host's pages under it.
    pub(crate) host_pages: u64,
    /// Are its pages sent at all?
    pub(crate) travels: bool,
}

/// The state machine.
#[derive(Debug)]
pub(crate) struct Schedule {
    blocks: Vec<Block>,
    phase: Phase,
    /// Where the sweep goes on.
    cursor: (usize, u64),
    /// What is being served; the first page that may be left of it.
    request: Option<Run>,
    /// What goes before the sweep, although nobody has requested it yet.
    preferred: VecDeque<Run>,
    /// Bits that are set.
    left: u64,
    /// Bits that there are.
    total: u64,
    /// Passes that have begun.
    passes: u64,
}

#[derive(Debug)]
struct Block {
    to_send: PageBitmap,
    host_pages: u64,
    travels: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Pages are sent that never were.
    Bulk,
    /// Every page was sent once.
    Dirty,
    /// Nothing is written any more, or nothing that counts: each page is sent once.
    Once,
}

impl Schedule {
    /// Nothing was sent yet; the first pass begins.
    pub(crate) fn new(blocks: &[BlockPages]) -> Self {
        let blocks: Vec<Block> = blocks.iter().map(Block::new).collect();
        let total = blocks.iter().map(|block| block.to_send.count()).sum();
        Self {
            blocks,
            phase: Phase::Bulk,
            cursor: (0, 0),
            request: None,
            preferred: VecDeque::new(),
            left: total,
            total,
            passes: 1,
        }
    }

    /// The guest has written these pages; how many were not known to be dirty.
    pub(crate) fn mark(&mut self, block: BlockIndex, pages: Range<u64>) -> u64 {
        if self.phase == Phase::Once {
            return 0;
        }
        let block = self.blocks.get(block.0).filter(|block| block.travels);
        let newly = block.map_or(0, |block| block.to_send.set_range(pages));
        self.left += newly;
        newly
    }

    /// The next pages, about `pages_max` of them, whose bits are clear from now on; in postcopy whole
    /// host pages, however large. `None` at the end of a pass, or in postcopy when nothing is left.
    pub(crate) fn next(&mut self, pages_max: u64) -> Option<Run> {
        let run = match self.phase {
            Phase::Bulk | Phase::Dirty => self.sweep(pages_max),
            Phase::Once => {
                let asked = self.next_requested(pages_max);
                asked
                    .or_else(|| self.take_preferred(pages_max))
                    .or_else(|| self.sweep(pages_max))
                    .or_else(|| {
                        self.cursor = (0, 0);
                        self.sweep(pages_max)
                    })
            }
        };
        self.left -= run
            .as_ref()
            .map_or(0, |run| run.pages.end - run.pages.start);
        run
    }

    /// Begin again at the first page; false if nothing is left to be sent.
    pub(crate) fn begin_pass(&mut self) -> bool {
        self.cursor = (0, 0);
        if self.phase == Phase::Bulk {
            self.phase = Phase::Dirty;
        }
        self.passes += u64::from(self.left > 0);
        self.left > 0
    }

    /// Serve these pages before all others, those of them that were not sent, and go on behind them.
    /// Nothing is to be served if all of them were.
    pub(crate) fn serve(&mut self, request: Run) {
        let block = self.blocks.get(request.block.0);
        let left = block.and_then(|block| block.to_send.next_set(request.pages.start));
        let is_left = left.is_some_and(|page| page < request.pages.end);
        self.request = is_left.then_some(request);
    }

    /// The next preferred pages, in whole host pages, in whatever phase.
    pub(crate) fn next_preferred(&mut self, pages_max: u64) -> Option<Run> {
        let run = self.take_preferred(pages_max)?;
        self.left -= run.pages.end - run.pages.start;
        Some(run)
    }

    /// In postcopy these pages go before the sweep, in this order, as far as they were not sent.
    pub(crate) fn prefer(&mut self, ranges: impl IntoIterator<Item = StoredRange>) {
        let blocks = &self.blocks;
        let whole = |range: StoredRange| {
            let size = blocks.get(range.block.0)?.host_pages;
            let end = range.first_page.saturating_add(range.pages);
            let pages =
                range.first_page - range.first_page % size..end.checked_next_multiple_of(size)?;
            Some(Run {
                block: range.block,
                pages,
            })
        };
        self.preferred = ranges.into_iter().filter_map(whole).collect();
    }

    /// Is a request being served?
    pub(crate) fn is_serving(&self) -> bool {
        self.request.is_some()
    }

    /// From now on what is left is sent once, in whole host pages, whatever is written: the guest has
    /// stopped and will run elsewhere, or its memory is kept as it was.
    pub(crate) fn send_once(&mut self) {
        self.phase = Phase::Once;
        self.widen();
        // A pass that was cut short may have got into the middle of a host page.
        if let Some(block) = self.blocks.get(self.cursor.0) {
            self.cursor.1 -= self.cursor.1 % block.host_pages;
        }
    }

    /// These are the pages that the destination has not, of each block.
    pub(crate) fn resume(&mut self, to_send: Vec<PageBitmap>) {
        for (block, to_send) in self.blocks.iter_mut().zip(to_send) {
            if block.travels {
                block.to_send = to_send;
            }
        }
        self.request = None;
        self.widen();
    }

    /// What is left of a block, in order.
    pub(crate) fn left_of(&self, block: BlockIndex) -> impl Iterator<Item = Range<u64>> + '_ {
        let block = self.blocks.get(block.0);
        block.into_iter().flat_map(|block| block.to_send.runs())
    }

    /// How many pages must be sent.
    pub(crate) fn left(&self) -> u64 {
        self.left
    }

    /// How many pages there are.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    /// Does the first pass still run?
    pub(crate) fn is_bulk(&self) -> bool {
        self.phase == Phase::Bulk
    }

    /// Which pass it is, from 1.
    pub(crate) fn passes(&self) -> u64 {
        self.passes
    }

    fn sweep(&mut self, pages_max: u64) -> Option<Run> {
        let whole = self.phase == Phase::Once;
        while let Some(block) = self.blocks.get(self.cursor.0) {
            if let Some(pages) = block.take(self.cursor.1, u64::MAX, pages_max, whole) {
                let block = BlockIndex(self.cursor.0);
                self.cursor.1 = pages.end;
                return Some(Run { block, pages });
            }
            self.cursor = (self.cursor.0 + 1, 0);
        }
        None
    }

    fn next_requested(&mut self, pages_max: u64) -> Option<Run> {
        let request = self.request.as_mut()?;
        let index = request.block;
        let block = self.blocks.get(index.0);
        let Range { start, end } = request.pages;
        match block.and_then(|block| block.take(start, end, pages_max, true)) {
            Some(pages) => {
                request.pages.start = pages.end;
                if request.pages.is_empty() {
                    self.request = None;
                }
                self.cursor = (index.0, pages.end);
                Some(Run {
                    block: index,
                    pages,
                })
            }
            None => {
                self.request = None;
                None
            }
        }
    }

    fn take_preferred(&mut self, pages_max: u64) -> Option<Run> {
        while let Some(run) = self.preferred.front_mut() {
            let Range { start, end } = run.pages;
            let block = self.blocks.get(run.block.0);
            if let Some(pages) = block.and_then(|block| block.take(start, end, pages_max, true)) {
                run.pages.start = pages.end;
                let block = run.block;
                return Some(Run { block, pages });
            }
            self.preferred.pop_front();
        }
        None
    }

    /// A host page of which a part is to be sent is to be sent whole.
    fn widen(&mut self) {
        for block in self.blocks.iter().filter(|block| block.host_pages > 1) {
            let mut page = 0;
            while let Some(start) = block.to_send.next_set(page) {
                let first = start - start % block.host_pages;
                page = first + block.host_pages;
                block.to_send.set_range(first..page);
            }
        }
        self.left = self.blocks.iter().map(|block| block.to_send.count()).sum();
    }
}

impl Block {
    fn new(block: &BlockPages) -> Self {
        let to_send = PageBitmap::new(block.pages);
        if block.travels {
            to_send.set_range(0..block.pages);
        }
        Self {
            to_send,
            host_pages: block.host_pages.max(1),
            travels: block.travels,
        }
    }

    /// Take the first run from `from` on that begins before `end`: its bits are cleared. As `whole`
    /// host pages, of which all bits are the same.
    fn take(&self, from: u64, end: u64, pages_max: u64, whole: bool) -> Option<Range<u64>> {
        let start = self.to_send.next_set(from).filter(|start| *start < end)?;
        let most = match whole {
            true => (pages_max - pages_max % self.host_pages).max(self.host_pages),
            false => pages_max.max(1),
        };
        let end = end.min(start.saturating_add(most));
        let set = (start..end).take_while(|page| self.to_send.get(*page));
        let run = start..start + set.count() as u64;
        self.to_send.clear_range(run.clone());
        Some(run)
    }
}

#[cfg(test)]
mod tests;
