//! One connection after the handshake: the thread that reads requests.
//!
//! ```text
//!            recv           cached reads, small writes: here, replies staged and sent together
//!   socket ───────▶ window ─┬───────────────────────────────────────────────────────▶ socket
//!                           ├─▶ workers ─▶ reply queue ─────────────────────────────▶ socket
//!                           └─▶ held list ─ the node's notice ─▶ workers
//! ```
//!
//! The thread waits in poll only: for the socket, for the stop event, and for its own event, which
//! the node's notice, finished requests and [`Line::sever`] write.

use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::Errno as Os;
use vmferry_channel::Stop;
use vmferry_disk::{Cached, DiskError, Node, ReadPermit, Refusal};

use crate::admission::{check, cost, permitted};
use crate::budget::Account;
use crate::errno;
use crate::held::{Held, HeldList, Kind};
use crate::job::{Context, Job, Work, disk_failure};
use crate::line::{Line, Ticket};
use crate::pace::{EAGER_TIME, Eagerness, Pace};
use crate::payload::Payload;
use crate::poll::{wait, wait_for_event};
use crate::protocol::{BadMagic, Command, Errno, REQUEST_BYTES, Request, request};
use crate::reply::{self, HEAD_BYTES_MAX, Head};
use crate::server::Settings;
use crate::stall::Stall;
use crate::window::{Received, Window};
use crate::workers::Queue;

/// Requests are received into this much.
pub(crate) const WINDOW_BYTES: usize = 256 << 10;
/// Above this size a request waits for memory of the server. A write up to it is taken whole from
/// the window; a larger one gets its own buffer.
const SMALL_BYTES_MAX: usize = 64 << 10;
/// Largest read that the connection's own thread tries.
const INLINE_READ_BYTES_MAX: usize = 256 << 10;
/// Above this size, a read that has requests behind it is a worker's.
const LONE_READ_BYTES_MIN: usize = 64 << 10;
/// Replies are collected in this much before they are sent.
const STAGING_BYTES: usize = 512 << 10;
/// With this much collected they are sent at once: the client works on them while we go on.
const EARLY_SEND_BYTES: usize = 16 << 10;
/// How much is received behind the payload of a large write: the next header, little more.
const BEHIND_PAYLOAD_BYTES: usize = 4 << 10;

/// Why a connection ends.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum End {
    #[error("the client said goodbye")]
    Goodbye,
    #[error("the client went away")]
    Gone,
    #[error("the socket failed: {0}")]
    Socket(Os),
    #[error("the client broke the protocol: {0}")]
    Broken(#[from] BadMagic),
    #[error("the client stopped in the middle of its data")]
    Stalled,
    #[error("the client does not read its replies, and others need the memory")]
    Deaf,
    #[error("the disk has moved away")]
    Departed,
    #[error("the connection was closed by us")]
    Severed,
    #[error("the server stops")]
    Stopped,
}

impl End {
    /// May the client still read replies?
    fn is_orderly(&self) -> bool {
        matches!(self, Self::Goodbye | Self::Gone | Self::Stopped)
    }
}

/// What the next bytes of the client are.
#[derive(Debug)]
enum Intake {
    Header,
    /// Data of a large write.
    Payload {
        request: Request,
        payload: Payload,
        filled: usize,
        ticket: Ticket,
        stall: Stall,
    },
    /// Data of a write that was refused.
    Skip {
        request: Request,
        left: usize,
        errno: Errno,
    },
}

/// Why the thread cannot take another request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// The window has no whole request.
    NeedMore,
    /// Too much is outstanding or held.
    Full,
    /// A large request waits for memory that other connections have.
    NoMemory,
}

/// The reader's side of one connection.
pub(crate) struct Connection<'a> {
    context: Arc<Context>,
    settings: &'a Settings,
    queue: &'a Queue,
    stop: &'a Stop,
    window: Window,
    intake: Intake,
    staging: Box<[u8]>,
    staged: usize,
    jobs: Vec<Job>,
    held: HeldList<'a>,
    /// The backend can tell what is in memory.
    cached_reads: bool,
    read_pace: Pace,
    write_pace: Pace,
    eagerness: Eagerness,
}

impl<'a> Connection<'a> {
    /// `window` may hold requests already.
    pub(crate) fn new(
        context: Arc<Context>,
        settings: &'a Settings,
        queue: &'a Queue,
        held_by_all: &'a Account,
        stop: &'a Stop,
        window: Window,
    ) -> Self {
        Self {
            context,
            settings,
            queue,
            stop,
            window,
            intake: Intake::Header,
            staging: vec![0; STAGING_BYTES].into(),
            staged: 0,
            jobs: Vec::new(),
            held: HeldList::new(held_by_all),
            cached_reads: true,
            read_pace: Pace::default(),
            write_pace: Pace::default(),
            eagerness: Eagerness::default(),
        }
    }

    /// Serve until the client, the disk or the server goes away.
    pub(crate) fn run(mut self) -> End {
        let line = Arc::clone(self.line());
        // The notice may come after the connection is gone, until the subscription is dropped.
        let subscription = self.node().subscribe({
            let line = Arc::clone(&line);
            move || line.wake()
        });
        let end = loop {
            if let Err(end) = self.serve() {
                break end;
            }
        };
        drop(subscription);
        // A write whose data did not all come is not applied.
        self.intake = Intake::Header;
        // Never executed, never answered: a client that comes back finds them undone.
        self.held.clear();
        self.publish();
        if end.is_orderly() {
            self.finish();
        }
        line.sever();
        self.await_workers();
        end
    }

    /// Take all requests that are there, then wait for something to happen.
    fn serve(&mut self) -> Result<(), End> {
        if self.stop.is_triggered() {
            return Err(End::Stopped);
        }
        if self.line().take_attention() {
            self.look_around()?;
        }
        let pause = self.take_requests();
        self.publish();
        match pause? {
            Pause::NeedMore => match self.receive_soon()? {
                Received::Bytes(_) => Ok(()),
                Received::Nothing => self.wait(PollFlags::IN),
                Received::End => Err(End::Gone),
            },
            Pause::Full => {
                self.line().wake_on_ticket();
                if self.is_crowded_out() {
                    self.line().budget().wake_later(self.line());
                }
                if self.is_full() {
                    self.wait(PollFlags::empty())?;
                }
                Ok(())
            }
            Pause::NoMemory => self.wait(PollFlags::empty()),
        }
    }

    /// Somebody has woken us: see whether we are to end, and try what is held.
    fn look_around(&mut self) -> Result<(), End> {
        if self.line().is_severed() {
            return Err(End::Severed);
        }
        if self.node().held().is_none() {
            return Err(End::Departed);
        }
        self.retry_held()
    }

    /// Receive; look for a moment if nothing is there, because a client that has just got its
    /// replies often has the next requests at hand, and going to sleep takes longer than that.
    fn receive_soon(&mut self) -> Result<Received, End> {
        let received = self.receive()?;
        if received != Received::Nothing || !self.eagerness.is_worth_it() {
            return Ok(received);
        }
        let start = Instant::now();
        loop {
            std::thread::yield_now();
            let received = self.receive()?;
            let over = start.elapsed() >= EAGER_TIME;
            if received != Received::Nothing || over {
                self.eagerness.learn(received != Received::Nothing);
                return Ok(received);
            }
        }
    }

    fn receive(&mut self) -> Result<Received, End> {
        let line = Arc::clone(self.line());
        let received = match &mut self.intake {
            Intake::Payload {
                payload,
                filled,
                stall,
                ..
            } => {
                let rest = payload.bytes_mut().get_mut(*filled..).unwrap_or(&mut []);
                let received = self
                    .window
                    .receive_into(line.socket(), rest, BEHIND_PAYLOAD_BYTES);
                if let Ok(Received::Bytes(count)) = received {
                    *filled = filled.saturating_add(count);
                    stall.note(*filled);
                }
                received
            }
            _ => self.window.receive(line.socket()),
        };
        received.map_err(|error| match error {
            Os::CONNRESET | Os::PIPE => End::Gone,
            error => End::Socket(error),
        })
    }

    /// Wait for `events` on the socket (and for room if there is something to send), for our event
    /// and for the stop event.
    fn wait(&mut self, events: PollFlags) -> Result<(), End> {
        let line = Arc::clone(self.line());
        let mut events = events;
        if line.is_blocked() {
            events |= PollFlags::OUT;
        }
        if !self.held.is_empty() {
            // While we do not read, only this tells that the client has given up.
            events |= PollFlags::RDHUP;
        }
        let stalls = self.stall_deadlines();
        let deadline = stalls.into_iter().flatten().min();
        let ready = wait(&line, events, Some(self.stop), deadline).map_err(End::Socket)?;
        if ready.contains(PollFlags::OUT) {
            line.resume();
        }
        let reading = events.contains(PollFlags::IN);
        let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP;
        if !reading && ready.intersects(gone) {
            return Err(End::Gone);
        }
        if ready.is_empty() {
            self.end_if_stalled(stalls)?;
        }
        Ok(())
    }

    /// Until when data must have come, and replies gone.
    fn stall_deadlines(&self) -> [Option<Instant>; 2] {
        let incoming = match &self.intake {
            Intake::Payload { stall, .. } => stall.deadline(),
            _ => None,
        };
        let since = self.line().blocked_since();
        let outgoing = since.and_then(|since| since.checked_add(self.settings.stall_timeout));
        [incoming, outgoing]
    }

    /// A client that stops in the middle keeps memory, and that ends some time. One that does not
    /// read may be stopped by its owner; it is only cut when others wait for what it has.
    fn end_if_stalled(&self, [incoming, outgoing]: [Option<Instant>; 2]) -> Result<(), End> {
        let now = Instant::now();
        let is_over = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        if is_over(incoming) {
            return Err(End::Stalled);
        }
        if is_over(outgoing) {
            if self.line().budget().is_scarce() {
                return Err(End::Deaf);
            }
            self.line().forgive();
        }
        Ok(())
    }

    /// Take requests from the window until it has no whole one.
    fn take_requests(&mut self) -> Result<Pause, End> {
        loop {
            match std::mem::replace(&mut self.intake, Intake::Header) {
                Intake::Header => {
                    if self.is_full() {
                        return Ok(Pause::Full);
                    }
                    let Some(header) = self.window.unread().first_chunk::<REQUEST_BYTES>() else {
                        return Ok(Pause::NeedMore);
                    };
                    let request = Request::decode(header)?;
                    if self.staged >= EARLY_SEND_BYTES {
                        self.publish();
                    }
                    if let Some(pause) = self.take_request(request)? {
                        return Ok(pause);
                    }
                }
                Intake::Payload {
                    request,
                    mut payload,
                    mut filled,
                    ticket,
                    stall,
                } => {
                    let here = self.window.unread();
                    let rest = payload.bytes_mut().get_mut(filled..).unwrap_or(&mut []);
                    let count = here.len().min(rest.len());
                    if let (Some(to), Some(from)) = (rest.get_mut(..count), here.get(..count)) {
                        to.copy_from_slice(from);
                    }
                    filled = filled.saturating_add(count);
                    self.window.consume(count);
                    if filled < payload.bytes().len() {
                        self.intake = Intake::Payload {
                            request,
                            payload,
                            filled,
                            ticket,
                            stall,
                        };
                        return Ok(Pause::NeedMore);
                    }
                    self.write_large(request, payload, ticket)?;
                }
                Intake::Skip {
                    request,
                    left,
                    errno,
                } => {
                    let count = self.window.unread().len().min(left);
                    self.window.consume(count);
                    let left = left.saturating_sub(count);
                    if left > 0 {
                        self.intake = Intake::Skip {
                            request,
                            left,
                            errno,
                        };
                        return Ok(Pause::NeedMore);
                    }
                    self.refuse(&request, errno);
                }
            }
        }
    }

    /// Take one request, or tell why it stays in the window: it is a small write whose data is not
    /// all there yet, or a large request for which there is no memory.
    fn take_request(&mut self, request: Request) -> Result<Option<Pause>, End> {
        if request.command == Command::DISCONNECT {
            return Err(End::Goodbye);
        }
        if let Err(errno) = check(&request, &self.context) {
            self.window.consume(REQUEST_BYTES);
            self.intake = Intake::Skip {
                request,
                left: request.payload_bytes(),
                errno,
            };
            return Ok(None);
        }
        let length = request.length as usize;
        match request.command {
            Command::READ | Command::WRITE if length > SMALL_BYTES_MAX => {
                let Some(ticket) = self.large_ticket(&request) else {
                    return Ok(Some(Pause::NoMemory));
                };
                self.window.consume(REQUEST_BYTES);
                if request.command == Command::READ {
                    self.read(request, Some(ticket))?;
                } else {
                    self.intake = Intake::Payload {
                        request,
                        payload: self.context.payloads.take(length),
                        filled: 0,
                        ticket,
                        stall: Stall::new(self.settings.stall_timeout),
                    };
                }
            }
            Command::READ => {
                self.window.consume(REQUEST_BYTES);
                self.read(request, None)?;
            }
            Command::WRITE => {
                let whole = REQUEST_BYTES.saturating_add(length);
                if self.window.unread().len() < whole {
                    return Ok(Some(Pause::NeedMore));
                }
                self.write_small(request, length)?;
                self.window.consume(whole);
            }
            _ => {
                self.window.consume(REQUEST_BYTES);
                let ticket = self.line().ticket(cost(0));
                self.admit(request, Payload::EMPTY, ticket)?;
            }
        }
        Ok(None)
    }

    /// Memory for a large request; otherwise, be woken when there is some.
    fn large_ticket(&self, request: &Request) -> Option<Ticket> {
        let line = self.line();
        let attempt = || {
            // What is going to be held stays outside when all that is held is too much.
            let crowded = self.held.bytes_of_all() >= self.settings.held_bytes_max_of_all
                && Kind::of(request.command).is_stopped_by(self.node().held());
            if crowded {
                return None;
            }
            line.try_ticket(cost(request.length as usize))
        };
        attempt().or_else(|| {
            line.budget().wake_later(line);
            attempt()
        })
    }

    /// Answer a read from memory if it is there; otherwise it is a worker's. A large one has its
    /// ticket.
    fn read(&mut self, request: Request, ticket: Option<Ticket>) -> Result<(), End> {
        let length = request.length as usize;
        let permit = match self
            .node()
            .begin_read(request.offset, u64::from(request.length))
        {
            Ok(permit) => permit,
            Err(refusal) => {
                let ticket = ticket.unwrap_or_else(|| self.line().ticket(cost(length)));
                return self.refused(request, Payload::EMPTY, ticket, refusal);
            }
        };
        let mut filled = 0;
        // Large reads that come together are copied by several threads.
        let together = length > LONE_READ_BYTES_MIN && !self.window.unread().is_empty();
        if length <= INLINE_READ_BYTES_MAX && !together {
            let head = Head::of_read(&request, self.context.structured);
            let start = self.stage_room(HEAD_BYTES_MAX.saturating_add(length));
            let (before, place) = self
                .staging
                .get_mut(start..)
                .and_then(|room| room.split_at_mut_checked(head.bytes().len()))
                .unwrap_or_default();
            let place = place.get_mut(..length).unwrap_or(&mut []);
            if self.cached_reads {
                match permit.read_cached(0, place) {
                    Ok(Cached::Hit(count)) => filled = count,
                    Ok(Cached::Unsupported) => self.cached_reads = false,
                    // A worker will meet the error again and report it.
                    Ok(Cached::Miss) | Err(_) => {}
                }
            }
            if length == 0 || filled == length {
                before.copy_from_slice(head.bytes());
                self.staged = start
                    .saturating_add(head.bytes().len())
                    .saturating_add(length);
                return Ok(());
            }
            if !self.cached_reads && self.read_pace.is_good() {
                match self.read_pace.time(length, || permit.read(place)) {
                    Ok(()) => {
                        before.copy_from_slice(head.bytes());
                        self.staged = start
                            .saturating_add(head.bytes().len())
                            .saturating_add(length);
                    }
                    Err(error) => {
                        let bytes = disk_failure(&request, &self.context, &error);
                        self.stage(&bytes);
                    }
                }
                return Ok(());
            }
        }
        let ticket = ticket.unwrap_or_else(|| self.line().ticket(cost(length)));
        self.read_by_worker(request, permit, filled, ticket);
        Ok(())
    }

    /// Leave a read to a worker; its first `filled` bytes lie behind the head in the staging area.
    fn read_by_worker(
        &mut self,
        request: Request,
        permit: ReadPermit,
        filled: usize,
        ticket: Ticket,
    ) {
        let length = request.length as usize;
        let mut payload = self.context.payloads.take(length);
        let head = Head::of_read(&request, self.context.structured);
        let start = self.staged.saturating_add(head.bytes().len());
        let end = start.saturating_add(filled);
        if let (Some(to), Some(from)) = (
            payload.bytes_mut().get_mut(..filled),
            self.staging.get(start..end),
        ) {
            to.copy_from_slice(from);
        }
        let work = Work::Read {
            permit,
            payload,
            filled,
        };
        self.give_to_workers(request, work, ticket);
    }

    /// A write whose data lies in the window, behind its header.
    fn write_small(&mut self, request: Request, length: usize) -> Result<(), End> {
        self.retry_held()?;
        let copy = |window: &Window| {
            let data = window.unread().get(REQUEST_BYTES..).unwrap_or(&[]);
            Payload::Owned(data.get(..length).unwrap_or(data).to_vec())
        };
        if self.held.has_writes() {
            let (payload, ticket) = (copy(&self.window), self.line().ticket(cost(length)));
            return self.admit(request, payload, ticket);
        }
        match self.node().begin_write(request.offset, length as u64) {
            Ok(permit) if !request.has(request::FUA) && self.write_pace.is_good() => {
                let data = self.window.unread().get(REQUEST_BYTES..).unwrap_or(&[]);
                let data = data.get(..length).unwrap_or(data);
                let result = self.write_pace.time(length, || permit.write(data));
                self.answer_write(&request, result);
            }
            Ok(permit) => {
                let payload = copy(&self.window);
                let ticket = self.line().ticket(cost(length));
                self.give_to_workers(request, Work::Write { permit, payload }, ticket);
            }
            Err(refusal) => {
                let (payload, ticket) = (copy(&self.window), self.line().ticket(cost(length)));
                return self.refused(request, payload, ticket, refusal);
            }
        }
        Ok(())
    }

    /// A write that has its own buffer, all filled: a worker's, because receiving the next requests
    /// meanwhile is worth more than saving a hand-over.
    fn write_large(
        &mut self,
        request: Request,
        payload: Payload,
        ticket: Ticket,
    ) -> Result<(), End> {
        self.retry_held()?;
        self.admit(request, payload, ticket)
    }

    fn answer_write(&mut self, request: &Request, result: Result<(), DiskError>) {
        match result {
            Ok(()) => self.stage(Head::of_success(request).bytes()),
            Err(error) => {
                let bytes = disk_failure(request, &self.context, &error);
                self.stage(&bytes);
            }
        }
    }

    /// Get permission for a request and give it to the workers; if it is held, keep it here.
    fn admit(&mut self, request: Request, payload: Payload, ticket: Ticket) -> Result<(), End> {
        if Kind::of(request.command) == Kind::Writes && self.held.has_writes() {
            self.held.push(Held {
                request,
                payload,
                ticket,
            });
            return Ok(());
        }
        match permitted(&self.context, &request, payload) {
            Ok(work) => self.give_to_workers(request, work, ticket),
            Err((refusal, payload)) => self.refused(request, payload, ticket, refusal)?,
        }
        Ok(())
    }

    /// The node said no: for good, or for now.
    fn refused(
        &mut self,
        request: Request,
        payload: Payload,
        ticket: Ticket,
        refusal: Refusal,
    ) -> Result<(), End> {
        match (errno::of_refusal(refusal, request.command), refusal) {
            (Some(errno), _) => self.refuse(&request, errno),
            (None, Refusal::Departed) => return Err(End::Departed),
            (None, _) => self.held.push(Held {
                request,
                payload,
                ticket,
            }),
        }
        Ok(())
    }

    /// Ask again for what is held, each kind in the order in which it came.
    fn retry_held(&mut self) -> Result<(), End> {
        for kind in [Kind::Reads, Kind::Writes] {
            while let Some(held) = self.held.pop(kind) {
                let (request, ticket) = (held.request, held.ticket);
                match permitted(&self.context, &request, held.payload) {
                    Ok(work) => self.give_to_workers(request, work, ticket),
                    Err((Refusal::Held, payload)) => {
                        self.held.push_front(Held {
                            request,
                            payload,
                            ticket,
                        });
                        break;
                    }
                    Err((refusal, payload)) => self.refused(request, payload, ticket, refusal)?,
                }
            }
        }
        Ok(())
    }

    fn refuse(&mut self, request: &Request, errno: Errno) {
        let text = match errno {
            Errno::EPERM => "the disk is read-only",
            Errno::ENOSPC => "the range reaches past the end of the disk",
            _ => "the request is invalid",
        };
        let bytes = reply::failure(request, self.context.structured, errno, text);
        self.stage(&bytes);
    }

    fn give_to_workers(&mut self, request: Request, work: Work, ticket: Ticket) {
        self.jobs.push(Job {
            request,
            work,
            context: Arc::clone(&self.context),
            ticket,
        });
    }

    /// Too much is outstanding or held to take another request.
    fn is_full(&self) -> bool {
        let (settings, mine) = (self.settings, self.line().outstanding());
        // What is held is outstanding, too, but has a limit of its own.
        let bytes = mine.bytes().saturating_sub(self.held.bytes());
        let requests = mine.requests().saturating_sub(self.held.requests());
        bytes >= settings.in_flight_bytes_max
            || requests >= settings.in_flight_requests_max
            || self.held.bytes() >= settings.held_bytes_max
            || self.is_crowded_out()
    }

    /// All connections together have too much. Each may have one request and hold one.
    fn is_crowded_out(&self) -> bool {
        let all_held = self.held.bytes_of_all();
        (self.line().outstanding().requests() > 0 && self.line().budget().is_used_up())
            || (!self.held.is_empty() && all_held >= self.settings.held_bytes_max_of_all)
    }

    /// Where `length` bytes of reply can be staged.
    fn stage_room(&mut self, length: usize) -> usize {
        if self.staged.saturating_add(length) > self.staging.len() {
            self.publish();
        }
        self.staged
    }

    fn stage(&mut self, bytes: &[u8]) {
        let start = self.stage_room(bytes.len());
        let end = start.saturating_add(bytes.len());
        if let Some(place) = self.staging.get_mut(start..end) {
            place.copy_from_slice(bytes);
            self.staged = end;
        }
    }

    /// Send staged replies, wake workers for collected jobs.
    fn publish(&mut self) {
        self.queue.submit(&mut self.jobs);
        let staged = std::mem::take(&mut self.staged);
        if let Some(bytes) = self.staging.get(..staged) {
            self.line().send_now(bytes);
        }
    }

    /// Let what is outstanding finish, and the client read the replies.
    fn finish(&mut self) {
        let line = Arc::clone(self.line());
        let deadline = Instant::now().checked_add(self.settings.drain_timeout);
        loop {
            line.take_attention();
            line.wake_on_ticket();
            if line.outstanding().requests() == 0 || line.is_severed() {
                return;
            }
            let events = if line.is_blocked() {
                PollFlags::OUT
            } else {
                PollFlags::empty()
            };
            match wait(&line, events, None, deadline) {
                Ok(ready) if ready.intersects(PollFlags::HUP | PollFlags::ERR) => return,
                Ok(ready) if ready.contains(PollFlags::OUT) => line.resume(),
                Ok(_) if deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Nothing is answered any more, but a disk must not be closed under a worker.
    fn await_workers(&self) {
        let line = self.line();
        let deadline = Instant::now().checked_add(self.settings.drain_timeout);
        loop {
            line.take_attention();
            line.wake_on_ticket();
            if line.outstanding().requests() == 0 {
                return;
            }
            let over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if over || wait_for_event(line, deadline).is_err() {
                tracing::warn!(
                    disk = self.node().name(),
                    requests = line.outstanding().requests(),
                    "requests are still in the disk after their connection has ended"
                );
                return;
            }
        }
    }

    fn line(&self) -> &Arc<Line> {
        &self.context.line
    }

    fn node(&self) -> &Arc<Node> {
        &self.context.node
    }
}
