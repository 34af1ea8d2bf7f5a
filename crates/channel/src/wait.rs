//! The one place where this crate waits for a descriptor.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::{ChannelError, Result, Stop};

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// The descriptor is ready, or has an error to tell.
    Yes,
    Stopped,
    TimedOut,
}

/// Wait until `fd` is ready for `events`, the stop event is triggered, or the deadline has passed.
/// A stop wins over readiness.
pub(crate) fn poll_until(
    fd: BorrowedFd<'_>,
    events: PollFlags,
    stop: Option<&Stop>,
    deadline: Option<Instant>,
) -> rustix::io::Result<Ready> {
    loop {
        if stop.is_some_and(Stop::is_triggered) {
            return Ok(Ready::Stopped);
        }
        let patience = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let mut fds = [
            PollFd::from_borrowed_fd(fd, events),
            PollFd::from_borrowed_fd(stop.map_or(fd, AsFd::as_fd), PollFlags::IN),
        ];
        let used = if stop.is_some() { 2 } else { 1 };
        // A wait too long for the kernel's clock is a wait for ever.
        let timeout = patience.and_then(|patience| Timespec::try_from(patience).ok());
        match poll(&mut fds[..used], timeout.as_ref()) {
            Ok(_) if stop.is_some_and(Stop::is_triggered) => return Ok(Ready::Stopped),
            Ok(0) if patience == Some(Duration::ZERO) => return Ok(Ready::TimedOut),
            Ok(_) if !fds[0].revents().is_empty() => return Ok(Ready::Yes),
            // Woken for nothing, or just before the deadline: look again.
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// What an operation that may wait needs to know.
#[derive(Clone, Copy)]
pub(crate) struct Patience<'a> {
    operation: &'static str,
    peer: &'a str,
    stop: &'a Stop,
    deadline: Option<Instant>,
    started: Option<Instant>,
}

impl<'a> Patience<'a> {
    /// An operation that starts now.
    pub(crate) fn new(
        operation: &'static str,
        peer: &'a str,
        stop: &'a Stop,
        deadline: Option<Instant>,
    ) -> Self {
        Self {
            operation,
            peer,
            stop,
            deadline,
            // Saves the clock on the fast path.
            started: deadline.map(|_| Instant::now()),
        }
    }

    /// Fails once the stop event is triggered.
    pub(crate) fn check(&self) -> Result<()> {
        if self.stop.is_triggered() {
            return Err(ChannelError::Stopped);
        }
        Ok(())
    }

    /// Wait until `fd` is ready for `events`.
    pub(crate) fn wait(&self, fd: BorrowedFd<'_>, events: PollFlags) -> Result<()> {
        match poll_until(fd, events, Some(self.stop), self.deadline) {
            Ok(Ready::Yes) => Ok(()),
            Ok(Ready::Stopped) => Err(ChannelError::Stopped),
            Ok(Ready::TimedOut) => Err(self.timed_out()),
            Err(errno) => Err(self.failed(errno)),
        }
    }

    /// Wait until `instant`, which is an error if the deadline comes first.
    pub(crate) fn sleep_until(&self, instant: Instant) -> Result<()> {
        let end = self
            .deadline
            .map_or(instant, |deadline| deadline.min(instant));
        if self.stop.wait_until(Some(end)) {
            return Err(ChannelError::Stopped);
        }
        if end < instant {
            return Err(self.timed_out());
        }
        Ok(())
    }

    pub(crate) fn timed_out(&self) -> ChannelError {
        ChannelError::TimedOut {
            operation: self.operation,
            peer: self.peer.to_owned(),
            after: self
                .started
                .map_or(Duration::ZERO, |started| started.elapsed()),
        }
    }

    pub(crate) fn failed(&self, errno: Errno) -> ChannelError {
        ChannelError::io(self.operation, self.peer, errno)
    }
}
