//! A migration out of here.
//!
//! ```text
//!  setup ─▶ active ──────────▶ (pre-switchover) ─▶ device ──────────────▶ completed
//!           bulk, dirty passes  writes held         last chunks, PING …
//!                                                   PONG │ EOF │ SHUT
//!           └──────── failure or cancel: holds lifted ───┘     └─ undecided: held
//! ```
//!
//! With a machine there is another way, where the guest runs before all of its memory is there:
//!
//! ```text
//!  active ── start_postcopy ─▶ device ── package ─▶ postcopy-active ──────────────▶ completed
//!            disks whole,      PONG: disks given up      │ ▲ broken
//!            memory not                                  ▼ │ resume
//!                                         postcopy-paused ─▶ postcopy-recover
//! ```
//!
//! One thread owns the save machine; others post commands and read the published status. A second
//! thread reads the return path.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_block_migration::SourceError;
use vmferry_channel::{Channel, ChannelError, Stop, Uri};
use vmferry_disk::InUse;
use vmferry_ram::{OutgoingRam, RamSourceError, StoredRange};
use vmferry_savevm::{HandlerError, RegisterError, SaveError};
use vmferry_stream::Name;

use crate::engine::{Engine, take_leases};
use crate::guest::SourceMachine;
use crate::hand_over::{CancelGate, Decision, SourceDisk};
use crate::line::Line;
use crate::moving::Moving;
use crate::parameters::{Capabilities, Parameters};
use crate::record::RecordError;
use crate::sink::Throttle;
use crate::status::{Published, State};

/// How long guests' writes may take to end once no new ones are let in.
pub(crate) const DRAIN_PATIENCE: Duration = Duration::from_secs(30);
/// How long the destination may take to have everything written and synced, with guests held.
pub(crate) const BARRIER_PATIENCE: Duration = Duration::from_secs(60);

/// Where to migrate to.
#[derive(Debug)]
pub enum Target {
    /// An address to be opened.
    Uri(Uri),
    /// A channel that is open already.
    Channel(Channel),
}

/// A migration to be started.
#[derive(Debug)]
pub struct SourceJob {
    /// What to migrate.
    pub disks: Vec<SourceDisk>,
    /// Whereto.
    pub target: Target,
    /// May be changed while it runs.
    pub parameters: Parameters,
    /// May not.
    pub capabilities: Capabilities,
    /// Triggered when the channel is to be given up at once; that of [`Target::Channel`], too.
    pub stop: Stop,
}

/// A migration failed. Guests are served on, here.
#[derive(Debug, thiserror::Error)]
pub enum SourceFailure {
    /// There is nothing to migrate.
    #[error("there is no writable disk to migrate")]
    NoDisks,
    /// A disk is in use.
    #[error("disk '{disk}' is {source}")]
    InUse {
        /// Its name.
        disk: String,
        /// By whom.
        source: InUse,
    },
    /// A disk cannot be migrated.
    #[error(transparent)]
    Disk(#[from] SourceError),
    /// The machine's memory cannot be migrated.
    #[error(transparent)]
    Ram(#[from] RamSourceError),
    /// Two sections have one name.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The guest runs on.
    #[error("the guest could not be stopped: {0}")]
    Guest(HandlerError),
    /// The channel cannot carry an answer.
    #[error(
        "{peer}: the channel is one-way, so nobody can tell whether the disks arrive (one-way must be asked for)"
    )]
    OneWay {
        /// The channel.
        peer: String,
    },
    /// The guest would run on here, too.
    #[error("a background snapshot is no migration: its guest runs on here")]
    BackgroundSnapshot,
    /// Only what stands still can be sent by two processes, one after the other.
    #[error("only a postcopy of a parked machine, without disks, can be taken up again")]
    NotTakenUp,
    /// A postcopy asks for pages.
    #[error("postcopy needs the return path")]
    OneWayPostcopy,
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The stream could not be written.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A record could not be written.
    #[error(transparent)]
    Record(RecordError),
    /// The destination gave up.
    #[error("the destination refused or failed (SHUT {status}); its own messages say why")]
    Refused {
        /// What it said.
        status: u32,
    },
    /// The return path ended.
    #[error("{0}")]
    ReturnClosed(String),
    /// Guest writes did not end.
    #[error("disk '{disk}': writes of the guest did not end within {} s", DRAIN_PATIENCE.as_secs())]
    Drain {
        /// Its name.
        disk: String,
    },
    /// The destination did not get ready in time.
    #[error(
        "the destination did not confirm within {} s that everything is written; the guest was \
         let go on here",
        BARRIER_PATIENCE.as_secs()
    )]
    Barrier,
    /// No thread to be had.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
    /// By request.
    #[error("cancelled")]
    Cancelled,
    /// A bug.
    #[error("internal error: the migration's thread panicked")]
    Panic,
}

/// A request that the migration cannot follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// A cancel came too late: the destination may have the disks.
    #[error("too late to cancel: the destination may have taken over")]
    TooLate,
    /// Nothing to decide.
    #[error("the migration is not undecided")]
    NotUndecided,
    /// No machine, or one that was not started with postcopy on.
    #[error("postcopy must be on, with a machine, when the migration starts")]
    NoPostcopy,
    /// Not in `postcopy-paused`.
    #[error("the migration is not in 'postcopy-paused'")]
    NotInterrupted,
    /// Not in a postcopy.
    #[error("the migration is not in 'postcopy-active'")]
    NotInPostcopy,
    /// Not in `pre-switchover`.
    #[error("the migration is not in 'pre-switchover'")]
    NotPaused,
    /// It is over.
    #[error("the migration is over")]
    Over,
}

/// What the owner thread hears of.
#[derive(Debug)]
pub(crate) enum Event {
    Pong {
        value: u32,
        at: Instant,
    },
    Shut(u32),
    ReturnClosed(String),
    /// Which pages of a block the destination has, in the form of the wire.
    Received {
        block: Name,
        bitmap: Vec<u8>,
    },
    ResumeAck(u32),
    Set(Parameters),
    Continue,
    StartPostcopy,
    /// Another connection for a postcopy that was interrupted.
    Resume(Target, Stop),
    Decide(Decision),
    /// A cancel or the end of the daemon: look at the gate and the stop.
    Wake,
}

impl Event {
    /// Did the destination say it?
    pub(crate) fn is_of_return_path(&self) -> bool {
        matches!(
            self,
            Self::Pong { .. }
                | Self::Shut(_)
                | Self::ReturnClosed(_)
                | Self::Received { .. }
                | Self::ResumeAck(_)
        )
    }
}

/// A migration that runs, or has run.
#[derive(Debug)]
pub struct RunningSource {
    published: Published,
    events: Sender<Event>,
    gate: Arc<CancelGate>,
    throttle: Throttle,
    line: Line,
    can_postcopy: bool,
    ram: Option<OutgoingRam>,
    thread: Option<JoinHandle<()>>,
}

impl RunningSource {
    /// Start a migration. Its course is told through `published`.
    ///
    /// # Errors
    /// No disks, a disk in use, no thread to be had: nothing was sent, nothing has changed.
    pub fn start(job: SourceJob, published: Published) -> Result<Self, SourceFailure> {
        if job.disks.is_empty() {
            return Err(SourceFailure::NoDisks);
        }
        Self::start_thread(job, None, false, published)
    }

    /// Start the migration of a machine, with those of its disks that are not shared. One that is parked
    /// runs at the destination at once, if it may become a postcopy.
    ///
    /// # Errors
    /// A disk in use, memory that cannot be migrated, no thread to be had: nothing was sent, nothing
    /// has changed.
    pub fn start_machine(
        job: SourceJob,
        machine: SourceMachine,
        published: Published,
    ) -> Result<Self, SourceFailure> {
        Self::start_thread(job, Some(machine), false, published)
    }

    /// Go on with a postcopy that another process has begun, with this machine, and has not ended: its
    /// memory is stored, and so as it was. Nothing is sent but pages that the destination has not.
    ///
    /// If that does not work it is in `postcopy-paused`, as after any other break.
    ///
    /// # Errors
    /// Memory that a guest could have written since, disks, no thread to be had.
    pub fn take_up(
        job: SourceJob,
        machine: SourceMachine,
        published: Published,
    ) -> Result<Self, SourceFailure> {
        if !machine.memory.is_stored() || !machine.ram_options.postcopy || !job.disks.is_empty() {
            return Err(SourceFailure::NotTakenUp);
        }
        Self::start_thread(job, Some(machine), true, published)
    }

    fn start_thread(
        job: SourceJob,
        machine: Option<SourceMachine>,
        taken_up: bool,
        published: Published,
    ) -> Result<Self, SourceFailure> {
        if machine
            .as_ref()
            .is_some_and(|it| it.ram_options.background_snapshot)
        {
            return Err(SourceFailure::BackgroundSnapshot);
        }
        let leases = take_leases(&job.disks)?;
        let disk_bytes = leases.iter().map(|(l, _)| l.node().limits().length).sum();
        let can_postcopy = machine.as_ref().is_some_and(|it| it.ram_options.postcopy);
        // Nothing is gained by waiting: it does not run here.
        let at_once = machine
            .as_ref()
            .is_some_and(|it| it.ram_options.postcopy && it.memory.is_stored());
        let moving = Moving::new(leases, machine, &job.capabilities, taken_up)?;
        let ram = moving.sections.ram.clone();
        let (events, inbox) = channel();
        let line = Line::new(job.stop.clone());
        let mut engine = Engine::new(&job, line.clone(), published.clone(), events.clone(), inbox);
        if at_once {
            engine.start_postcopy();
        }
        let (gate, throttle) = (engine.gate(), engine.throttle());
        published.update(|status| {
            status.state = State::Setup;
            status.peer = job.target.peer();
            status.begun = Some(Instant::now());
            status.total_bytes = disk_bytes;
            status.remaining_bytes = disk_bytes;
        });
        let target = job.target;
        let thread = std::thread::Builder::new()
            .name("migrate-source".to_owned())
            .spawn(move || {
                let outcome = catch_unwind(AssertUnwindSafe(|| match taken_up {
                    true => engine.take_up(moving, target),
                    false => engine.run(moving, target),
                }));
                engine.publish_outcome(outcome.unwrap_or(Err(SourceFailure::Panic)));
            })
            .map_err(SourceFailure::Thread)?;
        Ok(Self {
            published,
            events,
            gate,
            throttle,
            line,
            can_postcopy,
            ram,
            thread: Some(thread),
        })
    }

    /// What is known.
    #[must_use]
    pub fn published(&self) -> &Published {
        &self.published
    }

    /// The pages that the destination's guest has waited for so far, of memory that is stored; see
    /// [`OutgoingRam::requested`].
    #[must_use]
    pub fn requested(&self) -> Vec<StoredRange> {
        self.ram
            .as_ref()
            .map_or_else(Vec::new, OutgoingRam::requested)
    }

    /// Call it off.
    ///
    /// # Errors
    /// Too late: the destination may have the disks.
    pub fn cancel(&self) -> Result<(), RequestError> {
        if self.published.get().state.is_over() {
            return Ok(());
        }
        if !self.gate.cancel() {
            return Err(RequestError::TooLate);
        }
        self.published.update(|status| {
            if !status.state.is_over() {
                status.state = State::Cancelling;
            }
        });
        self.line.break_off();
        let _ = self.events.send(Event::Wake);
        Ok(())
    }

    /// Let the guest go on at the destination as soon as its disks are there, and its memory follow.
    ///
    /// # Errors
    /// It cannot become a postcopy, or is over.
    pub fn start_postcopy(&self) -> Result<(), RequestError> {
        if !self.can_postcopy {
            return Err(RequestError::NoPostcopy);
        }
        if self.published.get().state.is_over() {
            return Err(RequestError::Over);
        }
        self.events
            .send(Event::StartPostcopy)
            .map_err(|_| RequestError::Over)
    }

    /// Break a postcopy's connection off, so that it can go on with another one.
    ///
    /// # Errors
    /// It is not in a postcopy.
    pub fn pause(&self) -> Result<(), RequestError> {
        match self.published.get().state {
            State::PostcopyActive | State::PostcopyRecover => {
                self.line.break_off();
                let _ = self.events.send(Event::Wake);
                Ok(())
            }
            _ => Err(RequestError::NotInPostcopy),
        }
    }

    /// Go on with an interrupted postcopy. `stop` gives the new channel up.
    ///
    /// # Errors
    /// It was not interrupted.
    pub fn resume(&self, target: Target, stop: Stop) -> Result<(), RequestError> {
        let mut was_paused = false;
        self.published.update(|status| {
            was_paused = status.state == State::PostcopyPaused;
            if was_paused {
                status.state = State::PostcopyRecover;
            }
        });
        if !was_paused {
            return Err(RequestError::NotInterrupted);
        }
        self.events.send(Event::Resume(target, stop)).map_err(|_| {
            self.published
                .update(|status| status.state = State::PostcopyPaused);
            RequestError::Over
        })
    }

    /// Change parameters.
    pub fn set(&self, parameters: Parameters) {
        // At once: the engine's thread may be in the middle of a block under the old limit.
        self.throttle.set(parameters.max_bandwidth);
        let _ = self.events.send(Event::Set(parameters));
    }

    /// Go on from `pre-switchover`.
    ///
    /// # Errors
    /// It is not there.
    pub fn go_on(&self) -> Result<(), RequestError> {
        if self.published.get().state != State::PreSwitchover {
            return Err(RequestError::NotPaused);
        }
        self.events
            .send(Event::Continue)
            .map_err(|_| RequestError::Over)
    }

    /// Decide where the disks live. A postcopy that is paused ends when they are given up.
    ///
    /// # Errors
    /// Nothing to decide, or another connection is being tried.
    pub fn decide(&self, decision: Decision) -> Result<(), RequestError> {
        let status = self.published.get();
        let ends = decision == Decision::GiveUp && status.state == State::PostcopyPaused;
        if status.state == State::PostcopyRecover || !(status.undecided || ends) {
            return Err(RequestError::NotUndecided);
        }
        self.events
            .send(Event::Decide(decision))
            .map_err(|_| RequestError::Over)
    }

    /// End: cancel if that is possible, else leave the disks held. Waits for the thread. What a
    /// postcopy has not sent is lost with it.
    pub fn shut_down(&mut self) {
        let _ = self.cancel();
        self.line.end();
        let _ = self.events.send(Event::Wake);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for RunningSource {
    fn drop(&mut self) {
        self.shut_down();
    }
}

impl Target {
    pub(crate) fn peer(&self) -> String {
        match self {
            Self::Uri(uri) => uri.to_string(),
            Self::Channel(channel) => channel.peer().to_owned(),
        }
    }
}
