//! `vmferry resolve`.

use vmferry_qmp::types::{Resolution, Resolve};

use super::daemon::Daemon;
use crate::exit::{Exit, Failure};
use crate::flags::{Decision, ResolveFlags};

pub(crate) fn run(flags: &ResolveFlags) -> Result<Exit, Failure> {
    let decision = match flags.decision {
        Decision::Serve => Resolution::Serve,
        Decision::GiveUp => Resolution::GiveUp,
    };
    Daemon::connect(&flags.daemon.qmp)?.execute("x-resolve", &Resolve { decision })?;
    Ok(Exit::Whole)
}
