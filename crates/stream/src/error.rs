//! What can be wrong with a stream.

use crate::names::{Name, SectionId};

/// Whose fault an error is; shared by all crates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The other side broke the protocol or went away.
    Peer,
    /// Whoever called asked for something impossible.
    Caller,
    /// This host: its disks, memory, limits.
    Host,
    /// Stored data is damaged.
    Data,
}

/// A stream that cannot be decoded: what is wrong, in which field, at which byte.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fault} (byte {offset}, {field})")]
pub struct DecodeError {
    /// Offset in the stream of the first byte of the field; where the input ended, if it is truncated.
    pub offset: u64,
    /// The field.
    pub field: &'static str,
    /// What is wrong.
    pub fault: Fault,
}

impl DecodeError {
    /// Whose fault it is: the peer's, unless the decoder was used wrongly.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self.fault {
            Fault::DeviceBody { .. } => Blame::Caller,
            _ => Blame::Peer,
        }
    }
}

/// Where something in a mapped-ram file must be; offsets of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappedBound {
    /// Exactly here, behind its header.
    At(u64),
    /// Not before the end of the bitmap.
    From(u64),
    /// At most [`crate::limits::MAX_MAPPED_GAP_BYTES`] behind the bitmap.
    UpTo(u64),
}

impl std::fmt::Display for MappedBound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::At(offset) => write!(
                f,
                "its header ends at {offset:#x} (does the stream start elsewhere in its file?)"
            ),
            Self::From(offset) => write!(f, "the bitmap ends at {offset:#x}"),
            Self::UpTo(offset) => write!(f, "{offset:#x} is the highest that is accepted"),
        }
    }
}

/// What is wrong with a field. Numbers are shown as they stand in the stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The input ended before the stream did.
    #[error("stream truncated inside {0}")]
    Truncated(String),
    /// The first four bytes are not `QEVM`.
    #[error("not a migration stream: magic {0:#010x} instead of 0x5145564d")]
    BadMagic(u32),
    /// Version 2 was given up in 2009.
    #[error("stream version 2 is obsolete")]
    ObsoleteVersion,
    /// Neither 2 nor 3.
    #[error("stream version {0} is not supported")]
    UnsupportedVersion(u32),
    /// The configuration section was required.
    #[error("configuration section missing: byte {0:#04x} instead of 0x07")]
    ConfigurationMissing(u8),
    /// A configuration section where none may be.
    #[error("configuration section where none is expected")]
    ConfigurationMisplaced,
    /// A part of the configuration section that nobody knows.
    #[error("unknown subsection '{0}' of the configuration")]
    UnknownSubsection(Name),
    /// A guest page size that the RAM records cannot express.
    #[error("guest page size of 2^{0} bytes is not supported")]
    UnsupportedPageBits(u32),
    /// A section or subsection in a layout that is not known here.
    #[error("version {version} of '{name}' is not supported, only {supported}")]
    UnsupportedSectionVersion {
        /// Name of the section.
        name: Name,
        /// Version in the stream.
        version: u32,
        /// The version that is known.
        supported: u32,
    },
    /// A byte that starts no item.
    #[error("unknown section type {0:#04x}")]
    UnknownSectionType(u8),
    /// A device's subsection outside its device.
    #[error("subsection at top level")]
    SubsectionAtTopLevel,
    /// The description comes after EOF.
    #[error("vmdescription before the end of the stream")]
    DescriptionBeforeEof,
    /// PART or END of an id without START, even if there was a FULL.
    #[error("section id {0} was never started")]
    SectionNeverStarted(SectionId),
    /// START of an id that was started before.
    #[error("section id {id} was started before, as '{name}'")]
    SectionStartedTwice {
        /// The id.
        id: SectionId,
        /// Whose it is.
        name: Name,
    },
    /// A section does not end in a footer.
    #[error("footer of section '{section}' ({id}) missing: byte {found:#04x} instead of 0x7e")]
    FooterMissing {
        /// Name of the section.
        section: Name,
        /// Its id.
        id: SectionId,
        /// The byte in the footer's place.
        found: u8,
    },
    /// A footer names another section.
    #[error("footer of section '{section}' has id {found} instead of {id}")]
    FooterWrong {
        /// Name of the section.
        section: Name,
        /// Its id.
        id: SectionId,
        /// The id in the footer.
        found: SectionId,
    },
    /// [`crate::Decoder::step`] was called inside a body whose length only the caller can know.
    #[error("the length of the body of section '{section}' ({id}) was not given")]
    DeviceBody {
        /// Name of the section.
        section: Name,
        /// Its id.
        id: SectionId,
    },
    /// Flags that no record has.
    #[error("unknown flags {flags:#x} in section '{section}'")]
    UnknownFlags {
        /// `block`, `ram` or `dirty-bitmap`.
        section: &'static str,
        /// All flags of the record.
        flags: u64,
    },
    /// A name was left out ("as before") and there is none before.
    #[error("the name of the record before is meant, but there is none")]
    NoPreviousName,
    /// A name is not text.
    #[error("name of {} bytes is not UTF-8: {}", .0.len(), beginning(.0))]
    NotUtf8(Vec<u8>),
    /// A length or count above what is accepted.
    #[error("{value} is over the maximum of {max}")]
    OverMaximum {
        /// The value in the stream.
        value: u64,
        /// The maximum; see [`crate::limits`].
        max: u64,
    },
    /// A value that must be a multiple.
    #[error("{value:#x} is not a multiple of {unit:#x}")]
    Unaligned {
        /// The value in the stream.
        value: u64,
        /// What it must be a multiple of.
        unit: u64,
    },
    /// A byte or number that can only have one value.
    #[error("{found:#x} instead of {expected:#x}")]
    Unexpected {
        /// The value in the stream.
        found: u64,
        /// The only value there is.
        expected: u64,
    },
    /// The lengths in a RAM block list do not add up to its total.
    #[error("RAM block '{name}' of {bytes} bytes is longer than the {left} bytes left in the list")]
    BlockListOverrun {
        /// The block.
        name: Name,
        /// Its length.
        bytes: u64,
        /// What the total leaves for it.
        left: u64,
    },
    /// Bitmap or pages of a mapped-ram file are not where they must be. Offsets are of the file.
    #[error("{what} of RAM block '{name}' at file offset {found:#x}, but {bound}")]
    MappedOffset {
        /// `bitmap` or `pages`.
        what: &'static str,
        /// The block.
        name: Name,
        /// The offset in the stream.
        found: u64,
        /// What it should be.
        bound: MappedBound,
    },
    /// A record of a ram section that a mapped-ram file cannot have: its pages have fixed places.
    #[error("ram record with flags {flags:#x} in a mapped-ram file")]
    MappedRecord {
        /// All flags of the record.
        flags: u64,
    },
    /// A command that does not exist.
    #[error("unknown command {number} (length {length})")]
    UnknownCommand {
        /// Its number.
        number: u16,
        /// Its length.
        length: u16,
    },
    /// A command or message of a length that it never has.
    #[error("{name} has length {length} instead of {expected}")]
    WrongLength {
        /// Name of the command or message.
        name: &'static str,
        /// Length in the stream.
        length: u16,
        /// The lengths that it may have.
        expected: &'static str,
    },
    /// A return path message that does not exist.
    #[error("unknown return path message {number} (length {length})")]
    UnknownReturnMessage {
        /// Its number.
        number: u16,
        /// Its length.
        length: u16,
    },
}

/// The printable beginning of what should be a name: a damaged length lets guest memory into it.
fn beginning(name: &[u8]) -> String {
    let printable = name.iter().take_while(|byte| byte.is_ascii_graphic());
    let shown: String = printable.take(32).map(|byte| char::from(*byte)).collect();
    format!("'{shown}…'")
}
