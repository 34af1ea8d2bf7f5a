//! `vmferry migrate --vm QMP file:FILE`: the machine of a running QEMU goes into a file.
//!
//! ```text
//!   QEMU ── migrate ──▶ socket of ours ──▶ park::receive ──▶ FILE, FILE.index
//!    │ status                                 │
//!    ▼                                        ▼
//!   watched here: Ctrl-C, progress     SHUT 0 when all is on stable storage: QEMU completes then
//! ```
//!
//! Until that SHUT 0 the guest can go on where it is. Whatever goes wrong, QEMU says which of both it
//! is: the file stays only if it has completed.

use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Instant;

use vmferry_channel::{Listener, Stop, Uri};
use vmferry_migration::Published;
use vmferry_relay::park::{self, Parked, Parker};
use vmferry_relay::qemu::PrivateFolder;

use super::qemu::{Left, Source};
use super::{json_out, out};
use crate::commands::parking;
use crate::disks::MadeFiles;
use crate::exit::{Exit, Failure};
use crate::flags::MigrateFlags;
use crate::render::{self, Progress};
use crate::signals::Signals;

pub(super) fn run(vm: &Uri, flags: &MigrateFlags) -> Result<Exit, Failure> {
    let path = file_of(&flags.uri)?;
    let signals = Signals::new()?;
    let mut source = Source::connect(vm)?;
    let mut made = MadeFiles::default();
    let parker = parking::create(path, flags.index.as_deref(), &mut made)?;
    let mut folder = source.private_folder()?;
    let address = folder.socket();
    let listener = Listener::bind(&address).map_err(|error| Failure::new(Exit::Failed, error))?;
    folder.open_to_user(&address)?;
    let begun = Instant::now();
    source.leave(flags, &address)?;
    let stop = Stop::new()?;
    let (left, parked) = thread::scope(|scope| {
        let parking = scope.spawn(|| receive(&listener, folder, parker, flags, &stop));
        let mut progress = Progress::new(json_out(flags));
        let left = source.watch(&signals, &mut progress);
        if left != Left::Completed {
            stop.trigger();
        }
        let panicked = |_| {
            Err(Failure::new(
                Exit::Failed,
                "internal error: parking panicked",
            ))
        };
        (left, parking.join().unwrap_or_else(panicked))
    });
    match (left, parked) {
        (Left::Completed, Ok(parked)) => {
            made.keep();
            source.end();
            tell(flags, path, &parked, begun)?;
            Ok(Exit::Whole)
        }
        (left, Ok(_)) => {
            made.add(&parking::index_path(path, flags.index.as_deref()));
            Err(not_parked(&mut source, left, made, None))
        }
        (left, Err(failure)) => Err(not_parked(&mut source, left, made, Some(failure))),
    }
}

/// `file:FILE`, from its beginning.
fn file_of(uri: &Uri) -> Result<&Path, Failure> {
    match uri {
        Uri::File { path, offset: 0 } => Ok(path),
        Uri::File { .. } => Err(Failure::usage(
            "a machine is parked in a file of its own, without an offset",
        )),
        uri => Err(Failure::usage(format!(
            "--vm cannot migrate to {uri} yet: it parks a machine in file:FILE"
        ))
        .hint(
            "QEMU's own migrate moves a machine to another host; vmferry receive parks what comes",
        )),
    }
}

/// The destination's side. It ends with the migration, or with `stop`.
fn receive(
    listener: &Listener,
    folder: PrivateFolder,
    parker: Parker,
    flags: &MigrateFlags,
    stop: &Stop,
) -> Result<Parked, Failure> {
    let last = Stop::new()?;
    let (channel, joining) = parking::accept(listener, &flags.multifd, stop, &last)?;
    // Nothing is left behind from now on, whatever ends this process.
    drop(folder);
    // It never becomes a postcopy: a connection that breaks leaves the guest where it is.
    let parked = park::receive(channel, parker, &mut |_| None, stop, &Published::default());
    match (parked, parking::why_broken(joining)) {
        (Ok(parked), _) => Ok(parked),
        (Err(_), Some(error)) => Err(parking::failed(error, stop)),
        (Err(error), None) => Err(parking::failed(error, stop)),
    }
}

/// The guest is where it was, and the file goes, unless nobody knows.
fn not_parked(
    source: &mut Source,
    left: Left,
    made: MadeFiles,
    failure: Option<Failure>,
) -> Failure {
    let is_whole = failure.is_none();
    match left {
        // It says why, if anybody does.
        Left::Lost(why) if is_whole => {
            made.keep();
            let message =
                format!("the machine is parked whole, but its QEMU cannot be asked: {why}");
            Failure::new(Exit::Undecided, message)
                .hint("if that QEMU still runs the guest, the file is stale; if it does not, the machine is in the file")
        }
        Left::Lost(why) => Failure::new(
            Exit::Failed,
            format!("the machine is not parked, and its QEMU is gone: {why}"),
        ),
        Left::Cancelled => {
            let guest = source.back();
            source.end();
            Failure::new(Exit::Cancelled, format!("cancelled; {guest}"))
        }
        Left::Completed | Left::Failed(_) => {
            let guest = source.back();
            source.end();
            let mut why: Vec<String> = Vec::new();
            why.extend(failure.map(|failure| failure.message().to_owned()));
            if let Left::Failed(Some(reason)) = left {
                why.push(format!("QEMU says: {reason}"));
            }
            let message = format!("the machine is not parked: {}; {guest}", why.join("; "));
            Failure::new(Exit::Failed, message)
        }
    }
}

fn tell(flags: &MigrateFlags, path: &Path, parked: &Parked, begun: Instant) -> std::io::Result<()> {
    let elapsed = begun.elapsed();
    if flags.json {
        return render::write_json(&mut out(flags), &parking::object(path, parked, elapsed));
    }
    writeln!(out(flags), "{}", parking::line(path, parked, elapsed))
}
