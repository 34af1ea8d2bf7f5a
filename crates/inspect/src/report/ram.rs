//! Counts of what `ram` sections hold, and a check of every page record.

use std::collections::BTreeMap;
use std::io::Read as _;

use flate2::read::ZlibDecoder;
use vmferry_stream::{Name, PageBits, RamPage, RamRecord, xbzrle};

use crate::limits::SEEN_PAGES_MAX;

/// Letters of an unknown name that are shown.
const NAME_SHOWN_MAX: usize = 32;

/// Guest memory in a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RamSummary {
    /// Sum of the blocks' lengths, as listed.
    pub total_bytes: u64,
    /// The blocks, as listed.
    pub blocks: Vec<RamBlockSummary>,
    /// Words that wait for multifd channels.
    pub multifd_flushes: u64,
}

/// A RAM block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamBlockSummary {
    /// Its name.
    pub name: Name,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Size of its pages, where the sender gave it.
    pub page_bytes: Option<u64>,
    /// Its place in the guest, where the sender gave it.
    pub guest_address: Option<u64>,
    /// Its place in a mapped-ram file.
    pub mapped: Option<MappedSummary>,
    /// Its page records.
    pub pages: PageCounts,
}

/// A block of a mapped-ram file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedSummary {
    /// Where its bitmap starts in the file.
    pub bitmap_offset: u64,
    /// Where its pages start in the file.
    pub pages_offset: u64,
    /// Pages that are in the file; the others are zero.
    pub pages: u64,
}

/// Page records of a block, or of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageCounts {
    /// Pages of zeroes.
    pub zero: u64,
    /// Pages of another byte.
    pub filled: u64,
    /// Whole pages.
    pub data: u64,
    /// Changes of pages.
    pub xbzrle: u64,
    /// Bytes of these changes.
    pub xbzrle_bytes: u64,
    /// Compressed pages.
    pub compressed: u64,
    /// Bytes of these.
    pub compressed_bytes: u64,
    /// Records of pages that were sent before; `None` if the block is too large to keep count.
    pub repeated: Option<u64>,
}

impl PageCounts {
    /// All records.
    #[must_use]
    pub fn records(&self) -> u64 {
        [
            self.zero,
            self.filled,
            self.data,
            self.xbzrle,
            self.compressed,
        ]
        .into_iter()
        .fold(0, u64::saturating_add)
    }
}

/// Counts while the stream goes by.
#[derive(Debug)]
pub(crate) struct RamTally {
    pub(crate) summary: RamSummary,
    pub(crate) page_bits: PageBits,
    /// For each block, which pages came already.
    seen: Vec<Option<Vec<u64>>>,
    /// Pages that can still be kept count of.
    seen_left: u64,
    /// Places of the blocks.
    places: BTreeMap<Name, usize>,
    /// The block of the record before.
    last: usize,
    /// Payload that is checked when it is whole.
    check: Check,
    payload: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    Nothing,
    Xbzrle { bytes: usize },
    Compressed { bytes: usize },
    MappedBitmap,
}

impl Default for RamTally {
    fn default() -> Self {
        Self {
            summary: RamSummary::default(),
            page_bits: PageBits::X86,
            seen: Vec::new(),
            seen_left: SEEN_PAGES_MAX,
            places: BTreeMap::new(),
            last: 0,
            check: Check::Nothing,
            payload: Vec::new(),
        }
    }
}

impl RamTally {
    /// Count a record; says what is wrong with it.
    pub(crate) fn record(&mut self, record: &RamRecord) -> Result<(), String> {
        self.check = Check::Nothing;
        match record {
            RamRecord::BlockList { total_bytes } => self.summary.total_bytes = *total_bytes,
            RamRecord::Block {
                name,
                used_bytes,
                page_bytes,
                guest_address,
                mapped,
            } => {
                self.list(RamBlockSummary {
                    name: name.clone(),
                    used_bytes: *used_bytes,
                    page_bytes: *page_bytes,
                    guest_address: *guest_address,
                    mapped: mapped.map(|mapped| MappedSummary {
                        bitmap_offset: mapped.bitmap_offset,
                        pages_offset: mapped.pages_offset,
                        pages: 0,
                    }),
                    pages: PageCounts::default(),
                });
            }
            RamRecord::MappedBitmap { .. } => self.check = Check::MappedBitmap,
            RamRecord::MultifdFlush => {
                let flushes = &mut self.summary.multifd_flushes;
                *flushes = flushes.saturating_add(1);
            }
            RamRecord::Zero { page, fill } => {
                self.page(page, |pages| {
                    let count = if *fill == 0 {
                        &mut pages.zero
                    } else {
                        &mut pages.filled
                    };
                    *count = count.saturating_add(1);
                })?;
            }
            RamRecord::Page { page, .. } => {
                self.page(page, |pages| pages.data = pages.data.saturating_add(1))?;
            }
            RamRecord::Xbzrle { page, bytes } => {
                self.expect(Check::Xbzrle {
                    bytes: usize::from(*bytes),
                });
                self.page(page, |pages| {
                    pages.xbzrle = pages.xbzrle.saturating_add(1);
                    pages.xbzrle_bytes = pages.xbzrle_bytes.saturating_add(u64::from(*bytes));
                })?;
            }
            RamRecord::Compressed { page, bytes } => {
                self.expect(Check::Compressed {
                    bytes: usize::try_from(*bytes).unwrap_or(usize::MAX),
                });
                self.page(page, |pages| {
                    pages.compressed = pages.compressed.saturating_add(1);
                    let bytes = u64::from(*bytes);
                    pages.compressed_bytes = pages.compressed_bytes.saturating_add(bytes);
                })?;
            }
            RamRecord::MappedGap { .. }
            | RamRecord::MappedPages { .. }
            | RamRecord::EndOfSection => {}
        }
        Ok(())
    }

    /// Payload of the record before; says what is wrong with it once it is whole.
    pub(crate) fn payload(&mut self, bytes: &[u8]) -> Result<(), String> {
        match self.check {
            Check::Nothing => Ok(()),
            Check::MappedBitmap => {
                let set: u64 = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
                let block = self.summary.blocks.last_mut();
                if let Some(mapped) = block.and_then(|block| block.mapped.as_mut()) {
                    mapped.pages = mapped.pages.saturating_add(set);
                }
                Ok(())
            }
            Check::Xbzrle { bytes: whole } | Check::Compressed { bytes: whole } => {
                self.payload.extend_from_slice(bytes);
                if self.payload.len() < whole {
                    return Ok(());
                }
                let page_bytes = usize::try_from(self.page_bits.bytes()).unwrap_or(usize::MAX);
                match self.check {
                    Check::Xbzrle { .. } => {
                        let checked = xbzrle::check(&self.payload, page_bytes);
                        checked.map_err(|error| format!("xbzrle: {error}"))
                    }
                    _ => inflates_to(&self.payload, page_bytes),
                }
            }
        }
    }

    fn expect(&mut self, check: Check) {
        self.payload.clear();
        self.check = check;
    }

    fn list(&mut self, block: RamBlockSummary) {
        let pages = block.used_bytes >> self.page_bits.bits();
        // A mapped block has no page records.
        let seen = if block.mapped.is_some() || pages > self.seen_left {
            None
        } else {
            self.seen_left = self.seen_left.saturating_sub(pages);
            // Filled as far as pages come: a list may promise more memory than there is.
            Some(Vec::new())
        };
        self.seen.push(seen);
        // Of two blocks with one name the first counts.
        let place = self.summary.blocks.len();
        self.places.entry(block.name.clone()).or_insert(place);
        self.summary.blocks.push(block);
    }

    fn page(&mut self, page: &RamPage, count: impl FnOnce(&mut PageCounts)) -> Result<(), String> {
        let place = self.find(&page.block)?;
        let (Some(block), Some(seen)) =
            (self.summary.blocks.get_mut(place), self.seen.get_mut(place))
        else {
            return Ok(());
        };
        count(&mut block.pages);
        if page.offset_bytes >= block.used_bytes {
            return Err(format!(
                "page at {:#x} of RAM block '{}', which has {:#x} bytes",
                page.offset_bytes, block.name, block.used_bytes
            ));
        }
        if let Some(seen) = seen {
            let number = page.offset_bytes >> self.page_bits.bits();
            let was = mark(seen, number);
            let repeated = block.pages.repeated.get_or_insert(0);
            *repeated = repeated.saturating_add(u64::from(was));
        }
        Ok(())
    }

    fn find(&mut self, name: &Name) -> Result<usize, String> {
        let is_it = |block: &RamBlockSummary| block.name == *name;
        if self.summary.blocks.get(self.last).is_some_and(is_it) {
            return Ok(self.last);
        }
        let place = self.places.get(name).copied();
        self.last = place.ok_or_else(|| {
            let name = name_before_memory(name);
            format!("RAM block '{name}' is not in the block list")
        })?;
        Ok(self.last)
    }
}

/// As much of an unknown name as is shown. A damaged length lets guest memory into it, which begins
/// where the name of a block would not go on, or is what makes it so long.
fn name_before_memory(name: &str) -> String {
    let is_of_names = |c: &char| c.is_ascii_alphanumeric() || "/.@:-_".contains(*c);
    let shown: String = name
        .chars()
        .take(NAME_SHOWN_MAX)
        .take_while(is_of_names)
        .collect();
    match name.len().saturating_sub(shown.len()) {
        0 => shown,
        more => format!("{shown}… and {more} bytes"),
    }
}

/// Set a bit; was it set?
fn mark(bits: &mut Vec<u64>, number: u64) -> bool {
    let Ok(word) = usize::try_from(number >> 6) else {
        return false;
    };
    if word >= bits.len() {
        bits.resize(word.saturating_add(1), 0);
    }
    let Some(word) = bits.get_mut(word) else {
        return false;
    };
    let bit = 1 << (number & 63);
    let was = *word & bit != 0;
    *word |= bit;
    was
}

fn inflates_to(compressed: &[u8], page_bytes: usize) -> Result<(), String> {
    let limit = u64::try_from(page_bytes)
        .unwrap_or(u64::MAX)
        .saturating_add(1);
    let mut page = Vec::with_capacity(page_bytes.saturating_add(1));
    match ZlibDecoder::new(compressed)
        .take(limit)
        .read_to_end(&mut page)
    {
        Ok(bytes) if bytes == page_bytes => Ok(()),
        Ok(bytes) => Err(format!(
            "a compressed page of {bytes} bytes or more, {page_bytes} expected"
        )),
        Err(error) => Err(format!("compressed page: {error}")),
    }
}
