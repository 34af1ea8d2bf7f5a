//! When to look at the dirty log again, and what was probably written since.

use std::time::{Duration, Instant};

/// Where what is left hardly matters, the log is asked again after ten times as long as it takes to
/// ask, and not sooner than this: each look makes the guest's next writes a little slower.
const RECENT: Duration = Duration::from_millis(100);
const COST_FACTOR: u32 = 10;

/// Where it matters, not sooner than this.
const VERY_RECENT: Duration = Duration::from_millis(5);

/// Rates are measured over no less: one page in a microsecond says nothing about a second.
const RATE_PERIOD_MIN: Duration = Duration::from_millis(50);

/// What is known of the dirty log. Time is an argument.
#[derive(Debug)]
pub(crate) struct Watch {
    /// When the log was asked last, and how long that took.
    asked_at: Instant,
    took: Duration,
    /// Nothing was sent since.
    is_fresh: bool,
    pages_per_second: f64,
    /// What the log told of since then, and is not in the rate.
    counted_since: Instant,
    counted_pages: u64,
    /// At the end of the period before.
    wire_bytes: u64,
}

impl Watch {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            asked_at: now,
            took: Duration::ZERO,
            is_fresh: false,
            pages_per_second: 0.0,
            counted_since: now,
            counted_pages: 0,
            wire_bytes: 0,
        }
    }

    /// Pages were sent.
    pub(crate) fn sent(&mut self) {
        self.is_fresh = false;
    }

    /// The log told of so many pages that were not known to be dirty; the time since it was asked
    /// before that.
    pub(crate) fn collected(&mut self, now: Instant, took: Duration, newly: u64) -> Duration {
        let period = now.saturating_duration_since(self.asked_at);
        self.counted_pages += newly;
        let counted = now.saturating_duration_since(self.counted_since);
        if counted >= RATE_PERIOD_MIN {
            self.pages_per_second = self.counted_pages as f64 / counted.as_secs_f64();
            (self.counted_since, self.counted_pages) = (now, 0);
        }
        (self.asked_at, self.took, self.is_fresh) = (now, took, true);
        period
    }

    /// What was sent since this was asked last.
    pub(crate) fn wire_bytes_since(&mut self, wire_bytes: u64) -> u64 {
        wire_bytes.saturating_sub(std::mem::replace(&mut self.wire_bytes, wire_bytes))
    }

    pub(crate) fn pages_per_second(&self) -> u64 {
        self.pages_per_second as u64
    }

    /// Pages that were probably dirtied since the log was asked.
    pub(crate) fn probably_dirtied(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.asked_at);
        (self.pages_per_second * since.as_secs_f64()) as u64
    }

    /// Should the log be asked again? It `matters` where a guest may be stopped for what is left.
    pub(crate) fn is_due(&self, now: Instant, matters: bool) -> bool {
        let since = now.saturating_duration_since(self.asked_at);
        let recent = RECENT.max(self.took.saturating_mul(COST_FACTOR));
        since >= recent || matters && !self.is_fresh && since >= VERY_RECENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn rates_are_those_of_a_while() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        assert_eq!(watch.collected(start + 10 * MS, MS, 100), 10 * MS);
        assert_eq!(watch.pages_per_second(), 0);
        assert_eq!(watch.probably_dirtied(start + 1000 * MS), 0);
        assert_eq!(watch.collected(start + 100 * MS, MS, 100), 90 * MS);
        assert_eq!(watch.pages_per_second(), 2000);
        assert_eq!(watch.probably_dirtied(start + 150 * MS), 100);
        watch.collected(start + 200 * MS, MS, 0);
        assert_eq!(watch.pages_per_second(), 0);
    }

    #[test]
    fn the_log_is_asked_again_where_it_matters() {
        let start = Instant::now();
        let mut watch = Watch::new(start);
        watch.collected(start, 30 * MS, 0);
        let due = |watch: &Watch, after: u32, matters| watch.is_due(start + after * MS, matters);
        // Nothing was sent since: what is left cannot be less.
        assert!(!due(&watch, 299, true));
        assert!(due(&watch, 300, true));
        watch.sent();
        assert!(!due(&watch, 4, true));
        assert!(due(&watch, 5, true));
        assert!(!due(&watch, 299, false));
        assert!(due(&watch, 300, false));
        // Where asking costs nothing.
        watch.collected(start, MS, 0);
        assert!(!due(&watch, 99, false));
        assert!(due(&watch, 100, false));
    }
}
