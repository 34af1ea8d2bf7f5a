//! An open image.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vmferry_ram::{
    BlockIndex, BlockLayout, PAGE_BYTES, STORED_PAGES_MAX, StoredPages, StoredRam, StoredRange,
};
use vmferry_savevm::HandlerError;

use crate::Progress;
use crate::error::ImageError;
use crate::head::{Contents, Extent, Head, ImageSection};
use crate::index::chunk::{Payload, Where};
use crate::index::{Index, IndexBuilder, Unusable};
use crate::limits::SECTION_BYTES_MAX;
use crate::mapped::{Mapped, is_mapped};
use crate::page::{PAGE, fetch_zlib};
use crate::storage::{IndexPlace, Storage};
use crate::working_set;

/// Pages that are read at once.
const PAGES_MAX: usize = 64;
/// Records that lie closer together than this are read at once.
const GAP_BYTES_MAX: u64 = 2048;
/// Buffers that are kept for the next read.
const BUFFERS_MAX: usize = 16;
/// Flags of a record word: a page follows.
const PAGE_FLAG: u64 = 0x008;
/// The page is a zlib stream.
const COMPRESSED_FLAG: u64 = 0x100;
/// The block is that of the record before.
const CONTINUE_FLAG: u64 = 0x020;

/// A parked machine: what is in its image, and its memory.
///
/// Any number of threads may read at the same time.
pub struct Image {
    storage: Arc<dyn Storage>,
    place: IndexPlace,
    contents: Contents,
    layouts: Vec<BlockLayout>,
    pages: Pages,
    /// For reads of several records.
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("name", &self.storage.name())
            .field("contents", &self.contents)
            .finish_non_exhaustive()
    }
}

/// How pages are found.
#[derive(Debug)]
enum Pages {
    /// Replaced when it turns out to be damaged.
    Indexed(RwLock<Arc<Index>>),
    Mapped(Mapped),
}

impl Image {
    /// Open an image with its index. If there is none that fits, the image is walked through, which
    /// `progress` is told of, and the index is kept at `place`, or, where that cannot be written, in
    /// an unnamed file.
    ///
    /// # Errors
    /// The image is broken or truncated, holds what no machine can be restored from (disks, multifd
    /// channels), or cannot be read.
    pub fn open(
        storage: Arc<dyn Storage>,
        place: &IndexPlace,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self, ImageError> {
        let (pages, contents) = match find(&*storage, place) {
            Some(index) => {
                let contents = index.contents.clone();
                (Pages::Indexed(RwLock::new(Arc::new(index))), contents)
            }
            None if is_mapped(&*storage) => {
                let (mapped, contents) = Mapped::open(&*storage, progress)?;
                (Pages::Mapped(mapped), contents)
            }
            None => {
                let index = build(&*storage, place, progress)?;
                let contents = index.contents.clone();
                (Pages::Indexed(RwLock::new(Arc::new(index))), contents)
            }
        };
        Ok(Self {
            layouts: contents.head.layouts(),
            place: place.clone(),
            storage,
            contents,
            pages,
            buffers: Mutex::default(),
        })
    }

    /// Everything but the pages.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.contents.head
    }

    /// What the image is called in messages.
    #[must_use]
    pub fn name(&self) -> String {
        self.storage.name()
    }

    /// Are its pages in fixed places (mapped-ram)? Then there is no index, and no checksum of a page.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        matches!(self.pages, Pages::Mapped(_))
    }

    /// The body of a section of [`Image::head`].
    ///
    /// # Errors
    /// It cannot be read, or is not what it was when the image was indexed.
    pub fn section_body(&self, section: &ImageSection) -> Result<Vec<u8>, ImageError> {
        let extent = Extent {
            offset: section.offset,
            bytes: section.bytes,
            checksum: section.checksum,
        };
        let name = || {
            format!(
                "section '{}' ({})",
                section.section.name, section.section.id
            )
        };
        self.extent(extent, name)
    }

    /// The description's text; `None` if the stream has none.
    ///
    /// # Errors
    /// As those of [`Image::section_body`].
    pub fn description(&self) -> Result<Option<Vec<u8>>, ImageError> {
        let extent = self.contents.description;
        extent
            .map(|extent| self.extent(extent, || "the description".into()))
            .transpose()
    }

    fn extent(&self, extent: Extent, name: impl FnOnce() -> String) -> Result<Vec<u8>, ImageError> {
        if extent.bytes > SECTION_BYTES_MAX {
            return Err(ImageError::TooMuch {
                image: self.name(),
                offset: extent.offset,
                what: format!("{} has {} bytes", name(), extent.bytes),
                max: SECTION_BYTES_MAX,
            });
        }
        let mut bytes = vec![0; usize::try_from(extent.bytes).unwrap_or(0)];
        self.read_exactly(extent.offset, &mut bytes)?;
        if crc32fast::hash(&bytes) != extent.checksum {
            return Err(ImageError::DamagedSection {
                image: self.name(),
                section: name(),
                offset: extent.offset,
            });
        }
        Ok(bytes)
    }

    fn read_exactly(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let read = self.storage.read_at(offset, into);
        read.map_err(|source| ImageError::Read {
            image: self.name(),
            offset,
            source,
        })
    }

    /// Keep the order in which pages were wanted, for the next restore, with the index.
    ///
    /// # Errors
    /// There is no place for it, or it cannot be written there.
    pub fn keep_working_set(&self, order: &[StoredRange]) -> Result<(), ImageError> {
        let Some(index) = self.place.path(&*self.storage) else {
            return Err(ImageError::Index {
                index: PathBuf::new(),
                verb: "create",
                source: std::io::ErrorKind::Unsupported.into(),
            });
        };
        let path = working_set::path(&index);
        let (identity, mode) = (self.identity(), self.storage.mode());
        working_set::write(&path, identity, mode, order).map_err(|source| ImageError::Index {
            index: path,
            verb: "write",
            source,
        })
    }

    fn identity(&self) -> crate::storage::Identity {
        match &self.pages {
            Pages::Indexed(index) => read_lock(index).identity(),
            Pages::Mapped(_) => self.storage.identity(),
        }
    }

    /// Compare all of the image with its index: every record, every page, every section. Of a
    /// mapped-ram file, which has nothing to compare with, everything is read.
    ///
    /// # Errors
    /// What is wrong first, and where.
    pub fn verify(&self, progress: &mut dyn FnMut(Progress)) -> Result<(), ImageError> {
        match &self.pages {
            Pages::Indexed(index) => {
                let index = read_lock(index);
                crate::verify::indexed(&*self.storage, &self.place, &index, progress)?;
            }
            Pages::Mapped(_) => crate::verify::mapped(self, progress)?,
        }
        let head = &self.contents.head;
        let live = head.live.iter().flat_map(|live| &live.bodies);
        for section in live.chain(&head.devices) {
            self.section_body(section)?;
        }
        self.description()?;
        Ok(())
    }

    /// As [`StoredRam::read`], with this crate's error.
    ///
    /// # Errors
    /// Pages that are not there, or damaged.
    pub fn read_pages(
        &self,
        block: BlockIndex,
        first_page: u64,
        into: &mut [u8],
    ) -> Result<StoredPages, ImageError> {
        let count = into.len().checked_div(PAGE).unwrap_or(0);
        let end_page = first_page.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
        let known = self.contents.head.blocks.get(block.0);
        let is_there = known.is_some_and(|known| end_page <= known.pages());
        if !is_there || count > PAGES_MAX || !into.len().is_multiple_of(PAGE) {
            return Err(ImageError::NoSuchPage {
                image: self.name(),
                block: block.0,
                first_page,
                end_page,
            });
        }
        let mut index = match &self.pages {
            Pages::Mapped(mapped) => {
                return mapped.read(&*self.storage, block.0, first_page, into);
            }
            Pages::Indexed(index) => read_lock(index),
        };
        // One where it is to be, and if somebody writes over that too, one that nobody sees.
        for is_named in [true, false] {
            match self.read_indexed(&index, block.0, first_page, into) {
                Err(Failed::Index(why)) => index = self.rebuild(&index, &why, is_named)?,
                Err(Failed::Image(error)) => return Err(error),
                Ok(found) => return Ok(found),
            }
        }
        let last = self.read_indexed(&index, block.0, first_page, into);
        last.map_err(|failed| match failed {
            Failed::Image(error) => error,
            Failed::Index(why) => self.wrong_index(&why.to_string()),
        })
    }

    fn read_indexed(
        &self,
        index: &Index,
        block: usize,
        first_page: u64,
        into: &mut [u8],
    ) -> Result<StoredPages, Failed> {
        let mut found = StoredPages::default();
        let mut run = Run::default();
        let mut entries = None;
        // Of the pages whose entries are at hand, the first one.
        let (mut base, mut left) = (0_usize, 0_u64);
        for step in 0..into.len() / PAGE {
            let page = first_page.saturating_add(u64::try_from(step).unwrap_or(u64::MAX));
            if left == 0 {
                let (next, count) = index.entries(block, page)?;
                entries = Some(next);
                (base, left) = (step, count);
            }
            left = left.saturating_sub(1);
            let entry = entries
                .as_ref()
                .and_then(|entries| entries.get(step.saturating_sub(base)));
            let (place, sum) = entry.ok_or(Unusable::Damaged("its page table"))?;
            let bit = 1_u64 << (step % PAGES_MAX);
            match place.get().ok_or(Unusable::Damaged("its page table"))? {
                Where::Absent => found.absent |= bit,
                Where::Zero => found.zero |= bit,
                Where::Fill(fill) => page_of(into, step).fill(fill),
                Where::Kept(slot) => index.kept(slot, page_of(into, step))?,
                Where::Zlib(payload) => {
                    let wanted = self.wanted(block, page, step, payload, sum);
                    self.read_zlib(&wanted, page_of(into, step))?;
                }
                Where::Plain(payload) => {
                    let wanted = self.wanted(block, page, step, payload, sum);
                    if !run.takes(&wanted) {
                        self.read_run(&run, into)?;
                        run.count = 0;
                    }
                    run.push(wanted);
                }
            }
        }
        self.read_run(&run, into)?;
        Ok(found)
    }

    fn wanted(&self, block: usize, page: u64, step: usize, payload: Payload, sum: u32) -> Wanted {
        let name = self
            .contents
            .head
            .blocks
            .get(block)
            .map_or(0, |block| block.name.len());
        let name = u64::try_from(name).unwrap_or(u64::MAX);
        let named = if payload.is_named {
            name.saturating_add(1)
        } else {
            0
        };
        Wanted {
            block,
            page,
            step,
            sum,
            is_named: payload.is_named,
            header: payload.offset.saturating_sub(named.saturating_add(8)),
            payload: payload.offset,
        }
    }

    /// Read pages that lie one behind the other, and check them.
    fn read_run(&self, run: &Run, into: &mut [u8]) -> Result<(), Failed> {
        let (Some(first), Some(last)) = (run.pages().first(), run.pages().last()) else {
            return Ok(());
        };
        let end = last.payload.saturating_add(PAGE_BYTES);
        let length = usize::try_from(end.saturating_sub(first.header)).unwrap_or(usize::MAX);
        let mut buffer = self.buffer();
        if buffer.len() < length {
            buffer.resize(length, 0);
        }
        let bytes = buffer.get_mut(..length).unwrap_or_default();
        self.read_record(first, bytes)?;
        for page in run.pages() {
            let start = page.header.saturating_sub(first.header);
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            let record = bytes.get(start..).unwrap_or_default();
            let payload = self.check_header(page, PAGE_FLAG, record)?;
            let payload = payload.get(..PAGE).unwrap_or_default();
            if crc32fast::hash(payload) != page.sum {
                return Err(self.damaged(page, "its checksum differs".into()).into());
            }
            page_of(into, page.step).copy_from_slice(payload);
        }
        self.keep(buffer);
        Ok(())
    }

    /// Read from the record of a page on.
    fn read_record(&self, page: &Wanted, into: &mut [u8]) -> Result<(), ImageError> {
        self.read_exactly(page.header, into)
            .map_err(|error| match error {
                ImageError::Read { source, .. }
                    if source.kind() == std::io::ErrorKind::UnexpectedEof =>
                {
                    self.damaged(page, "the image ends before it, or inside".into())
                }
                error => error,
            })
    }

    /// What follows the header of a page's record, if it is the one that was indexed.
    fn check_header<'b>(
        &self,
        page: &Wanted,
        kind: u64,
        record: &'b [u8],
    ) -> Result<&'b [u8], ImageError> {
        let flags = if page.is_named {
            kind
        } else {
            kind | CONTINUE_FLAG
        };
        let expected = page.page.saturating_mul(PAGE_BYTES) | flags;
        let (word, rest) = record.split_first_chunk().unwrap_or((&[0; 8], &[]));
        let found = u64::from_be_bytes(*word);
        if found != expected {
            let problem = format!("its record is {found:#018x}, {expected:#018x} expected");
            return Err(self.damaged(page, problem));
        }
        if !page.is_named {
            return Ok(rest);
        }
        let name = self.contents.head.blocks.get(page.block);
        let name = name.map(|block| block.name.as_bytes()).unwrap_or_default();
        let is_right = rest.split_first().is_some_and(|(length, text)| {
            usize::from(*length) == name.len() && text.starts_with(name)
        });
        if !is_right {
            return Err(self.damaged(page, "its record is that of another block".into()));
        }
        let length = name.len().saturating_add(1);
        Ok(rest.get(length..).unwrap_or_default())
    }

    fn read_zlib(&self, page: &Wanted, into: &mut [u8]) -> Result<(), Failed> {
        // The length stands behind the name.
        let page = &Wanted {
            header: page.header.saturating_sub(4),
            ..*page
        };
        let length = page.payload.saturating_sub(page.header);
        let mut header = vec![0; usize::try_from(length).unwrap_or(0)];
        self.read_record(page, &mut header)?;
        self.check_header(page, COMPRESSED_FLAG, &header)?;
        fetch_zlib(&*self.storage, page.payload, into)
            .map_err(|error| self.damaged(page, error.to_string()))?;
        if crc32fast::hash(into) != page.sum {
            return Err(self.damaged(page, "its checksum differs".into()).into());
        }
        Ok(())
    }

    fn damaged(&self, page: &Wanted, problem: String) -> ImageError {
        let block = self.contents.head.blocks.get(page.block);
        ImageError::DamagedPage {
            image: self.name(),
            block: block.map(|block| block.name.clone()).unwrap_or_default(),
            page_offset: page.page.saturating_mul(PAGE_BYTES),
            offset: page.header,
            problem,
        }
    }

    fn buffer(&self) -> Vec<u8> {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        buffers.pop().unwrap_or_default()
    }

    fn keep(&self, buffer: Vec<u8>) {
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.len() < BUFFERS_MAX {
            buffers.push(buffer);
        }
    }

    /// The index is damaged where it was not read before: make another one. The image itself must be
    /// what it was.
    fn rebuild(
        &self,
        damaged: &Arc<Index>,
        why: &Unusable,
        is_named: bool,
    ) -> Result<Arc<Index>, ImageError> {
        let Pages::Indexed(current) = &self.pages else {
            return Err(self.wrong_index("it has none"));
        };
        // Others wait here, and find the new one.
        let mut current = current.write().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&current, damaged) {
            return Ok(Arc::clone(&current));
        }
        tracing::info!(image = self.name(), %why, "the index is made anew");
        if self.storage.identity() != damaged.identity() {
            return Err(ImageError::Changing { image: self.name() });
        }
        let index = match is_named {
            true => build(&*self.storage, &self.place, &mut |_| {})?,
            false => build_unnamed(&*self.storage, &mut |_| {})?,
        };
        if !index.contents.has_the_blocks_of(&self.contents) {
            return Err(self.wrong_index("the image has other RAM blocks"));
        }
        *current = Arc::new(index);
        Ok(Arc::clone(&current))
    }

    fn wrong_index(&self, problem: &str) -> ImageError {
        ImageError::WrongIndex {
            image: self.name(),
            index: self.place.path(&*self.storage).unwrap_or_default(),
            problem: problem.to_owned(),
        }
    }
}

impl StoredRam for Image {
    fn blocks(&self) -> &[BlockLayout] {
        &self.layouts
    }

    fn read(
        &self,
        block: BlockIndex,
        first_page: u64,
        into: &mut [u8],
    ) -> Result<StoredPages, HandlerError> {
        const { assert!(STORED_PAGES_MAX == PAGES_MAX as u64) };
        Ok(self.read_pages(block, first_page, into)?)
    }

    fn working_set(&self) -> Vec<StoredRange> {
        let path = self.place.path(&*self.storage);
        let kept = path.and_then(|index| {
            working_set::read(&working_set::path(&index), self.identity(), &self.layouts)
        });
        kept.unwrap_or_default()
    }
}

/// A page that is to be read from the image.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    block: usize,
    page: u64,
    /// Its place among those that were asked for.
    step: usize,
    sum: u32,
    is_named: bool,
    /// Where its record starts in the image.
    header: u64,
    /// Where its payload starts.
    payload: u64,
}

/// Pages whose records follow one another in the image.
struct Run {
    pages: [Wanted; PAGES_MAX],
    count: usize,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            pages: [Wanted::default(); PAGES_MAX],
            count: 0,
        }
    }
}

impl Run {
    fn pages(&self) -> &[Wanted] {
        self.pages.get(..self.count).unwrap_or_default()
    }

    /// Does this page lie behind the last one, or nearly?
    fn takes(&self, page: &Wanted) -> bool {
        let Some(last) = self.pages().last() else {
            return true;
        };
        let end = last.payload.saturating_add(PAGE_BYTES);
        let gap: Range<u64> = end..end.saturating_add(GAP_BYTES_MAX);
        gap.contains(&page.header) && page.payload >= page.header
    }

    fn push(&mut self, page: Wanted) {
        if let Some(free) = self.pages.get_mut(self.count) {
            *free = page;
            self.count = self.count.saturating_add(1);
        }
    }
}

/// Why pages cannot be read.
enum Failed {
    Index(Unusable),
    Image(ImageError),
}

impl From<Unusable> for Failed {
    fn from(error: Unusable) -> Self {
        Self::Index(error)
    }
}

impl From<ImageError> for Failed {
    fn from(error: ImageError) -> Self {
        Self::Image(error)
    }
}

/// The page at `step` of what was asked for.
fn page_of(into: &mut [u8], step: usize) -> &mut [u8] {
    let start = step.saturating_mul(PAGE);
    into.get_mut(start..start.saturating_add(PAGE))
        .unwrap_or_default()
}

fn read_lock(index: &RwLock<Arc<Index>>) -> Arc<Index> {
    Arc::clone(&index.read().unwrap_or_else(PoisonError::into_inner))
}

/// The index at `place`, if it fits.
fn find(storage: &dyn Storage, place: &IndexPlace) -> Option<Index> {
    let path = place.path(storage)?;
    match Index::open(&path, storage) {
        Ok(index) => Some(index),
        Err(Unusable::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(why) => {
            let path = path.display();
            tracing::info!(image = storage.name(), index = %path, %why, "the index is not used");
            None
        }
    }
}

/// Walk through an image and make its index.
fn build(
    storage: &dyn Storage,
    place: &IndexPlace,
    progress: &mut dyn FnMut(Progress),
) -> Result<Index, ImageError> {
    let named = IndexBuilder::new(place, storage).and_then(|mut builder| {
        listen(storage, &mut builder, progress)?;
        let mode = storage.mode();
        let (new, path) = builder.complete(storage)?;
        let file = new.file.try_clone();
        let published = match path {
            Some(path) => new.publish(&path, mode).map_err(|source| (path, source)),
            None => Ok(()),
        };
        let file = file.map_err(|source| (PathBuf::new(), source));
        published
            .and(file)
            .map_err(|(index, source)| ImageError::Index {
                index,
                verb: "publish",
                source,
            })
    });
    match named.and_then(|file| opened(file, storage)) {
        // The image is fine; there is no room for an index, nobody may write there, or others do.
        Err(error @ (ImageError::Index { .. } | ImageError::WrongIndex { .. })) => {
            let message = "the index is kept in an unnamed file";
            match &error {
                ImageError::Index { source, .. }
                    if source.kind() == io::ErrorKind::AlreadyExists =>
                {
                    tracing::warn!(image = storage.name(), %error, message);
                }
                _ => tracing::info!(image = storage.name(), %error, message),
            }
            build_unnamed(storage, progress)
        }
        other => other,
    }
}

/// Walk through an image and make an index that nobody else sees.
pub(crate) fn build_unnamed(
    storage: &dyn Storage,
    progress: &mut dyn FnMut(Progress),
) -> Result<Index, ImageError> {
    opened(unnamed(storage, progress)?, storage)
}

fn unnamed(
    storage: &dyn Storage,
    progress: &mut dyn FnMut(Progress),
) -> Result<std::fs::File, ImageError> {
    let mut builder = IndexBuilder::unnamed(storage)?;
    listen(storage, &mut builder, progress)?;
    let (new, _) = builder.complete(storage)?;
    new.file.try_clone().map_err(|source| ImageError::Index {
        index: std::env::temp_dir(),
        verb: "keep",
        source,
    })
}

/// Walk through an image that must not change meanwhile.
fn listen(
    storage: &dyn Storage,
    builder: &mut IndexBuilder,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), ImageError> {
    let identity = storage.identity();
    let walked = crate::walk::walk(storage, builder, progress);
    if storage.identity() != identity {
        return Err(ImageError::Changing {
            image: storage.name(),
        });
    }
    walked
}

/// The index that was made just now.
fn opened(file: std::fs::File, storage: &dyn Storage) -> Result<Index, ImageError> {
    Index::read(file, storage).map_err(|why| match why {
        Unusable::Stale => ImageError::Changing {
            image: storage.name(),
        },
        Unusable::Io(source) => ImageError::Index {
            index: std::env::temp_dir(),
            verb: "read back",
            source,
        },
        Unusable::Damaged(what) => ImageError::WrongIndex {
            image: storage.name(),
            index: std::env::temp_dir(),
            problem: format!("{what} is damaged"),
        },
    })
}
