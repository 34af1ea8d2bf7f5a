//! `vmferry migrate`.

mod park;
mod qemu;
mod target;

use std::io::{self, Write};

use vmferry_channel::Uri;
use vmferry_qmp::types::{Migrate, MigrationCapability};

use super::daemon::{Daemon, Refusal};
use super::watch::{Watched, watch};
use crate::exit::{Exit, Failure};
use crate::flags::MigrateFlags;
use crate::output::{self, Out};
use crate::render::{self, Outcome, Progress};
use crate::signals::Signals;
use target::Target;

pub(crate) fn run(flags: &MigrateFlags) -> Result<Exit, Failure> {
    match (&flags.qmp, &flags.vm) {
        (Some(qmp), None) => disks_of_daemon(qmp, flags),
        (None, Some(vm)) => park::run(vm, flags),
        _ => Err(Failure::usage(
            "disks of a daemon and the machine of a QEMU cannot travel together yet",
        )
        .hint("--qmp alone migrates disks; --vm alone parks a machine in file:FILE")),
    }
}

fn disks_of_daemon(qmp: &Uri, flags: &MigrateFlags) -> Result<Exit, Failure> {
    let signals = Signals::new()?;
    let mut daemon = Daemon::connect(qmp)?;
    if matches!(flags.uri, Uri::File { .. }) && !flags.one_way {
        // Before it is made.
        return Err(cannot_answer(&flags.uri));
    }
    // What is refused changes nothing: no limit of the daemon, and no file.
    check(flags, &mut daemon)?;
    if flags.check {
        tell_checked(flags)?;
        return Ok(Exit::Whole);
    }
    let mut target = Target::open(&flags.uri)?;
    if target.is_one_way() && !flags.one_way {
        return Err(cannot_answer(&flags.uri));
    }
    let uri = target.hand_over(&mut daemon, qmp)?;
    daemon.set_limits(&flags.limits)?;
    daemon.set_capability(MigrationCapability::ZeroBlocks, !flags.no_zero_blocks)?;
    target.empty()?;
    let started = daemon.execute("migrate", &arguments(flags, uri, false));
    if !matches!(started, Err(Refusal::Refused(_))) {
        target.keep();
    }
    started?;
    if flags.detach {
        return Ok(Exit::Whole);
    }
    let watched = watch(&mut daemon, &signals, &mut Progress::new(json_out(flags)));
    match watched? {
        Watched::Detached => Ok(Exit::Whole),
        Watched::Over(outcome) => {
            target.finish();
            report(flags, &outcome)?;
            outcome.into_result().map_err(Failure::told)
        }
    }
}

fn cannot_answer(uri: &Uri) -> Failure {
    Failure::refused(format!(
        "{uri} cannot answer, so nobody could tell whether the disks arrive"
    ))
    .hint("--one-way migrates without an answer")
}

/// Ask the daemon what would go wrong. Nothing is opened here for it: a command that is run, or a
/// file that is emptied, would be more than a check.
fn check(flags: &MigrateFlags, daemon: &mut Daemon) -> Result<(), Failure> {
    let uri = target::as_daemon_sees(&flags.uri)?.to_string();
    daemon.execute("migrate", &arguments(flags, uri, true))?;
    Ok(())
}

fn tell_checked(flags: &MigrateFlags) -> io::Result<()> {
    if flags.json {
        return render::write_json(&mut out(flags), &serde_json::json!({"event": "checked"}));
    }
    writeln!(
        out(flags),
        "nothing on this side stands in the way; the destination was not asked"
    )
}

fn arguments(flags: &MigrateFlags, uri: String, only_check: bool) -> Migrate {
    Migrate {
        uri: Some(uri),
        x_disks: (!flags.disk.is_empty()).then(|| flags.disk.clone()),
        inc: Some(flags.incremental),
        x_one_way: Some(flags.one_way),
        x_check: Some(only_check),
        ..Migrate::default()
    }
}

fn report(flags: &MigrateFlags, outcome: &Outcome) -> io::Result<()> {
    if flags.json {
        return render::write_json(&mut out(flags), &outcome.object());
    }
    match outcome {
        Outcome::Completed(summary) => writeln!(out(flags), "completed: {}", summary.line()),
        // The failure says it.
        Outcome::Cancelled | Outcome::Failed(_) | Outcome::Undecided(_) => Ok(()),
    }
}

fn json_out(flags: &MigrateFlags) -> Option<Box<dyn Write>> {
    flags.json.then(|| Box::new(out(flags)) as Box<dyn Write>)
}

/// Where reports go: standard output, unless that carries the stream.
fn out(flags: &MigrateFlags) -> Out {
    match flags.uri {
        Uri::Stdio | Uri::Fd(1) => output::stderr(),
        _ => output::stdout(),
    }
}
