//! `vmferry extract`: memory, disks and devices, out of a stream into files.

mod report;

use std::io::{self, Read};

use vmferry_inspect::{
    Blocks, CoreImage, CoreOptions, DescriptionText, DeviceBody, DiskImage, ExtractError,
    MemoryImage, Visitor, WalkError, walk,
};
use vmferry_stream::Fault;

use super::whole_file::{self, Output};
use crate::exit::{Exit, Failure};
use crate::flags::extract::{ExtractFlags, FileFlags, RamFlags, What};
use report::Report;

pub(crate) fn run(flags: &ExtractFlags) -> Result<Exit, Failure> {
    let files = flags.what.files();
    let is_text = matches!(flags.what, What::Vmdescription(_));
    let output = Output::create(&files.to, is_text)?;
    let mut input = files.file.open()?;
    let file = output.file()?;
    let job = Job {
        what: &flags.what,
        files,
    };
    let broken = match &flags.what {
        What::Ram(ram) if ram.core => {
            let mut core = CoreImage::new(file, core_options(ram));
            let broken = job.walk(&mut input, &mut core)?;
            let (_, core) = job.finished(core.finish(), broken.as_ref())?;
            (Report::of_core(&core), broken)
        }
        What::Ram(ram) => {
            let wanted = ram.name.clone().map_or(Blocks::Only, Blocks::Named);
            let mut memory = MemoryImage::new(file, wanted);
            let broken = job.walk(&mut input, &mut memory)?;
            let (_, blocks) = job.finished(memory.finish(), broken.as_ref())?;
            (Report::of_memory(&blocks), broken)
        }
        What::Disk(disk) => {
            let size = disk.size.map(|size| size.bytes);
            let mut image = DiskImage::new(file, disk.name.clone(), size);
            let broken = job.walk(&mut input, &mut image)?;
            let (_, disk) = job.finished(image.finish(), broken.as_ref())?;
            (Report::of_disk(&disk), broken)
        }
        What::Device(device) => {
            let mut body = DeviceBody::new(device.name.clone());
            let broken = job.walk(&mut input, &mut body)?;
            let device = job.finished(body.finish(), broken.as_ref())?;
            whole_file::write(&file, &device.body).map_err(|error| cannot_write(files, &error))?;
            (Report::of_device(&device), broken)
        }
        What::Vmdescription(_) => {
            let mut text = DescriptionText::new();
            let broken = job.walk(&mut input, &mut text)?;
            let text = job.finished(text.finish(), broken.as_ref())?;
            whole_file::write(&file, &text).map_err(|error| cannot_write(files, &error))?;
            (Report::of_description(&text), broken)
        }
    };
    let (report, broken) = broken;
    output
        .publish()
        .map_err(|error| cannot_write(files, &error))?;
    report.tell(files, broken.as_ref())?;
    match broken {
        None => Ok(Exit::Whole),
        Some(error) => Err(job.broken(&error).told()),
    }
}

fn core_options(flags: &RamFlags) -> CoreOptions {
    CoreOptions {
        memory_blocks: flags.memory_block.clone(),
        below_4g_bytes: flags.below_4g.map(|size| size.bytes),
    }
}

fn cannot_write(files: &FileFlags, error: &io::Error) -> Failure {
    let to = &files.to;
    Failure::new(Exit::Failed, format!("cannot write {to}: {error}"))
}

struct Job<'a> {
    what: &'a What,
    files: &'a FileFlags,
}

impl Job<'_> {
    /// Go through the stream. An error that leaves something worth keeping is no failure yet, where
    /// that is wanted.
    fn walk(
        &self,
        input: &mut dyn Read,
        visitor: &mut impl Visitor,
    ) -> Result<Option<WalkError>, Failure> {
        match walk(input, visitor) {
            Ok(_) => Ok(None),
            Err(error) if self.files.partial && leaves_something(&error) => Ok(Some(error)),
            Err(error) => Err(self.broken(&error)),
        }
    }

    /// What was asked for may not be there, above all if the stream is broken.
    fn finished<T>(
        &self,
        finished: Result<T, ExtractError>,
        broken: Option<&WalkError>,
    ) -> Result<T, Failure> {
        finished.map_err(|error| match broken {
            Some(broken) => self.broken(broken),
            None => self.failed(&error),
        })
    }

    fn broken(&self, error: &WalkError) -> Failure {
        match error {
            WalkError::Visitor(cause) => {
                let failure = match cause.downcast_ref() {
                    Some(error) => self.failed(error),
                    None => Failure::new(Exit::Failed, error),
                };
                self.with_way_out(failure, error)
            }
            error if !is_stream(error) => self.files.file.unreadable(error),
            _ => {
                let failure = Failure::new(Exit::Failed, format!("{}: {error}", self.files.file));
                self.with_way_out(failure, error)
            }
        }
    }

    fn with_way_out(&self, failure: Failure, error: &WalkError) -> Failure {
        if self.files.partial || !leaves_something(error) {
            return failure;
        }
        failure.hint("--partial keeps what was before that")
    }

    fn failed(&self, error: &ExtractError) -> Failure {
        let (exit, choices) = match error {
            ExtractError::Ambiguous { choices, .. } | ExtractError::NotFound { choices, .. } => {
                (Exit::Unreadable, choices.as_slice())
            }
            ExtractError::Absent(_) => (Exit::Unreadable, [].as_slice()),
            _ => (Exit::Failed, [].as_slice()),
        };
        let mut failure = Failure::new(exit, format!("{}: {error}", self.files.file));
        if !choices.is_empty() {
            failure = failure.hint(format!("there is: {}", choices.join(", ")));
        }
        if let (ExtractError::Ambiguous { .. }, [first, ..]) = (error, choices) {
            let (what, name) = match self.what {
                What::Ram(_) => ("ram", first.split(" (").next().unwrap_or(first)),
                What::Disk(_) => ("disk", first.trim_matches('\'')),
                What::Device(_) | What::Vmdescription(_) => ("device", first.as_str()),
            };
            let file = &self.files.file;
            failure = failure.hint(format!(
                "such as: vmferry extract {what} {file} {name} -o PATH"
            ));
        }
        failure
    }
}

/// Is the input a stream, although perhaps a broken one?
fn is_stream(error: &WalkError) -> bool {
    match error {
        WalkError::Container(_) | WalkError::Read { offset: 0, .. } => false,
        WalkError::Stream(error) => !matches!(
            error.fault,
            Fault::BadMagic(_) | Fault::UnsupportedVersion(_) | Fault::ObsoleteVersion
        ),
        _ => true,
    }
}

/// Is there something before the error that may be kept?
fn leaves_something(error: &WalkError) -> bool {
    match error {
        error if !is_stream(error) => false,
        WalkError::Visitor(cause) => !matches!(
            cause.downcast_ref(),
            Some(
                ExtractError::Ambiguous { .. }
                    | ExtractError::NotFound { .. }
                    | ExtractError::Absent(_)
                    | ExtractError::Output { .. }
            )
        ),
        _ => true,
    }
}
