//! The half that is read.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::PollFlags;
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::RecvFlags;

use crate::channel::Kind;
use crate::command::Command;
use crate::wait::Patience;
use crate::writer::{CURRENT_POSITION, PIECE_BYTES_MAX, lacks_nowait};
use crate::{ChannelError, Counter, Result, Stop};

const OPERATION: &str = "read from";

/// The half of a channel that is read. Waits only together with its stop event.
#[derive(Debug)]
pub struct Reader {
    source: Source,
    peer: String,
    stop: Stop,
    counter: Counter,
}

#[derive(Debug)]
pub(crate) enum Source {
    Socket(Arc<OwnedFd>),
    File(Arc<OwnedFd>),
    Pipe {
        fd: Arc<OwnedFd>,
        /// The kernel can read this without waiting (RWF_NOWAIT).
        nowait: bool,
    },
    /// The standard output of a command. Fields drop in order: the pipe closes first.
    Command {
        pipe: Box<Source>,
        command: Arc<Command>,
    },
}

impl Reader {
    pub(crate) fn new(source: Source, peer: String, stop: &Stop) -> Self {
        Self {
            source,
            peer,
            stop: stop.clone(),
            counter: Counter::default(),
        }
    }

    /// What messages call the other side.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// The stop event of this half.
    #[must_use]
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Counts the bytes that were read.
    #[must_use]
    pub fn counter(&self) -> &Counter {
        &self.counter
    }

    /// Read at least one byte into `buf`; 0 is the end of the stream (or an empty `buf`).
    ///
    /// The end of a command that failed is [`ChannelError::CommandFailed`].
    pub fn read(&mut self, buf: &mut [u8]) -> Result<usize> {
        self.read_until(buf, None)
    }

    /// [`Reader::read`], but [`ChannelError::TimedOut`] if nothing comes before `deadline`. What is
    /// there already is read even if the deadline has passed.
    pub fn read_until(&mut self, buf: &mut [u8], deadline: Option<Instant>) -> Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let length = buf.len().min(PIECE_BYTES_MAX);
        let patience = Patience::new(OPERATION, &self.peer, &self.stop, deadline);
        let got = self.source.read(&mut buf[..length], &patience)?;
        self.counter.add(got);
        Ok(got)
    }

    /// Fill `buf`. [`ChannelError::Ended`] if the stream ends before.
    pub fn read_exact(&mut self, buf: &mut [u8]) -> Result<()> {
        self.read_exact_until(buf, None)
    }

    /// [`Reader::read_exact`], but [`ChannelError::TimedOut`] if `buf` is not full at `deadline`.
    pub fn read_exact_until(&mut self, buf: &mut [u8], deadline: Option<Instant>) -> Result<()> {
        let mut got = 0;
        while got < buf.len() {
            match self.read_until(&mut buf[got..], deadline)? {
                0 => {
                    return Err(ChannelError::Ended {
                        peer: self.peer.clone(),
                        got,
                        wanted: buf.len(),
                    });
                }
                more => got += more,
            }
        }
        Ok(())
    }
}

impl Source {
    pub(crate) fn over(kind: Kind, fd: Arc<OwnedFd>) -> Self {
        match kind {
            Kind::Socket => Self::Socket(fd),
            Kind::File => Self::File(fd),
            Kind::Pipe => Self::Pipe { fd, nowait: true },
        }
    }

    fn read(&mut self, buf: &mut [u8], patience: &Patience<'_>) -> Result<usize> {
        if let Self::Command { pipe, command } = self {
            return match pipe.read(buf, patience) {
                Ok(0) => command.check_after_end(patience).map(|()| 0),
                other => other,
            };
        }
        loop {
            patience.check()?;
            let (fd, outcome) = match self {
                Self::Socket(fd) => {
                    let outcome = rustix::net::recv(&*fd, &mut *buf, RecvFlags::DONTWAIT);
                    (fd, outcome.map(|(got, _)| got))
                }
                Self::File(fd) => {
                    let outcome = rustix::io::read(&*fd, &mut *buf);
                    (fd, outcome)
                }
                Self::Pipe { fd, nowait: true } => {
                    let outcome = rustix::io::preadv2(
                        &*fd,
                        &mut [IoSliceMut::new(buf)],
                        CURRENT_POSITION,
                        ReadWriteFlags::NOWAIT,
                    );
                    (fd, outcome)
                }
                Self::Pipe { fd, nowait: false } => {
                    // What poll has seen cannot go away: nobody else reads this pipe.
                    patience.wait(fd.as_fd(), PollFlags::IN)?;
                    let outcome = rustix::io::read(&*fd, &mut *buf);
                    (fd, outcome)
                }
                Self::Command { .. } => return Ok(0),
            };
            match outcome {
                Ok(got) => return Ok(got),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => patience.wait(fd.as_fd(), PollFlags::IN)?,
                Err(errno) if lacks_nowait(errno) && self.forget_nowait() => {}
                Err(errno) => return Err(patience.failed(errno)),
            }
        }
    }

    /// True if there is another way to try.
    fn forget_nowait(&mut self) -> bool {
        match self {
            Self::Pipe { nowait, .. } => std::mem::replace(nowait, false),
            _ => false,
        }
    }
}
