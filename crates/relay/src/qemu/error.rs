//! Why a QEMU did not do what it was asked to do.

use vmferry_qmp::ClientError;
use vmferry_qmp::types::RunState;

/// A QEMU did not do what it was asked to do.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// It said no, and why.
    #[error("QEMU at {peer}: {command}: {description}")]
    Refused {
        /// Its socket.
        peer: String,
        /// The command.
        command: String,
        /// What it said.
        description: String,
    },
    /// Its monitor cannot be talked to, or not any more.
    #[error(transparent)]
    Client(ClientError),
    /// An answer is not what the schema says.
    #[error("QEMU at {peer}: the answer to {command} is not understood: {reason}")]
    NotUnderstood {
        /// Its socket.
        peer: String,
        /// The command.
        command: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The host does not let it take a postcopy in.
    #[error(
        "QEMU at {peer} cannot take a postcopy in: {description}; if that is for want of permission \
         for userfaultfd: run it as root (CAP_SYS_PTRACE), or allow everybody with 'sysctl \
         vm.unprivileged_userfaultfd=1', or give its user access to /dev/userfaultfd (Linux 6.1, \
         QEMU 8.1)"
    )]
    NoPostcopy {
        /// Its socket.
        peer: String,
        /// What it said.
        description: String,
    },
    /// It does not wait for a migration.
    #[error("QEMU at {peer} does not wait for a migration: it is '{state}', not 'inmigrate'")]
    NotWaiting {
        /// Its socket.
        peer: String,
        /// How it is.
        state: RunState,
    },
    /// It has no such capability, or no such parameter.
    #[error("QEMU at {peer} (version {version}) does not know {what} '{name}'")]
    Unknown {
        /// Its socket.
        peer: String,
        /// Its version.
        version: super::Version,
        /// `capability` or `parameter`.
        what: &'static str,
        /// Its name.
        name: String,
    },
}

impl QemuError {
    /// It answered: what it was asked for has not changed anything.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::Client(_))
    }

    /// Of `client`'s error, at `peer`.
    pub(super) fn of(peer: &str, error: ClientError) -> Self {
        match error {
            ClientError::Refused {
                command,
                description,
                ..
            } => Self::Refused {
                peer: peer.to_owned(),
                command,
                description,
            },
            error => Self::Client(error),
        }
    }
}
