//! The package of a postcopy: LISTEN, the devices, RUN.

use std::io::Read;
use std::ops::Range;

use vmferry_inspect::{Event, VisitError, Visitor, WalkError, walk};
use vmferry_stream::{Command, Content, Encoder, Name, Record, Section, SectionKind};

use super::tail::shifted;

/// What ends a stream behind its package.
const EOF: u8 = 0;
const FOOTER_BYTES: usize = 5;

/// The devices of a package, which is held until all memory has come.
#[derive(Debug)]
pub(super) struct Package {
    bytes: Vec<u8>,
    pub(super) devices: Vec<Device>,
    /// PINGs to be answered now that it is here.
    pub(super) pings: Vec<u32>,
}

/// A device, as ranges of the package.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) section: Section,
    /// With header and footer.
    whole: Range<usize>,
    body: Range<usize>,
}

/// Why a package cannot be used.
#[derive(Debug, thiserror::Error)]
enum PackageFault {
    #[error("it holds a {0} section '{1}', which does not belong there")]
    Live(&'static str, Name),
    #[error("it holds {0}, which does not belong there")]
    Command(&'static str),
    #[error("it starts no guest (LISTEN and RUN)")]
    NoRun,
}

impl Package {
    /// Read a package. `footers`: do the stream's sections end in footers?
    ///
    /// # Errors
    /// It is broken, or holds more than devices; offsets are those of the package.
    pub(super) fn read(bytes: Vec<u8>, footers: bool) -> Result<Self, WalkError> {
        let prefix = prefix(bytes.len(), footers);
        let mut reader = Reader {
            base: prefix.len(),
            found: Self {
                bytes: Vec::new(),
                devices: Vec::new(),
                pings: Vec::new(),
            },
            open: None,
            footer_bytes: if footers { FOOTER_BYTES } else { 0 },
            listens: false,
            runs: false,
        };
        let stream = prefix[..].chain(&bytes[..]).chain(&[EOF][..]);
        walk(stream, &mut reader)
            .map_err(|error| shifted(error, |offset| offset.saturating_sub(prefix.len() as u64)))?;
        if !reader.runs {
            return Err(WalkError::Visitor(PackageFault::NoRun.into()));
        }
        Ok(Self {
            bytes,
            ..reader.found
        })
    }

    /// Header, body and footer of a device.
    pub(super) fn whole(&self, device: &Device) -> &[u8] {
        &self.bytes[device.whole.clone()]
    }

    /// The body alone.
    pub(super) fn body(&self, device: &Device) -> &[u8] {
        &self.bytes[device.body.clone()]
    }

    /// How many bytes stand in front of the body.
    pub(super) fn header_bytes(device: &Device) -> usize {
        device.body.start - device.whole.start
    }
}

/// The shortest stream with a package behind it.
fn prefix(bytes: usize, footers: bool) -> Vec<u8> {
    let mut prefix = super::tail::prefix(footers);
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
    let command = Record::Command(Command::Packaged { bytes });
    Encoder::new(footers).record(&command, &mut prefix);
    prefix
}

struct Reader {
    /// Where the package starts in what is walked through.
    base: usize,
    found: Package,
    /// The device that is being read: where it and its body start, and how long that is.
    open: Option<(Section, usize, Range<usize>)>,
    footer_bytes: usize,
    listens: bool,
    runs: bool,
}

impl Reader {
    fn at(&self, offset: u64) -> usize {
        usize::try_from(offset).map_or(usize::MAX, |offset| offset.saturating_sub(self.base))
    }

    fn record(&mut self, offset: usize, record: &Record) -> Result<(), PackageFault> {
        match record {
            Record::Section(section)
                if section.kind == SectionKind::Full && section.content() == Content::Device =>
            {
                self.open = Some((section.clone(), offset, offset..offset));
                Ok(())
            }
            Record::Section(section) => {
                let kind = match section.kind {
                    SectionKind::Full => "whole",
                    _ => "live",
                };
                Err(PackageFault::Live(kind, section.name.clone()))
            }
            Record::SectionEnd { .. } => {
                if let Some((section, start, body)) = self.open.take() {
                    self.found.devices.push(Device {
                        section,
                        whole: start..offset + self.footer_bytes,
                        body,
                    });
                }
                Ok(())
            }
            Record::Command(Command::PostcopyListen) => {
                self.listens = true;
                Ok(())
            }
            Record::Command(Command::Ping(value)) => {
                self.found.pings.push(*value);
                Ok(())
            }
            Record::Command(Command::PostcopyRun) if self.listens => {
                self.runs = true;
                Ok(())
            }
            Record::Command(command) => Err(PackageFault::Command(command.name())),
            _ => Ok(()),
        }
    }
}

impl Visitor for Reader {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Record(offset, record) if offset >= self.base as u64 => {
                let offset = self.at(offset);
                self.record(offset, record)?;
            }
            Event::Device(body) => {
                let start = self.at(body.offset);
                if let Some((_, _, range)) = &mut self.open {
                    *range = start..start + body.bytes.len();
                }
            }
            _ => {}
        }
        Ok(())
    }
}
