//! How long the guest waited.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Watches completions; the longest time between two of them is the downtime that a guest saw.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    last: Option<Instant>,
    longest: Duration,
}

impl Gaps {
    /// A request completed.
    pub(super) fn completed(&self, now: Instant) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = seen.last {
            seen.longest = seen.longest.max(now.saturating_duration_since(last));
        }
        seen.last = Some(seen.last.map_or(now, |last| last.max(now)));
    }

    /// The longest time between two completions since the last call.
    pub(super) fn take_longest(&self) -> Duration {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut seen.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_counts() {
        let gaps = Gaps::default();
        let start = Instant::now();
        for ms in [0, 1, 3, 53, 50, 60] {
            gaps.completed(start + Duration::from_millis(ms));
        }
        assert_eq!(gaps.take_longest(), Duration::from_millis(50));
        gaps.completed(start + Duration::from_millis(62));
        assert_eq!(gaps.take_longest(), Duration::from_millis(2));
    }
}
