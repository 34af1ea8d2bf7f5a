//! `vmferry serve`: the storage daemon.

use std::io;
use std::thread;

use sd_notify::NotifyState;
use vmferry_channel::{Listener, PacketError, Uri, is_inherited_listener};
use vmferry_daemon::{Config, Daemon, Disk, Incoming, StartError};
use vmferry_disk::{Hold, Node};
use vmferry_migration::{Coverage, Record, RecordFile, Residence, Standing, Start, start};
use vmferry_qmp::types::ShutdownCause;
use vmferry_relay::announce::{Announcer, Interface};

use crate::activation::Activated;
use crate::disks::{self, OpenDisks, Past, Purpose};
use crate::exit::{Exit, Failure};
use crate::flags::ServeFlags;
use crate::flags::announce::AnnounceFlag;
use crate::flags::incoming::IncomingFlag;
use crate::output;
use crate::records;
use crate::render;
use crate::signals::Signals;

/// The other side of a disk that was made here, and has not been migrated yet.
const NOBODY_YET: &str = "nobody yet";

pub(crate) fn run(flags: &ServeFlags) -> Result<Exit, Failure> {
    let signals = Signals::new()?;
    let activated = Activated::take()?;
    let waits = flags.incoming.is_some() || activated.incoming.is_some();
    check(flags, waits)?;
    let plans = plans(flags, waits)?;
    let nics = nics(flags)?;
    let OpenDisks { disks, mut made } = disks::open(&flags.disk, |flag| {
        let plan = plans.iter().find(|plan| plan.name == flag.name);
        plan.map_or((Purpose::Serve, Past::Unknown), Plan::purpose)
    })?;
    for plan in &plans {
        plan.check_record()?;
    }
    let waiting = plans.iter().any(|plan| plan.start == Start::Waiting);
    let doors = Doors::open(flags, activated, waiting)?;
    let addresses = doors.addresses();
    for (open, plan) in disks.iter().zip(&plans) {
        if let (true, Some(file)) = (open.is_new, &plan.file) {
            // So that the same command line works again after a restart.
            made.add(file.path());
            file.write(plan.residence_when_made(), NOBODY_YET)
                .map_err(|error| Failure::new(Exit::Failed, error))?;
        }
    }
    let disks: Vec<Disk> = disks
        .into_iter()
        .zip(plans)
        .map(|(open, plan)| {
            let format = open.image.format().name();
            let (device, image) = open.image.into_shared_device();
            Disk {
                format,
                node: Node::new(open.name, device, plan.resting()),
                image,
                record: plan.file,
                start: plan.start,
                taken_back: flags.take_back.contains(&plan.name),
                peer: plan.record.map(|record| record.peer).unwrap_or_default(),
                path: open.path,
            }
        })
        .collect();

    let daemon =
        Daemon::start(doors.into_config(flags, disks, nics)).map_err(|error| match error {
            StartError::TwoOfAName(_) => Failure::usage(error),
            StartError::Daemon(_) | StartError::Resources(_) => Failure::new(Exit::Failed, error),
        })?;
    made.keep();
    for (what, address) in &addresses {
        report(flags, what, address)?;
    }
    notify(&[NotifyState::Ready]);
    end_on_signal(signals, &daemon)?;
    daemon
        .run()
        .map_err(|error| Failure::new(Exit::Failed, error))?;
    Ok(Exit::Whole)
}

/// What can be said before anything is opened.
fn check(flags: &ServeFlags, waits: bool) -> Result<(), Failure> {
    disks::check(&flags.disk)?;
    for name in &flags.take_back {
        if flags.disk.iter().all(|flag| flag.name != *name) {
            return Err(Failure::usage(format!(
                "--take-back {name}: there is no such --disk"
            )));
        }
    }
    for (index, flag) in flags.announce.iter().enumerate() {
        if flags.announce[..index].contains(flag) {
            return Err(Failure::usage(format!(
                "--announce {flag}: was given twice"
            )));
        }
    }
    if let Some(flag) = flags.disk.iter().find(|flag| flag.overwrite && !waits) {
        return Err(Failure::usage(format!(
            "disk \"{}\": overwrite=on is for disks that a migration fills (--incoming)",
            flag.name
        )));
    }
    if flags.incremental && !waits {
        return Err(Failure::usage(
            "--incremental is about the migration that --incoming waits for",
        ));
    }
    if waits && flags.disk.iter().all(|flag| flag.read_only) {
        return Err(Failure::usage(
            "--incoming needs a disk without readonly=on",
        ));
    }
    records::check_folder(flags.state_dir.as_deref())
}

/// What is known of a disk before it is opened, and how it begins.
struct Plan {
    name: String,
    /// Read-only disks never move, so they have none.
    file: Option<RecordFile>,
    record: Option<Record>,
    start: Start,
}

impl Plan {
    fn purpose(&self) -> (Purpose, Past) {
        let purpose = match self.start {
            Start::Waiting => Purpose::Fill,
            Start::Live | Start::Undecided => Purpose::Serve,
        };
        let past = match self.record.as_ref().map(|record| record.residence) {
            None => Past::Unknown,
            Some(Residence::Incoming) => Past::HalfFilled,
            Some(Residence::Arrived | Residence::Leaving) => Past::Arrived,
            Some(Residence::Moved) => Past::Moved,
        };
        (purpose, past)
    }

    /// Once the image is locked: what was decided still holds.
    fn check_record(&self) -> Result<(), Failure> {
        match &self.file {
            Some(file) => records::check_unchanged(&self.name, file, self.record.as_ref()),
            None => Ok(()),
        }
    }

    /// Where a disk lives that this run makes.
    fn residence_when_made(&self) -> Residence {
        match self.start {
            Start::Waiting => Residence::Incoming,
            Start::Live | Start::Undecided => Residence::Arrived,
        }
    }

    /// What guests of the disk wait for. The daemon itself holds disks that are undecided.
    fn resting(&self) -> Hold {
        match self.start {
            Start::Waiting => Hold::Writes,
            Start::Live | Start::Undecided => Hold::Nothing,
        }
    }
}

/// Where the disks stand, by their records and the command line.
fn plans(flags: &ServeFlags, waits: bool) -> Result<Vec<Plan>, Failure> {
    let mut plans = Vec::new();
    for flag in &flags.disk {
        let (file, record) = if flag.read_only {
            (None, None)
        } else {
            let (file, record) = records::of_disk(flag, flags.state_dir.as_deref())?;
            (Some(file), record)
        };
        plans.push(Plan {
            name: flag.name.clone(),
            file,
            record,
            start: Start::Live,
        });
    }
    let standing: Vec<Standing> = movable(&mut plans)
        .map(|plan| Standing {
            disk: plan.name.clone(),
            record: plan.record.clone(),
            taken_back: flags.take_back.contains(&plan.name),
        })
        .collect();
    let starts = start(&standing, waits).map_err(Failure::refused)?;
    for (plan, start) in movable(&mut plans).zip(starts) {
        plan.start = start;
    }
    Ok(plans)
}

fn movable(plans: &mut [Plan]) -> impl Iterator<Item = &mut Plan> {
    plans.iter_mut().filter(|plan| plan.file.is_some())
}

/// The NICs to announce, each with an open socket.
fn nics(flags: &ServeFlags) -> Result<Vec<Box<dyn Announcer>>, Failure> {
    let open = |flag: &AnnounceFlag| -> Result<Box<dyn Announcer>, Failure> {
        let nic = Interface::open(&flag.interface, flag.mac).map_err(|error| {
            let exit = match &error {
                PacketError::NoSuchInterface(_) | PacketError::NotEthernet(_) => Exit::Refused,
                PacketError::NotPermitted(_) | PacketError::Host { .. } => Exit::Failed,
            };
            Failure::new(exit, format!("--announce: {error}"))
        })?;
        Ok(Box::new(nic))
    };
    flags.announce.iter().map(open).collect()
}

/// Everything that the daemon listens on.
struct Doors {
    nbd: Vec<Listener>,
    qmp: Vec<Listener>,
    incoming: Option<Incoming>,
}

impl Doors {
    fn open(flags: &ServeFlags, activated: Activated, waiting: bool) -> Result<Self, Failure> {
        let Activated {
            mut nbd,
            mut qmp,
            incoming,
        } = activated;
        for address in &flags.nbd {
            nbd.push(listen("--nbd", address)?);
        }
        if let Some(address) = &flags.qmp {
            qmp.push(listen("--qmp", address)?);
        }
        let incoming = match (&flags.incoming, incoming) {
            (Some(_), Some(_)) => {
                return Err(Failure::usage(
                    "there is --incoming, and a socket named incoming from systemd",
                ));
            }
            // What was expected has arrived before.
            _ if !waiting => None,
            (Some(flag), None) => Some(incoming_door(flag)?),
            (None, listener) => listener.map(Incoming::Listener),
        };
        if nbd.is_empty() && qmp.is_empty() && incoming.is_none() {
            return Err(Failure::usage(
                "nobody could reach the daemon: say --nbd or --qmp",
            ));
        }
        Ok(Self { nbd, qmp, incoming })
    }

    fn addresses(&self) -> Vec<(&'static str, Uri)> {
        let of = |what, listeners: &[Listener]| -> Vec<_> {
            listeners
                .iter()
                .map(|listener| (what, listener.local().clone()))
                .collect()
        };
        let mut addresses = of("nbd", &self.nbd);
        addresses.extend(of("qmp", &self.qmp));
        if let Some(Incoming::Listener(listener)) = &self.incoming {
            addresses.push(("incoming", listener.local().clone()));
        }
        addresses
    }

    fn into_config(
        self,
        flags: &ServeFlags,
        disks: Vec<Disk>,
        nics: Vec<Box<dyn Announcer>>,
    ) -> Config {
        Config {
            coverage: match flags.incremental {
                true => Coverage::Incremental,
                false => Coverage::Whole,
            },
            name: None,
            disks,
            nbd: self.nbd,
            qmp: self.qmp,
            incoming: self.incoming,
            nics,
        }
    }
}

fn incoming_door(flag: &IncomingFlag) -> Result<Incoming, Failure> {
    Ok(match flag {
        IncomingFlag::Defer => Incoming::Deferred,
        IncomingFlag::At(uri @ (Uri::Tcp { .. } | Uri::Unix(_))) => {
            Incoming::Listener(listen("--incoming", uri)?)
        }
        IncomingFlag::At(uri @ Uri::Fd(number)) if is_inherited_listener(*number) => {
            Incoming::Listener(listen("--incoming", uri)?)
        }
        IncomingFlag::At(uri) => Incoming::Once(uri.clone()),
    })
}

fn listen(option: &str, address: &Uri) -> Result<Listener, Failure> {
    if matches!(address, Uri::Exec(_) | Uri::File { .. } | Uri::Stdio) {
        return Err(Failure::usage(format!(
            "{option} {address}: nobody can connect to that"
        )));
    }
    Listener::bind(address)
        .map_err(|error| Failure::new(Exit::Failed, format!("{option}: {error}")))
}

/// One line, or one object, for each listener.
fn report(flags: &ServeFlags, what: &'static str, address: &Uri) -> io::Result<()> {
    if !flags.json {
        let for_whom = match what {
            "nbd" => "NBD clients",
            "qmp" => "control (QMP)",
            _ => "a migration",
        };
        output::say(&format!("listening for {for_whom} at {address}"));
        return Ok(());
    }
    let object = render::listening(what, address);
    match flags.incoming {
        // Standard output is the way back to the source.
        Some(IncomingFlag::At(Uri::Stdio | Uri::Fd(1))) => {
            render::write_json(&mut output::stderr(), &object)
        }
        _ => render::write_json(&mut output::stdout(), &object),
    }
}

fn end_on_signal(signals: Signals, daemon: &Daemon) -> io::Result<()> {
    let ender = daemon.ender();
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            match signals.wait(None) {
                Ok(_) => notify(&[NotifyState::Stopping]),
                Err(error) => tracing::error!("cannot wait for signals: {error}"),
            }
            ender.end(ShutdownCause::HostSignal);
        })?;
    Ok(())
}

/// Tell systemd, if it is there.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("cannot notify systemd: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;
    use tempfile::TempDir;

    use super::*;
    use crate::flags::{Cli, Command};

    /// `serve` with these options, where `@` is the folder.
    fn flags(folder: &TempDir, options: &str) -> ServeFlags {
        let options = options.replace('@', &folder.path().display().to_string());
        let line = format!("vmferry serve {options}");
        match Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.command) {
            Ok(Command::Serve(flags)) => flags,
            other => panic!("{other:?}"),
        }
    }

    fn starts(folder: &TempDir, options: &str) -> Result<Vec<Start>, Exit> {
        let flags = flags(folder, options);
        let waits = flags.incoming.is_some();
        check(&flags, waits)
            .and_then(|()| plans(&flags, waits))
            .map(|plans| plans.iter().map(|plan| plan.start).collect())
            .map_err(|failure| failure.exit)
    }

    #[test]
    fn records_say_how_disks_begin() {
        let folder = tempfile::tempdir().unwrap();
        let record = RecordFile::new("a", &folder.path().join("a"), None);
        let both = "--disk a=@/a --disk b=@/b";
        assert_eq!(starts(&folder, both), Ok(vec![Start::Live; 2]));
        record.write(Residence::Leaving, "peer").unwrap();
        assert_eq!(
            starts(&folder, both),
            Ok(vec![Start::Undecided, Start::Live])
        );
        record.write(Residence::Moved, "peer").unwrap();
        assert_eq!(starts(&folder, both), Err(Exit::Refused));
        assert_eq!(
            starts(&folder, &format!("{both} --take-back a")),
            Ok(vec![Start::Live; 2])
        );
        record.write(Residence::Incoming, "peer").unwrap();
        assert_eq!(starts(&folder, both), Err(Exit::Refused));
        let waiting = format!("{both} --incoming defer");
        assert_eq!(starts(&folder, &waiting), Ok(vec![Start::Waiting; 2]));
    }

    #[test]
    fn a_read_only_disk_stays_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let options = "--disk cd=@/cd,readonly=on --disk a=@/a --incoming defer";
        assert_eq!(
            starts(&folder, options),
            Ok(vec![Start::Live, Start::Waiting])
        );
        let alone = "--disk cd=@/cd,readonly=on --incoming defer";
        assert_eq!(starts(&folder, alone), Err(Exit::Usage));
    }

    #[test]
    fn a_command_line_that_makes_no_sense_is_refused_before_anything_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        for options in [
            "--disk a=@/a --disk a=@/b",
            "--disk a=@/a --take-back b",
            "--disk a=@/a --announce br0 --announce eth0 --announce br0",
            "--disk a=@/a,overwrite=on",
            "--disk a=@/a --incremental",
            "--disk a=@/a --state-dir @/none",
        ] {
            assert_eq!(starts(&folder, options), Err(Exit::Usage), "{options}");
        }
        assert!(starts(&folder, "--disk a=@/a,overwrite=on --incoming defer").is_ok());
    }

    #[test]
    fn records_are_kept_in_the_state_folder() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        fs::create_dir(&state).unwrap();
        RecordFile::new("a", &folder.path().join("a"), Some(&state))
            .write(Residence::Moved, "p")
            .unwrap();
        assert_eq!(starts(&folder, "--disk a=@/a"), Ok(vec![Start::Live]));
        assert_eq!(
            starts(&folder, "--disk a=@/a --state-dir @/state"),
            Err(Exit::Refused)
        );
    }

    #[test]
    fn nobody_connects_to_a_command_or_a_file() {
        for address in ["exec:true", "file:x", "-"] {
            let failure = listen("--nbd", &address.parse().unwrap()).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{address}");
        }
        assert!(listen("--nbd", &"tcp:127.0.0.1:0".parse().unwrap()).is_ok());
    }
}
