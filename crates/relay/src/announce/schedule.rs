//! When the rounds of an announcement are due.
//!
//! ```text
//!   round      1     2        3              4                    5
//!   after   at once  initial  initial+step   initial+2·step …   each at most max
//! ```

use std::time::{Duration, Instant};

/// Longest time to the second round, in milliseconds, as in QEMU.
pub const INITIAL_MS_MAX: u64 = 100_000;
/// Largest limit of the time between two rounds, in milliseconds, as in QEMU.
pub const LONGEST_MS_MAX: u64 = 100_000;
/// Most rounds, as in QEMU.
pub const ROUNDS_MAX: u64 = 1000;
/// Largest growth of the time between two rounds, in milliseconds, as in QEMU.
pub const STEP_MS_MAX: u64 = 10_000;

/// How often, and how far apart. The names and the defaults are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    initial_ms: u64,
    max_ms: u64,
    rounds: u64,
    step_ms: u64,
}

/// A parameter is out of its bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{parameter}' expects a value between 0 and {max}")]
pub struct OutOfRange {
    /// `initial`, `max`, `rounds` or `step`.
    pub parameter: &'static str,
    /// Its largest value.
    pub max: u64,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            initial_ms: 50,
            max_ms: 550,
            rounds: 5,
            step_ms: 100,
        }
    }
}

impl Parameters {
    /// `initial` is the time from the first round to the second, which grows by `step` from round to
    /// round up to `max`; all in milliseconds. 0 `rounds` announce nothing.
    ///
    /// # Errors
    /// One is larger than [`INITIAL_MS_MAX`], [`LONGEST_MS_MAX`], [`ROUNDS_MAX`] or [`STEP_MS_MAX`].
    pub fn new(
        initial_ms: u64,
        max_ms: u64,
        rounds: u64,
        step_ms: u64,
    ) -> Result<Self, OutOfRange> {
        for (parameter, value, max) in [
            ("initial", initial_ms, INITIAL_MS_MAX),
            ("max", max_ms, LONGEST_MS_MAX),
            ("rounds", rounds, ROUNDS_MAX),
            ("step", step_ms, STEP_MS_MAX),
        ] {
            if value > max {
                return Err(OutOfRange { parameter, max });
            }
        }
        Ok(Self {
            initial_ms,
            max_ms,
            rounds,
            step_ms,
        })
    }

    /// Milliseconds from the first round to the second.
    #[must_use]
    pub fn initial_ms(&self) -> u64 {
        self.initial_ms
    }

    /// Milliseconds between two rounds at most.
    #[must_use]
    pub fn max_ms(&self) -> u64 {
        self.max_ms
    }

    /// Number of rounds.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Milliseconds by which the time between two rounds grows.
    #[must_use]
    pub fn step_ms(&self) -> u64 {
        self.step_ms
    }

    /// Time from round number `round`, which is at least 1, to the next.
    fn pause_after(&self, round: u64) -> Duration {
        // At most 100 000 + 999 × 10 000.
        let pause_ms = self.initial_ms + (round - 1) * self.step_ms;
        Duration::from_millis(pause_ms.min(self.max_ms))
    }
}

/// The rounds of one announcement on somebody else's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    parameters: Parameters,
    /// Rounds that are over.
    done: u64,
    /// When the next one is due.
    next: Instant,
}

impl Schedule {
    /// The first round is due now.
    #[must_use]
    pub fn new(parameters: Parameters, now: Instant) -> Self {
        Self {
            parameters,
            done: 0,
            next: now,
        }
    }

    /// When the next round is due; `None` once all are over.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        (self.done < self.parameters.rounds).then_some(self.next)
    }

    /// Whether a round is due; it is over then. Who comes late gets one round, not all that were
    /// missed: the next is due a whole pause from now.
    #[must_use]
    pub fn take(&mut self, now: Instant) -> bool {
        if self.next().is_none_or(|next| next > now) {
            return false;
        }
        self.done += 1;
        self.next = now + self.parameters.pause_after(self.done);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds from the start at which rounds are due, on a clock that is never late.
    fn times(parameters: Parameters) -> Vec<u128> {
        let start = Instant::now();
        let mut schedule = Schedule::new(parameters, start);
        let mut times = Vec::new();
        while let Some(next) = schedule.next() {
            if next > start {
                assert!(!schedule.take(next - Duration::from_nanos(1)), "too early");
            }
            assert!(schedule.take(next));
            times.push((next - start).as_millis());
        }
        assert!(!schedule.take(start + Duration::from_secs(1_000_000)));
        times
    }

    fn parameters(initial: u64, max: u64, rounds: u64, step: u64) -> Parameters {
        Parameters::new(initial, max, rounds, step).unwrap()
    }

    #[test]
    fn by_default_five_rounds_grow_apart() {
        let default = Parameters::default();
        assert_eq!(times(default), [0, 50, 200, 450, 800]);
        let same = parameters(
            default.initial_ms(),
            default.max_ms(),
            default.rounds(),
            default.step_ms(),
        );
        assert_eq!(same, default);
    }

    #[test]
    fn no_pause_is_longer_than_the_limit() {
        assert_eq!(times(parameters(50, 100, 5, 100)), [0, 50, 150, 250, 350]);
        assert_eq!(times(parameters(70, 20, 3, 0)), [0, 20, 40]);
        assert_eq!(times(parameters(50, 0, 3, 100)), [0, 0, 0]);
    }

    #[test]
    fn no_rounds_announce_nothing_and_one_does_not_wait() {
        assert_eq!(times(parameters(50, 550, 0, 100)), [0_u128; 0]);
        assert_eq!(times(parameters(50, 550, 1, 100)), [0]);
    }

    #[test]
    fn every_bound_has_two_sides() {
        let most = parameters(INITIAL_MS_MAX, LONGEST_MS_MAX, ROUNDS_MAX, STEP_MS_MAX);
        let times = times(most);
        assert_eq!(times.len(), 1000);
        assert_eq!(times[999], 999 * 100_000);
        for (parameter, max, values) in [
            ("initial", 100_000, [100_001, 0, 0, 0]),
            ("max", 100_000, [0, 100_001, 0, 0]),
            ("rounds", 1000, [0, 0, 1001, 0]),
            ("step", 10_000, [0, 0, 0, 10_001]),
        ] {
            let [initial, longest, rounds, step] = values;
            assert_eq!(
                Parameters::new(initial, longest, rounds, step),
                Err(OutOfRange { parameter, max })
            );
        }
        let huge = Parameters::new(0, 0, u64::MAX, 0).unwrap_err();
        assert_eq!(
            huge.to_string(),
            "'rounds' expects a value between 0 and 1000"
        );
    }

    #[test]
    fn who_is_late_does_not_catch_up() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut schedule = Schedule::new(Parameters::default(), start);
        assert!(schedule.take(at(300)));
        assert!(!schedule.take(at(349)));
        assert!(schedule.take(at(350)));
        assert_eq!(schedule.next(), Some(at(500)));
    }
}
