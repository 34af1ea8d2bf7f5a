//! The body of a `dirty-bitmap` section.
//!
//! ```text
//! u8 flags, [0x08: str8 node], [0x04: str8 bitmap], then by one of
//!     0x10  start: u32 granularity in bytes, u8 bitmap flags
//!     0x40  bits: u64 first sector, u32 sectors, and unless 0x02 (all zero): u64 n, n bytes
//!     0x20  complete                    0x01  end of the section
//! ```
//!
//! A name that is left out is that of the chunk before.

use crate::error::Fault;
use crate::limits::MAX_BITMAP_CHUNK_BYTES;
use crate::names::Name;
use crate::reader::{Parse, Reader};

const END: u8 = 0x01;
const ZEROES: u8 = 0x02;
const BITMAP_NAME: u8 = 0x04;
const NODE_NAME: u8 = 0x08;
const START: u8 = 0x10;
const COMPLETE: u8 = 0x20;
const BITS: u8 = 0x40;
const BITS_ZEROES: u8 = BITS | ZEROES;

/// Flags of a bitmap; unknown ones are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BitmapFlags(pub u8);

impl BitmapFlags {
    /// Writes are recorded.
    pub const ENABLED: u8 = 1;
    /// Stored in the image.
    pub const PERSISTENT: u8 = 2;
    /// To be loaded and thrown away.
    pub const IGNORED: u8 = 4;
}

/// One chunk of a `dirty-bitmap` section, with its names resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BitmapRecord {
    /// A bitmap is announced.
    Start {
        /// Node or device name.
        node: Name,
        /// Bitmap name.
        bitmap: Name,
        /// Bytes of disk for one bit.
        granularity_bytes: u32,
        /// What kind of bitmap.
        flags: BitmapFlags,
    },
    /// Bits of a range; payload follows.
    Bits {
        /// Node or device name.
        node: Name,
        /// Bitmap name.
        bitmap: Name,
        /// First sector (of 512 bytes).
        first_sector: u64,
        /// Number of sectors.
        sectors: u32,
        /// Bytes of payload, little-endian bit order.
        bytes: u32,
    },
    /// No bit is set in a range.
    ZeroBits {
        /// Node or device name.
        node: Name,
        /// Bitmap name.
        bitmap: Name,
        /// First sector (of 512 bytes).
        first_sector: u64,
        /// Number of sectors.
        sectors: u32,
    },
    /// The bitmap is whole.
    Complete {
        /// Node or device name.
        node: Name,
        /// Bitmap name.
        bitmap: Name,
    },
    /// The body ends here.
    EndOfSection,
}

impl BitmapRecord {
    /// Bytes of payload that follow.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        match self {
            Self::Bits { bytes, .. } => *bytes,
            _ => 0,
        }
    }
}

/// The names of the chunk before.
#[derive(Clone, Debug, Default)]
pub(crate) struct BitmapState {
    node: Option<Name>,
    bitmap: Option<Name>,
}

impl BitmapState {
    /// Read the next record. Nothing changes unless it is whole and right.
    pub(crate) fn read(&mut self, reader: &mut Reader<'_>) -> Parse<BitmapRecord> {
        let flags = reader.u8("dirty-bitmap record")?;
        let kind = flags & !(NODE_NAME | BITMAP_NAME);
        match kind {
            END if flags == END => return Ok(BitmapRecord::EndOfSection),
            START | COMPLETE | BITS | BITS_ZEROES => {}
            _ => {
                return Err(reader.wrong(Fault::UnknownFlags {
                    section: "dirty-bitmap",
                    flags: u64::from(flags),
                }));
            }
        }
        let node = name_or_last(flags & NODE_NAME, &self.node, "node name", reader)?;
        let bitmap = name_or_last(flags & BITMAP_NAME, &self.bitmap, "bitmap name", reader)?;
        let names = Self {
            node: Some(node.clone()),
            bitmap: Some(bitmap.clone()),
        };
        let record = match kind {
            START => BitmapRecord::Start {
                node,
                bitmap,
                granularity_bytes: reader.u32("bitmap granularity")?,
                flags: BitmapFlags(reader.u8("bitmap flags")?),
            },
            COMPLETE => BitmapRecord::Complete { node, bitmap },
            _ => {
                let first_sector = reader.u64("first sector of bits")?;
                let sectors = reader.u32("sectors of bits")?;
                if kind == BITS_ZEROES {
                    BitmapRecord::ZeroBits {
                        node,
                        bitmap,
                        first_sector,
                        sectors,
                    }
                } else {
                    let bytes = reader.u64("length of bits")?;
                    reader.at_most(bytes, MAX_BITMAP_CHUNK_BYTES)?;
                    BitmapRecord::Bits {
                        node,
                        bitmap,
                        first_sector,
                        sectors,
                        bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
                    }
                }
            }
        };
        *self = names;
        Ok(record)
    }
}

fn name_or_last(
    given: u8,
    last: &Option<Name>,
    field: &'static str,
    reader: &mut Reader<'_>,
) -> Parse<Name> {
    if given != 0 {
        return reader.name(field);
    }
    last.clone()
        .ok_or_else(|| reader.wrong(Fault::NoPreviousName))
}

impl BitmapRecord {
    /// Append the record; names are always given.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let named = |kind: u8, node: &Name, bitmap: &Name, out: &mut Vec<u8>| {
            out.push(kind | NODE_NAME | BITMAP_NAME);
            node.encode(out);
            bitmap.encode(out);
        };
        match self {
            Self::Start {
                node,
                bitmap,
                granularity_bytes,
                flags,
            } => {
                named(START, node, bitmap, out);
                out.extend(granularity_bytes.to_be_bytes());
                out.push(flags.0);
            }
            Self::Bits {
                node,
                bitmap,
                first_sector,
                sectors,
                bytes,
            } => {
                named(BITS, node, bitmap, out);
                out.extend(first_sector.to_be_bytes());
                out.extend(sectors.to_be_bytes());
                out.extend(u64::from(*bytes).to_be_bytes());
            }
            Self::ZeroBits {
                node,
                bitmap,
                first_sector,
                sectors,
            } => {
                named(BITS_ZEROES, node, bitmap, out);
                out.extend(first_sector.to_be_bytes());
                out.extend(sectors.to_be_bytes());
            }
            Self::Complete { node, bitmap } => named(COMPLETE, node, bitmap, out),
            Self::EndOfSection => out.push(END),
        }
    }
}
