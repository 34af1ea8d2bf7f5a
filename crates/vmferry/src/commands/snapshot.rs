//! `vmferry snapshot`: internal snapshots of qcow2 images that nobody has open.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmferry_inspect::Report;
use vmferry_qcow2::{ChainOptions, Qcow2Disk};
use vmferry_snapshot::{Moment, NamedDisk, SnapshotError};

use super::whole_file::Output;
use crate::exit::{Exit, Failure};
use crate::flags::snapshot::{
    DisksFlags, ExportFlags, ImportFlags, ListFlags, SnapshotCommand, SnapshotFlags,
};
use crate::output;
use crate::render;
use crate::render::style::Palette;

pub(crate) fn run(flags: &SnapshotFlags) -> Result<Exit, Failure> {
    match &flags.command {
        SnapshotCommand::List(flags) => list(flags),
        SnapshotCommand::Create(flags) => change(flags, |disks, name| {
            let moment = now(Duration::ZERO);
            vmferry_snapshot::create(disks, name, moment)
        }),
        SnapshotCommand::Apply(flags) => change(&flags.disks, vmferry_snapshot::apply),
        SnapshotCommand::Delete(flags) => change(&flags.disks, vmferry_snapshot::delete),
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
    let options = ChainOptions {
        read_only,
        lock: true,
    };
    vmferry_qcow2::open(path, options).map_err(|error| match error {
        // It says the path itself.
        vmferry_qcow2::Error::Open(error) => Failure::new(Exit::Unreadable, error),
        error => {
            let path = path.display();
            Failure::new(Exit::Unreadable, format!("{path}: {error}"))
        }
    })
}

fn list(flags: &ListFlags) -> Result<Exit, Failure> {
    let images = Images::open(&flags.images, true)?;
    let listing = vmferry_snapshot::list(&images.named());
    let mut out = output::stdout();
    if flags.json {
        render::write_json(&mut out, &render::snapshot::object(&listing))?;
    } else {
        let single = images.0.len() == 1;
        render::snapshot::table(&listing, single, Palette::for_stdout(), &mut out)?;
    }
    Ok(Exit::Whole)
}

/// Do something with all images.
fn change(
    flags: &DisksFlags,
    act: impl FnOnce(&[NamedDisk<'_>], &str) -> Result<(), SnapshotError>,
) -> Result<Exit, Failure> {
    let images = Images::open(&flags.images, false)?;
    act(&images.named(), &flags.name).map_err(refused)?;
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
    let moment = now(guest_time(&report));
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

fn now(guest_time: Duration) -> Moment {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.unwrap_or_default();
    Moment {
        date: (
            u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
            now.subsec_nanos(),
        ),
        guest_nanoseconds: u64::try_from(guest_time.as_nanos()).unwrap_or(u64::MAX),
    }
}
