//! A connected socket on which bytes and descriptors travel. Waits only in `poll`, with a stop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmferry_channel::{ChannelError, Stop, recv_with_fds, send_with_fds};

/// One end of a QMP connection. Two threads may use it, one for each direction.
#[derive(Debug)]
pub(crate) struct Wire {
    socket: OwnedFd,
    peer: String,
    stop: Stop,
}

impl Wire {
    pub(crate) fn new(socket: OwnedFd, peer: String, stop: Stop) -> Self {
        Self { socket, peer, stop }
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    pub(crate) fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Bytes as they come, and the descriptors that came with them; 0 at the end of the stream.
    pub(crate) fn receive(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        deadline: Option<Instant>,
    ) -> Result<usize, ChannelError> {
        const OPERATION: &str = "read from";
        let started = Instant::now();
        loop {
            match recv_with_fds(&self.socket, buf, fds) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(self.failed(OPERATION, error)),
                Ok(received) => return Ok(received),
            }
            self.wait(PollFlags::IN, OPERATION, started, deadline)?;
        }
    }

    /// Send all bytes; the descriptors go with the first.
    pub(crate) fn send(
        &self,
        mut bytes: &[u8],
        mut fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        const OPERATION: &str = "write to";
        let started = Instant::now();
        while !bytes.is_empty() {
            match send_with_fds(&self.socket, bytes, fds) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::OUT, OPERATION, started, deadline)?;
                }
                Err(error) => return Err(self.failed(OPERATION, error)),
                Ok(sent) => {
                    fds = &[];
                    bytes = bytes.get(sent..).unwrap_or_default();
                }
            }
        }
        Ok(())
    }

    fn wait(
        &self,
        events: PollFlags,
        operation: &'static str,
        started: Instant,
        deadline: Option<Instant>,
    ) -> Result<(), ChannelError> {
        loop {
            if self.stop.is_triggered() {
                return Err(ChannelError::Stopped);
            }
            let patience =
                deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if patience == Some(Duration::ZERO) {
                return Err(ChannelError::TimedOut {
                    operation,
                    peer: self.peer.clone(),
                    after: started.elapsed(),
                });
            }
            // A wait too long for the kernel's clock is a wait for ever.
            let timeout = patience.and_then(|patience| Timespec::try_from(patience).ok());
            let mut fds = [
                PollFd::from_borrowed_fd(self.socket.as_fd(), events),
                PollFd::from_borrowed_fd(self.stop.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) if self.stop.is_triggered() => return Err(ChannelError::Stopped),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(self.failed("wait for", errno.into())),
            }
        }
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> ChannelError {
        let peer = self.peer.clone();
        match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                ChannelError::Closed { operation, peer }
            }
            _ => ChannelError::Io {
                operation,
                peer,
                source,
            },
        }
    }
}
