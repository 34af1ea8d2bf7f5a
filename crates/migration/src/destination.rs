//! A migration into here.
//!
//! The thread that calls [`receive`] owns the load machine and reads the channel. Nothing touches a
//! disk before header and configuration were accepted; from then on the disks' records say
//! `incoming`. Every PING is answered after all that came before it was written and synced, so the
//! PONG of the source's barrier says that the disks are whole and durable.
//!
//! A stream whose `block` section has ended, and that ends itself with EOF and description, is a
//! success, whether or not the source is there to hear it: it has given the disks up by then, or
//! holds them. First the record is made durable, then SHUT 0 is sent, then guests are let in. SHUT 1
//! is sent only where no guest was let in.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmferry_block_migration::{
    ApplyError, Coverage, Destination, DestinationError, DestinationStats, SECTION_NAME,
    SECTION_VERSION, Syncer,
};
use vmferry_channel::{Channel, ChannelError, Reader, Writer};
use vmferry_disk::{InUse, Lease, Node};
use vmferry_savevm::{
    Incoming, LoadError, LoadMachine, LoadOptions, LoadStep, Machine, Owner, Registration,
    Registry, load_cleanup,
};
use vmferry_stream::return_path::ReturnMessage;
use vmferry_stream::{Command, Ending, Record as StreamRecord};

use crate::engine::{HELLO, HELLO_ANSWER, INCREMENTAL};
use crate::record::{RecordError, RecordFile, Residence};
use crate::status::{Published, State};

/// Why a postcopy is refused.
const NO_POSTCOPY: &str = "postcopy cannot be received; turn postcopy-ram off at the source";
/// Why an incremental migration is refused.
const NOT_INCREMENTAL: &str = "it sends only what lies in its disks' top layers, and this side was \
    not told (vmferry's --incremental) that its disks lie over the same bases";
/// How long a source may take to send header and configuration.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for a description after EOF, where the source keeps the channel open.
const DESCRIPTION_PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer may take to leave.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// A disk that can be filled.
#[derive(Clone, Debug)]
pub struct DestinationDisk {
    /// The disk, with guests' writes held.
    pub node: Arc<Node>,
    /// Where it is written down what became of it.
    pub record: Option<RecordFile>,
}

/// Takes the stream without its disks.
pub trait Rest {
    /// Bytes of the rest, in order.
    ///
    /// # Errors
    /// What the host said.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Everything has come: make it durable.
    ///
    /// # Errors
    /// What the host said.
    fn finish(&mut self) -> io::Result<()>;
}

/// What to receive.
pub struct DestinationJob<'a> {
    /// The disks to fill.
    pub disks: Vec<DestinationDisk>,
    /// Does every block come, or only what the source has allocated in its top layers?
    pub coverage: Coverage,
    /// Takes the rest of the stream. Without it, a stream that has more than disks is refused.
    pub rest: Option<&'a mut dyn Rest>,
    /// Is a stream of any machine welcome, or only one without a machine?
    pub any_machine: bool,
    /// Do the records stay, for a daemon that is restarted? Else they go when all is over.
    pub keep_records: bool,
}

/// A migration did not arrive. No guest was let in.
#[derive(Debug, thiserror::Error)]
pub enum DestinationFailure {
    /// A disk is in use.
    #[error("disk '{disk}' is {source}")]
    InUse {
        /// Its name.
        disk: String,
        /// By whom.
        source: InUse,
    },
    /// The disks cannot be filled.
    #[error(transparent)]
    Disks(#[from] DestinationError),
    /// What arrived could not be written.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The stream is wrong.
    #[error("{0}")]
    Load(LoadError),
    /// The stream asks for something that cannot be done with it here.
    #[error("byte {offset}: the source sent {command}: {reason}")]
    Command {
        /// Where in the stream.
        offset: u64,
        /// Which command.
        command: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// Offsets in the stream are those of a file, and taking disks out of it moves them.
    #[error(
        "byte {offset}: the stream has its memory at fixed file offsets (capability mapped-ram), \
         which cannot be received"
    )]
    MappedRam {
        /// Where in the stream.
        offset: u64,
    },
    /// The stream goes on without the disks.
    #[error(
        "byte {offset}: the stream goes on with a device's state, but its disks have not ended"
    )]
    DisksMissing {
        /// Where in the stream.
        offset: u64,
    },
    /// The stream ended without the disks.
    #[error("the stream has ended without disks, but {} expected here: {}", if names.len() == 1 { "one is" } else { "some are" }, names.join(", "))]
    NoDisks {
        /// The disks that were expected.
        names: Vec<String>,
    },
    /// The rest could not be saved.
    #[error("the rest of the stream could not be saved: {0}")]
    Rest(io::Error),
    /// A record could not be written.
    #[error(transparent)]
    Record(#[from] RecordError),
}

impl From<LoadError> for DestinationFailure {
    fn from(error: LoadError) -> Self {
        Self::Load(error)
    }
}

/// A migration that arrived.
#[derive(Debug)]
pub struct Arrived {
    /// Does the stream describe its devices?
    pub ending: Ending,
    /// Bytes of the stream.
    pub wire_bytes: u64,
    /// The source was told; if not, it may hold its disks until somebody decides there.
    pub source_told: bool,
}

/// Receive one migration. Ends with the channel, the stream, or the channel's stop.
///
/// # Errors
/// See [`DestinationFailure`]. The disks then still hold guests' writes.
pub fn receive<'a>(
    channel: Channel,
    job: DestinationJob<'a>,
    published: &'a Published,
) -> Result<Arrived, DestinationFailure> {
    let peer = channel.peer().to_owned();
    let (reader, writer) = channel.split();
    let Some(reader) = reader else {
        return Err(ChannelError::Unsuitable {
            peer,
            reason: "it cannot be read",
        }
        .into());
    };
    published.update(|status| {
        status.state = State::Setup;
        status.peer = peer.clone();
        status.begun = Some(Instant::now());
        status.total_bytes = job.disks.iter().map(|disk| disk.node.limits().length).sum();
        status.remaining_bytes = status.total_bytes;
    });
    let mut answers = Answers {
        writer,
        open: false,
    };
    let result = Loading::new(reader, job, published, peer).and_then(|mut loading| {
        let result = loading.run(&mut answers);
        load_cleanup(&mut loading.registry);
        result
    });
    match &result {
        Ok(_) => published.update(|status| {
            status.state = State::Completed;
            status.durable = Some(true);
            status.remaining_bytes = 0;
            status.total_time = status.begun.map(|begun| begun.elapsed());
        }),
        Err(error) => {
            answers.say(&ReturnMessage::Shut(1));
            published.update(|status| {
                status.state = State::Failed;
                status.error = Some(error.to_string());
                status.total_time = status.begun.map(|begun| begun.elapsed());
            });
        }
    }
    result
}

/// The way back, once the source has opened it.
struct Answers {
    writer: Option<Writer>,
    open: bool,
}

impl Answers {
    fn send(&mut self, message: &ReturnMessage) -> Result<(), ChannelError> {
        let Some(writer) = self.writer.as_mut().filter(|_| self.open) else {
            return Ok(());
        };
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        writer.write_all_until(&bytes, Some(Instant::now() + ANSWER_PATIENCE))
    }

    /// Send, if that is possible; true if there was somebody to hear it.
    fn say(&mut self, message: &ReturnMessage) -> bool {
        self.open && self.writer.is_some() && self.send(message).is_ok()
    }
}

struct Loading<'a> {
    input: Input,
    machine: LoadMachine,
    registry: Registry<'static>,
    leases: Vec<(Lease, Option<RecordFile>)>,
    syncer: Syncer,
    stats: Arc<DestinationStats>,
    coverage: Coverage,
    rest: Option<&'a mut dyn Rest>,
    keep_records: bool,
    /// Tells the records of this attempt from those of others.
    attempt: u64,
    published: &'a Published,
    peer: String,
    greeted: bool,
    /// When the description must have come.
    after_eof: Option<Instant>,
}

impl<'a> Loading<'a> {
    fn new(
        reader: Reader,
        job: DestinationJob<'a>,
        published: &'a Published,
        peer: String,
    ) -> Result<Self, DestinationFailure> {
        let leases = job
            .disks
            .iter()
            .map(|disk| match disk.node.lease("an incoming migration") {
                Ok(lease) => Ok((lease, disk.record.clone())),
                Err(source) => {
                    let disk = disk.node.name().to_owned();
                    Err(DestinationFailure::InUse { disk, source })
                }
            })
            .collect::<Result<Vec<_>, _>>()?;
        let fillers = leases.iter().map(|(lease, _)| lease.filler()).collect();
        let destination = Destination::new(fillers, job.coverage)?;
        let (syncer, stats) = (destination.syncer(), destination.stats());
        let mut registry = Registry::new();
        // The registry is empty, so the name is free.
        let _ = registry.register(Registration::loading(
            SECTION_NAME,
            SECTION_VERSION..=SECTION_VERSION,
            Box::new(destination),
        ));
        // Of the capabilities that matter, one is refused by name and the other is about RAM.
        let disks_alone = Machine {
            capabilities: None,
            ..Machine::default()
        };
        let options = LoadOptions {
            machine: (!job.any_machine).then_some(disks_alone),
            postcopy: Incoming::Refused(NO_POSTCOPY),
            refuse_rest: job.rest.is_none().then_some(
                "the stream carries a virtual machine, which would be lost here; `vmferry receive \
                 --save FILE` keeps it",
            ),
            ..LoadOptions::default()
        };
        Ok(Self {
            input: Input::new(reader),
            machine: LoadMachine::new(options),
            registry,
            leases,
            syncer,
            stats,
            coverage: job.coverage,
            rest: job.rest,
            keep_records: job.keep_records,
            attempt: RandomState::new().build_hasher().finish(),
            published,
            peer,
            greeted: false,
            after_eof: None,
        })
    }

    fn run(&mut self, answers: &mut Answers) -> Result<Arrived, DestinationFailure> {
        let loaded = self.load(answers);
        self.publish();
        loaded?;
        let Some(ending) = self.machine.ending() else {
            return Err(self.truncated());
        };
        self.check_disks()?;
        self.syncer.sync()?;
        if let Some(rest) = &mut self.rest {
            rest.finish().map_err(DestinationFailure::Rest)?;
        }
        if let Err(error) = self.write_arrived() {
            // A record that says more than is true must not be contradicted by SHUT 1.
            answers.open &= self.write_incoming().is_ok();
            return Err(error.into());
        }
        // From here on the disks live here.
        let source_told = answers.say(&ReturnMessage::Shut(0));
        if !self.keep_records {
            self.clear_records();
        }
        self.leases.drain(..).for_each(|(lease, _)| lease.arrive());
        Ok(Arrived {
            ending,
            wire_bytes: self.machine.offset(),
            source_told,
        })
    }

    /// Read until the stream is over.
    fn load(&mut self, answers: &mut Answers) -> Result<(), DestinationFailure> {
        loop {
            match self.machine.step(self.input.window(), &mut self.registry)? {
                LoadStep::End => return Ok(()),
                LoadStep::NeedMore(bytes) => {
                    let deadline = match (self.greeted, self.after_eof) {
                        (false, _) => Some(self.input.greeting_deadline),
                        (true, eof) => eof,
                    };
                    match self.input.fill(bytes, deadline) {
                        Ok(true) => {}
                        // The rest of the stream may be passed on in pieces that end anywhere.
                        Ok(false) => return self.finish(),
                        Err(ChannelError::TimedOut { .. }) if self.after_eof.is_some() => {
                            return Ok(());
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                LoadStep::Record {
                    record,
                    used,
                    owner,
                } => {
                    self.record(&record, used, owner, answers)?;
                    if record == StreamRecord::Eof {
                        self.after_eof = Some(Instant::now() + DESCRIPTION_PATIENCE);
                    }
                }
                LoadStep::Payload {
                    bytes,
                    owner: Owner::Handler,
                } => self.payload(bytes)?,
                LoadStep::Device { used } => self.input.consume(used),
                LoadStep::Payload {
                    bytes,
                    owner: Owner::Rest,
                } => {
                    self.pass(u64::from(bytes))?;
                    if self.machine.ending() == Some(Ending::WithDescription) {
                        return Ok(());
                    }
                }
            }
            if self.input.worth_publishing() {
                self.publish();
            }
        }
    }

    /// The input has ended.
    fn finish(&self) -> Result<(), DestinationFailure> {
        self.machine.finish_at(self.input.end())?;
        Ok(())
    }

    fn truncated(&self) -> DestinationFailure {
        match self.machine.finish_at(self.input.end()) {
            Err(error) => error.into(),
            Ok(_) => DestinationFailure::NoDisks { names: Vec::new() },
        }
    }

    fn record(
        &mut self,
        record: &StreamRecord,
        used: usize,
        owner: Owner,
        answers: &mut Answers,
    ) -> Result<(), DestinationFailure> {
        if let StreamRecord::Configuration(configuration) = record {
            // Only ours has no machine.
            let ours = configuration.machine.is_empty();
            self.stats.source_is_ours.store(ours, Ordering::Relaxed);
            if configuration.has_capability("mapped-ram") {
                let offset = self.machine.offset();
                return Err(DestinationFailure::MappedRam { offset });
            }
        }
        if !self.greeted && !matches!(record, StreamRecord::Header { .. }) {
            self.greet()?;
        }
        let keep = match record {
            StreamRecord::Command(command) => self.command(command, answers)?,
            StreamRecord::Section(section)
                if owner == Owner::Rest && section.content() == vmferry_stream::Content::Device =>
            {
                self.check_disks_ended()?;
                true
            }
            _ => owner == Owner::Rest,
        };
        if keep && let Some(rest) = &mut self.rest {
            rest.write(&self.input.window()[..used])
                .map_err(DestinationFailure::Rest)?;
        }
        self.input.consume(used);
        Ok(())
    }

    /// Header and configuration are accepted: from here on disks may change.
    fn greet(&mut self) -> Result<(), DestinationFailure> {
        self.greeted = true;
        self.write_incoming()?;
        self.published.update(|status| {
            status.state = State::Active;
            status.pass = 1;
            status.setup_time = status.begun.map(|begun| begun.elapsed());
        });
        Ok(())
    }

    fn write_incoming(&self) -> Result<(), RecordError> {
        let mut records = self.leases.iter().filter_map(|(_, record)| record.as_ref());
        records.try_for_each(|record| {
            record.write_attempt(Residence::Incoming, &self.peer, Some(self.attempt))
        })
    }

    /// The disks live here, as far as records are concerned, once all of them say so.
    fn write_arrived(&self) -> Result<(), RecordError> {
        let mut records = self.leases.iter().filter_map(|(_, record)| record.as_ref());
        records.try_for_each(|record| {
            record.write_attempt(Residence::Arrived, &self.peer, Some(self.attempt))
        })
    }

    /// Nobody will ask: the files are whole, and that is all.
    fn clear_records(&self) {
        for record in self.leases.iter().filter_map(|(_, record)| record.as_ref()) {
            if let Err(error) = record.clear() {
                tracing::warn!(%error, "the disk has arrived, but its record could not be removed");
            }
        }
    }

    /// True if the command belongs into the rest: what is about this connection does not.
    fn command(
        &mut self,
        command: &Command,
        answers: &mut Answers,
    ) -> Result<bool, DestinationFailure> {
        let refuse = |reason| DestinationFailure::Command {
            offset: self.machine.offset(),
            command: command.name(),
            reason,
        };
        match command {
            Command::OpenReturnPath => {
                answers.open = true;
                Ok(false)
            }
            Command::Ping(_) if !answers.open => Err(refuse("no return path was opened")),
            Command::Ping(INCREMENTAL) if self.coverage == Coverage::Whole => {
                Err(refuse(NOT_INCREMENTAL))
            }
            Command::Ping(value) => {
                self.syncer.sync()?;
                answers.send(&ReturnMessage::Pong(*value))?;
                if *value == HELLO {
                    answers.send(&ReturnMessage::Pong(HELLO_ANSWER))?;
                }
                Ok(false)
            }
            Command::SwitchoverStart => Ok(true),
            Command::PostcopyAdvise(_)
            | Command::PostcopyListen
            | Command::PostcopyRun
            | Command::PostcopyRamDiscard { .. }
            | Command::PostcopyResume
            | Command::ReceivedBitmap(_)
            | Command::Packaged { .. } => Err(refuse(NO_POSTCOPY)),
            Command::EnableColo => Err(refuse("COLO is not supported")),
        }
    }

    fn payload(&mut self, bytes: u32) -> Result<(), DestinationFailure> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        let room = self.machine.payload(&mut self.registry, length)?;
        if !self.input.read_payload(room)? {
            return Err(self.truncated());
        }
        Ok(self.machine.payload_filled(&mut self.registry)?)
    }

    fn pass(&mut self, bytes: u64) -> Result<(), DestinationFailure> {
        let mut left = bytes;
        while left > 0 {
            if self.input.window().is_empty() && !self.input.fill(1, self.after_eof)? {
                return Err(self.truncated());
            }
            let window = self.input.window();
            let length = usize::try_from(left)
                .unwrap_or(usize::MAX)
                .min(window.len());
            if let Some(rest) = &mut self.rest {
                rest.write(&window[..length])
                    .map_err(DestinationFailure::Rest)?;
            }
            self.input.consume(length);
            left -= length as u64;
        }
        Ok(())
    }

    fn check_disks_ended(&self) -> Result<(), DestinationFailure> {
        if self.leases.is_empty() || self.stats.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(DestinationFailure::DisksMissing {
            offset: self.machine.offset(),
        })
    }

    fn check_disks(&self) -> Result<(), DestinationFailure> {
        if self.leases.is_empty() || self.stats.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        let quoted = |(lease, _): &(Lease, _)| format!("'{}'", lease.node().name());
        Err(DestinationFailure::NoDisks {
            names: self.leases.iter().map(quoted).collect(),
        })
    }

    fn publish(&self) {
        let arrived = self.stats.arrived_bytes.load(Ordering::Relaxed);
        let wire_bytes = self.machine.offset();
        self.published.update(|status| {
            status.moved_bytes = arrived;
            status.bulk_bytes = arrived.min(status.total_bytes);
            status.remaining_bytes = status.total_bytes - status.bulk_bytes;
            status.zero_bytes = self.stats.zero_bytes.load(Ordering::Relaxed);
            status.wire_bytes = wire_bytes;
        });
    }
}

/// Bytes read ahead of a record.
const WINDOW_BYTES: usize = 64 << 10;
/// Read ahead before the payload of a disk: little, for it would have to be copied.
const WINDOW_BEFORE_PAYLOAD_BYTES: usize = 4 << 10;
/// Figures are published whenever this much has come.
const PUBLISH_BYTES: u64 = 4 << 20;

/// The channel's bytes, as windows.
struct Input {
    reader: Reader,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    read_ahead: usize,
    received: u64,
    published: u64,
    greeting_deadline: Instant,
}

impl Input {
    fn new(reader: Reader) -> Self {
        Self {
            reader,
            buffer: vec![0; WINDOW_BYTES],
            start: 0,
            end: 0,
            read_ahead: WINDOW_BYTES,
            received: 0,
            published: 0,
            greeting_deadline: Instant::now() + GREETING_PATIENCE,
        }
    }

    fn window(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn consume(&mut self, bytes: usize) {
        self.start += bytes;
    }

    /// Bytes that were received in all.
    fn end(&self) -> u64 {
        self.received
    }

    /// Read until the window has `bytes` bytes; false if the input ends before.
    fn fill(&mut self, bytes: usize, deadline: Option<Instant>) -> Result<bool, ChannelError> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        while self.end < bytes {
            let room = self.read_ahead.max(bytes).min(self.buffer.len());
            let length = self
                .reader
                .read_until(&mut self.buffer[self.end..room], deadline)?;
            if length == 0 {
                return Ok(false);
            }
            self.end += length;
            self.received += length as u64;
        }
        Ok(true)
    }

    /// Fill `room` from the window and then straight from the channel; false if the input ends.
    fn read_payload(&mut self, room: &mut [u8]) -> Result<bool, ChannelError> {
        self.read_ahead = WINDOW_BEFORE_PAYLOAD_BYTES;
        let mut filled = room.len().min(self.end - self.start);
        room[..filled].copy_from_slice(&self.buffer[self.start..self.start + filled]);
        self.start += filled;
        while filled < room.len() {
            let length = self.reader.read(&mut room[filled..])?;
            if length == 0 {
                return Ok(false);
            }
            filled += length;
            self.received += length as u64;
        }
        Ok(true)
    }

    fn worth_publishing(&mut self) -> bool {
        let due = self.received - self.published >= PUBLISH_BYTES;
        if due {
            self.published = self.received;
        }
        due
    }
}
