//! Auto-converge: slow the guest down as long as it writes memory faster than it is sent.
//!
//! ```text
//!   dirtied > trigger % of transferred, twice in a row ─▶ initial % ─ again ─▶ + increment … ─▶ max %
//! ```
//!
//! QEMU's parameters and policy. Time is an argument.

use std::time::Duration;

/// Slows a guest down: what a VMM offers to auto-converge.
pub trait Throttle: Send {
    /// Let every vCPU stand still for `percent` of the time, 0 to 99; 0 is full speed.
    fn set(&mut self, percent: u8);
}

/// When and how much a guest is slowed down. The names are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleParameters {
    /// Slow down when the guest has dirtied more than this percentage of what was transferred
    /// (`throttle-trigger-threshold`).
    pub throttle_trigger_threshold: u8,
    /// The first percentage of time that vCPUs stand still (`cpu-throttle-initial`).
    pub cpu_throttle_initial: u8,
    /// What is added to it each time that was not enough (`cpu-throttle-increment`).
    pub cpu_throttle_increment: u8,
    /// The highest percentage (`max-cpu-throttle`), at most 99.
    pub max_cpu_throttle: u8,
}

impl Default for ThrottleParameters {
    /// QEMU's.
    fn default() -> Self {
        Self {
            throttle_trigger_threshold: 50,
            cpu_throttle_initial: 20,
            cpu_throttle_increment: 10,
            max_cpu_throttle: 99,
        }
    }
}

/// No guest stands still for all of the time: it could not even be stopped.
const PERCENT_MAX: u8 = 99;

/// Shorter periods are added up: a few milliseconds say nothing about a guest.
const PERIOD_MIN: Duration = Duration::from_secs(1);

/// Periods with too much written before anything is done.
const PERIODS_TOO_HIGH: u8 = 2;

/// The policy.
#[derive(Debug)]
pub(crate) struct AutoConverge {
    parameters: ThrottleParameters,
    percent: u8,
    /// Of the period so far.
    length: Duration,
    dirtied_bytes: u64,
    transferred_bytes: u64,
    /// Periods with too much written since something was done.
    too_high: u8,
}

impl AutoConverge {
    pub(crate) fn new(parameters: ThrottleParameters) -> Self {
        Self {
            parameters,
            percent: 0,
            length: Duration::ZERO,
            dirtied_bytes: 0,
            transferred_bytes: 0,
            too_high: 0,
        }
    }

    /// In the time since the last call so much was dirtied and so much sent; the percentage that is
    /// right from now on, if it is another one.
    pub(crate) fn observe(
        &mut self,
        time: Duration,
        dirtied_bytes: u64,
        transferred_bytes: u64,
    ) -> Option<u8> {
        self.length += time;
        self.dirtied_bytes = self.dirtied_bytes.saturating_add(dirtied_bytes);
        self.transferred_bytes = self.transferred_bytes.saturating_add(transferred_bytes);
        if self.length < PERIOD_MIN {
            return None;
        }
        let trigger = u128::from(self.parameters.throttle_trigger_threshold);
        let is_too_high =
            u128::from(self.dirtied_bytes) * 100 > u128::from(self.transferred_bytes) * trigger;
        (self.length, self.dirtied_bytes, self.transferred_bytes) = (Duration::ZERO, 0, 0);
        if !is_too_high {
            return None;
        }
        self.too_high += 1;
        if self.too_high < PERIODS_TOO_HIGH {
            return None;
        }
        self.too_high = 0;
        let more = match self.percent {
            0 => self.parameters.cpu_throttle_initial,
            percent => percent.saturating_add(self.parameters.cpu_throttle_increment),
        };
        let percent = more.min(self.parameters.max_cpu_throttle).min(PERCENT_MAX);
        (percent != std::mem::replace(&mut self.percent, percent)).then_some(percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn seconds(policy: &mut AutoConverge, periods: &[(u64, u64)]) -> Vec<Option<u8>> {
        let second = Duration::from_secs(1);
        let observe = |(dirtied, sent): &(u64, u64)| policy.observe(second, *dirtied, *sent);
        periods.iter().map(observe).collect()
    }

    #[test]
    fn slows_down_step_by_step() {
        let mut policy = AutoConverge::new(ThrottleParameters::default());
        let too_much = [(51 * MIB, 100 * MIB); 18];
        let told: Vec<u8> = seconds(&mut policy, &too_much)
            .into_iter()
            .flatten()
            .collect();
        assert_eq!(told, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
        assert_eq!(seconds(&mut policy, &too_much), [None; 18]);
    }

    #[test]
    fn does_nothing_as_long_as_it_converges() {
        let mut policy = AutoConverge::new(ThrottleParameters::default());
        assert_eq!(seconds(&mut policy, &[(50 * MIB, 100 * MIB); 9]), [None; 9]);
        assert_eq!(seconds(&mut policy, &[(0, 0); 9]), [None; 9]);
        let periods = [(1, 0), (0, MIB), (1, 0), (1, 0)];
        let told = seconds(&mut policy, &periods);
        assert_eq!(told, [None, None, Some(20), None], "as QEMU counts them");
    }

    #[test]
    fn adds_up_short_periods() {
        let mut policy = AutoConverge::new(ThrottleParameters::default());
        let tenth = Duration::from_millis(100);
        let mut told = (1..=20).filter_map(|n| Some((n, policy.observe(tenth, MIB, MIB)?)));
        assert_eq!(told.next(), Some((20, 20)));
        assert_eq!(told.next(), None);
    }

    #[test]
    fn keeps_to_its_parameters() {
        let mut policy = AutoConverge::new(ThrottleParameters {
            throttle_trigger_threshold: 100,
            cpu_throttle_initial: 5,
            cpu_throttle_increment: 200,
            max_cpu_throttle: 200,
        });
        assert_eq!(seconds(&mut policy, &[(MIB, MIB); 4]), [None; 4]);
        let told = seconds(&mut policy, &[(MIB + 1, MIB); 4]);
        assert_eq!(told, [None, Some(5), None, Some(99)]);
    }
}
