//! Memory over more than one connection.

use clap::{Args, ValueEnum};
use vmferry_multifd::Compression;

/// QEMU's multifd.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct MultifdFlags {
    /// Memory travels over so many connections beside the main one (QEMU's capability multifd, on
    /// both sides)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) multifd_channels: Option<u8>,
    /// How it is compressed there; both sides must say the same [default: none]
    #[arg(long, value_name = "METHOD", requires = "multifd_channels")]
    pub(crate) multifd_compression: Option<CompressionFlag>,
}

/// Methods of compression.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum CompressionFlag {
    /// Pages as they are
    #[default]
    None,
    /// Deflate: slow, small
    Zlib,
    /// Zstandard
    Zstd,
}

impl CompressionFlag {
    /// QEMU's name for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

impl From<CompressionFlag> for Compression {
    fn from(flag: CompressionFlag) -> Self {
        match flag {
            CompressionFlag::None => Self::None,
            CompressionFlag::Zlib => Self::Zlib,
            CompressionFlag::Zstd => Self::Zstd,
        }
    }
}

impl MultifdFlags {
    pub(crate) fn compression(&self) -> CompressionFlag {
        self.multifd_compression.unwrap_or_default()
    }
}
