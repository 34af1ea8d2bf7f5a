//! The list of blocks that a stream begins with, compared with what is here.
//!
//! Stricter than a QEMU in one point: a block that is here must be listed. A QEMU does not notice,
//! and the guest goes on with whatever that memory held; after a POSTCOPY_ADVISE, which empties every
//! block, with zeroes.

use vmferry_stream::Name;

use super::error::RamDestinationError;
use super::memory::Memory;
use crate::block::{BlockIndex, PAGE_BYTES, Sharing};

/// How much of the list has come.
#[derive(Debug, Default)]
pub(super) enum BlockList {
    #[default]
    Awaited,
    Open {
        bytes_left: u64,
        /// For each block here: was it listed?
        listed: Vec<bool>,
    },
    Complete,
}

/// An entry of the list.
#[derive(Debug)]
pub(super) struct Listed<'a> {
    pub(super) name: &'a Name,
    pub(super) used_bytes: u64,
    pub(super) page_bytes: Option<u64>,
    pub(super) guest_address: Option<u64>,
}

/// What the entries must agree with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) ignore_shared: bool,
    /// POSTCOPY_ADVISE came: unusual page sizes are listed.
    pub(super) is_advised: bool,
}

impl BlockList {
    pub(super) fn is_complete(&self) -> bool {
        matches!(self, Self::Complete)
    }

    /// The list begins.
    pub(super) fn open(
        &mut self,
        total_bytes: u64,
        memory: &Memory,
    ) -> Result<(), RamDestinationError> {
        match self {
            Self::Awaited => {
                *self = Self::Open {
                    bytes_left: total_bytes,
                    listed: vec![false; memory.ram().blocks().len()],
                };
                self.close_if_over(memory)
            }
            Self::Open { .. } | Self::Complete => Err(RamDestinationError::SecondList),
        }
    }

    /// An entry of it.
    pub(super) fn entry(
        &mut self,
        entry: &Listed<'_>,
        memory: &Memory,
        terms: Terms,
    ) -> Result<(), RamDestinationError> {
        let block = || entry.name.clone();
        let Self::Open { bytes_left, listed } = self else {
            return Err(RamDestinationError::OutsideList { block: block() });
        };
        let left = bytes_left.checked_sub(entry.used_bytes);
        *bytes_left = left.ok_or_else(|| RamDestinationError::OutsideList { block: block() })?;
        let index = memory.index(entry.name);
        let index = index.ok_or_else(|| RamDestinationError::UnknownBlock { block: block() })?;
        match listed.get_mut(index) {
            Some(listed) if !*listed => *listed = true,
            _ => return Err(RamDestinationError::ListedTwice { block: block() }),
        }
        check(index, entry, memory, terms)?;
        self.close_if_over(memory)
    }

    fn close_if_over(&mut self, memory: &Memory) -> Result<(), RamDestinationError> {
        let Self::Open {
            bytes_left: 0,
            listed,
        } = self
        else {
            return Ok(());
        };
        let blocks = memory.ram().blocks().iter();
        if let Some((block, _)) = blocks.zip(listed).find(|(_, listed)| !**listed) {
            return Err(RamDestinationError::NotListed {
                block: block.idstr().clone(),
            });
        }
        *self = Self::Complete;
        memory.set_listed();
        Ok(())
    }
}

fn check(
    index: usize,
    entry: &Listed<'_>,
    memory: &Memory,
    terms: Terms,
) -> Result<(), RamDestinationError> {
    let Some(here) = memory.block(index) else {
        return Ok(());
    };
    let name = || entry.name.clone();
    // Without it on both sides, shared memory would be neither sent nor there.
    if entry.guest_address.is_some() != terms.ignore_shared {
        return Err(RamDestinationError::IgnoreShared {
            at_source: entry.guest_address.is_some(),
        });
    }
    let address = here.guest_address().unwrap_or(0);
    if let Some(received) = entry.guest_address.filter(|_| memory.is_ignored(index))
        && received != address
    {
        return Err(RamDestinationError::GuestAddress {
            block: name(),
            received,
            here: address,
        });
    }
    // Without advice no size is listed, and a precopy can do without.
    let page_bytes = match entry.page_bytes {
        None if !terms.is_advised => here.page_bytes(),
        page_bytes => page_bytes.unwrap_or(PAGE_BYTES),
    };
    if page_bytes != here.page_bytes() {
        return Err(RamDestinationError::PageSize {
            block: name(),
            received: page_bytes,
            here: here.page_bytes(),
        });
    }
    let used_bytes = here.used_bytes();
    if used_bytes != entry.used_bytes {
        let resized = memory.ram().resize(BlockIndex(index), entry.used_bytes);
        resized.map_err(|reason| RamDestinationError::Size {
            block: name(),
            received: entry.used_bytes,
            here: used_bytes,
            reason,
        })?;
    }
    if terms.is_advised && !memory.is_ignored(index) {
        // What is private was emptied before. Shared memory may be that of the source, which says only
        // by now that it does not share it.
        let first = match here.sharing() {
            Sharing::Private => used_bytes.next_multiple_of(page_bytes),
            Sharing::Shared => 0,
        };
        let end = here.used_bytes().next_multiple_of(page_bytes);
        let length = end.saturating_sub(first);
        if length > 0 {
            here.forget(first, length)?;
        }
    }
    Ok(())
}
