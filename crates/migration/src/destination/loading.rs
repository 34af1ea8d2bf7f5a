//! Reads a stream to its end, or to the point where its guest runs without the rest.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmferry_block_migration::{Coverage, Destination};
use vmferry_channel::{ChannelError, Reader};
use vmferry_ram::{IncomingRam, RamBlock, RamDestination, RamDestinationError};
use vmferry_savevm::{
    Incoming, LoadMachine, LoadOptions, LoadStep, Machine, Owner, Registration, Registry,
    load_cleanup,
};
use vmferry_stream::return_path::ReturnMessage;
use vmferry_stream::{Command, Ending, Name, Record as StreamRecord};

use super::answers::Answers;
use super::input::Input;
use super::landing::{Landing, take_leases};
use super::{Arrived, DestinationFailure, DestinationJob, Reconnections, Rest, postcopy};
use crate::engine::{HELLO, HELLO_ANSWER, INCREMENTAL};
use crate::guest::DestinationMachine;
use crate::status::{Published, RamStatus, State, Status};

/// Why a postcopy is refused.
const NO_POSTCOPY: &str = "postcopy cannot be received; turn postcopy-ram off at the source";
/// Why a postcopy is refused by a machine.
const POSTCOPY_OFF: &str = "postcopy-ram is off here";
/// A package is read in pieces of this length.
const PACKAGE_PIECE_BYTES: usize = 1 << 20;
/// Why an incremental migration is refused.
const NOT_INCREMENTAL: &str = "it sends only what lies in its disks' top layers, and this side was \
    not told (vmferry's --incremental) that its disks lie over the same bases";
/// How long to wait for a description after EOF, where the source keeps the channel open.
const DESCRIPTION_PATIENCE: Duration = Duration::from_secs(10);

/// A stream that is being read.
pub(super) struct Loading<'a> {
    pub(super) input: Input,
    pub(super) machine: LoadMachine,
    pub(super) registry: Registry<'static>,
    pub(super) landing: Landing,
    /// The memory of a machine, and where a postcopy of it gets its connections.
    pub(super) ram: Option<(IncomingRam, &'a Reconnections)>,
    pub(super) published: &'a Published,
    coverage: Coverage,
    rest: Option<&'a mut dyn Rest>,
    greeted: bool,
    /// The block whose ranges are being discarded.
    discarding: Option<Name>,
    /// When the description must have come.
    after_eof: Option<Instant>,
}

/// How far a stream was read.
enum Read {
    /// It is over.
    Whole,
    /// Up to this package; its guest runs when that is loaded.
    Package(Vec<u8>),
}

impl<'a> Loading<'a> {
    pub(super) fn new(
        reader: Reader,
        job: DestinationJob<'a>,
        machine: Option<(DestinationMachine, &'a Reconnections)>,
        published: &'a Published,
        peer: String,
    ) -> Result<Self, DestinationFailure> {
        let leases = take_leases(&job.disks)?;
        let fillers = leases.iter().map(|(lease, _)| lease.filler()).collect();
        let destination = Destination::new(fillers, job.coverage)?;
        let (syncer, stats) = (destination.syncer(), destination.stats());
        let mut registry = Registry::new();
        registry.register(Registration::loading(
            vmferry_block_migration::SECTION_NAME,
            vmferry_block_migration::SECTION_VERSION..=vmferry_block_migration::SECTION_VERSION,
            Box::new(destination),
        ))?;
        let (mut ram, mut guest) = (None, None);
        let options = match machine {
            None => options_without_machine(&job),
            Some((machine, reconnections)) => {
                let can_postcopy = machine.ram_options.postcopy;
                let blocks = machine.ram.blocks().iter();
                let total_bytes = blocks.map(RamBlock::used_bytes).sum();
                published.update(|status| {
                    status.ram = Some(RamStatus {
                        total_bytes,
                        ..RamStatus::default()
                    });
                });
                let handler = RamDestination::new(machine.ram, machine.ram_options)?;
                let incoming = handler.incoming();
                registry.register(Registration::loading(
                    vmferry_ram::SECTION_NAME,
                    vmferry_ram::SECTION_VERSION..=vmferry_ram::SECTION_VERSION,
                    Box::new(handler),
                ))?;
                for device in machine.devices {
                    registry.register(device)?;
                }
                let postcopy = match can_postcopy {
                    true => Incoming::Ram(incoming.page_sizes()),
                    false => Incoming::Refused(POSTCOPY_OFF),
                };
                ram = Some((incoming, reconnections));
                guest = Some(machine.guest);
                LoadOptions {
                    machine: Some(machine.machine),
                    postcopy,
                    refuse_rest: Some("this machine has no such device"),
                    ..LoadOptions::default()
                }
            }
        };
        Ok(Self {
            input: Input::new(reader),
            machine: LoadMachine::new(options),
            registry,
            landing: Landing::new(leases, syncer, stats, guest, job.keep_records, peer),
            ram,
            published,
            coverage: job.coverage,
            rest: job.rest,
            greeted: false,
            discarding: None,
            after_eof: None,
        })
    }

    /// Read it, and let guests in.
    pub(super) fn run(mut self, answers: &Answers) -> Result<Arrived, DestinationFailure> {
        let read = self.load(answers);
        self.publish();
        match read {
            Ok(Read::Package(package)) => postcopy::receive_rest(self, &package, answers),
            Ok(Read::Whole) => {
                let arrived = self.arrive(answers);
                load_cleanup(&mut self.registry);
                arrived.inspect(|_| self.landing.let_in())
            }
            Err(error) => {
                load_cleanup(&mut self.registry);
                Err(error)
            }
        }
    }

    fn arrive(&mut self, answers: &Answers) -> Result<Arrived, DestinationFailure> {
        let Some(ending) = self.machine.ending() else {
            return Err(self.truncated());
        };
        if let Some(rest) = &mut self.rest {
            // Before the records: what is parked with its disks is whole, or not there.
            if self.landing.has_all() {
                self.landing.sync()?;
                rest.finish().map_err(DestinationFailure::Rest)?;
            }
        }
        self.landing.land(answers)?;
        Ok(Arrived {
            ending,
            wire_bytes: self.machine.offset(),
            source_told: answers.say(&ReturnMessage::Shut(0)),
        })
    }

    /// Read until the stream is over.
    fn load(&mut self, answers: &Answers) -> Result<Read, DestinationFailure> {
        let mut is_package = false;
        loop {
            match self.machine.step(self.input.window(), &mut self.registry)? {
                LoadStep::End => return Ok(Read::Whole),
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
                            return Ok(Read::Whole);
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
                    is_package = matches!(record, StreamRecord::Command(Command::Packaged { .. }));
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
                    if is_package && self.ram.is_some() {
                        return Ok(Read::Package(self.read_package(bytes)?));
                    }
                    self.pass(u64::from(bytes))?;
                    if self.machine.ending() == Some(Ending::WithDescription) {
                        return Ok(Read::Whole);
                    }
                }
            }
            if self.input.worth_publishing() {
                self.publish();
            }
        }
    }

    /// The input has ended.
    fn finish(&self) -> Result<Read, DestinationFailure> {
        self.machine.finish_at(self.input.end())?;
        Ok(Read::Whole)
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
        answers: &Answers,
    ) -> Result<(), DestinationFailure> {
        if let StreamRecord::Configuration(configuration) = record {
            // Only ours has no machine.
            let ours = configuration.machine.is_empty();
            self.landing
                .stats
                .source_is_ours
                .store(ours, Ordering::Relaxed);
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
            StreamRecord::DiscardRange(range) => {
                if let (Some((ram, _)), Some(block)) = (&self.ram, &self.discarding) {
                    ram.discard(block, *range)?;
                }
                false
            }
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
        self.landing.write_incoming()?;
        self.published.update(|status| {
            status.state = State::Active;
            status.pass = 1;
            status.setup_time = status.begun.map(|begun| begun.elapsed());
        });
        Ok(())
    }

    /// True if the command belongs into the rest: what is about this connection does not.
    fn command(
        &mut self,
        command: &Command,
        answers: &Answers,
    ) -> Result<bool, DestinationFailure> {
        let refuse = |reason| DestinationFailure::Command {
            offset: self.machine.offset(),
            command: command.name(),
            reason,
        };
        match command {
            Command::OpenReturnPath => {
                answers.open();
                Ok(false)
            }
            Command::Ping(_) if !answers.is_open() => Err(refuse("no return path was opened")),
            Command::Ping(INCREMENTAL) if self.coverage == Coverage::Whole => {
                Err(refuse(NOT_INCREMENTAL))
            }
            Command::Ping(value) => {
                self.landing.sync()?;
                answers.send(&ReturnMessage::Pong(*value))?;
                if *value == HELLO {
                    answers.send(&ReturnMessage::Pong(HELLO_ANSWER))?;
                }
                Ok(false)
            }
            Command::SwitchoverStart => Ok(true),
            Command::PostcopyAdvise(Some(_)) if self.ram.is_some() => {
                self.with_ram(IncomingRam::advise)?;
                Ok(false)
            }
            Command::PostcopyRamDiscard { block, .. } if self.ram.is_some() => {
                self.discarding = Some(block.clone());
                Ok(false)
            }
            Command::Packaged { .. } | Command::PostcopyResume | Command::ReceivedBitmap(_)
                if self.ram.is_some() =>
            {
                Ok(false)
            }
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

    fn with_ram(
        &self,
        tell: impl FnOnce(&IncomingRam) -> Result<(), RamDestinationError>,
    ) -> Result<(), DestinationFailure> {
        self.ram.as_ref().map_or(Ok(()), |(ram, _)| Ok(tell(ram)?))
    }

    /// All of a package: what follows on the connection is read while it is loaded.
    fn read_package(&mut self, bytes: u32) -> Result<Vec<u8>, DestinationFailure> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut package = Vec::new();
        while package.len() < length {
            // As much memory as has come, not as much as was announced.
            let piece = PACKAGE_PIECE_BYTES.min(length - package.len());
            let start = package.len();
            package.resize(start + piece, 0);
            if !self.input.read_payload(&mut package[start..])? {
                return Err(self.truncated());
            }
        }
        Ok(package)
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
        match self.landing.has_all() {
            true => Ok(()),
            false => Err(DestinationFailure::DisksMissing {
                offset: self.machine.offset(),
            }),
        }
    }

    fn publish(&self) {
        let stats = &self.landing.stats;
        let arrived = stats.arrived_bytes.load(Ordering::Relaxed);
        let wire_bytes = self.machine.offset();
        self.published.update(|status| {
            status.moved_bytes = arrived;
            status.bulk_bytes = arrived.min(status.total_bytes);
            status.remaining_bytes = status.total_bytes - status.bulk_bytes;
            status.zero_bytes = stats.zero_bytes.load(Ordering::Relaxed);
            status.wire_bytes = wire_bytes;
            if let Some((ram, _)) = &self.ram {
                publish_ram(status, ram);
            }
        });
    }
}

/// What has come of the memory.
pub(super) fn publish_ram(status: &mut Status, ram: &IncomingRam) {
    let stats = ram.stats();
    let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
    let (zero_pages, xbzrle_pages) = (load(&stats.zero_pages), load(&stats.xbzrle_pages));
    let median = stats.fault_latency.percentile(50);
    let most = stats.fault_latency.percentile(99);
    let others = zero_pages + xbzrle_pages + load(&stats.compressed_pages);
    status.ram = Some(RamStatus {
        normal_pages: load(&stats.pages).saturating_sub(others),
        zero_pages,
        xbzrle_pages,
        postcopy_requests: load(&stats.faults),
        fault_latency: median.zip(most).map(<[Duration; 2]>::from),
        ..status.ram.unwrap_or_default()
    });
}

fn options_without_machine(job: &DestinationJob<'_>) -> LoadOptions {
    // Of the capabilities that matter, one is refused by name and the other is about RAM.
    let disks_alone = Machine {
        capabilities: None,
        ..Machine::default()
    };
    LoadOptions {
        machine: (!job.any_machine).then_some(disks_alone),
        postcopy: Incoming::Refused(NO_POSTCOPY),
        refuse_rest: job.rest.is_none().then_some(
            "the stream carries a virtual machine, which would be lost here; `vmferry receive \
             --save FILE` keeps it",
        ),
        ..LoadOptions::default()
    }
}
