//! `vmferry set`.

use super::daemon::Daemon;
use crate::exit::{Exit, Failure};
use crate::flags::SetFlags;

pub(crate) fn run(flags: &SetFlags) -> Result<Exit, Failure> {
    Daemon::connect(&flags.daemon.qmp)?.set_limits(&flags.limits)?;
    Ok(Exit::Whole)
}
