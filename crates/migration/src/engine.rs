//! The thread that carries a migration out of here: converge, stop the guests, hand over.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use vmferry_block_migration::{
    SECTION_NAME, SECTION_VERSION, Source, SourceOptions, SourceStats, ThreadReads,
};
use vmferry_channel::{ChannelError, Stop, Writer, open_outgoing};
use vmferry_disk::{Hold, Lease};
use vmferry_savevm::{
    Completing, Describe, DirtyTotal, Ended, GuestStopped, Iterating, Opening, Progress, Ready,
    Registration, Registry, SaveError, TotalPending, begin, cleanup,
};
use vmferry_stream::Command as StreamCommand;

use crate::convergence::{Forecast, stall_message};
use crate::hand_over::{CancelGate, CommitError, Committed, Decision, SourceDisk};
use crate::parameters::{Capabilities, Parameters};
use crate::record::RecordFile;
use crate::return_path;
use crate::sink::{ChannelSink, Throttle};
use crate::source::{BARRIER_PATIENCE, DRAIN_PATIENCE, Event, SourceFailure, SourceJob, Target};
use crate::status::{Published, State};
use crate::watch::Watch;

/// How long to wait for a connection.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long the destination may take to say what became of it. Afterwards it is undecided.
const SHUT_PATIENCE: Duration = Duration::from_secs(10);
/// How long to wait for what the destination has to say when the channel breaks.
const LAST_WORD_PATIENCE: Duration = Duration::from_secs(1);
/// How long a command at the other end of a one-way channel may take to end.
const COMMAND_PATIENCE: Duration = Duration::from_secs(60);
/// Commands and answers are looked for at least this often.
pub(crate) const TICK: Duration = Duration::from_millis(100);

/// Asks the destination whether it is ours: we answer this PING with two PONGs, the second with
/// [`HELLO_ANSWER`]. A QEMU only echoes it.
pub(crate) const HELLO: u32 = 0x7646_7201;
/// See [`HELLO`]. Whoever says it has synced the disks before it says SHUT 0.
pub(crate) const HELLO_ANSWER: u32 = 0x7646_7202;

/// Says to one of ours, which would count what it gets, that only top layers are coming. A QEMU,
/// which does not count, only echoes it.
pub(crate) const INCREMENTAL: u32 = 0x7646_7203;

/// The disks, as they are while nothing is decided.
pub(crate) type Leases = Vec<(Lease, Option<RecordFile>)>;

pub(crate) fn take_leases(disks: &[SourceDisk]) -> Result<Leases, SourceFailure> {
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
pub(crate) enum Outcome {
    Gone {
        durable: bool,
    },
    Here {
        reason: String,
    },
    /// The daemon ended before a decision; the disks stay held.
    Undecided,
}

/// The migration's thread: owns the save machine.
pub(crate) struct Engine {
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
    pub(crate) fn new(
        job: &SourceJob,
        published: Published,
        events: Sender<Event>,
        inbox: Receiver<Event>,
    ) -> Self {
        Self {
            peer: job.target.peer(),
            published,
            inbox,
            events,
            gate: Arc::default(),
            stop: job.stop.clone(),
            parameters: job.parameters,
            capabilities: job.capabilities,
            throttle: Throttle::new(job.parameters.max_bandwidth),
            shut: None,
            return_closed: None,
            last_pong: None,
            peer_is_ours: false,
            go_on: false,
        }
    }

    pub(crate) fn gate(&self) -> Arc<CancelGate> {
        Arc::clone(&self.gate)
    }

    pub(crate) fn throttle(&self) -> Throttle {
        self.throttle.clone()
    }

    pub(crate) fn run(&mut self, leases: Leases, target: Target) -> Result<Outcome, SourceFailure> {
        let (mut sink, two_way) = self.open(target)?;
        let claimers = leases.iter().map(|(lease, _)| lease.claimer()).collect();
        let options = SourceOptions {
            zero_blocks: self.capabilities.zero_blocks,
            incremental: self.capabilities.incremental,
            ..SourceOptions::default()
        };
        let source = Source::new(claimers, ThreadReads::new(), options)?;
        let stats = source.stats();
        let mut registry = Registry::new();
        registry
            .register(Registration::saving(
                SECTION_NAME,
                SECTION_VERSION,
                Box::new(source),
            ))
            .map_err(|error| SourceFailure::ReturnClosed(error.to_string()))?;
        let at_barrier = self.send_all(&leases, &mut registry, &stats, &mut sink, two_way);
        let AtBarrier { ended, held_at } = match at_barrier {
            Ok(at_barrier) => at_barrier,
            Err(error) => {
                // Guests go on at once: ending the handler waits for reads, which may be stuck.
                drop(leases);
                cleanup(&mut registry);
                return Err(self.last_word(error));
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
        registry: &mut Registry<'_>,
        stats: &SourceStats,
        sink: &mut ChannelSink,
        two_way: bool,
    ) -> Result<AtBarrier, SourceFailure> {
        let mut commands = match two_way {
            true => vec![StreamCommand::OpenReturnPath, StreamCommand::Ping(HELLO)],
            false => Vec::new(),
        };
        if two_way && self.capabilities.incremental {
            commands.push(StreamCommand::Ping(INCREMENTAL));
        }
        let iterating = begin(
            &Opening {
                describe: Describe::Empty,
                commands,
                ..Opening::default()
            },
            registry,
            sink,
        )?;
        sink.flush()?;
        self.enter(State::Active);
        self.published.update(|status| {
            status.setup_time = status.begun.map(|begun| begun.elapsed());
            status.pass = 1;
        });
        let completing = self.converge(iterating, leases, registry, stats, sink, two_way)?;
        let stopped = self.stop_guests(leases)?;
        let held_at = Instant::now();
        let deadline = held_at + BARRIER_PATIENCE;
        sink.set_deadline(deadline);
        self.throttle.lift();
        let barrier = two_way.then_some(BARRIER);
        self.last_pong = None;
        let ended = completing.end_live(&stopped, registry, barrier, sink)?;
        sink.flush()?;
        self.publish_figures(stats, sink.taken_bytes());
        if two_way {
            while self.last_pong.is_none_or(|(value, _)| value != BARRIER) {
                self.listen(deadline.min(Instant::now() + TICK))?;
                if Instant::now() >= deadline {
                    return Err(SourceFailure::Barrier);
                }
            }
        }
        let ended = ended.save_devices(&stopped, registry, sink)?;
        Ok(AtBarrier { ended, held_at })
    }

    /// Iterate until what is left fits into the downtime limit.
    fn converge(
        &mut self,
        mut iterating: Iterating,
        leases: &Leases,
        registry: &mut Registry<'_>,
        stats: &SourceStats,
        sink: &mut ChannelSink,
        two_way: bool,
    ) -> Result<Completing, SourceFailure> {
        let mut watch = Watch::new(leases);
        loop {
            self.listen(Instant::now())?;
            let (begun, before) = (Instant::now(), sink.taken_bytes());
            let progress = iterating.iterate(registry, sink)?;
            sink.flush()?;
            watch.iterated(leases, sink.taken_bytes() - before, begun.elapsed());
            watch.pong(self.last_pong);
            self.publish_figures(stats, sink.taken_bytes());
            if let TotalPending::Dirty(dirty) = iterating.pending(registry) {
                if two_way && watch.wants_ping(progress) {
                    let value = watch.next_ping(progress, &dirty);
                    iterating.command(StreamCommand::Ping(value), sink)?;
                    sink.flush()?;
                }
                let forecast = watch.forecast(&dirty, two_way);
                self.publish_forecast(&mut watch, stats, &dirty, forecast);
                let limit = self.parameters.downtime_limit;
                let fits = |dirty: &DirtyTotal| {
                    forecast.is_some_and(|forecast| forecast.total() <= limit)
                        || watch.is_at_best(progress, dirty)
                };
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

    /// Tell the next state, unless a cancel is under way.
    fn enter(&self, state: State) {
        self.published.update(|status| {
            if status.state != State::Cancelling {
                status.state = state;
            }
        });
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
        self.enter(state);
        while pausing && !self.go_on {
            self.listen(Instant::now() + TICK)?;
        }
        self.enter(State::Device);
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

    /// A destination that gives up closes the channel, too: what it said tells more than that.
    fn last_word(&mut self, error: SourceFailure) -> SourceFailure {
        let deadline = Instant::now() + LAST_WORD_PATIENCE;
        let is_broken = matches!(error, SourceFailure::Save(_) | SourceFailure::Channel(_));
        while is_broken && self.shut.is_none() && self.return_closed.is_none() {
            if Instant::now() >= deadline || self.check_cancelled().is_err() {
                break;
            }
            self.hear(deadline.min(Instant::now() + TICK));
        }
        match self.shut {
            Some(status) if is_broken => SourceFailure::Refused { status },
            _ => error,
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
            status.bandwidth = watch.bandwidth();
            status.dirty_rate = watch.dirty_rate;
            status.expected_downtime = forecast.map(|forecast| forecast.total());
            status.stall = match forecast {
                Some(forecast) if stalled => {
                    let total = forecast.total();
                    Some(stall_message(
                        watch.dirty_rate,
                        watch.bandwidth(),
                        total,
                        limit,
                    ))
                }
                _ => None,
            };
        });
    }

    pub(crate) fn publish_outcome(&self, outcome: Result<Outcome, SourceFailure>) {
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
