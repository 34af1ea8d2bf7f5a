//! The return path: what a destination tells a source.
//!
//! ```text
//! u16 type, u16 length (at most 512), payload of that length
//!     1 SHUT u32           4 REQ_PAGES u64 start, u32 length
//!     2 PONG u32           5 RECV_BITMAP str8 block; then, not counted: u64 n, n bytes, u64 end mark
//!     3 REQ_PAGES_ID u64 start, u32 length, str8 block
//!     6 RESUME_ACK u32     7 SWITCHOVER_ACK
//! ```

use crate::decoder::Step;
use crate::error::{DecodeError, Fault};
use crate::limits::{MAX_HEADER_BYTES, MAX_RECEIVED_BITMAP_BYTES, MAX_RETURN_MESSAGE_BYTES};
use crate::names::Name;
use crate::reader::{Parse, Reader, Stop};

const SHUT: u16 = 1;
const PONG: u16 = 2;
const REQ_PAGES_ID: u16 = 3;
const REQ_PAGES: u16 = 4;
const RECV_BITMAP: u16 = 5;
const RESUME_ACK: u16 = 6;
const SWITCHOVER_ACK: u16 = 7;

const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// A message of the destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReturnMessage {
    /// The last message: 0 is success, anything else an error.
    Shut(u32),
    /// Answer to a ping, with its value. Pongs may overtake each other.
    Pong(u32),
    /// Send these pages now.
    RequestPages {
        /// The RAM block; `None` is the block of the request before.
        block: Option<Name>,
        /// First byte in the block.
        start_bytes: u64,
        /// Bytes wanted.
        length_bytes: u32,
    },
    /// Which pages of a block are there: one bit for each, in `bytes` bytes of payload.
    ReceivedBitmap {
        /// The RAM block.
        block: Name,
        /// Bytes of payload.
        bytes: u32,
    },
    /// Comes after the payload of [`ReturnMessage::ReceivedBitmap`].
    ReceivedBitmapEnd,
    /// Ready to go on with an interrupted postcopy; the value is 1.
    ResumeAck(u32),
    /// The devices are ready for the switch-over.
    SwitchoverAck,
}

impl ReturnMessage {
    /// Append the message to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut head = |kind: u16, length: u16| {
            out.extend(kind.to_be_bytes());
            out.extend(length.to_be_bytes());
        };
        match self {
            Self::Shut(value) => {
                head(SHUT, 4);
                out.extend(value.to_be_bytes());
            }
            Self::Pong(value) => {
                head(PONG, 4);
                out.extend(value.to_be_bytes());
            }
            Self::RequestPages {
                block,
                start_bytes,
                length_bytes,
            } => {
                match block {
                    None => head(REQ_PAGES, 12),
                    Some(name) => head(REQ_PAGES_ID, u16::from(name.length()).saturating_add(13)),
                }
                out.extend(start_bytes.to_be_bytes());
                out.extend(length_bytes.to_be_bytes());
                if let Some(name) = block {
                    name.encode(out);
                }
            }
            Self::ReceivedBitmap { block, bytes } => {
                head(RECV_BITMAP, u16::from(block.length()).saturating_add(1));
                block.encode(out);
                out.extend(u64::from(*bytes).to_be_bytes());
            }
            Self::ReceivedBitmapEnd => out.extend(BITMAP_END.to_be_bytes()),
            Self::ResumeAck(value) => {
                head(RESUME_ACK, 4);
                out.extend(value.to_be_bytes());
            }
            Self::SwitchoverAck => head(SWITCHOVER_ACK, 0),
        }
    }

    fn read(reader: &mut Reader<'_>) -> Parse<Self> {
        let kind = reader.u16("return path message type")?;
        let length = reader.u16("return path message length")?;
        reader.at_most(u64::from(length), u64::from(MAX_RETURN_MESSAGE_BYTES))?;
        let wrong = |name, expected, reader: &Reader<'_>| {
            Err(reader.wrong(Fault::WrongLength {
                name,
                length,
                expected,
            }))
        };
        match (kind, length) {
            (SHUT, 4) => reader.u32("shut value").map(Self::Shut),
            (SHUT, _) => wrong("SHUT", "4", reader),
            (PONG, 4) => reader.u32("pong value").map(Self::Pong),
            (PONG, _) => wrong("PONG", "4", reader),
            (REQ_PAGES, 12) => Self::read_request(false, reader),
            (REQ_PAGES, _) => wrong("REQ_PAGES", "12", reader),
            (REQ_PAGES_ID, 13..) => match Self::read_request(true, reader)? {
                Self::RequestPages {
                    block: Some(block), ..
                } if length != u16::from(block.length()).saturating_add(13) => {
                    wrong("REQ_PAGES_ID", "13 and the block name's", reader)
                }
                request => Ok(request),
            },
            (REQ_PAGES_ID, _) => wrong("REQ_PAGES_ID", "13 and the block name's", reader),
            (RECV_BITMAP, _) => {
                let block = reader.name("ram block name")?;
                if length != u16::from(block.length()).saturating_add(1) {
                    return wrong("RECV_BITMAP", "1 and the block name's", reader);
                }
                let bytes = reader.u64("received bitmap length")?;
                reader.at_most(bytes, MAX_RECEIVED_BITMAP_BYTES)?;
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                Ok(Self::ReceivedBitmap { block, bytes })
            }
            (RESUME_ACK, 4) => reader.u32("resume value").map(Self::ResumeAck),
            (RESUME_ACK, _) => wrong("RESUME_ACK", "4", reader),
            (SWITCHOVER_ACK, 0) => Ok(Self::SwitchoverAck),
            (SWITCHOVER_ACK, _) => wrong("SWITCHOVER_ACK", "0", reader),
            (number, length) => Err(reader.wrong(Fault::UnknownReturnMessage { number, length })),
        }
    }

    fn read_request(named: bool, reader: &mut Reader<'_>) -> Parse<Self> {
        let start_bytes = reader.u64("start of the requested pages")?;
        let length_bytes = reader.u32("length of the requested pages")?;
        let block = named.then(|| reader.name("ram block name")).transpose()?;
        Ok(Self::RequestPages {
            block,
            start_bytes,
            length_bytes,
        })
    }
}

/// Decodes a return path, by the rules of [`crate::Decoder`]. There is no end: whoever reads SHUT
/// knows that nothing follows.
#[derive(Clone, Debug, Default)]
pub struct ReturnDecoder {
    offset: u64,
    payload_bytes: u32,
    /// The end mark of a bitmap comes next.
    in_bitmap: bool,
}

impl ReturnDecoder {
    /// A decoder at the first byte.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Offset of the next byte that was neither used nor announced as payload.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Is the decoder between two messages? Input that ends elsewhere is truncated.
    #[must_use]
    pub fn between_messages(&self) -> bool {
        !self.in_bitmap && self.payload_bytes == 0
    }

    /// Look at the next bytes.
    pub fn step(&mut self, window: &[u8]) -> Result<Step<ReturnMessage>, DecodeError> {
        if self.payload_bytes > 0 {
            let bytes = std::mem::take(&mut self.payload_bytes);
            self.offset = self.offset.saturating_add(u64::from(bytes));
            return Ok(Step::Payload(bytes));
        }
        let mut reader = Reader::new(window, self.offset);
        match self.read(&mut reader) {
            Ok(record) => {
                let used = reader.used();
                self.offset = self.offset.saturating_add(u64::try_from(used).unwrap_or(0));
                self.in_bitmap = false;
                if let ReturnMessage::ReceivedBitmap { bytes, .. } = &record {
                    self.in_bitmap = true;
                    self.payload_bytes = *bytes;
                }
                Ok(Step::Record { record, used })
            }
            // The longest message has 4 + 256 + 8 bytes, by the types of its fields.
            Err(Stop::Short { needed, .. }) => Ok(Step::NeedMore(needed.min(MAX_HEADER_BYTES))),
            Err(Stop::Wrong(error)) => Err(error),
        }
    }

    fn read(&self, reader: &mut Reader<'_>) -> Parse<ReturnMessage> {
        if !self.in_bitmap {
            return ReturnMessage::read(reader);
        }
        let mark = reader.u64("end of the received bitmap")?;
        reader.exactly(mark, BITMAP_END)?;
        Ok(ReturnMessage::ReceivedBitmapEnd)
    }
}
