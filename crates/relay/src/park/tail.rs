//! The devices at the end of a stream, which went into the file unread.
//!
//! Their lengths stand in the description behind them. So they are read from the file when all is there,
//! with a few bytes in front that make a whole stream of them: [`walk`] knows where devices end.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use vmferry_inspect::{Event, VisitError, Visitor, WalkError, walk};
use vmferry_stream::{
    Command, Content, DecodeError, Encoder, InstanceId, Name, RamRecord, Record, Section,
    SectionId, SectionKind,
};

use super::indexer::Indexer;

/// The shortest start of a stream that tells whether sections end in footers.
pub(super) fn prefix(footers: bool) -> Vec<u8> {
    let id = SectionId(u32::MAX);
    let section = Section {
        kind: SectionKind::Start,
        id,
        name: Name::new("ram").unwrap_or_default(),
        instance: InstanceId(0),
        version: 4,
    };
    let mut encoder = Encoder::new(footers);
    let mut prefix = Vec::new();
    for record in [
        Record::Header { version: 3 },
        Record::Section(section),
        Record::Ram(RamRecord::EndOfSection),
        Record::SectionEnd { id },
    ] {
        encoder.record(&record, &mut prefix);
    }
    prefix
}

/// An error with other offsets.
pub(super) fn shifted(error: WalkError, shift: impl Fn(u64) -> u64) -> WalkError {
    match error {
        WalkError::Stream(error) => WalkError::Stream(DecodeError {
            offset: shift(error.offset),
            ..error
        }),
        WalkError::TooLong { offset, what, max } => WalkError::TooLong {
            offset: shift(offset),
            what,
            max,
        },
        WalkError::EndNotFound {
            offset,
            section,
            id,
        } => WalkError::EndNotFound {
            offset: shift(offset),
            section,
            id,
        },
        WalkError::Read { offset, source } => WalkError::Read {
            offset: shift(offset),
            source,
        },
        other => other,
    }
}

/// Something that was not read when it came cannot be in the file.
#[derive(Debug, thiserror::Error)]
enum TailFault {
    #[error("byte {0}: {1} among the devices")]
    Command(u64, &'static str),
    #[error("byte {0}: section '{1}' among the devices")]
    Live(u64, Name),
    #[error("byte {0}: the description does not say that a device ends where one seems to")]
    Elsewhere(u64),
    #[error("byte {0}: {1} bytes behind the end of the stream")]
    Followed(u64, u64),
}

/// Where a body starts in the file, and how long it is.
type Extent = (u64, u64);

/// Devices whose ends were looked for when they came, by their footers.
#[derive(Debug)]
pub(super) struct Guessed {
    /// Where the first one's section starts.
    start: u64,
    bodies: Vec<Extent>,
}

impl Guessed {
    pub(super) fn at(start: u64) -> Self {
        Self {
            start,
            bodies: Vec::new(),
        }
    }

    /// Another one's body; how long all of them are.
    pub(super) fn push(&mut self, offset: u64, bytes: u64) -> u64 {
        self.bodies.push((offset, bytes));
        (offset + bytes).saturating_sub(self.start)
    }

    /// Does the description say the same?
    pub(super) fn check(&self, file: &File, length: u64, footers: bool) -> Result<(), WalkError> {
        let bodies = read_tail(file, self.start, length, footers, &mut Indexer::none())?;
        if bodies == self.bodies {
            return Ok(());
        }
        let mut pairs = self.bodies.iter().zip(&bodies);
        let wrong = pairs.find(|(guessed, right)| guessed != right);
        let offset = wrong.map_or(self.start, |((offset, _), _)| *offset);
        Err(WalkError::Visitor(TailFault::Elsewhere(offset).into()))
    }
}

/// Go through the devices that start at `start` in the file, which has `length` bytes, and tell the index.
/// Returns where their bodies are.
pub(super) fn read_tail(
    file: &File,
    start: u64,
    length: u64,
    footers: bool,
    index: &mut Indexer,
) -> Result<Vec<Extent>, WalkError> {
    let prefix = prefix(footers);
    let base = prefix.len() as u64;
    let mut visitor = Devices {
        base,
        start,
        encoder: Encoder::new(footers),
        scratch: Vec::new(),
        index,
        bodies: Vec::new(),
    };
    let input = prefix[..].chain(FileReader {
        file,
        offset: start,
        end: length,
    });
    let to_file = |offset: u64| (offset + start).saturating_sub(base);
    let finish = walk(input, &mut visitor).map_err(|error| shifted(error, to_file))?;
    let end = to_file(finish.bytes);
    if finish.is_followed {
        let fault = TailFault::Followed(end, length.saturating_sub(end));
        return Err(WalkError::Visitor(fault.into()));
    }
    Ok(visitor.bodies)
}

struct FileReader<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
}

impl Read for FileReader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX);
        let length = into.len().min(left);
        let bytes = self.file.read_at(&mut into[..length], self.offset)?;
        self.offset += bytes as u64;
        Ok(bytes)
    }
}

struct Devices<'a> {
    /// Where the tail starts in what is walked through.
    base: u64,
    /// And in the file.
    start: u64,
    /// Says how long a record is.
    encoder: Encoder,
    scratch: Vec<u8>,
    index: &'a mut Indexer,
    bodies: Vec<Extent>,
}

impl Devices<'_> {
    fn record(&mut self, offset: u64, record: &Record) -> Result<(), VisitError> {
        match record {
            Record::Section(section)
                if section.kind != SectionKind::Full || section.content() != Content::Device =>
            {
                return Err(TailFault::Live(offset, section.name.clone()).into());
            }
            Record::Command(command) if *command != Command::SwitchoverStart => {
                return Err(TailFault::Command(offset, command.name()).into());
            }
            _ => {}
        }
        self.scratch.clear();
        self.encoder.record(record, &mut self.scratch);
        Ok(self
            .index
            .record(offset, self.scratch.len() as u64, record)?)
    }
}

impl Visitor for Devices<'_> {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        let shift = |offset: u64| (offset + self.start).saturating_sub(self.base);
        match event {
            Event::Record(offset, record) if offset >= self.base => {
                self.record(shift(offset), record)
            }
            Event::Device(body) => {
                let offset = shift(body.offset);
                self.bodies.push((offset, body.bytes.len() as u64));
                Ok(self.index.device(body.section, offset, body.bytes)?)
            }
            Event::Description(description) => {
                let offset = shift(description.offset);
                Ok(self.index.description(offset, description.text)?)
            }
            _ => Ok(()),
        }
    }
}
