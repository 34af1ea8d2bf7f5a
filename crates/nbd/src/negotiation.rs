//! The server's side of the handshake, without I/O: bytes and time in, bytes and a decision out.
//!
//! ```text
//!          greeting ──▶
//!                   ◀── client flags
//!   ┌──▶            ◀── option (LIST, INFO, STRUCTURED_REPLY, LIST/SET_META_CONTEXT, unknown ...)
//!   └── replies    ──▶
//!                   ◀── GO or EXPORT_NAME         ◀── ABORT
//!          replies ──▶  transmission starts         ACK ──▶  closed
//! ```
//!
//! A client that breaks the framing ends the handshake with a [`Misbehaviour`]; a client that asks
//! for something that there is not is told so and may ask again.

use std::time::Instant;

use crate::protocol::{
    BASE_ALLOCATION, Fields, Info, OPTION_BYTES, OPTION_BYTES_MAX, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, OptionCode, OptionReply, PAYLOAD_BYTES_MAX, SERVER_MAGIC, STRING_BYTES_MAX,
    handshake, transmission,
};

/// The number under which block status reports `base:allocation`.
pub const ALLOCATION_CONTEXT: u32 = 1;

/// What a server has to offer.
pub trait Catalog {
    /// An opened export.
    type Export;

    /// The names of all exports.
    fn list(&self) -> Vec<String>;

    /// Open the export of exactly this name.
    fn open(&self, name: &str) -> Result<(Self::Export, ExportInfo), Unavailable>;

    /// Words for people about the export of this name.
    fn description(&self, name: &str) -> Option<String>;
}

/// Why an export cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// There is none of this name.
    #[error("no such export")]
    Unknown,
    /// It was here and has moved, or is about to close.
    #[error("the export has moved away")]
    Departed,
}

/// What a client is told about an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Length in bytes.
    pub length: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Request size that works well, in bytes.
    pub preferred_bytes: u32,
}

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed<E> {
    /// The export.
    pub export: E,
    /// Replies come in chunks.
    pub structured: bool,
    /// Block status reports `base:allocation` as context [`ALLOCATION_CONTEXT`].
    pub allocation: bool,
}

/// Where a handshake stands after a call of [`Negotiation::handle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress<E> {
    /// Call again when there are more bytes.
    NeedMore,
    /// Something was taken: send the output, call again with the rest.
    Advanced,
    /// Send the output; requests follow.
    Ready(Agreed<E>),
    /// Send the output and close: the client said goodbye.
    Goodbye,
}

/// The client broke the protocol in a way that ends the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misbehaviour {
    /// Client flags that do not exist.
    #[error("unknown client flags {0:#x}")]
    ClientFlags(u32),
    /// An option without its magic.
    #[error("an option starts with {0:#x}")]
    OptionMagic(u64),
    /// A client without fixed newstyle may only send `EXPORT_NAME`.
    #[error("option {0} from a client that did not negotiate fixed newstyle")]
    NotFixed(OptionCode),
    /// `EXPORT_NAME` named something that cannot be opened; there is no way to say so.
    #[error("the export asked for by EXPORT_NAME is not available: {0}")]
    ExportName(Unavailable),
    /// `EXPORT_NAME` with a name that is too long or no text.
    #[error("EXPORT_NAME with an invalid name ({0} bytes)")]
    ExportNameInvalid(u32),
    /// The handshake took too long.
    #[error("no export was chosen within the time for the handshake")]
    TimedOut,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    ClientFlags,
    Options,
    /// An option that is too long passes by; then it is answered.
    Skipping {
        option: OptionCode,
        left: u64,
    },
}

/// One handshake.
#[derive(Debug)]
pub struct Negotiation {
    phase: Phase,
    deadline: Instant,
    fixed: bool,
    no_zeroes: bool,
    structured: bool,
    /// The export for which the client chose `base:allocation`.
    allocation_of: Option<String>,
}

impl Negotiation {
    /// Start a handshake that must be over at `deadline`; the greeting goes to `out`.
    #[must_use]
    pub fn new(deadline: Instant, out: &mut Vec<u8>) -> Self {
        out.extend(SERVER_MAGIC.to_be_bytes());
        out.extend(OPTION_MAGIC.to_be_bytes());
        out.extend((handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
        Self {
            phase: Phase::ClientFlags,
            deadline,
            fixed: false,
            no_zeroes: false,
            structured: false,
            allocation_of: None,
        }
    }

    /// When the client must have chosen.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Take at most one record from the front of `window`: how many bytes were used, and what now.
    /// Replies are appended to `out`, at most one option's worth.
    pub fn handle<C: Catalog>(
        &mut self,
        now: Instant,
        window: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Progress<C::Export>), Misbehaviour> {
        if now >= self.deadline {
            return Err(Misbehaviour::TimedOut);
        }
        match self.phase {
            Phase::ClientFlags => self.client_flags(window),
            Phase::Options => self.option(window, catalog, out),
            Phase::Skipping { option, left } => Ok(self.skip(option, left, window, out)),
        }
    }

    fn client_flags<E>(&mut self, window: &[u8]) -> Result<(usize, Progress<E>), Misbehaviour> {
        let Some(flags) = Fields(window).u32() else {
            return Ok((0, Progress::NeedMore));
        };
        let known = u32::from(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if flags & !known != 0 {
            return Err(Misbehaviour::ClientFlags(flags));
        }
        self.fixed = flags & u32::from(handshake::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(handshake::NO_ZEROES) != 0;
        self.phase = Phase::Options;
        Ok((4, Progress::Advanced))
    }

    fn option<C: Catalog>(
        &mut self,
        window: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Result<(usize, Progress<C::Export>), Misbehaviour> {
        let mut fields = Fields(window);
        // The magic is judged as soon as it is there: a client that speaks something else is not
        // waited for.
        let Some(magic) = fields.u64() else {
            return Ok((0, Progress::NeedMore));
        };
        if magic != OPTION_MAGIC {
            return Err(Misbehaviour::OptionMagic(magic));
        }
        let (Some(option), Some(length)) = (fields.u32().map(OptionCode), fields.u32()) else {
            return Ok((0, Progress::NeedMore));
        };
        if !self.fixed && option != OptionCode::EXPORT_NAME {
            return Err(Misbehaviour::NotFixed(option));
        }
        if length > OPTION_BYTES_MAX {
            if option == OptionCode::EXPORT_NAME {
                return Err(Misbehaviour::ExportNameInvalid(length));
            }
            self.phase = Phase::Skipping {
                option,
                left: u64::from(length),
            };
            return Ok((OPTION_BYTES, Progress::Advanced));
        }
        let Some(data) = fields.bytes(usize::try_from(length).unwrap_or(usize::MAX)) else {
            return Ok((0, Progress::NeedMore));
        };
        let used = OPTION_BYTES.saturating_add(data.len());
        let progress = if option == OptionCode::EXPORT_NAME {
            self.export_name(data, catalog, out)?
        } else {
            let mut reply = Replies { option, out };
            self.answer(option, data, catalog, &mut reply)
        };
        Ok((used, progress))
    }

    fn skip<E>(
        &mut self,
        option: OptionCode,
        left: u64,
        window: &[u8],
        out: &mut Vec<u8>,
    ) -> (usize, Progress<E>) {
        if window.is_empty() {
            return (0, Progress::NeedMore);
        }
        let here = usize::try_from(left)
            .unwrap_or(usize::MAX)
            .min(window.len());
        let left = left.saturating_sub(here as u64);
        self.phase = if left == 0 {
            Replies { option, out }.error(
                OptionReply::ERR_TOO_BIG,
                &format!("an option has at most {OPTION_BYTES_MAX} bytes"),
            );
            Phase::Options
        } else {
            Phase::Skipping { option, left }
        };
        (here, Progress::Advanced)
    }

    fn answer<C: Catalog>(
        &mut self,
        option: OptionCode,
        data: &[u8],
        catalog: &C,
        reply: &mut Replies<'_>,
    ) -> Progress<C::Export> {
        match option {
            OptionCode::ABORT => {
                reply.ack();
                return Progress::Goodbye;
            }
            OptionCode::LIST if data.is_empty() => {
                for name in catalog.list() {
                    reply.server(&name, catalog.description(&name).as_deref());
                }
                reply.ack();
            }
            OptionCode::STRUCTURED_REPLY if data.is_empty() => {
                self.structured = true;
                reply.ack();
            }
            OptionCode::LIST | OptionCode::STRUCTURED_REPLY => {
                reply.error(OptionReply::ERR_INVALID, "this option has no data");
            }
            OptionCode::INFO => {
                self.describe(data, catalog, reply);
            }
            OptionCode::GO => {
                if let Some((name, export)) = self.describe(data, catalog, reply) {
                    return Progress::Ready(self.agree(&name, export));
                }
            }
            OptionCode::LIST_META_CONTEXT | OptionCode::SET_META_CONTEXT => {
                self.meta_context(option, data, catalog, reply);
            }
            _ => reply.error(OptionReply::ERR_UNSUP, "this option is not supported"),
        }
        Progress::Advanced
    }

    fn agree<E>(&self, name: &str, export: E) -> Agreed<E> {
        Agreed {
            export,
            structured: self.structured,
            allocation: self.allocation_of.as_deref() == Some(name),
        }
    }

    fn export_name<C: Catalog>(
        &mut self,
        data: &[u8],
        catalog: &C,
        out: &mut Vec<u8>,
    ) -> Result<Progress<C::Export>, Misbehaviour> {
        let name = name(data).ok_or(Misbehaviour::ExportNameInvalid(
            u32::try_from(data.len()).unwrap_or(u32::MAX),
        ))?;
        let (name, export, info) = open(catalog, name).map_err(Misbehaviour::ExportName)?;
        out.extend(info.length.to_be_bytes());
        out.extend(self.transmission_flags(&info).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Ok(Progress::Ready(self.agree(&name, export)))
    }

    /// Answer `INFO` or `GO`; the export if that went well.
    fn describe<C: Catalog>(
        &self,
        data: &[u8],
        catalog: &C,
        reply: &mut Replies<'_>,
    ) -> Option<(String, C::Export)> {
        let Some((name, wanted)) = info_request(data) else {
            reply.error(OptionReply::ERR_INVALID, "the option is malformed");
            return None;
        };
        let (name, export, info) = match open(catalog, name) {
            Ok(opened) => opened,
            Err(unavailable) => {
                reply.unavailable(unavailable);
                return None;
            }
        };
        let mut body = info.length.to_be_bytes().to_vec();
        body.extend(self.transmission_flags(&info).to_be_bytes());
        reply.info(Info::EXPORT, &body);
        if wanted.contains(&Info::NAME) {
            reply.info(Info::NAME, name.as_bytes());
        }
        let described = wanted.contains(&Info::DESCRIPTION);
        if let Some(text) = described.then(|| catalog.description(&name)).flatten() {
            let text = truncated(&text, STRING_BYTES_MAX);
            reply.info(Info::DESCRIPTION, text.as_bytes());
        }
        let mut body = 1u32.to_be_bytes().to_vec();
        body.extend(preferred(info.preferred_bytes).to_be_bytes());
        body.extend(PAYLOAD_BYTES_MAX.to_be_bytes());
        reply.info(Info::BLOCK_SIZE, &body);
        reply.ack();
        Some((name, export))
    }

    fn meta_context<C: Catalog>(
        &mut self,
        option: OptionCode,
        data: &[u8],
        catalog: &C,
        reply: &mut Replies<'_>,
    ) {
        let setting = option == OptionCode::SET_META_CONTEXT;
        if setting {
            self.allocation_of = None;
        }
        if !self.structured {
            reply.error(
                OptionReply::ERR_INVALID,
                "structured replies must be negotiated first",
            );
            return;
        }
        let Some((name, queries)) = context_request(data) else {
            reply.error(OptionReply::ERR_INVALID, "the option is malformed");
            return;
        };
        let name = match open(catalog, name) {
            Ok((name, _, _)) => name,
            Err(unavailable) => return reply.unavailable(unavailable),
        };
        let all = !setting && queries.is_empty();
        let asked = queries
            .iter()
            .any(|query| *query == BASE_ALLOCATION.as_bytes() || (!setting && *query == b"base:"));
        if all || asked {
            let id = if setting { ALLOCATION_CONTEXT } else { 0 };
            let mut body = id.to_be_bytes().to_vec();
            body.extend(BASE_ALLOCATION.as_bytes());
            reply.record(OptionReply::META_CONTEXT, &body);
            if setting {
                self.allocation_of = Some(name);
            }
        }
        reply.ack();
    }

    fn transmission_flags(&self, info: &ExportInfo) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::CAN_MULTI_CONN
            | transmission::SEND_CACHE;
        if info.read_only {
            flags |= transmission::READ_ONLY;
        } else {
            flags |= transmission::SEND_TRIM
                | transmission::SEND_WRITE_ZEROES
                | transmission::SEND_FAST_ZERO;
        }
        if self.structured {
            flags |= transmission::SEND_DF;
        }
        flags
    }
}

/// Open by exact name; the empty name means the only export if there is exactly one.
fn open<C: Catalog>(
    catalog: &C,
    name: &str,
) -> Result<(String, C::Export, ExportInfo), Unavailable> {
    match catalog.open(name) {
        Ok((export, info)) => Ok((name.to_owned(), export, info)),
        Err(Unavailable::Unknown) if name.is_empty() => {
            let [only] =
                <[String; 1]>::try_from(catalog.list()).map_err(|_| Unavailable::Unknown)?;
            let (export, info) = catalog.open(&only)?;
            Ok((only, export, info))
        }
        Err(unavailable) => Err(unavailable),
    }
}

/// Block sizes are powers of two between 512 and the largest request.
fn preferred(bytes: u32) -> u32 {
    bytes
        .checked_next_power_of_two()
        .unwrap_or(PAYLOAD_BYTES_MAX)
        .clamp(512, PAYLOAD_BYTES_MAX)
}

fn name(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > STRING_BYTES_MAX {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// Data of `INFO` and `GO`: name, then the pieces of information that are wanted.
fn info_request(data: &[u8]) -> Option<(&str, Vec<Info>)> {
    let mut fields = Fields(data);
    let name = name(fields.string()?)?;
    let count = fields.u16()?;
    let wanted = (0..count)
        .map(|_| fields.u16().map(Info))
        .collect::<Option<Vec<_>>>()?;
    fields.0.is_empty().then_some((name, wanted))
}

/// Data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`: name, then queries.
fn context_request(data: &[u8]) -> Option<(&str, Vec<&[u8]>)> {
    let mut fields = Fields(data);
    let name = name(fields.string()?)?;
    let count = fields.u32()?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(fields.string()?);
    }
    fields.0.is_empty().then_some((name, queries))
}

/// Writes the replies to one option.
struct Replies<'a> {
    option: OptionCode,
    out: &'a mut Vec<u8>,
}

impl Replies<'_> {
    fn record(&mut self, kind: OptionReply, body: &[u8]) {
        self.out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
        self.out.extend(self.option.0.to_be_bytes());
        self.out.extend(kind.0.to_be_bytes());
        let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.out.extend(length.to_be_bytes());
        self.out.extend(body);
    }

    fn ack(&mut self) {
        self.record(OptionReply::ACK, &[]);
    }

    fn error(&mut self, kind: OptionReply, text: &str) {
        self.record(kind, text.as_bytes());
    }

    fn unavailable(&mut self, unavailable: Unavailable) {
        let kind = match unavailable {
            Unavailable::Unknown => OptionReply::ERR_UNKNOWN,
            Unavailable::Departed => OptionReply::ERR_SHUTDOWN,
        };
        self.error(kind, &unavailable.to_string());
    }

    fn server(&mut self, name: &str, description: Option<&str>) {
        let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
        let mut body = length.to_be_bytes().to_vec();
        body.extend(name.as_bytes());
        body.extend(truncated(description.unwrap_or(""), STRING_BYTES_MAX).as_bytes());
        self.record(OptionReply::SERVER, &body);
    }

    fn info(&mut self, info: Info, body: &[u8]) {
        let mut record = info.0.to_be_bytes().to_vec();
        record.extend(body);
        self.record(OptionReply::INFO, &record);
    }
}

/// The most of a text that fits into `limit` bytes without cutting a character.
pub(crate) fn truncated(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len()))
        .rev()
        .find(|&at| text.is_char_boundary(at))
        .unwrap_or(0);
    text.get(..end).unwrap_or(text)
}

#[cfg(test)]
mod tests;
