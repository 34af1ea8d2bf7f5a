//! SIGINT, SIGTERM and SIGHUP as bytes in a socket that a loop can poll.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

/// What somebody wants us to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signal {
    /// SIGINT or SIGTERM: end in order.
    Stop,
    /// SIGHUP: the terminal is gone.
    Hangup,
}

/// The signals that were sent to this process since [`Signals::new`].
///
/// Signals of one kind that come before the first was taken count once.
#[derive(Debug)]
pub(crate) struct Signals {
    stop: UnixStream,
    hangup: UnixStream,
}

impl Signals {
    /// From now on these signals end the process no more.
    pub(crate) fn new() -> io::Result<Self> {
        let stop = pipe_of(&[SIGINT, SIGTERM])?;
        let hangup = pipe_of(&[SIGHUP])?;
        Ok(Self { stop, hangup })
    }

    /// The signal that was sent, if one is sent within `patience` (`None`: wait for one).
    pub(crate) fn wait(&self, patience: Option<Duration>) -> io::Result<Option<Signal>> {
        self.wait_beside(&[], patience)
    }

    /// Like [`Signals::wait`], and return early when one of `others` can be read.
    pub(crate) fn wait_beside(
        &self,
        others: &[BorrowedFd<'_>],
        patience: Option<Duration>,
    ) -> io::Result<Option<Signal>> {
        let deadline = patience.map(|patience| Instant::now() + patience);
        loop {
            let mut fds: Vec<PollFd<'_>> = [self.stop.as_fd(), self.hangup.as_fd()]
                .iter()
                .chain(others)
                .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
                .collect();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map(timespec);
            match poll(&mut fds, timeout.as_ref()) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other.map(drop)?,
            }
            let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
            if ready(0) {
                return take(&self.stop).map(|()| Some(Signal::Stop));
            }
            if ready(1) {
                return take(&self.hangup).map(|()| Some(Signal::Hangup));
            }
            return Ok(None);
        }
    }
}

fn pipe_of(signals: &[i32]) -> io::Result<UnixStream> {
    let (read, write) = UnixStream::pair()?;
    read.set_nonblocking(true)?;
    for signal in signals {
        pipe::register(*signal, write.try_clone()?)?;
    }
    Ok(read)
}

/// Empty the pipe: what piled up is one wish.
fn take(mut pipe: &UnixStream) -> io::Result<()> {
    let mut bytes = [0; 64];
    loop {
        match pipe.read(&mut bytes) {
            Ok(count) if count == bytes.len() => {}
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

pub(crate) fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_arrive_by_kind_and_pile_up_as_one() {
        let signals = Signals::new().unwrap();
        assert_eq!(signals.wait(Some(Duration::ZERO)).unwrap(), None);
        for signal in [SIGHUP, SIGTERM, SIGINT] {
            signal_hook::low_level::raise(signal).unwrap();
        }
        assert_eq!(signals.wait(None).unwrap(), Some(Signal::Stop));
        assert_eq!(signals.wait(None).unwrap(), Some(Signal::Hangup));
        assert_eq!(signals.wait(Some(Duration::ZERO)).unwrap(), None);

        let (mut other, end) = UnixStream::pair().unwrap();
        io::Write::write_all(&mut other, b"x").unwrap();
        assert_eq!(signals.wait_beside(&[end.as_fd()], None).unwrap(), None);
    }
}
