//! Chunks of the page table that were used before.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::chunk::Chunk;

/// Chunks that are kept: 6 MiB, 2 GiB of guest memory.
pub(crate) const CHUNKS_MAX: usize = 1024;

/// Chunks by number, for several threads.
#[derive(Debug, Default)]
pub(crate) struct Cache(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    chunks: HashMap<u64, Arc<Chunk>>,
    /// Oldest first; the same ones.
    order: VecDeque<u64>,
}

impl Cache {
    pub(crate) fn get(&self, number: u64) -> Option<Arc<Chunk>> {
        self.inner().chunks.get(&number).cloned()
    }

    pub(crate) fn put(&self, number: u64, chunk: Arc<Chunk>) {
        let mut inner = self.inner();
        if inner.chunks.insert(number, chunk).is_some() {
            return;
        }
        inner.order.push_back(number);
        if inner.order.len() > CHUNKS_MAX
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.chunks.remove(&oldest);
        }
    }

    /// A map is whole between statements.
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::super::chunk::Place;
    use super::*;

    #[test]
    fn holds_so_many() {
        let cache = Cache::default();
        let chunk = Arc::new(Chunk::filled(Place::ZERO));
        let count = CHUNKS_MAX as u64;
        for number in 0..count {
            cache.put(number, Arc::clone(&chunk));
            cache.put(number, Arc::clone(&chunk));
        }
        assert!((0..count).all(|number| cache.get(number).is_some()));
        cache.put(count, chunk);
        assert!(cache.get(0).is_none());
        assert!((1..=count).all(|number| cache.get(number).is_some()));
    }
}
