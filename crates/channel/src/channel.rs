//! A channel as a pair of halves, and how one is made of a descriptor.

use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair, sockopt};

use crate::reader::Source;
use crate::writer::Sink;
use crate::{ChannelError, Reader, Result, Stop, Writer};

/// What a migration runs over.
///
/// The halves are separate values that may live in different threads. They do not promise that
/// one descriptor is behind both, or any: a channel with TLS will look the same.
#[derive(Debug)]
pub enum Channel {
    /// Both directions: a socket or a command.
    TwoWay(Reader, Writer),
    /// Can only be read: a pipe or a file.
    In(Reader),
    /// Can only be written.
    Out(Writer),
}

/// Which half of a channel its user cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A destination reads.
    Incoming,
    /// A source writes.
    Outgoing,
}

impl Channel {
    /// A channel over a descriptor that was handed in, for example by QMP's `getfd`. Sockets are
    /// two-way; pipes are what their access mode says; files only go in the needed direction, from
    /// their current position on. The descriptor's flags are not touched. `peer` is what messages
    /// call it.
    ///
    /// Fails if the descriptor does not go in `direction`, is a directory, a listening socket or
    /// no stream socket.
    pub fn from_fd(
        fd: OwnedFd,
        direction: Direction,
        peer: impl Into<String>,
        stop: &Stop,
    ) -> Result<Self> {
        let peer = peer.into();
        let kind = Kind::of(fd.as_fd(), &peer)?;
        let flags = fcntl_getfl(&fd).map_err(|errno| ChannelError::io("look at", &peer, errno))?;
        let mode = flags & OFlags::RWMODE;
        let (readable, writable) = match kind {
            Kind::Socket => (true, true),
            Kind::Pipe => (mode != OFlags::WRONLY, mode != OFlags::RDONLY),
            Kind::File => (
                mode != OFlags::WRONLY && direction == Direction::Incoming,
                mode != OFlags::RDONLY && direction == Direction::Outgoing,
            ),
        };
        match direction {
            Direction::Incoming if !readable => {
                return Err(ChannelError::unsuitable(peer, "it cannot be read"));
            }
            Direction::Outgoing if !writable => {
                return Err(ChannelError::unsuitable(peer, "it cannot be written"));
            }
            _ => {}
        }
        let fd = Arc::new(fd);
        Ok(match (readable, writable) {
            (true, true) => Self::TwoWay(
                Reader::new(Source::over(kind, Arc::clone(&fd)), peer.clone(), stop),
                Writer::new(Sink::over(kind, fd), peer, stop),
            ),
            (true, false) => Self::In(Reader::new(Source::over(kind, fd), peer, stop)),
            _ => Self::Out(Writer::new(Sink::over(kind, fd), peer, stop)),
        })
    }

    /// Two ends of a channel inside this process.
    pub fn pair(first: &Stop, second: &Stop) -> Result<(Self, Self)> {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|errno| ChannelError::io("create", "a socket pair", errno))?;
        Ok((
            Self::over_socket(a, "the other end".to_owned(), first),
            Self::over_socket(b, "the other end".to_owned(), second),
        ))
    }

    /// The halves there are.
    #[must_use]
    pub fn split(self) -> (Option<Reader>, Option<Writer>) {
        match self {
            Self::TwoWay(reader, writer) => (Some(reader), Some(writer)),
            Self::In(reader) => (Some(reader), None),
            Self::Out(writer) => (None, Some(writer)),
        }
    }

    /// What messages call the other side.
    #[must_use]
    pub fn peer(&self) -> &str {
        match self {
            Self::TwoWay(reader, _) | Self::In(reader) => reader.peer(),
            Self::Out(writer) => writer.peer(),
        }
    }

    pub(crate) fn over_socket(fd: OwnedFd, peer: String, stop: &Stop) -> Self {
        let fd = Arc::new(fd);
        Self::TwoWay(
            Reader::new(
                Source::over(Kind::Socket, Arc::clone(&fd)),
                peer.clone(),
                stop,
            ),
            Writer::new(Sink::over(Kind::Socket, fd), peer, stop),
        )
    }

    /// A channel over standard input and output, or whatever `input` and `output` are. The way
    /// back exists if it is a pipe or a socket: nothing comes back from a file or a terminal.
    pub(crate) fn over_stdio(
        input: OwnedFd,
        output: OwnedFd,
        direction: Direction,
        stop: &Stop,
    ) -> Result<Self> {
        let (forth, back) = match direction {
            Direction::Incoming => (&input, &output),
            Direction::Outgoing => (&output, &input),
        };
        if forth.is_terminal() {
            return Err(ChannelError::unsuitable(
                "-",
                "a migration stream does not go through a terminal",
            ));
        }
        let answers = carries_answers(back.as_fd());
        let reader = |fd: OwnedFd| -> Result<Reader> {
            let kind = Kind::of(fd.as_fd(), "standard input")?;
            let source = Source::over(kind, Arc::new(fd));
            Ok(Reader::new(source, "standard input".to_owned(), stop))
        };
        let writer = |fd: OwnedFd| -> Result<Writer> {
            let kind = Kind::of(fd.as_fd(), "standard output")?;
            let sink = Sink::over(kind, Arc::new(fd));
            Ok(Writer::new(sink, "standard output".to_owned(), stop))
        };
        Ok(match direction {
            _ if answers => Self::TwoWay(reader(input)?, writer(output)?),
            Direction::Incoming => Self::In(reader(input)?),
            Direction::Outgoing => Self::Out(writer(output)?),
        })
    }
}

fn carries_answers(fd: BorrowedFd<'_>) -> bool {
    fstat(fd).is_ok_and(|stat| {
        matches!(
            FileType::from_raw_mode(stat.st_mode),
            FileType::Fifo | FileType::Socket
        )
    })
}

/// How a descriptor has to be used so that it never waits outside of `poll`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// MSG_DONTWAIT.
    Socket,
    /// Regular files and block devices: a disk call, which is allowed to wait.
    File,
    /// Everything else: RWF_NOWAIT, or poll first.
    Pipe,
}

impl Kind {
    pub(crate) fn of(fd: BorrowedFd<'_>, peer: &str) -> Result<Self> {
        let failed = |errno| ChannelError::io("look at", peer, errno);
        let stat = fstat(fd).map_err(failed)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Err(ChannelError::unsuitable(peer, "it is a directory")),
            FileType::RegularFile | FileType::BlockDevice => Ok(Self::File),
            FileType::Socket => {
                if sockopt::socket_type(fd).map_err(failed)? != SocketType::STREAM {
                    return Err(ChannelError::unsuitable(peer, "it is no stream socket"));
                }
                if sockopt::socket_acceptconn(fd).map_err(failed)? {
                    return Err(ChannelError::unsuitable(
                        peer,
                        "it is a listening socket, not a connected one",
                    ));
                }
                Ok(Self::Socket)
            }
            _ => Ok(Self::Pipe),
        }
    }
}

/// How many bytes went through a half. Clones count the same half, from any thread.
#[derive(Clone, Debug, Default)]
pub struct Counter {
    bytes: Arc<AtomicU64>,
}

impl Counter {
    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}
