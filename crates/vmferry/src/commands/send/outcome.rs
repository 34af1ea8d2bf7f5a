//! How it ended, and what is told of it.

use std::io::Write;
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_migration::{RamStatus, State, Status};

use crate::exit::{Exit, Failure};
use crate::flags::SendFlags;
use crate::render;

/// How it ended, as the source has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The destination has said so.
    Completed,
    Cancelled,
    /// The guest runs nowhere.
    Failed(String),
    /// The destination has not said whether it has the machine.
    Undecided(String),
    /// The guest runs at the destination, and not all of its memory is there.
    Interrupted(String),
}

impl End {
    /// `None` while it goes on.
    pub(super) fn of(status: &Status) -> Option<Self> {
        let why = || {
            let error = status.error.clone();
            error.unwrap_or_else(|| "no reason was given".to_owned())
        };
        if status.undecided {
            return Some(Self::Undecided(why()));
        }
        match status.state {
            State::Completed => Some(Self::Completed),
            State::Cancelled => Some(Self::Cancelled),
            State::Failed => Some(Self::Failed(why())),
            State::PostcopyPaused => Some(Self::Interrupted(why())),
            _ => None,
        }
    }
}

/// How it ended, with what the destination says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Completed(Guest),
    Cancelled,
    Failed(String),
    Undecided(String),
    Interrupted(String),
    /// The guest ran at the destination, which is gone.
    Lost(String),
}

/// What is known of a guest that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// Nobody was asked.
    Unknown,
    Runs,
    /// As it did when it was parked, or as its QEMU was told.
    StandsStill,
}

/// What else is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Figures {
    /// Of memory and disks.
    pub(super) total_bytes: u64,
    pub(super) sent_bytes: u64,
    pub(super) elapsed: Duration,
    /// The guest was seen to run so long after the connection was there.
    pub(super) runs_after: Option<Duration>,
    pub(super) durable: Option<bool>,
    pub(super) ram: RamStatus,
    /// Was it kept what the guest asked for first? `None` if that was not wanted.
    pub(super) learnt: Option<bool>,
}

impl Figures {
    fn object(&self) -> Value {
        json!({
            "event": "completed",
            "total-bytes": self.total_bytes,
            "sent-bytes": self.sent_bytes,
            "elapsed-ms": u64::try_from(self.elapsed.as_millis()).unwrap_or(u64::MAX),
            "running-us": self.runs_after.map(micros),
            "durable": self.durable,
            "learnt": self.learnt,
            "ram": {
                "total-bytes": self.ram.total_bytes,
                "normal-pages": self.ram.normal_pages,
                "zero-pages": self.ram.zero_pages,
                "postcopy-requests": self.ram.postcopy_requests,
            },
        })
    }

    fn line(&self, guest: Guest) -> String {
        let mut line = format!(
            "{} of memory and disks, {} sent in {}",
            render::bytes(self.total_bytes),
            render::bytes(self.sent_bytes),
            render::time(self.elapsed)
        );
        if self.ram.postcopy_requests > 0 {
            let requests = render::count(self.ram.postcopy_requests, "request");
            line += &format!(", {requests} of the guest");
        }
        line += &match (guest, self.runs_after) {
            (Guest::Runs, Some(after)) => {
                format!(
                    "; the guest runs, since {} after connecting",
                    precise(after)
                )
            }
            (Guest::Runs, None) => "; the guest runs".to_owned(),
            (Guest::StandsStill, _) => "; the guest stands still there".to_owned(),
            (Guest::Unknown, _) => String::new(),
        };
        if self.durable.is_none() {
            line += "; one-way: nobody confirms that it arrived";
        }
        line
    }
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Milliseconds matter here.
fn precise(time: Duration) -> String {
    match time.as_millis() {
        0..=99 => format!("{:.1} ms", time.as_secs_f64() * 1000.0),
        _ => render::time(time),
    }
}

impl Outcome {
    /// Tell it; a success, or the failure.
    pub(super) fn tell(self, flags: &SendFlags, figures: &Figures) -> Result<Exit, Failure> {
        let guest = self.into_result(flags.vm.is_some())?;
        if flags.json {
            render::write_json(&mut flags.out(), &figures.object())?;
        } else {
            writeln!(flags.out(), "completed: {}", figures.line(guest))?;
        }
        Ok(Exit::Whole)
    }

    /// The guest that has arrived. `sets_up` if the destination is set up by this command.
    fn into_result(self, sets_up: bool) -> Result<Guest, Failure> {
        Err(match self {
            Self::Completed(guest) => return Ok(guest),
            Self::Cancelled => Failure::new(Exit::Cancelled, "cancelled; the guest runs nowhere")
                .hint("the parked machine is as it was; its destination is to be started anew"),
            Self::Failed(why) => {
                Failure::new(Exit::Failed, format!("the machine did not arrive: {why}")).hint(
                    "the parked machine is as it was: try again, with a destination that was started anew",
                )
            }
            Self::Undecided(why) => Failure::new(
                Exit::Undecided,
                format!("nobody knows whether the machine arrived: {why}"),
            )
            .hint("look at the destination before it is started anywhere else"),
            // Started anew somewhere else, it would run twice.
            Self::Interrupted(why) => Failure::new(
                Exit::Undecided,
                format!("interrupted, and the guest at the destination waits for its memory: {why}"),
            )
            .hint(match sets_up {
                true => {
                    "start it nowhere else: the same command with --resume, and the same parked \
                     machine, lets it go on"
                }
                false => {
                    "start it nowhere else: QMP migrate-recover at the destination, then the same \
                     command with --resume, the same parked machine and the new address let it go on"
                }
            }),
            Self::Lost(why) => Failure::new(
                Exit::Failed,
                format!("the destination is gone, and the guest with it: {why}"),
            )
            .hint("the parked machine is as it was: what the guest has done since is lost"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_is_over_has_one_end() {
        let with = |state, error: Option<&str>| Status {
            state,
            error: error.map(str::to_owned),
            ..Status::default()
        };
        for (status, end) in [
            (with(State::Setup, None), None),
            (with(State::Active, None), None),
            (with(State::Device, None), None),
            (with(State::PostcopyActive, None), None),
            (with(State::PostcopyRecover, None), None),
            (with(State::Cancelling, None), None),
            (with(State::Completed, None), Some(End::Completed)),
            (with(State::Cancelled, None), Some(End::Cancelled)),
            (
                with(State::Failed, Some("cut")),
                Some(End::Failed("cut".to_owned())),
            ),
            (
                with(State::PostcopyPaused, Some("cut")),
                Some(End::Interrupted("cut".to_owned())),
            ),
            (
                Status {
                    undecided: true,
                    ..with(State::Device, Some("silence"))
                },
                Some(End::Undecided("silence".to_owned())),
            ),
        ] {
            assert_eq!(End::of(&status), end, "{status:?}");
        }
    }

    #[test]
    fn each_outcome_has_its_exit_status_and_says_what_can_be_done() {
        let why = || "cut".to_owned();
        for (outcome, exit, words) in [
            (Outcome::Cancelled, Exit::Cancelled, "started anew"),
            (Outcome::Failed(why()), Exit::Failed, "try again"),
            (Outcome::Undecided(why()), Exit::Undecided, "look at"),
            (Outcome::Interrupted(why()), Exit::Undecided, "--resume"),
            (Outcome::Lost(why()), Exit::Failed, "is lost"),
        ] {
            for sets_up in [true, false] {
                let failure = outcome.clone().into_result(sets_up).unwrap_err();
                assert_eq!(failure.exit, exit, "{outcome:?}");
                assert!(failure.to_string().contains(words), "{failure}");
                let recovers = failure.to_string().contains("migrate-recover");
                let is_paused = matches!(outcome, Outcome::Interrupted(_));
                assert_eq!(recovers, is_paused && !sets_up, "{failure}");
            }
        }
        let runs = Outcome::Completed(Guest::Runs).into_result(true);
        assert_eq!(runs.unwrap(), Guest::Runs);
    }

    #[test]
    fn the_figures_say_how_soon_the_guest_ran() {
        let figures = Figures {
            total_bytes: 1 << 30,
            sent_bytes: 256 << 20,
            elapsed: Duration::from_millis(900),
            runs_after: Some(Duration::from_micros(3250)),
            durable: Some(false),
            ram: RamStatus {
                postcopy_requests: 94,
                ..RamStatus::default()
            },
            learnt: Some(true),
        };
        assert_eq!(
            figures.line(Guest::Runs),
            "1.00 GiB of memory and disks, 256 MiB sent in 900 ms, 94 requests of the guest; the \
             guest runs, since 3.2 ms after connecting"
        );
        let object = figures.object();
        assert_eq!(object["running-us"], 3250);
        assert_eq!(object["ram"]["postcopy-requests"], 94);
        assert_eq!(object["learnt"], true);
        let one_way = Figures {
            durable: None,
            runs_after: None,
            ram: RamStatus::default(),
            ..figures
        };
        let line = one_way.line(Guest::Unknown);
        assert!(
            line.ends_with("one-way: nobody confirms that it arrived"),
            "{line}"
        );
    }
}
