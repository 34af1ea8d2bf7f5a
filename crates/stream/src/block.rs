//! The body of a `block` section: the disks.
//!
//! ```text
//! u64 word: bits 63..9 sector or percentage, bits 8..0 flags
//!     0x01  str8 device, 1 MiB of data        0x04  progress in percent
//!     0x09  str8 device, the 1 MiB is zero    0x02  end of the section
//! ```

use crate::error::Fault;
use crate::limits::MAX_SECTOR;
use crate::names::Name;
use crate::reader::{Parse, Reader};

/// Bytes of a sector.
pub const SECTOR_BYTES: u64 = 512;
/// Sectors of a block on the wire, and what QEMU's sector numbers are multiples of.
pub const BLOCK_SECTORS: u64 = 2048;
/// Bytes of a block on the wire: always 1 MiB, also where a disk ends inside it.
pub const BLOCK_BYTES: u32 = 1 << 20;

const FLAG_BITS: u32 = 9;
const FLAGS: u64 = (1 << FLAG_BITS) - 1;
const DATA: u64 = 0x01;
const END: u64 = 0x02;
const PROGRESS: u64 = 0x04;
const DATA_ZERO: u64 = DATA | 0x08;

/// A sector number of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sector(u64);

impl Sector {
    /// The sector that starts at byte `offset`; `None` if none does, or none that a stream can name.
    #[must_use]
    pub fn at_byte(offset: u64) -> Option<Self> {
        let sector = offset >> FLAG_BITS;
        (offset & FLAGS == 0 && sector <= MAX_SECTOR).then_some(Self(sector))
    }

    /// The number.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0
    }

    /// Offset of its first byte; fits into an `i64`.
    #[must_use]
    pub fn start_byte(self) -> u64 {
        self.0 << FLAG_BITS
    }
}

/// One record of a `block` section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockChunk {
    /// [`BLOCK_BYTES`] of payload follow. What reaches past the end of the disk is padding.
    Data {
        /// First sector. A multiple of [`BLOCK_SECTORS`] from a QEMU; ours ends the last block of a
        /// disk of odd length with the disk, for a QEMU fails on data that reaches past the end.
        sector: Sector,
        /// Name of the disk. Empty from a QEMU whose disks were given with `-blockdev`.
        device: Name,
    },
    /// The block reads as zeroes; nothing follows.
    Zero {
        /// First sector.
        sector: Sector,
        /// Name of the disk.
        device: Name,
    },
    /// How much of the bulk phase is done.
    Progress {
        /// 0 to 100.
        percent: u8,
    },
    /// The body ends here.
    EndOfSection,
}

impl BlockChunk {
    /// Bytes of payload that follow.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        match self {
            Self::Data { .. } => BLOCK_BYTES,
            Self::Zero { .. } | Self::Progress { .. } | Self::EndOfSection => 0,
        }
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Parse<Self> {
        let word = reader.u64("block record")?;
        let (value, flags) = (word >> FLAG_BITS, word & FLAGS);
        match flags {
            END => Ok(Self::EndOfSection),
            PROGRESS => {
                reader.at_most(value, 100)?;
                let percent = u8::try_from(value).unwrap_or(100);
                Ok(Self::Progress { percent })
            }
            DATA | DATA_ZERO => {
                reader.at_most(value, MAX_SECTOR)?;
                let sector = Sector(value);
                let device = reader.name("device name")?;
                Ok(if flags == DATA {
                    Self::Data { sector, device }
                } else {
                    Self::Zero { sector, device }
                })
            }
            _ => Err(reader.wrong(Fault::UnknownFlags {
                section: "block",
                flags,
            })),
        }
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let (word, device) = match self {
            Self::Data { sector, device } => (sector.start_byte() | DATA, Some(device)),
            Self::Zero { sector, device } => (sector.start_byte() | DATA_ZERO, Some(device)),
            Self::Progress { percent } => (u64::from(*percent) << FLAG_BITS | PROGRESS, None),
            Self::EndOfSection => (END, None),
        };
        out.extend(word.to_be_bytes());
        if let Some(device) = device {
            device.encode(out);
        }
    }
}
