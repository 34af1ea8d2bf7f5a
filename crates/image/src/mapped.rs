//! Pages that have fixed places: mapped-ram files, which need no index.
//!
//! Each block has a bitmap, which says what pages are in the file, and an area in which page p is the
//! p-th. Bitmaps are read where they are needed; nothing in such a file tells whether a page is what it
//! was.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use vmferry_inspect::{Event, VisitError, Visitor, walk_skipping};
use vmferry_ram::{PAGE_BYTES, StoredPages};
use vmferry_stream::{MappedBlock, Record};

use crate::Progress;
use crate::error::ImageError;
use crate::head::Contents;
use crate::outline::{MAPPED_RAM, Outline};
use crate::page::PAGE;
use crate::storage::{Reader, Storage};

/// Bytes of a bitmap that are read at once: 128 MiB of guest memory.
const PIECE_BYTES: usize = 4096;
/// Pages of it.
const PIECE_PAGES: u64 = PIECE_BYTES as u64 * 8;
/// Pieces that are kept: 4 MiB, 128 GiB of guest memory.
const PIECES_MAX: usize = 1024;

/// The blocks of a mapped-ram file.
#[derive(Debug)]
pub(crate) struct Mapped {
    blocks: Vec<MappedBlock>,
    pages: Vec<u64>,
    cache: Mutex<Pieces>,
}

/// Pieces of bitmaps that were used before, by block and number.
#[derive(Debug, Default)]
struct Pieces {
    pieces: HashMap<(usize, u64), Arc<[u8]>>,
    order: VecDeque<(usize, u64)>,
}

/// Does the stream say that its pages have fixed places? `false` of what is no stream: a walk says what
/// it is.
pub(crate) fn is_mapped(storage: &dyn Storage) -> bool {
    let mut first = First { is_mapped: false };
    // It ends with the first record that tells.
    let _ = walk_skipping(Reader::new(storage), storage.start(), &mut first);
    first.is_mapped
}

struct First {
    is_mapped: bool,
}

impl Visitor for First {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Container(_) | Event::Record(_, Record::Header { .. }) => Ok(()),
            Event::Record(_, Record::Configuration(configuration)) => {
                self.is_mapped = configuration.has_capability(MAPPED_RAM);
                Err("it is known".into())
            }
            _ => Err("it has no configuration".into()),
        }
    }
}

impl Mapped {
    /// Step through a mapped-ram file.
    pub(crate) fn open(
        storage: &dyn Storage,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Self, Contents), ImageError> {
        let mut outline = Outline::new(storage.name());
        crate::walk::walk(storage, &mut outline, progress)?;
        let blocks = std::mem::take(&mut outline.mapped);
        let contents = outline.finish(storage)?;
        let pages = contents.head.blocks.iter();
        let pages = pages.map(crate::head::ImageBlock::pages).collect();
        let cache = Mutex::default();
        let mapped = Self {
            blocks,
            pages,
            cache,
        };
        Ok((mapped, contents))
    }

    /// Read pages, which are in the block, each run of them at once.
    pub(crate) fn read(
        &self,
        storage: &dyn Storage,
        block: usize,
        first_page: u64,
        into: &mut [u8],
    ) -> Result<StoredPages, ImageError> {
        let Some(mapped) = self.blocks.get(block) else {
            return Err(ImageError::NoSuchPage {
                image: storage.name(),
                block,
                first_page,
                end_page: first_page,
            });
        };
        let mut found = StoredPages::default();
        let count = into.len().checked_div(PAGE).unwrap_or(0);
        let mut bitmap = None;
        // The pages before this one are done; `start` is where the run begins that it may belong to.
        let (mut start, mut step) = (0_usize, 0_usize);
        while step <= count {
            let number = first_page.saturating_add(u64::try_from(step).unwrap_or(u64::MAX));
            let is_there = step < count && self.has(storage, block, number, &mut bitmap)?;
            if !is_there {
                let from = first_page.saturating_add(u64::try_from(start).unwrap_or(u64::MAX));
                let offset = from
                    .saturating_mul(PAGE_BYTES)
                    .saturating_add(mapped.pages_offset);
                let range = start.saturating_mul(PAGE)..step.saturating_mul(PAGE);
                let run = into.get_mut(range).unwrap_or_default();
                if !run.is_empty() {
                    let read = storage.read_at(offset, run);
                    read.map_err(|source| ImageError::Read {
                        image: storage.name(),
                        offset,
                        source,
                    })?;
                }
                if step < count {
                    found.zero |= 1 << (step % 64);
                }
                start = step.saturating_add(1);
            }
            step = step.saturating_add(1);
        }
        Ok(found)
    }

    /// Is the page in the file? `last` is the piece of the bitmap that was used last.
    fn has(
        &self,
        storage: &dyn Storage,
        block: usize,
        page: u64,
        last: &mut Option<(u64, Arc<[u8]>)>,
    ) -> Result<bool, ImageError> {
        let number = page / PIECE_PAGES;
        let piece = match last {
            Some((of, piece)) if *of == number => Arc::clone(piece),
            _ => self.piece(storage, block, number)?,
        };
        let bit = page % PIECE_PAGES;
        let byte = usize::try_from(bit / 8).unwrap_or(usize::MAX);
        let byte = piece.get(byte).copied().unwrap_or(0);
        *last = Some((number, piece));
        Ok(byte & 1 << (bit % 8) != 0)
    }

    fn piece(
        &self,
        storage: &dyn Storage,
        block: usize,
        number: u64,
    ) -> Result<Arc<[u8]>, ImageError> {
        let key = (block, number);
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(piece) = cache.pieces.get(&key) {
            return Ok(Arc::clone(piece));
        }
        drop(cache);
        let start = self.blocks.get(block).map_or(0, |it| it.bitmap_offset);
        let pages = self.pages.get(block).copied().unwrap_or(0);
        let left = pages.saturating_sub(number.saturating_mul(PIECE_PAGES));
        let bytes = usize::try_from(left.div_ceil(8)).unwrap_or(usize::MAX);
        let mut piece = vec![0; bytes.min(PIECE_BYTES)];
        let offset = number
            .saturating_mul(PIECE_BYTES as u64)
            .saturating_add(start);
        let read = storage.read_at(offset, &mut piece);
        read.map_err(|source| ImageError::Read {
            image: storage.name(),
            offset,
            source,
        })?;
        let piece: Arc<[u8]> = piece.into();
        cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.pieces.insert(key, Arc::clone(&piece)).is_none() {
            cache.order.push_back(key);
            if cache.order.len() > PIECES_MAX
                && let Some(oldest) = cache.order.pop_front()
            {
                cache.pieces.remove(&oldest);
            }
        }
        Ok(piece)
    }
}
