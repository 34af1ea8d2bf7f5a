//! The memory that all connections of a server share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::line::Line;

/// Large requests that may exceed the budget together. So there is always one that goes on,
/// whatever the others wait for.
const RESERVED_REQUESTS: u64 = 2;

/// Requests and bytes that are not done.
#[derive(Debug, Default)]
pub(crate) struct Account {
    bytes: AtomicU64,
    requests: AtomicU64,
}

impl Account {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
        self.requests.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn subtract(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::SeqCst);
        self.requests.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Where an outstanding request's bytes are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Budget,
    Reserve,
}

/// What may be outstanding in all connections, and who waits for some of it.
///
/// Small requests are counted, never refused: a connection takes one at a time when the budget is
/// used up. A large one is admitted only if it fits, or from the reserve.
#[derive(Debug)]
pub(crate) struct Budget {
    bytes_max: u64,
    bytes: AtomicU64,
    reserved: AtomicU64,
    anyone_waits: AtomicBool,
    waiting: Mutex<Vec<Weak<Line>>>,
}

impl Budget {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self {
            bytes_max,
            bytes: AtomicU64::new(0),
            reserved: AtomicU64::new(0),
            anyone_waits: AtomicBool::new(false),
            waiting: Mutex::default(),
        }
    }

    pub(crate) fn is_used_up(&self) -> bool {
        self.bytes.load(Ordering::SeqCst) >= self.bytes_max
    }

    /// Does somebody need what others have?
    pub(crate) fn is_scarce(&self) -> bool {
        self.is_used_up() || self.anyone_waits.load(Ordering::SeqCst)
    }

    pub(crate) fn take(&self, bytes: u64) -> Source {
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
        Source::Budget
    }

    /// None if it does not fit and the reserve is in use or not for the asker.
    pub(crate) fn try_take(&self, bytes: u64, may_use_reserve: bool) -> Option<Source> {
        if add_up_to(&self.bytes, bytes, self.bytes_max) {
            return Some(Source::Budget);
        }
        (may_use_reserve && add_up_to(&self.reserved, 1, RESERVED_REQUESTS))
            .then_some(Source::Reserve)
    }

    pub(crate) fn give_back(&self, bytes: u64, source: Source) {
        match source {
            Source::Budget => self.bytes.fetch_sub(bytes, Ordering::SeqCst),
            Source::Reserve => self.reserved.fetch_sub(1, Ordering::SeqCst),
        };
        if self.anyone_waits.swap(false, Ordering::SeqCst) {
            let waiting = std::mem::take(&mut *self.waiting());
            for line in waiting.iter().filter_map(Weak::upgrade) {
                line.wake();
            }
        }
    }

    /// Wake this connection when something comes back. It must try once more before it sleeps.
    pub(crate) fn wake_later(&self, line: &Arc<Line>) {
        let line = Arc::downgrade(line);
        let mut waiting = self.waiting();
        if !waiting.iter().any(|known| known.ptr_eq(&line)) {
            waiting.push(line);
        }
        self.anyone_waits.store(true, Ordering::SeqCst);
    }

    fn waiting(&self) -> MutexGuard<'_, Vec<Weak<Line>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Add if the sum is not above the maximum.
fn add_up_to(counter: &AtomicU64, count: u64, max: u64) -> bool {
    counter
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |now| {
            now.checked_add(count).filter(|sum| *sum <= max)
        })
        .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_requests_fit_or_come_from_the_reserve_or_wait() {
        let budget = Budget::new(100);
        assert_eq!(budget.try_take(100, false), Some(Source::Budget));
        assert!(budget.is_used_up());
        assert_eq!(budget.try_take(1, false), None);
        assert_eq!(budget.try_take(1000, true), Some(Source::Reserve));
        assert_eq!(budget.try_take(1000, true), Some(Source::Reserve));
        assert_eq!(budget.try_take(1000, true), None);
        assert_eq!(
            budget.take(5),
            Source::Budget,
            "small ones are only counted"
        );
        budget.give_back(5, Source::Budget);
        budget.give_back(1000, Source::Reserve);
        assert_eq!(budget.try_take(1, true), Some(Source::Reserve));
        budget.give_back(100, Source::Budget);
        assert_eq!(budget.try_take(101, false), None);
        assert_eq!(budget.try_take(100, true), Some(Source::Budget));
    }
}
