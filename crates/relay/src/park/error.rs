//! Why a machine could not be parked.

use std::io;

use vmferry_channel::ChannelError;
use vmferry_image::ImageError;
use vmferry_inspect::WalkError;
use vmferry_stream::{DecodeError, Fault};

pub use super::memory::MemoryFault;

/// A machine could not be parked.
#[derive(Debug, thiserror::Error)]
pub enum ParkError {
    /// The stream is broken, or ended too early.
    #[error(transparent)]
    Stream(#[from] DecodeError),
    /// The stream holds something that cannot be parked.
    #[error("byte {offset}: {reason}")]
    Refused {
        /// Where in the stream.
        offset: u64,
        /// What, and what can be done.
        reason: String,
    },
    /// A record about memory is wrong.
    #[error("byte {offset}: {fault}")]
    Memory {
        /// Where in the stream.
        offset: u64,
        /// What is wrong.
        fault: MemoryFault,
    },
    /// The package of a postcopy is broken.
    #[error("byte {offset}: the postcopy's package is broken: {source}")]
    Package {
        /// Where it starts in the stream.
        offset: u64,
        /// What is wrong; its offsets are those of the package.
        source: WalkError,
    },
    /// The devices behind the memory are broken.
    #[error("the devices at the end of the stream are broken: {0}")]
    Devices(WalkError),
    /// The postcopy has ended, but pages are missing.
    #[error("the postcopy has ended, but {pages} pages of memory have not come")]
    Missing {
        /// How many.
        pages: u64,
    },
    /// No page has come although there is memory.
    #[error(
        "byte {offset}: no page of {total_bytes} bytes of memory has come: the source sends them over other \
         connections (multifd); say --multifd-channels here, or turn multifd off there"
    )]
    NoPages {
        /// Where in the stream the memory ended.
        offset: u64,
        /// How much there is.
        total_bytes: u64,
    },
    /// The file could not be written.
    #[error("the file cannot be written (byte {offset}): {source}")]
    File {
        /// Where in the file.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The index could not be made.
    #[error(transparent)]
    Index(#[from] ImageError),
    /// The channel failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// More was pushed after a failure.
    #[error("the stream has failed before")]
    FailedBefore,
    /// The machine's devices have come by postcopy, but not all of it, and nobody waits for the rest any
    /// more. It did not run here.
    #[error(
        "{source}; the guest is not parked, and its source is in the middle of a postcopy ({missing_pages} \
         pages had not come): {}",
        if *.source_told {
            "it was told of the failure. QEMU 10 lets the guest go on there, QEMU 7.2 keeps it in \
             'postcopy-paused'"
        } else {
            "it keeps the guest in 'postcopy-paused'"
        }
    )]
    HalfHere {
        /// Why it ended.
        source: Box<ParkError>,
        /// Pages that are missing.
        missing_pages: u64,
        /// SHUT 1 was sent.
        source_told: bool,
    },
}

/// The first bytes of a multifd channel, where a stream was expected.
const MULTIFD_MAGIC: u32 = 0x1122_3344;

impl ParkError {
    /// An error of the decoder, said better where more is known.
    pub(super) fn of_stream(error: DecodeError) -> Self {
        match error.fault {
            Fault::BadMagic(MULTIFD_MAGIC) => Self::Refused {
                offset: error.offset,
                reason: "this is one of several connections (multifd), not the first; say \
                         --multifd-channels here, or turn multifd off at the source"
                    .to_owned(),
            },
            _ => Self::Stream(error),
        }
    }

    /// Would another connection help, when the machine's devices have come already?
    pub(super) fn is_of_connection(&self) -> bool {
        match self {
            Self::Stream(_) | Self::Memory { .. } | Self::Refused { .. } => true,
            Self::Channel(error) => !error.is_stopped(),
            Self::Package { .. }
            | Self::Devices(_)
            | Self::Missing { .. }
            | Self::NoPages { .. }
            | Self::File { .. }
            | Self::Index(_)
            | Self::FailedBefore
            | Self::HalfHere { .. } => false,
        }
    }
}
