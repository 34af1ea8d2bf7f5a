//! Puts an index together while a stream goes by.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use vmferry_inspect::Container;
use vmferry_ram::PAGE_BYTES;
use vmferry_stream::{Command, Name, RamPage, RamRecord, Record, Section, xbzrle};

use super::chunk::{Payload, Place, Where, seeded};
use super::contents;
use super::deltas::{Base, Deltas};
use super::file::{NewFile, random};
use super::layout::{Header, MAGIC, SAMPLES, sample, slot_offset};
use super::table::{CACHED_CHUNKS_MAX, Presence, Table};
use crate::error::ImageError;
use crate::head::Contents;
use crate::limits::KEPT_PAGES_MAX;
use crate::outline::Outline;
use crate::page::{PAGE, inflate, is_zero};
use crate::storage::{IndexPlace, Storage};

/// Puts an index together while a stream is written, or walked through.
///
/// Everything is told once, in the order of the image: records with the place where they are in the
/// image, and payload behind them. Memory is bounded (some 25 MiB, and 1 MiB for each 400 GiB of
/// guest memory); the page table grows in a file that has no name before [`IndexBuilder::publish`].
///
/// What goes to a destination in other places than it came, or not at all, may be told all the same:
/// discarded ranges of a postcopy must be, and block lists may say more than the image does.
#[derive(Debug)]
pub struct IndexBuilder {
    image: String,
    /// Where it is to be published.
    path: Option<PathBuf>,
    new: NewFile,
    nonce: u64,
    outline: Outline,
    /// Since the list of blocks is complete.
    table: Option<Table>,
    /// The block of the record before, with its number.
    last_block: Option<(Name, usize)>,
    incoming: Option<Incoming>,
    /// Payload that came in pieces.
    scratch: Vec<u8>,
    /// The block whose ranges are discarded.
    discard: Option<Name>,
    /// All that is missing came, or comes, in the second half of a postcopy.
    is_postcopy: bool,
    deltas: Option<Deltas>,
    kept_pages: u64,
    kept_pages_max: u64,
}

/// A page whose payload is on its way.
#[derive(Debug)]
struct Incoming {
    block: usize,
    page: u64,
    encoding: Encoding,
    is_named: bool,
    /// Place of the payload's first byte.
    offset: u64,
    bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Plain,
    Xbzrle,
    Zlib,
}

impl IndexBuilder {
    /// Begin an index for what is, or will be, in `storage`. A file is made in the folder where the
    /// index is to be.
    ///
    /// # Errors
    /// That cannot be written to.
    pub fn new(place: &IndexPlace, storage: &dyn Storage) -> Result<Self, ImageError> {
        let path = place.path(storage);
        let made = match &path {
            Some(path) => NewFile::beside(path, *MAGIC),
            None => NewFile::unnamed(),
        };
        let new = made.map_err(|source| ImageError::Index {
            index: path.clone().unwrap_or_default(),
            verb: "create",
            source,
        })?;
        Ok(Self::in_file(new, path, storage))
    }

    /// An index that nobody else sees.
    pub(crate) fn unnamed(storage: &dyn Storage) -> Result<Self, ImageError> {
        let new = NewFile::unnamed().map_err(|source| ImageError::Index {
            index: std::env::temp_dir(),
            verb: "create",
            source,
        })?;
        Ok(Self::in_file(new, None, storage))
    }

    fn in_file(new: NewFile, path: Option<PathBuf>, storage: &dyn Storage) -> Self {
        Self {
            image: storage.name(),
            path,
            new,
            nonce: random(),
            outline: Outline::new(storage.name()),
            table: None,
            last_block: None,
            incoming: None,
            scratch: Vec::new(),
            discard: None,
            is_postcopy: false,
            deltas: None,
            kept_pages: 0,
            kept_pages_max: KEPT_PAGES_MAX,
        }
    }

    /// What stands before the stream.
    pub fn container(&mut self, container: &Container) {
        self.outline.container(container);
    }

    /// A record that begins at byte `offset` of the image, with `bytes` bytes of header: what the
    /// decoder says was used. Of a record that is not in the image (a discarded range, a command)
    /// both are anything.
    ///
    /// # Errors
    /// A machine cannot be restored from what it says, or the index cannot be written.
    pub fn record(&mut self, offset: u64, bytes: u64, record: &Record) -> Result<(), ImageError> {
        self.end_of_payload(offset)?;
        self.outline.record(offset, bytes, record)?;
        match record {
            Record::Ram(record) => self.ram(offset, bytes, record),
            Record::Command(Command::PostcopyListen) => {
                self.is_postcopy = true;
                Ok(())
            }
            Record::Command(Command::PostcopyRamDiscard { block, .. }) => {
                self.discard = Some(block.clone());
                Ok(())
            }
            Record::DiscardRange(range) => {
                let end = range.start_bytes.checked_add(range.length_bytes);
                self.forget(offset, range.start_bytes, end)
            }
            _ => Ok(()),
        }
    }

    /// Payload of the record before, in pieces of any length, with its place in the image.
    ///
    /// # Errors
    /// It is no page, or the index cannot be written.
    pub fn payload(&mut self, offset: u64, bytes: &[u8]) -> Result<(), ImageError> {
        let Some(incoming) = &mut self.incoming else {
            return Ok(());
        };
        if self.scratch.is_empty() {
            incoming.offset = offset;
            if bytes.len() == incoming.bytes {
                return self.page(bytes);
            }
        }
        let expected = incoming.bytes;
        self.scratch.extend_from_slice(bytes);
        if self.scratch.len() >= expected {
            let whole = std::mem::take(&mut self.scratch);
            self.page(whole.get(..expected).unwrap_or(&whole))?;
            self.scratch = whole;
            self.scratch.clear();
        }
        Ok(())
    }

    /// The section of a device, whose body, `bytes`, begins at byte `body_offset`.
    ///
    /// # Errors
    /// It is longer than what is restored, or one too many.
    pub fn device(
        &mut self,
        section: &Section,
        body_offset: u64,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        self.outline.device(section, body_offset, bytes)
    }

    /// The description, whose text begins at byte `offset`.
    ///
    /// # Errors
    /// None now; more may be asked of it.
    pub fn description(&mut self, offset: u64, text: &[u8]) -> Result<(), ImageError> {
        self.outline.description(offset, text);
        Ok(())
    }

    /// The image is whole, and `storage` holds it: write the rest of the index, make it durable and
    /// put it in its place.
    ///
    /// # Errors
    /// The stream did not end, the image cannot be read, or the index cannot be written.
    pub fn publish(self, storage: &dyn Storage) -> Result<(), ImageError> {
        let mode = storage.mode();
        let (new, path) = self.complete(storage)?;
        let Some(path) = path else {
            return Ok(());
        };
        let published = new.publish(&path, mode);
        published.map_err(|source| ImageError::Index {
            index: path,
            verb: "publish",
            source,
        })
    }

    fn ram(&mut self, offset: u64, bytes: u64, record: &RamRecord) -> Result<(), ImageError> {
        match record {
            RamRecord::Zero { page, fill } => {
                let place = match fill {
                    0 => Where::Zero,
                    fill => Where::Fill(*fill),
                };
                let (block, number) = self.locate(offset, page)?;
                self.set(block, number, place, 0)
            }
            RamRecord::Page { page, bytes: n } => {
                self.expect(offset, bytes, page, Encoding::Plain, *n)
            }
            RamRecord::Xbzrle { page, bytes: n } => {
                let n = u32::from(*n);
                self.expect(offset, bytes, page, Encoding::Xbzrle, n)
            }
            RamRecord::Compressed { page, bytes: n } => {
                self.expect(offset, bytes, page, Encoding::Zlib, *n)
            }
            RamRecord::EndOfSection => {
                self.table();
                Ok(())
            }
            RamRecord::BlockList { .. } | RamRecord::Block { .. } | RamRecord::MultifdFlush => {
                Ok(())
            }
            RamRecord::MappedBitmap { .. }
            | RamRecord::MappedGap { .. }
            | RamRecord::MappedPages { .. } => {
                let what = "pages of a mapped-ram file, which needs no index".into();
                Err(self.outline.refused(offset, what))
            }
        }
    }

    /// The page table, which is there when all blocks are known.
    fn table(&mut self) -> &mut Table {
        let blocks = &self.outline.blocks;
        let pages = blocks.iter().map(crate::head::ImageBlock::pages);
        let nonce = self.nonce;
        self.table
            .get_or_insert_with(|| Table::new(nonce, pages, CACHED_CHUNKS_MAX))
    }

    /// Number of a page's block, and of the page in it.
    fn locate(&mut self, offset: u64, page: &RamPage) -> Result<(usize, u64), ImageError> {
        let block = match &self.last_block {
            Some((name, block)) if *name == page.block => *block,
            _ => self.block(offset, &page.block)?,
        };
        let number = page.offset_bytes / PAGE_BYTES;
        let pages = self.table().block(block).map_or(0, |block| block.pages);
        if number >= pages || !page.offset_bytes.is_multiple_of(PAGE_BYTES) {
            let problem = format!(
                "a page at byte {:#x} of RAM block '{}', which has {:#x} bytes",
                page.offset_bytes,
                page.block,
                pages.saturating_mul(PAGE_BYTES)
            );
            return Err(self.outline.broken(offset, problem));
        }
        Ok((block, number))
    }

    fn block(&mut self, offset: u64, name: &Name) -> Result<usize, ImageError> {
        let Some(block) = self.outline.by_name.get(name).copied() else {
            let problem = format!("RAM block '{name}' is not in the list of blocks");
            return Err(self.outline.broken(offset, problem));
        };
        self.last_block = Some((name.clone(), block));
        Ok(block)
    }

    fn set(&mut self, block: usize, page: u64, place: Where, sum: u32) -> Result<(), ImageError> {
        let Some(place) = Place::new(place) else {
            let problem = "a page so far into the image is not indexed".into();
            return Err(self.outline.broken(u64::MAX, problem));
        };
        self.table();
        let Some(table) = &mut self.table else {
            return Ok(());
        };
        let set = table.set(&self.new.file, block, page, (place, sum));
        set.map_err(|source| self.failed("write", source))
    }

    /// Payload of so many bytes follows.
    fn expect(
        &mut self,
        offset: u64,
        header_bytes: u64,
        page: &RamPage,
        encoding: Encoding,
        bytes: u32,
    ) -> Result<(), ImageError> {
        let (block, number) = self.locate(offset, page)?;
        let own = match encoding {
            Encoding::Plain => 8,
            Encoding::Xbzrle => 8 + 3,
            Encoding::Zlib => 8 + 4,
        };
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.incoming = Some(Incoming {
            block,
            page: number,
            encoding,
            is_named: header_bytes > own,
            offset: offset.saturating_add(header_bytes),
            bytes,
        });
        if bytes == 0 {
            return self.page(&[]);
        }
        Ok(())
    }

    /// The next record came before all payload of the one before.
    fn end_of_payload(&mut self, offset: u64) -> Result<(), ImageError> {
        if self.incoming.take().is_none() {
            return Ok(());
        }
        self.scratch.clear();
        let problem = "a record inside the page before it".into();
        Err(self.outline.broken(offset, problem))
    }

    /// All payload of a page is there.
    fn page(&mut self, payload: &[u8]) -> Result<(), ImageError> {
        let Some(incoming) = self.incoming.take() else {
            return Ok(());
        };
        let Incoming { block, page, .. } = incoming;
        let place = Payload {
            offset: incoming.offset,
            is_named: incoming.is_named,
        };
        match incoming.encoding {
            Encoding::Plain if is_zero(payload) => self.set(block, page, Where::Zero, 0),
            Encoding::Plain => {
                let sum = crc32fast::hash(payload);
                self.set(block, page, Where::Plain(place), sum)
            }
            Encoding::Zlib => {
                let mut content = [0; PAGE];
                if let Err(fault) = inflate(payload, &mut content) {
                    return Err(self.bad_page(&incoming, &fault));
                }
                let sum = crc32fast::hash(&content);
                self.set(block, page, Where::Zlib(place), sum)
            }
            Encoding::Xbzrle => self.change(&incoming, payload),
        }
    }

    /// A page changes that is in the image, or in the index.
    fn change(&mut self, incoming: &Incoming, payload: &[u8]) -> Result<(), ImageError> {
        if let Err(error) = xbzrle::check(payload, PAGE) {
            let fault = format!("its XBZRLE encoding is wrong: {error}");
            return Err(self.bad_page(incoming, &fault));
        }
        let Incoming { block, page, .. } = *incoming;
        self.table();
        let Some(table) = &mut self.table else {
            return Ok(());
        };
        let found = table.get(&self.new.file, block, page);
        let found = found.map_err(|source| self.failed("read", source))?;
        let (place, _) = found.unwrap_or_default();
        let (slot, base) = match place.get() {
            None | Some(Where::Absent) => {
                return Err(self.bad_page(incoming, "it changes, and never came"));
            }
            Some(Where::Kept(slot)) => (slot, Base::Slot),
            Some(Where::Zero) => (self.kept_pages, Base::Fill(0)),
            Some(Where::Fill(fill)) => (self.kept_pages, Base::Fill(fill)),
            Some(Where::Plain(payload)) => (self.kept_pages, Base::Plain(payload.offset)),
            Some(Where::Zlib(payload)) => (self.kept_pages, Base::Zlib(payload.offset)),
        };
        if payload.is_empty() {
            return Ok(());
        }
        if base != Base::Slot {
            if self.kept_pages >= self.kept_pages_max {
                return Err(ImageError::TooMuch {
                    image: self.image.clone(),
                    offset: incoming.offset,
                    what: "pages with XBZRLE records".into(),
                    max: self.kept_pages_max,
                });
            }
            self.kept_pages = self.kept_pages.saturating_add(1);
            self.set(block, page, Where::Kept(slot), 0)?;
        }
        let mut deltas = match self.deltas.take() {
            Some(deltas) => deltas,
            None => {
                Deltas::new(self.path.as_deref()).map_err(|source| self.failed("create", source))?
            }
        };
        let pushed = deltas.push(slot, base, incoming.offset, payload.len());
        self.deltas = Some(deltas);
        pushed.map_err(|source| self.failed("write", source))
    }

    /// Pages that the source discarded: what came of them before does not count.
    fn forget(&mut self, offset: u64, start: u64, end: Option<u64>) -> Result<(), ImageError> {
        let Some(name) = self.discard.clone() else {
            return Ok(());
        };
        let block = self.block(offset, &name)?;
        self.table();
        let Some(table) = &mut self.table else {
            return Ok(());
        };
        let pages = table.block(block).map_or(0, |block| block.pages);
        let length = pages.saturating_mul(PAGE_BYTES);
        let Some(end) = end.filter(|end| *end <= length) else {
            let problem = format!(
                "a range from byte {start:#x} of RAM block '{name}' is discarded, which reaches past \
                 its end: it has {length:#x} bytes"
            );
            return Err(self.outline.broken(offset, problem));
        };
        let range: Range<u64> = start / PAGE_BYTES..end.div_ceil(PAGE_BYTES);
        let forgotten = table.forget(&self.new.file, block, range);
        forgotten.map_err(|source| self.failed("write", source))
    }

    /// Write everything but the name. Answers with the path where it is to be.
    pub(crate) fn complete(
        mut self,
        storage: &dyn Storage,
    ) -> Result<(NewFile, Option<PathBuf>), ImageError> {
        self.end_of_payload(storage.length())?;
        self.table();
        let identity = storage.identity();
        let mut table = self.table.take().unwrap_or_else(|| {
            // It was made above.
            Table::new(self.nonce, std::iter::empty(), 1)
        });
        let flushed = table.flush(&self.new.file);
        flushed.map_err(|source| self.failed("write", source))?;
        if let Some(deltas) = self.deltas.take() {
            let slots = super::deltas::Slots {
                file: &self.new.file,
                nonce: self.nonce,
                chunks: table.chunks(),
            };
            deltas.apply(storage, &slots).map_err(|error| match error {
                super::deltas::Failed::Index(source) => self.failed("write", source),
                super::deltas::Failed::Image(error) => error,
            })?;
        }
        let samples = self
            .samples(&table)
            .map_err(|source| self.failed("read", source))?;
        let samples_crc = sample(storage, &samples).map_err(|source| ImageError::Read {
            image: self.image.clone(),
            offset: storage.start(),
            source,
        })?;
        let outline = std::mem::replace(&mut self.outline, Outline::new(String::new()));
        let mut contents = outline.finish(storage)?;
        count(&mut contents, &table, &self.image, self.is_postcopy)?;
        if storage.identity() != identity {
            return Err(ImageError::Changing {
                image: self.image.clone(),
            });
        }
        let mut bytes = Vec::new();
        contents::encode(&contents, &mut bytes);
        bytes.extend(table.presence().iter().map(|presence| presence.to_byte()));
        let header = Header {
            nonce: self.nonce,
            identity,
            chunks: table.chunks(),
            kept_pages: self.kept_pages,
            contents_offset: slot_offset(table.chunks(), self.kept_pages),
            contents_bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            contents_crc: seeded(self.nonce, &bytes),
            samples_crc,
            samples,
        };
        let write = |file: &File| {
            file.write_all_at(&bytes, header.contents_offset)?;
            file.write_all_at(&header.encode(), 0)
        };
        write(&self.new.file).map_err(|source| self.failed("write", source))?;
        Ok((self.new, self.path))
    }

    /// Places of some records, from all over the image.
    fn samples(&self, table: &Table) -> io::Result<[u64; SAMPLES]> {
        let mut samples = [0; SAMPLES];
        let presence = table.presence().iter().enumerate();
        let written = presence.filter(|(_, presence)| **presence == Presence::Written);
        let written: Vec<_> = written.map(|(number, _)| number).collect();
        let step = written.len().div_ceil(SAMPLES).max(1);
        for (sample, number) in samples.iter_mut().zip(written.iter().step_by(step)) {
            let number = u64::try_from(*number).unwrap_or(u64::MAX);
            let chunk = super::read_chunk(&self.new.file, self.nonce, number)?;
            let places = chunk.places.iter().filter_map(|place| place.get());
            let mut payloads = places.filter_map(|place| match place {
                Where::Plain(payload) | Where::Zlib(payload) => Some(payload.offset),
                _ => None,
            });
            *sample = payloads.next().unwrap_or(0).saturating_sub(8);
        }
        Ok(samples)
    }

    fn bad_page(&self, incoming: &Incoming, fault: &str) -> ImageError {
        let name = self.outline.blocks.get(incoming.block);
        ImageError::DamagedPage {
            image: self.image.clone(),
            block: name.map(|block| block.name.clone()).unwrap_or_default(),
            page_offset: incoming.page.saturating_mul(PAGE_BYTES),
            offset: incoming.offset,
            problem: fault.to_owned(),
        }
    }

    fn failed(&self, verb: &'static str, source: io::Error) -> ImageError {
        ImageError::Index {
            index: self.path.clone().unwrap_or_else(std::env::temp_dir),
            verb,
            source,
        }
    }
}

/// Count what is missing; refuse an image whose pages went elsewhere.
fn count(
    contents: &mut Contents,
    table: &Table,
    image: &str,
    is_postcopy: bool,
) -> Result<(), ImageError> {
    let (mut all_absent, mut all_stored) = (0_u64, 0_u64);
    for (index, block) in contents.head.blocks.iter_mut().enumerate() {
        let (absent, stored) = table.counts(index);
        block.absent_pages = absent;
        all_absent = all_absent.saturating_add(absent);
        all_stored = all_stored.saturating_add(stored);
    }
    if all_absent == 0 || contents.head.ignores_shared() {
        return Ok(());
    }
    let what = if all_stored == 0 {
        "it lists RAM blocks, but there is no page with content in it: is this the main channel of a \
         multifd migration?"
            .to_owned()
    } else if is_postcopy {
        format!(
            "{all_absent} pages are missing, all of which a postcopy sends: did they go over another \
             channel (postcopy-preempt)?"
        )
    } else {
        return Ok(());
    };
    Err(ImageError::Refused {
        image: image.to_owned(),
        offset: 0,
        what,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::FileStorage;

    #[test]
    fn pages_that_are_kept_have_a_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, b"").unwrap();
        let storage = FileStorage::open(&path, 0).unwrap();
        let mut index = IndexBuilder::new(&IndexPlace::Beside, &storage).unwrap();
        index.kept_pages_max = 2;
        let name = Name::new("ram").unwrap();
        let block = RamRecord::Block {
            name: name.clone(),
            used_bytes: 3 * PAGE_BYTES,
            page_bytes: None,
            guest_address: None,
            mapped: None,
        };
        index.record(0, 0, &Record::Ram(block)).unwrap();
        let page = |number: u64| RamPage {
            block: name.clone(),
            offset_bytes: number * PAGE_BYTES,
        };
        for number in 0..3 {
            let page = page(number);
            let record = RamRecord::Zero { page, fill: 0 };
            index.record(0, 9, &Record::Ram(record)).unwrap();
        }
        let mut change = |number| {
            let page = page(number);
            let record = RamRecord::Xbzrle { page, bytes: 3 };
            index.record(0, 11, &Record::Ram(record)).unwrap();
            index.payload(11, &[0, 1, 7])
        };
        // The same page again is no other page.
        for number in [0, 1, 0, 1] {
            change(number).unwrap();
        }
        let error = change(2).unwrap_err();
        assert!(
            matches!(error, ImageError::TooMuch { max: 2, .. }),
            "{error}"
        );
    }
}
