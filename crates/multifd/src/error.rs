//! What can go wrong between the connections and the plain stream.

use std::fmt;
use std::time::Duration;

use vmferry_channel::ChannelError;
use vmferry_stream::{DecodeError, Name};

use crate::packet::PacketFault;

/// A place in one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Number of the channel.
    pub channel: u8,
    /// Packets of this channel that came or went before.
    pub packet: u64,
    /// Byte of this connection at which the packet, or its pages, start; 64 is behind the handshake.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            channel,
            packet,
            offset,
        } = self;
        write!(
            f,
            "multifd channel {channel}, packet {packet}, byte {offset}"
        )
    }
}

/// A migration over several connections failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MultifdError {
    /// The stop event was triggered.
    #[error("stopped")]
    Stopped,
    /// From 1 to 255 channels are possible.
    #[error("multifd needs 1 to 255 channels, not 0")]
    NoChannels,
    /// Listening, accepting or connecting failed.
    #[error(transparent)]
    Connect(ChannelError),
    /// Not all connections came in time.
    #[error(
        "the source has opened {there} of {expected} multifd connections within {} s (is its number of channels the same?)",
        .patience.as_secs()
    )]
    Missing {
        /// Connections that are there, the main one included.
        there: usize,
        /// One more than there are channels.
        expected: usize,
        /// How long was waited after the first.
        patience: Duration,
    },
    /// An extra connection begins with something wrong.
    #[error("multifd connection from {peer}: {fault}")]
    Handshake {
        /// The other side.
        peer: String,
        /// What is wrong.
        fault: PacketFault,
    },
    /// A second main connection.
    #[error("the source has opened a second main connection, from {peer}")]
    SecondMain {
        /// The other side.
        peer: String,
    },
    /// A second connection of the same number.
    #[error("the source has opened multifd channel {channel} twice")]
    SecondChannel {
        /// The number.
        channel: u8,
    },
    /// The source has more channels.
    #[error("the source has a multifd channel {channel}, although {channels} channels were agreed")]
    SurplusChannel {
        /// Its number.
        channel: u8,
        /// How many there are here.
        channels: u8,
    },
    /// The connections belong to different guests.
    #[error("multifd channel {channel} says UUID {found}, not {expected}")]
    Uuid {
        /// Its number.
        channel: u8,
        /// What it says.
        found: Uuid,
        /// What was to be expected.
        expected: Uuid,
    },
    /// The main connection carries no migration stream.
    #[error("main connection: {0}")]
    Stream(#[from] DecodeError),
    /// The plain stream that is to be sent is none.
    #[error("stream to be sent: {0}")]
    Plain(DecodeError),
    /// The main connection broke.
    #[error("main connection: {0}")]
    Main(ChannelError),
    /// Something on the main connection that does not go together with multifd.
    #[error("byte {offset} of the main stream: {what} cannot travel over multifd")]
    Unsupported {
        /// Byte of the main stream, or of the plain one that is to be sent.
        offset: u64,
        /// What it is.
        what: Unsupported,
    },
    /// An extra connection broke.
    #[error("{at}: {source}")]
    Channel {
        /// Where.
        at: Place,
        /// How.
        source: ChannelError,
    },
    /// An extra connection ended too early.
    #[error("{at}: the source has closed the connection before the end of the migration")]
    ChannelEnded {
        /// Where.
        at: Place,
    },
    /// A packet is wrong.
    #[error("{at}: {fault}")]
    Packet {
        /// Where.
        at: Place,
        /// What is wrong.
        fault: PacketFault,
    },
    /// Whoever reads the plain stream has closed it, or it broke.
    #[error("plain stream: {0}")]
    Consumer(ChannelError),
    /// It was given up before its end, by whoever reads or writes the plain stream. Nobody is told this
    /// who knows why: `finish` is well then.
    #[error("the migration over multifd was given up before its end")]
    Abandoned,
    /// The rest of a stream was not taken.
    #[error("the destination has taken nothing for {} s, and bytes are left", .patience.as_secs())]
    Stalled {
        /// How long.
        patience: Duration,
    },
    /// A thread of ours died.
    #[error("a thread for multifd has panicked")]
    Panicked,
}

/// What does not go together with multifd.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unsupported {
    /// Pages in places of a file.
    MappedRam,
    /// A postcopy has begun.
    Postcopy,
    /// Pages as differences.
    Xbzrle,
    /// Pages compressed one by one (QEMU up to 9.0).
    CompressedPages,
    /// Two of them in one stream.
    SecondRamSection,
    /// A list of blocks in the middle of a migration.
    SecondBlockList,
    /// Pages before the first synchronisation.
    PageInSetup,
    /// A page that is not in its block.
    PageOutsideBlock(Name),
    /// Pages without an end.
    NoEnd,
    /// A synchronisation by a word although the sections synchronise.
    Flush,
    /// Sections with footers but no configuration, or the other way round.
    Footers {
        /// They have footers.
        found: bool,
    },
    /// A device in front of the pages whose end cannot be found.
    EarlyDevice(Name),
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MappedRam => f.write_str("a mapped-ram file"),
            Self::Postcopy => f.write_str("a postcopy"),
            Self::Xbzrle => f.write_str("an XBZRLE page"),
            Self::CompressedPages => f.write_str("a page compressed on its own"),
            Self::SecondRamSection => f.write_str("a second ram section"),
            Self::SecondBlockList => f.write_str("a second list of ram blocks"),
            Self::PageInSetup => f.write_str("a page before the end of the list of ram blocks"),
            Self::PageOutsideBlock(block) => {
                write!(f, "a page outside of ram block '{block}'")
            }
            Self::NoEnd => f.write_str("a ram section without its last part"),
            Self::Flush => f.write_str("a flush word besides a flush in each section"),
            Self::Footers { found: true } => {
                f.write_str("a stream without a configuration, but with section footers,")
            }
            Self::Footers { found: false } => {
                f.write_str("a stream with a configuration, but without section footers,")
            }
            Self::EarlyDevice(device) => {
                write!(
                    f,
                    "device '{device}' in front of the pages, of unknown length,"
                )
            }
        }
    }
}

/// A UUID as people write it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl MultifdError {
    /// True for [`MultifdError::Stopped`].
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        matches!(self, Self::Stopped)
    }

    /// Did whoever reads or writes the plain stream want no more of it?
    pub(crate) fn is_given_up(&self) -> bool {
        matches!(
            self,
            Self::Abandoned | Self::Consumer(ChannelError::Closed { .. })
        )
    }

    pub(crate) fn connect(error: ChannelError) -> Self {
        Self::or_stopped(error, Self::Connect)
    }

    pub(crate) fn main(error: ChannelError) -> Self {
        Self::or_stopped(error, Self::Main)
    }

    pub(crate) fn consumer(error: ChannelError) -> Self {
        Self::or_stopped(error, Self::Consumer)
    }

    pub(crate) fn channel(at: Place, error: ChannelError) -> Self {
        Self::or_stopped(error, |source| Self::Channel { at, source })
    }

    fn or_stopped(error: ChannelError, other: impl FnOnce(ChannelError) -> Self) -> Self {
        if error.is_stopped() {
            return Self::Stopped;
        }
        other(error)
    }
}
