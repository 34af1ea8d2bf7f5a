//! What all states of the save machine share: the encoder, and what was sent so far.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use vmferry_stream::{Command, Encoder, Record, SectionId, SectionKind};
use vmferry_vmstate::DescriptionWriter;

use super::{Describe, DirtyTotal, Opening, SaveError, TotalPending};
use crate::handler::{HandlerError, Pending, Progress, SaveHandler, Sink};
use crate::machine;
use crate::registry::{Entry, LiveSaver, Registry};

/// Text of [`Describe::Empty`].
const EMPTY_DESCRIPTION: [u8; 2] = *b"{}";

#[derive(Debug)]
pub(super) struct Flow {
    encoder: Encoder,
    /// Sections that were started; a handler that became active later has missed its START.
    started: BTreeSet<SectionId>,
    /// Devices that were saved among the STARTs.
    early: BTreeSet<SectionId>,
    description: Description,
    switchover_start: bool,
    /// POSTCOPY_ADVISE was sent; true if it was about RAM.
    advised: Option<bool>,
    /// Who is the first of the next round, if it is not the first of all.
    turn: Option<SectionId>,
}

#[derive(Debug)]
enum Description {
    Written(DescriptionWriter),
    Text(Arc<[u8]>),
    Suppressed,
}

impl Flow {
    pub(super) fn new(opening: &Opening) -> Self {
        let configuration = opening
            .configuration
            .then(|| machine::saved(&opening.machine.configuration()));
        let description = match &opening.describe {
            Describe::As(dialect) => Description::Written(DescriptionWriter::new(
                *dialect,
                opening.machine.page_bits.bytes(),
                configuration.as_ref(),
            )),
            Describe::Text(text) => Description::Text(text.clone()),
            Describe::Empty => Description::Text(EMPTY_DESCRIPTION.into()),
            Describe::Suppressed => Description::Suppressed,
        };
        Self {
            encoder: Encoder::new(opening.footers),
            started: BTreeSet::new(),
            early: BTreeSet::new(),
            description,
            switchover_start: opening.switchover_start,
            advised: None,
            turn: None,
        }
    }

    /// Was POSTCOPY_ADVISE sent? True if it was about RAM.
    pub(super) fn advised(&self) -> Option<bool> {
        self.advised
    }

    /// Header, configuration and commands, as one piece.
    pub(super) fn open(&mut self, opening: &Opening, sink: &mut dyn Sink) -> Result<(), SaveError> {
        let mut records = vec![Record::Header { version: 3 }];
        if opening.configuration {
            let configuration = opening.machine.configuration();
            records.push(Record::Configuration(configuration));
        }
        for command in &opening.commands {
            self.note(command);
            records.push(Record::Command(command.clone()));
        }
        self.put(&records, sink)
    }

    pub(super) fn start(
        &mut self,
        registry: &mut Registry<'_>,
        sink: &mut dyn Sink,
    ) -> Result<(), SaveError> {
        for entry in registry.entries_mut() {
            if entry.is_early() && !entry.is_live() {
                self.early.insert(entry.section_id());
                let mut bytes = Vec::new();
                self.encode_device(entry, &mut bytes)?;
                put_bytes(&bytes, sink)?;
                continue;
            }
            if entry.saver().is_some_and(|saver| saver.is_active()) {
                self.started.insert(entry.section_id());
            }
            let start = SectionKind::Start;
            self.live(entry, start, sink, |saver, sink| saver.setup(sink))?;
        }
        Ok(())
    }

    /// The sections whose handlers `goes_on` were started elsewhere.
    pub(super) fn take_up(
        &mut self,
        registry: &mut Registry<'_>,
        goes_on: impl Fn(&mut dyn SaveHandler) -> bool,
    ) {
        for entry in registry.entries_mut() {
            let id = entry.section_id();
            let mut saver = entry.saver().filter(|saver| saver.is_active());
            if saver.as_mut().is_some_and(|saver| goes_on(&mut ***saver)) {
                self.started.insert(id);
            }
        }
    }

    /// One PART of each section whose handler `takes_part`. Those behind one that is in its bulk phase
    /// wait until that is over. Then they take turns: who found no allowance left is first the next
    /// time, for a guest can dirty one section as fast as all of it is sent.
    pub(super) fn iterate(
        &mut self,
        registry: &mut Registry<'_>,
        sink: &mut dyn Sink,
        takes_part: impl Fn(&mut dyn SaveHandler) -> bool,
    ) -> Result<Progress, SaveError> {
        let mut entries: Vec<_> = registry
            .entries_mut()
            .filter_map(|entry| {
                let takes_part = takes_part(&mut **entry.saver()?);
                takes_part.then_some(entry)
            })
            .collect();
        let first = self.turn.take();
        let first = entries.iter().position(|it| Some(it.section_id()) == first);
        entries.rotate_left(first.unwrap_or(0));
        let mut round = Progress::Finished;
        for entry in entries {
            if sink.allowance() == 0 {
                self.turn = Some(entry.section_id());
                return Ok(Progress::Unfinished);
            }
            let part = SectionKind::Part;
            let progress = self.live(entry, part, sink, |saver, sink| saver.iterate(sink))?;
            if let Some(unfinished @ (Progress::Unfinished | Progress::Waiting)) = progress {
                let is_bulk =
                    |saver: &mut LiveSaver<'_>| matches!(saver.pending(), Pending::Bulk { .. });
                if entry.saver().is_some_and(is_bulk) {
                    self.turn = Some(entry.section_id());
                    return Ok(unfinished);
                }
                round = unfinished;
            }
        }
        Ok(round)
    }

    /// Sum of what is left; that of handlers that `goes_on` may come later.
    pub(super) fn pending(
        &self,
        registry: &mut Registry<'_>,
        goes_on: impl Fn(&mut dyn SaveHandler) -> bool,
    ) -> TotalPending {
        let mut sum = DirtyTotal::default();
        let mut is_bulk = false;
        let mut add = |now: u64, later: u64, time: Duration| {
            sum.bytes = sum.bytes.saturating_add(now);
            sum.later_bytes = sum.later_bytes.saturating_add(later);
            sum.read_time = sum.read_time.saturating_add(time);
        };
        for entry in registry.entries_mut() {
            let is_started = self.started.contains(&entry.section_id());
            let Some(saver) = entry.saver().filter(|it| is_started && it.is_active()) else {
                continue;
            };
            match (saver.pending(), goes_on(&mut **saver)) {
                (Pending::Bulk { bytes }, true) => add(0, bytes, Duration::ZERO),
                (Pending::Bulk { bytes }, false) => {
                    is_bulk = true;
                    add(bytes, 0, Duration::ZERO);
                }
                (
                    Pending::Dirty {
                        bytes,
                        later_bytes,
                        read_time,
                    },
                    goes_on,
                ) => match goes_on {
                    true => add(bytes, later_bytes, read_time),
                    false => add(bytes.saturating_add(later_bytes), 0, read_time),
                },
            }
        }
        match is_bulk {
            true => TotalPending::Bulk {
                bytes: sum.bytes.saturating_add(sum.later_bytes),
            },
            false => TotalPending::Dirty(sum),
        }
    }

    pub(super) fn command(
        &mut self,
        command: Command,
        sink: &mut dyn Sink,
    ) -> Result<(), SaveError> {
        self.note(&command);
        self.put(&[Record::Command(command)], sink)
    }

    pub(super) fn announce_switchover(&mut self, sink: &mut dyn Sink) -> Result<(), SaveError> {
        match self.switchover_start {
            true => self.put(&[Record::Command(Command::SwitchoverStart)], sink),
            false => Ok(()),
        }
    }

    /// A section of a live handler, if it is active and was started; `None` if not.
    pub(super) fn live<T>(
        &mut self,
        entry: &mut Entry<'_>,
        kind: SectionKind,
        sink: &mut dyn Sink,
        body: impl FnOnce(&mut dyn SaveHandler, &mut dyn Sink) -> Result<T, HandlerError>,
    ) -> Result<Option<T>, SaveError> {
        let header = entry.section(kind);
        let Some(saver) = entry.saver().filter(|saver| saver.is_active()) else {
            return Ok(None);
        };
        if !self.started.contains(&header.id) {
            return Ok(None);
        }
        let (id, section, instance) = (header.id, header.name.clone(), header.instance);
        self.put(&[Record::Section(header)], sink)?;
        let value = body(&mut **saver, sink).map_err(|source| SaveError::Section {
            section,
            instance,
            source,
        })?;
        self.put(&[Record::SectionEnd { id }], sink)?;
        Ok(Some(value))
    }

    /// FULL of every device that needs it and was not sent before.
    pub(super) fn devices(
        &mut self,
        registry: &mut Registry<'_>,
        sink: &mut dyn Sink,
    ) -> Result<(), SaveError> {
        for entry in registry.entries_mut() {
            if !self.early.contains(&entry.section_id()) {
                let mut bytes = Vec::new();
                self.encode_device(entry, &mut bytes)?;
                put_bytes(&bytes, sink)?;
            }
        }
        Ok(())
    }

    /// The same into memory, and without describing them, as a postcopy wants it.
    pub(super) fn encode_devices(
        &mut self,
        registry: &mut Registry<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), SaveError> {
        self.description = Description::Suppressed;
        for entry in registry.entries_mut() {
            if !self.early.contains(&entry.section_id()) {
                self.encode_device(entry, out)?;
            }
        }
        Ok(())
    }

    fn encode_device(&mut self, entry: &mut Entry<'_>, out: &mut Vec<u8>) -> Result<(), SaveError> {
        let header = entry.section(SectionKind::Full);
        let Some(device) = entry.device().filter(|device| device.is_needed()) else {
            return Ok(());
        };
        let (id, name, instance) = (header.id, header.name.clone(), header.instance);
        let body = device.save().map_err(|source| SaveError::Device {
            device: name.clone(),
            instance,
            source,
        })?;
        if let Description::Written(writer) = &mut self.description {
            writer.device(&name, instance.0, &body);
        }
        self.encode(&Record::Section(header), out);
        body.encode(out);
        self.encode(&Record::SectionEnd { id }, out);
        Ok(())
    }

    /// EOF and what follows it, as one piece.
    pub(super) fn finish(mut self, sink: &mut dyn Sink) -> Result<(), SaveError> {
        let mut bytes = Vec::new();
        self.encode(&Record::Eof, &mut bytes);
        let text = match std::mem::replace(&mut self.description, Description::Suppressed) {
            Description::Written(writer) => Some(writer.finish().into_bytes().into()),
            Description::Text(text) => Some(text),
            Description::Suppressed => None,
        };
        if let Some(text) = text {
            let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
            self.encode(&Record::Description { bytes: length }, &mut bytes);
            bytes.extend_from_slice(&text);
        }
        put_bytes(&bytes, sink)
    }

    pub(super) fn encode(&mut self, record: &Record, out: &mut Vec<u8>) {
        self.encoder.record(record, out);
    }

    pub(super) fn put(&mut self, records: &[Record], sink: &mut dyn Sink) -> Result<(), SaveError> {
        let mut bytes = Vec::new();
        for record in records {
            self.encode(record, &mut bytes);
        }
        put_bytes(&bytes, sink)
    }

    fn note(&mut self, command: &Command) {
        if let Command::PostcopyAdvise(sizes) = command {
            self.advised = Some(sizes.is_some());
        }
    }
}

pub(super) fn put_bytes(bytes: &[u8], sink: &mut dyn Sink) -> Result<(), SaveError> {
    match bytes {
        [] => Ok(()),
        bytes => sink.put(&[bytes]).map_err(SaveError::Channel),
    }
}
