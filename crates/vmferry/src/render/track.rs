//! From the statuses of a migration to what is shown: a bar that never goes backwards.

use std::time::Duration;

use super::units;
use crate::exit::one_line;

/// What the daemon says about a migration, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sample {
    pub(crate) phase: Phase,
    /// Length of all disks, in bytes.
    pub(crate) total_bytes: u64,
    /// Bytes that still have to be sent, as far as is known now.
    pub(crate) remaining_bytes: u64,
    pub(crate) bytes_per_second: u64,
    /// How fast guests make sent bytes stale.
    pub(crate) dirty_bytes_per_second: u64,
    /// 1 while the disks are sent for the first time.
    pub(crate) pass: u64,
    pub(crate) expected_downtime_ms: Option<u64>,
    /// Why no end is in sight.
    pub(crate) stall: Option<String>,
}

/// What a migration is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    #[default]
    Setup,
    /// A parked machine's pages are being looked up.
    Indexing,
    /// A parked machine is read once, to see whether it is whole.
    Verifying,
    /// Everything is sent for the first time.
    Bulk,
    /// What was written meanwhile is sent again.
    Dirty,
    /// Guests wait.
    SwitchOver,
    /// The guest runs at the destination; the rest follows.
    Postcopy,
    /// The connection broke after that.
    Interrupted,
    /// Another one is there; both sides find out what is missing.
    Recovering,
    Cancelling,
    /// The destination has the disks.
    Completed,
    /// It is over without that.
    Over,
}

impl Phase {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Setup => "setting up",
            Self::Indexing => "indexing",
            Self::Verifying => "verifying",
            Self::Bulk => "copying",
            Self::Dirty => "catching up",
            Self::SwitchOver => "switching over",
            Self::Postcopy => "postcopy",
            Self::Interrupted => "interrupted",
            Self::Recovering => "recovering",
            Self::Cancelling => "cancelling",
            Self::Completed => "completed",
            Self::Over => "over",
        }
    }
}

impl Phase {
    /// Nothing follows.
    pub(crate) fn is_end(self) -> bool {
        matches!(self, Self::Completed | Self::Over)
    }
}

/// What to show.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View {
    pub(crate) phase: Phase,
    /// 0 to 1000; never smaller than in the view before, and 1000 only when all is over.
    pub(crate) permille: u16,
    pub(crate) done_bytes: u64,
    pub(crate) total_bytes: u64,
    pub(crate) bytes_per_second: u64,
    pub(crate) dirty_bytes_per_second: u64,
    pub(crate) pass: u64,
    pub(crate) expected_downtime: Option<Duration>,
    /// None while nothing moves, or while the guest is too fast.
    pub(crate) eta: Option<Duration>,
    pub(crate) stall: Option<String>,
}

/// Remembers how far the bar was.
#[derive(Debug, Default)]
pub(crate) struct Track {
    done_bytes: u64,
    permille: u16,
    pass: u64,
}

/// While guests write, the bar stops here: what is written anew would move it back.
const BULK_OVER_PERMILLE: u64 = 990;

impl Track {
    /// Take the next status in.
    pub(crate) fn view(&mut self, sample: &Sample) -> View {
        let done = sample.total_bytes.saturating_sub(sample.remaining_bytes);
        self.done_bytes = self.done_bytes.max(done);
        self.pass = self.pass.max(sample.pass);
        let permille = match sample.phase {
            Phase::Setup => 0,
            Phase::Completed
            | Phase::Over
            | Phase::Cancelling
            | Phase::Interrupted
            | Phase::Recovering => u64::from(self.permille),
            Phase::Indexing
            | Phase::Verifying
            | Phase::Bulk
            | Phase::Dirty
            | Phase::SwitchOver
            | Phase::Postcopy => share(self.done_bytes, sample.total_bytes, BULK_OVER_PERMILLE),
        };
        self.permille = self.permille.max(u16::try_from(permille).unwrap_or(1000));
        View {
            phase: sample.phase,
            permille: self.permille,
            done_bytes: self.done_bytes,
            total_bytes: sample.total_bytes,
            bytes_per_second: sample.bytes_per_second,
            dirty_bytes_per_second: sample.dirty_bytes_per_second,
            pass: self.pass,
            expected_downtime: sample.expected_downtime_ms.map(Duration::from_millis),
            eta: eta(sample),
            stall: sample
                .stall
                .clone()
                .filter(|_| sample.phase == Phase::Dirty),
        }
    }

    /// The last view of a migration that completed.
    pub(crate) fn completed(&mut self, sample: &Sample) -> View {
        self.permille = 1000;
        self.done_bytes = sample.total_bytes;
        self.view(&Sample {
            phase: Phase::Completed,
            remaining_bytes: 0,
            ..sample.clone()
        })
    }
}

fn share(done: u64, total: u64, full: u64) -> u64 {
    match u128::from(done) * u128::from(full) / u128::from(total.max(1)) {
        permille if permille < u128::from(full) => permille as u64,
        _ => full,
    }
}

/// The guest writes while we send, so only the difference brings us nearer to the end. The bulk
/// phase ends whatever the guest does.
fn eta(sample: &Sample) -> Option<Duration> {
    let gain = match sample.phase {
        Phase::Bulk | Phase::Postcopy | Phase::Indexing | Phase::Verifying => {
            sample.bytes_per_second
        }
        Phase::Dirty => sample
            .bytes_per_second
            .saturating_sub(sample.dirty_bytes_per_second),
        Phase::Setup
        | Phase::SwitchOver
        | Phase::Interrupted
        | Phase::Recovering
        | Phase::Cancelling
        | Phase::Completed
        | Phase::Over => 0,
    };
    (gain > 0 && sample.stall.is_none())
        .then(|| Duration::from_secs(sample.remaining_bytes.div_ceil(gain)))
}

impl View {
    /// Everything but the phase and the bar.
    pub(crate) fn details(&self) -> String {
        let mut parts = vec![format!(
            "{} of {}",
            units::bytes(self.done_bytes),
            units::bytes(self.total_bytes)
        )];
        if self.bytes_per_second > 0 {
            parts.push(units::rate(self.bytes_per_second));
        }
        if self.pass > 1 {
            parts.push(format!("pass {}", self.pass));
        }
        if let Some(stall) = &self.stall {
            parts.push(one_line(stall));
            return parts.join(", ");
        }
        if self.dirty_bytes_per_second > 0 {
            parts.push(format!(
                "guest writes {}",
                units::rate(self.dirty_bytes_per_second)
            ));
        }
        if let Some(downtime) = self.expected_downtime {
            parts.push(format!("downtime ~{}", units::time(downtime)));
        }
        if let Some(eta) = self.eta {
            parts.push(format!("ETA {}", units::time(eta)));
        }
        parts.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn sample(phase: Phase, total_mib: u64, remaining_mib: u64) -> Sample {
        Sample {
            phase,
            total_bytes: total_mib * MIB,
            remaining_bytes: remaining_mib * MIB,
            bytes_per_second: 100 * MIB,
            pass: 1,
            ..Sample::default()
        }
    }

    #[test]
    fn the_bar_never_goes_backwards() {
        let seed = std::env::var("VMFERRY_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok())
            .unwrap_or_else(|| fastrand::u64(..));
        println!("VMFERRY_SEED={seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..200 {
            let mut track = Track::default();
            let mut last = track.view(&sample(Phase::Setup, 0, 0));
            for _ in 0..50 {
                let phase = rng
                    .choice([
                        Phase::Bulk,
                        Phase::Dirty,
                        Phase::SwitchOver,
                        Phase::Postcopy,
                        Phase::Interrupted,
                        Phase::Cancelling,
                    ])
                    .unwrap();
                let mut next = sample(phase, 1000, rng.u64(0..=1200));
                next.pass = rng.u64(0..5);
                let view = track.view(&next);
                assert!(view.permille >= last.permille, "{last:?} {view:?}");
                assert!(view.done_bytes >= last.done_bytes, "{last:?} {view:?}");
                assert!(view.pass >= last.pass, "{last:?} {view:?}");
                assert!(view.permille < 1000);
                last = view;
            }
            assert_eq!(
                track.completed(&sample(Phase::Over, 1000, 7)).permille,
                1000
            );
        }
    }

    #[test]
    fn only_a_completed_migration_fills_the_bar() {
        let mut track = Track::default();
        assert_eq!(track.view(&sample(Phase::Setup, 0, 0)).permille, 0);
        assert_eq!(track.view(&sample(Phase::Bulk, 1000, 500)).permille, 495);
        assert_eq!(
            track.view(&sample(Phase::SwitchOver, 1000, 0)).permille,
            990
        );
        assert_eq!(track.view(&sample(Phase::Over, 1000, 0)).permille, 990);
        let done = track.completed(&sample(Phase::Over, 1000, 0));
        assert_eq!((done.permille, done.done_bytes), (1000, 1000 * MIB));
    }

    #[test]
    fn a_cancelled_migration_stands_still() {
        let mut track = Track::default();
        let half = track.view(&sample(Phase::Bulk, 1000, 500)).permille;
        assert_eq!(
            track.view(&sample(Phase::Cancelling, 1000, 0)).permille,
            half
        );
        assert_eq!(track.view(&sample(Phase::Over, 1000, 0)).permille, half);
    }

    #[test]
    fn an_end_is_forecast_only_when_it_comes_nearer() {
        let bulk = Sample {
            dirty_bytes_per_second: 400 * MIB,
            ..sample(Phase::Bulk, 1000, 450)
        };
        assert_eq!(eta(&bulk), Some(Duration::from_secs(5)));
        let dirty = Sample {
            dirty_bytes_per_second: 60 * MIB,
            ..sample(Phase::Dirty, 1000, 80)
        };
        assert_eq!(eta(&dirty), Some(Duration::from_secs(2)));
        let behind = Sample {
            dirty_bytes_per_second: 100 * MIB,
            ..dirty.clone()
        };
        assert_eq!(eta(&behind), None);
        assert_eq!(
            eta(&Sample {
                stall: Some("the guest is too fast".into()),
                ..dirty
            }),
            None
        );
        assert_eq!(eta(&sample(Phase::SwitchOver, 1000, 10)), None);
    }

    #[test]
    fn details_say_what_is_known() {
        let mut track = Track::default();
        let view = track.view(&Sample {
            dirty_bytes_per_second: 60 * MIB,
            pass: 3,
            expected_downtime_ms: Some(41),
            ..sample(Phase::Dirty, 1000, 80)
        });
        assert_eq!(
            view.details(),
            "920 MiB of 0.98 GiB, 100 MiB/s, pass 3, guest writes 60.0 MiB/s, downtime ~41 ms, \
             ETA 2.0 s"
        );
        let stalled = track.view(&Sample {
            stall: Some("the guest is too fast".into()),
            ..sample(Phase::Dirty, 1000, 80)
        });
        assert_eq!(
            stalled.details(),
            "920 MiB of 0.98 GiB, 100 MiB/s, pass 3, the guest is too fast"
        );
    }

    #[test]
    fn sizes_that_make_no_sense_do_no_harm() {
        let mut track = Track::default();
        let odd = Sample {
            phase: Phase::Dirty,
            total_bytes: u64::MAX,
            remaining_bytes: 0,
            bytes_per_second: 1,
            ..Sample::default()
        };
        assert_eq!(track.view(&odd).permille, 990);
        assert_eq!(
            track
                .view(&Sample {
                    total_bytes: 0,
                    ..odd
                })
                .done_bytes,
            u64::MAX
        );
    }
}
