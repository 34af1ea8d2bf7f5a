//! The source's half of a postcopy: the guest runs at the destination, its memory follows.
//!
//! From the package on there is no way back by ourselves: a broken connection pauses, and the next
//! one goes on. What the destination says decides about the disks:
//!
//! | heard | disks and guest |
//! |---|---|
//! | PONG behind the devices | given up: they are there |
//! | SHUT 1 before it | here: the guest did not run there |
//! | nothing | held, until a person decides or the next connection tells |

use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use vmferry_channel::Stop;
use vmferry_ram::{OutgoingRam, PAGE_BYTES};
use vmferry_savevm::{Packed, Postcopy, Progress};
use vmferry_stream::Command;

use crate::engine::{Engine, Heard, Outcome, TICK};
use crate::hand_over::{Committed, Decision};
use crate::moving::{Moving, Sections};
use crate::pace::Pace;
use crate::return_path::Bitmaps;
use crate::sink::ChannelSink;
use crate::source::{BARRIER_PATIENCE, Event, SourceFailure, Target};
use crate::status::State;

/// A postcopy, whatever its connection does.
struct Following {
    postcopy: Postcopy,
    sections: Sections,
    /// Until it is known that the guest runs there.
    committed: Option<Committed>,
    /// Nothing that the destination said can have been lost.
    is_first_connection: bool,
    /// Everything up to EOF went over the connection in use.
    is_all_sent: bool,
    /// Writes down that the disks are gone, which takes its time on a disk.
    giving_up: Option<JoinHandle<()>>,
    held_at: Instant,
}

/// What becomes of a postcopy that is paused.
enum Next {
    Connection(ChannelSink),
    Over(Outcome),
}

impl Engine {
    /// Send the package. Until its last byte is given to the kernel nothing can run there.
    pub(crate) fn switch_to_postcopy(
        &mut self,
        committed: Committed,
        packed: Packed,
        sections: Sections,
        mut sink: ChannelSink,
        held_at: Instant,
    ) -> Result<Outcome, SourceFailure> {
        // An answer that came before it was asked for is none.
        self.heard.package_loaded = false;
        let sent = packed
            .send(&mut sink)
            .map_err(SourceFailure::from)
            .and_then(|postcopy| {
                sink.flush()?;
                Ok(postcopy)
            });
        let postcopy = match sent {
            Ok(postcopy) => postcopy,
            Err(error) => {
                committed.decide(Decision::Serve);
                sections.end();
                return Err(self.last_word(error));
            }
        };
        // Nobody waits any more for all of it.
        sink.clear_deadline();
        self.enter(State::PostcopyActive);
        let mut following = Following {
            postcopy,
            sections,
            committed: Some(committed),
            giving_up: None,
            is_first_connection: true,
            is_all_sent: false,
            held_at,
        };
        let outcome = self.follow(&mut following, sink);
        if let Some(thread) = following.giving_up.take() {
            let _ = thread.join();
        }
        following.sections.end();
        Ok(outcome)
    }

    /// Go on with a postcopy of another process: the guest is at the destination.
    pub(crate) fn take_up(
        &mut self,
        mut moving: Moving,
        target: Target,
    ) -> Result<Outcome, SourceFailure> {
        moving.opening.commands.clear();
        let postcopy = Postcopy::take_up(&moving.opening, &mut moving.sections.registry);
        // It never ran here.
        drop(moving.vcpus);
        let mut following = Following {
            postcopy,
            sections: moving.sections,
            committed: None,
            giving_up: None,
            is_first_connection: false,
            is_all_sent: false,
            held_at: Instant::now(),
        };
        self.enter(State::PostcopyRecover);
        let stop = self.line.stop();
        let outcome = match self.recover(&mut following, target, stop) {
            Ok(sink) => self.follow(&mut following, sink),
            Err(broken) => match self.pause(&mut following, &broken) {
                Next::Connection(sink) => self.follow(&mut following, sink),
                Next::Over(outcome) => outcome,
            },
        };
        following.sections.end();
        Ok(outcome)
    }

    fn follow(&mut self, following: &mut Following, mut sink: ChannelSink) -> Outcome {
        loop {
            let broken = match self.send_pages(following, &mut sink) {
                Ok(outcome) => return outcome,
                Err(broken) => broken,
            };
            drop(sink);
            self.wait_for_last_word();
            if let Ok(Some(outcome)) = self.attend(following, Instant::now()) {
                return outcome;
            }
            match self.pause(following, &broken) {
                Next::Connection(next) => sink = next,
                Next::Over(outcome) => return outcome,
            }
        }
    }

    /// Send what is left and wait for the destination's word. Why it broke, else.
    fn send_pages(
        &mut self,
        following: &mut Following,
        sink: &mut ChannelSink,
    ) -> Result<Outcome, String> {
        let stats = following.sections.ram.as_ref().map(OutgoingRam::stats);
        // A page of zeroes is short on the wire, and has to be placed like any other.
        let sent_bytes = || {
            let pages = stats
                .as_ref()
                .map(|it| it.sent_pages.load(Ordering::Relaxed));
            pages.unwrap_or(0).saturating_mul(PAGE_BYTES)
        };
        let mut pace = Pace::new(sent_bytes());
        let mut is_open = true;
        loop {
            let now = Instant::now();
            let deadline = if is_open { now } else { now + TICK };
            if let Some(outcome) = self.attend(following, deadline)? {
                return Ok(outcome);
            }
            if let Some((value, at)) = self.heard.last_pong {
                pace.pong(value, at);
            }
            let Sections {
                registry,
                figures,
                ram,
                ..
            } = &mut following.sections;
            let is_requested = |ram: &OutgoingRam| ram.wait_for_request(now);
            is_open = pace.is_open(sent_bytes());
            if !is_open && !ram.as_ref().is_some_and(is_requested) {
                continue;
            }
            let progress = following.postcopy.iterate(registry, sink);
            let progress = progress.map_err(|error| error.to_string())?;
            if let Some(value) = pace.next_ping(sent_bytes(), Instant::now()) {
                let sent = following.postcopy.command(Command::Ping(value), sink);
                sent.map_err(|error| error.to_string())?;
            }
            sink.flush().map_err(|error| error.to_string())?;
            self.publish_figures(figures, sink.taken_bytes());
            if progress == Progress::Finished {
                break;
            }
        }
        let registry = &mut following.sections.registry;
        let ended = following.postcopy.complete(registry, sink);
        ended.map_err(|error| error.to_string())?;
        sink.flush().map_err(|error| error.to_string())?;
        following.is_all_sent = true;
        loop {
            if let Some(outcome) = self.attend(following, Instant::now() + TICK)? {
                return Ok(outcome);
            }
        }
    }

    /// Hear what the destination says, until `deadline`. Why the connection is broken, else.
    fn attend(
        &mut self,
        following: &mut Following,
        deadline: Instant,
    ) -> Result<Option<Outcome>, String> {
        self.hear(deadline);
        if self.heard.package_loaded
            && let Some(committed) = following.committed.take()
        {
            self.give_up(following, committed);
        }
        let is_first = following.is_first_connection;
        match (self.heard.shut, following.committed.take()) {
            (None, committed) => following.committed = committed,
            // It says so when all pages have come.
            (Some(0), committed) if following.is_all_sent => {
                if let Some(committed) = committed {
                    self.give_up(following, committed);
                }
                return Ok(Some(Outcome::Gone {
                    durable: self.peer_is_ours,
                }));
            }
            (Some(status), Some(committed)) if status != 0 && is_first => {
                committed.decide(Decision::Serve);
                let reason = SourceFailure::Refused { status }.to_string();
                return Ok(Some(Outcome::Here { reason }));
            }
            (Some(status), committed) => {
                following.committed = committed;
                return Err(match status {
                    0 => "the destination says that it has everything, but not all was sent".into(),
                    _ => format!(
                        "the destination has failed (SHUT {status}); its own messages say why"
                    ),
                });
            }
        }
        match &self.heard.closed {
            Some(reason) => Err(reason.clone()),
            None => Ok(None),
        }
    }

    /// The guest runs there.
    fn give_up(&mut self, following: &mut Following, committed: Committed) {
        let downtime = following.held_at.elapsed();
        self.published.update(|status| {
            status.downtime = Some(downtime);
            status.undecided = false;
        });
        let thread = std::thread::Builder::new().name("migrate-give-up".to_owned());
        let committed = Arc::new(Mutex::new(Some(committed)));
        let there = Arc::clone(&committed);
        let take = |committed: &Mutex<Option<Committed>>| {
            let mut committed = committed.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(committed) = committed.take() {
                committed.decide(Decision::GiveUp);
            }
        };
        following.giving_up = thread.spawn(move || take(&there)).ok();
        if following.giving_up.is_none() {
            take(&committed);
        }
    }

    /// Nothing can be sent. Wait for another connection, or for a decision.
    fn pause(&mut self, following: &mut Following, broken: &str) -> Next {
        let mut broken = broken.to_owned();
        loop {
            tracing::warn!(peer = %self.peer, reason = broken, "postcopy paused");
            following.is_first_connection = false;
            self.hang_up();
            if let Ok(Some(outcome)) = self.attend(following, Instant::now()) {
                return Next::Over(outcome);
            }
            let undecided = following.committed.is_some();
            self.published.update(|status| {
                status.state = State::PostcopyPaused;
                status.undecided = undecided;
                status.error = Some(match undecided {
                    false => broken.clone(),
                    true => format!(
                        "{broken}; it is not known whether the guest runs at the destination: \
                         resume the migration, or find out and resolve it"
                    ),
                });
            });
            let (target, stop) = match self.wait_while_paused(following) {
                Ok(next) => next,
                Err(outcome) => return Next::Over(outcome),
            };
            self.peer = target.peer();
            self.published
                .update(|status| status.peer.clone_from(&self.peer));
            match self.recover(following, target, stop) {
                Ok(sink) => {
                    self.published.update(|status| {
                        status.state = State::PostcopyActive;
                        status.undecided = false;
                        status.error = None;
                    });
                    return Next::Connection(sink);
                }
                Err(error) => broken = error,
            }
        }
    }

    fn wait_while_paused(&mut self, following: &mut Following) -> Result<(Target, Stop), Outcome> {
        loop {
            if self.line.is_ending() {
                return Err(Outcome::Undecided);
            }
            match self.inbox.recv_timeout(TICK) {
                Ok(Event::Resume(target, stop)) => return Ok((target, stop)),
                Ok(Event::Decide(decision)) => match (following.committed.take(), decision) {
                    (Some(committed), Decision::Serve) => {
                        committed.decide(Decision::Serve);
                        let reason = "resolved: the guest runs here".to_owned();
                        return Err(Outcome::Here { reason });
                    }
                    // Its memory may still be sent.
                    (Some(committed), Decision::GiveUp) => self.give_up(following, committed),
                    (None, Decision::GiveUp) => return Err(Outcome::Gone { durable: false }),
                    (None, Decision::Serve) => {}
                },
                Ok(event) => self.take(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(Outcome::Undecided),
            }
        }
    }

    /// Find out, over a new connection, what is still to be sent. Why it does not work, else.
    fn recover(
        &mut self,
        following: &mut Following,
        target: Target,
        stop: Stop,
    ) -> Result<ChannelSink, String> {
        let Some(ram) = following.sections.ram.clone() else {
            return Err("there is no memory to be sent".to_owned());
        };
        self.line.replace(stop);
        following.is_all_sent = false;
        let package_loaded = self.heard.package_loaded;
        self.heard = Heard {
            package_loaded,
            ..Heard::default()
        };
        let opened = self.open(target, Some((ram.clone(), Bitmaps::Awaited)));
        let (mut sink, _) = opened.map_err(|error| error.to_string())?;
        let blocks = ram.blocks();
        for block in &blocks {
            let command = Command::ReceivedBitmap(block.clone());
            let sent = following.postcopy.command(command, &mut sink);
            sent.map_err(|error| error.to_string())?;
        }
        sink.flush().map_err(|error| error.to_string())?;
        self.await_answer("which pages it has", |heard| {
            heard.bitmaps.len() >= blocks.len()
        })?;
        for (block, bitmap) in std::mem::take(&mut self.heard.bitmaps) {
            let told = ram.received(&block, &bitmap);
            told.map_err(|error| format!("the destination's bitmap: {error}"))?;
        }
        ram.resume().map_err(|error| error.to_string())?;
        self.heard.resume_ack = None;
        let resume = following
            .postcopy
            .command(Command::PostcopyResume, &mut sink);
        resume.map_err(|error| error.to_string())?;
        sink.flush().map_err(|error| error.to_string())?;
        self.await_answer("that it goes on", |heard| heard.resume_ack.is_some())?;
        match self.heard.resume_ack {
            Some(1) => Ok(sink),
            other => Err(format!(
                "the destination does not go on (RESUME_ACK {other:?})"
            )),
        }
    }

    fn await_answer(
        &mut self,
        what: &str,
        is_there: impl Fn(&Heard) -> bool,
    ) -> Result<(), String> {
        let deadline = Instant::now() + BARRIER_PATIENCE;
        while !is_there(&self.heard) {
            self.hear(deadline.min(Instant::now() + TICK));
            if let Some(reason) = &self.heard.closed {
                return Err(reason.clone());
            }
            if let Some(status) = self.heard.shut {
                return Err(SourceFailure::Refused { status }.to_string());
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "the destination did not say within {} s {what}",
                    BARRIER_PATIENCE.as_secs()
                ));
            }
        }
        Ok(())
    }
}
