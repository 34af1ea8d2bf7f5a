//! `vmferry status`.

use std::io;

use super::daemon::Daemon;
use crate::exit::{Exit, Failure};
use crate::flags::StatusFlags;
use crate::render;

pub(crate) fn run(flags: &StatusFlags) -> Result<Exit, Failure> {
    let mut daemon = Daemon::connect(&flags.daemon.qmp)?;
    if flags.json {
        render::write_json(&mut io::stdout(), &daemon.migration_object()?)?;
    } else {
        render::status(&daemon.migration()?, &mut io::stdout())?;
    }
    Ok(Exit::Whole)
}
