//! Guest memory, and which of its pages were received.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmferry_stream::{Name, RamPage};

use super::RamDestinationOptions;
use super::error::{PageFault, RamDestinationError};
use crate::bitmap::PageBitmap;
use crate::block::{PAGE_BYTES, RamBlock, Sharing};
use crate::guest::GuestRam;

/// Guest memory with a bit for each page that was received. Shared by whoever loads records and the
/// threads of a postcopy.
pub(super) struct Memory {
    ram: Arc<dyn GuestRam>,
    by_name: HashMap<Name, usize>,
    /// One for each block, in the guest's order.
    received: Vec<Received>,
    /// The list of blocks came, and is right.
    is_listed: AtomicBool,
}

struct Received {
    pages: PageBitmap,
    /// Bits of it that are set.
    count: AtomicU64,
    /// It stays where it is, and no page of it comes.
    is_ignored: bool,
}

impl Memory {
    pub(super) fn new(
        ram: Arc<dyn GuestRam>,
        options: RamDestinationOptions,
    ) -> Result<Self, RamDestinationError> {
        let mut by_name = HashMap::new();
        let mut received = Vec::new();
        for (index, block) in ram.blocks().iter().enumerate() {
            if by_name.insert(block.idstr().clone(), index).is_some() {
                return Err(RamDestinationError::NamedTwice {
                    block: block.idstr().clone(),
                });
            }
            received.push(Received {
                pages: block.bitmap(),
                count: AtomicU64::new(0),
                is_ignored: options.ignore_shared && block.sharing() == Sharing::Shared,
            });
        }
        Ok(Self {
            ram,
            by_name,
            received,
            is_listed: AtomicBool::new(false),
        })
    }

    pub(super) fn is_listed(&self) -> bool {
        self.is_listed.load(Ordering::Acquire)
    }

    pub(super) fn set_listed(&self) {
        self.is_listed.store(true, Ordering::Release);
    }

    pub(super) fn ram(&self) -> &dyn GuestRam {
        &*self.ram
    }

    pub(super) fn index(&self, name: &Name) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Every block that travels, with its index.
    pub(super) fn travelling(&self) -> impl Iterator<Item = (usize, &RamBlock)> {
        let blocks = self.ram.blocks().iter().zip(&self.received).enumerate();
        blocks.filter_map(|(index, (block, received))| {
            (!received.is_ignored).then_some((index, block))
        })
    }

    pub(super) fn block(&self, index: usize) -> Option<&RamBlock> {
        self.ram.blocks().get(index)
    }

    pub(super) fn is_ignored(&self, index: usize) -> bool {
        self.received
            .get(index)
            .is_some_and(|block| block.is_ignored)
    }

    /// Was this page received, and not discarded since?
    pub(super) fn has(&self, index: usize, offset: u64) -> bool {
        let page = offset / PAGE_BYTES;
        self.received
            .get(index)
            .is_some_and(|block| block.pages.get(page))
    }

    /// These bytes, whole pages, are in place.
    pub(super) fn mark(&self, index: usize, offset: u64, bytes: u64) {
        let Some(block) = self.received.get(index) else {
            return;
        };
        let first = offset / PAGE_BYTES;
        let new = match bytes {
            PAGE_BYTES => u64::from(block.pages.set(first)),
            _ => block
                .pages
                .set_range(first..first.saturating_add(bytes / PAGE_BYTES)),
        };
        if new > 0 {
            block.count.fetch_add(new, Ordering::AcqRel);
        }
    }

    /// These bytes, whole pages, are not there any more.
    pub(super) fn unmark(&self, index: usize, offset: u64, bytes: u64) {
        let Some(block) = self.received.get(index) else {
            return;
        };
        let first = offset / PAGE_BYTES;
        let pages = first..first.saturating_add(bytes / PAGE_BYTES);
        let cleared = block.pages.clear_range(pages);
        block.count.fetch_sub(cleared, Ordering::AcqRel);
    }

    /// Pages of a block that were received.
    pub(super) fn count(&self, index: usize) -> u64 {
        let block = self.received.get(index);
        block.map_or(0, |block| block.count.load(Ordering::Acquire))
    }

    /// Is every host page received whole, or not at all?
    pub(super) fn check_host_pages(&self) -> Result<(), RamDestinationError> {
        for (index, block) in self.travelling() {
            let page_bytes = block.page_bytes();
            let wrong = |offset: u64| RamDestinationError::PartOfHostPage {
                block: block.idstr().clone(),
                offset: offset & !page_bytes.saturating_sub(1),
            };
            if page_bytes == PAGE_BYTES {
                continue;
            }
            if !block.used_bytes().is_multiple_of(page_bytes) {
                return Err(wrong(block.used_bytes()));
            }
            let Some(received) = self.received.get(index) else {
                continue;
            };
            for run in received.pages.runs() {
                for edge in [run.start, run.end] {
                    let offset = edge.saturating_mul(PAGE_BYTES);
                    if !offset.is_multiple_of(page_bytes) {
                        return Err(wrong(offset));
                    }
                }
            }
        }
        Ok(())
    }

    /// Where a page of the stream belongs.
    pub(super) fn locate(&self, index: Option<usize>, page: &RamPage) -> Result<usize, PageFault> {
        let index = index.ok_or(PageFault::UnknownBlock)?;
        let block = self.block(index).ok_or(PageFault::UnknownBlock)?;
        if self.is_ignored(index) {
            return Err(PageFault::Ignored);
        }
        if !page.offset_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(PageFault::Unaligned);
        }
        let used_bytes = block.used_bytes();
        let end = page.offset_bytes.checked_add(PAGE_BYTES);
        if end.is_none_or(|end| end > used_bytes) {
            return Err(PageFault::BehindEnd { used_bytes });
        }
        Ok(index)
    }

    /// Pages of a block that have not been received.
    pub(super) fn missing(&self, index: usize) -> u64 {
        match (self.block(index), self.received.get(index)) {
            (Some(block), Some(received)) if !received.is_ignored => {
                block.pages().saturating_sub(self.count(index))
            }
            _ => 0,
        }
    }

    /// The received pages of a block, as they go over the wire. A block that does not travel is
    /// there.
    pub(super) fn to_wire(&self, name: &Name) -> Option<Vec<u8>> {
        let index = self.index(name)?;
        let pages = self.block(index)?.pages();
        let received = self.received.get(index)?;
        if received.is_ignored {
            let all = PageBitmap::new(pages);
            all.set_range(0..pages);
            return Some(all.to_wire(pages));
        }
        Some(received.pages.to_wire(pages))
    }
}
