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

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::{Scope, ScopedJoinHandle, scope};
use std::time::Instant;

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
    let shared = Shared {
        ram: &ram,
        answers,
        reconnections,
        published,
        done: AtomicBool::new(false),
        guest: AtomicU8::new(LOADING),
        loaded_ping: AtomicU64::new(NO_PING),
    };
    let mut listener = Some((
        Listener {
            machine,
            live: registry.split_live(),
            shared: &shared,
            is_recovering: false,
        },
        input,
    ));
    scope(|scope| {
        let mut running: Option<ScopedJoinHandle<'_, Listened<'_>>> = None;
        let mut discarding = None;
        let loaded = nested.load_heard(package, &mut registry, |record| {
            match record {
                Record::Command(Command::PostcopyRamDiscard { block, .. }) => {
                    discarding = Some(block.clone());
                }
                Record::DiscardRange(range) => {
                    if let Some(block) = &discarding {
                        ram.discard(block, *range)?;
                    }
                }
                Record::Command(Command::PostcopyListen) => {
                    ram.listen()?;
                    published.update(|status| status.state = State::PostcopyActive);
                    if let Some((listener, input)) = listener.take() {
                        answers.take_requests();
                        running = Some(spawn(scope, "migrate-pages", || listener.run(input))?);
                        spawn(scope, "migrate-requests", || request_pages(&shared))?;
                    }
                }
                Record::Command(Command::Ping(value)) => {
                    landing.land(answers)?;
                    shared
                        .loaded_ping
                        .store(u64::from(*value), Ordering::Release);
                    // If it is lost, it is said again over the next connection.
                    answers.say(&ReturnMessage::Pong(*value));
                }
                Record::Command(Command::PostcopyRun) => {
                    landing.land(answers)?;
                    shared.let_run()?;
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
        if loaded.is_err() && shared.guest.load(Ordering::Acquire) != RUNS {
            // Nobody runs here who could need the rest. The source hears it before the connection ends.
            landing.take_off(answers);
            answers.say(&ReturnMessage::Shut(1));
            shared.give_up();
        }
        let listened = running.map(ScopedJoinHandle::join);
        shared.done.store(true, Ordering::Release);
        if let Some((mut listener, _)) = listener.take() {
            load_cleanup(&mut listener.live);
        }
        loaded?;
        let (listener, received) = match listened {
            Some(Ok((mut listener, received))) => {
                load_cleanup(&mut listener.live);
                (Some(listener), received)
            }
            _ => (
                None,
                Err("the thread that receives pages has panicked".to_owned()),
            ),
        };
        let listener = match (listener, received) {
            (Some(listener), Ok(())) => listener,
            (_, received) => {
                // The guest runs: the source must not take it back.
                answers.end();
                // Also when nobody keeps the error.
                std::mem::forget(ram.clone());
                return Err(DestinationFailure::Interrupted {
                    reason: received.err().unwrap_or_default(),
                    memory: Box::new(ram.clone()),
                });
            }
        };
        let mut machine = listener.machine;
        machine.leave_package(nested)?;
        Ok(Arrived {
            ending: Ending::WithoutDescription,
            wire_bytes: machine.offset(),
            source_told: answers.say(&ReturnMessage::Shut(0)),
        })
    })
}

/// What the threads of a postcopy share.
struct Shared<'a> {
    ram: &'a IncomingRam,
    answers: &'a Answers,
    reconnections: &'a Reconnections,
    published: &'a Published,
    /// Pages are not needed any more, or will not come.
    done: AtomicBool,
    guest: AtomicU8,
    /// The PING behind the devices, once they are loaded.
    loaded_ping: AtomicU64,
}

/// Its devices are being loaded.
const LOADING: u8 = 0;
/// It was let run, or is about to.
const RUNS: u8 = 1;
/// Its devices cannot be loaded, or what they need will not come.
const GIVEN_UP: u8 = 2;

impl Shared<'_> {
    /// The guest runs from now on, unless it was given up.
    fn let_run(&self) -> Result<(), HandlerError> {
        let order = Ordering::AcqRel;
        self.guest
            .compare_exchange(LOADING, RUNS, order, Ordering::Acquire)
            .map(drop)
            .map_err(|_| "its memory will not come any more".into())
    }

    /// The guest will not run here, unless it runs already: nobody waits for its memory. True if so.
    fn give_up(&self) -> bool {
        let order = Ordering::AcqRel;
        let given_up = self
            .guest
            .compare_exchange(LOADING, GIVEN_UP, order, Ordering::Acquire);
        if given_up.is_err_and(|now| now == RUNS) {
            return false;
        }
        self.answers.end();
        self.done.store(true, Ordering::Release);
        self.reconnections.look();
        // Loading a device may wait for a page.
        self.ram.abandon();
        true
    }
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> std::io::Result<ScopedJoinHandle<'scope, T>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn_scoped(scope, work)
}

fn in_package(offset: u64, source: LoadError) -> DestinationFailure {
    let source = Box::new(source);
    LoadError::Package { offset, source }.into()
}

/// Ask the source for the pages that somebody waits for, until all is done.
fn request_pages(shared: &Shared<'_>) {
    let mut held: Option<PageRequest> = None;
    while !shared.done.load(Ordering::Acquire) {
        let deadline = Instant::now() + TICK;
        let next = || shared.ram.next_request(deadline);
        let Some(request) = held.take().or_else(next) else {
            continue;
        };
        let PageRequest {
            block,
            start,
            bytes,
        } = &request;
        if shared.answers.request(block, *start, *bytes) == Asked::NotNow {
            held = Some(request);
            shared.answers.wait_for_requests(deadline);
        }
    }
}

/// Reads the connection while the guest runs.
struct Listener<'a> {
    machine: LoadMachine,
    live: Registry<'static>,
    shared: &'a Shared<'a>,
    is_recovering: bool,
}

/// The listener, and why not everything has come, if so.
type Listened<'a> = (Listener<'a>, Result<(), String>);

/// Nobody waits for a listener that is gone.
struct EndWhenDropped<'a>(&'a Shared<'a>);

impl Drop for EndWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.done.store(true, Ordering::Release);
        if std::thread::panicking() {
            self.0.give_up();
        }
    }
}

impl<'a> Listener<'a> {
    fn run(mut self, mut input: Input) -> Listened<'a> {
        // However this ends, a panic included.
        let _end = EndWhenDropped(self.shared);
        loop {
            let Err(reason) = self.read_to_end(&mut input) else {
                return (self, Ok(()));
            };
            // The source shall notice, too.
            drop(input);
            match self.wait_for_next(&reason) {
                Some(next) => input = next,
                None => {
                    self.shared.give_up();
                    return (self, Err(reason));
                }
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
                    return self.shared.ram.finish().map_err(|error| error.to_string());
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
                        self.command(command)?;
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

    fn command(&mut self, command: &Command) -> Result<(), String> {
        let answered = match command {
            Command::Ping(value) => self.shared.answers.send(&ReturnMessage::Pong(*value)),
            Command::ReceivedBitmap(block) if self.is_recovering => {
                let Some(bitmap) = self.shared.ram.received(block) else {
                    return Err(format!(
                        "the source asks what came of RAM block '{block}', which is not here"
                    ));
                };
                self.shared.answers.send_bitmap(block.clone(), &bitmap)
            }
            Command::PostcopyResume if self.is_recovering => {
                self.is_recovering = false;
                let answered = self.shared.answers.send(&ReturnMessage::ResumeAck(1));
                let ping = self.shared.loaded_ping.load(Ordering::Acquire);
                if let Ok(value) = u32::try_from(ping) {
                    self.shared.answers.say(&ReturnMessage::Pong(value));
                }
                self.shared.answers.take_requests();
                self.shared.published.update(|status| {
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
        self.shared.answers.close();
        self.shared.ram.pause();
        self.publish();
        loop {
            self.shared.reconnections.ask(self.shared.published);
            self.shared.published.update(|status| {
                status.state = State::PostcopyPaused;
                status.error = Some(reason.to_owned());
            });
            let channel = self.shared.reconnections.next(&self.shared.done)?;
            let (Some(reader), Some(writer)) = channel.split() else {
                tracing::warn!("the channel is one-way: a postcopy cannot go on over it");
                continue;
            };
            let input = Input::new(reader);
            self.shared.answers.reconnect(writer, input.stop());
            self.machine = self.machine.resumed();
            self.is_recovering = true;
            return Some(input);
        }
    }

    fn publish(&self) {
        let wire_bytes = self.machine.offset();
        self.shared.published.update(|status| {
            status.wire_bytes = wire_bytes;
            publish_ram(status, self.shared.ram);
        });
    }
}
