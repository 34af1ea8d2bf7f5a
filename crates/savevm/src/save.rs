//! The machine that writes a stream: begin, iterate, complete.
//!
//! ```text
//!   begin ──▶ Iterating ── try_complete ──▶ Completing ── end_live ──▶ Ended ── finish
//!                 ▲              │
//!                 └── NotYet ────┘
//! ```
//!
//! Each step consumes the one before, so that no END can be written before every bulk phase is
//! over, and no EOF before every END. The machine borrows the [`SaveRegistry`] step by step: a
//! failed step leaves the handlers to [`cleanup`].

use std::time::Duration;

use vmferry_stream::{Command, Configuration, Encoder, Name, Record, Section, SectionKind};

use crate::handler::{GuestStopped, HandlerError, Pending, Progress, Sink};
use crate::registry::{Entry, SaveRegistry};

/// The description of a stream that describes nothing. A QEMU that gets none says it failed.
const EMPTY_DESCRIPTION: &[u8] = b"{}";

/// A stream could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A section's owner failed.
    #[error("section '{section}': {source}")]
    Section {
        /// Its name.
        section: String,
        /// What the owner said.
        source: HandlerError,
    },
    /// The channel failed between sections.
    #[error("{0}")]
    Channel(HandlerError),
}

/// What a stream begins with.
#[derive(Clone, Debug, Default)]
pub struct Opening {
    /// Machine type; an empty name is accepted by every QEMU.
    pub machine: Name,
    /// Commands before the first section.
    pub commands: Vec<Command>,
}

/// Sum over all sections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TotalPending {
    /// A bulk phase runs: nothing can complete.
    Bulk {
        /// Estimate of the bytes that are left.
        bytes: u64,
    },
    /// Every bulk phase is over.
    Dirty(DirtyTotal),
}

/// What must be read and sent while the guest stands still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyTotal {
    /// Bytes to send.
    pub bytes: u64,
    /// Time to read them.
    pub read_time: Duration,
}

/// Sections are being sent while guests run.
#[derive(Debug)]
pub struct Iterating {
    encoder: Encoder,
}

/// Answer of [`Iterating::try_complete`].
#[derive(Debug)]
pub enum Ready {
    /// Every bulk phase is over and the rest is small enough: stop the guests.
    Go(Completing),
    /// Go on iterating.
    NotYet(Iterating, TotalPending),
}

/// Guests are being stopped.
#[derive(Debug)]
pub struct Completing {
    encoder: Encoder,
}

/// Every live section has ended; EOF has not been sent.
#[derive(Debug)]
pub struct Ended {
    encoder: Encoder,
}

/// Write header, configuration, commands and the START of every section.
///
/// # Errors
/// A section's owner or the channel failed.
pub fn begin(
    opening: &Opening,
    registry: &mut SaveRegistry<'_>,
    sink: &mut dyn Sink,
) -> Result<Iterating, SaveError> {
    let mut encoder = Encoder::new(true);
    let configuration = Configuration::of_machine(opening.machine.clone());
    let head = [
        Record::Header { version: 3 },
        Record::Configuration(configuration),
    ];
    let commands = opening.commands.iter().cloned().map(Record::Command);
    put(&mut encoder, sink, head.into_iter().chain(commands))?;
    for entry in registry.entries() {
        section(
            &mut encoder,
            entry,
            SectionKind::Start,
            sink,
            |handler, sink| handler.setup(sink),
        )?;
    }
    Ok(Iterating { encoder })
}

/// End what runs for the handlers, whatever happened before.
pub fn cleanup(registry: &mut SaveRegistry<'_>) {
    for entry in registry.entries() {
        entry.handler.cleanup();
    }
}

impl Iterating {
    /// Write one PART of each section in turn, up to the first that is not finished: what changes
    /// fast is not sent again and again while another is still in its bulk phase.
    ///
    /// # Errors
    /// A section's owner or the channel failed.
    pub fn iterate(
        &mut self,
        registry: &mut SaveRegistry<'_>,
        sink: &mut dyn Sink,
    ) -> Result<Progress, SaveError> {
        for entry in registry.entries() {
            if sink.allowance() == 0 {
                return Ok(Progress::Unfinished);
            }
            let part = SectionKind::Part;
            let progress = section(&mut self.encoder, entry, part, sink, |handler, sink| {
                handler.iterate(sink)
            })?;
            if progress != Progress::Finished {
                return Ok(progress);
            }
        }
        Ok(Progress::Finished)
    }

    /// Send a command between sections.
    ///
    /// # Errors
    /// The channel failed.
    pub fn command(&mut self, command: Command, sink: &mut dyn Sink) -> Result<(), SaveError> {
        put(&mut self.encoder, sink, [Record::Command(command)])
    }

    /// What is left to send.
    pub fn pending(&self, registry: &mut SaveRegistry<'_>) -> TotalPending {
        let mut dirty = DirtyTotal::default();
        let mut bulk = None;
        for entry in registry.entries() {
            match entry.handler.pending() {
                Pending::Bulk { bytes } => bulk = Some(bulk.unwrap_or(0) + bytes),
                Pending::Dirty { bytes, read_time } => {
                    dirty.bytes += bytes;
                    dirty.read_time += read_time;
                }
            }
        }
        match bulk {
            Some(bytes) => TotalPending::Bulk {
                bytes: bytes + dirty.bytes,
            },
            None => TotalPending::Dirty(dirty),
        }
    }

    /// Complete if every bulk phase is over and `fits` accepts what is left.
    pub fn try_complete(
        self,
        registry: &mut SaveRegistry<'_>,
        fits: impl FnOnce(&DirtyTotal) -> bool,
    ) -> Ready {
        match self.pending(registry) {
            TotalPending::Dirty(dirty) if fits(&dirty) => Ready::Go(Completing {
                encoder: self.encoder,
            }),
            pending => Ready::NotYet(self, pending),
        }
    }
}

impl Completing {
    /// Write the END of every live section, and a PING behind them where one is wanted: its PONG
    /// says that the destination has got that far.
    ///
    /// # Errors
    /// A section's owner or the channel failed.
    pub fn end_live(
        mut self,
        stopped: &GuestStopped,
        registry: &mut SaveRegistry<'_>,
        barrier: Option<u32>,
        sink: &mut dyn Sink,
    ) -> Result<Ended, SaveError> {
        for entry in registry.entries() {
            let end = SectionKind::End;
            section(&mut self.encoder, entry, end, sink, |handler, sink| {
                handler.complete(stopped, sink)
            })?;
        }
        let ping = barrier.map(|value| Record::Command(Command::Ping(value)));
        put(&mut self.encoder, sink, ping)?;
        Ok(Ended {
            encoder: self.encoder,
        })
    }
}

impl Ended {
    /// Write EOF and the description, as one piece.
    ///
    /// # Errors
    /// The channel failed.
    pub fn finish(mut self, sink: &mut dyn Sink) -> Result<(), SaveError> {
        let length = u32::try_from(EMPTY_DESCRIPTION.len()).unwrap_or(0);
        let mut bytes = Vec::new();
        self.encoder.record(&Record::Eof, &mut bytes);
        self.encoder
            .record(&Record::Description { bytes: length }, &mut bytes);
        bytes.extend_from_slice(EMPTY_DESCRIPTION);
        sink.put(&[&bytes]).map_err(SaveError::Channel)
    }
}

fn put(
    encoder: &mut Encoder,
    sink: &mut dyn Sink,
    records: impl IntoIterator<Item = Record>,
) -> Result<(), SaveError> {
    let mut bytes = Vec::new();
    for record in records {
        encoder.record(&record, &mut bytes);
    }
    if bytes.is_empty() {
        Ok(())
    } else {
        sink.put(&[&bytes]).map_err(SaveError::Channel)
    }
}

fn section<'a, T>(
    encoder: &mut Encoder,
    entry: &mut Entry<dyn crate::SaveHandler + 'a>,
    kind: SectionKind,
    sink: &mut dyn Sink,
    body: impl FnOnce(&mut (dyn crate::SaveHandler + 'a), &mut dyn Sink) -> Result<T, HandlerError>,
) -> Result<T, SaveError> {
    let header = Section {
        kind,
        id: entry.section_id,
        name: entry.idstr.clone(),
        instance: entry.instance,
        version: entry.version,
    };
    let id = header.id;
    put(encoder, sink, [Record::Section(header)])?;
    let value = body(&mut *entry.handler, sink).map_err(|source| SaveError::Section {
        section: entry.idstr.to_string(),
        source,
    })?;
    put(encoder, sink, [Record::SectionEnd { id }])?;
    Ok(value)
}
