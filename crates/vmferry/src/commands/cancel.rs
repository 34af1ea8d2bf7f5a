//! `vmferry cancel`.

use serde_json::json;

use super::daemon::Daemon;
use super::watch;
use crate::exit::{Exit, Failure};
use crate::flags::CancelFlags;
use crate::render::Outcome;
use crate::signals::Signals;

/// Succeeds when nothing migrates any more and the disks are here.
pub(crate) fn run(flags: &CancelFlags) -> Result<Exit, Failure> {
    let signals = Signals::new()?;
    let mut daemon = Daemon::connect(&flags.daemon.qmp)?;
    let now = daemon.migration()?;
    if let Some(Outcome::Undecided(why)) = Outcome::of(&now) {
        let message = format!("too late to cancel, the destination may have the disks: {why}");
        return Err(Failure::refused(message)
            .hint("look at the destination, then say vmferry resolve serve, or give-up"));
    }
    if watch::is_idle(&now) {
        return Err(Failure::refused("there is no migration to cancel"));
    }
    daemon.execute("migrate_cancel", &json!({}))?;
    match watch::until_over(&mut daemon, &signals)? {
        Outcome::Cancelled | Outcome::Failed(_) => Ok(Exit::Whole),
        Outcome::Completed(_) => Err(Failure::new(
            Exit::Failed,
            "the migration completed before it could be cancelled",
        )),
        undecided @ Outcome::Undecided(_) => undecided.into_result(),
    }
}
