//! The destination's half of a postcopy: the guest runs, its memory follows.
//!
//! ```text
//!   this thread   LISTEN ── devices … ── PING: disks arrive, PONG ── RUN: guest runs ── wait
//!                   │ start
//!   listener        └─ pages off the connection, into place ── broken: wait for the next … ── EOF
//!   requester       └─ pages that somebody waits for ──▶ return path
//! ```
//!
//! Loading devices reads guest memory, whose pages come on the connection meanwhile.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{ScopedJoinHandle, scope};
use std::time::Instant;

use vmferry_channel::Stop;
use vmferry_ram::{IncomingRam, PageRequest};
use vmferry_savevm::{
    HandlerError, LoadError, LoadMachine, LoadStep, Owner, PostcopyState, Registry, load_cleanup,
};
use vmferry_stream::return_path::ReturnMessage;
use vmferry_stream::{Command, Ending, Record};

use super::answers::{Answers, Asked};
use super::input::Input;
use super::loading::{Loading, publish_ram};
use super::{Arrived, DestinationFailure, Reconnections};
use crate::engine::TICK;
use crate::status::{Published, State};

/// No PING has come in the package.
const NO_PING: u64 = u64::MAX;

/// Load the package, let the guest run, receive the rest of its memory.
pub(super) fn receive_rest(
    loading: Loading<'_>,
    package: &[u8],
    answers: &Answers,
) -> Result<Arrived, DestinationFailure> {
    let Loading {
        input,
        machine,
        mut registry,
        mut landing,
        ram: Some((ram, reconnections)),
        published,
        ..
    } = loading
    else {
        return Err(DestinationFailure::NoDisks { names: Vec::new() });
    };
    let offset = machine.offset().saturating_sub(package.len() as u64);
    let mut nested = machine.package();
    let stop = input.stop();
    let (done, loaded_ping) = (AtomicBool::new(false), AtomicU64::new(NO_PING));
    let mut listener = Some(Listener {
        machine,
        live: registry.split_live(),
        ram: &ram,
        answers,
        reconnections,
        published,
        is_recovering: false,
        loaded_ping: &loaded_ping,
    });
    let mut input = Some(input);
    scope(|scope| {
        let mut running: Option<ScopedJoinHandle<'_, Listened<'_>>> = None;
        let loaded = nested.load_heard(package, &mut registry, |record| {
            match record {
                Record::Command(Command::PostcopyListen) => {
                    ram.listen()?;
                    published.update(|status| status.state = State::PostcopyActive);
                    if let (Some(listener), Some(input)) = (listener.take(), input.take()) {
                        answers.take_requests(stop.clone());
                        let done = &done;
                        running = Some(scope.spawn(move || {
                            let listened = listener.run(input);
                            done.store(true, Ordering::Release);
                            listened
                        }));
                        scope.spawn(|| request_pages(&ram, answers, done));
                    }
                }
                Record::Command(Command::Ping(value)) => {
                    landing.land(answers)?;
                    loaded_ping.store(u64::from(*value), Ordering::Release);
                    // If it is lost, it is said again over the next connection.
                    answers.say(&ReturnMessage::Pong(*value));
                }
                Record::Command(Command::PostcopyRun) => {
                    landing.land(answers)?;
                    landing.let_in();
                }
                _ => {}
            }
            Ok::<(), HandlerError>(())
        });
        let loaded = loaded.map_err(|source| in_package(offset, source));
        let loaded = loaded.and_then(|_| match nested.postcopy() {
            PostcopyState::Running => Ok(()),
            _ => Err(in_package(offset, LoadError::PackageWithoutRun)),
        });
        if loaded.is_err() {
            // Nobody runs here who could need the rest. The source hears it before the connection ends.
            answers.say(&ReturnMessage::Shut(1));
            answers.close();
            reconnections.close();
            stop.trigger();
        }
        let listened = running.map(ScopedJoinHandle::join);
        if let Some(mut listener) = listener.take() {
            load_cleanup(&mut listener.live);
        }
        loaded?;
        let Some(Ok((mut listener, received))) = listened else {
            answers.close();
            let reason = "the thread that receives pages has panicked".to_owned();
            return Err(DestinationFailure::Interrupted { reason });
        };
        load_cleanup(&mut listener.live);
        received.map_err(|reason| {
            // The guest runs: the source must not take it back.
            answers.close();
            DestinationFailure::Interrupted { reason }
        })?;
        listener.machine.leave_package(nested)?;
        Ok(Arrived {
            ending: Ending::WithoutDescription,
            wire_bytes: listener.machine.offset(),
            source_told: answers.say(&ReturnMessage::Shut(0)),
        })
    })
}

fn in_package(offset: u64, source: LoadError) -> DestinationFailure {
    let source = Box::new(source);
    LoadError::Package { offset, source }.into()
}

/// Ask the source for the pages that somebody waits for, until `done`.
fn request_pages(ram: &IncomingRam, answers: &Answers, done: &AtomicBool) {
    let mut held: Option<PageRequest> = None;
    while !done.load(Ordering::Acquire) {
        let deadline = Instant::now() + TICK;
        let Some(request) = held.take().or_else(|| ram.next_request(deadline)) else {
            continue;
        };
        let asked = answers.request(&request.block, request.start, request.bytes);
        if asked == Asked::NotNow {
            held = Some(request);
            answers.wait_for_requests(deadline);
        }
    }
}

/// Reads the connection while the guest runs.
struct Listener<'a> {
    machine: LoadMachine,
    live: Registry<'static>,
    ram: &'a IncomingRam,
    answers: &'a Answers,
    reconnections: &'a Reconnections,
    published: &'a Published,
    is_recovering: bool,
    /// The PING behind the devices, once they are loaded.
    loaded_ping: &'a AtomicU64,
}

/// The listener, and why not everything has come, if so.
type Listened<'a> = (Listener<'a>, Result<(), String>);

impl<'a> Listener<'a> {
    fn run(mut self, mut input: Input) -> Listened<'a> {
        loop {
            let Err(reason) = self.read_to_end(&mut input) else {
                return (self, Ok(()));
            };
            // The source shall notice, too.
            drop(input);
            match self.wait_for_next(&reason) {
                Some(next) => input = next,
                None => return (self, Err(reason)),
            }
        }
    }

    /// Read the connection to its end; why it cannot go on, else.
    fn read_to_end(&mut self, input: &mut Input) -> Result<(), String> {
        let text = |error: LoadError| error.to_string();
        loop {
            match self
                .machine
                .step(input.window(), &mut self.live)
                .map_err(text)?
            {
                LoadStep::End => {
                    self.publish();
                    return self.ram.finish().map_err(|error| error.to_string());
                }
                LoadStep::NeedMore(bytes) => {
                    let filled = input.fill(bytes, None);
                    if !filled.map_err(|error| error.to_string())? {
                        let ended = self.machine.finish_at(input.end());
                        ended.map_err(text)?;
                    }
                }
                LoadStep::Record { record, used, .. } => {
                    if let Record::Command(command) = &record {
                        self.command(command, &input.stop())?;
                    }
                    input.consume(used);
                }
                LoadStep::Device { used } => input.consume(used),
                LoadStep::Payload {
                    bytes,
                    owner: Owner::Handler,
                } => {
                    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
                    let room = self.machine.payload(&mut self.live, length).map_err(text)?;
                    let read = input.read_payload(room);
                    if !read.map_err(|error| error.to_string())? {
                        let ended = self.machine.finish_at(input.end());
                        return ended
                            .map_err(text)
                            .and(Err("the connection has ended".into()));
                    }
                    self.machine.payload_filled(&mut self.live).map_err(text)?;
                }
                LoadStep::Payload { .. } => return Err("the source sent a second package".into()),
            }
            if input.worth_publishing() {
                self.publish();
            }
        }
    }

    fn command(&mut self, command: &Command, stop: &Stop) -> Result<(), String> {
        let answered = match command {
            Command::Ping(value) => self.answers.send(&ReturnMessage::Pong(*value)),
            Command::ReceivedBitmap(block) if self.is_recovering => {
                let Some(bitmap) = self.ram.received(block) else {
                    return Err(format!(
                        "the source asks what came of RAM block '{block}', which is not here"
                    ));
                };
                self.answers.send_bitmap(block.clone(), &bitmap)
            }
            Command::PostcopyResume if self.is_recovering => {
                self.is_recovering = false;
                let answered = self.answers.send(&ReturnMessage::ResumeAck(1));
                let ping = self.loaded_ping.load(Ordering::Acquire);
                if let Ok(value) = u32::try_from(ping) {
                    self.answers.say(&ReturnMessage::Pong(value));
                }
                self.answers.take_requests(stop.clone());
                self.published.update(|status| {
                    status.state = State::PostcopyActive;
                    status.error = None;
                });
                answered
            }
            Command::PostcopyResume | Command::ReceivedBitmap(_) | Command::OpenReturnPath => {
                Ok(())
            }
            other => {
                return Err(format!(
                    "the source sent {}, with the guest running here",
                    other.name()
                ));
            }
        };
        answered.map_err(|error| error.to_string())
    }

    /// Wait for the next connection; `None` if there will be none.
    fn wait_for_next(&mut self, reason: &str) -> Option<Input> {
        tracing::warn!(reason, "postcopy paused");
        self.answers.close();
        self.ram.pause();
        self.publish();
        loop {
            self.reconnections.ask();
            self.published.update(|status| {
                status.state = State::PostcopyPaused;
                status.error = Some(reason.to_owned());
            });
            let channel = self.reconnections.next(|channel| {
                self.published.update(|status| {
                    status.state = State::PostcopyRecover;
                    channel.peer().clone_into(&mut status.peer);
                });
            })?;
            let (Some(reader), Some(writer)) = channel.split() else {
                tracing::warn!("the channel is one-way: a postcopy cannot go on over it");
                continue;
            };
            let input = Input::new(reader);
            self.answers.reconnect(writer, input.stop());
            self.machine = self.machine.resumed();
            self.is_recovering = true;
            return Some(input);
        }
    }

    fn publish(&self) {
        let wire_bytes = self.machine.offset();
        self.published.update(|status| {
            status.wire_bytes = wire_bytes;
            publish_ram(status, self.ram);
        });
    }
}
