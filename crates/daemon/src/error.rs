//! Why a command was not carried out, and what QMP calls that.

use std::io;

use vmferry_channel::{ChannelError, UriError};
use vmferry_disk::{DiskError, InUse};
use vmferry_migration::{RecordError, RequestError, SourceFailure};
use vmferry_qmp::{CommandError, ErrorClass};
use vmferry_relay::announce::TooMany;
use vmferry_snapshot::SnapshotError;

/// A command was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// There is no disk of this name.
    #[error("Device '{0}' not found")]
    NoSuchDisk(String),
    /// The disk exists, but not for this.
    #[error("disk '{disk}' {reason}")]
    UnsuitableDisk {
        /// Its name.
        disk: String,
        /// Why not.
        reason: String,
    },
    /// Another state is needed.
    #[error("{0}")]
    NotNow(String),
    /// An argument cannot be used.
    #[error("{0}")]
    Argument(String),
    /// The address cannot be understood.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// A channel or listener failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A migration could not be started.
    #[error(transparent)]
    Source(#[from] SourceFailure),
    /// A migration cannot follow the request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// A record cannot be read or written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A disk is in use.
    #[error("disk '{disk}' is {source}")]
    InUse {
        /// Its name.
        disk: String,
        /// By whom.
        source: InUse,
    },
    /// A disk failed.
    #[error("disk '{disk}': {source}")]
    Disk {
        /// Its name.
        disk: String,
        /// What the host said.
        source: DiskError,
    },
    /// A snapshot could not be taken, loaded or deleted.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// No further announcement is possible now.
    #[error(transparent)]
    Announcements(#[from] TooMany),
    /// The host has no thread or descriptor left.
    #[error("out of resources: {0}")]
    Resources(#[from] io::Error),
    /// The answer could not be written down.
    #[error("internal error: {0}")]
    Answer(#[from] serde_json::Error),
    /// Something about the client itself.
    #[error(transparent)]
    Client(#[from] CommandError),
}

/// The one place where errors become QMP's classes.
impl From<DaemonError> for CommandError {
    fn from(error: DaemonError) -> Self {
        let class = match &error {
            DaemonError::NoSuchDisk(_) => ErrorClass::DeviceNotFound,
            DaemonError::Client(error) => error.class,
            DaemonError::UnsuitableDisk { .. }
            | DaemonError::NotNow(_)
            | DaemonError::Argument(_)
            | DaemonError::Uri(_)
            | DaemonError::Channel(_)
            | DaemonError::Source(_)
            | DaemonError::Request(_)
            | DaemonError::Record(_)
            | DaemonError::InUse { .. }
            | DaemonError::Disk { .. }
            | DaemonError::Snapshot(_)
            | DaemonError::Announcements(_)
            | DaemonError::Resources(_)
            | DaemonError::Answer(_) => ErrorClass::GenericError,
        };
        Self::new(class, error.to_string())
    }
}
