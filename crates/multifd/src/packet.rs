//! What goes over the extra connections, without I/O.
//!
//! ```text
//! handshake, 64 bytes      u32 0x11223344 │ u32 1 │ 16 bytes UUID │ u8 channel │ 39 × 0
//!
//! packet, 320 bytes        u32 0x11223344 │ u32 1 │ u32 flags │ u32 room │ u32 n │ u32 bytes │
//!                          u64 number │ u32 z │ 28 × 0 │ 256 bytes block name, NUL padded
//!   and the table          room × u64 offset: n pages that follow, then z pages of zeros
//!   and the pages          n pages, or one compressed blob
//! ```
//!
//! Source: wire format notes, `multifd-mapped-ram.md` §1. The table is always whole: as many entries as
//! pages fit into [`PACKET_PAGES_BYTES`], whatever `room` says. In a packet without pages nothing but
//! its flags means anything: QEMU 7.2 leaves the name and the byte count of an older packet there.

use vmferry_stream::{Name, PageBits};

use crate::compression::Compression;

/// First four bytes of a handshake and of each packet.
pub(crate) const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;

/// Bytes of a handshake.
pub const HANDSHAKE_BYTES: usize = 64;

/// Bytes of a packet before its table.
const FIXED_BYTES: usize = 320;

const NAME_BYTES: usize = 256;

/// Pages in one packet, in bytes, before compression: 128 pages of 4 KiB.
pub const PACKET_PAGES_BYTES: u32 = 512 << 10;

/// Compressed bytes in one packet: twice its pages, which is also the room that QEMU has for them.
pub const PACKET_BLOB_BYTES_MAX: u32 = 2 * PACKET_PAGES_BYTES;

const SYNC: u32 = 0x01;
const ZLIB: u32 = 0x02;
const ZSTD: u32 = 0x04;
/// QPL, UADK and QATzip: 10.0 with hardware that few have.
const ACCELERATED: u32 = 0x38;
const DEVICE_STATE: u32 = 0x40;

/// A packet of a kind, or with a field, that is not accepted. Numbers are shown as they stand in the packet.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PacketFault {
    /// The first four bytes.
    #[error("magic {0:#010x} instead of 0x11223344")]
    Magic(u32),
    /// Only 1 exists.
    #[error("version {0} instead of 1")]
    Version(u32),
    /// State of devices in packets (10.0, VFIO).
    #[error("state of a device in a packet, which is not supported")]
    DeviceState,
    /// Bits without a meaning.
    #[error("unknown flags {0:#x}")]
    UnknownFlags(u32),
    /// The source compresses in another way.
    #[error("pages are {found}, but {expected} was expected")]
    Compression {
        /// In the packet.
        found: &'static str,
        /// Agreed.
        expected: Compression,
    },
    /// More pages than the packet has room for.
    #[error("{normal} pages and {zero} zero pages, but room for {room} of at most {max}")]
    TooManyPages {
        /// Pages that follow.
        normal: u32,
        /// Pages of zeros.
        zero: u32,
        /// What the packet says its table has room for.
        room: u32,
        /// Entries of a table.
        max: u32,
    },
    /// Uncompressed pages have one length.
    #[error("{found} bytes for {pages} pages")]
    WrongLength {
        /// In the packet.
        found: u32,
        /// Pages that follow.
        pages: u32,
    },
    /// More than any compression makes of its pages.
    #[error("{found} bytes of compressed pages, more than {PACKET_BLOB_BYTES_MAX}")]
    BlobTooLong {
        /// In the packet.
        found: u32,
    },
    /// The block's name is not text, or not terminated.
    #[error("the block's name is damaged")]
    BadName,
    /// No such block was listed.
    #[error("unknown ram block '{0}'")]
    UnknownBlock(Name),
    /// A page that is not in its block, or not at the beginning of a page.
    #[error("page at {offset:#x} of ram block '{block}', which has {used_bytes:#x} bytes")]
    BadOffset {
        /// The block.
        block: Name,
        /// In the packet.
        offset: u64,
        /// Length of the block.
        used_bytes: u64,
    },
    /// The blob does not hold its pages.
    #[error("compressed pages are damaged: {0}")]
    Damaged(&'static str),
    /// Pages where there may be none.
    #[error("pages before the first synchronisation")]
    PagesBeforeSync,
    /// The ram section has ended.
    #[error("pages after the end of the ram section")]
    PagesAfterEnd,
}

/// What an extra connection says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handshake {
    /// Of the guest; zeros when it has none.
    pub uuid: [u8; 16],
    /// Its number, from 0 on.
    pub channel: u8,
}

impl Handshake {
    /// Its bytes.
    #[must_use]
    pub fn encode(self) -> [u8; HANDSHAKE_BYTES] {
        let mut out = [0; HANDSHAKE_BYTES];
        let fields = [&MAGIC.to_be_bytes()[..], &VERSION.to_be_bytes(), &self.uuid];
        let fields = fields.into_iter().flatten().chain([&self.channel]);
        for (to, from) in out.iter_mut().zip(fields) {
            *to = *from;
        }
        out
    }

    /// Read it. What follows the channel's number is not looked at.
    pub fn decode(bytes: &[u8; HANDSHAKE_BYTES]) -> Result<Self, PacketFault> {
        let mut fields = Fields(bytes);
        check_head(&mut fields)?;
        Ok(Self {
            uuid: fields.take(),
            channel: u8::from_be_bytes(fields.take()),
        })
    }
}

/// How packets look; the same for all packets of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PacketFormat {
    /// Guest page size.
    pub page: PageBits,
    /// How pages are compressed.
    pub compression: Compression,
}

/// The head of a packet: all of it but the pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Counts over all channels. Not always by one, and means nothing.
    pub number: u64,
    /// The channel synchronises with the main connection, after the pages.
    pub sync: bool,
    /// Pages, if there are any.
    pub pages: Option<PacketPages>,
}

/// Pages of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketPages {
    /// The block. Not checked to exist.
    pub block: Name,
    /// Offsets of the pages that follow. Not checked against the block.
    pub normal: Vec<u64>,
    /// Offsets of pages of zeros (10.0).
    pub zero: Vec<u64>,
    /// Bytes that follow; at most [`PACKET_BLOB_BYTES_MAX`], 0 if `normal` is empty.
    pub data_bytes: u32,
}

impl PacketFormat {
    /// Pages that one packet has room for.
    #[must_use]
    pub fn pages_max(self) -> u32 {
        PACKET_PAGES_BYTES >> self.page.bits()
    }

    /// Bytes of a packet before its pages, which are always sent.
    #[must_use]
    pub fn head_bytes(self) -> usize {
        let pages = usize::try_from(self.pages_max()).unwrap_or(0);
        pages
            .saturating_mul(size_of::<u64>())
            .saturating_add(FIXED_BYTES)
    }

    /// Read the head of a packet, which has [`PacketFormat::head_bytes`].
    pub fn decode(self, head: &[u8]) -> Result<Packet, PacketFault> {
        let mut fields = Fields(head);
        check_head(&mut fields)?;
        let flags = fields.u32();
        if flags & DEVICE_STATE != 0 {
            return Err(PacketFault::DeviceState);
        }
        let (room, normal, bytes) = (fields.u32(), fields.u32(), fields.u32());
        let number = fields.u64();
        let zero = fields.u32();
        fields.skip(28);
        let name: [u8; NAME_BYTES] = fields.take();
        let sync = flags & SYNC != 0;
        if (normal, zero) == (0, 0) {
            return Ok(Packet {
                number,
                sync,
                pages: None,
            });
        }
        if flags & !(SYNC | ZLIB | ZSTD | ACCELERATED) != 0 {
            return Err(PacketFault::UnknownFlags(flags));
        }
        let max = self.pages_max();
        if room > max || normal.checked_add(zero).is_none_or(|pages| pages > room) {
            return Err(PacketFault::TooManyPages {
                normal,
                zero,
                room,
                max,
            });
        }
        let data_bytes = match normal {
            0 => 0,
            _ => self.data_bytes(flags, normal, bytes)?,
        };
        Ok(Packet {
            number,
            sync,
            pages: Some(PacketPages {
                block: block_name(&name)?,
                normal: (0..normal).map(|_| fields.u64()).collect(),
                zero: (0..zero).map(|_| fields.u64()).collect(),
                data_bytes,
            }),
        })
    }

    /// Check how the pages of a packet follow it.
    fn data_bytes(self, flags: u32, pages: u32, bytes: u32) -> Result<u32, PacketFault> {
        let found = flags & (ZLIB | ZSTD | ACCELERATED);
        if found != self.compression.flags() {
            return Err(PacketFault::Compression {
                found: match found {
                    0 => "not compressed",
                    ZLIB => "compressed with zlib",
                    ZSTD => "compressed with zstd",
                    _ => "compressed in a way that is not supported",
                },
                expected: self.compression,
            });
        }
        match self.compression {
            Compression::None if u64::from(bytes) != u64::from(pages) << self.page.bits() => {
                Err(PacketFault::WrongLength {
                    found: bytes,
                    pages,
                })
            }
            Compression::None => Ok(bytes),
            _ if bytes > PACKET_BLOB_BYTES_MAX => Err(PacketFault::BlobTooLong { found: bytes }),
            _ => Ok(bytes),
        }
    }

    /// Append the head of a packet. Compression is flagged if there are pages that follow.
    pub fn encode(self, packet: &Packet, out: &mut Vec<u8>) {
        let start = out.len();
        let no_pages = PacketPages {
            block: Name::default(),
            normal: Vec::new(),
            zero: Vec::new(),
            data_bytes: 0,
        };
        let pages = packet.pages.as_ref().unwrap_or(&no_pages);
        let mut flags = if packet.sync { SYNC } else { 0 };
        if !pages.normal.is_empty() {
            flags |= self.compression.flags();
        }
        let count = |pages: &[u64]| u32::try_from(pages.len()).unwrap_or(u32::MAX);
        out.extend(MAGIC.to_be_bytes());
        out.extend(VERSION.to_be_bytes());
        out.extend(flags.to_be_bytes());
        out.extend(self.pages_max().to_be_bytes());
        out.extend(count(&pages.normal).to_be_bytes());
        out.extend(pages.data_bytes.to_be_bytes());
        out.extend(packet.number.to_be_bytes());
        out.extend(count(&pages.zero).to_be_bytes());
        out.extend([0; 28]);
        out.extend(pages.block.as_str().bytes());
        out.resize(start.saturating_add(FIXED_BYTES), 0);
        for offset in pages.normal.iter().chain(&pages.zero) {
            out.extend(offset.to_be_bytes());
        }
        out.resize(start.saturating_add(self.head_bytes()), 0);
    }
}

impl Compression {
    fn flags(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Zlib => ZLIB,
            Self::Zstd => ZSTD,
        }
    }
}

fn check_head(fields: &mut Fields<'_>) -> Result<(), PacketFault> {
    match (fields.u32(), fields.u32()) {
        (MAGIC, VERSION) => Ok(()),
        (MAGIC, version) => Err(PacketFault::Version(version)),
        (magic, _) => Err(PacketFault::Magic(magic)),
    }
}

fn block_name(bytes: &[u8; NAME_BYTES]) -> Result<Name, PacketFault> {
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(name).map_err(|_| PacketFault::BadName)?;
    // 256 bytes without a NUL do not fit into a name.
    Name::new(text).map_err(|_| PacketFault::BadName)
}

/// Fields of a head, one after the other; zeros behind its end.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().unwrap_or((&[0; N], &[]));
        self.0 = rest;
        *field
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take())
    }

    fn skip(&mut self, bytes: usize) {
        self.0 = self.0.get(bytes..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMAT: PacketFormat = PacketFormat {
        page: PageBits::X86,
        compression: Compression::None,
    };
    const ZLIBBED: PacketFormat = PacketFormat {
        compression: Compression::Zlib,
        ..FORMAT
    };

    fn packet(normal: u32, zero: u32, data_bytes: u32) -> Packet {
        let offset = |page: u32| u64::from(page) << 12;
        Packet {
            number: 7,
            sync: false,
            pages: Some(PacketPages {
                block: Name::new("pc.ram").expect("short"),
                normal: (0..normal).map(offset).collect(),
                zero: (normal..normal + zero).map(offset).collect(),
                data_bytes,
            }),
        }
    }

    fn encoded(format: PacketFormat, packet: &Packet) -> Vec<u8> {
        let mut out = vec![0xee];
        format.encode(packet, &mut out);
        assert_eq!(out.remove(0), 0xee);
        assert_eq!(out.len(), format.head_bytes());
        out
    }

    #[test]
    fn a_head_is_1344_bytes_for_pages_of_4_kib() {
        assert_eq!(FORMAT.head_bytes(), 1344);
        assert_eq!(FORMAT.pages_max(), 128);
        let large = PacketFormat {
            page: PageBits::new(16).expect("a page size"),
            ..FORMAT
        };
        assert_eq!((large.head_bytes(), large.pages_max()), (384, 8));
    }

    #[test]
    fn heads_read_back_equal() {
        for (format, packet) in [
            (FORMAT, packet(128, 0, 512 << 10)),
            (FORMAT, packet(1, 127, 4096)),
            (FORMAT, packet(0, 128, 0)),
            (ZLIBBED, packet(3, 0, PACKET_BLOB_BYTES_MAX)),
            (ZLIBBED, packet(3, 0, 0)),
        ] {
            for sync in [false, true] {
                let packet = Packet {
                    sync,
                    ..packet.clone()
                };
                assert_eq!(format.decode(&encoded(format, &packet)), Ok(packet));
            }
        }
    }

    #[test]
    fn nothing_but_flags_is_looked_at_in_a_packet_without_pages() {
        let mut stale = encoded(FORMAT, &packet(0, 0, 0));
        stale[11] = 0x3b;
        stale[12..16].fill(0xff);
        stale[20..24].fill(0xff);
        stale[64..320].fill(0xff);
        stale[320..].fill(0xff);
        let read = FORMAT.decode(&stale).expect("it is right");
        assert_eq!((read.sync, read.pages), (true, None));
        stale[11] = 0;
        assert!(!FORMAT.decode(&stale).expect("it is right").sync);
    }

    #[test]
    fn zero_pages_alone_have_no_data_and_no_compression() {
        let mut bytes = encoded(FORMAT, &packet(0, 2, 0));
        bytes[20..24].fill(0xff);
        bytes[11] = 0x02;
        let read = FORMAT.decode(&bytes).expect("it is right");
        assert_eq!(read.pages.expect("two").data_bytes, 0);
    }

    #[test]
    fn each_field_is_held_to_its_maximum() {
        let good = packet(2, 1, 8192);
        let refused = |place: usize, bytes: &[u8]| {
            let mut head = encoded(FORMAT, &good);
            head[place..place + bytes.len()].copy_from_slice(bytes);
            FORMAT.decode(&head).expect_err("it is wrong").to_string()
        };
        for (place, bytes, said) in [
            (0, &[0x51, 0x45, 0x56, 0x4d][..], "magic 0x5145564d"),
            (7, &[2], "version 2"),
            (11, &[0x40], "state of a device"),
            (10, &[0x01], "unknown flags 0x100"),
            (11, &[0x02], "compressed with zlib, but none was expected"),
            (11, &[0x10], "not supported, but none was expected"),
            (15, &[129], "room for 129 of at most 128"),
            (15, &[2], "2 pages and 1 zero pages, but room for 2"),
            (16, &[0xff; 4], "pages"),
            (19, &[127], "8192 bytes for 127 pages"),
            (35, &[127], "2 pages and 127 zero pages"),
            (32, &[0xff; 4], "zero pages"),
            (23, &[1], "8193 bytes for 2 pages"),
            (64, &[0xff; 4], "name is damaged"),
            (64, &[b'a'; 256], "name is damaged"),
        ] {
            let error = refused(place, bytes);
            assert!(error.contains(said), "{said}: {error}");
        }
        let long = encoded(ZLIBBED, &packet(1, 0, PACKET_BLOB_BYTES_MAX + 1));
        assert!(matches!(
            ZLIBBED.decode(&long),
            Err(PacketFault::BlobTooLong { .. })
        ));
    }

    #[test]
    fn handshakes_read_back_equal_and_what_follows_is_ignored() {
        let handshake = Handshake {
            uuid: *b"0123456789abcdef",
            channel: 254,
        };
        let mut bytes = handshake.encode();
        assert_eq!(bytes[24..], [&[254][..], &[0; 39]].concat());
        bytes[25..].fill(9);
        assert_eq!(Handshake::decode(&bytes), Ok(handshake));
        bytes[4] = 1;
        assert_eq!(
            Handshake::decode(&bytes),
            Err(PacketFault::Version(0x0100_0001))
        );
    }
}
