//! Figures that others watch while guest memory comes in.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of a histogram for each doubling of the time.
const STEPS: u64 = 4;
const BUCKETS: usize = 256;
const _: () = assert!(BUCKETS as u64 == u64::BITS as u64 * STEPS);

/// Figures that others watch while a destination works. They only grow.
#[derive(Debug, Default)]
pub struct RamDestinationStats {
    /// Guest pages that came, of any kind, each time they came.
    pub pages: AtomicU64,
    /// Those of them that came as one byte.
    pub zero_pages: AtomicU64,
    /// Those of them that came as XBZRLE.
    pub xbzrle_pages: AtomicU64,
    /// Those of them that came compressed.
    pub compressed_pages: AtomicU64,
    /// Host pages that were placed after POSTCOPY_LISTEN.
    pub placed: AtomicU64,
    /// Host pages that somebody waited for, and that were to be asked for.
    pub faults: AtomicU64,
    /// From when a fault was seen until its page was placed.
    pub fault_latency: Histogram,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Times, sorted into buckets that are at most a quarter wide.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

impl Histogram {
    /// Add a time.
    pub fn add(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if let Some(bucket) = self.buckets.get(bucket(nanoseconds)) {
            count(bucket);
        }
    }

    /// How many times there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        let buckets = self.buckets.iter();
        buckets.map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// A time that at least `percent` of all do not exceed; `None` without any. Half of them are
    /// below the 50th percentile, the median.
    #[must_use]
    pub fn percentile(&self, percent: u8) -> Option<Duration> {
        let all = self.count();
        let wanted = all.saturating_mul(percent.into()).div_ceil(100).max(1);
        let mut seen: u64 = 0;
        let found = self.buckets.iter().position(|bucket| {
            seen = seen.saturating_add(bucket.load(Ordering::Relaxed));
            seen >= wanted
        });
        found.map(|bucket| Duration::from_nanos(end(bucket)))
    }
}

/// Doublings, and quarters between them.
fn bucket(nanoseconds: u64) -> usize {
    let doublings = u64::from(nanoseconds.max(STEPS).ilog2());
    let step = (nanoseconds.max(STEPS) >> doublings.saturating_sub(2)) % STEPS;
    let bucket = doublings.saturating_mul(STEPS).saturating_add(step);
    usize::try_from(bucket).unwrap_or(BUCKETS)
}

/// The first time behind a bucket.
fn end(bucket: usize) -> u64 {
    let bucket = u64::try_from(bucket).unwrap_or(u64::MAX);
    let (doublings, step) = (bucket / STEPS, bucket % STEPS);
    let quarter = 1_u64
        .checked_shl(u32::try_from(doublings.saturating_sub(2)).unwrap_or(u32::MAX))
        .unwrap_or(u64::MAX);
    quarter.saturating_mul(STEPS.saturating_add(step).saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_lies_in_its_bucket() {
        for time in (0..200)
            .chain([1000, 1023, 1024, 1279, 1280, 199_999, 200_000])
            .chain([u64::MAX / 2, u64::MAX - 1])
        {
            let bucket = bucket(time);
            assert!(bucket < BUCKETS);
            assert!(time < end(bucket), "{time}");
            let widest = u128::from(time.max(4)) * 5 / 4 + 1;
            assert!(u128::from(end(bucket)) <= widest, "{time}");
        }
    }

    #[test]
    fn percentiles_are_above_what_they_promise() {
        let histogram = Histogram::default();
        assert_eq!(histogram.percentile(50), None);
        (1..=100).for_each(|time| histogram.add(Duration::from_micros(time)));
        assert_eq!(histogram.count(), 100);
        let micros = |percent| histogram.percentile(percent).unwrap().as_micros();
        assert!((50..=63).contains(&micros(50)), "{}", micros(50));
        assert!((99..=125).contains(&micros(99)), "{}", micros(99));
        assert!(micros(0) <= 1);
    }
}
