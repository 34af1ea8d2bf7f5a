//! The numbers and records of the NBD protocol, as <https://github.com/NetworkBlockDevice/nbd>
//! `doc/proto.md` has them. Everything is big-endian. No I/O here.
//!
//! ```text
//! request        magic u32 │ flags u16 │ command u16 │ cookie u64 │ offset u64 │ length u32 │ [payload of a write]
//! simple reply   magic u32 │ error u32 │ cookie u64 │ [payload of a read]
//! chunk          magic u32 │ flags u16 │ kind u16 │ cookie u64 │ length u32 │ payload
//! ```

use std::fmt;

/// First eight bytes of a server: `NBDMAGIC`.
pub const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Starts the newstyle greeting and every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Starts the reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Starts a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Starts a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Largest payload of one read or write that we announce and take: 32 MiB.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Longest option that is taken in; a longer one is skipped and answered with "too big".
pub const OPTION_BYTES_MAX: u32 = 32 << 10;
/// Longest string on the wire (export names, descriptions, context names).
pub const STRING_BYTES_MAX: usize = 4096;
/// Most extents in one answer to a block status request.
pub const EXTENTS_MAX: usize = 2048;

/// Length of a request header.
pub const REQUEST_BYTES: usize = 28;
/// Length of a simple reply header.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// Length of a chunk header.
pub const CHUNK_BYTES: usize = 20;
/// Length of an option header.
pub const OPTION_BYTES: usize = 16;
/// Length of an option reply header.
pub const OPTION_REPLY_BYTES: usize = 20;

/// Flags of both sides in the handshake.
pub mod handshake {
    /// Both sides: options are answered.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// Both sides: no 124 zeroes after `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// What an export can do.
pub mod transmission {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// `FLUSH` works.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The flag `FUA` works.
    pub const SEND_FUA: u16 = 1 << 3;
    /// `TRIM` works.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` works.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag `DF` works.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers the writes of all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// `CACHE` works.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The flag `FAST_ZERO` works.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Flags of one request.
pub mod request {
    /// Durable before it is answered.
    pub const FUA: u16 = 1 << 0;
    /// Zeroes must stay allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// The answer is one chunk.
    pub const DF: u16 = 1 << 2;
    /// One extent is enough.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zeroing must be quicker than writing zeroes.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Flags of an extent of `base:allocation`.
pub mod allocation {
    /// Not allocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// The one metadata context that we know.
pub const BASE_ALLOCATION: &str = "base:allocation";

macro_rules! wire_numbers {
    ($(#[$doc:meta])* $name:ident: $number:ty { $($(#[$value_doc:meta])* $value:ident = $wire:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $number);

        impl $name {
            $($(#[$value_doc])* pub const $value: Self = Self($wire);)*
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match *self {
                    $(Self::$value => f.write_str(stringify!($value)),)*
                    Self(number) => write!(f, "{number:#x}"),
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

wire_numbers! {
    /// What a request asks for.
    Command: u16 {
        /// Bytes of the disk.
        READ = 0,
        /// Put bytes on the disk.
        WRITE = 1,
        /// Go away; not answered.
        DISCONNECT = 2,
        /// Make every answered write durable.
        FLUSH = 3,
        /// The content is no longer needed.
        TRIM = 4,
        /// Bring the range into memory.
        CACHE = 5,
        /// Make the range zero.
        WRITE_ZEROES = 6,
        /// What is allocated.
        BLOCK_STATUS = 7,
    }
}

wire_numbers! {
    /// An option of the handshake.
    OptionCode: u32 {
        /// Choose an export; has no reply that could fail.
        EXPORT_NAME = 1,
        /// End the handshake.
        ABORT = 2,
        /// Name the exports.
        LIST = 3,
        /// Start TLS.
        STARTTLS = 5,
        /// Describe an export.
        INFO = 6,
        /// Describe an export and start.
        GO = 7,
        /// Answer in chunks.
        STRUCTURED_REPLY = 8,
        /// Which metadata contexts there are.
        LIST_META_CONTEXT = 9,
        /// Which metadata contexts block status shall report.
        SET_META_CONTEXT = 10,
        /// 64 bit lengths.
        EXTENDED_HEADERS = 11,
    }
}

wire_numbers! {
    /// Answer to an option.
    OptionReply: u32 {
        /// Done.
        ACK = 1,
        /// One export.
        SERVER = 2,
        /// One piece of information.
        INFO = 3,
        /// One metadata context.
        META_CONTEXT = 4,
        /// The option is not known.
        ERR_UNSUP = 0x8000_0001,
        /// Not allowed.
        ERR_POLICY = 0x8000_0002,
        /// The option is malformed.
        ERR_INVALID = 0x8000_0003,
        /// Not available on this host.
        ERR_PLATFORM = 0x8000_0004,
        /// TLS comes first.
        ERR_TLS_REQD = 0x8000_0005,
        /// No such export.
        ERR_UNKNOWN = 0x8000_0006,
        /// The server, or the export, goes away.
        ERR_SHUTDOWN = 0x8000_0007,
        /// Block sizes must be asked for.
        ERR_BLOCK_SIZE_REQD = 0x8000_0008,
        /// The option is too long.
        ERR_TOO_BIG = 0x8000_0009,
    }
}

impl OptionReply {
    /// Does it end an option with a failure?
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0 & 0x8000_0000 != 0
    }
}

wire_numbers! {
    /// A piece of information about an export.
    Info: u16 {
        /// Length and flags.
        EXPORT = 0,
        /// Canonical name.
        NAME = 1,
        /// Words for people.
        DESCRIPTION = 2,
        /// Smallest, preferred and largest request.
        BLOCK_SIZE = 3,
    }
}

wire_numbers! {
    /// What a chunk of a structured reply holds.
    ChunkKind: u16 {
        /// Nothing; ends a reply.
        NONE = 0,
        /// Offset and data.
        OFFSET_DATA = 1,
        /// Offset and length of a hole.
        OFFSET_HOLE = 2,
        /// Context and extents.
        BLOCK_STATUS = 5,
        /// An error without an offset.
        ERROR = 0x8001,
        /// An error with an offset.
        ERROR_OFFSET = 0x8002,
    }
}

wire_numbers! {
    /// Why a request failed.
    Errno: u32 {
        /// It did not fail.
        OK = 0,
        /// Not allowed; the export is read-only.
        EPERM = 1,
        /// The medium failed.
        EIO = 5,
        /// Not enough memory.
        ENOMEM = 12,
        /// The request makes no sense.
        EINVAL = 22,
        /// No space left, or past the end.
        ENOSPC = 28,
        /// The answer does not fit into what was asked for.
        EOVERFLOW = 75,
        /// Not possible (quickly).
        ENOTSUP = 95,
        /// The server goes away.
        ESHUTDOWN = 108,
    }
}

/// Flag of a chunk: the last of its reply.
pub const CHUNK_DONE: u16 = 1 << 0;

/// Header of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Bits of [`request`].
    pub flags: u16,
    /// What is asked for.
    pub command: Command,
    /// Comes back in the reply.
    pub cookie: u64,
    /// First byte of the range.
    pub offset: u64,
    /// Length of the range in bytes.
    pub length: u32,
}

/// A record started with the wrong number: the two sides are out of step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} starts with {found:#x}")]
pub struct BadMagic {
    /// Which record.
    pub what: &'static str,
    /// What was found.
    pub found: u64,
}

impl Request {
    /// Decode a header.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, BadMagic> {
        let mut fields = Fields(bytes);
        let magic = fields.u32().unwrap_or(0);
        if magic != REQUEST_MAGIC {
            return Err(BadMagic {
                what: "a request",
                found: u64::from(magic),
            });
        }
        Ok(Self {
            flags: fields.u16().unwrap_or(0),
            command: Command(fields.u16().unwrap_or(0)),
            cookie: fields.u64().unwrap_or(0),
            offset: fields.u64().unwrap_or(0),
            length: fields.u32().unwrap_or(0),
        })
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut record = Record::new();
        record
            .u32(REQUEST_MAGIC)
            .u16(self.flags)
            .u16(self.command.0)
            .u64(self.cookie)
            .u64(self.offset)
            .u32(self.length);
        record.take()
    }

    /// Bytes that follow the header.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        if self.command == Command::WRITE {
            usize::try_from(self.length).unwrap_or(usize::MAX)
        } else {
            0
        }
    }

    /// Is this bit of [`request`] set?
    #[must_use]
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Header of a simple reply.
#[must_use]
pub fn simple_reply(error: Errno, cookie: u64) -> [u8; SIMPLE_REPLY_BYTES] {
    let mut record = Record::new();
    record.u32(SIMPLE_REPLY_MAGIC).u32(error.0).u64(cookie);
    record.take()
}

/// Header of a chunk of a structured reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// [`CHUNK_DONE`] or nothing.
    pub flags: u16,
    /// What the payload is.
    pub kind: ChunkKind,
    /// Of the request.
    pub cookie: u64,
    /// Length of the payload.
    pub length: u32,
}

impl ChunkHeader {
    /// The header's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; CHUNK_BYTES] {
        let mut record = Record::new();
        record
            .u32(CHUNK_MAGIC)
            .u16(self.flags)
            .u16(self.kind.0)
            .u64(self.cookie)
            .u32(self.length);
        record.take()
    }
}

/// Builds records of a length known when compiling.
struct Record<const N: usize> {
    bytes: [u8; N],
    filled: usize,
}

impl<const N: usize> Record<N> {
    fn new() -> Self {
        Self {
            bytes: [0; N],
            filled: 0,
        }
    }

    fn put(&mut self, field: &[u8]) -> &mut Self {
        let end = self.filled.saturating_add(field.len());
        if let Some(place) = self.bytes.get_mut(self.filled..end) {
            place.copy_from_slice(field);
        }
        self.filled = end;
        self
    }

    fn u16(&mut self, value: u16) -> &mut Self {
        self.put(&value.to_be_bytes())
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_be_bytes())
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.put(&value.to_be_bytes())
    }

    fn take(&self) -> [u8; N] {
        debug_assert_eq!(self.filled, N);
        self.bytes
    }
}

/// Takes fields off the front of a slice; `None` when it is too short.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(length)?;
        self.0 = tail;
        Some(head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string with its length, a `u32`, in front.
    pub(crate) fn string(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.u32()?).ok()?;
        self.bytes(length)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_survives_the_wire() {
        let request = Request {
            flags: request::FUA | request::NO_HOLE,
            command: Command::WRITE_ZEROES,
            cookie: 0x0123_4567_89ab_cdef,
            offset: 1 << 40,
            length: 77,
        };
        let bytes = request.encode();
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 3, 0, 6]);
        assert_eq!(Request::decode(&bytes), Ok(request));
        assert_eq!(request.payload_bytes(), 0);
    }

    #[test]
    fn a_request_with_another_magic_is_refused() {
        let error = Request::decode(&[0x11; REQUEST_BYTES]).unwrap_err();
        assert_eq!(error.to_string(), "a request starts with 0x11111111");
    }

    #[test]
    fn replies_have_their_published_layout() {
        assert_eq!(
            simple_reply(Errno::EIO, 0x42),
            [
                0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0x42
            ]
        );
        let chunk = ChunkHeader {
            flags: CHUNK_DONE,
            kind: ChunkKind::ERROR_OFFSET,
            cookie: 1,
            length: 14,
        };
        assert_eq!(
            chunk.encode(),
            [
                0x66, 0x8e, 0x33, 0xef, 0, 1, 0x80, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 14
            ]
        );
    }

    #[test]
    fn numbers_are_named_and_unknown_ones_survive() {
        assert_eq!(Command::TRIM.to_string(), "TRIM");
        assert_eq!(format!("{:?}", Command(99)), "Command(0x63)");
        assert!(OptionReply::ERR_UNSUP.is_error());
        assert!(!OptionReply::ACK.is_error());
    }
}
