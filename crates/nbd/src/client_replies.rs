//! Decoding the server's replies, without I/O.

use std::collections::HashMap;

use vmferry_disk::{Extent, ExtentKind};

use crate::client::{Completion, Failure, Outcome};
use crate::protocol::{
    CHUNK_BYTES, CHUNK_DONE, CHUNK_MAGIC, ChunkKind, Command, Errno, Fields, Request,
    SIMPLE_REPLY_BYTES, SIMPLE_REPLY_MAGIC, allocation,
};

/// Longest chunk that is not read data: what QEMU's block status can have, and a header.
const BODY_BYTES_MAX: u32 = (1 << 20) + 64;

/// Requests under way, and the reply that is coming in.
#[derive(Debug, Default)]
pub(crate) struct Replies {
    pub(crate) structured: bool,
    /// The number of `base:allocation`.
    pub(crate) allocation: Option<u32>,
    pub(crate) pending: HashMap<u64, Pending>,
    intake: Intake,
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct Pending {
    command: Command,
    offset: u64,
    length: u32,
    data: Vec<u8>,
    filled: u64,
    extents: Vec<Extent>,
    failure: Option<Failure>,
}

/// What the next bytes are.
#[derive(Clone, Debug, Default)]
enum Intake {
    #[default]
    Header,
    /// Bytes of the disk, for this place in the data of a request.
    Data {
        cookie: u64,
        at: usize,
        left: usize,
        done: bool,
    },
}

/// The decoder's answer: bytes used and perhaps a completion; neither means that more is needed.
type Taken = Result<(usize, Option<Completion>), String>;

impl Pending {
    pub(crate) fn new(request: &Request) -> Self {
        let data = if request.command == Command::READ {
            vec![0; request.length as usize]
        } else {
            Vec::new()
        };
        Self {
            command: request.command,
            offset: request.offset,
            length: request.length,
            data,
            filled: 0,
            extents: Vec::new(),
            failure: None,
        }
    }

    fn fail(&mut self, errno: Errno, message: &[u8]) {
        if self.failure.is_none() {
            self.failure = Some(Failure {
                command: self.command,
                offset: self.offset,
                length: self.length,
                errno,
                message: String::from_utf8_lossy(message).into_owned(),
            });
        }
    }

    /// The place of a run of the disk in the data.
    fn locate(&mut self, offset: u64, length: u64) -> Option<(usize, usize)> {
        let at = offset.checked_sub(self.offset)?;
        let end = at.checked_add(length)?;
        if self.command != Command::READ || length == 0 || end > u64::from(self.length) {
            return None;
        }
        self.filled = self.filled.saturating_add(length);
        Some((usize::try_from(at).ok()?, usize::try_from(length).ok()?))
    }

    fn complete(self, cookie: u64) -> Result<Completion, String> {
        let result = if let Some(failure) = self.failure {
            Err(failure)
        } else if self.command == Command::READ {
            if self.filled != u64::from(self.length) {
                return Err(format!(
                    "a read of {} bytes brought {}",
                    self.length, self.filled
                ));
            }
            Ok(Outcome::Data(self.data))
        } else if self.command == Command::BLOCK_STATUS {
            if self.extents.is_empty() {
                return Err("a block status request brought nothing".to_owned());
            }
            Ok(Outcome::Extents(self.extents))
        } else {
            Ok(Outcome::Done)
        };
        Ok(Completion { cookie, result })
    }
}

impl Replies {
    /// Where the next bytes of the stream belong, if they are data of the disk.
    pub(crate) fn place(&mut self) -> Option<&mut [u8]> {
        let Intake::Data {
            cookie, at, left, ..
        } = self.intake
        else {
            return None;
        };
        let end = at.checked_add(left)?;
        let place = self.pending.get_mut(&cookie)?.data.get_mut(at..end)?;
        (!place.is_empty()).then_some(place)
    }

    /// So many bytes went to [`Replies::place`].
    pub(crate) fn placed(&mut self, count: usize) {
        if let Intake::Data { at, left, .. } = &mut self.intake {
            *at = at.saturating_add(count);
            *left = left.saturating_sub(count);
        }
    }

    /// Take something from the front of `window`.
    pub(crate) fn take(&mut self, window: &[u8]) -> Taken {
        let Intake::Data {
            cookie, left, done, ..
        } = self.intake
        else {
            return self.header(window);
        };
        let count = left.min(window.len());
        if let (Some(place), Some(bytes)) = (self.place(), window.get(..count)) {
            if let Some(place) = place.get_mut(..count) {
                place.copy_from_slice(bytes);
            }
            self.placed(count);
        }
        if count < left {
            return Ok((count, None));
        }
        self.intake = Intake::Header;
        let completion = if done { Some(self.over(cookie)?) } else { None };
        if count > 0 || completion.is_some() {
            return Ok((count, completion));
        }
        self.header(window)
    }

    fn header(&mut self, window: &[u8]) -> Taken {
        match Fields(window).u32() {
            None => Ok((0, None)),
            Some(SIMPLE_REPLY_MAGIC) => self.simple(window),
            Some(CHUNK_MAGIC) if self.structured => self.chunk(window),
            Some(magic) => Err(format!("a reply starts with {magic:#x}")),
        }
    }

    fn simple(&mut self, window: &[u8]) -> Taken {
        let mut fields = Fields(window.get(4..).unwrap_or(&[]));
        let (Some(error), Some(cookie)) = (fields.u32(), fields.u64()) else {
            return Ok((0, None));
        };
        let structured = self.structured;
        let pending = self.pending_mut(cookie)?;
        if error != 0 {
            pending.fail(Errno(error), &[]);
        } else if pending.command == Command::BLOCK_STATUS
            || (structured && pending.command == Command::READ)
        {
            return Err(format!("a simple reply to {}", pending.command));
        } else if let Some((at, left)) = pending.locate(pending.offset, u64::from(pending.length)) {
            self.intake = Intake::Data {
                cookie,
                at,
                left,
                done: true,
            };
            return Ok((SIMPLE_REPLY_BYTES, None));
        }
        Ok((SIMPLE_REPLY_BYTES, Some(self.over(cookie)?)))
    }

    fn chunk(&mut self, window: &[u8]) -> Taken {
        let mut fields = Fields(window.get(4..).unwrap_or(&[]));
        let (Some(flags), Some(kind), Some(cookie), Some(length)) = (
            fields.u16(),
            fields.u16().map(ChunkKind),
            fields.u64(),
            fields.u32(),
        ) else {
            return Ok((0, None));
        };
        let done = flags & CHUNK_DONE != 0;
        if kind == ChunkKind::OFFSET_DATA {
            return self.data_chunk(fields, cookie, length, done);
        }
        if length > BODY_BYTES_MAX {
            return Err(format!("a chunk {kind} of {length} bytes"));
        }
        let Some(body) = fields.bytes(length as usize) else {
            return Ok((0, None));
        };
        let allocation = self.allocation;
        let pending = self.pending_mut(cookie)?;
        take_body(pending, kind, body, allocation)
            .ok_or_else(|| format!("a chunk {kind} makes no sense"))?;
        let used = CHUNK_BYTES.saturating_add(body.len());
        let completion = if done { Some(self.over(cookie)?) } else { None };
        Ok((used, completion))
    }

    fn data_chunk(&mut self, fields: Fields<'_>, cookie: u64, length: u32, done: bool) -> Taken {
        let mut fields = fields;
        let Some(offset) = fields.u64() else {
            return Ok((0, None));
        };
        let bytes = u64::from(length).checked_sub(8);
        let place = match bytes {
            Some(bytes) => self.pending_mut(cookie)?.locate(offset, bytes),
            None => None,
        };
        let Some((at, left)) = place else {
            return Err(format!("{length} bytes of data for another place"));
        };
        self.intake = Intake::Data {
            cookie,
            at,
            left,
            done,
        };
        Ok((CHUNK_BYTES.saturating_add(8), None))
    }

    fn pending_mut(&mut self, cookie: u64) -> Result<&mut Pending, String> {
        self.pending
            .get_mut(&cookie)
            .ok_or_else(|| format!("a reply to nothing (cookie {cookie:#x})"))
    }

    fn over(&mut self, cookie: u64) -> Result<Completion, String> {
        self.pending
            .remove(&cookie)
            .ok_or_else(|| format!("a reply to nothing (cookie {cookie:#x})"))?
            .complete(cookie)
    }
}

/// Use a chunk that is not data; `None` if it is malformed.
fn take_body(
    pending: &mut Pending,
    kind: ChunkKind,
    body: &[u8],
    allocation: Option<u32>,
) -> Option<()> {
    let mut fields = Fields(body);
    match kind {
        ChunkKind::NONE => {}
        ChunkKind::OFFSET_HOLE => {
            let (offset, length) = (fields.u64()?, fields.u32()?);
            let (at, length) = pending.locate(offset, u64::from(length))?;
            let end = at.checked_add(length)?;
            pending.data.get_mut(at..end)?.fill(0);
        }
        ChunkKind::BLOCK_STATUS if pending.command == Command::BLOCK_STATUS => {
            if fields.u32()? != allocation? {
                return None;
            }
            while !fields.0.is_empty() {
                let (length, flags) = (fields.u32()?, fields.u32()?);
                pending.extents.push(Extent {
                    length: u64::from(length).max(1),
                    kind: extent_kind(flags),
                });
            }
        }
        ChunkKind(kind) if kind & 0x8000 != 0 => {
            let errno = Errno(fields.u32()?);
            let length = fields.u16()?;
            let message = fields.bytes(usize::from(length))?;
            pending.fail(errno, message);
        }
        _ => return None,
    }
    Some(())
}

fn extent_kind(flags: u32) -> ExtentKind {
    if flags & allocation::ZERO == 0 {
        ExtentKind::Data
    } else if flags & allocation::HOLE != 0 {
        ExtentKind::Hole
    } else {
        ExtentKind::Zero
    }
}
