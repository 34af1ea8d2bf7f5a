//! The body of a `ram` section.
//!
//! ```text
//! u64 word: bits 63..12 offset in the block (or total), bits 11..0 flags (for pages of 4 KiB)
//!     0x004  block list: str8 name, u64 bytes, [u64 page size], [u64 guest address] until the
//!            total is used up
//!     0x002  zero page: [str8 block], u8 fill          0x100  zlib page: [str8 block], u32 n, n bytes
//!     0x008  page: [str8 block], one page of bytes     0x200  multifd flush
//!     0x040  XBZRLE: [str8 block], u8 1, u16 n, n bytes   0x010  end of the section
//!     0x020  with a page: the block of the page before, whatever section it was in; no name follows
//! ```
//!
//! Two fields of the block list are only there sometimes, and nothing in the list says so. The guest
//! address follows from the configuration (`x-ignore-shared`). The page size is recognised: it is
//! there for unusual pages only, POSTCOPY_ADVISE has named all page sizes in use, and a u64 that is
//! one of them cannot be a block's name, which would start with a zero byte.
//!
//! In a mapped-ram file (capability `mapped-ram`) each entry of the list is followed by the block's
//! pages; see [`crate::MappedBlock`]. The bodies hold nothing else then.

use crate::error::Fault;
use crate::limits::MAX_RAM_BLOCKS;
use crate::mapped_ram::{self, MappedArea, MappedBlock};
use crate::names::{Name, PageBits};
use crate::reader::{Parse, Reader};
use crate::section::SectionKind;

const ZERO: u64 = 0x002;
const BLOCK_LIST: u64 = 0x004;
const PAGE: u64 = 0x008;
const END: u64 = 0x010;
const CONTINUE: u64 = 0x020;
const XBZRLE: u64 = 0x040;
const COMPRESSED: u64 = 0x100;
const MULTIFD_FLUSH: u64 = 0x200;
const XBZRLE_METHOD: u8 = 1;

/// Which page a record is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamPage {
    /// The RAM block, always resolved.
    pub block: Name,
    /// Where in the block the page starts, in bytes; a multiple of the page size. Not checked against
    /// the block's length.
    pub offset_bytes: u64,
}

/// One record of a `ram` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RamRecord {
    /// The list of blocks begins; [`RamRecord::Block`]s follow until their lengths add up.
    BlockList {
        /// Sum of the blocks' lengths.
        total_bytes: u64,
    },
    /// A block of the list.
    Block {
        /// Its name.
        name: Name,
        /// Bytes in use, a multiple of the page size.
        used_bytes: u64,
        /// Size of its pages, when a postcopy sender has given it and it is not the usual one.
        page_bytes: Option<u64>,
        /// Its place in the guest, with the capability `x-ignore-shared`.
        guest_address: Option<u64>,
        /// Where its pages are, with the capability `mapped-ram`. They follow: a
        /// [`RamRecord::MappedBitmap`], a [`RamRecord::MappedGap`] unless there is none, and
        /// [`RamRecord::MappedPages`] until all bytes in use have gone by.
        mapped: Option<MappedBlock>,
    },
    /// Which pages of the block before are in the file; payload follows, one bit for each page, lowest
    /// first (of a little-endian sender), padded to 64. A page without its bit is zero, whatever
    /// stands in its place.
    MappedBitmap {
        /// The block.
        block: Name,
        /// Bytes of payload, at most [`crate::limits::MAX_MAPPED_BITMAP_BYTES`]; may be 0.
        bytes: u32,
    },
    /// Bytes without a meaning follow.
    MappedGap {
        /// How many, at most [`crate::limits::MAX_MAPPED_GAP_BYTES`].
        bytes: u32,
    },
    /// Pages, each in its place; payload follows.
    MappedPages {
        /// The block.
        block: Name,
        /// Where in the block they start.
        offset_bytes: u64,
        /// Bytes of payload: whole pages, at most [`crate::limits::MAX_MAPPED_PIECE_BYTES`].
        bytes: u32,
    },
    /// A page of equal bytes.
    Zero {
        /// The page.
        page: RamPage,
        /// The byte: 0 from every QEMU since 7.2.
        fill: u8,
    },
    /// A page; one page of payload follows.
    Page {
        /// The page.
        page: RamPage,
        /// Bytes of payload: the page size.
        bytes: u32,
    },
    /// What changed in a page; payload follows, see [`crate::xbzrle`].
    Xbzrle {
        /// The page.
        page: RamPage,
        /// Bytes of payload, at most a page; may be 0.
        bytes: u16,
    },
    /// A page as a whole zlib stream; payload follows. QEMU up to 9.0.
    Compressed {
        /// The page.
        page: RamPage,
        /// Bytes of payload, at most zlib's worst case for a page.
        bytes: u32,
    },
    /// Wait for every multifd channel.
    MultifdFlush,
    /// The body ends here.
    EndOfSection,
}

impl RamRecord {
    /// Bytes of payload that follow.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        match self {
            Self::Page { bytes, .. }
            | Self::Compressed { bytes, .. }
            | Self::MappedBitmap { bytes, .. }
            | Self::MappedGap { bytes }
            | Self::MappedPages { bytes, .. } => *bytes,
            Self::Xbzrle { bytes, .. } => u32::from(*bytes),
            Self::BlockList { .. }
            | Self::Block { .. }
            | Self::Zero { .. }
            | Self::MultifdFlush
            | Self::EndOfSection => 0,
        }
    }
}

/// The most that zlib makes of `page` bytes.
pub(crate) fn compressed_bytes_max(page: u32) -> u32 {
    page.saturating_add(page >> 12)
        .saturating_add(page >> 14)
        .saturating_add(13)
}

/// What the records of earlier sections mean for the next.
#[derive(Clone, Debug)]
pub(crate) struct RamState {
    page: PageBits,
    /// The configuration named `x-ignore-shared`.
    pub(crate) guest_addresses: bool,
    /// The configuration named `mapped-ram`.
    pub(crate) mapped: bool,
    /// Offset in its file at which the stream starts.
    file_start: u64,
    /// What is to come of the block listed last.
    area: Option<MappedArea>,
    /// All page sizes of the sender, ORed (POSTCOPY_ADVISE).
    pub(crate) advised_page_bytes: u64,
    last_block: Option<Name>,
    /// What the block list's total leaves for blocks to come.
    list_bytes_left: u64,
    /// Blocks listed so far.
    blocks: u32,
}

impl RamState {
    pub(crate) fn new(page: PageBits, file_start: u64) -> Self {
        Self {
            page,
            guest_addresses: false,
            mapped: false,
            file_start,
            area: None,
            advised_page_bytes: 0,
            last_block: None,
            list_bytes_left: 0,
            blocks: 0,
        }
    }

    pub(crate) fn set_page_bits(&mut self, page: PageBits) {
        self.page = page;
    }

    pub(crate) fn forget_block(&mut self) {
        self.last_block = None;
    }

    /// The stream goes on elsewhere, between two items.
    pub(crate) fn resume(&mut self) {
        self.forget_block();
        self.list_bytes_left = 0;
        self.area = None;
    }

    /// Read the next record of a section of this kind. Nothing changes unless it is whole and right.
    pub(crate) fn read(&mut self, reader: &mut Reader<'_>, kind: SectionKind) -> Parse<RamRecord> {
        if let Some(area) = &mut self.area {
            if let Some(record) = area.next() {
                return Ok(record);
            }
            self.area = None;
        }
        if self.list_bytes_left > 0 {
            return self.read_block(reader);
        }
        let word = reader.u64("ram record")?;
        let page_mask = u64::from(self.page.bytes()).saturating_sub(1);
        let (value, flags) = (word & !page_mask, word & page_mask);
        match flags & !CONTINUE {
            END => Ok(RamRecord::EndOfSection),
            ZERO | PAGE | XBZRLE | COMPRESSED | MULTIFD_FLUSH if self.mapped => {
                Err(reader.wrong(Fault::MappedRecord { flags }))
            }
            BLOCK_LIST if self.mapped && kind != SectionKind::Start => {
                Err(reader.wrong(Fault::MappedRecord { flags }))
            }
            BLOCK_LIST => {
                self.list_bytes_left = value;
                Ok(RamRecord::BlockList { total_bytes: value })
            }
            ZERO | PAGE | XBZRLE | COMPRESSED => self.read_page(value, flags, reader),
            MULTIFD_FLUSH => Ok(RamRecord::MultifdFlush),
            _ => Err(reader.wrong(Fault::UnknownFlags {
                section: "ram",
                flags,
            })),
        }
    }

    fn read_block(&mut self, reader: &mut Reader<'_>) -> Parse<RamRecord> {
        let name = reader.name("ram block name")?;
        let blocks = self.blocks.saturating_add(1);
        reader.at_most(u64::from(blocks), u64::from(MAX_RAM_BLOCKS))?;
        let used_bytes = reader.u64("ram block length")?;
        reader.multiple(used_bytes, u64::from(self.page.bytes()))?;
        if self.mapped {
            reader.at_most(used_bytes, mapped_ram::used_bytes_max(self.page))?;
        }
        let Some(left) = self.list_bytes_left.checked_sub(used_bytes) else {
            return Err(reader.wrong(Fault::BlockListOverrun {
                name,
                bytes: used_bytes,
                left: self.list_bytes_left,
            }));
        };
        let page_bytes = self.read_page_size(reader)?;
        let guest_address = self
            .guest_addresses
            .then(|| reader.u64("ram block guest address"))
            .transpose()?;
        let mapped = self
            .mapped
            .then(|| MappedArea::read(reader, &name, used_bytes, self.page, self.file_start))
            .transpose()?;
        let (mapped, area) = mapped.unzip();
        self.area = area;
        self.list_bytes_left = left;
        self.blocks = blocks;
        Ok(RamRecord::Block {
            name,
            used_bytes,
            page_bytes,
            guest_address,
            mapped,
        })
    }

    fn read_page_size(&self, reader: &mut Reader<'_>) -> Parse<Option<u64>> {
        let usual_and_below = u64::from(self.page.bytes())
            .saturating_mul(2)
            .saturating_sub(1);
        let unusual = self.advised_page_bytes & !usual_and_below;
        if unusual == 0 {
            return Ok(None);
        }
        let next = reader.peek_u64("ram block page size")?;
        if next.is_power_of_two() && next & unusual != 0 {
            return reader.u64("ram block page size").map(Some);
        }
        Ok(None)
    }

    fn read_page(
        &mut self,
        offset_bytes: u64,
        flags: u64,
        reader: &mut Reader<'_>,
    ) -> Parse<RamRecord> {
        let block = if flags & CONTINUE == 0 {
            reader.name("ram block name")?
        } else {
            let last = self.last_block.clone();
            last.ok_or_else(|| reader.wrong(Fault::NoPreviousName))?
        };
        let page = RamPage {
            block,
            offset_bytes,
        };
        let named = (flags & CONTINUE == 0).then(|| page.block.clone());
        let page_bytes = self.page.bytes();
        let record = match flags & !CONTINUE {
            ZERO => RamRecord::Zero {
                page,
                fill: reader.u8("fill byte")?,
            },
            PAGE => RamRecord::Page {
                page,
                bytes: page_bytes,
            },
            XBZRLE => {
                let method = reader.u8("xbzrle method")?;
                reader.exactly(u64::from(method), u64::from(XBZRLE_METHOD))?;
                let bytes = reader.u16("xbzrle length")?;
                reader.at_most(u64::from(bytes), u64::from(page_bytes))?;
                RamRecord::Xbzrle { page, bytes }
            }
            _ => {
                let bytes = reader.u32("compressed length")?;
                let max = compressed_bytes_max(page_bytes);
                reader.at_most(u64::from(bytes), u64::from(max))?;
                RamRecord::Compressed { page, bytes }
            }
        };
        if named.is_some() {
            self.last_block = named;
        }
        Ok(record)
    }

    /// Append a record, as short as what went before allows.
    pub(crate) fn encode(&mut self, record: &RamRecord, out: &mut Vec<u8>) {
        match record {
            RamRecord::BlockList { total_bytes } => {
                out.extend((total_bytes | BLOCK_LIST).to_be_bytes());
            }
            RamRecord::Block {
                name,
                used_bytes,
                page_bytes,
                guest_address,
                mapped,
            } => {
                name.encode(out);
                out.extend(used_bytes.to_be_bytes());
                for field in [page_bytes, guest_address].into_iter().flatten() {
                    out.extend(field.to_be_bytes());
                }
                if let Some(mapped) = mapped {
                    mapped.encode(out);
                }
            }
            RamRecord::MappedBitmap { .. }
            | RamRecord::MappedGap { .. }
            | RamRecord::MappedPages { .. } => {}
            RamRecord::Zero { page, fill } => {
                self.encode_page(page, ZERO, out);
                out.push(*fill);
            }
            RamRecord::Page { page, .. } => self.encode_page(page, PAGE, out),
            RamRecord::Xbzrle { page, bytes } => {
                self.encode_page(page, XBZRLE, out);
                out.push(XBZRLE_METHOD);
                out.extend(bytes.to_be_bytes());
            }
            RamRecord::Compressed { page, bytes } => {
                self.encode_page(page, COMPRESSED, out);
                out.extend(bytes.to_be_bytes());
            }
            RamRecord::MultifdFlush => out.extend(MULTIFD_FLUSH.to_be_bytes()),
            RamRecord::EndOfSection => out.extend(END.to_be_bytes()),
        }
    }

    fn encode_page(&mut self, page: &RamPage, kind: u64, out: &mut Vec<u8>) {
        if self.last_block.as_ref() == Some(&page.block) {
            out.extend((page.offset_bytes | kind | CONTINUE).to_be_bytes());
        } else {
            out.extend((page.offset_bytes | kind).to_be_bytes());
            page.block.encode(out);
            self.last_block = Some(page.block.clone());
        }
    }
}
