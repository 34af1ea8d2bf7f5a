//! What became of each page of a block: two bits.

use std::collections::BTreeMap;

/// Pages of one region: 128 MiB of the usual pages.
const REGION_PAGES: u64 = 32_768;
const REGION_WORDS: usize = 512;
/// Regions that are tracked, in all blocks together: 32 MiB of memory, 512 GiB of the usual pages.
pub(crate) const MAX_REGIONS: usize = 4096;

/// Which pages of a block came, and which of these hold data in the file.
///
/// Beyond [`MAX_REGIONS`] nothing is remembered: then a page counts as one that holds data, which
/// costs holes in the file, but nothing else.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    regions: BTreeMap<u64, Box<Region>>,
    /// Something went by that is not remembered.
    pub(crate) forgetful: bool,
}

#[derive(Debug)]
struct Region {
    came: [u64; REGION_WORDS],
    data: [u64; REGION_WORDS],
}

/// What is known of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Page {
    /// It did not come, or was discarded.
    Absent,
    /// It came and is a hole, or zeroes in the file.
    Zero,
    /// It came, and the file holds it.
    Data,
}

impl Pages {
    pub(crate) fn get(&self, page: u64) -> Page {
        let (region, word, bit) = place(page);
        match self.regions.get(&region) {
            None if self.forgetful => Page::Data,
            None => Page::Absent,
            Some(region) => match (has(&region.came, word, bit), has(&region.data, word, bit)) {
                (false, _) => Page::Absent,
                (true, false) => Page::Zero,
                (true, true) => Page::Data,
            },
        }
    }

    /// The page came. `regions` counts those of all blocks.
    pub(crate) fn set(&mut self, page: u64, data: bool, regions: &mut usize) {
        let (region, word, bit) = place(page);
        if !self.regions.contains_key(&region) {
            if *regions >= MAX_REGIONS {
                self.forgetful = true;
                return;
            }
            *regions = regions.saturating_add(1);
        }
        let region = self.regions.entry(region).or_insert_with(|| {
            Box::new(Region {
                came: [0; REGION_WORDS],
                data: [0; REGION_WORDS],
            })
        });
        put(&mut region.came, word, bit, true);
        put(&mut region.data, word, bit, data);
    }

    /// Forget the pages `start..end`; tell of each that held data.
    pub(crate) fn discard<E>(
        &mut self,
        start: u64,
        end: u64,
        mut had_data: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<(), E> {
        let first = start.checked_div(REGION_PAGES).unwrap_or(0);
        let last = end.checked_div(REGION_PAGES).unwrap_or(0);
        for (number, region) in self.regions.range_mut(first..=last) {
            let base = number.saturating_mul(REGION_PAGES);
            let from = start.max(base);
            let to = end.min(base.saturating_add(REGION_PAGES));
            for page in from..to {
                let (_, word, bit) = place(page);
                if has(&region.data, word, bit) {
                    had_data(page)?;
                }
                put(&mut region.came, word, bit, false);
                put(&mut region.data, word, bit, false);
            }
        }
        Ok(())
    }

    /// How many came as zero, and how many hold data.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let count = |words: &[u64; REGION_WORDS]| -> u64 {
            words.iter().map(|word| u64::from(word.count_ones())).sum()
        };
        let regions = self.regions.values();
        let (came, data) = regions.fold((0_u64, 0_u64), |(came, data), region| {
            let (more_came, more_data) = (count(&region.came), count(&region.data));
            (
                came.saturating_add(more_came),
                data.saturating_add(more_data),
            )
        });
        (came.saturating_sub(data), data)
    }
}

/// Region, word in it, bit in that.
fn place(page: u64) -> (u64, usize, u32) {
    let word = (page >> 6) & 511;
    let bit = u32::try_from(page & 63).unwrap_or(0);
    (page >> 15, usize::try_from(word).unwrap_or(0), bit)
}

fn has(words: &[u64; REGION_WORDS], word: usize, bit: u32) -> bool {
    words.get(word).is_some_and(|word| word & 1 << bit != 0)
}

fn put(words: &mut [u64; REGION_WORDS], word: usize, bit: u32, value: bool) {
    if let Some(word) = words.get_mut(word) {
        *word = if value {
            *word | 1 << bit
        } else {
            *word & !(1 << bit)
        };
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    #[test]
    fn a_page_is_what_came_last() {
        let mut pages = Pages::default();
        let mut regions = 0;
        for page in [0, 63, 64, 32_767, 32_768, 1 << 40] {
            assert_eq!(pages.get(page), Page::Absent, "{page}");
            pages.set(page, true, &mut regions);
            assert_eq!(pages.get(page), Page::Data, "{page}");
        }
        pages.set(64, false, &mut regions);
        assert_eq!(pages.get(64), Page::Zero);
        assert_eq!(pages.get(65), Page::Absent);
        assert_eq!((regions, pages.counts()), (3, (1, 5)));
    }

    #[test]
    fn a_range_of_any_length_is_forgotten_at_once() {
        let mut pages = Pages::default();
        let mut regions = 0;
        for page in [5, 6, 40_000, 1 << 40] {
            pages.set(page, page != 6, &mut regions);
        }
        let mut held = Vec::new();
        let done: Result<(), Infallible> = pages.discard(6, 1 << 51, |page| {
            held.push(page);
            Ok(())
        });
        assert_eq!(done, Ok(()));
        assert_eq!(held, [40_000, 1 << 40]);
        assert_eq!(pages.counts(), (0, 1));
        assert_eq!(pages.get(5), Page::Data);
    }

    #[test]
    fn beyond_its_bound_it_takes_every_page_for_data() {
        let mut pages = Pages::default();
        let mut regions = MAX_REGIONS - 1;
        pages.set(0, true, &mut regions);
        assert!(!pages.forgetful);
        pages.set(1 << 20, false, &mut regions);
        assert!(pages.forgetful);
        assert_eq!(pages.get(1 << 20), Page::Data);
        assert_eq!(pages.get(1), Page::Absent);
    }
}
