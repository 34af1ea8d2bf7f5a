//! `vmferry check`: is a qcow2 image consistent?

use std::io::Write;

use vmferry_disk::OpenError;
use vmferry_qcow2::{CheckReport, Error, FileStorage, Repair};

use crate::exit::{Exit, Failure};
use crate::flags::check::CheckFlags;
use crate::output;
use crate::render;
use crate::render::check::Checked;
use crate::render::style::Palette;

pub(crate) fn run(flags: &CheckFlags) -> Result<Exit, Failure> {
    let checked = check(flags)?;
    let mut out = output::stdout();
    if flags.json {
        render::write_json(&mut out, &checked.object())?;
    } else {
        let mut text = std::io::BufWriter::new(&mut out);
        checked.text(Palette::for_stdout(), &mut text)?;
        text.flush()?;
    }
    Ok(match checked.is_clean() {
        true => Exit::Whole,
        false => Exit::Failed,
    })
}

fn check(flags: &CheckFlags) -> Result<Checked<'_>, Failure> {
    let storage = open(flags).map_err(|error| {
        let failure = Failure::new(Exit::Unreadable, &error);
        match error {
            OpenError::Lock(_) => failure.hint("end the program that uses the image first"),
            _ => failure,
        }
    })?;
    let failed = |error: Error| {
        let exit = match &error {
            // It was read: what failed is mending it.
            Error::Storage { operation, .. } if *operation != "read" => Exit::Failed,
            Error::RefcountOverflow { .. } => Exit::Failed,
            _ => Exit::Unreadable,
        };
        Failure::new(exit, format!("{}: {error}", flags.image.display()))
    };
    let repair = flags.repair.map_or(Repair::None, Repair::from);
    let found = vmferry_qcow2::check(&storage, repair).map_err(failed)?;
    let left = match repair {
        Repair::None => None,
        // What it is like now is looked at, not concluded.
        Repair::Leaks | Repair::All => Some(look(&storage).map_err(failed)?),
    };
    Ok(Checked {
        image: &flags.image,
        found,
        left,
    })
}

fn look(storage: &FileStorage) -> Result<CheckReport, Error> {
    vmferry_qcow2::check(storage, Repair::None)
}

/// Locked: against everybody who writes, and for a repair as a guest's disk is.
fn open(flags: &CheckFlags) -> Result<FileStorage, OpenError> {
    if flags.repair.is_some() {
        return FileStorage::open(&flags.image, false, true);
    }
    let mut storage = FileStorage::open(&flags.image, true, false)?;
    storage.freeze(&flags.image)?;
    Ok(storage)
}
