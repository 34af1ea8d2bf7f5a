//! Whole host pages, made of the guest pages that come after POSTCOPY_LISTEN.
//!
//! A host page is placed at once, so its guest pages must come one behind the other. Memory: one host
//! page, of the largest kind that was needed.

use super::error::PageFault;
use super::requests::HostPage;
use crate::block::{PAGE_BYTES, RamBlock};

/// A host page of which not everything has come.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    open: Option<Open>,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct Open {
    page: HostPage,
    /// What follows.
    next: u64,
}

impl Assembly {
    /// Forget half a page.
    pub(super) fn clear(&mut self) {
        self.open = None;
    }

    /// May this guest page come now?
    pub(super) fn check(
        &self,
        index: usize,
        block: &RamBlock,
        offset: u64,
    ) -> Result<(), PageFault> {
        let page_bytes = block.page_bytes();
        match &self.open {
            Some(open) if open.page.block == index && open.next == offset => Ok(()),
            Some(open) => Err(PageFault::HostPageBroken {
                expected: open.next,
                is_same_block: open.page.block == index,
            }),
            None if offset.is_multiple_of(page_bytes) => Ok(()),
            None => Err(PageFault::InsideHostPage { page_bytes }),
        }
    }

    /// Add a guest page that was checked; `None` for zeroes. When the host page is whole, it and its
    /// bytes.
    pub(super) fn add(
        &mut self,
        index: usize,
        block: &RamBlock,
        offset: u64,
        bytes: Option<&[u8]>,
    ) -> Option<(HostPage, &[u8])> {
        let open = self.open.get_or_insert(Open {
            page: HostPage {
                block: index,
                offset,
            },
            next: offset,
        });
        let page_bytes = usize::try_from(block.page_bytes()).unwrap_or(usize::MAX);
        if self.bytes.len() < page_bytes {
            self.bytes.resize(page_bytes, 0);
        }
        let start = usize::try_from(offset.saturating_sub(open.page.offset)).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(PAGE_BYTES).unwrap_or(usize::MAX));
        if let Some(room) = self.bytes.get_mut(start..end) {
            match bytes {
                Some(bytes) if bytes.len() == room.len() => room.copy_from_slice(bytes),
                _ => room.fill(0),
            }
        }
        open.next = offset.saturating_add(PAGE_BYTES);
        if end < page_bytes {
            return None;
        }
        let page = self.open.take()?.page;
        Some((page, self.bytes.get(..page_bytes)?))
    }
}
