//! Will what is left fit into the downtime limit, and if not, why not?
//!
//! Without I/O: bytes and times are arguments.
//!
//! The downtime has four parts: the last writes drain, the dirty chunks are read, they are sent,
//! and the destination writes and syncs them. Reading is measured by the disk's side, sending by the
//! bytes that the channel took, the rest by a PING that follows a pass over the dirty chunks: its
//! PONG comes when the destination has got that far.

use std::time::{Duration, Instant};

/// Rates are those of about this long.
const WINDOW: Duration = Duration::from_millis(500);

/// Passes without getting closer before the migration is called stalled.
const STALL_PASSES: u32 = 5;

/// Speed of something that is counted in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meter {
    since: Instant,
    at_bytes: u64,
    rate: Option<u64>,
}

impl Meter {
    /// Start at `bytes`.
    #[must_use]
    pub(crate) fn new(now: Instant, bytes: u64) -> Self {
        Self {
            since: now,
            at_bytes: bytes,
            rate: None,
        }
    }

    /// The counter stands at `bytes` now.
    pub(crate) fn update(&mut self, now: Instant, bytes: u64) {
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed < WINDOW {
            return;
        }
        self.rate = Some(rate(bytes.saturating_sub(self.at_bytes), elapsed));
        *self = Self {
            since: now,
            at_bytes: bytes,
            ..*self
        };
    }

    /// Bytes per second; before the first window is over, the average so far.
    #[must_use]
    pub(crate) fn bytes_per_second(&self, now: Instant, bytes: u64) -> u64 {
        let elapsed = now.saturating_duration_since(self.since);
        self.rate
            .unwrap_or_else(|| rate(bytes.saturating_sub(self.at_bytes), elapsed))
    }
}

fn rate(bytes: u64, elapsed: Duration) -> u64 {
    let nanoseconds = elapsed.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

/// Speed of a channel while it is used: one that is idle most of the time is no slower for that.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BusySpeed {
    bytes: u64,
    busy: Duration,
}

/// The speed is that of about the last 128 to 256 MiB.
const BUSY_WINDOW_BYTES: u64 = 256 << 20;

impl BusySpeed {
    /// So many bytes went in so much time.
    pub(crate) fn count(&mut self, bytes: u64, took: Duration) {
        self.bytes += bytes;
        self.busy += took;
        if self.bytes > BUSY_WINDOW_BYTES {
            self.bytes /= 2;
            self.busy /= 2;
        }
    }

    /// Bytes per second; 0 as long as nothing was sent.
    pub(crate) fn bytes_per_second(&self) -> u64 {
        rate(self.bytes, self.busy)
    }
}

/// What the downtime would consist of, were the guest stopped now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Forecast {
    /// Reading the dirty chunks.
    pub read: Duration,
    /// Sending them.
    pub send: Duration,
    /// The destination's writing and syncing.
    pub sync: Duration,
}

impl Forecast {
    /// For `bytes` that are left.
    #[must_use]
    pub(crate) fn new(bytes: u64, read: Duration, bandwidth: u64, sync: Duration) -> Self {
        let send = match bandwidth {
            0 if bytes > 0 => Duration::MAX,
            0 => Duration::ZERO,
            rate => Duration::from_nanos(
                u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(rate))
                    .unwrap_or(u64::MAX),
            ),
        };
        Self { read, send, sync }
    }

    /// All of it. Reading and sending overlap.
    #[must_use]
    pub(crate) fn total(&self) -> Duration {
        self.read.max(self.send).saturating_add(self.sync)
    }
}

/// Watches passes over the dirty chunks for progress.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StallDetector {
    best_bytes: Option<u64>,
    passes_without_progress: u32,
}

impl StallDetector {
    /// A pass has ended with this much dirty. True if the migration gets nowhere.
    pub(crate) fn pass_ended(&mut self, dirty_bytes: u64) -> bool {
        match self.best_bytes {
            // An eighth less is progress; noise is not.
            Some(best) if dirty_bytes > best - best / 8 => self.passes_without_progress += 1,
            _ => {
                self.best_bytes = Some(dirty_bytes);
                self.passes_without_progress = 0;
            }
        }
        self.is_stalled()
    }

    /// Does the migration get nowhere?
    #[must_use]
    pub(crate) fn is_stalled(&self) -> bool {
        self.passes_without_progress >= STALL_PASSES
    }
}

/// What an operator can do about a stall.
#[must_use]
pub(crate) fn stall_message(
    dirty_rate: u64,
    bandwidth: u64,
    forecast: Duration,
    limit: Duration,
) -> String {
    let mib = |bytes: u64| bytes >> 20;
    format!(
        "not getting closer: the guest dirties {} MiB/s, {} MiB/s are moved, the downtime would be \
         {} ms with {} ms allowed; allow a longer downtime, raise the bandwidth, or slow the guest",
        mib(dirty_rate),
        mib(bandwidth),
        forecast.as_millis(),
        limit.as_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_counts_reading_sending_and_syncing() {
        let ms = Duration::from_millis;
        let forecast = Forecast::new(100 << 20, ms(40), 1000 << 20, ms(30));
        assert_eq!(forecast.total(), ms(130));
        let slow_disk = Forecast::new(100 << 20, ms(400), 1000 << 20, ms(30));
        assert_eq!(slow_disk.total(), ms(430));
        assert_eq!(Forecast::new(1, ms(0), 0, ms(0)).total(), Duration::MAX);
        assert_eq!(Forecast::new(0, ms(0), 0, ms(7)).total(), ms(7));
    }

    #[test]
    fn a_meter_forgets_what_is_long_ago() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = Meter::new(start, 0);
        meter.update(at(100), 100);
        assert_eq!(meter.bytes_per_second(at(100), 100), 1000);
        meter.update(at(1000), 5000);
        assert_eq!(meter.bytes_per_second(at(1000), 5000), 5000);
        meter.update(at(2000), 5000);
        assert_eq!(meter.bytes_per_second(at(2000), 5000), 0);
    }

    #[test]
    fn a_channel_is_no_slower_for_being_idle() {
        let mut speed = BusySpeed::default();
        assert_eq!(speed.bytes_per_second(), 0);
        speed.count(1000, Duration::from_millis(100));
        assert_eq!(speed.bytes_per_second(), 10_000);
        for _ in 0..100 {
            speed.count(100 << 20, Duration::from_secs(1));
        }
        assert!(
            speed.bytes_per_second() >> 20 >= 99,
            "what is long ago is forgotten"
        );
    }

    #[test]
    fn a_stall_is_five_passes_without_progress() {
        let mut stall = StallDetector::default();
        assert!(!stall.pass_ended(1000));
        assert!(!stall.pass_ended(800));
        for pass in 1..=STALL_PASSES {
            assert_eq!(stall.pass_ended(790), pass == STALL_PASSES);
        }
        assert!(!stall.pass_ended(100));
    }
}
