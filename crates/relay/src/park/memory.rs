//! What is known of the machine's memory, apart from its bytes, which are in the file.

use std::collections::HashMap;

use vmferry_ram::PageBitmap;
use vmferry_stream::{DiscardRange, Name, PageBits, RamPage};

/// Memory that can come by postcopy: two bits are kept for each page of it, 256 MiB in all.
pub const MEMORY_BYTES_MAX: u64 = 4 << 40;

/// What is wrong with a record about memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryFault {
    /// The list of blocks names one twice.
    #[error("RAM block '{0}' is listed twice")]
    Twice(Name),
    /// Nobody knows this block.
    #[error("RAM block '{0}' is not in the list of blocks")]
    Unknown(Name),
    /// A page or a range reaches beyond its block.
    #[error(
        "{bytes} bytes at {start_bytes:#x} are not inside RAM block '{block}', which has {used_bytes:#x}"
    )]
    Outside {
        /// The block.
        block: Name,
        /// Where it starts.
        start_bytes: u64,
        /// Its length.
        bytes: u64,
        /// The block's length.
        used_bytes: u64,
    },
    /// A discarded range is no multiple of pages.
    #[error("{bytes:#x} bytes at {start_bytes:#x} of RAM block '{block}' are not whole pages")]
    NotPages {
        /// The block.
        block: Name,
        /// Where it starts.
        start_bytes: u64,
        /// Its length.
        bytes: u64,
    },
    /// More memory than a postcopy can bring.
    #[error("the memory is larger than {} GiB, which is the most that can come by postcopy", MEMORY_BYTES_MAX >> 30)]
    TooLarge,
}

/// The blocks, and which of their pages have come.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) page: PageBits,
    blocks: Vec<Block>,
    by_name: HashMap<Name, usize>,
    /// Where the last page was: so is the next, mostly.
    last: Option<usize>,
    /// A postcopy may follow: it matters which pages have come.
    tracked: bool,
    /// Pages that were discarded and have not come since.
    pub(super) missing_pages: u64,
    pub(super) total_bytes: u64,
    /// Some may be shared with the machine's successor, which then needs no pages.
    pub(super) is_shared: bool,
}

#[derive(Debug)]
struct Block {
    name: Name,
    used_bytes: u64,
    bits: Option<Bits>,
}

#[derive(Debug)]
struct Bits {
    /// Has come, and was not discarded since. What a source is told after an interruption.
    received: PageBitmap,
    /// Was discarded and has not come since.
    missing: PageBitmap,
}

/// A page of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    block: usize,
    page: u64,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self {
            page: PageBits::X86,
            blocks: Vec::new(),
            by_name: HashMap::new(),
            last: None,
            tracked: false,
            missing_pages: 0,
            total_bytes: 0,
            is_shared: false,
        }
    }

    pub(super) fn page_bytes(&self) -> u64 {
        u64::from(self.page.bytes())
    }

    pub(super) fn add(&mut self, name: &Name, used_bytes: u64) -> Result<(), MemoryFault> {
        if self.by_name.contains_key(name) {
            return Err(MemoryFault::Twice(name.clone()));
        }
        self.total_bytes = self.total_bytes.saturating_add(used_bytes);
        let bits = match self.tracked {
            true => Some(self.bits(used_bytes)?),
            false => None,
        };
        self.by_name.insert(name.clone(), self.blocks.len());
        self.blocks.push(Block {
            name: name.clone(),
            used_bytes,
            bits,
        });
        Ok(())
    }

    fn bits(&self, used_bytes: u64) -> Result<Bits, MemoryFault> {
        if self.total_bytes > MEMORY_BYTES_MAX {
            return Err(MemoryFault::TooLarge);
        }
        let pages = used_bytes / self.page_bytes();
        Ok(Bits {
            received: PageBitmap::new(pages),
            missing: PageBitmap::new(pages),
        })
    }

    /// A postcopy may follow. No page has come yet.
    pub(super) fn track(&mut self) -> Result<(), MemoryFault> {
        self.tracked = true;
        for at in 0..self.blocks.len() {
            let bits = self.bits(self.blocks[at].used_bytes)?;
            self.blocks[at].bits = Some(bits);
        }
        Ok(())
    }

    /// Where a page is.
    pub(super) fn place(&mut self, page: &RamPage) -> Result<Place, MemoryFault> {
        let block = match self.last {
            Some(last) if self.blocks[last].name == page.block => last,
            _ => self.find(&page.block)?,
        };
        self.last = Some(block);
        let page_bytes = self.page_bytes();
        self.check(block, page.offset_bytes, page_bytes)?;
        Ok(Place {
            block,
            page: page.offset_bytes / page_bytes,
        })
    }

    fn find(&self, name: &Name) -> Result<usize, MemoryFault> {
        let found = self.by_name.get(name).copied();
        found.ok_or_else(|| MemoryFault::Unknown(name.clone()))
    }

    fn check(&self, block: usize, start_bytes: u64, bytes: u64) -> Result<(), MemoryFault> {
        let Block {
            name, used_bytes, ..
        } = &self.blocks[block];
        match start_bytes.checked_add(bytes) {
            Some(end) if end <= *used_bytes => Ok(()),
            _ => Err(MemoryFault::Outside {
                block: name.clone(),
                start_bytes,
                bytes,
                used_bytes: *used_bytes,
            }),
        }
    }

    /// All of this page has come.
    pub(super) fn came(&mut self, place: Place) {
        if let Some(bits) = &self.blocks[place.block].bits {
            bits.received.set(place.page);
            self.missing_pages -= u64::from(bits.missing.clear(place.page));
        }
    }

    /// These pages count no more.
    pub(super) fn discard(&mut self, name: &Name, range: DiscardRange) -> Result<(), MemoryFault> {
        let block = self.find(name)?;
        let (start_bytes, bytes) = (range.start_bytes, range.length_bytes);
        self.check(block, start_bytes, bytes)?;
        let page_bytes = self.page_bytes();
        if start_bytes % page_bytes != 0 || bytes % page_bytes != 0 {
            return Err(MemoryFault::NotPages {
                block: name.clone(),
                start_bytes,
                bytes,
            });
        }
        if let Some(bits) = &self.blocks[block].bits {
            let pages = start_bytes / page_bytes..(start_bytes + bytes) / page_bytes;
            bits.received.clear_range(pages.clone());
            self.missing_pages += bits.missing.set_range(pages);
        }
        Ok(())
    }

    /// Which pages of a block have come, as the return path carries it.
    pub(super) fn received(&self, name: &Name) -> Option<Vec<u8>> {
        let bits = self.blocks[*self.by_name.get(name)?].bits.as_ref()?;
        Some(bits.received.to_wire(bits.received.pages()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn range(start_bytes: u64, length_bytes: u64) -> DiscardRange {
        DiscardRange {
            start_bytes,
            length_bytes,
        }
    }

    #[test]
    fn what_was_discarded_is_missing_until_it_comes() {
        let mut memory = Memory::new();
        memory.add(&name("a"), 0x3000).unwrap();
        memory.track().unwrap();
        memory.add(&name("b"), 0x100_0000).unwrap();
        let come = |memory: &mut Memory, block: &str, offset_bytes| {
            let block = name(block);
            let place = memory.place(&RamPage {
                block,
                offset_bytes,
            })?;
            memory.came(place);
            Ok::<(), MemoryFault>(())
        };
        come(&mut memory, "a", 0x1000).unwrap();
        come(&mut memory, "b", 0).unwrap();
        assert_eq!(memory.missing_pages, 0);
        // Discarding what never came makes it missing, too; nothing counts twice.
        memory.discard(&name("a"), range(0, 0x2000)).unwrap();
        memory.discard(&name("a"), range(0x1000, 0x2000)).unwrap();
        memory.discard(&name("b"), range(0x3000, 0)).unwrap();
        assert_eq!(memory.missing_pages, 3);
        assert_eq!(memory.received(&name("a")).unwrap(), [0; 8]);
        come(&mut memory, "a", 0x2000).unwrap();
        come(&mut memory, "a", 0x2000).unwrap();
        assert_eq!(memory.missing_pages, 2);
        assert_eq!(
            memory.received(&name("a")).unwrap(),
            [4, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(memory.received(&name("b")).unwrap().len(), 512);
        assert_eq!(memory.received(&name("c")), None);
        for (block, offset) in [("c", 0), ("a", 0x3000), ("a", u64::MAX - 0xfff)] {
            assert!(come(&mut memory, block, offset).is_err());
        }
        assert!(memory.discard(&name("a"), range(0x2000, 0x2000)).is_err());
        assert!(memory.discard(&name("a"), range(0x800, 0x1000)).is_err());
        assert!(memory.add(&name("a"), 0).is_err());
    }

    #[test]
    fn length_limit() {
        let mut memory = Memory::new();
        memory.track().unwrap();
        memory.page = PageBits::new(16).unwrap();
        memory.add(&name("a"), MEMORY_BYTES_MAX).unwrap();
        let over = memory.add(&name("b"), 0x1_0000);
        assert_eq!(over, Err(MemoryFault::TooLarge));
        // What comes by precopy needs no bits.
        let mut memory = Memory::new();
        memory.add(&name("a"), !0xfff).unwrap();
    }
}
