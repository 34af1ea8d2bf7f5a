//! A client for one connection, synchronous or with many requests under way.
//!
//! ```text
//!   submit ─▶ cookie            wait ─▶ Completion { cookie, result }      in the server's order
//!   read, write, flush, ...     submit, then wait for that one
//! ```
//!
//! One thread drives it. It never waits for only one direction: while a request does not fit into
//! the socket, replies are taken.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno as Os;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use vmferry_channel::{ChannelError, Stop};
use vmferry_disk::Extent;

use crate::client_handshake::{self, Export};
use crate::client_replies::{Pending, Replies};
use crate::poll::poll_until;
use crate::protocol::{Command, Errno, OptionCode, OptionReply, Request, request, transmission};
use crate::uri::NbdUri;
use crate::window::{Received, Window};

/// Replies are received into this much; the longest chunk that is not data fits.
const WINDOW_BYTES: usize = 2 << 20;
/// [`Client::submit`] waits while this much is not sent.
const UNSENT_BYTES_MAX: usize = 8 << 20;
/// Zeroes and trims of the synchronous calls are cut into pieces of this size.
const PIECE_BYTES_MAX: u64 = 1 << 30;

/// How patient a client is.
#[derive(Clone, Copy, Debug)]
pub struct ClientSettings {
    /// For the connection and the handshake.
    pub connect_timeout: Duration,
    /// Longest silence while something is awaited; `None` waits until the stop event. Writes to a
    /// disk that is being handed over take long.
    pub silence_timeout: Option<Duration>,
    /// Ask for structured replies and block status.
    pub structured: bool,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(10),
            silence_timeout: Some(Duration::from_secs(30)),
            structured: true,
        }
    }
}

/// The connection, or what the server says on it, is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ChannelError),
    /// The socket failed.
    #[error("{server}: {source}")]
    Socket {
        /// The address.
        server: String,
        /// What the host said.
        source: std::io::Error,
    },
    /// The server closed the connection.
    #[error("{server}: the server has closed the connection")]
    Closed {
        /// The address.
        server: String,
    },
    /// Nothing came for too long.
    #[error("{server}: the server is silent")]
    Silent {
        /// The address.
        server: String,
    },
    /// The stop event.
    #[error("stopped")]
    Stopped,
    /// The handshake: the server has something against an option.
    #[error("{server}: the server answers {option} with {reply}: {message}")]
    Refused {
        /// The address.
        server: String,
        /// What was asked.
        option: OptionCode,
        /// The answer.
        reply: OptionReply,
        /// Its words.
        message: String,
    },
    /// The server broke the protocol.
    #[error("{server}: the server broke the protocol: {what}")]
    Broken {
        /// The address.
        server: String,
        /// How.
        what: String,
    },
    /// A request of the synchronous calls failed.
    #[error("{server}: {failure}")]
    Failed {
        /// The address.
        server: String,
        /// Why.
        failure: Failure,
    },
}

/// A request failed; the connection is fine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{command} at byte {offset} (length {length}) failed: {errno}{}{message}", if message.is_empty() { "" } else { ": " })]
pub struct Failure {
    /// What was asked.
    pub command: Command,
    /// First byte of the range.
    pub offset: u64,
    /// Length of the range in bytes.
    pub length: u32,
    /// The server's number.
    pub errno: Errno,
    /// The server's words, if it has any.
    pub message: String,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the ranges of the commands")]
pub enum Operation {
    /// Bytes of the disk, at most [`Client::payload_bytes_max`].
    Read { offset: u64, length: u32 },
    /// Put bytes on the disk, at most [`Client::payload_bytes_max`].
    Write {
        offset: u64,
        data: Vec<u8>,
        fua: bool,
    },
    /// Make the range zero; `no_hole` keeps it allocated, `fast_only` fails if that is slow.
    WriteZeroes {
        offset: u64,
        length: u32,
        no_hole: bool,
        fast_only: bool,
        fua: bool,
    },
    /// The content is no longer needed.
    Trim { offset: u64, length: u32 },
    /// Bring the range into the server's memory.
    Cache { offset: u64, length: u32 },
    /// What is allocated, from the range's start on.
    BlockStatus { offset: u64, length: u32 },
    /// Make everything answered so far durable.
    Flush,
}

impl Operation {
    fn into_request(self, cookie: u64) -> (Request, Vec<u8>) {
        let request = |command, flags, offset, length| Request {
            flags,
            command,
            cookie,
            offset,
            length,
        };
        let flag = |set: bool, bit: u16| if set { bit } else { 0 };
        let header = match self {
            Self::Read { offset, length } => request(Command::READ, 0, offset, length),
            Self::Write { offset, data, fua } => {
                let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
                let flags = flag(fua, request::FUA);
                return (request(Command::WRITE, flags, offset, length), data);
            }
            Self::WriteZeroes {
                offset,
                length,
                no_hole,
                fast_only,
                fua,
            } => {
                let flags = flag(no_hole, request::NO_HOLE)
                    | flag(fast_only, request::FAST_ZERO)
                    | flag(fua, request::FUA);
                request(Command::WRITE_ZEROES, flags, offset, length)
            }
            Self::Trim { offset, length } => request(Command::TRIM, 0, offset, length),
            Self::Cache { offset, length } => request(Command::CACHE, 0, offset, length),
            Self::BlockStatus { offset, length } => {
                request(Command::BLOCK_STATUS, 0, offset, length)
            }
            Self::Flush => request(Command::FLUSH, 0, 0, 0),
        };
        (header, Vec::new())
    }
}

/// What a request brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The bytes of a read.
    Data(Vec<u8>),
    /// The answer to a block status request: at least one extent.
    Extents(Vec<Extent>),
}

/// A request is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What [`Client::submit`] gave.
    pub cookie: u64,
    /// How it ended.
    pub result: Result<Outcome, Failure>,
}

/// A connection to one export.
#[derive(Debug)]
pub struct Client {
    fd: OwnedFd,
    server: String,
    stop: Stop,
    silence_timeout: Option<Duration>,
    export: Export,
    window: Window,
    replies: Replies,
    /// Requests on their way out, and how much of the first is sent.
    unsent: VecDeque<Vec<u8>>,
    unsent_bytes: usize,
    front_sent: usize,
    completed: VecDeque<Completion>,
    next_cookie: u64,
}

impl Client {
    /// Connect and choose the export. The stop event ends this and every later wait.
    pub fn connect(uri: &NbdUri, settings: &ClientSettings, stop: &Stop) -> Result<Self, NbdError> {
        let socket = vmferry_channel::connect(&uri.address, stop, settings.connect_timeout)?;
        let mut client = Self {
            fd: socket.into_fd(),
            server: uri.to_string(),
            stop: stop.clone(),
            silence_timeout: Some(settings.connect_timeout),
            export: Export::default(),
            window: Window::new(WINDOW_BYTES),
            replies: Replies::default(),
            unsent: VecDeque::new(),
            unsent_bytes: 0,
            front_sent: 0,
            completed: VecDeque::new(),
            next_cookie: 1,
        };
        let deadline = Instant::now().checked_add(settings.connect_timeout);
        client.export =
            client_handshake::choose(&mut client, &uri.export, settings.structured, deadline)?;
        client.replies.structured = client.export.structured;
        client.replies.allocation = client.export.allocation;
        client.silence_timeout = settings.silence_timeout;
        Ok(client)
    }

    /// Length of the export in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.export.length
    }

    /// Bits of [`transmission`].
    #[must_use]
    pub fn flags(&self) -> u16 {
        self.export.flags
    }

    /// Writes would be refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.export.flags & transmission::READ_ONLY != 0
    }

    /// Largest read or write of one request, in bytes.
    #[must_use]
    pub fn payload_bytes_max(&self) -> u32 {
        self.export.payload_bytes_max
    }

    /// Does the server answer block status requests?
    #[must_use]
    pub fn has_block_status(&self) -> bool {
        self.export.allocation.is_some()
    }

    /// Requests without a completion.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.replies.pending.len()
    }

    /// Send a request without waiting for its reply.
    pub fn submit(&mut self, operation: Operation) -> Result<u64, NbdError> {
        let cookie = self.next_cookie;
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let (request, data) = operation.into_request(cookie);
        self.replies.pending.insert(cookie, Pending::new(&request));
        self.enqueue(request.encode().to_vec());
        self.enqueue(data);
        self.send_some()?;
        while self.unsent_bytes > UNSENT_BYTES_MAX {
            self.progress()?;
        }
        Ok(cookie)
    }

    /// The next request that is over. `None` if none is under way.
    pub fn wait(&mut self) -> Result<Option<Completion>, NbdError> {
        loop {
            if let Some(completion) = self.completed.pop_front() {
                return Ok(Some(completion));
            }
            if self.replies.pending.is_empty() {
                return Ok(None);
            }
            self.progress()?;
        }
    }

    /// Wait for one request; completions of others stay for [`Client::wait`]. The cookie must be of
    /// a request whose completion was not taken.
    pub fn wait_for(&mut self, cookie: u64) -> Result<Completion, NbdError> {
        loop {
            let position = self
                .completed
                .iter()
                .position(|completion| completion.cookie == cookie);
            if let Some(completion) = position.and_then(|at| self.completed.remove(at)) {
                return Ok(completion);
            }
            if !self.replies.pending.contains_key(&cookie) {
                return Err(self.broken(format!("no request has the cookie {cookie}")));
            }
            self.progress()?;
        }
    }

    /// Fill `buf` from `offset`.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), NbdError> {
        let mut offset = offset;
        for piece in buf.chunks_mut(self.piece_bytes()) {
            let length = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            match self.call(Operation::Read { offset, length })? {
                Outcome::Data(data) if data.len() == piece.len() => piece.copy_from_slice(&data),
                _ => return Err(self.broken("a read brought no data".to_owned())),
            }
            offset = offset.saturating_add(u64::from(length));
        }
        Ok(())
    }

    /// Write all of `data` at `offset`; with `fua` it is durable afterwards.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), NbdError> {
        let mut offset = offset;
        for piece in data.chunks(self.piece_bytes()) {
            let data = piece.to_vec();
            self.call(Operation::Write { offset, data, fua })?;
            offset = offset.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Make the range zero.
    pub fn write_zeroes(&mut self, offset: u64, length: u64, fua: bool) -> Result<(), NbdError> {
        self.in_pieces(offset, length, |offset, length| Operation::WriteZeroes {
            offset,
            length,
            no_hole: false,
            fast_only: false,
            fua,
        })
    }

    /// The range's content is no longer needed.
    pub fn trim(&mut self, offset: u64, length: u64) -> Result<(), NbdError> {
        self.in_pieces(offset, length, |offset, length| Operation::Trim {
            offset,
            length,
        })
    }

    /// Make everything answered so far durable.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.call(Operation::Flush).map(drop)
    }

    /// What the range is, from its start on; the answer may cover less than was asked, and with
    /// some servers more.
    pub fn block_status(&mut self, offset: u64, length: u32) -> Result<Vec<Extent>, NbdError> {
        match self.call(Operation::BlockStatus { offset, length })? {
            Outcome::Extents(extents) => Ok(extents),
            _ => Err(self.broken("a block status request brought no extents".to_owned())),
        }
    }

    /// Say goodbye. What is under way may or may not be done.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        let goodbye = Request {
            flags: 0,
            command: Command::DISCONNECT,
            cookie: 0,
            offset: 0,
            length: 0,
        };
        self.enqueue(goodbye.encode().to_vec());
        self.send_some()?;
        while self.unsent_bytes > 0 {
            self.progress()?;
        }
        // The server may have been quicker.
        let _ = shutdown(&self.fd, Shutdown::Write);
        Ok(())
    }

    fn call(&mut self, operation: Operation) -> Result<Outcome, NbdError> {
        let cookie = self.submit(operation)?;
        let completion = self.wait_for(cookie)?;
        completion.result.map_err(|failure| NbdError::Failed {
            server: self.server.clone(),
            failure,
        })
    }

    fn in_pieces(
        &mut self,
        offset: u64,
        length: u64,
        operation: impl Fn(u64, u32) -> Operation,
    ) -> Result<(), NbdError> {
        let mut done = 0u64;
        while done < length {
            let piece = length.saturating_sub(done).min(PIECE_BYTES_MAX);
            let length = u32::try_from(piece).unwrap_or(u32::MAX);
            self.call(operation(offset.saturating_add(done), length))?;
            done = done.saturating_add(piece);
        }
        Ok(())
    }

    fn piece_bytes(&self) -> usize {
        (self.export.payload_bytes_max as usize).max(1)
    }

    fn enqueue(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.unsent_bytes = self.unsent_bytes.saturating_add(bytes.len());
            self.unsent.push_back(bytes);
        }
    }

    /// Take replies and send requests until there was some progress.
    fn progress(&mut self) -> Result<(), NbdError> {
        let unsent = self.unsent_bytes;
        self.send_some()?;
        let taken = self.receive_some()?;
        if taken || self.unsent_bytes < unsent {
            return Ok(());
        }
        let deadline = self
            .silence_timeout
            .and_then(|timeout| Instant::now().checked_add(timeout));
        self.poll(deadline)
    }

    fn send_some(&mut self) -> Result<(), NbdError> {
        while let Some(front) = self.unsent.front() {
            let rest = front.get(self.front_sent..).unwrap_or(&[]);
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.fd, rest, flags) {
                Ok(sent) => {
                    self.unsent_bytes = self.unsent_bytes.saturating_sub(sent);
                    self.front_sent = self.front_sent.saturating_add(sent);
                    if self.front_sent >= front.len() {
                        self.unsent.pop_front();
                        self.front_sent = 0;
                    }
                }
                Err(Os::INTR) => {}
                Err(Os::AGAIN) => return Ok(()),
                Err(error) => return Err(self.socket_error(error)),
            }
        }
        Ok(())
    }

    /// Receive what is there and complete requests; was there anything?
    fn receive_some(&mut self) -> Result<bool, NbdError> {
        let received = match self.replies.place() {
            Some(place) if self.window.unread().is_empty() => {
                let received = self
                    .window
                    .receive_into(self.fd.as_fd(), place, WINDOW_BYTES);
                if let Ok(Received::Bytes(count)) = received {
                    self.replies.placed(count);
                }
                received
            }
            _ => self.window.receive(self.fd.as_fd()),
        };
        let progress = match received {
            Ok(Received::Bytes(_)) => true,
            Ok(Received::Nothing) => false,
            Ok(Received::End) => {
                return Err(NbdError::Closed {
                    server: self.server.clone(),
                });
            }
            Err(error) => return Err(self.socket_error(error)),
        };
        loop {
            let taken = self.replies.take(self.window.unread());
            match taken {
                Ok((used, completion)) => {
                    self.window.consume(used);
                    let over = used == 0 && completion.is_none();
                    self.completed.extend(completion);
                    if over {
                        return Ok(progress);
                    }
                }
                Err(what) => return Err(self.broken(what)),
            }
        }
    }

    /// Wait for the socket.
    fn poll(&self, deadline: Option<Instant>) -> Result<(), NbdError> {
        let mut events = PollFlags::IN;
        if self.unsent_bytes > 0 {
            events |= PollFlags::OUT;
        }
        let mut fds = [
            PollFd::new(&self.fd, events),
            PollFd::new(&self.stop, PollFlags::IN),
        ];
        poll_until(&mut fds, deadline).map_err(|error| self.socket_error(error))?;
        if self.stop.is_triggered() {
            return Err(NbdError::Stopped);
        }
        let nothing = fds.iter().all(|fd| fd.revents().is_empty());
        if nothing && deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(NbdError::Silent {
                server: self.server.clone(),
            });
        }
        Ok(())
    }

    /// Send one message of the handshake.
    pub(crate) fn send_message(
        &mut self,
        bytes: Vec<u8>,
        deadline: Option<Instant>,
    ) -> Result<(), NbdError> {
        self.enqueue(bytes);
        loop {
            self.send_some()?;
            if self.unsent_bytes == 0 {
                return Ok(());
            }
            self.poll(deadline)?;
        }
    }

    /// Receive exactly `count` bytes of the handshake, which fit into the window.
    pub(crate) fn receive_message(
        &mut self,
        count: usize,
        deadline: Option<Instant>,
    ) -> Result<Vec<u8>, NbdError> {
        loop {
            if let Some(bytes) = self.window.unread().get(..count) {
                let bytes = bytes.to_vec();
                self.window.consume(count);
                return Ok(bytes);
            }
            match self.window.receive(self.fd.as_fd()) {
                Ok(Received::Bytes(_)) => {}
                Ok(Received::Nothing) => self.poll(deadline)?,
                Ok(Received::End) => {
                    return Err(NbdError::Closed {
                        server: self.server.clone(),
                    });
                }
                Err(error) => return Err(self.socket_error(error)),
            }
        }
    }

    pub(crate) fn refused(
        &self,
        option: OptionCode,
        reply: OptionReply,
        message: &[u8],
    ) -> NbdError {
        NbdError::Refused {
            server: self.server.clone(),
            option,
            reply,
            message: String::from_utf8_lossy(message).into_owned(),
        }
    }

    pub(crate) fn broken(&self, what: String) -> NbdError {
        NbdError::Broken {
            server: self.server.clone(),
            what,
        }
    }

    fn socket_error(&self, error: Os) -> NbdError {
        if matches!(error, Os::CONNRESET | Os::PIPE) {
            return NbdError::Closed {
                server: self.server.clone(),
            };
        }
        NbdError::Socket {
            server: self.server.clone(),
            source: error.into(),
        }
    }
}
