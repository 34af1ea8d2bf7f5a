//! `vmferry snapshot`: internal snapshots of qcow2 images, of those that nobody has open and of those
//! that a daemon serves.

mod live;

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmferry_disk::OpenError;
use vmferry_inspect::Report;
use vmferry_qcow2::{ChainOptions, Error as Qcow2Error, Qcow2Disk};
use vmferry_snapshot::{Moment, NamedDisk, SnapshotError};

use super::whole_file::Output;
use crate::exit::{Exit, Failure};
use crate::flags::snapshot::{
    DisksFlags, ExportFlags, ImportFlags, ListFlags, SnapshotCommand, SnapshotFlags, WhichFlags,
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
struct Images(Vec<(String, Qcow2Disk)>);

impl Images {
    fn open<'a>(
        paths: impl IntoIterator<Item = &'a PathBuf>,
        read_only: bool,
    ) -> Result<Self, Failure> {
        let images = paths.into_iter().map(|path| {
            let name = path.display().to_string();
            Ok((name, image(path, read_only)?))
        });
        Ok(Self(images.collect::<Result<_, Failure>>()?))
    }

    fn named(&self) -> Vec<NamedDisk<'_>> {
        let named = self.0.iter().map(|(name, disk)| NamedDisk { name, disk });
        named.collect()
    }

    /// Close all of them in good order.
    fn close(self) -> Result<(), Failure> {
        for (name, disk) in self.0 {
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

fn cannot_open(path: &Path, error: Qcow2Error) -> Failure {
    match error {
        // It says the path itself.
        Qcow2Error::Open(error) => Failure::new(Exit::Unreadable, error),
        error => {
            let path = path.display();
            Failure::new(Exit::Unreadable, format!("{path}: {error}"))
        }
    }
}

/// The images that are meant, unless a daemon serves them.
fn offline(which: &WhichFlags, read_only: bool) -> Result<Images, Failure> {
    let open = |path: &PathBuf| match open(path, read_only) {
        Ok(disk) => Ok((path.display().to_string(), disk)),
        Err(error @ Qcow2Error::Open(OpenError::Lock(_))) => Err(cannot_open(path, error)
            .hint("if a vmferry daemon serves it, say --qmp and the disk's name there")),
        Err(error) => Err(cannot_open(path, error)),
    };
    let images = which.disks.iter().map(open);
    Ok(Images(images.collect::<Result<_, Failure>>()?))
}

fn list(flags: &ListFlags) -> Result<Exit, Failure> {
    let (listing, single) = match &flags.which.qmp {
        Some(address) => {
            let live = Live::connect(address, &flags.which)?;
            (live.list(), live.is_single())
        }
        None => {
            let images = offline(&flags.which, true)?;
            (vmferry_snapshot::list(&images.named()), images.0.len() == 1)
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
    let images = offline(&flags.which, false)?;
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
