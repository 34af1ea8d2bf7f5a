//! Commands: what a source tells a destination between sections.
//!
//! ```text
//! 08, u16 number, u16 length, payload of that length
//! ```

use crate::error::Fault;
use crate::limits::MAX_PACKAGE_BYTES;
use crate::names::Name;
use crate::reader::{Parse, Reader};

const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
const POSTCOPY_ADVISE: u16 = 3;
const POSTCOPY_LISTEN: u16 = 4;
const POSTCOPY_RUN: u16 = 5;
const POSTCOPY_RAM_DISCARD: u16 = 6;
const PACKAGED: u16 = 7;
const ENABLE_COLO: u16 = 8;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;

const RANGE_BYTES: u16 = 16;

/// A command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The destination may use its half of the connection from now on.
    OpenReturnPath,
    /// The destination answers with a pong of the same value.
    Ping(u32),
    /// Postcopy may follow.
    PostcopyAdvise(Option<PageSizes>),
    /// Pages may be missing from now on.
    PostcopyListen,
    /// The guest starts at the destination.
    PostcopyRun,
    /// Forget parts of a RAM block; that many [`crate::Record::DiscardRange`]s follow.
    PostcopyRamDiscard {
        /// The block.
        block: Name,
        /// Number of ranges, 1 to 4095.
        ranges: u16,
    },
    /// Payload follows: items for a decoder of their own, [`crate::Decoder::package`].
    Packaged {
        /// Bytes of payload.
        bytes: u32,
    },
    /// Continuous replication.
    EnableColo,
    /// A postcopy that was interrupted goes on.
    PostcopyResume,
    /// The destination shall say which pages of this block it has.
    ReceivedBitmap(Name),
    /// The source's guest is stopped.
    SwitchoverStart,
}

/// Payload of POSTCOPY_ADVISE for RAM; without it the command is about dirty bitmaps only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSizes {
    /// The page sizes of all RAM blocks, ORed.
    pub all_bytes: u64,
    /// Guest page size.
    pub target_bytes: u64,
}

/// A range to forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiscardRange {
    /// First byte in the RAM block.
    pub start_bytes: u64,
    /// Length; may be 0.
    pub length_bytes: u64,
}

impl Command {
    /// QEMU's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        name_of(self.number()).unwrap_or_default()
    }

    fn number(&self) -> u16 {
        match self {
            Self::OpenReturnPath => OPEN_RETURN_PATH,
            Self::Ping(_) => PING,
            Self::PostcopyAdvise(_) => POSTCOPY_ADVISE,
            Self::PostcopyListen => POSTCOPY_LISTEN,
            Self::PostcopyRun => POSTCOPY_RUN,
            Self::PostcopyRamDiscard { .. } => POSTCOPY_RAM_DISCARD,
            Self::Packaged { .. } => PACKAGED,
            Self::EnableColo => ENABLE_COLO,
            Self::PostcopyResume => POSTCOPY_RESUME,
            Self::ReceivedBitmap(_) => RECV_BITMAP,
            Self::SwitchoverStart => SWITCHOVER_START,
        }
    }

    /// Bytes of payload that follow.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        match self {
            Self::Packaged { bytes } => *bytes,
            _ => 0,
        }
    }

    /// Read the command after its type byte.
    pub(crate) fn read(reader: &mut Reader<'_>) -> Parse<Self> {
        let number = reader.u16("command number")?;
        let length = reader.u16("command length")?;
        let Some(name) = name_of(number) else {
            return Err(reader.wrong(Fault::UnknownCommand { number, length }));
        };
        let expect = |right: bool, expected: &'static str, reader: &Reader<'_>| {
            if right {
                return Ok(());
            }
            Err(reader.wrong(Fault::WrongLength {
                name,
                length,
                expected,
            }))
        };
        let empty = |command: Self| expect(length == 0, "0", reader).map(|()| command);
        match number {
            OPEN_RETURN_PATH => empty(Self::OpenReturnPath),
            POSTCOPY_LISTEN => empty(Self::PostcopyListen),
            POSTCOPY_RUN => empty(Self::PostcopyRun),
            ENABLE_COLO => empty(Self::EnableColo),
            POSTCOPY_RESUME => empty(Self::PostcopyResume),
            SWITCHOVER_START => empty(Self::SwitchoverStart),
            PING => {
                expect(length == 4, "4", reader)?;
                reader.u32("ping value").map(Self::Ping)
            }
            POSTCOPY_ADVISE => {
                expect(length == 0 || length == 16, "0 or 16", reader)?;
                if length == 0 {
                    return Ok(Self::PostcopyAdvise(None));
                }
                Ok(Self::PostcopyAdvise(Some(PageSizes {
                    all_bytes: reader.u64("page sizes")?,
                    target_bytes: reader.u64("target page size")?,
                })))
            }
            PACKAGED => {
                expect(length == 4, "4", reader)?;
                let bytes = reader.u32("package length")?;
                reader.at_most(u64::from(bytes), u64::from(MAX_PACKAGE_BYTES))?;
                Ok(Self::Packaged { bytes })
            }
            POSTCOPY_RAM_DISCARD => Self::read_discard(length, reader),
            _ => {
                let block = reader.name("ram block name")?;
                let right = length == u16::from(block.length()).saturating_add(1);
                expect(right, "1 and the block name's", reader)?;
                Ok(Self::ReceivedBitmap(block))
            }
        }
    }

    fn read_discard(length: u16, reader: &mut Reader<'_>) -> Parse<Self> {
        let version = reader.u8("discard version")?;
        reader.exactly(u64::from(version), 0)?;
        let block = reader.name("ram block name")?;
        let end = reader.u8("end of the ram block name")?;
        reader.exactly(u64::from(end), 0)?;
        let before = u16::from(block.length()).saturating_add(3);
        match length.checked_sub(before) {
            Some(rest) if rest >= RANGE_BYTES && rest % RANGE_BYTES == 0 => {
                Ok(Self::PostcopyRamDiscard {
                    block,
                    ranges: rest / RANGE_BYTES,
                })
            }
            _ => Err(reader.wrong(Fault::WrongLength {
                name: "POSTCOPY_RAM_DISCARD",
                length,
                expected: "3, the block name's and a positive multiple of 16",
            })),
        }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.push(0x08);
        out.extend(self.number().to_be_bytes());
        let mut payload = Vec::new();
        let mut length_of_ranges = 0;
        match self {
            Self::Ping(value) | Self::Packaged { bytes: value } => {
                payload.extend(value.to_be_bytes());
            }
            Self::PostcopyAdvise(Some(sizes)) => {
                payload.extend(sizes.all_bytes.to_be_bytes());
                payload.extend(sizes.target_bytes.to_be_bytes());
            }
            Self::PostcopyRamDiscard { block, ranges } => {
                payload.push(0);
                block.encode(&mut payload);
                payload.push(0);
                length_of_ranges = ranges.saturating_mul(RANGE_BYTES);
            }
            Self::ReceivedBitmap(block) => block.encode(&mut payload),
            Self::PostcopyAdvise(None)
            | Self::OpenReturnPath
            | Self::PostcopyListen
            | Self::PostcopyRun
            | Self::EnableColo
            | Self::PostcopyResume
            | Self::SwitchoverStart => {}
        }
        let length = u16::try_from(payload.len())
            .unwrap_or(u16::MAX)
            .saturating_add(length_of_ranges);
        out.extend(length.to_be_bytes());
        out.extend(payload);
    }
}

fn name_of(number: u16) -> Option<&'static str> {
    Some(match number {
        OPEN_RETURN_PATH => "OPEN_RETURN_PATH",
        PING => "PING",
        POSTCOPY_ADVISE => "POSTCOPY_ADVISE",
        POSTCOPY_LISTEN => "POSTCOPY_LISTEN",
        POSTCOPY_RUN => "POSTCOPY_RUN",
        POSTCOPY_RAM_DISCARD => "POSTCOPY_RAM_DISCARD",
        PACKAGED => "PACKAGED",
        ENABLE_COLO => "ENABLE_COLO",
        POSTCOPY_RESUME => "POSTCOPY_RESUME",
        RECV_BITMAP => "RECV_BITMAP",
        SWITCHOVER_START => "SWITCHOVER_START",
        _ => return None,
    })
}

impl DiscardRange {
    pub(crate) fn read(reader: &mut Reader<'_>) -> Parse<Self> {
        Ok(Self {
            start_bytes: reader.u64("start of the discarded range")?,
            length_bytes: reader.u64("length of the discarded range")?,
        })
    }

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.extend(self.start_bytes.to_be_bytes());
        out.extend(self.length_bytes.to_be_bytes());
    }
}
