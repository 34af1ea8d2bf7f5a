//! `vmferry send`: a parked machine runs on.

mod outcome;
mod target;
mod vm;
mod watch;

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use vmferry_channel::{Stop, Uri};
use vmferry_disk::{Hold, Node};
use vmferry_image::Image;
use vmferry_migration::{
    Capabilities, Parameters, Published, RunningSource, SourceDisk, SourceJob, SourceMachine,
};
use vmferry_relay::restore::{self, RestoreOptions};

use super::parked;
use crate::disks::{self, Past, Purpose};
use crate::exit::{Exit, Failure};
use crate::flags::SendFlags;
use crate::flags::disk::DiskFlag;
use crate::flags::rate::Rate;
use crate::output;
use crate::signals::Signals;
use outcome::{Figures, Outcome};
use target::Way;
use vm::Vm;
use watch::Watch;

pub(crate) fn run(flags: &SendFlags) -> Result<Exit, Failure> {
    check(flags)?;
    let vm = flags.vm.as_ref();
    let mut vm = vm.map(|address| Vm::connect(address, flags)).transpose()?;
    let image = parked::open(&flags.image, json_out(flags))?;
    if flags.verify {
        parked::verify(&image, json_out(flags))?;
    }
    // A guest that was interrupted has its disks.
    let disks = match flags.resume {
        true => Vec::new(),
        false => open_disks(&flags.disk)?,
    };
    let options = RestoreOptions {
        postcopy: flags.postcopy,
    };
    let mut machine = restore::machine(&image, options).map_err(Failure::refused)?;

    let signals = Signals::new()?;
    let stop = Stop::new()?;
    let way = match &mut vm {
        Some(vm) => {
            machine.opening.switchover_start &= vm.knows_switchover_start();
            vm.open_way(flags, image.head(), &stop)?
        }
        None => Way::open(flags, &stop)?,
    };
    let begun = way.begun;
    let (target, connections) = way.split();
    let job = SourceJob {
        disks,
        target,
        parameters: parameters(flags),
        capabilities: Capabilities {
            return_path: !flags.one_way,
            ..Capabilities::default()
        },
        stop,
    };
    let mut watch = Watch::new(flags, &signals, vm, begun)?;
    let source = start(flags, job, machine, watch.published());
    let source = source.map_err(|error| Failure::new(Exit::Failed, error))?;
    let end = watch.until_over(&source)?;
    let requested = source.requested();
    // What it has to say is said; its connections end with it.
    drop(source);
    let end = connections.explain(end);
    let (outcome, runs_after) = watch.ask_destination(end);
    let learnt = match (&outcome, flags.learn) {
        (Outcome::Completed(_), true) => Some(learn(&image, &requested)),
        _ => None,
    };
    let figures = Figures {
        runs_after,
        learnt,
        ..watch.figures()
    };
    outcome.tell(flags, &figures)
}

/// What can be known before anything is opened.
fn check(flags: &SendFlags) -> Result<(), Failure> {
    match &flags.uri {
        Some(uri @ Uri::File { .. }) if !flags.one_way => Err(Failure::refused(format!(
            "{uri} cannot answer, so nobody could tell whether the machine arrives"
        ))
        .hint(
            "--one-way sends without an answer; vmferry convert makes a file of a parked machine",
        )),
        Some(Uri::Stdio) if io::stdout().is_terminal() => Err(Failure::usage(
            "standard output is a terminal, not a channel",
        )),
        _ => Ok(()),
    }
}

fn start(
    flags: &SendFlags,
    job: SourceJob,
    machine: SourceMachine,
    published: Published,
) -> Result<RunningSource, vmferry_migration::SourceFailure> {
    if flags.resume {
        return RunningSource::take_up(job, machine, published);
    }
    RunningSource::start_machine(job, machine, published)
}

fn parameters(flags: &SendFlags) -> Parameters {
    let bandwidth = flags.bandwidth.map_or(0, Rate::max_bandwidth);
    Parameters {
        max_bandwidth: Some(bandwidth).filter(|bandwidth| *bandwidth > 0),
        ..Parameters::default()
    }
}

/// They are only read, and nothing is written down about them: they stay here as well.
fn open_disks(flags: &[DiskFlag]) -> Result<Vec<SourceDisk>, Failure> {
    disks::check(flags)?;
    if let Some(flag) = flags
        .iter()
        .find(|flag| flag.create.is_some() || flag.overwrite)
    {
        return Err(Failure::usage(format!(
            "disk \"{}\": create=on and overwrite=on are for disks that are filled; this one is sent",
            flag.name
        )));
    }
    let read_only = |flag: &DiskFlag| DiskFlag {
        read_only: true,
        ..flag.clone()
    };
    let flags: Vec<DiskFlag> = flags.iter().map(read_only).collect();
    let open = disks::open(&flags, |_| (Purpose::Serve, Past::Unknown))?;
    let source = |disk: disks::OpenDisk| SourceDisk {
        node: Node::new(disk.name, disk.image.into_device(), Hold::Nothing),
        record: None,
    };
    Ok(open.disks.into_iter().map(source).collect())
}

/// Keep what was asked for. That it cannot be kept is no failure: the guest runs.
fn learn(image: &Arc<Image>, requested: &[vmferry_ram::StoredRange]) -> bool {
    let kept = image.keep_working_set(&restore::learnt(image, requested));
    if let Err(error) = &kept {
        output::say(&format!(
            "what the guest asked for first is not kept: {error}"
        ));
    }
    kept.is_ok()
}

fn json_out(flags: &SendFlags) -> Option<Box<dyn Write>> {
    flags.json.then(|| Box::new(flags.out()) as Box<dyn Write>)
}
