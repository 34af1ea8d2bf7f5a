//! What can go wrong with a channel.

use std::io;
use std::process::ExitStatus;
use std::time::Duration;

/// A channel operation failed.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The stop event was triggered.
    #[error("stopped")]
    Stopped,
    /// The deadline passed.
    #[error("{operation} {peer}: no progress within {}", seconds(*.after))]
    TimedOut {
        /// `connect to`, `read from`, `write to`, …
        operation: &'static str,
        /// The other side.
        peer: String,
        /// How long the operation had waited.
        after: Duration,
    },
    /// The stream ended inside a read of a known length.
    #[error("read from {peer}: the stream ended after {got} of {wanted} bytes")]
    Ended {
        /// The other side.
        peer: String,
        /// Bytes that came.
        got: usize,
        /// Bytes that were asked for.
        wanted: usize,
    },
    /// The other side is gone: broken pipe or connection reset.
    #[error("{operation} {peer}: the other side has closed the channel")]
    Closed {
        /// `read from` or `write to`.
        operation: &'static str,
        /// The other side.
        peer: String,
    },
    /// The command behind an `exec:` channel failed.
    #[error("{peer}: the command {}", how_it_ended(*.status))]
    CommandFailed {
        /// The address.
        peer: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// A running process listens on the socket already.
    #[error("listen on {address}: the address is in use by a running process")]
    InUse {
        /// The address.
        address: String,
    },
    /// The address cannot be used for this.
    #[error("{peer}: {reason}")]
    Unsuitable {
        /// The address.
        peer: String,
        /// Why not.
        reason: &'static str,
    },
    /// The host said no.
    #[error("{operation} {peer}: {source}")]
    Io {
        /// `connect to`, `read from`, `write to`, …
        operation: &'static str,
        /// The other side.
        peer: String,
        /// What the host said.
        source: io::Error,
    },
}

impl ChannelError {
    /// True for [`ChannelError::Stopped`].
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self, Self::Stopped)
    }

    /// The error for a failed call.
    pub(crate) fn io(operation: &'static str, peer: &str, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let peer = peer.to_owned();
        match source.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Self::Closed { operation, peer }
            }
            _ => Self::Io {
                operation,
                peer,
                source,
            },
        }
    }

    pub(crate) fn unsuitable(peer: impl Into<String>, reason: &'static str) -> Self {
        Self::Unsuitable {
            peer: peer.into(),
            reason,
        }
    }
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

fn how_it_ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended in an unknown way".to_owned(),
    }
}
