//! Memory of a guest that stands still, read from where it is stored.

use vmferry_savevm::HandlerError;

use crate::block::{BlockIndex, BlockLayout, PAGE_BYTES};

/// Pages that are read at once, at most.
pub const STORED_PAGES_MAX: u64 = 64;

/// Guest memory that nobody writes any more: that of a parked machine.
pub trait StoredRam: Send + Sync {
    /// All blocks, in the order in which they are sent; always the same ones.
    fn blocks(&self) -> &[BlockLayout];

    /// Read the pages from `first_page` on, as many as `into` has room for: whole ones, at most
    /// [`STORED_PAGES_MAX`], all of them in use.
    ///
    /// # Errors
    /// They cannot be read, or are not what was stored; says where.
    fn read(
        &self,
        block: BlockIndex,
        first_page: u64,
        into: &mut [u8],
    ) -> Result<StoredPages, HandlerError>;

    /// Pages that were wanted first when this memory was used before, in that order: a postcopy sends
    /// them first. May be empty.
    fn working_set(&self) -> Vec<StoredRange>;
}

/// What was read: a bit for each page, the first one's lowest. Of pages with a bit `into` keeps what it
/// had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredPages {
    /// Pages of zeroes.
    pub zero: u64,
    /// Pages that were not stored: a machine that is loaded keeps its own there, or has zeroes.
    pub absent: u64,
}

/// Pages of one block, in guest pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredRange {
    /// The block.
    pub block: BlockIndex,
    /// The first page.
    pub first_page: u64,
    /// How many.
    pub pages: u64,
}

impl StoredRange {
    /// How many bytes they are.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages.saturating_mul(PAGE_BYTES)
    }
}
