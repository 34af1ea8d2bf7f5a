//! The command behind an `exec:` channel.

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::reader::Source;
use crate::wait::{Patience, Ready, poll_until};
use crate::writer::Sink;
use crate::{Channel, ChannelError, Reader, Result, Stop, Writer};

/// How long a command that has closed its end may take to exit before nobody asks any more.
const GRACE: Duration = Duration::from_secs(1);

/// Size asked for the pipes to and from a command, in bytes; the kernel may give less.
const PIPE_BYTES: usize = 1 << 20;

/// A running command. When both halves are gone it gets a second to end by itself, then a TERM
/// signal (at once if the channel was stopped), then a KILL signal; it is always reaped.
#[derive(Debug)]
pub(crate) struct Command {
    peer: String,
    stop: Stop,
    /// Readable once the command has ended.
    ended: OwnedFd,
    child: Mutex<Child>,
}

impl Command {
    /// Run `command` in a shell and make its standard input and output a channel. Its standard
    /// error stays ours, and it stays in our process group, so that `ssh` can ask for a password.
    pub(crate) fn open(command: &str, peer: String, stop: &Stop) -> Result<Channel> {
        let failed = |source| ChannelError::io("run", &peer, source);
        let mut child = std::process::Command::new("/bin/sh")
            .arg("-c")
            .arg(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let ended = Pid::from_raw(i32::try_from(child.id()).unwrap_or(0))
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
        let (ended, stdin, stdout) = match (ended, stdin, stdout) {
            (Ok(ended), Some(stdin), Some(stdout)) => (ended, stdin, stdout),
            (ended, ..) => {
                // Without its pipes it could wait for ever.
                let _ = child.kill();
                let _ = child.wait();
                let errno = ended.err().unwrap_or(rustix::io::Errno::BADF);
                return Err(failed(errno.into()));
            }
        };
        let (stdin, stdout) = (OwnedFd::from(stdin), OwnedFd::from(stdout));
        for pipe in [&stdin, &stdout] {
            // Only faster; a user over the pipe quota is refused.
            let _ = rustix::pipe::fcntl_setpipe_size(pipe, PIPE_BYTES);
        }
        let command = Arc::new(Self {
            peer: peer.clone(),
            stop: stop.clone(),
            ended,
            child: Mutex::new(child),
        });
        let source = Source::Command {
            pipe: Box::new(Source::Pipe {
                fd: Arc::new(stdout),
                nowait: true,
            }),
            command: Arc::clone(&command),
        };
        let sink = Sink::Command {
            pipe: Box::new(Sink::Pipe {
                fd: Arc::new(stdin),
                nowait: true,
            }),
            command,
        };
        Ok(Channel::TwoWay(
            Reader::new(source, peer.clone(), stop),
            Writer::new(sink, peer, stop),
        ))
    }

    /// The command has closed its end: fail if it has failed. One that lives on is left alone.
    pub(crate) fn check_after_end(&self, patience: &Patience<'_>) -> Result<()> {
        match poll_until(
            self.ended.as_fd(),
            PollFlags::IN,
            Some(&self.stop),
            Some(Instant::now() + GRACE),
        ) {
            Ok(Ready::Yes) => self.check_status(),
            Ok(Ready::Stopped) => Err(ChannelError::Stopped),
            Ok(Ready::TimedOut) => Ok(()),
            Err(errno) => Err(patience.failed(errno)),
        }
    }

    /// Wait for its end and fail if it has failed.
    pub(crate) fn check_end(&self, patience: &Patience<'_>) -> Result<()> {
        patience.wait(self.ended.as_fd(), PollFlags::IN)?;
        self.check_status()
    }

    fn check_status(&self) -> Result<()> {
        match self.try_wait() {
            Some(status) if !status.success() => Err(ChannelError::CommandFailed {
                peer: self.peer.clone(),
                status,
            }),
            _ => Ok(()),
        }
    }

    fn try_wait(&self) -> Option<ExitStatus> {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        child.try_wait().ok().flatten()
    }

    fn ends_within(&self, patience: Duration) -> bool {
        let deadline = Some(Instant::now() + patience);
        matches!(
            poll_until(self.ended.as_fd(), PollFlags::IN, None, deadline),
            Ok(Ready::Yes)
        )
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        let stopped = self.stop.is_triggered();
        if !(self.ends_within(if stopped { Duration::ZERO } else { GRACE })) {
            let _ = pidfd_send_signal(&self.ended, Signal::TERM);
            if !self.ends_within(GRACE) {
                let _ = pidfd_send_signal(&self.ended, Signal::KILL);
                let _ = self.ends_within(GRACE);
            }
        }
        match self.try_wait() {
            Some(status) if status.success() => {}
            Some(status) => tracing::debug!(peer = %self.peer, %status, "command ended"),
            None => tracing::warn!(peer = %self.peer, "command cannot be killed"),
        }
    }
}
