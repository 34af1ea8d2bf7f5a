//! Pages that have fixed places: the block list of a mapped-ram file.
//!
//! ```text
//! entry of the block list │ u32 version 1, u64 page size, u64 bitmap offset, u64 pages offset
//!                         │ bitmap │ gap │ pages │ next entry
//! ```
//!
//! Offsets are of the file, wherever in it the stream starts. QEMU jumps to them; but bitmap and pages
//! stand in the order of their offsets, without anything between, so that one pass meets everything.
//! The gap aligns the pages. A bitmap has one bit for each page and is a multiple of 8 bytes.

use crate::error::{Fault, MappedBound};
use crate::limits::{MAX_MAPPED_BITMAP_BYTES, MAX_MAPPED_GAP_BYTES, MAX_MAPPED_PIECE_BYTES};
use crate::names::{Name, PageBits};
use crate::ram::RamRecord;
use crate::reader::{Parse, Reader};

const VERSION: u32 = 1;

/// The longest block, by [`MAX_MAPPED_BITMAP_BYTES`].
pub(crate) fn used_bytes_max(page: PageBits) -> u64 {
    MAX_MAPPED_BITMAP_BYTES
        .saturating_mul(8)
        .saturating_mul(u64::from(page.bytes()))
}

/// Where the pages of a RAM block are in a mapped-ram file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedBlock {
    /// Guest page size.
    pub page_bytes: u64,
    /// Offset of the bitmap in the file; follows the entry of the block.
    pub bitmap_offset: u64,
    /// Offset of the first page in the file; a multiple of the page size.
    pub pages_offset: u64,
}

impl MappedBlock {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.extend(VERSION.to_be_bytes());
        for field in [self.page_bytes, self.bitmap_offset, self.pages_offset] {
            out.extend(field.to_be_bytes());
        }
    }
}

/// What follows the entry of a block and was not told yet.
#[derive(Clone, Debug)]
pub(crate) struct MappedArea {
    block: Name,
    bitmap_bytes: Option<u32>,
    gap_bytes: u32,
    /// Pages that were told.
    told_bytes: u64,
    used_bytes: u64,
}

impl MappedArea {
    /// Read the header that follows the rest of a block's entry. The block is not longer than
    /// [`used_bytes_max`].
    pub(crate) fn read(
        reader: &mut Reader<'_>,
        block: &Name,
        used_bytes: u64,
        page: PageBits,
        file_start: u64,
    ) -> Parse<(MappedBlock, Self)> {
        let page_bytes = u64::from(page.bytes());
        let bitmap_bytes = (used_bytes >> page.bits()).div_ceil(64).saturating_mul(8);
        let version = reader.u32("mapped-ram version")?;
        reader.exactly(u64::from(version), u64::from(VERSION))?;
        let header_page_bytes = reader.u64("mapped-ram page size")?;
        reader.exactly(header_page_bytes, page_bytes)?;

        let wrong = |reader: &Reader<'_>, what, found, bound| {
            Err(reader.wrong(Fault::MappedOffset {
                what,
                name: block.clone(),
                found,
                bound,
            }))
        };
        let bitmap_offset = reader.u64("mapped-ram bitmap offset")?;
        let header_end = file_start
            .saturating_add(reader.offset())
            .saturating_add(u64::try_from(size_of::<u64>()).unwrap_or_default());
        if bitmap_offset != header_end {
            return wrong(reader, "bitmap", bitmap_offset, MappedBound::At(header_end));
        }
        let pages_offset = reader.u64("mapped-ram pages offset")?;
        let bitmap_end = header_end.saturating_add(bitmap_bytes);
        let Some(gap_bytes) = pages_offset.checked_sub(bitmap_end) else {
            return wrong(reader, "pages", pages_offset, MappedBound::From(bitmap_end));
        };
        if gap_bytes > MAX_MAPPED_GAP_BYTES {
            let bound = MappedBound::UpTo(bitmap_end.saturating_add(MAX_MAPPED_GAP_BYTES));
            return wrong(reader, "pages", pages_offset, bound);
        }
        reader.multiple(pages_offset, page_bytes)?;
        let header = MappedBlock {
            page_bytes,
            bitmap_offset,
            pages_offset,
        };
        let area = Self {
            block: block.clone(),
            bitmap_bytes: u32::try_from(bitmap_bytes).ok(),
            gap_bytes: u32::try_from(gap_bytes).unwrap_or(u32::MAX),
            told_bytes: 0,
            used_bytes,
        };
        Ok((header, area))
    }

    /// The next record, which consists of payload alone; `None` after the last.
    pub(crate) fn next(&mut self) -> Option<RamRecord> {
        let block = self.block.clone();
        if let Some(bytes) = self.bitmap_bytes.take() {
            return Some(RamRecord::MappedBitmap { block, bytes });
        }
        if self.gap_bytes > 0 {
            let bytes = std::mem::take(&mut self.gap_bytes);
            return Some(RamRecord::MappedGap { bytes });
        }
        let left = self.used_bytes.saturating_sub(self.told_bytes);
        if left == 0 {
            return None;
        }
        let offset_bytes = self.told_bytes;
        let bytes = u32::try_from(left)
            .unwrap_or(u32::MAX)
            .min(MAX_MAPPED_PIECE_BYTES);
        self.told_bytes = offset_bytes.saturating_add(u64::from(bytes));
        Some(RamRecord::MappedPages {
            block,
            offset_bytes,
            bytes,
        })
    }
}
