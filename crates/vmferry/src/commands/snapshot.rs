//! `vmferry snapshot`: internal snapshots of qcow2 images, of those that nobody has open and of those
//! that a daemon serves.

mod live;

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmferry_disk::{Access, ImageLock, OpenError};
use vmferry_inspect::Report;
use vmferry_qcow2::{ChainOptions, Error as Qcow2Error, Qcow2Disk};
use vmferry_snapshot::{Moment, NamedDisk, SnapshotError};

use super::whole_file::Output;
use crate::exit::{Exit, Failure};
use crate::flags::snapshot::{
    DisksFlags, ExportFlags, ImportFlags, ListFlags, SnapshotCommand, SnapshotFlags,
};
use crate::output;
use crate::render;
use crate::render::style::Palette;
use live::{Deed, Live};

pub(crate) fn run(flags: &SnapshotFlags) -> Result<Exit, Failure> {
    match &flags.command {
        SnapshotCommand::List(flags) => list(flags),
        SnapshotCommand::Create(flags) => change(&flags.disks, Deed::Save),
        SnapshotCommand::Apply(flags) => change(&flags.disks, Deed::Load),
        SnapshotCommand::Delete(flags) => change(&flags.disks, Deed::Delete),
        SnapshotCommand::Export(flags) => export(flags),
        SnapshotCommand::Import(flags) => import(flags),
    }
}

/// Images and what they are called.
struct Images {
    disks: Vec<(String, Qcow2Disk)>,
    /// Of those that are only read: nobody changes them meanwhile.
    _locks: Vec<ImageLock>,
}

impl Images {
    fn open<'a>(
        paths: impl IntoIterator<Item = &'a PathBuf>,
        read_only: bool,
    ) -> Result<Self, Failure> {
        let (mut disks, mut locks) = (Vec::new(), Vec::new());
        for path in paths {
            if read_only {
                locks.push(freeze(path)?);
            }
            let disk = open(path, read_only).map_err(|error| cannot_open(path, error))?;
            disks.push((path.display().to_string(), disk));
        }
        Ok(Self {
            disks,
            _locks: locks,
        })
    }

    fn named(&self) -> Vec<NamedDisk<'_>> {
        let disks = self.disks.iter();
        let named = disks.map(|(name, disk)| NamedDisk { name, disk });
        named.collect()
    }

    /// Close all of them in good order.
    fn close(self) -> Result<(), Failure> {
        for (name, disk) in self.disks {
            disk.close().map_err(|error| {
                let message = format!("{name}: {error}");
                Failure::new(Exit::Failed, message)
            })?;
        }
        Ok(())
    }
}

/// Open an image that nobody else uses.
pub(super) fn image(path: &Path, read_only: bool) -> Result<Qcow2Disk, Failure> {
    open(path, read_only).map_err(|error| cannot_open(path, error))
}

fn open(path: &Path, read_only: bool) -> Result<Qcow2Disk, Qcow2Error> {
    let options = ChainOptions {
        read_only,
        lock: true,
    };
    vmferry_qcow2::open(path, options)
}

/// A table of snapshots that somebody changes cannot be read.
fn freeze(path: &Path) -> Result<ImageLock, Failure> {
    let unreadable = |error: io::Error| {
        let path = path.display();
        Failure::new(Exit::Unreadable, format!("{path}: {error}"))
    };
    let file = File::open(path).map_err(unreadable)?;
    ImageLock::acquire(&file, path, Access::Freeze)
        .map_err(|error| cannot_open(path, Qcow2Error::Open(error.into())))
}

fn cannot_open(path: &Path, error: Qcow2Error) -> Failure {
    match error {
        Qcow2Error::Open(error @ OpenError::Lock(_)) => Failure::new(Exit::Unreadable, error)
            .hint("if a vmferry daemon serves it, see --qmp of vmferry snapshot"),
        // It says the path itself.
        Qcow2Error::Open(error) => Failure::new(Exit::Unreadable, error),
        error => {
            let path = path.display();
            Failure::new(Exit::Unreadable, format!("{path}: {error}"))
        }
    }
}

fn list(flags: &ListFlags) -> Result<Exit, Failure> {
    let (listing, single) = match &flags.which.qmp {
        Some(address) => {
            let live = Live::connect(address, &flags.which)?;
            (live.list(), live.is_single())
        }
        None => {
            let images = Images::open(&flags.which.disks, true)?;
            (
                vmferry_snapshot::list(&images.named()),
                images.disks.len() == 1,
            )
        }
    };
    let mut out = output::stdout();
    if flags.json {
        render::write_json(&mut out, &render::snapshot::object(&listing))?;
    } else {
        render::snapshot::table(&listing, single, Palette::for_stdout(), &mut out)?;
    }
    Ok(Exit::Whole)
}

/// Do something with all disks.
fn change(flags: &DisksFlags, deed: Deed) -> Result<Exit, Failure> {
    if let Some(address) = &flags.which.qmp {
        return Live::connect(address, &flags.which)?.run(deed, flags);
    }
    let images = Images::open(&flags.which.disks, false)?;
    let (disks, name) = (images.named(), flags.name.as_str());
    let done = match deed {
        Deed::Save => vmferry_snapshot::create(&disks, name, Moment::now(0)),
        Deed::Load => vmferry_snapshot::apply(&disks, name),
        Deed::Delete => vmferry_snapshot::delete(&disks, name),
    };
    done.map_err(refused)?;
    images.close()?;
    Ok(Exit::Whole)
}

fn refused(error: SnapshotError) -> Failure {
    Failure::new(Exit::Failed, error)
}

fn export(flags: &ExportFlags) -> Result<Exit, Failure> {
    let images = Images::open([&flags.image], true)?;
    let output = Output::create(&flags.to, false)?;
    let cannot_write = |error: io::Error| {
        let message = format!("cannot write {}: {error}", flags.to);
        Failure::new(Exit::Failed, message)
    };
    let mut file = io::BufWriter::with_capacity(1 << 20, output.file().map_err(cannot_write)?);
    for disk in images.named() {
        vmferry_snapshot::export(&disk, &flags.name, &mut file).map_err(refused)?;
    }
    file.flush().map_err(cannot_write)?;
    output.publish().map_err(cannot_write)?;
    Ok(Exit::Whole)
}

fn import(flags: &ImportFlags) -> Result<Exit, Failure> {
    // It is looked through first: QEMU would find out too late what is wrong with it.
    let mut stream = spooled(flags)?;
    let report = Report::of(&mut stream);
    if let Err(error) = &report.end {
        let message = format!("{}: {error}", flags.stream);
        return Err(Failure::new(Exit::Unreadable, message));
    }
    io::Seek::rewind(&mut stream)?;
    let images = Images::open(std::iter::once(&flags.image).chain(&flags.others), false)?;
    let guest_time = u64::try_from(guest_time(&report).as_nanos());
    let moment = Moment::now(guest_time.unwrap_or(u64::MAX));
    vmferry_snapshot::import(&images.named(), &flags.name, moment, &mut stream).map_err(refused)?;
    images.close()?;
    Ok(Exit::Whole)
}

/// The stream as a file that can be read twice.
fn spooled(flags: &ImportFlags) -> Result<std::fs::File, Failure> {
    let mut input = flags.stream.open()?;
    let unreadable = |error: io::Error| flags.stream.unreadable(error);
    let mut file = tempfile::tempfile().map_err(unreadable)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match input.read(&mut buffer).map_err(unreadable)? {
            0 => break,
            bytes => file.write_all(&buffer[..bytes]).map_err(unreadable)?,
        }
    }
    io::Seek::rewind(&mut file).map_err(unreadable)?;
    Ok(file)
}

/// How long the guest had run, as the stream's clock says: the last of the three numbers in the
/// section `timer`.
fn guest_time(report: &Report) -> Duration {
    let mut devices = report.devices.iter();
    let timer = devices.find(|device| device.section.name == "timer");
    let clock = timer.and_then(|timer| timer.body.as_deref()?.last_chunk::<8>());
    Duration::from_nanos(clock.map_or(0, |clock| u64::from_be_bytes(*clock)))
}
