//! What goes wrong with an image.

use std::io;

/// An image can't be opened, made, read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host refused to read or write the file.
    #[error("cannot {operation} the {structure} at byte {offset} of the image: {source}")]
    Storage {
        /// `read`, `write`, `flush`, …
        operation: &'static str,
        /// What is there.
        structure: &'static str,
        /// Where, in the image file.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The magic is missing.
    #[error("not a qcow2 image: it does not start with the qcow2 magic")]
    NotQcow2,
    /// The file ends inside of the header.
    #[error("the header ends at byte {length}: the file is too short")]
    ShortHeader {
        /// Length of the file.
        length: u64,
    },
    /// A field of the header has a value that the format, or we, do not allow.
    #[error("header field {field} (byte {offset}) is {value}, must be {bound}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// Where it is, in the image file.
        offset: u64,
        /// What it says.
        value: u64,
        /// What it may say.
        bound: &'static str,
    },
    /// The image needs something that this implementation does not have.
    #[error("the image uses {feature}, which is not supported")]
    Unsupported {
        /// The feature, by name.
        feature: String,
    },
    /// A structure contradicts the format.
    #[error("{structure} at byte {offset} of the image is broken: {problem}")]
    Corrupt {
        /// Which one.
        structure: &'static str,
        /// Where it is, in the image file.
        offset: u64,
        /// What is wrong.
        problem: String,
    },
    /// Somebody found the image broken before; it may only be read until it was repaired.
    #[error("the image is marked as corrupt; it must be repaired before it is written to")]
    MarkedCorrupt,
    /// A write to an image that was opened for reading.
    #[error("the image is open for reading only")]
    ReadOnly,
    /// The backing file is missing, or something about it is not allowed.
    #[error("backing file {name:?}: {problem}")]
    Backing {
        /// What the header says.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// An option of an image to be made, or a new size, is not allowed.
    #[error("{option} is {value}, must be {bound}")]
    Option {
        /// Which one.
        option: &'static str,
        /// What was asked for.
        value: u64,
        /// What it may be.
        bound: &'static str,
    },
    /// A table would become longer than its limit.
    #[error("the {structure} would need {wanted} bytes, at most {max} are possible")]
    TooLarge {
        /// Which one.
        structure: &'static str,
        /// What it would need.
        wanted: u64,
        /// Its limit.
        max: u64,
    },
    /// A cluster is used as often as its refcount can say.
    #[error("the refcount of the cluster at byte {offset} of the image can't be more than {max}")]
    RefcountOverflow {
        /// Which cluster.
        offset: u64,
        /// The largest value of the image's width.
        max: u64,
    },
    /// The range is not on the disk.
    #[error("bytes {offset} to {end} are past the end of the disk ({length} bytes)")]
    PastEnd {
        /// First byte.
        offset: u64,
        /// One past the last byte.
        end: u64,
        /// Length of the disk.
        length: u64,
    },
    /// The operation would have to write zeroes one by one, and the caller did not want that.
    #[error("no quick way to write zeroes there")]
    NotFast,
    /// An earlier flush failed: what was lost then can't be told.
    #[error("an earlier flush failed, nothing more can be made durable: {0}")]
    FlushFailed(io::ErrorKind),
    /// No snapshot has this id, and none has this name.
    #[error("there is no snapshot {name:?} in the image")]
    NoSuchSnapshot {
        /// What was looked for.
        name: String,
    },
    /// A snapshot has this id or this name.
    #[error("there is a snapshot {name:?} in the image already")]
    SnapshotExists {
        /// Which one.
        name: String,
    },
    /// The disk's length or its snapshots changed while a VM state was written, or somebody else
    /// began to write one.
    #[error("the VM state was dropped: the image or its snapshots changed while it was written")]
    VmStateDropped,
    /// The file can't be opened or made.
    #[error(transparent)]
    Open(#[from] vmferry_disk::OpenError),
    /// The backing device failed.
    #[error("backing file: {0}")]
    BackingIo(#[source] vmferry_disk::DiskError),
}

impl Error {
    pub(crate) fn storage(
        operation: &'static str,
        structure: &'static str,
        offset: u64,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Storage {
            operation,
            structure,
            offset,
            source,
        }
    }

    pub(crate) fn corrupt(
        structure: &'static str,
        offset: u64,
        problem: impl Into<String>,
    ) -> Self {
        Self::Corrupt {
            structure,
            offset,
            problem: problem.into(),
        }
    }

    /// For callers that know only the host's errors: those stay what they are, so that "no space"
    /// is still that.
    pub(crate) fn into_io(self) -> io::Error {
        let kind = match self {
            Self::Storage { source, .. } => return source,
            Self::BackingIo(error) => return error.source,
            Self::NotFast => io::ErrorKind::Unsupported,
            Self::ReadOnly => io::ErrorKind::PermissionDenied,
            Self::PastEnd { .. } => io::ErrorKind::InvalidInput,
            Self::TooLarge { .. } => io::ErrorKind::StorageFull,
            _ => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, self)
    }
}
