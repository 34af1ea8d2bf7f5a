//! Building replies, simple and structured.

use vmferry_disk::{Extent, ExtentKind};

use crate::line::Ticket;
use crate::negotiation::{ALLOCATION_CONTEXT, truncated};
use crate::payload::Payload;
use crate::protocol::{
    CHUNK_BYTES, CHUNK_DONE, ChunkHeader, ChunkKind, Command, Errno, Request, SIMPLE_REPLY_BYTES,
    allocation, simple_reply,
};

/// Longest error message in a reply.
const MESSAGE_BYTES_MAX: usize = 512;

/// Longest fixed part of a reply: the header of a chunk and an offset.
pub(crate) const HEAD_BYTES_MAX: usize = CHUNK_BYTES + 8;

/// The fixed part in front of a reply's data.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Head {
    bytes: [u8; HEAD_BYTES_MAX],
    length: usize,
}

impl Head {
    fn new(parts: [&[u8]; 2]) -> Self {
        let mut head = Self::default();
        for part in parts {
            let end = head.length.saturating_add(part.len());
            if let Some(place) = head.bytes.get_mut(head.length..end) {
                place.copy_from_slice(part);
                head.length = end;
            }
        }
        head
    }

    /// What goes before the data of a read that went well.
    pub(crate) fn of_read(request: &Request, structured: bool) -> Self {
        if !structured {
            return Self::of_success(request);
        }
        if request.length == 0 {
            // A data chunk has at least one byte.
            let chunk = ChunkHeader {
                flags: CHUNK_DONE,
                kind: ChunkKind::NONE,
                cookie: request.cookie,
                length: 0,
            };
            return Self::new([&chunk.encode(), &[]]);
        }
        let chunk = ChunkHeader {
            flags: CHUNK_DONE,
            kind: ChunkKind::OFFSET_DATA,
            cookie: request.cookie,
            length: request.length.saturating_add(8),
        };
        Self::new([&chunk.encode(), &request.offset.to_be_bytes()])
    }

    /// The whole reply to anything else that went well: simple, whatever was negotiated.
    pub(crate) fn of_success(request: &Request) -> Self {
        Self::new([&simple_reply(Errno::OK, request.cookie), &[]])
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or(&[])
    }
}

const _: () = assert!(SIMPLE_REPLY_BYTES <= HEAD_BYTES_MAX);

/// A reply on its way out.
#[derive(Debug)]
pub(crate) struct Reply {
    head: Head,
    payload: Payload,
    /// The request is outstanding until its reply is gone.
    _ticket: Ticket,
}

impl Reply {
    /// A reply of a fixed part and data.
    pub(crate) fn new(head: Head, payload: Payload, ticket: Ticket) -> Self {
        Self {
            head,
            payload,
            _ticket: ticket,
        }
    }

    /// Bytes that are replies already.
    pub(crate) fn ready(bytes: Payload, ticket: Ticket) -> Self {
        Self::new(Head::default(), bytes, ticket)
    }

    /// The bytes to send.
    pub(crate) fn parts(&self) -> [&[u8]; 2] {
        [self.head.bytes(), self.payload.bytes()]
    }

    pub(crate) fn length(&self) -> usize {
        self.parts()
            .iter()
            .fold(0, |sum, part| part.len().saturating_add(sum))
    }
}

/// The bytes of a reply that reports a failure.
pub(crate) fn failure(request: &Request, structured: bool, errno: Errno, message: &str) -> Vec<u8> {
    if !structured {
        return simple_reply(errno, request.cookie).to_vec();
    }
    let message = truncated(message, MESSAGE_BYTES_MAX).as_bytes();
    let mut body = errno.0.to_be_bytes().to_vec();
    body.extend(u16::try_from(message.len()).unwrap_or(0).to_be_bytes());
    body.extend(message);
    let kind = if request.command == Command::READ {
        body.extend(request.offset.to_be_bytes());
        ChunkKind::ERROR_OFFSET
    } else {
        ChunkKind::ERROR
    };
    chunk(request, kind, &body)
}

/// The bytes of an answer to a block status request. Neighbours of one kind become one extent.
pub(crate) fn block_status(request: &Request, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut body = ALLOCATION_CONTEXT.to_be_bytes().to_vec();
    for (length, flags) in extents {
        body.extend(length.to_be_bytes());
        body.extend(flags.to_be_bytes());
    }
    chunk(request, ChunkKind::BLOCK_STATUS, &body)
}

/// The bits of `base:allocation` for an extent.
pub(crate) fn allocation_flags(extent: Extent) -> u32 {
    match extent.kind {
        ExtentKind::Data => 0,
        ExtentKind::Hole => allocation::HOLE | allocation::ZERO,
        ExtentKind::Zero => allocation::ZERO,
    }
}

fn chunk(request: &Request, kind: ChunkKind, body: &[u8]) -> Vec<u8> {
    let header = ChunkHeader {
        flags: CHUNK_DONE,
        kind,
        cookie: request.cookie,
        length: u32::try_from(body.len()).unwrap_or(u32::MAX),
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend(body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Request = Request {
        flags: 0,
        command: Command::READ,
        cookie: 7,
        offset: 512,
        length: 3,
    };

    #[test]
    fn reads_are_answered_in_the_negotiated_form() {
        assert_eq!(
            Head::of_read(&READ, false).bytes(),
            simple_reply(Errno::OK, 7)
        );
        let head = Head::of_read(&READ, true);
        assert_eq!(head.bytes().len(), 28);
        assert_eq!(head.bytes()[16..20], [0, 0, 0, 11]);
        assert_eq!(head.bytes()[20..], 512u64.to_be_bytes());
        let empty = Request { length: 0, ..READ };
        let head = Head::of_read(&empty, true);
        assert_eq!(head.bytes().len(), 20);
        assert_eq!(head.bytes()[4..8], [0, 1, 0, 0]);
    }

    #[test]
    fn failures_carry_offset_and_words_when_structured() {
        assert_eq!(failure(&READ, false, Errno::EIO, "gone").len(), 16);
        let bytes = failure(&READ, true, Errno::EIO, "gone");
        assert_eq!(bytes[6..8], [0x80, 2]);
        assert_eq!(bytes[20..24], [0, 0, 0, 5]);
        assert_eq!(bytes[24..26], [0, 4]);
        assert_eq!(&bytes[26..30], b"gone");
        assert_eq!(bytes[30..], 512u64.to_be_bytes());
        let flush = Request {
            command: Command::FLUSH,
            ..READ
        };
        let bytes = failure(&flush, true, Errno::EIO, &"ä".repeat(400));
        assert_eq!(bytes[6..8], [0x80, 1]);
        assert_eq!(bytes.len(), 20 + 4 + 2 + 512);
    }
}
