//! When the connection's own thread does a thing itself, and when it had better not.

use std::time::{Duration, Instant};

/// Whether disk calls are quick enough to make them in the connection's own thread. A slow one
/// sends the next ones to the workers, so that they overlap.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// So many calls go to the workers before the next try.
    resting: u32,
}

/// A call may take this long,
const CALL_TIME_MAX: Duration = Duration::from_micros(200);
/// and this much longer for each KiB.
const CALL_TIME_PER_KIB: Duration = Duration::from_micros(2);
/// Calls that go to the workers after a slow one.
const RESTING_CALLS: u32 = 64;

impl Pace {
    pub(crate) fn is_good(&mut self) -> bool {
        self.resting = self.resting.saturating_sub(1);
        self.resting == 0
    }

    pub(crate) fn time<T>(&mut self, bytes: usize, call: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = call();
        let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX);
        let allowed = CALL_TIME_MAX.saturating_add(CALL_TIME_PER_KIB.saturating_mul(kib));
        if start.elapsed() > allowed {
            self.resting = RESTING_CALLS;
        }
        result
    }
}

/// So long is looked for more requests before the thread sleeps.
pub(crate) const EAGER_TIME: Duration = Duration::from_micros(50);
/// Most sleeps without a look.
const SKIPPED_LOOKS_MAX: u32 = 7;

/// Whether looking for more requests before sleeping has been of use. Each look in vain doubles the
/// number of sleeps without one.
#[derive(Debug, Default)]
pub(crate) struct Eagerness {
    skip: u32,
    penalty: u32,
}

impl Eagerness {
    pub(crate) fn is_worth_it(&mut self) -> bool {
        let worth = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        worth
    }

    pub(crate) fn learn(&mut self, useful: bool) {
        self.penalty = if useful {
            0
        } else {
            self.penalty
                .saturating_mul(2)
                .saturating_add(1)
                .min(SKIPPED_LOOKS_MAX)
        };
        self.skip = self.penalty;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_call_sends_the_next_ones_to_the_workers() {
        let mut pace = Pace::default();
        assert!(pace.is_good());
        pace.resting = RESTING_CALLS;
        let rests = std::iter::repeat_with(|| pace.is_good())
            .take_while(|good| !good)
            .count();
        assert_eq!(rests, RESTING_CALLS as usize - 1);
        pace.time(1 << 30, || ());
        assert!(pace.is_good(), "a quick call changes nothing");
    }

    #[test]
    fn looks_in_vain_become_rare_and_a_useful_one_brings_them_back() {
        let mut eagerness = Eagerness::default();
        let mut sleeps_between = Vec::new();
        for _ in 0..8 {
            let skipped = std::iter::repeat_with(|| eagerness.is_worth_it())
                .take_while(|worth| !worth)
                .count();
            sleeps_between.push(skipped);
            eagerness.learn(false);
        }
        assert_eq!(sleeps_between, [0, 1, 3, 7, 7, 7, 7, 7]);
        eagerness.learn(true);
        assert!(eagerness.is_worth_it());
    }
}
