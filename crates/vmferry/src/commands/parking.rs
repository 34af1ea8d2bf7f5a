//! A machine that goes into a file, as the commands that park one do it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_channel::{Channel, Listener, Stop};
use vmferry_multifd::{JoinOptions, Joining, MultifdError};
use vmferry_relay::park::{ParkOptions, Parked, Parker};

use super::parked;
use crate::disks::MadeFiles;
use crate::exit::{Exit, Failure};
use crate::flags::multifd::MultifdFlags;
use crate::render;

/// Guest memory holds secrets.
const MODE: u32 = 0o600;

/// Make the file, which must not exist, and what fills it. It goes again with `made`.
pub(super) fn create(
    path: &Path,
    index: Option<&Path>,
    made: &mut MadeFiles,
) -> Result<Parker, Failure> {
    parked::check_index(index, &[path])?;
    let failed = |error: io::Error| {
        let message = format!("cannot save to {}: {error}", path.display());
        match error.kind() {
            io::ErrorKind::AlreadyExists => Failure::refused(message),
            _ => Failure::new(Exit::Failed, message),
        }
    };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder = File::open(folder).map_err(failed)?;
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(path)
        .map_err(failed)?;
    made.add(path);
    // Its content is synced before the source is told; its name is durable from now on.
    folder.sync_all().map_err(failed)?;
    let index = Some((path.to_owned(), parked::place(index)));
    Parker::new(file, ParkOptions { index }).map_err(Failure::refused)
}

/// The machine is whole here, and may run on there.
pub(super) fn untold() -> Failure {
    let message = "the connection broke before the source heard that its machine is parked";
    Failure::new(Exit::Undecided, message)
        .hint("see whether the guest runs on at the source, before this file is started anywhere")
}

/// Where the index of a parked machine lies.
pub(super) fn index_path(path: &Path, index: Option<&Path>) -> PathBuf {
    if let Some(index) = index {
        return index.to_owned();
    }
    let mut beside = OsString::from(path);
    beside.push(".index");
    beside.into()
}

/// The channel of the next migration that comes, and what joins it if it comes over several
/// connections. What is read from it is given up by `stop`; what is written by `last`, so that a source
/// can still be told why.
pub(super) fn accept(
    listener: &Listener,
    flags: &MultifdFlags,
    stop: &Stop,
    last: &Stop,
) -> Result<(Channel, Option<Joining>), Failure> {
    let Some(channels) = flags.multifd_channels else {
        let socket = listener.accept(stop).map_err(|error| failed(error, stop))?;
        return Ok((socket.into_channel(last), None));
    };
    let options = JoinOptions::new(channels, flags.compression().into());
    let joined = vmferry_multifd::accept(listener, &options, stop);
    let joined = joined.map_err(|error| failed(error, stop))?;
    Ok((joined.channel, Some(joined.joining)))
}

/// What was joined is over. `Some` if something went wrong there.
pub(super) fn why_broken(joining: Option<Joining>) -> Option<MultifdError> {
    joining?.finish().err()
}

/// A failure, or what came of being told to stop.
pub(super) fn failed(error: impl std::fmt::Display, stop: &Stop) -> Failure {
    if stop.is_triggered() {
        return Failure::new(Exit::Cancelled, "stopped before the migration was over");
    }
    Failure::new(Exit::Failed, error)
}

/// The last object of `--json`.
pub(super) fn object(path: &Path, parked: &Parked, elapsed: Duration) -> Value {
    json!({
        "event": "completed",
        "disks": [],
        "file": path.to_string_lossy(),
        "bytes": parked.bytes,
        "memory-bytes": parked.memory_bytes,
        "was-postcopy": parked.was_postcopy,
        "elapsed-ms": u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
        "durable": true,
        "source-told": parked.source_told,
    })
}

/// One line for a person.
pub(super) fn line(path: &Path, parked: &Parked, elapsed: Duration) -> String {
    format!(
        "parked a machine with {} of memory in {} ({}) in {}; whole, and on stable storage",
        render::bytes(parked.memory_bytes),
        path.display(),
        render::bytes(parked.bytes),
        render::time(elapsed)
    )
}
