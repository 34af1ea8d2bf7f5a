//! The page table while it is built, in bounded memory.
//!
//! Chunks have fixed places in the file. Those that were used last are in memory; one that is pushed
//! out is written, or remembered as one in which every page is the same.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::chunk::{CHUNK_BYTES, CHUNK_PAGES, Chunk, Place, Where};
use super::layout::chunk_offset;

/// Chunks in memory: 25 MiB, 8 GiB of guest memory.
pub(crate) const CACHED_CHUNKS_MAX: usize = 4096;

/// Pages of a chunk.
const PAGES: u64 = CHUNK_PAGES as u64;

/// What there is of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// None of its pages is in the image.
    Absent,
    /// All its pages are zero.
    Zero,
    /// It is in the file.
    Written,
}

impl Presence {
    pub(crate) fn to_byte(self) -> u8 {
        match self {
            Self::Absent => 0,
            Self::Zero => 1,
            Self::Written => 2,
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            0 => Self::Absent,
            1 => Self::Zero,
            2 => Self::Written,
            _ => return None,
        })
    }

    /// What it says of every page; `None` if they differ.
    pub(crate) fn uniform(self) -> Option<Place> {
        match self {
            Self::Absent => Some(Place::ABSENT),
            Self::Zero => Some(Place::ZERO),
            Self::Written => None,
        }
    }
}

/// Pages of a block, in chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockChunks {
    pub(crate) first: u64,
    pub(crate) pages: u64,
}

impl BlockChunks {
    /// The blocks' chunks lie one behind the other.
    pub(crate) fn of(pages: impl Iterator<Item = u64>) -> (Vec<Self>, u64) {
        let mut first = 0_u64;
        let blocks = pages.map(|pages| {
            let block = Self { first, pages };
            first = first.saturating_add(block.count());
            block
        });
        (blocks.collect(), first)
    }

    pub(crate) fn count(&self) -> u64 {
        self.pages.div_ceil(PAGES)
    }

    /// The chunk of a page, and its place in there.
    pub(crate) fn locate(&self, page: u64) -> (u64, usize) {
        let within = usize::try_from(page % PAGES).unwrap_or(0);
        (self.first.saturating_add(page / PAGES), within)
    }

    /// How many pages its chunk `number` has.
    fn valid(&self, number: u64) -> usize {
        let before = number.saturating_sub(self.first).saturating_mul(PAGES);
        let left = self.pages.saturating_sub(before);
        usize::try_from(left)
            .unwrap_or(CHUNK_PAGES)
            .min(CHUNK_PAGES)
    }
}

/// What was counted in the pages of a chunk.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    absent: u16,
    stored: u16,
}

/// The page table of all blocks.
#[derive(Debug)]
pub(crate) struct Table {
    nonce: u64,
    blocks: Vec<BlockChunks>,
    presence: Vec<Presence>,
    /// Those of which that is not [`Presence::Absent`].
    there: Bits,
    counts: Vec<Counts>,
    cache: HashMap<u64, Box<Chunk>>,
    /// Oldest first; the same chunks as in `cache`.
    order: VecDeque<u64>,
    cached_max: usize,
}

impl Table {
    pub(crate) fn new(nonce: u64, pages: impl Iterator<Item = u64>, cached_max: usize) -> Self {
        let (blocks, chunks) = BlockChunks::of(pages);
        let length = usize::try_from(chunks).unwrap_or(usize::MAX);
        let mut counts = vec![Counts::default(); length];
        for block in &blocks {
            for number in block.first..block.first.saturating_add(block.count()) {
                let index = usize::try_from(number).unwrap_or(usize::MAX);
                if let Some(counts) = counts.get_mut(index) {
                    counts.absent = u16::try_from(block.valid(number)).unwrap_or(0);
                }
            }
        }
        Self {
            nonce,
            blocks,
            presence: vec![Presence::Absent; length],
            there: Bits::new(length),
            counts,
            cache: HashMap::new(),
            order: VecDeque::new(),
            cached_max: cached_max.max(1),
        }
    }

    pub(crate) fn chunks(&self) -> u64 {
        u64::try_from(self.presence.len()).unwrap_or(u64::MAX)
    }

    pub(crate) fn presence(&self) -> &[Presence] {
        &self.presence
    }

    /// Pages of this block, if it has any chunks.
    pub(crate) fn block(&self, block: usize) -> Option<BlockChunks> {
        self.blocks.get(block).copied()
    }

    /// The entry of a page; `None` if there is no such page.
    pub(crate) fn get(
        &mut self,
        file: &File,
        block: usize,
        page: u64,
    ) -> io::Result<Option<(Place, u32)>> {
        let Some(found) = self.block(block).filter(|found| page < found.pages) else {
            return Ok(None);
        };
        let (number, within) = found.locate(page);
        Ok(self.chunk(file, number)?.entry(within))
    }

    /// The page is there from now on.
    pub(crate) fn set(
        &mut self,
        file: &File,
        block: usize,
        page: u64,
        entry: (Place, u32),
    ) -> io::Result<()> {
        let Some(found) = self.block(block).filter(|found| page < found.pages) else {
            return Ok(());
        };
        let (number, within) = found.locate(page);
        self.chunk(file, number)?.set(within, entry);
        Ok(())
    }

    /// These pages are not in the image any more.
    pub(crate) fn forget(
        &mut self,
        file: &File,
        block: usize,
        pages: Range<u64>,
    ) -> io::Result<()> {
        let Some(found) = self.block(block) else {
            return Ok(());
        };
        let (start, end) = (pages.start, pages.end.min(found.pages));
        if start >= end {
            return Ok(());
        }
        let absent = (Place::ABSENT, 0);
        let whole = start.next_multiple_of(PAGES);
        // The last chunk of a block is a whole one, too.
        let whole_end = match end == found.pages {
            true => end.next_multiple_of(PAGES),
            false => end.saturating_sub(end % PAGES),
        };
        for page in start..whole.min(end) {
            self.set(file, block, page, absent)?;
        }
        if whole < whole_end {
            let first = found.locate(whole).0;
            let last = first.saturating_add(whole_end.saturating_sub(whole) / PAGES);
            self.forget_chunks(&found, first..last);
        }
        for page in whole_end.max(whole)..end {
            self.set(file, block, page, absent)?;
        }
        Ok(())
    }

    fn forget_chunks(&mut self, block: &BlockChunks, chunks: Range<u64>) {
        let count = usize::try_from(chunks.end.saturating_sub(chunks.start)).unwrap_or(usize::MAX);
        if count > self.cache.len() {
            for (number, chunk) in &mut self.cache {
                if chunks.contains(number) {
                    **chunk = Chunk::filled(Place::ABSENT);
                }
            }
        } else {
            for number in chunks.clone() {
                if let Some(chunk) = self.cache.get_mut(&number) {
                    **chunk = Chunk::filled(Place::ABSENT);
                }
            }
        }
        // A source may discard everything again and again: what is not there is stepped over fast.
        let mut from = chunks.start;
        while let Some(number) = self.there.next(from, chunks.end) {
            let index = usize::try_from(number).unwrap_or(usize::MAX);
            let counts = Counts {
                absent: u16::try_from(block.valid(number)).unwrap_or(0),
                stored: 0,
            };
            self.remember(index, Presence::Absent, counts);
            from = number.saturating_add(1);
        }
    }

    fn remember(&mut self, index: usize, presence: Presence, counts: Counts) {
        self.there.put(index, presence != Presence::Absent);
        if let Some(found) = self.presence.get_mut(index) {
            *found = presence;
        }
        if let Some(found) = self.counts.get_mut(index) {
            *found = counts;
        }
    }

    /// A chunk, brought into memory.
    fn chunk(&mut self, file: &File, number: u64) -> io::Result<&mut Chunk> {
        if !self.cache.contains_key(&number) {
            if self.cache.len() >= self.cached_max
                && let Some(oldest) = self.order.pop_front()
            {
                self.push_out(file, oldest)?;
            }
            let chunk = self.load(file, number)?;
            self.cache.insert(number, Box::new(chunk));
            self.order.push_back(number);
        }
        let chunk = self.cache.get_mut(&number);
        chunk
            .map(|chunk| &mut **chunk)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn load(&self, file: &File, number: u64) -> io::Result<Chunk> {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        let presence = self.presence.get(index).copied();
        let presence = presence.ok_or(io::ErrorKind::NotFound)?;
        if let Some(place) = presence.uniform() {
            return Ok(Chunk::filled(place));
        }
        let mut bytes = [0; CHUNK_BYTES];
        file.read_exact_at(&mut bytes, chunk_offset(number))?;
        Chunk::decode(&bytes, self.nonce, number).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn push_out(&mut self, file: &File, number: u64) -> io::Result<()> {
        let Some(chunk) = self.cache.remove(&number) else {
            return Ok(());
        };
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        let behind = self.blocks.partition_point(|block| block.first <= number);
        // Blocks without pages have no chunk, and begin where the next one does.
        let block = self.blocks.get(..behind).unwrap_or_default().iter();
        let mut candidates = block.rev();
        let valid = candidates
            .find(|block| block.pages > 0)
            .map_or(0, |block| block.valid(number));
        let places = chunk.places.get(..valid).unwrap_or_default();
        let (mut counts, mut zero) = (Counts::default(), 0_usize);
        for place in places {
            match place.get() {
                Some(Where::Absent) => counts.absent = counts.absent.saturating_add(1),
                Some(Where::Zero) => zero = zero.saturating_add(1),
                _ => counts.stored = counts.stored.saturating_add(1),
            }
        }
        let presence = if usize::from(counts.absent) == valid {
            Presence::Absent
        } else if zero == valid {
            Presence::Zero
        } else {
            file.write_all_at(&chunk.encode(self.nonce, number), chunk_offset(number))?;
            Presence::Written
        };
        self.remember(index, presence, counts);
        Ok(())
    }

    /// Write what is in memory.
    pub(crate) fn flush(&mut self, file: &File) -> io::Result<()> {
        // In their order: the file is written from front to back.
        let mut numbers: Vec<_> = self.order.drain(..).collect();
        numbers.sort_unstable();
        numbers
            .into_iter()
            .try_for_each(|number| self.push_out(file, number))
    }

    /// Pages of a block that are not in the image, and those with content in it. After a flush.
    pub(crate) fn counts(&self, block: usize) -> (u64, u64) {
        let Some(found) = self.block(block) else {
            return (0, 0);
        };
        let index = |number| usize::try_from(number).unwrap_or(usize::MAX);
        let range = index(found.first)..index(found.first.saturating_add(found.count()));
        let counts = self.counts.get(range).unwrap_or_default();
        counts.iter().fold((0, 0), |(absent, stored), counts| {
            (
                absent.saturating_add(u64::from(counts.absent)),
                stored.saturating_add(u64::from(counts.stored)),
            )
        })
    }
}

/// A bit for each chunk.
#[derive(Debug)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(length: usize) -> Self {
        Self(vec![0; length.div_ceil(64)])
    }

    fn put(&mut self, index: usize, value: bool) {
        if let Some(word) = self.0.get_mut(index / 64) {
            let bit = 1 << (index % 64);
            *word = if value { *word | bit } else { *word & !bit };
        }
    }

    /// The first one that is set, from `from` on and before `end`.
    fn next(&self, from: u64, end: u64) -> Option<u64> {
        let first = usize::try_from(from / 64).ok()?;
        let head = self.0.get(first)? & (u64::MAX << (from % 64));
        let (word, bits) = match head {
            0 => {
                let rest = self.0.get(first.saturating_add(1)..)?;
                let step = rest.iter().position(|word| *word != 0)?;
                let word = first.saturating_add(1).saturating_add(step);
                (word, *rest.get(step)?)
            }
            bits => (first, bits),
        };
        let number = u64::try_from(word).ok()?.saturating_mul(64);
        let number = number.saturating_add(u64::from(bits.trailing_zeros()));
        (number < end).then_some(number)
    }
}

impl Chunk {
    fn set(&mut self, page: usize, (place, sum): (Place, u32)) {
        if let (Some(old_place), Some(old_sum)) =
            (self.places.get_mut(page), self.sums.get_mut(page))
        {
            *old_place = place;
            *old_sum = sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::chunk::Payload;
    use super::*;

    fn plain(offset: u64) -> (Place, u32) {
        let place = Where::Plain(Payload {
            offset,
            is_named: false,
        });
        (Place::new(place).unwrap(), offset as u32 ^ 0x55)
    }

    /// Against a map of pages, with a cache that holds almost nothing.
    #[test]
    fn is_a_map_of_pages() {
        let seed = std::env::var("VMFERRY_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| fastrand::u64(..));
        println!("VMFERRY_SEED={seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let pages = [1300_u64, 0, 512, 1, 0];
        let file = tempfile::tempfile().unwrap();
        let mut table = Table::new(9, pages.into_iter(), 2);
        assert_eq!(table.chunks(), 3 + 1 + 1);
        let mut model: HashMap<(usize, u64), (Place, u32)> = HashMap::new();
        for step in 0..20_000 {
            let block = random.usize(..pages.len());
            let page = random.u64(..pages[block].max(1) + 3);
            match random.u32(..100) {
                0 => {
                    let range = page..page + random.u64(..1500);
                    table.forget(&file, block, range.clone()).unwrap();
                    model.retain(|(other, page), _| *other != block || !range.contains(page));
                }
                1 => {
                    let first = page;
                    for page in first..first + random.u64(..1500) {
                        let zero = (Place::ZERO, 0);
                        table.set(&file, block, page, zero).unwrap();
                        if page < pages[block] {
                            model.insert((block, page), zero);
                        }
                    }
                }
                2..50 => {
                    table.set(&file, block, page, plain(step)).unwrap();
                    if page < pages[block] {
                        model.insert((block, page), plain(step));
                    }
                }
                _ => {
                    let expected = (page < pages[block]).then(|| {
                        let found = model.get(&(block, page));
                        found.copied().unwrap_or((Place::ABSENT, 0))
                    });
                    assert_eq!(table.get(&file, block, page).unwrap(), expected);
                }
            }
        }
        table.flush(&file).unwrap();
        for (block, pages) in pages.iter().enumerate() {
            let of_block = model.iter().filter(|((other, _), _)| *other == block);
            let stored = of_block.clone().filter(|(_, entry)| entry.0 != Place::ZERO);
            let absent = pages - of_block.count() as u64;
            assert_eq!(table.counts(block), (absent, stored.count() as u64));
        }
    }

    #[test]
    fn bits_are_found_in_their_order() {
        let mut bits = Bits::new(300);
        for index in [0, 63, 64, 200, 299] {
            bits.put(index, true);
        }
        bits.put(64, false);
        let found = |from, end| bits.next(from, end);
        assert_eq!(found(0, 300), Some(0));
        assert_eq!(found(1, 300), Some(63));
        assert_eq!(found(1, 63), None);
        assert_eq!(found(64, 300), Some(200));
        assert_eq!(found(201, 300), Some(299));
        assert_eq!(found(201, 299), None);
        assert_eq!(found(300, 300), None);
        assert_eq!(found(1000, 2000), None);
    }

    #[test]
    fn what_is_the_same_throughout_is_not_written() {
        let file = tempfile::tempfile().unwrap();
        let mut table = Table::new(9, [1025].into_iter(), 8);
        for page in 512..1025 {
            table.set(&file, 0, page, (Place::ZERO, 0)).unwrap();
        }
        table.flush(&file).unwrap();
        let expected = [Presence::Absent, Presence::Zero, Presence::Zero];
        assert_eq!(table.presence(), expected);
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}
