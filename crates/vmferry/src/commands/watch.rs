//! Watching a daemon's migration until it is over.

use std::time::{Duration, Instant};

use serde_json::json;
use vmferry_qmp::types::{MigrationInfo, MigrationStatus};

use super::daemon::{Daemon, Refusal};
use crate::exit::{Exit, Failure};
use crate::render::{Outcome, Progress, Sample};
use crate::signals::{Signal, Signals};

/// How often the daemon is asked, in the long run.
const INTERVAL: Duration = Duration::from_millis(250);
/// How soon it is asked again at first: small disks move in no time.
const FIRST_INTERVAL: Duration = Duration::from_millis(5);

/// Ask ever more seldom.
fn interval(since: Instant) -> Duration {
    (since.elapsed() / 16).clamp(FIRST_INTERVAL, INTERVAL)
}

/// Why watching ended.
#[derive(Debug, PartialEq)]
pub(crate) enum Watched {
    /// The migration is over.
    Over(Outcome),
    /// The terminal is gone; the migration goes on.
    Detached,
}

/// Show a migration until it is over. Ctrl-C cancels it, once; a second time it ends the watching.
pub(crate) fn watch(
    daemon: &mut Daemon,
    signals: &Signals,
    progress: &mut Progress,
) -> Result<Watched, Failure> {
    let start = Instant::now();
    let mut cancel = Cancel::NotAsked;
    loop {
        let info = match daemon.migration() {
            Ok(info) => info,
            Err(gone) => return last_word(daemon, &gone).map(Watched::Over),
        };
        let sample = Sample::from(&info);
        let outcome = Outcome::of(&info);
        match &outcome {
            Some(Outcome::Completed(_)) => progress.completed(&sample, start.elapsed())?,
            _ => progress.show(&sample, start.elapsed())?,
        }
        if let Some(outcome) = outcome {
            return Ok(Watched::Over(outcome));
        }
        match signals.wait(Some(interval(start)))? {
            None => {}
            Some(Signal::Hangup) => return Ok(Watched::Detached),
            Some(Signal::Stop) => match cancel.stopped_waiting() {
                Some(failure) => return Err(failure),
                None => cancel = Cancel::ask(daemon, progress)?,
            },
        }
    }
}

/// What Ctrl-C has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cancel {
    NotAsked,
    /// The daemon cancels.
    Accepted,
    /// It came too late; the migration goes on to its end, which may be at the destination.
    TooLate,
}

impl Cancel {
    fn ask(daemon: &mut Daemon, progress: &Progress) -> Result<Self, Failure> {
        match daemon.execute("migrate_cancel", &json!({})) {
            Ok(_) => {
                progress.note("cancelling; again Ctrl-C stops waiting for it");
                Ok(Self::Accepted)
            }
            Err(Refusal::Refused(why)) => {
                progress.note(&format!(
                    "cannot cancel any more: {why}; again Ctrl-C stops waiting for the end"
                ));
                Ok(Self::TooLate)
            }
            Err(error) => Err(lost(&error.into())),
        }
    }

    /// How a second Ctrl-C ends the watching.
    fn stopped_waiting(self) -> Option<Failure> {
        let failure = match self {
            Self::NotAsked => return None,
            Self::Accepted => Failure::new(Exit::Cancelled, "stopped waiting for the cancel"),
            Self::TooLate => Failure::new(
                Exit::Undecided,
                "stopped waiting for the end; the disks may move to the destination",
            ),
        };
        Some(failure.hint("see vmferry status for how it ended"))
    }
}

/// Wait without showing anything.
pub(crate) fn until_over(daemon: &mut Daemon, signals: &Signals) -> Result<Outcome, Failure> {
    let start = Instant::now();
    loop {
        match daemon.migration() {
            Ok(info) => {
                if let Some(outcome) = Outcome::of(&info) {
                    return Ok(outcome);
                }
            }
            Err(gone) => return last_word(daemon, &gone),
        }
        if signals.wait(Some(interval(start)))?.is_some() {
            return Err(Failure::new(Exit::Failed, "stopped waiting for the end"));
        }
    }
}

/// Is there no migration that could end?
pub(crate) fn is_idle(info: &MigrationInfo) -> bool {
    Outcome::of(info).is_some() || matches!(info.status, None | Some(MigrationStatus::None))
}

/// A daemon that was told to end cancels first, and says so.
fn last_word(daemon: &mut Daemon, gone: &Failure) -> Result<Outcome, Failure> {
    match daemon.last_announced() {
        Some(MigrationStatus::Cancelled) => Ok(Outcome::Cancelled),
        _ => Err(lost(gone)),
    }
}

/// Once a migration runs, a daemon that is gone leaves everything open.
fn lost(failure: &Failure) -> Failure {
    Failure::new(
        Exit::Undecided,
        format!("{} while the migration ran", failure.message()),
    )
    .hint("a daemon that is started again knows from its records where each disk lives")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_stops_waiting_is_told_cancelled_only_if_it_was_accepted() {
        let exit = |cancel: Cancel| cancel.stopped_waiting().map(|failure| failure.exit);
        assert_eq!(exit(Cancel::NotAsked), None);
        assert_eq!(exit(Cancel::Accepted), Some(Exit::Cancelled));
        assert_eq!(exit(Cancel::TooLate), Some(Exit::Undecided));
    }
}
