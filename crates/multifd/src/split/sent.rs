//! Which pages went out since the channels were synchronised.

use std::collections::{BTreeMap, HashMap};

use vmferry_stream::{Name, PageBits};

/// Pages of one piece of the bitmap: 16 MiB of memory with pages of 4 KiB.
const PIECE_PAGES: u64 = 4096;
const PIECE_WORDS: usize = 64;

/// Two versions of a page must not be under way on two connections: the older one could arrive last.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    /// Index and used length of each block.
    blocks: BTreeMap<Name, (u64, u64)>,
    /// Bitmaps of pages, where there are any.
    pieces: HashMap<(u64, u64), Box<[u64; PIECE_WORDS]>>,
}

impl Sent {
    /// The stream has this block.
    pub(crate) fn add_block(&mut self, name: Name, used_bytes: u64) {
        let index = u64::try_from(self.blocks.len()).unwrap_or(u64::MAX);
        self.blocks.insert(name, (index, used_bytes));
    }

    /// Note a page. Whether it was noted before; `None` if it is not in its block.
    pub(crate) fn note(&mut self, block: &Name, offset: u64, page: PageBits) -> Option<bool> {
        let (block, used_bytes) = *self.blocks.get(block)?;
        if used_bytes
            .checked_sub(u64::from(page.bytes()))
            .is_none_or(|last| offset > last)
        {
            return None;
        }
        let number = offset >> page.bits();
        let piece = self
            .pieces
            .entry((block, number / PIECE_PAGES))
            .or_insert_with(|| Box::new([0; PIECE_WORDS]));
        let within = number % PIECE_PAGES;
        let word = piece.get_mut(usize::try_from(within / 64).ok()?)?;
        let bit = 1 << (within % 64);
        let was = *word & bit != 0;
        *word |= bit;
        Some(was)
    }

    /// Has anything gone out?
    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The channels were synchronised.
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_noted_once() {
        let (mut sent, mut model) = (Sent::default(), std::collections::HashSet::new());
        let mut rng = crate::test_rng();
        let names = ["a", "b"].map(|name| Name::new(name).expect("short"));
        for name in &names {
            sent.add_block(name.clone(), 10_000 << 12);
        }
        for round in 0..60_000 {
            let (block, page) = (rng.usize(..2), rng.u64(..10_000));
            let was = sent.note(&names[block], page << 12, PageBits::X86);
            assert_eq!(was, Some(!model.insert((block, page))));
            if round % 20_000 == 0 {
                sent.clear();
                model.clear();
            }
        }
        assert_eq!(sent.note(&names[0], 10_000 << 12, PageBits::X86), None);
        assert_eq!(sent.note(&names[0], u64::MAX << 12, PageBits::X86), None);
        let unknown = Name::new("c").expect("short");
        assert_eq!(sent.note(&unknown, 0, PageBits::X86), None);
    }
}
