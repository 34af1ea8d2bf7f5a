//! Watching a daemon's migration until it is over.

use std::time::{Duration, Instant};

use serde_json::json;
use vmferry_qmp::types::{MigrationInfo, MigrationStatus};

use super::daemon::{Daemon, Refusal};
use crate::exit::{Exit, Failure};
use crate::render::{Outcome, Progress, Sample};
use crate::signals::{Signal, Signals};

/// How often the daemon is asked.
const INTERVAL: Duration = Duration::from_millis(250);

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
    let mut cancelling = false;
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
        match signals.wait(Some(INTERVAL))? {
            None => {}
            Some(Signal::Hangup) => return Ok(Watched::Detached),
            Some(Signal::Stop) if cancelling => {
                return Err(
                    Failure::new(Exit::Cancelled, "stopped waiting for the cancel")
                        .hint("see vmferry status for how it ended"),
                );
            }
            Some(Signal::Stop) => {
                cancelling = true;
                cancel(daemon, progress)?;
            }
        }
    }
}

/// A cancel that comes too late is refused; the migration then goes on to its end.
fn cancel(daemon: &mut Daemon, progress: &Progress) -> Result<(), Failure> {
    match daemon.execute("migrate_cancel", &json!({})) {
        Ok(_) => progress.note("cancelling; again Ctrl-C stops waiting for it"),
        Err(Refusal::Refused(why)) => progress.note(&format!("cannot cancel any more: {why}")),
        Err(error) => return Err(lost(&error.into())),
    }
    Ok(())
}

/// Wait without showing anything.
pub(crate) fn until_over(daemon: &mut Daemon, signals: &Signals) -> Result<Outcome, Failure> {
    loop {
        match daemon.migration() {
            Ok(info) => {
                if let Some(outcome) = Outcome::of(&info) {
                    return Ok(outcome);
                }
            }
            Err(gone) => return last_word(daemon, &gone),
        }
        if signals.wait(Some(INTERVAL))?.is_some() {
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
