//! A migration out of here.
//!
//! ```text
//!  setup ─▶ active ──────────▶ (pre-switchover) ─▶ device ──────────────▶ completed
//!           bulk, dirty passes  writes held         last chunks, PING …
//!                                                   PONG │ EOF │ SHUT
//!           └──────── failure or cancel: holds lifted ───┘     └─ undecided: held
//! ```
//!
//! One thread owns the save machine; others post commands and read the published status. A second
//! thread reads the return path.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_block_migration::{
    SECTION_NAME, SECTION_VERSION, Source, SourceError, SourceOptions, SourceStats, ThreadReads,
};
use vmferry_channel::{Channel, ChannelError, Stop, Uri, Writer, open_outgoing};
use vmferry_disk::{Hold, InUse, Lease};
use vmferry_savevm::{
    Completing, DirtyTotal, Ended, GuestStopped, Iterating, Opening, Priority, Progress, Ready,
    SaveError, SaveRegistry, TotalPending, begin, cleanup,
};
use vmferry_stream::{Command as StreamCommand, InstanceId, Name};

use crate::convergence::{Forecast, Meter, StallDetector, stall_message};
use crate::hand_over::{CancelGate, CommitError, Committed, Decision, SourceDisk};
use crate::parameters::{Capabilities, Parameters};
use crate::record::{RecordError, RecordFile};
use crate::return_path;
use crate::sink::{ChannelSink, Throttle};
use crate::status::{Published, State};

/// How long to wait for a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long guests' writes may take to end once no new ones are let in.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);
/// How long the destination may take to have everything written and synced, with guests held.
const BARRIER_PATIENCE: Duration = Duration::from_secs(60);
/// How long the destination may take to say what became of it. Afterwards it is undecided.
const SHUT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a command at the other end of a one-way channel may take to end.
const COMMAND_PATIENCE: Duration = Duration::from_secs(60);
/// Commands and answers are looked for at least this often.
const TICK: Duration = Duration::from_millis(100);

/// Asks the destination whether it is ours: we answer this PING with two PONGs, the second with
/// [`HELLO_ANSWER`]. A QEMU only echoes it.
pub(crate) const HELLO: u32 = 0x7646_7201;
/// See [`HELLO`]. Whoever says it has synced the disks before it says SHUT 0.
pub(crate) const HELLO_ANSWER: u32 = 0x7646_7202;

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
    /// Triggered when the channel is to be given up at once; also used to open [`Target::Channel`].
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
    /// The channel cannot carry an answer.
    #[error(
        "{peer}: the channel is one-way, so nobody can tell whether the disks arrive (one-way must be asked for)"
    )]
    OneWay {
        /// The channel.
        peer: String,
    },
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
    #[error("the destination failed (SHUT {status})")]
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
    Set(Parameters),
    Continue,
    Decide(Decision),
    /// A cancel or the end of the daemon: look at the gate and the stop.
    Wake,
}

/// A migration that runs, or has run.
#[derive(Debug)]
pub struct RunningSource {
    published: Published,
    events: Sender<Event>,
    gate: Arc<CancelGate>,
    throttle: Throttle,
    stop: Stop,
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
        let leases = take_leases(&job.disks)?;
        let (events, inbox) = channel();
        let gate = Arc::new(CancelGate::default());
        let stop = job.stop.clone();
        let throttle = Throttle::new(job.parameters.max_bandwidth);
        let mut engine = Engine {
            peer: job.target.peer(),
            published: published.clone(),
            inbox,
            events: events.clone(),
            gate: Arc::clone(&gate),
            stop: stop.clone(),
            parameters: job.parameters,
            capabilities: job.capabilities,
            throttle: throttle.clone(),
            shut: None,
            return_closed: None,
            last_pong: None,
            peer_is_ours: false,
            go_on: false,
        };
        published.update(|status| {
            status.state = State::Setup;
            status.peer = engine.peer.clone();
            status.begun = Some(Instant::now());
            status.total_bytes = leases.iter().map(|(l, _)| l.node().limits().length).sum();
            status.remaining_bytes = status.total_bytes;
        });
        let target = job.target;
        let thread = std::thread::Builder::new()
            .name("migrate-source".to_owned())
            .spawn(move || {
                let outcome = catch_unwind(AssertUnwindSafe(|| engine.run(leases, target)));
                engine.publish_outcome(outcome.unwrap_or(Err(SourceFailure::Panic)));
            })
            .map_err(SourceFailure::Thread)?;
        Ok(Self {
            published,
            events,
            gate,
            throttle,
            stop,
            thread: Some(thread),
        })
    }

    /// What is known.
    #[must_use]
    pub fn published(&self) -> &Published {
        &self.published
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
        self.stop.trigger();
        let _ = self.events.send(Event::Wake);
        Ok(())
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

    /// Decide where the disks live.
    ///
    /// # Errors
    /// Nothing to decide.
    pub fn decide(&self, decision: Decision) -> Result<(), RequestError> {
        if !self.published.get().undecided {
            return Err(RequestError::NotUndecided);
        }
        self.events
            .send(Event::Decide(decision))
            .map_err(|_| RequestError::Over)
    }

    /// End: cancel if that is possible, else leave the disks held. Waits for the thread.
    pub fn shut_down(&mut self) {
        let _ = self.cancel();
        self.stop.trigger();
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
    fn peer(&self) -> String {
        match self {
            Self::Uri(uri) => uri.to_string(),
            Self::Channel(channel) => channel.peer().to_owned(),
        }
    }
}

type Leases = Vec<(Lease, Option<RecordFile>)>;

fn take_leases(disks: &[SourceDisk]) -> Result<Leases, SourceFailure> {
    let take = |disk: &SourceDisk| match disk.node.lease("a migration") {
        Ok(lease) => Ok((lease, disk.record.clone())),
        Err(source) => Err(SourceFailure::InUse {
            disk: disk.node.name().to_owned(),
            source,
        }),
    };
    disks.iter().map(take).collect()
}

/// How it ended, with the disks decided.
enum Outcome {
    Gone {
        durable: bool,
    },
    Here {
        reason: String,
    },
    /// The daemon ended before a decision; the disks stay held.
    Undecided,
}

struct Engine {
    peer: String,
    published: Published,
    inbox: Receiver<Event>,
    events: Sender<Event>,
    gate: Arc<CancelGate>,
    stop: Stop,
    parameters: Parameters,
    capabilities: Capabilities,
    throttle: Throttle,
    shut: Option<u32>,
    return_closed: Option<String>,
    last_pong: Option<(u32, Instant)>,
    peer_is_ours: bool,
    go_on: bool,
}

/// Everything that has been sent up to EOF, ready for the point of no return.
struct AtBarrier {
    ended: Ended,
    held_at: Instant,
}

impl Engine {
    fn run(&mut self, leases: Leases, target: Target) -> Result<Outcome, SourceFailure> {
        let (mut sink, two_way) = self.open(target)?;
        let claimers = leases.iter().map(|(lease, _)| lease.claimer()).collect();
        let options = SourceOptions {
            zero_blocks: self.capabilities.zero_blocks,
            ..SourceOptions::default()
        };
        let source = Source::new(claimers, ThreadReads::new(), options)?;
        let stats = source.stats();
        let mut registry = SaveRegistry::new();
        let name = Name::new(SECTION_NAME).unwrap_or_default();
        registry
            .register(
                name,
                Some(InstanceId(0)),
                SECTION_VERSION,
                SECTION_VERSION,
                Priority(0),
                Box::new(source),
            )
            .map_err(|error| SourceFailure::ReturnClosed(error.to_string()))?;
        let at_barrier = self.send_all(&leases, &mut registry, &stats, &mut sink, two_way);
        let AtBarrier { ended, held_at } = match at_barrier {
            Ok(at_barrier) => at_barrier,
            Err(error) => {
                // Guests go on at once: ending the handler waits for reads, which may be stuck.
                drop(leases);
                cleanup(&mut registry);
                return Err(error);
            }
        };
        cleanup(&mut registry);
        self.check_cancelled()?;
        let committed = Committed::commit(leases, &self.peer, &self.gate).map_err(|e| match e {
            CommitError::Record(error) => SourceFailure::Record(error),
            CommitError::Cancelled => SourceFailure::Cancelled,
        })?;
        self.hand_over(committed, ended, sink, two_way, held_at)
    }

    fn open(&mut self, target: Target) -> Result<(ChannelSink, bool), SourceFailure> {
        let channel = match target {
            Target::Uri(uri) => open_outgoing(&uri, &self.stop, CONNECT_PATIENCE)?,
            Target::Channel(channel) => channel,
        };
        let (reader, writer) = channel.split();
        let Some(writer) = writer else {
            return Err(ChannelError::Unsuitable {
                peer: self.peer.clone(),
                reason: "it cannot be written",
            }
            .into());
        };
        let two_way = match reader {
            Some(reader) if self.capabilities.return_path => {
                return_path::listen(reader, self.events.clone()).map_err(SourceFailure::Thread)?;
                true
            }
            None if self.capabilities.return_path => {
                return Err(SourceFailure::OneWay {
                    peer: self.peer.clone(),
                });
            }
            _ => false,
        };
        Ok((
            ChannelSink::new(writer, self.throttle.limit().clone()),
            two_way,
        ))
    }

    /// Everything up to, and without, EOF. A failure leaves the leases to be dropped.
    fn send_all(
        &mut self,
        leases: &Leases,
        registry: &mut SaveRegistry<'_>,
        stats: &SourceStats,
        sink: &mut ChannelSink,
        two_way: bool,
    ) -> Result<AtBarrier, SourceFailure> {
        let commands = match two_way {
            true => vec![StreamCommand::OpenReturnPath, StreamCommand::Ping(HELLO)],
            false => Vec::new(),
        };
        let iterating = begin(
            &Opening {
                machine: Name::default(),
                commands,
            },
            registry,
            sink,
        )?;
        sink.flush()?;
        self.published.update(|status| {
            status.state = State::Active;
            status.setup_time = status.begun.map(|begun| begun.elapsed());
            status.pass = 1;
        });
        let completing = self.converge(iterating, leases, registry, stats, sink, two_way)?;
        let held_at = Instant::now();
        let stopped = self.stop_guests(leases)?;
        self.throttle.lift();
        let barrier = two_way.then_some(BARRIER);
        self.last_pong = None;
        let ended = completing.end_live(&stopped, registry, barrier, sink)?;
        sink.flush()?;
        self.publish_figures(stats, sink.taken_bytes());
        if two_way {
            let deadline = Instant::now() + BARRIER_PATIENCE;
            while self.last_pong.is_none_or(|(value, _)| value != BARRIER) {
                self.listen(deadline.min(Instant::now() + TICK))?;
                if Instant::now() >= deadline {
                    return Err(SourceFailure::Barrier);
                }
            }
        }
        Ok(AtBarrier { ended, held_at })
    }

    /// Iterate until what is left fits into the downtime limit.
    fn converge(
        &mut self,
        mut iterating: Iterating,
        leases: &Leases,
        registry: &mut SaveRegistry<'_>,
        stats: &SourceStats,
        sink: &mut ChannelSink,
        two_way: bool,
    ) -> Result<Completing, SourceFailure> {
        let mut watch = Watch::new(leases, sink.taken_bytes());
        loop {
            self.listen(Instant::now())?;
            let progress = iterating.iterate(registry, sink)?;
            sink.flush()?;
            watch.pong(self.last_pong);
            watch.measure(leases, sink.taken_bytes());
            self.publish_figures(stats, sink.taken_bytes());
            if let TotalPending::Dirty(dirty) = iterating.pending(registry) {
                if two_way && watch.wants_ping(progress) {
                    let value = watch.next_ping();
                    iterating.command(StreamCommand::Ping(value), sink)?;
                    sink.flush()?;
                }
                let forecast = watch.forecast(&dirty, two_way);
                self.publish_forecast(&mut watch, stats, &dirty, forecast);
                let limit = self.parameters.downtime_limit;
                let fits = |_: &DirtyTotal| forecast.is_some_and(|f| f.total() <= limit);
                match iterating.try_complete(registry, fits) {
                    Ready::Go(completing) => return Ok(completing),
                    Ready::NotYet(same, _) => iterating = same,
                }
            }
            self.rest(progress, sink)?;
        }
    }

    /// Nothing to send now: wait for what may change that.
    fn rest(&mut self, progress: Progress, sink: &ChannelSink) -> Result<(), SourceFailure> {
        use vmferry_savevm::Sink;
        if sink.allowance() == 0 {
            return self.listen(Instant::now() + sink.until_next_slice());
        }
        match progress {
            Progress::Finished => self.listen(Instant::now() + TICK / 10),
            Progress::Waiting | Progress::Unfinished => Ok(()),
        }
    }

    /// Hold the guests' writes, wait for those in flight, and for leave to go on.
    fn stop_guests(&mut self, leases: &Leases) -> Result<GuestStopped, SourceFailure> {
        let pausing = self.capabilities.pause_before_switchover;
        let state = if pausing {
            State::PreSwitchover
        } else {
            State::Device
        };
        for (lease, _) in leases {
            lease.hold(Hold::Writes);
        }
        let deadline = Instant::now() + DRAIN_PATIENCE;
        for (lease, _) in leases {
            while !lease.drain(TICK) {
                self.listen(Instant::now())?;
                if Instant::now() >= deadline {
                    let disk = lease.node().name().to_owned();
                    return Err(SourceFailure::Drain { disk });
                }
            }
        }
        self.published.update(|status| status.state = state);
        while pausing && !self.go_on {
            self.listen(Instant::now() + TICK)?;
        }
        self.published.update(|status| status.state = State::Device);
        Ok(GuestStopped::assert_drained())
    }

    /// The point of no return, and what comes of it.
    fn hand_over(
        &mut self,
        committed: Committed,
        ended: Ended,
        mut sink: ChannelSink,
        two_way: bool,
        held_at: Instant,
    ) -> Result<Outcome, SourceFailure> {
        let before = sink.taken_bytes();
        let sent = ended.finish(&mut sink).and_then(|()| {
            sink.flush()
                .map_err(|error| SaveError::Channel(error.into()))
        });
        if let Err(error) = sent {
            if sink.taken_bytes() == before {
                committed.decide(Decision::Serve);
                return Err(error.into());
            }
            return Ok(self.undecided(committed, &error.to_string(), held_at));
        }
        if !two_way {
            return Ok(match end_one_way(sink.into_writer()) {
                Ok(()) => self.gone(committed, held_at),
                Err(error) => self.undecided(committed, &error.to_string(), held_at),
            });
        }
        let deadline = Instant::now() + SHUT_PATIENCE;
        while self.shut.is_none() && self.return_closed.is_none() && Instant::now() < deadline {
            self.hear(deadline.min(Instant::now() + TICK));
            if self.stop.is_triggered() {
                break;
            }
        }
        if let Some(status) = self.shut {
            return Ok(self.answered(committed, status, held_at));
        }
        let reason = self.return_closed.clone().unwrap_or_else(|| {
            format!(
                "the destination said nothing for {} s",
                SHUT_PATIENCE.as_secs()
            )
        });
        Ok(self.undecided(committed, &reason, held_at))
    }

    fn answered(&mut self, committed: Committed, status: u32, held_at: Instant) -> Outcome {
        match status {
            0 => self.gone(committed, held_at),
            _ => {
                committed.decide(Decision::Serve);
                Outcome::Here {
                    reason: SourceFailure::Refused { status }.to_string(),
                }
            }
        }
    }

    fn gone(&self, committed: Committed, held_at: Instant) -> Outcome {
        self.published
            .update(|status| status.downtime = Some(held_at.elapsed()));
        committed.decide(Decision::GiveUp);
        Outcome::Gone {
            durable: self.peer_is_ours,
        }
    }

    /// Hold the disks until somebody decides, or a late answer does.
    fn undecided(&mut self, committed: Committed, reason: &str, held_at: Instant) -> Outcome {
        tracing::error!(peer = %self.peer, reason, "undecided: the destination may or may not have taken over; disks are held");
        self.published.update(|status| {
            status.undecided = true;
            status.error = Some(format!(
                "undecided, disks are held: {reason}; find out whether the destination serves \
                 them, then `resolve give-up` if it does, `resolve serve` if it does not"
            ));
        });
        loop {
            match self.inbox.recv_timeout(TICK) {
                Ok(Event::Shut(status)) => return self.answered(committed, status, held_at),
                Ok(Event::Decide(Decision::GiveUp)) => {
                    committed.decide(Decision::GiveUp);
                    return Outcome::Gone { durable: false };
                }
                Ok(Event::Decide(Decision::Serve)) => {
                    committed.decide(Decision::Serve);
                    return Outcome::Here {
                        reason: "resolved: the disks are served here".into(),
                    };
                }
                Ok(_) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Outcome::Undecided,
            }
            // A cancel is refused by now, so this is the end of the daemon.
            if self.stop.is_triggered() {
                return Outcome::Undecided;
            }
        }
    }

    /// Take events until `deadline`; at least those that are there.
    ///
    /// # Errors
    /// Cancelled, or the destination gave up.
    fn listen(&mut self, deadline: Instant) -> Result<(), SourceFailure> {
        self.hear(deadline);
        self.check_cancelled()?;
        match (self.shut, &self.return_closed) {
            (Some(status), _) => Err(SourceFailure::Refused { status }),
            (None, Some(reason)) => Err(SourceFailure::ReturnClosed(reason.clone())),
            (None, None) => Ok(()),
        }
    }

    fn check_cancelled(&self) -> Result<(), SourceFailure> {
        if self.gate.is_cancelled() || self.stop.is_triggered() {
            return Err(SourceFailure::Cancelled);
        }
        Ok(())
    }

    /// Wait for one event until `deadline`, then take all that are there.
    fn hear(&mut self, deadline: Instant) {
        let patience = deadline.saturating_duration_since(Instant::now());
        let mut event = self.inbox.recv_timeout(patience).ok();
        while let Some(heard) = event {
            match heard {
                Event::Pong {
                    value: HELLO_ANSWER,
                    ..
                } => self.peer_is_ours = true,
                Event::Pong { value, at } => self.last_pong = Some((value, at)),
                Event::Shut(status) => self.shut = Some(status),
                Event::ReturnClosed(reason) => self.return_closed = Some(reason),
                Event::Set(parameters) => self.parameters = parameters,
                Event::Continue => self.go_on = true,
                Event::Decide(_) | Event::Wake => {}
            }
            event = self.inbox.try_recv().ok();
        }
    }

    fn publish_figures(&self, stats: &SourceStats, wire_bytes: u64) {
        self.published.update(|status| {
            status.bulk_bytes = stats.bulk_bytes.load(Ordering::Relaxed);
            status.bulk_over = stats.bulk_over.load(Ordering::Relaxed);
            status.moved_bytes = stats.sent_bytes.load(Ordering::Relaxed);
            status.zero_bytes = stats.zero_bytes.load(Ordering::Relaxed);
            status.wire_bytes = wire_bytes;
            status.remaining_bytes = status.total_bytes.saturating_sub(status.bulk_bytes);
            if status.bulk_over {
                status.pass = 2 + stats.passes.load(Ordering::Relaxed);
            }
        });
    }

    fn publish_forecast(
        &self,
        watch: &mut Watch,
        stats: &SourceStats,
        dirty: &DirtyTotal,
        forecast: Option<Forecast>,
    ) {
        let stalled = watch.pass_ended(stats.passes.load(Ordering::Relaxed), dirty.bytes);
        let limit = self.parameters.downtime_limit;
        self.published.update(|status| {
            status.remaining_bytes = dirty.bytes;
            status.bandwidth = watch.bandwidth;
            status.dirty_rate = watch.dirty_rate;
            status.expected_downtime = forecast.map(|forecast| forecast.total());
            status.stall = match forecast {
                Some(forecast) if stalled => {
                    let total = forecast.total();
                    Some(stall_message(
                        watch.dirty_rate,
                        watch.bandwidth,
                        total,
                        limit,
                    ))
                }
                _ => None,
            };
        });
    }

    fn publish_outcome(&self, outcome: Result<Outcome, SourceFailure>) {
        // Lets the return path's thread end.
        self.stop.trigger();
        let committed = self.gate.is_committed();
        self.published.update(|status| {
            status.total_time = status.begun.map(|begun| begun.elapsed());
            let (state, error) = match outcome {
                Ok(Outcome::Gone { durable }) => {
                    status.durable = Some(durable);
                    status.undecided = false;
                    status.remaining_bytes = 0;
                    (State::Completed, None)
                }
                Ok(Outcome::Here { reason }) => {
                    status.undecided = false;
                    (State::Failed, Some(reason))
                }
                Ok(Outcome::Undecided) => (status.state, status.error.take()),
                Err(SourceFailure::Panic) if committed => {
                    status.undecided = true;
                    (status.state, Some(SourceFailure::Panic.to_string()))
                }
                Err(_) if self.gate.is_cancelled() => (State::Cancelled, None),
                Err(error) => (State::Failed, Some(error.to_string())),
            };
            status.state = state;
            status.error = error;
        });
    }
}

/// The PING behind the last chunk. Those of passes have lower values.
const BARRIER: u32 = u32::MAX;

/// Nobody answers: the end of the writing is all there is.
fn end_one_way(mut writer: Writer) -> Result<(), ChannelError> {
    writer.sync()?;
    writer.finish(Some(Instant::now() + COMMAND_PATIENCE))
}

/// Measures what a forecast needs.
struct Watch {
    wire: Meter,
    dirtied: Meter,
    bandwidth: u64,
    dirty_rate: u64,
    ping: Option<(u32, Instant)>,
    pings: u32,
    /// From a PING behind a pass to its PONG.
    sync: Option<Duration>,
    answered_at: Option<Instant>,
    stall: StallDetector,
    passes: u64,
}

impl Watch {
    fn new(leases: &Leases, wire_bytes: u64) -> Self {
        let now = Instant::now();
        Self {
            wire: Meter::new(now, wire_bytes),
            dirtied: Meter::new(now, dirtied_bytes(leases)),
            bandwidth: 0,
            dirty_rate: 0,
            ping: None,
            pings: 0,
            sync: None,
            answered_at: None,
            stall: StallDetector::default(),
            passes: 0,
        }
    }

    fn measure(&mut self, leases: &Leases, wire_bytes: u64) {
        let now = Instant::now();
        self.wire.update(now, wire_bytes);
        let dirtied = dirtied_bytes(leases);
        self.dirtied.update(now, dirtied);
        self.dirty_rate = self.dirtied.bytes_per_second(now, dirtied);
        // The speed of an idle channel says nothing of what it could do: the best is remembered.
        self.bandwidth = self
            .bandwidth
            .max(self.wire.bytes_per_second(now, wire_bytes));
    }

    fn pong(&mut self, pong: Option<(u32, Instant)>) {
        if let (Some((value, at)), Some((asked, since))) = (pong, self.ping)
            && value == asked
        {
            self.sync = Some(at.saturating_duration_since(since));
            self.answered_at = Some(at);
            self.ping = None;
        }
    }

    /// One is sent when the bulk phase has ended, and then whenever the last one was answered and
    /// something was sent since. Where nothing is, it is still asked now and then: the sync that was
    /// measured may have been that of the whole bulk phase, which is over.
    fn wants_ping(&self, progress: Progress) -> bool {
        let is_stale = || self.answered_at.is_none_or(|at| at.elapsed() >= TICK);
        self.ping.is_none() && (progress != Progress::Finished || is_stale())
    }

    fn next_ping(&mut self) -> u32 {
        self.pings = self.pings % 0x1000_0000 + 1;
        self.ping = Some((self.pings, Instant::now()));
        self.pings
    }

    fn forecast(&self, dirty: &DirtyTotal, two_way: bool) -> Option<Forecast> {
        let sync = if two_way { self.sync? } else { Duration::ZERO };
        Some(Forecast::new(
            dirty.bytes,
            dirty.read_time,
            self.bandwidth,
            sync,
        ))
    }

    fn pass_ended(&mut self, passes: u64, dirty_bytes: u64) -> bool {
        if passes != self.passes {
            self.passes = passes;
            self.stall.pass_ended(dirty_bytes);
        }
        self.stall.is_stalled()
    }
}

fn dirtied_bytes(leases: &Leases) -> u64 {
    let marked = |lease: &Lease| lease.node().dirty().marked();
    leases.iter().map(|(lease, _)| marked(lease)).sum::<u64>() * vmferry_disk::CHUNK_BYTES
}
