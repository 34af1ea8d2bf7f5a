//! The guest's memory as the stream leaves it.
//!
//! Pages come in any order and any number of times; the last one counts. Rules: the wire format
//! notes on RAM, mapped-ram files and postcopy.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;

use vmferry_stream::{Command, DiscardRange, Name, PageBits, RamPage, RamRecord, Record, xbzrle};

use super::canvas::{Canvas, is_zero};
use super::error::ExtractError;
use super::pages::{Page, Pages};
use crate::walk::{Event, VisitError, Visitor};

/// Blocks start at multiples of this in a file of several: whatever the page size is, a page does
/// not share a file system's block with another one.
const ALIGNMENT_BYTES: u64 = 1 << 16;
/// The longest file.
const MAX_FILE_BYTES: u64 = i64::MAX as u64;
/// Bytes of a mapped-ram block's bitmap, which is kept until its pages have gone by: 1 TiB of the
/// usual pages.
const MAX_BITMAP_BYTES: u32 = 32 << 20;
/// Names in a list of choices.
const MAX_CHOICES: usize = 64;

/// Which RAM blocks are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// The only one there is.
    Only,
    /// This one.
    Named(String),
    /// All, one after another from this byte of the file on.
    All {
        /// A multiple of 64 KiB.
        start_bytes: u64,
    },
}

/// What became of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockImage {
    /// Its name.
    pub name: Name,
    /// Its length.
    pub length_bytes: u64,
    /// Where it starts in the file; `None` if it was not wanted, and then nothing else is known.
    pub file_offset: Option<u64>,
    /// Bytes of its pages that hold data.
    pub data_bytes: u64,
    /// Bytes of its pages that came as zeroes.
    pub zero_bytes: u64,
    /// Bytes of its pages that the stream did not carry; they are zero in the file.
    pub absent_bytes: u64,
}

impl BlockImage {
    /// The stream lists it, but carries no page of it (`x-ignore-shared`).
    #[must_use]
    pub fn is_absent(&self) -> bool {
        self.length_bytes > 0 && self.absent_bytes == self.length_bytes
    }
}

/// Paints guest memory into a file, in bounded memory.
#[derive(Debug)]
pub struct MemoryImage {
    canvas: Canvas,
    wanted: Blocks,
    page_bits: PageBits,
    blocks: Vec<Block>,
    by_name: BTreeMap<Name, usize>,
    listed: bool,
    /// Where the next block starts, with [`Blocks::All`].
    next_bytes: u64,
    regions: usize,
    incoming: Incoming,
    /// Which pages of the block before are in a mapped-ram file.
    bitmap: Vec<u8>,
    /// Pieces of a page's payload.
    scratch: Vec<u8>,
    /// A page before its change.
    page: Vec<u8>,
    /// Block of the discarded ranges that follow.
    discard: Option<Name>,
}

#[derive(Debug)]
struct Block {
    name: Name,
    length: u64,
    base: Option<u64>,
    pages: Pages,
}

/// Payload that is on its way.
#[derive(Clone, Copy, Debug)]
enum Incoming {
    /// Nobody wants it.
    Nothing,
    /// A page.
    Page {
        place: Place,
        kind: Encoding,
        bytes: usize,
    },
    /// The bitmap of a mapped-ram file.
    Bitmap,
    /// Pages of a mapped-ram file; the next one's place.
    Mapped(Place),
}

/// Where a wanted page is.
#[derive(Clone, Copy, Debug)]
struct Place {
    block: usize,
    /// In the block.
    offset: u64,
    /// In the file.
    at: u64,
}

impl Place {
    fn plus(self, bytes: u64) -> Self {
        Self {
            offset: self.offset.saturating_add(bytes),
            at: self.at.saturating_add(bytes),
            ..self
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Encoding {
    Plain,
    Xbzrle,
    Zlib,
}

impl MemoryImage {
    /// Paint into `file`, which is empty.
    #[must_use]
    pub fn new(file: File, wanted: Blocks) -> Self {
        let next_bytes = match wanted {
            Blocks::All { start_bytes } => start_bytes,
            Blocks::Only | Blocks::Named(_) => 0,
        };
        Self {
            canvas: Canvas::new(file),
            wanted,
            page_bits: PageBits::X86,
            blocks: Vec::new(),
            by_name: BTreeMap::new(),
            listed: false,
            next_bytes,
            regions: 0,
            incoming: Incoming::Nothing,
            bitmap: Vec::new(),
            scratch: Vec::new(),
            page: Vec::new(),
            discard: None,
        }
    }

    /// The stream is over, or as much of it as there is: the file with its final length, and what
    /// is in it. A page that was cut short is not.
    ///
    /// # Errors
    /// The wanted block is not there, or the file cannot be written.
    pub fn finish(self) -> Result<(File, Vec<BlockImage>), ExtractError> {
        self.check_choice()?;
        let page_bytes = u64::from(self.page_bits.bytes());
        let images = self.blocks.iter().map(|block| block.image(page_bytes));
        let images: Vec<_> = images.collect();
        let end = images.iter().filter_map(|image| {
            let start = image.file_offset?;
            Some(start.saturating_add(image.length_bytes))
        });
        let file = self.canvas.finish(end.max().unwrap_or(0))?;
        Ok((file, images))
    }

    /// Is what is wanted there, now that all blocks are known?
    fn check_choice(&self) -> Result<(), ExtractError> {
        let what = "RAM block";
        match &self.wanted {
            _ if self.blocks.is_empty() => Err(ExtractError::Absent("guest memory")),
            Blocks::Only if self.blocks.len() > 1 => Err(ExtractError::Ambiguous {
                what,
                choices: self.choices(),
            }),
            Blocks::Named(name) if !self.by_name.contains_key(name.as_str()) => {
                Err(ExtractError::NotFound {
                    what,
                    name: name.clone(),
                    choices: self.choices(),
                })
            }
            Blocks::Only | Blocks::Named(_) | Blocks::All { .. } => Ok(()),
        }
    }

    /// The largest first.
    fn choices(&self) -> Vec<String> {
        let mut blocks: Vec<_> = self.blocks.iter().collect();
        blocks.sort_by_key(|block| Reverse(block.length));
        blocks
            .into_iter()
            .take(MAX_CHOICES)
            .map(|block| format!("{} ({} bytes)", block.name, block.length))
            .collect()
    }

    fn ram(&mut self, record: &RamRecord) -> Result<(), ExtractError> {
        match record {
            RamRecord::Block {
                name, used_bytes, ..
            } => self.list(name, *used_bytes),
            RamRecord::BlockList { .. } => Ok(()),
            RamRecord::MappedBitmap { block, bytes } => self.expect_bitmap(block, *bytes),
            RamRecord::MappedGap { .. } => {
                self.incoming = Incoming::Nothing;
                Ok(())
            }
            RamRecord::MappedPages {
                block,
                offset_bytes,
                ..
            } => self.expect_mapped(block, *offset_bytes),
            RamRecord::Zero { page, fill } => self.fill(page, *fill),
            RamRecord::Page { page, bytes } => self.expect(page, Encoding::Plain, *bytes),
            RamRecord::Xbzrle { page, bytes } => {
                self.expect(page, Encoding::Xbzrle, u32::from(*bytes))
            }
            RamRecord::Compressed { page, bytes } => self.expect(page, Encoding::Zlib, *bytes),
            RamRecord::MultifdFlush => Err(ExtractError::Multifd),
            RamRecord::EndOfSection => {
                if !self.listed {
                    self.listed = true;
                    self.check_choice()?;
                }
                Ok(())
            }
        }
    }

    fn list(&mut self, name: &Name, length: u64) -> Result<(), ExtractError> {
        if self.by_name.contains_key(name) {
            return Err(ExtractError::ListedTwice(name.clone()));
        }
        let base = match &self.wanted {
            Blocks::Only => self.blocks.is_empty().then_some(0),
            Blocks::Named(wanted) => (name == wanted.as_str()).then_some(0),
            Blocks::All { .. } => Some(self.next_bytes),
        };
        if let Some(base) = base {
            let end = base
                .checked_add(length)
                .filter(|end| *end <= MAX_FILE_BYTES);
            let next = end.and_then(|end| end.checked_next_multiple_of(ALIGNMENT_BYTES));
            self.next_bytes = next.ok_or_else(|| ExtractError::TooLong {
                what: format!("the image of RAM block '{name}'"),
            })?;
        }
        self.by_name.insert(name.clone(), self.blocks.len());
        self.blocks.push(Block {
            name: name.clone(),
            length,
            base,
            pages: Pages::default(),
        });
        Ok(())
    }

    /// Where a page goes; `None` if nobody wants it.
    fn place(&self, page: &RamPage) -> Result<Option<Place>, ExtractError> {
        let offset = page.offset_bytes;
        let index = self.by_name.get(&page.block).copied();
        let block = index.and_then(|index| Some((index, self.blocks.get(index)?)));
        let Some((index, block)) = block else {
            return Err(ExtractError::UnlistedBlock {
                block: page.block.clone(),
                offset,
            });
        };
        let end = offset.saturating_add(u64::from(self.page_bits.bytes()));
        if end > block.length {
            return Err(block.outside(offset));
        }
        Ok(block.base.map(|base| Place {
            block: index,
            offset,
            at: base.saturating_add(offset),
        }))
    }

    fn fill(&mut self, page: &RamPage, fill: u8) -> Result<(), ExtractError> {
        let Some(place) = self.place(page)? else {
            return Ok(());
        };
        if fill == 0 {
            return self.blank(place);
        }
        let bytes = usize::try_from(self.page_bits.bytes()).unwrap_or(0);
        self.paint(place, &vec![fill; bytes])
    }

    /// The page is zero now.
    fn blank(&mut self, place: Place) -> Result<(), ExtractError> {
        if self.state(place) == Page::Data {
            self.canvas
                .zero(place.at, u64::from(self.page_bits.bytes()))?;
        }
        self.mark(place, false);
        Ok(())
    }

    /// Payload of `bytes` follows.
    fn expect(&mut self, page: &RamPage, kind: Encoding, bytes: u32) -> Result<(), ExtractError> {
        self.incoming = Incoming::Nothing;
        self.scratch.clear();
        let Some(place) = self.place(page)? else {
            return Ok(());
        };
        if matches!(kind, Encoding::Xbzrle) && self.state(place) == Page::Absent {
            return Err(ExtractError::NothingToChange {
                block: page.block.clone(),
                offset: place.offset,
            });
        }
        if bytes == 0 {
            return self.apply(place, kind, &[]);
        }
        self.incoming = Incoming::Page {
            place,
            kind,
            bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
        };
        Ok(())
    }

    /// The bitmap of a mapped-ram file's block follows.
    fn expect_bitmap(&mut self, block: &Name, bytes: u32) -> Result<(), ExtractError> {
        self.incoming = Incoming::Nothing;
        self.bitmap.clear();
        if self.first_place(block)?.is_none() {
            return Ok(());
        }
        if bytes > MAX_BITMAP_BYTES {
            return Err(ExtractError::TooMuch {
                what: format!("the bitmap of RAM block '{block}'"),
                max: MAX_BITMAP_BYTES.into(),
            });
        }
        self.incoming = Incoming::Bitmap;
        Ok(())
    }

    /// Pages of a mapped-ram file's block follow.
    fn expect_mapped(&mut self, block: &Name, offset: u64) -> Result<(), ExtractError> {
        self.scratch.clear();
        self.incoming = match self.first_place(block)? {
            None => Incoming::Nothing,
            Some(first) => Incoming::Mapped(first.plus(offset)),
        };
        Ok(())
    }

    /// Where a block's first byte goes.
    fn first_place(&self, block: &Name) -> Result<Option<Place>, ExtractError> {
        self.place(&RamPage {
            block: block.clone(),
            offset_bytes: 0,
        })
    }

    /// A piece of payload.
    fn take(&mut self, bytes: &[u8]) -> Result<(), ExtractError> {
        match self.incoming {
            Incoming::Nothing => Ok(()),
            Incoming::Page {
                place,
                kind,
                bytes: whole,
            } => self.take_page(place, kind, whole, bytes),
            Incoming::Bitmap => {
                self.bitmap.extend_from_slice(bytes);
                Ok(())
            }
            Incoming::Mapped(place) => self.take_mapped(place, bytes),
        }
    }

    fn take_page(
        &mut self,
        place: Place,
        kind: Encoding,
        whole: usize,
        bytes: &[u8],
    ) -> Result<(), ExtractError> {
        if self.scratch.is_empty() && bytes.len() == whole {
            return self.apply(place, kind, bytes);
        }
        self.scratch.extend_from_slice(bytes);
        if self.scratch.len() >= whole {
            let page = std::mem::take(&mut self.scratch);
            self.apply(place, kind, &page)?;
            self.scratch = page;
            self.scratch.clear();
        }
        Ok(())
    }

    /// Pages of which the bitmap says whether they count; pieces may end anywhere.
    fn take_mapped(&mut self, mut place: Place, bytes: &[u8]) -> Result<(), ExtractError> {
        let page_bytes = usize::try_from(self.page_bits.bytes()).unwrap_or(0);
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.scratch.is_empty() && rest.len() >= page_bytes {
                let (page, after) = rest.split_at_checked(page_bytes).unwrap_or_default();
                self.mapped_page(place, page)?;
                rest = after;
            } else {
                let missing = page_bytes.saturating_sub(self.scratch.len());
                let part = rest.len().min(missing);
                let (part, after) = rest.split_at_checked(part).unwrap_or_default();
                self.scratch.extend_from_slice(part);
                rest = after;
                if self.scratch.len() < page_bytes {
                    break;
                }
                let page = std::mem::take(&mut self.scratch);
                self.mapped_page(place, &page)?;
                self.scratch = page;
                self.scratch.clear();
            }
            place = place.plus(u64::from(self.page_bits.bytes()));
        }
        self.incoming = Incoming::Mapped(place);
        Ok(())
    }

    fn mapped_page(&mut self, place: Place, page: &[u8]) -> Result<(), ExtractError> {
        let number = place.offset >> self.page_bits.bits();
        let byte = usize::try_from(number >> 3).unwrap_or(usize::MAX);
        let bits = self.bitmap.get(byte).copied().unwrap_or(0);
        if bits & 1 << (number & 7) != 0 {
            return self.paint(place, page);
        }
        self.blank(place)
    }

    fn apply(&mut self, place: Place, kind: Encoding, payload: &[u8]) -> Result<(), ExtractError> {
        let page_bytes = usize::try_from(self.page_bits.bytes()).unwrap_or(0);
        let mut page = std::mem::take(&mut self.page);
        page.resize(page_bytes, 0);
        let changed = match kind {
            Encoding::Plain => Ok(payload),
            Encoding::Xbzrle => {
                self.canvas.read(place.at, &mut page)?;
                match xbzrle::apply(&mut page, payload) {
                    Ok(()) => Ok(page.as_slice()),
                    Err(error) => Err(format!("its XBZRLE encoding is wrong: {error}")),
                }
            }
            Encoding::Zlib => inflate(payload, &mut page).map(|()| page.as_slice()),
        };
        match changed {
            Ok(bytes) => self.paint(place, bytes)?,
            Err(fault) => {
                let block = self.blocks.get(place.block);
                return Err(ExtractError::BadPage {
                    block: block.map(|block| block.name.clone()).unwrap_or_default(),
                    offset: place.offset,
                    fault,
                });
            }
        }
        self.page = page;
        Ok(())
    }

    fn paint(&mut self, place: Place, bytes: &[u8]) -> Result<(), ExtractError> {
        if is_zero(bytes) {
            return self.blank(place);
        }
        self.canvas.write(place.at, bytes)?;
        self.mark(place, true);
        Ok(())
    }

    fn state(&self, place: Place) -> Page {
        let block = self.blocks.get(place.block);
        block.map_or(Page::Absent, |block| {
            block.pages.get(place.offset >> self.page_bits.bits())
        })
    }

    fn mark(&mut self, place: Place, data: bool) {
        let page = place.offset >> self.page_bits.bits();
        if let Some(block) = self.blocks.get_mut(place.block) {
            block.pages.set(page, data, &mut self.regions);
        }
    }

    /// Pages that the source sent and then changed: the guest must not see them.
    fn forget(&mut self, range: DiscardRange) -> Result<(), ExtractError> {
        let Some(name) = &self.discard else {
            return Ok(());
        };
        let index = self.by_name.get(name).copied();
        let Some(block) = index.and_then(|index| self.blocks.get_mut(index)) else {
            return Err(ExtractError::UnlistedBlock {
                block: name.clone(),
                offset: range.start_bytes,
            });
        };
        let end = range.start_bytes.checked_add(range.length_bytes);
        let Some(end) = end.filter(|end| *end <= block.length) else {
            return Err(block.outside(range.start_bytes.saturating_add(range.length_bytes)));
        };
        let Some(base) = block.base else {
            return Ok(());
        };
        let bits = self.page_bits.bits();
        let page_bytes = u64::from(self.page_bits.bytes());
        let canvas = &mut self.canvas;
        let (start, end) = (range.start_bytes >> bits, end.div_ceil(page_bytes));
        block.pages.discard(start, end, |page| {
            canvas.zero(base.saturating_add(page << bits), page_bytes)
        })
    }
}

impl Visitor for MemoryImage {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        if let Event::Record(..) = &event {
            // Payload that follows is this record's, and may be that of a section nobody knows.
            self.incoming = Incoming::Nothing;
        }
        match event {
            Event::Record(_, Record::Configuration(configuration)) => {
                if let Some(bits) = configuration.page_bits {
                    self.page_bits = bits;
                }
            }
            Event::Record(_, Record::Ram(record)) => self.ram(record)?,
            Event::Record(_, Record::Command(Command::PostcopyRamDiscard { block, .. })) => {
                self.discard = Some(block.clone());
            }
            Event::Record(_, Record::DiscardRange(range)) => self.forget(*range)?,
            Event::Payload(_, bytes) => self.take(bytes)?,
            _ => {}
        }
        Ok(())
    }
}

impl Block {
    fn outside(&self, offset: u64) -> ExtractError {
        ExtractError::OutsideBlock {
            block: self.name.clone(),
            offset,
            length: self.length,
        }
    }

    fn image(&self, page_bytes: u64) -> BlockImage {
        let (zero, data) = self.pages.counts();
        let bytes = |pages: u64| pages.saturating_mul(page_bytes).min(self.length);
        let (zero_bytes, mut data_bytes) = (bytes(zero), bytes(data));
        let rest = self
            .length
            .saturating_sub(zero_bytes.saturating_add(data_bytes));
        let mut absent_bytes = rest;
        if self.pages.forgetful {
            data_bytes = data_bytes.saturating_add(rest);
            absent_bytes = 0;
        }
        BlockImage {
            name: self.name.clone(),
            length_bytes: self.length,
            file_offset: self.base,
            data_bytes,
            zero_bytes,
            absent_bytes,
        }
    }
}

/// One page as a whole zlib stream.
fn inflate(payload: &[u8], page: &mut [u8]) -> Result<(), String> {
    let mut zlib = flate2::read::ZlibDecoder::new(payload);
    let fault = |error: std::io::Error| format!("its zlib stream is wrong: {error}");
    zlib.read_exact(page).map_err(fault)?;
    match zlib.read(&mut [0]).map_err(fault)? {
        0 => Ok(()),
        _ => Err(format!(
            "its zlib stream holds more than a page of {} bytes",
            page.len()
        )),
    }
}

#[cfg(test)]
mod tests;
