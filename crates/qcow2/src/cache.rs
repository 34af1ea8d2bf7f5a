//! Slices of tables in memory, of a bounded number.
//!
//! A slice is *dirty* from a change until a write-back takes it, and *writing* until that has
//! ended. A slice that is either can't be thrown out (a dirty one can if the caller writes it
//! first), so what is read again from the file is never older than what was known.

use std::collections::HashMap;
use std::sync::Arc;

#[derive(Debug)]
struct Slot {
    key: u64,
    bytes: Arc<Vec<u8>>,
    dirty: bool,
    writing: bool,
    used: bool,
}

/// A slice to be written: where, and what.
pub(crate) type Slice = (u64, Arc<Vec<u8>>);

#[derive(Debug)]
pub(crate) struct SliceCache {
    slots: Vec<Slot>,
    /// Slot of a host offset.
    index: HashMap<u64, usize>,
    capacity: usize,
    hand: usize,
    dirty: usize,
    /// Counts the slices thrown out: a slice that was read while this changed may be old.
    unloads: u64,
}

impl SliceCache {
    pub(crate) fn new(bytes: usize, slice_bytes: u64) -> Self {
        Self {
            slots: Vec::new(),
            index: HashMap::new(),
            capacity: (bytes / usize::try_from(slice_bytes).unwrap_or(usize::MAX)).max(16),
            hand: 0,
            dirty: 0,
            unloads: 0,
        }
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    pub(crate) fn dirty(&self) -> usize {
        self.dirty
    }

    pub(crate) fn unloads(&self) -> u64 {
        self.unloads
    }

    pub(crate) fn contains(&self, key: u64) -> bool {
        self.index.contains_key(&key)
    }

    pub(crate) fn get(&mut self, key: u64) -> Option<&[u8]> {
        let slot = self.slots.get_mut(*self.index.get(&key)?)?;
        slot.used = true;
        Some(&slot.bytes)
    }

    /// For a change: the slice is dirty from now on.
    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut [u8]> {
        let slot = self.slots.get_mut(*self.index.get(&key)?)?;
        slot.used = true;
        if !slot.dirty {
            slot.dirty = true;
            self.dirty += 1;
        }
        Some(Arc::make_mut(&mut slot.bytes).as_mut_slice())
    }

    /// Put a clean slice in. If that throws a dirty one out, which happens only with
    /// `dirty_may_go`, the caller must write it before it does anything else.
    pub(crate) fn insert(&mut self, key: u64, bytes: Vec<u8>, dirty_may_go: bool) -> Option<Slice> {
        let slot = Slot {
            key,
            bytes: Arc::new(bytes),
            dirty: false,
            writing: false,
            used: true,
        };
        if let Some(&place) = self.index.get(&key) {
            debug_assert!(false, "a slice is loaded twice");
            if let Some(old) = self.slots.get_mut(place) {
                self.dirty -= usize::from(old.dirty);
                *old = slot;
            }
            return None;
        }
        let victim = match self.slots.len() < self.capacity {
            true => None,
            false => self.find_victim(dirty_may_go),
        };
        let Some(place) = victim else {
            self.index.insert(key, self.slots.len());
            self.slots.push(slot);
            return None;
        };
        self.index.insert(key, place);
        let old = std::mem::replace(self.slots.get_mut(place)?, slot);
        self.index.remove(&old.key);
        self.unloads += 1;
        self.dirty -= usize::from(old.dirty);
        old.dirty.then_some((old.key, old.bytes))
    }

    fn find_victim(&mut self, dirty_may_go: bool) -> Option<usize> {
        let count = self.slots.len();
        // Twice around: the first time takes the marks of use away.
        for _ in 0..2 * count {
            self.hand = (self.hand + 1) % count;
            let slot = self.slots.get_mut(self.hand)?;
            let bound = slot.writing || (slot.dirty && !dirty_may_go);
            if !bound && !std::mem::take(&mut slot.used) {
                return Some(self.hand);
            }
        }
        None
    }

    /// Take all dirty slices for a write-back, in the order of the file.
    pub(crate) fn begin_write(&mut self) -> Vec<Slice> {
        let mut taken = Vec::with_capacity(self.dirty);
        for slot in &mut self.slots {
            if std::mem::take(&mut slot.dirty) {
                slot.writing = true;
                taken.push((slot.key, Arc::clone(&slot.bytes)));
            }
        }
        self.dirty = 0;
        taken.sort_unstable_by_key(|slice| slice.0);
        taken
    }

    /// A write-back has ended. What could not be written is dirty again.
    pub(crate) fn end_write(&mut self, taken: &[Slice], written: bool) {
        for (key, _) in taken {
            let slot = self
                .index
                .get(key)
                .and_then(|&place| self.slots.get_mut(place));
            if let Some(slot) = slot {
                slot.writing = false;
                if !written && !slot.dirty {
                    slot.dirty = true;
                    self.dirty += 1;
                }
            }
        }
    }

    /// All slices that may be newer than the file, as they are; they stay dirty or writing.
    pub(crate) fn peek_unwritten(&self) -> Vec<Slice> {
        let dirty = self.slots.iter().filter(|slot| slot.dirty || slot.writing);
        let mut slices: Vec<_> = dirty
            .map(|slot| (slot.key, Arc::clone(&slot.bytes)))
            .collect();
        slices.sort_unstable_by_key(|slice| slice.0);
        slices
    }

    /// Forget the slices of a cluster that is free now, changes and all.
    pub(crate) fn forget(&mut self, range: std::ops::Range<u64>, slice_bytes: u64) {
        for key in range.step_by(usize::try_from(slice_bytes).unwrap_or(usize::MAX)) {
            let Some(&place) = self.index.get(&key) else {
                continue;
            };
            let removed = self.slots.swap_remove(place);
            self.index.remove(&key);
            self.unloads += 1;
            self.dirty -= usize::from(removed.dirty);
            if let Some(moved) = self.slots.get(place) {
                self.index.insert(moved.key, place);
            }
        }
    }
}
