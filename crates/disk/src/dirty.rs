//! Which chunks of a disk were written since somebody last looked.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Granularity of dirty tracking and of the `block` section: 1 MiB.
pub const CHUNK_BYTES: u64 = 1 << 20;

/// Number of a 1 MiB chunk of a disk; chunk `n` starts at byte `n * CHUNK_BYTES`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Chunk(pub u64);

impl Chunk {
    /// The chunk that holds this byte.
    #[must_use]
    pub fn containing(byte: u64) -> Self {
        Self(byte / CHUNK_BYTES)
    }

    /// Offset of the chunk's first byte.
    #[must_use]
    pub fn start_bytes(self) -> u64 {
        self.0 * CHUNK_BYTES
    }

    /// Number of chunks of a disk of this length; the last one may be short.
    #[must_use]
    pub fn count(disk_bytes: u64) -> u64 {
        disk_bytes.div_ceil(CHUNK_BYTES)
    }

    /// How many bytes of the chunk lie on a disk of this length.
    #[must_use]
    pub fn length_bytes(self, disk_bytes: u64) -> usize {
        let left = disk_bytes
            .saturating_sub(self.start_bytes())
            .min(CHUNK_BYTES);
        usize::try_from(left).unwrap_or(usize::MAX)
    }
}

/// One bit for each chunk, safe to set and take from several threads.
#[derive(Debug)]
pub struct DirtyBitmap {
    words: Box<[AtomicU64]>,
    chunks: u64,
    /// Bits that went from clear to set, ever: the dirty rate is its derivative.
    marked: AtomicU64,
}

impl DirtyBitmap {
    /// A bitmap for a disk of this length with every bit clear.
    #[must_use]
    pub fn new(disk_bytes: u64) -> Self {
        let chunks = Chunk::count(disk_bytes);
        let words = (0..chunks.div_ceil(64))
            .map(|_| AtomicU64::new(0))
            .collect();
        Self {
            words,
            chunks,
            marked: AtomicU64::new(0),
        }
    }

    /// Number of chunks.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// Set the bit of every chunk that the byte range touches.
    pub fn mark(&self, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        let first = Chunk::containing(offset).0;
        let last = Chunk::containing(offset.saturating_add(length - 1)).0;
        let end = last.saturating_add(1).min(self.chunks);
        for chunk in first..end {
            let Some((word, bit)) = self.locate(chunk) else {
                return;
            };
            if word.fetch_or(bit, Ordering::SeqCst) & bit == 0 {
                self.marked.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Set the bits of chunks that were cleared and not looked at. Nobody has written them, so they
    /// do not count.
    pub(crate) fn put_back(&self, chunks: Range<u64>) {
        for chunk in chunks.start..chunks.end.min(self.chunks) {
            if let Some((word, bit)) = self.locate(chunk) {
                word.fetch_or(bit, Ordering::SeqCst);
            }
        }
    }

    /// Clear the bits of these chunks; the caller reads the chunks afterwards, never before.
    pub fn clear(&self, chunks: Range<u64>) {
        for chunk in chunks.start..chunks.end.min(self.chunks) {
            if let Some((word, bit)) = self.locate(chunk) {
                word.fetch_and(!bit, Ordering::SeqCst);
            }
        }
    }

    /// The first dirty chunk at or after `from`.
    #[must_use]
    pub fn next_dirty(&self, from: Chunk) -> Option<Chunk> {
        let mut index = usize::try_from(from.0 / 64).ok()?;
        let mut mask = u64::MAX << (from.0 % 64);
        loop {
            let word = self.words.get(index)?.load(Ordering::SeqCst) & mask;
            if word != 0 {
                return Some(Chunk(index as u64 * 64 + u64::from(word.trailing_zeros())));
            }
            index += 1;
            mask = u64::MAX;
        }
    }

    /// Number of dirty chunks.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.load(Ordering::SeqCst).count_ones()))
            .sum()
    }

    /// How often a bit went from clear to set since the bitmap was made.
    #[must_use]
    pub fn marked(&self) -> u64 {
        self.marked.load(Ordering::Relaxed)
    }

    fn locate(&self, chunk: u64) -> Option<(&AtomicU64, u64)> {
        let word = self.words.get(usize::try_from(chunk / 64).ok()?)?;
        Some((word, 1 << (chunk % 64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_every_chunk_the_range_touches() {
        let bitmap = DirtyBitmap::new(200 * CHUNK_BYTES + 1);
        assert_eq!(bitmap.chunks(), 201);
        bitmap.mark(CHUNK_BYTES - 1, 2);
        bitmap.mark(200 * CHUNK_BYTES, 1);
        bitmap.mark(64 * CHUNK_BYTES, 0);
        assert_eq!(bitmap.count(), 3);
        assert_eq!(bitmap.next_dirty(Chunk(0)), Some(Chunk(0)));
        assert_eq!(bitmap.next_dirty(Chunk(2)), Some(Chunk(200)));
        bitmap.clear(0..1);
        assert_eq!(bitmap.next_dirty(Chunk(0)), Some(Chunk(1)));
        bitmap.clear(0..u64::MAX);
        assert_eq!(bitmap.next_dirty(Chunk(0)), None);
        assert_eq!(bitmap.marked(), 3);
    }

    #[test]
    fn the_last_chunk_may_be_short() {
        let length = 3 * CHUNK_BYTES + 1536;
        assert_eq!(Chunk::count(length), 4);
        assert_eq!(Chunk(3).length_bytes(length), 1536);
        assert_eq!(Chunk(0).length_bytes(length), 1 << 20);
        assert_eq!(Chunk(4).length_bytes(length), 0);
    }
}
