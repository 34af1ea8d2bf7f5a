//! `vmferry status`.

use super::daemon::Daemon;
use crate::exit::{Exit, Failure};
use crate::flags::StatusFlags;
use crate::output;
use crate::render;

pub(crate) fn run(flags: &StatusFlags) -> Result<Exit, Failure> {
    let mut daemon = Daemon::connect(&flags.daemon.qmp)?;
    if flags.json {
        render::write_json(&mut output::stdout(), &daemon.migration_object()?)?;
    } else {
        render::status(&daemon.migration()?, &mut output::stdout())?;
    }
    Ok(Exit::Whole)
}
