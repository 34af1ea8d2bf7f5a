//! The thread that carries a migration out of here: converge, stop the guests, hand over.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_channel::{ChannelError, Writer, open_outgoing};
use vmferry_disk::{Hold, Lease};
use vmferry_ram::OutgoingRam;
use vmferry_savevm::{
    Completing, DirtyTotal, Ended, GuestStopped, Iterating, Packed, Progress, Ready, SaveError,
    Switching, TotalPending, begin,
};
use vmferry_stream::{Command as StreamCommand, Name};

use crate::convergence::{Forecast, stall_message};
use crate::guest::Vcpus;
use crate::hand_over::{CancelGate, CommitError, Committed, Decision, SourceDisk};
use crate::line::Line;
use crate::moving::{Figures, Moving, Sections};
use crate::parameters::{Capabilities, Parameters};
use crate::record::RecordFile;
use crate::return_path::{self, Bitmaps, Heralds};
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
    /// All ends before a decision; the disks stay held.
    Undecided,
}

/// The migration's thread: owns the save machine.
pub(crate) struct Engine {
    pub(crate) peer: String,
    pub(crate) published: Published,
    pub(crate) inbox: Receiver<Event>,
    events: Sender<Event>,
    /// Events of the return path that wait in the inbox.
    unheard: Arc<AtomicUsize>,
    gate: Arc<CancelGate>,
    pub(crate) line: Line,
    parameters: Parameters,
    capabilities: Capabilities,
    throttle: Throttle,
    pub(crate) heard: Heard,
    pub(crate) peer_is_ours: bool,
    listener: Option<JoinHandle<()>>,
    go_on: bool,
    start_postcopy: bool,
}

/// What came over the connection in use.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    pub(crate) shut: Option<u32>,
    pub(crate) closed: Option<String>,
    pub(crate) last_pong: Option<(u32, Instant)>,
    /// The PONG behind the devices of a postcopy.
    pub(crate) package_loaded: bool,
    pub(crate) bitmaps: Vec<(Name, Vec<u8>)>,
    pub(crate) resume_ack: Option<u32>,
}

/// Everything up to the point of no return was sent.
struct AtSwitch {
    sink: ChannelSink,
    two_way: bool,
    held_at: Instant,
    kind: Switch,
}

enum Switch {
    /// All but EOF.
    Precopy(Ended),
    /// All but the devices, which are saved, and what memory is left.
    Postcopy(Packed),
}

/// The rest is small enough.
enum Converged {
    Precopy(Completing),
    Postcopy(Switching),
}

impl Engine {
    pub(crate) fn new(
        job: &SourceJob,
        line: Line,
        published: Published,
        events: Sender<Event>,
        inbox: Receiver<Event>,
    ) -> Self {
        Self {
            peer: job.target.peer(),
            published,
            inbox,
            events,
            unheard: Arc::default(),
            gate: Arc::default(),
            line,
            parameters: job.parameters,
            capabilities: job.capabilities,
            throttle: Throttle::new(job.parameters.max_bandwidth),
            heard: Heard::default(),
            peer_is_ours: false,
            listener: None,
            go_on: false,
            start_postcopy: false,
        }
    }

    /// It is a postcopy as soon as it can be.
    pub(crate) fn start_postcopy(&mut self) {
        self.start_postcopy = true;
    }

    pub(crate) fn gate(&self) -> Arc<CancelGate> {
        Arc::clone(&self.gate)
    }

    pub(crate) fn throttle(&self) -> Throttle {
        self.throttle.clone()
    }

    pub(crate) fn run(
        &mut self,
        mut moving: Moving,
        target: Target,
    ) -> Result<Outcome, SourceFailure> {
        let at_switch = match self.send_all(&mut moving, target) {
            Ok(at_switch) => at_switch,
            Err(error) => {
                moving.stay();
                return Err(self.last_word(error));
            }
        };
        let AtSwitch {
            sink,
            two_way,
            held_at,
            kind,
        } = at_switch;
        let Moving {
            leases,
            vcpus,
            sections,
            ..
        } = moving;
        match kind {
            Switch::Precopy(ended) => {
                sections.end();
                let committed = self.commit(leases, vcpus)?;
                self.hand_over(committed, ended, sink, two_way, held_at)
            }
            Switch::Postcopy(packed) => match self.commit(leases, vcpus) {
                Ok(committed) => {
                    self.switch_to_postcopy(committed, packed, sections, sink, held_at)
                }
                Err(error) => {
                    sections.end();
                    Err(error)
                }
            },
        }
    }

    /// Up to here it can be cancelled. On failure everything stays.
    fn commit(&self, leases: Leases, vcpus: Vcpus) -> Result<Committed, SourceFailure> {
        self.check_cancelled()?;
        Committed::commit(leases, vcpus, &self.peer, &self.gate).map_err(|error| match error {
            CommitError::Record(error) => SourceFailure::Record(error),
            CommitError::Cancelled => SourceFailure::Cancelled,
        })
    }

    /// Open the channel, and listen to it.
    pub(crate) fn open(
        &mut self,
        target: Target,
        ram: Option<(OutgoingRam, Bitmaps)>,
    ) -> Result<(ChannelSink, bool), SourceFailure> {
        let stop = self.line.stop();
        let channel = match target {
            Target::Uri(uri) => open_outgoing(&uri, &stop, CONNECT_PATIENCE)?,
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
                let events = Heralds::new(self.events.clone(), Arc::clone(&self.unheard));
                let listener = return_path::listen(reader, ram, events);
                self.listener = Some(listener.map_err(SourceFailure::Thread)?);
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

    /// Give the connection up. Whatever came over it is in the inbox when this returns.
    pub(crate) fn hang_up(&mut self) {
        self.line.break_off();
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }

    /// Everything up to the point of no return.
    fn send_all(&mut self, moving: &mut Moving, target: Target) -> Result<AtSwitch, SourceFailure> {
        let ram = moving.sections.ram.clone();
        let (mut sink, two_way) = self.open(target, ram.map(|ram| (ram, Bitmaps::Refused)))?;
        let mut opening = moving.opening.clone();
        if two_way {
            opening.commands = vec![StreamCommand::OpenReturnPath, StreamCommand::Ping(HELLO)];
            if self.capabilities.incremental {
                opening.commands.push(StreamCommand::Ping(INCREMENTAL));
            }
            opening.commands.extend(moving.sections.advice());
        } else if moving.sections.can_postcopy {
            return Err(SourceFailure::OneWayPostcopy);
        }
        let iterating = begin(&opening, &mut moving.sections.registry, &mut sink)?;
        sink.flush()?;
        self.enter(State::Active);
        self.published.update(|status| {
            status.setup_time = status.begun.map(|begun| begun.elapsed());
            status.pass = 1;
        });
        let converged = self.converge(iterating, moving, &mut sink, two_way)?;
        let held_at = Instant::now();
        let stopped = self.stop_guests(moving)?;
        let deadline = Instant::now() + BARRIER_PATIENCE;
        sink.set_deadline(deadline);
        self.throttle.lift();
        let kind = self.end_live(
            converged,
            &stopped,
            &mut moving.sections,
            &mut sink,
            two_way,
        )?;
        Ok(AtSwitch {
            sink,
            two_way,
            held_at,
            kind,
        })
    }

    /// The ENDs of what must be whole before the guest runs elsewhere, and what must be saved of it.
    fn end_live(
        &mut self,
        converged: Converged,
        stopped: &GuestStopped,
        sections: &mut Sections,
        sink: &mut ChannelSink,
        two_way: bool,
    ) -> Result<Switch, SourceFailure> {
        let barrier = two_way.then_some(BARRIER);
        self.heard.last_pong = None;
        let registry = &mut sections.registry;
        match converged {
            Converged::Precopy(completing) => {
                let ended = completing.end_live(stopped, registry, barrier, sink)?;
                self.pass_barrier(two_way, &sections.figures, sink)?;
                let ended = ended.save_devices(stopped, &mut sections.registry, sink)?;
                Ok(Switch::Precopy(ended))
            }
            Converged::Postcopy(switching) => {
                let mut packing = switching.end_live(stopped, registry, sink)?;
                packing.command(StreamCommand::Ping(BARRIER), sink)?;
                self.pass_barrier(two_way, &sections.figures, sink)?;
                let registry = &mut sections.registry;
                let packed = packing.pack(stopped, registry, Some(PACKAGE_LOADED))?;
                sink.set_deadline(Instant::now() + BARRIER_PATIENCE);
                Ok(Switch::Postcopy(packed))
            }
        }
    }

    /// Wait until the destination has got as far as we.
    fn pass_barrier(
        &mut self,
        two_way: bool,
        figures: &Figures,
        sink: &mut ChannelSink,
    ) -> Result<(), SourceFailure> {
        let deadline = Instant::now() + BARRIER_PATIENCE;
        sink.flush()?;
        self.publish_figures(figures, sink.taken_bytes());
        while two_way
            && self
                .heard
                .last_pong
                .is_none_or(|(value, _)| value != BARRIER)
        {
            self.listen(deadline.min(Instant::now() + TICK))?;
            if Instant::now() >= deadline {
                return Err(SourceFailure::Barrier);
            }
        }
        Ok(())
    }

    /// Iterate until what is left fits into the downtime limit.
    fn converge(
        &mut self,
        mut iterating: Iterating,
        moving: &mut Moving,
        sink: &mut ChannelSink,
        two_way: bool,
    ) -> Result<Converged, SourceFailure> {
        let mut watch = Watch::new(&moving.leases);
        let mut progress = Progress::Unfinished;
        loop {
            self.listen(Instant::now())?;
            let Sections {
                registry, figures, ..
            } = &mut moving.sections;
            let pending = match self.start_postcopy {
                true => iterating.pending_postcopy(registry),
                false => iterating.pending(registry),
            };
            if let TotalPending::Dirty(dirty) = pending {
                if two_way && watch.wants_ping(progress) {
                    let value = watch.next_ping(progress, &dirty);
                    iterating.command(StreamCommand::Ping(value), sink)?;
                    sink.flush()?;
                }
                let forecast = watch.forecast(&dirty, two_way);
                self.publish_forecast(&mut watch, figures, &dirty, forecast);
                let limit = self.parameters.downtime_limit;
                let fits = |dirty: &DirtyTotal| {
                    forecast.is_some_and(|forecast| forecast.total() <= limit)
                        || watch.is_at_best(progress, dirty)
                };
                iterating = match self.start_postcopy {
                    false => match iterating.try_complete(registry, fits) {
                        Ready::Go(completing) => return Ok(Converged::Precopy(completing)),
                        Ready::NotYet(same, _) => same,
                    },
                    // It was asked for, and waiting would not make it shorter.
                    true => match iterating
                        .try_postcopy(registry, |dirty| dirty.bytes == 0 || fits(dirty))?
                    {
                        Ready::Go(switching) => return Ok(Converged::Postcopy(switching)),
                        Ready::NotYet(same, _) => same,
                    },
                };
            }
            let (begun, before) = (Instant::now(), sink.taken_bytes());
            progress = iterating.iterate(registry, sink)?;
            sink.flush()?;
            let taken = sink.taken_bytes() - before;
            watch.iterated(&moving.leases, taken, begun.elapsed());
            watch.pong(self.heard.last_pong);
            self.publish_figures(figures, sink.taken_bytes());
            if let Some(ram) = &moving.sections.ram {
                // From there on it matters how much is left exactly.
                ram.set_exact_below(bytes_in(self.parameters.downtime_limit, watch.bandwidth()));
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
    pub(crate) fn enter(&self, state: State) {
        self.published.update(|status| {
            if status.state != State::Cancelling {
                status.state = state;
            }
        });
    }

    /// Stop the guest, hold writes to its disks, wait for those in flight, and for leave to go on.
    fn stop_guests(&mut self, moving: &mut Moving) -> Result<GuestStopped, SourceFailure> {
        let pausing = self.capabilities.pause_before_switchover;
        let state = if pausing {
            State::PreSwitchover
        } else {
            State::Device
        };
        // Before its disks are held: it must not wait for one of them when it stops.
        moving.vcpus.stop().map_err(SourceFailure::Guest)?;
        let leases = &moving.leases;
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
        while !self.heard.is_over() && Instant::now() < deadline {
            self.hear(deadline.min(Instant::now() + TICK));
            if self.line.stop().is_triggered() {
                break;
            }
        }
        if let Some(status) = self.heard.shut {
            return Ok(self.answered(committed, status, held_at));
        }
        let reason = self.heard.closed.clone().unwrap_or_else(|| {
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

    pub(crate) fn gone(&self, committed: Committed, held_at: Instant) -> Outcome {
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
            if self.line.is_ending() || self.line.stop().is_triggered() {
                return Outcome::Undecided;
            }
        }
    }

    /// A destination that gives up closes the channel, too: what it said tells more than that.
    pub(crate) fn last_word(&mut self, error: SourceFailure) -> SourceFailure {
        let is_broken = matches!(error, SourceFailure::Save(_) | SourceFailure::Channel(_));
        if is_broken {
            self.wait_for_last_word();
        }
        match self.heard.shut {
            Some(status) if is_broken => SourceFailure::Refused { status },
            _ => error,
        }
    }

    /// The channel is broken: hear what was said before.
    pub(crate) fn wait_for_last_word(&mut self) {
        let deadline = Instant::now() + LAST_WORD_PATIENCE;
        while !self.heard.is_over() && Instant::now() < deadline && self.check_cancelled().is_ok() {
            self.hear(deadline.min(Instant::now() + TICK));
        }
    }

    /// Take events until `deadline`; at least those that are there.
    ///
    /// # Errors
    /// Cancelled, or the destination gave up.
    fn listen(&mut self, deadline: Instant) -> Result<(), SourceFailure> {
        self.hear(deadline);
        self.check_cancelled()?;
        match (self.heard.shut, &self.heard.closed) {
            (Some(status), _) => Err(SourceFailure::Refused { status }),
            (None, Some(reason)) => Err(SourceFailure::ReturnClosed(reason.clone())),
            (None, None) => Ok(()),
        }
    }

    pub(crate) fn check_cancelled(&self) -> Result<(), SourceFailure> {
        if self.gate.is_cancelled() || self.line.stop().is_triggered() {
            return Err(SourceFailure::Cancelled);
        }
        Ok(())
    }

    /// Wait for one event until `deadline`, then take all that are there.
    pub(crate) fn hear(&mut self, deadline: Instant) {
        let patience = deadline.saturating_duration_since(Instant::now());
        let mut event = self.inbox.recv_timeout(patience).ok();
        while let Some(heard) = event {
            self.take(heard);
            event = self.inbox.try_recv().ok();
        }
    }

    pub(crate) fn take(&mut self, event: Event) {
        if event.is_of_return_path() {
            self.unheard.fetch_sub(1, Ordering::AcqRel);
        }
        let heard = &mut self.heard;
        match event {
            Event::Pong {
                value: HELLO_ANSWER,
                ..
            } => self.peer_is_ours = true,
            Event::Pong {
                value: PACKAGE_LOADED,
                ..
            } => heard.package_loaded = true,
            Event::Pong { value, at } => heard.last_pong = Some((value, at)),
            // The first is the last that it has to say.
            Event::Shut(status) => _ = heard.shut.get_or_insert(status),
            Event::ReturnClosed(reason) => heard.closed = Some(reason),
            Event::Received { block, bitmap } => heard.bitmaps.push((block, bitmap)),
            Event::ResumeAck(value) => heard.resume_ack = Some(value),
            Event::Set(parameters) => self.parameters = parameters,
            Event::Continue => self.go_on = true,
            Event::StartPostcopy => self.start_postcopy = true,
            Event::Decide(_) | Event::Wake | Event::Resume(..) => {}
        }
    }

    pub(crate) fn publish_figures(&self, figures: &Figures, wire_bytes: u64) {
        self.published
            .update(|status| figures.publish(status, wire_bytes));
    }

    fn publish_forecast(
        &self,
        watch: &mut Watch,
        figures: &Figures,
        dirty: &DirtyTotal,
        forecast: Option<Forecast>,
    ) {
        let stalled = watch.pass_ended(figures.passes(), dirty.bytes);
        let limit = self.parameters.downtime_limit;
        let dirty_rate = watch.dirty_rate + figures.ram_dirty_rate();
        self.published.update(|status| {
            status.remaining_bytes = dirty.bytes;
            status.bandwidth = watch.bandwidth();
            status.dirty_rate = dirty_rate;
            status.expected_downtime = forecast.map(|forecast| forecast.total());
            status.stall = match forecast {
                Some(forecast) if stalled => {
                    let total = forecast.total();
                    Some(stall_message(dirty_rate, watch.bandwidth(), total, limit))
                }
                _ => None,
            };
        });
    }

    pub(crate) fn publish_outcome(&self, outcome: Result<Outcome, SourceFailure>) {
        // Lets the return path's thread end.
        self.line.break_off();
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

impl Heard {
    /// Will nothing more come?
    pub(crate) fn is_over(&self) -> bool {
        self.shut.is_some() || self.closed.is_some()
    }
}

/// The PING behind the last chunk. Those of passes have lower values.
const BARRIER: u32 = u32::MAX;
/// The PING behind the devices of a postcopy.
pub(crate) const PACKAGE_LOADED: u32 = u32::MAX - 1;

/// What goes over the channel in that time.
fn bytes_in(time: Duration, bytes_per_second: u64) -> u64 {
    let bytes = time.as_millis() * u128::from(bytes_per_second) / 1000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Nobody answers: the end of the writing is all there is.
fn end_one_way(mut writer: Writer) -> Result<(), ChannelError> {
    writer.sync()?;
    writer.finish(Some(Instant::now() + COMMAND_PATIENCE))
}
