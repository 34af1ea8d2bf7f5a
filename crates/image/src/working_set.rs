//! Which pages a machine wanted first when it was restored before.
//!
//! A file beside the index, `INDEX.order`, replaced as a whole:
//!
//! ```text
//! 0   8 bytes magic   8   u32 version  12  u32 number of ranges
//! 16  u64 image's length  24  u64 its time  32  u64 its tag
//! 40  u32 block, u32 pages, u64 first page of each range
//!     u32 CRC-32 of what is before
//! ```
//!
//! All numbers are little endian.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use vmferry_ram::{BlockIndex, BlockLayout, PAGE_BYTES, StoredRange};

use crate::index::file::NewFile;
use crate::limits::WORKING_SET_RANGES_MAX;
use crate::storage::Identity;

const MAGIC: &[u8; 8] = b"vmforder";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const RANGE_BYTES: usize = 16;
const BYTES_MAX: u64 = (HEADER_BYTES + WORKING_SET_RANGES_MAX * RANGE_BYTES + 4) as u64;

/// Where the working set of the image with this index is.
pub(crate) fn path(index: &Path) -> PathBuf {
    let mut path = index.as_os_str().to_owned();
    path.push(".order");
    path.into()
}

/// Keep a working set; what does not fit, or is empty, is left off.
pub(crate) fn write(
    path: &Path,
    identity: Identity,
    mode: u32,
    order: &[StoredRange],
) -> io::Result<()> {
    let mut ranges = Vec::new();
    let wanted = order.iter().filter(|range| range.pages > 0);
    let mut count = 0_u32;
    for range in wanted.take(WORKING_SET_RANGES_MAX) {
        let (Ok(block), Ok(pages)) = (u32::try_from(range.block.0), u32::try_from(range.pages))
        else {
            continue;
        };
        ranges.extend(block.to_le_bytes());
        ranges.extend(pages.to_le_bytes());
        ranges.extend(range.first_page.to_le_bytes());
        count = count.saturating_add(1);
    }
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    for number in [identity.bytes, identity.modified_ns, identity.tag] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(ranges);
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    let new = NewFile::beside(path, *MAGIC)?;
    new.file.write_all_at(&bytes, 0)?;
    new.publish(path, mode)
}

/// The working set that was kept for this very image; `None` if there is none.
pub(crate) fn read(
    path: &Path,
    identity: Identity,
    blocks: &[BlockLayout],
) -> Option<Vec<StoredRange>> {
    let metadata = std::fs::metadata(path).ok()?;
    if !metadata.is_file() || metadata.len() > BYTES_MAX {
        return None;
    }
    let bytes = std::fs::read(path).ok()?;
    let (body, crc) = bytes.split_last_chunk::<4>()?;
    if crc32fast::hash(body).to_le_bytes() != *crc || !body.starts_with(MAGIC) {
        return None;
    }
    let u32_at = |bytes: &[u8], at: usize| {
        let bytes = bytes.get(at..)?.first_chunk()?;
        Some(u32::from_le_bytes(*bytes))
    };
    let u64_at = |bytes: &[u8], at: usize| {
        let bytes = bytes.get(at..)?.first_chunk()?;
        Some(u64::from_le_bytes(*bytes))
    };
    let kept = Identity {
        bytes: u64_at(body, 16)?,
        modified_ns: u64_at(body, 24)?,
        tag: u64_at(body, 32)?,
    };
    if u32_at(body, 8)? != VERSION || kept != identity {
        return None;
    }
    let (ranges, rest) = body.get(HEADER_BYTES..)?.as_chunks::<RANGE_BYTES>();
    let count = usize::try_from(u32_at(body, 12)?).ok()?;
    if ranges.len() != count || !rest.is_empty() {
        return None;
    }
    let ranges = ranges.iter().map(|range| {
        let block = usize::try_from(u32_at(range, 0)?).ok()?;
        let pages = u64::from(u32_at(range, 4)?);
        let first_page = u64_at(range, 8)?;
        let end = first_page.checked_add(pages)?.checked_mul(PAGE_BYTES)?;
        let is_there = end <= blocks.get(block)?.used_bytes;
        is_there.then_some(StoredRange {
            block: BlockIndex(block),
            first_page,
            pages,
        })
    });
    ranges.collect()
}
