//! One bit for each guest page of a block.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

const WORD_BITS: u64 = 64;

/// One bit for each guest page of a block. Threads may share it: each change of a bit is atomic, and
/// whoever sees it sees what was done before it.
#[derive(Debug)]
pub struct PageBitmap {
    words: Vec<AtomicU64>,
    pages: u64,
}

impl PageBitmap {
    /// All clear.
    ///
    /// # Panics
    /// If there are more pages than this host could ever map.
    #[must_use]
    pub fn new(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(WORD_BITS)).expect("a block fits in memory");
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            pages,
        }
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Is the bit set? False behind the end.
    #[must_use]
    pub fn get(&self, page: u64) -> bool {
        let (word, mask) = place(page);
        page < self.pages
            && self
                .words
                .get(word)
                .is_some_and(|word| word.load(Ordering::Acquire) & mask != 0)
    }

    /// Set a bit; true if it was clear. Nothing happens behind the end.
    pub fn set(&self, page: u64) -> bool {
        let (word, mask) = place(page);
        page < self.pages
            && self
                .words
                .get(word)
                .is_some_and(|word| word.fetch_or(mask, Ordering::AcqRel) & mask == 0)
    }

    /// Clear a bit; true if it was set.
    pub fn clear(&self, page: u64) -> bool {
        let (word, mask) = place(page);
        self.words
            .get(word)
            .is_some_and(|word| word.fetch_and(!mask, Ordering::AcqRel) & mask != 0)
    }

    /// Set a range, cut at the end; how many were clear.
    pub fn set_range(&self, pages: Range<u64>) -> u64 {
        self.change(pages, |word, mask| {
            (!word.fetch_or(mask, Ordering::AcqRel) & mask).count_ones()
        })
    }

    /// Clear a range, cut at the end; how many were set.
    pub fn clear_range(&self, pages: Range<u64>) -> u64 {
        self.change(pages, |word, mask| {
            (word.fetch_and(!mask, Ordering::AcqRel) & mask).count_ones()
        })
    }

    fn change(&self, pages: Range<u64>, change: impl Fn(&AtomicU64, u64) -> u32) -> u64 {
        let (mut page, end) = (pages.start, pages.end.min(self.pages));
        let mut changed = 0;
        while page < end {
            let (word, _) = place(page);
            let word_start = page - page % WORD_BITS;
            let mask = mask(page - word_start..(end - word_start).min(WORD_BITS));
            if let Some(word) = self.words.get(word) {
                changed += u64::from(change(word, mask));
            }
            page = word_start + WORD_BITS;
        }
        changed
    }

    /// How many are set.
    #[must_use]
    pub fn count(&self) -> u64 {
        let ones = |word: &AtomicU64| u64::from(word.load(Ordering::Acquire).count_ones());
        self.words.iter().map(ones).sum()
    }

    /// The first that is set, from `page` on.
    #[must_use]
    pub fn next_set(&self, page: u64) -> Option<u64> {
        self.find(page, |word| word)
    }

    /// The first that is clear, from `page` on.
    #[must_use]
    pub fn next_clear(&self, page: u64) -> Option<u64> {
        self.find(page, |word| !word)
    }

    fn find(&self, page: u64, wanted: impl Fn(u64) -> u64) -> Option<u64> {
        let (first, _) = place(page);
        let mut skip = page % WORD_BITS;
        for (index, word) in self.words.iter().enumerate().skip(first) {
            let word = wanted(word.load(Ordering::Acquire)) >> skip << skip;
            if word != 0 {
                let found = index as u64 * WORD_BITS + u64::from(word.trailing_zeros());
                return (found < self.pages).then_some(found);
            }
            skip = 0;
        }
        None
    }

    /// The runs of set bits, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        let mut page = 0;
        std::iter::from_fn(move || {
            let start = self.next_set(page)?;
            let end = self.next_clear(start).unwrap_or(self.pages);
            page = end;
            Some(start..end)
        })
    }

    /// As RECV_BITMAP carries the first `pages` of it (`postcopy.md` §7): bit 0 of byte 0 is page 0,
    /// filled up to eight bytes.
    #[must_use]
    pub fn to_wire(&self, pages: u64) -> Vec<u8> {
        let words = pages.min(self.pages).div_ceil(WORD_BITS);
        let mut wire = Vec::new();
        for (index, word) in (0..words).zip(&self.words) {
            let valid = mask(0..(pages - index * WORD_BITS).min(WORD_BITS));
            wire.extend((word.load(Ordering::Acquire) & valid).to_le_bytes());
        }
        wire
    }
}

fn place(page: u64) -> (usize, u64) {
    let word = usize::try_from(page / WORD_BITS).unwrap_or(usize::MAX);
    (word, 1 << (page % WORD_BITS))
}

/// Ones at `bits`, of 0..64.
fn mask(bits: Range<u64>) -> u64 {
    let below = |bit: u64| {
        if bit >= WORD_BITS {
            u64::MAX
        } else {
            (1 << bit) - 1
        }
    };
    below(bits.end) & !below(bits.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_set_of_pages() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..200 {
            let pages = rng.u64(1..300);
            let bitmap = PageBitmap::new(pages);
            let mut model = vec![false; usize::try_from(pages).unwrap()];
            for _ in 0..50 {
                let (a, b) = (rng.u64(0..pages + 70), rng.u64(0..pages + 70));
                let range = a.min(b)..a.max(b);
                let value = rng.bool();
                let inside = range.start.min(pages)..range.end.min(pages);
                let changed = model[inside.start as usize..inside.end as usize]
                    .iter_mut()
                    .filter_map(|bit| (std::mem::replace(bit, value) != value).then_some(()))
                    .count();
                let counted = match value {
                    true => bitmap.set_range(range),
                    false => bitmap.clear_range(range),
                };
                assert_eq!(counted, changed as u64);
                assert_eq!(
                    bitmap.count(),
                    model.iter().filter(|bit| **bit).count() as u64
                );
            }
            for page in 0..pages + 70 {
                let set = model.get(page as usize).copied().unwrap_or_default();
                assert_eq!(bitmap.get(page), set);
                let next = |value| {
                    let mut rest = model.iter().enumerate().skip(page as usize);
                    rest.find(|(_, bit)| **bit == value)
                        .map(|(at, _)| at as u64)
                };
                assert_eq!(bitmap.next_set(page), next(true));
                assert_eq!(bitmap.next_clear(page), next(false));
            }
            let of_runs: Vec<_> = bitmap.runs().flatten().collect();
            let of_model: Vec<_> = (0..pages).filter(|page| model[*page as usize]).collect();
            assert_eq!(of_runs, of_model);
        }
    }

    #[test]
    fn goes_over_the_wire_as_qemu_sends_it() {
        let bitmap = PageBitmap::new(300);
        bitmap.set_range(0..22);
        bitmap.set(299);
        let wire = bitmap.to_wire(256);
        assert_eq!(wire.len(), 32);
        assert_eq!(wire[..4], [0xff, 0xff, 0x3f, 0]);
        assert!(wire[4..].iter().all(|byte| *byte == 0));
        assert_eq!(bitmap.to_wire(1), [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bitmap.to_wire(300).len(), 40);
    }
}
