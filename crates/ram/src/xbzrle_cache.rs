//! Pages as they were sent last: what the next version of a page is encoded against.

use crate::block::{BlockIndex, PAGE_BYTES};

const PAGE_LENGTH: usize = 4096;
const _: () = assert!(PAGE_LENGTH as u64 == PAGE_BYTES);

/// A page as it was sent.
pub(crate) type Page = [u8; PAGE_LENGTH];

/// A page that has not been sent for so many passes gives way to another one.
const LIFETIME_PASSES: u64 = 2;

/// Pages as they were sent last, in bounded memory; each has one place where it may stay.
///
/// What is in it is exactly what the destination has: whoever sends a page says so here.
#[derive(Debug)]
pub(crate) struct XbzrleCache {
    slots: Vec<Slot>,
}

#[derive(Debug, Default)]
struct Slot {
    /// Of which block and page; means nothing without a page.
    key: (usize, u64),
    /// In which pass it was sent last.
    pass: u64,
    page: Option<Box<Page>>,
}

impl XbzrleCache {
    /// At most `bytes` of memory; `None` if no page fits.
    pub(crate) fn new(bytes: u64) -> Option<Self> {
        let slots = usize::try_from(bytes).ok()? / (PAGE_LENGTH + size_of::<Slot>());
        (slots > 0).then(|| Self {
            slots: std::iter::repeat_with(Slot::default).take(slots).collect(),
        })
    }

    /// The page as it was sent last, if it is known.
    pub(crate) fn sent(&mut self, block: BlockIndex, page: u64) -> Option<&mut Page> {
        let slot = self.slot(block, page)?;
        slot.page
            .as_deref_mut()
            .filter(|_| slot.key == (block.0, page))
    }

    /// The page was sent as `content` in this pass. It is remembered unless its place is taken by one
    /// that was sent just as lately.
    pub(crate) fn remember(&mut self, block: BlockIndex, page: u64, content: &Page, pass: u64) {
        let Some(slot) = self.slot(block, page) else {
            return;
        };
        let key = (block.0, page);
        let is_taken = slot.page.is_some() && slot.key != key;
        if is_taken && pass.saturating_sub(slot.pass) < LIFETIME_PASSES {
            return;
        }
        (slot.key, slot.pass) = (key, pass);
        match &mut slot.page {
            Some(page) => page.copy_from_slice(content),
            empty => *empty = Some(Box::new(*content)),
        }
    }

    /// Neighbours lie in neighbouring slots.
    fn slot(&mut self, block: BlockIndex, page: u64) -> Option<&mut Slot> {
        let spread = (block.0 as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let index = page.wrapping_add(spread) % self.slots.len().max(1) as u64;
        self.slots.get_mut(usize::try_from(index).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: BlockIndex = BlockIndex(0);
    const SLOT: u64 = PAGE_BYTES + size_of::<Slot>() as u64;

    #[test]
    fn is_no_larger_than_it_may_be() {
        assert!(XbzrleCache::new(0).is_none());
        assert!(XbzrleCache::new(SLOT - 1).is_none());
        assert_eq!(XbzrleCache::new(SLOT).expect("one").slots.len(), 1);
        assert_eq!(XbzrleCache::new(9 * SLOT - 1).expect("8").slots.len(), 8);
    }

    #[test]
    fn knows_what_was_sent_last() {
        let mut cache = XbzrleCache::new(4 * SLOT).expect("some");
        assert_eq!(cache.sent(RAM, 1), None);
        cache.remember(RAM, 1, &[1; PAGE_LENGTH], 2);
        cache.remember(RAM, 2, &[2; PAGE_LENGTH], 2);
        assert_eq!(cache.sent(RAM, 1), Some(&mut [1; PAGE_LENGTH]));
        cache.remember(RAM, 1, &[3; PAGE_LENGTH], 2);
        assert_eq!(cache.sent(RAM, 1), Some(&mut [3; PAGE_LENGTH]));
        assert_eq!(cache.sent(RAM, 2), Some(&mut [2; PAGE_LENGTH]));
        assert_eq!(cache.sent(RAM, 5), None, "it has the place of page 1");
        assert_eq!(cache.sent(BlockIndex(1), 1), None);
    }

    #[test]
    fn a_page_keeps_its_place_for_two_passes() {
        let mut cache = XbzrleCache::new(4 * SLOT).expect("some");
        cache.remember(RAM, 1, &[1; PAGE_LENGTH], 2);
        cache.remember(RAM, 5, &[5; PAGE_LENGTH], 3);
        assert_eq!(cache.sent(RAM, 5), None);
        assert_eq!(cache.sent(RAM, 1), Some(&mut [1; PAGE_LENGTH]));
        cache.remember(RAM, 5, &[5; PAGE_LENGTH], 4);
        assert_eq!(cache.sent(RAM, 5), Some(&mut [5; PAGE_LENGTH]));
        assert_eq!(cache.sent(RAM, 1), None);
    }
}
