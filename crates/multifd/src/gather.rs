//! Takes connections until all of a migration are there.
//!
//! They come in any order, are told apart by their first four bytes, and may be strangers: who says
//! nothing, or something else, is sent away without harm to the others.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use vmferry_channel::{ChannelError, Listener, Socket, Stop};

use crate::JoinOptions;
use crate::error::{MultifdError, Uuid};
use crate::packet::{HANDSHAKE_BYTES, Handshake, MAGIC};

/// First bytes of a main connection.
const MAIN_MAGIC: [u8; 4] = *b"QEVM";

/// Connections that have not said yet what they are, besides those that are awaited. With more, the
/// oldest has to go.
const STRANGERS_MAX: usize = 16;

/// The connections of a migration.
pub(crate) struct Gathered {
    pub(crate) main: Socket,
    /// What was read of the main connection.
    pub(crate) main_bytes: Vec<u8>,
    /// By number.
    pub(crate) channels: Vec<Socket>,
    pub(crate) uuid: [u8; 16],
}

/// A connection that has not said everything.
struct Candidate {
    socket: Socket,
    said: Vec<u8>,
    until: Option<Instant>,
}

/// What a candidate has turned out to be.
enum Role {
    Unknown,
    Stranger(&'static str),
    Main,
    Channel([u8; HANDSHAKE_BYTES]),
}

struct Gathering<'a> {
    options: &'a JoinOptions,
    candidates: Vec<Candidate>,
    main: Option<Candidate>,
    channels: Vec<Option<Socket>>,
    uuid: Option<[u8; 16]>,
    /// Set when the first member has come.
    until: Option<Instant>,
}

/// Wait for the main connection and all channels. Waits for the first without end (but for `stop`), for
/// the others as long as the options say.
pub(crate) fn gather(
    listener: &Listener,
    options: &JoinOptions,
    stop: &Stop,
) -> Result<Gathered, MultifdError> {
    let mut gathering = Gathering {
        options,
        candidates: Vec::new(),
        main: None,
        channels: (0..options.channels).map(|_| None).collect(),
        uuid: options.uuid,
        until: None,
    };
    loop {
        let (is_waiting, ready) = gathering.wait(listener, stop)?;
        let now = Instant::now();
        gathering.hear(&ready, now)?;
        if gathering.is_complete() {
            return gathering.finish();
        }
        if is_waiting {
            gathering.accept(listener, stop)?;
        }
        if gathering.until.is_some_and(|until| until <= now) {
            return Err(MultifdError::Missing {
                there: gathering.there(),
                expected: gathering.channels.len().saturating_add(1),
                patience: options.patience,
            });
        }
    }
}

/// Something on the listener that should not be there: a channel too many. Strangers are sent away.
pub(crate) fn surplus_channel(
    listener: &Listener,
    stop: &Stop,
    patience: Duration,
) -> Result<Option<Handshake>, MultifdError> {
    let until = Instant::now().checked_add(patience);
    loop {
        let socket = match listener.accept_until(stop, Some(Instant::now())) {
            Err(ChannelError::TimedOut { .. }) => return Ok(None),
            other => other.map_err(MultifdError::connect)?,
        };
        let (Some(mut reader), _) = socket.into_channel(stop).split() else {
            continue;
        };
        let mut bytes = [0; HANDSHAKE_BYTES];
        match reader.read_exact_until(&mut bytes, until) {
            Ok(()) => {}
            Err(ChannelError::Stopped) => return Err(MultifdError::Stopped),
            Err(_) => continue,
        }
        if let Ok(handshake) = Handshake::decode(&bytes) {
            return Ok(Some(handshake));
        }
    }
}

impl Gathering<'_> {
    fn there(&self) -> usize {
        let channels = self.channels.iter().flatten().count();
        channels.saturating_add(usize::from(self.main.is_some()))
    }

    fn is_complete(&self) -> bool {
        self.there() == self.channels.len().saturating_add(1)
    }

    fn finish(self) -> Result<Gathered, MultifdError> {
        // All are there; neither error can come.
        let main = self.main.ok_or(MultifdError::NoChannels)?;
        Ok(Gathered {
            main: main.socket,
            main_bytes: main.said,
            channels: self.channels.into_iter().flatten().collect(),
            uuid: self.uuid.ok_or(MultifdError::NoChannels)?,
        })
    }

    /// Whether a connection waits to be accepted, and which candidates have something to say.
    fn wait(&self, listener: &Listener, stop: &Stop) -> Result<(bool, Vec<bool>), MultifdError> {
        let deadlines = self.candidates.iter().map(|candidate| candidate.until);
        let deadline = deadlines.chain([self.until]).flatten().min();
        let patience = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let timeout = patience.and_then(|patience| Timespec::try_from(patience).ok());
        let sockets = self
            .candidates
            .iter()
            .map(|candidate| candidate.socket.as_fd());
        let all: Vec<BorrowedFd<'_>> = [stop.as_fd(), listener.as_fd()]
            .into_iter()
            .chain(sockets)
            .collect();
        let mut fds: Vec<PollFd<'_>> = all
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => {
                return Err(MultifdError::Connect(ChannelError::Io {
                    operation: "accept on",
                    peer: listener.local().to_string(),
                    source: errno.into(),
                }));
            }
        }
        if stop.is_triggered() {
            return Err(MultifdError::Stopped);
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty()).skip(1);
        let is_waiting = ready.next().unwrap_or(false);
        Ok((is_waiting, ready.collect()))
    }

    fn accept(&mut self, listener: &Listener, stop: &Stop) -> Result<(), MultifdError> {
        // Whoever knocked may have gone again.
        let socket = match listener.accept_until(stop, Some(Instant::now())) {
            Err(ChannelError::TimedOut { .. }) => return Ok(()),
            other => other.map_err(MultifdError::connect)?,
        };
        let awaited = self.channels.len().saturating_add(1);
        if self.candidates.len() >= awaited.saturating_add(STRANGERS_MAX) {
            let oldest = self.candidates.remove(0);
            send_away(&oldest.socket, "it has said nothing for the longest time");
        }
        self.candidates.push(Candidate {
            socket,
            said: Vec::new(),
            until: Instant::now().checked_add(self.options.patience),
        });
        Ok(())
    }

    /// Listen to those who have something to say.
    fn hear(&mut self, ready: &[bool], now: Instant) -> Result<(), MultifdError> {
        let mut ready = ready.iter();
        for mut candidate in std::mem::take(&mut self.candidates) {
            let mut role = Role::Unknown;
            if ready.next() == Some(&true) {
                role = candidate.hear();
            }
            if let (Role::Unknown, true) = (&role, candidate.until.is_some_and(|at| at <= now)) {
                role = Role::Stranger("it has not said what it is");
            }
            match role {
                Role::Unknown => self.candidates.push(candidate),
                Role::Stranger(reason) => send_away(&candidate.socket, reason),
                Role::Main => self.take_main(candidate, now)?,
                Role::Channel(said) => self.take_channel(candidate.socket, &said, now)?,
            }
        }
        Ok(())
    }

    fn take_main(&mut self, candidate: Candidate, now: Instant) -> Result<(), MultifdError> {
        if self.main.is_some() {
            let peer = candidate.socket.peer().to_owned();
            return Err(MultifdError::SecondMain { peer });
        }
        self.main = Some(candidate);
        self.member_came(now);
        Ok(())
    }

    fn take_channel(
        &mut self,
        socket: Socket,
        said: &[u8; HANDSHAKE_BYTES],
        now: Instant,
    ) -> Result<(), MultifdError> {
        let handshake = Handshake::decode(said).map_err(|fault| MultifdError::Handshake {
            peer: socket.peer().to_owned(),
            fault,
        })?;
        let channel = handshake.channel;
        let expected = *self.uuid.get_or_insert(handshake.uuid);
        if handshake.uuid != expected {
            return Err(MultifdError::Uuid {
                channel,
                found: Uuid(handshake.uuid),
                expected: Uuid(expected),
            });
        }
        let Some(place) = self.channels.get_mut(usize::from(channel)) else {
            return Err(MultifdError::SurplusChannel {
                channel,
                channels: self.options.channels,
            });
        };
        if place.is_some() {
            return Err(MultifdError::SecondChannel { channel });
        }
        *place = Some(socket);
        self.member_came(now);
        Ok(())
    }

    fn member_came(&mut self, now: Instant) {
        if self.until.is_none() {
            self.until = now.checked_add(self.options.patience);
        }
    }
}

impl Candidate {
    /// Read what it says, at most what says what it is.
    fn hear(&mut self) -> Role {
        let mut room = [0; HANDSHAKE_BYTES];
        loop {
            let wanted = match self.said.first_chunk() {
                None => MAIN_MAGIC.len(),
                Some(&MAIN_MAGIC) => return Role::Main,
                Some(magic) if u32::from_be_bytes(*magic) != MAGIC => {
                    return Role::Stranger("it does not speak of a migration");
                }
                Some(_) => HANDSHAKE_BYTES,
            };
            if let Ok(handshake) = self.said.as_slice().try_into() {
                return Role::Channel(handshake);
            }
            let missing = wanted.saturating_sub(self.said.len());
            let target = room.get_mut(..missing).unwrap_or_default();
            match rustix::net::recv(&self.socket, &mut *target, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Role::Stranger("it has closed the connection"),
                Ok((got, _)) => self.said.extend(target.iter().take(got)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Role::Unknown,
                Err(_) => return Role::Stranger("the connection broke"),
            }
        }
    }
}

fn send_away(socket: &Socket, reason: &str) {
    tracing::warn!(
        peer = socket.peer(),
        reason,
        "a connection was not for this migration"
    );
}
