//! Pages that somebody waits for, first come first.
//!
//! ```text
//!   fault ─▶ queue ─▶ asked ─▶ placed
//!              ▲        │
//!              └────────┘ the connection broke: all of them again, in their order
//! ```
//!
//! No page is in it twice; so there are never more than the guest has host pages, and in fact about
//! as many as there are threads that touch its memory.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::stats::{RamDestinationStats, count};

/// A host page: index of the block, offset in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct HostPage {
    pub(super) block: usize,
    pub(super) offset: u64,
}

/// Who waits for what.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pages: Mutex<Pages>,
    arrived: Condvar,
    stats: Arc<RamDestinationStats>,
}

#[derive(Debug, Default)]
struct Pages {
    /// Pages that were not asked for, or must be asked for again; some may have come meanwhile.
    queue: VecDeque<HostPage>,
    /// Pages that were asked for, in their order; some may have come meanwhile.
    asked: VecDeque<HostPage>,
    /// All pages that somebody waits for, and since when.
    waiting: HashMap<HostPage, Instant>,
    /// Nothing will be asked for any more.
    is_closed: bool,
}

impl Requests {
    pub(super) fn new(stats: Arc<RamDestinationStats>) -> Self {
        Self {
            stats,
            ..Self::default()
        }
    }

    /// Somebody waits for a page since `seen`. `is_here` is asked whether it came meanwhile: then
    /// nothing happens, and the answer is false.
    pub(super) fn fault(
        &self,
        page: HostPage,
        seen: Instant,
        is_here: impl FnOnce() -> bool,
    ) -> Fault {
        let mut pages = self.lock();
        // Under the lock: who places a page marks it first, and comes here then.
        if is_here() {
            return Fault::Here;
        }
        if pages.waiting.contains_key(&page) {
            return Fault::Known;
        }
        count(&self.stats.faults);
        pages.waiting.insert(page, seen);
        pages.queue.push_back(page);
        drop(pages);
        self.arrived.notify_all();
        Fault::New
    }

    /// A page was placed, and marked as received: did somebody wait for it?
    pub(super) fn placed(&self, page: HostPage) -> bool {
        let seen = self.lock().waiting.remove(&page);
        if let Some(seen) = seen {
            self.stats.fault_latency.add(seen.elapsed());
        }
        seen.is_some()
    }

    /// The next page to ask for; waits for one until the deadline.
    pub(super) fn next(&self, deadline: Instant) -> Option<HostPage> {
        let mut pages = self.lock();
        loop {
            if let Some(page) = pages.ask() {
                return Some(page);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || pages.is_closed {
                return None;
            }
            let waited = self.arrived.wait_timeout(pages, left);
            (pages, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What was asked for must be asked for again.
    pub(super) fn ask_again(&self) {
        let mut pages = self.lock();
        let asked = std::mem::take(&mut pages.asked);
        let mut queue = asked;
        queue.extend(pages.queue.drain(..));
        queue.retain(|page| pages.waiting.contains_key(page));
        pages.queue = queue;
        drop(pages);
        self.arrived.notify_all();
    }

    /// Nobody will wait any more.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.arrived.notify_all();
    }

    /// Entries that take memory.
    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        let pages = self.lock();
        pages.queue.len() + pages.asked.len() + pages.waiting.len()
    }

    fn lock(&self) -> MutexGuard<'_, Pages> {
        // Every change under the lock is whole.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Somebody else waits for the page already.
    Known,
    /// The page will be asked for.
    New,
    /// The page is here.
    Here,
}

impl Pages {
    fn ask(&mut self) -> Option<HostPage> {
        while let Some(page) = self.queue.pop_front() {
            if self.waiting.contains_key(&page) {
                self.forget_asked();
                self.asked.push_back(page);
                return Some(page);
            }
        }
        None
    }

    /// Drop what came, now and then, so that this grows no longer than what is waited for.
    fn forget_asked(&mut self) {
        if self.asked.len() > self.waiting.len().saturating_mul(2).saturating_add(64) {
            self.asked.retain(|page| self.waiting.contains_key(page));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn page(offset: u64) -> HostPage {
        HostPage { block: 0, offset }
    }

    fn fault(requests: &Requests, offset: u64) -> Fault {
        requests.fault(page(offset), Instant::now(), || false)
    }

    fn all(requests: &Requests) -> Vec<u64> {
        let next = || requests.next(Instant::now()).map(|page| page.offset);
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn first_come_first_and_each_once() {
        let requests = Requests::default();
        for offset in [3, 1, 3, 2, 1] {
            fault(&requests, offset);
        }
        assert_eq!(fault(&requests, 2), Fault::Known);
        assert_eq!(requests.next(Instant::now()), Some(page(3)));
        assert_eq!(fault(&requests, 3), Fault::Known);
        assert!(requests.placed(page(1)));
        assert_eq!(all(&requests), [2]);
        assert!(!requests.placed(page(1)));
        let here = requests.fault(page(1), Instant::now(), || true);
        assert_eq!(here, Fault::Here);
        assert_eq!(all(&requests), [0_u64; 0]);
    }

    #[test]
    fn what_did_not_come_is_asked_for_again_in_its_order() {
        let requests = Requests::default();
        for offset in 0..6 {
            fault(&requests, offset);
        }
        for offset in 0..4 {
            assert_eq!(requests.next(Instant::now()), Some(page(offset)));
        }
        requests.placed(page(1));
        requests.placed(page(5));
        requests.ask_again();
        assert_eq!(requests.next(Instant::now()), Some(page(0)));
        requests.ask_again();
        fault(&requests, 9);
        assert_eq!(all(&requests), [0, 2, 3, 4, 9]);
        requests.ask_again();
        assert_eq!(all(&requests), [0, 2, 3, 4, 9]);
    }

    #[test]
    fn what_came_takes_no_room() {
        let requests = Requests::default();
        for offset in 0..10_000 {
            fault(&requests, offset);
            assert!(requests.next(Instant::now()).is_some());
            requests.placed(page(offset));
        }
        assert!(requests.lock().asked.len() < 100);
        assert!(requests.lock().waiting.is_empty());
    }

    #[test]
    fn closing_ends_a_wait() {
        let requests = Requests::default();
        let far = Instant::now() + Duration::from_secs(3600);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| requests.next(far));
            fault(&requests, 7);
            assert_eq!(waiting.join().unwrap(), Some(page(7)));
            let waiting = scope.spawn(|| requests.next(far));
            requests.close();
            assert_eq!(waiting.join().unwrap(), None);
        });
    }
}
