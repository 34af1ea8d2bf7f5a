//! A limit on the bytes that a writer may send, in slices of 100 ms.
//!
//! Slices lie on a fixed grid from the first use on, so that no slice, not even one that begins
//! late, carries more than its share. What was not used in a slice is lost: a channel that was
//! idle does not burst.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Length of a slice.
pub const SLICE: Duration = Duration::from_millis(100);
const SLICES_PER_SECOND: u64 = 10;

/// The arithmetic of the limit, without a clock: `now` is an argument and never goes back.
#[derive(Clone, Debug, Default)]
pub struct SliceBudget {
    /// Start of the current slice; `None` before the first use.
    start: Option<Instant>,
    /// Bytes spent in the current slice, with what earlier slices overspent.
    spent: u64,
}

impl SliceBudget {
    /// Bytes that may be sent now under a limit of `slice_bytes` for each slice.
    pub fn allowance(&mut self, slice_bytes: u64, now: Instant) -> u64 {
        let start = *self.start.get_or_insert(now);
        let slices =
            u64::try_from(now.saturating_duration_since(start).as_millis() / SLICE.as_millis())
                .unwrap_or(u64::MAX);
        if slices > 0 {
            self.start = grid(start, slices).or(Some(now));
            // A limit that fell leaves a debt, which later slices pay.
            self.spent = self
                .spent
                .saturating_sub(slice_bytes.saturating_mul(slices));
        }
        slice_bytes.saturating_sub(self.spent)
    }

    /// Count bytes that were sent.
    pub fn spend(&mut self, bytes: u64) {
        self.spent = self.spent.saturating_add(bytes);
    }

    /// When the next slice begins.
    #[must_use]
    pub fn next_slice(&self, now: Instant) -> Instant {
        self.start.map_or(now, |start| start + SLICE)
    }
}

fn grid(start: Instant, slices: u64) -> Option<Instant> {
    start.checked_add(SLICE.checked_mul(u32::try_from(slices).ok()?)?)
}

/// A limit that can be changed while writers use it. Clones are the same limit; writers that share
/// one share its bytes.
#[derive(Clone, Debug, Default)]
pub struct RateLimit {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// 0 stands for no limit.
    bytes_per_second: AtomicU64,
    budget: Mutex<SliceBudget>,
}

impl RateLimit {
    /// No limit, until one is set.
    #[must_use]
    pub fn unlimited() -> Self {
        Self::default()
    }

    /// A limit in bytes per second; 0 is none.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        let limit = Self::default();
        limit.set(bytes_per_second);
        limit
    }

    /// Change the limit, in bytes per second; 0 is none. A writer that waits for its next slice
    /// notices at the end of this one.
    pub fn set(&self, bytes_per_second: u64) {
        self.shared
            .bytes_per_second
            .store(bytes_per_second, Ordering::Relaxed);
    }

    /// The limit in bytes per second; `None` when there is none.
    #[must_use]
    pub fn bytes_per_second(&self) -> Option<u64> {
        match self.shared.bytes_per_second.load(Ordering::Relaxed) {
            0 => None,
            limit => Some(limit),
        }
    }

    /// Bytes that may be sent now; `u64::MAX` without a limit.
    #[must_use]
    pub fn allowance(&self, now: Instant) -> u64 {
        self.slice_bytes()
            .map_or(u64::MAX, |bytes| self.budget().allowance(bytes, now))
    }

    /// Count bytes that were sent.
    pub fn spent(&self, bytes: u64) {
        if self.slice_bytes().is_some() {
            self.budget().spend(bytes);
        }
    }

    /// When the next slice begins.
    #[must_use]
    pub fn next_slice(&self, now: Instant) -> Instant {
        self.budget().next_slice(now)
    }

    /// At least one byte, or the smallest limits would stop a channel for ever.
    fn slice_bytes(&self) -> Option<u64> {
        self.bytes_per_second()
            .map(|bytes| (bytes / SLICES_PER_SECOND).max(1))
    }

    fn budget(&self) -> MutexGuard<'_, SliceBudget> {
        self.shared
            .budget
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_slice_after_the_other() {
        let start = Instant::now();
        let limit = RateLimit::new(1000);
        assert_eq!(limit.allowance(start), 100);
        limit.spent(60);
        assert_eq!(limit.allowance(start + SLICE / 2), 40);
        limit.spent(40);
        assert_eq!(limit.allowance(start + SLICE / 2), 0);
        assert_eq!(limit.next_slice(start + SLICE / 2), start + SLICE);
        assert_eq!(limit.allowance(start + SLICE), 100);
        // Ten idle slices are worth one.
        assert_eq!(limit.allowance(start + 11 * SLICE), 100);
        assert_eq!(limit.next_slice(start + 11 * SLICE), start + 12 * SLICE);
    }

    #[test]
    fn changes_take_effect_at_once_and_debts_are_paid() {
        let start = Instant::now();
        let limit = RateLimit::unlimited();
        assert_eq!(limit.allowance(start), u64::MAX);
        limit.spent(1 << 40);
        limit.set(10_000);
        assert_eq!(limit.allowance(start), 1000, "free bytes are not owed");
        limit.spent(1000);
        limit.set(4000);
        assert_eq!(limit.allowance(start), 0);
        assert_eq!(limit.allowance(start + SLICE), 0, "600 bytes are owed");
        assert_eq!(limit.allowance(start + 2 * SLICE), 200);
        limit.clone().set(0);
        assert_eq!(limit.allowance(start + 2 * SLICE), u64::MAX);
        assert_eq!(limit.bytes_per_second(), None);
    }

    #[test]
    fn the_smallest_limit_still_moves() {
        let start = Instant::now();
        let limit = RateLimit::new(1);
        assert_eq!(limit.allowance(start), 1);
        limit.spent(1);
        assert_eq!(limit.allowance(start + SLICE), 1);
    }

    #[test]
    fn a_clock_that_jumps_far_does_no_harm() {
        let start = Instant::now();
        let mut budget = SliceBudget::default();
        assert_eq!(budget.allowance(u64::MAX, start), u64::MAX);
        budget.spend(u64::MAX);
        let far = start + Duration::from_secs(1 << 40);
        assert_eq!(budget.allowance(5, far), 0, "a debt is paid slice by slice");
        assert_eq!(budget.allowance(u64::MAX, far + SLICE), u64::MAX);
    }

    #[test]
    fn no_slice_ever_carries_more_than_its_limit() {
        let mut rng = crate::test_rng();
        let start = Instant::now();
        for _ in 0..100 {
            let bytes_per_second = rng.u64(1..1 << 20);
            let slice_bytes = (bytes_per_second / 10).max(1);
            let limit = RateLimit::new(bytes_per_second);
            let mut now = start;
            let mut sent_in_slice = std::collections::BTreeMap::<u128, u64>::new();
            for _ in 0..1000 {
                let wanted = rng.u64(1..=2 * slice_bytes);
                let bytes = wanted.min(limit.allowance(now));
                limit.spent(bytes);
                *sent_in_slice
                    .entry((now - start).as_millis() / 100)
                    .or_default() += bytes;
                now = if bytes == 0 && rng.bool() {
                    let next = limit.next_slice(now);
                    assert!(next > now && next - now <= SLICE);
                    next
                } else {
                    now + Duration::from_micros(rng.u64(0..150_000))
                };
            }
            for (slice, bytes) in sent_in_slice {
                assert!(
                    bytes <= slice_bytes,
                    "slice {slice}: {bytes} > {slice_bytes}"
                );
            }
        }
    }
}
