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
mod tests {
    use std::time::Duration;

    use super::*;

    struct Shelf(Vec<&'static str>);

    impl Catalog for Shelf {
        type Export = String;

        fn list(&self) -> Vec<String> {
            self.0.iter().map(ToString::to_string).collect()
        }

        fn open(&self, name: &str) -> Result<(String, ExportInfo), Unavailable> {
            let info = ExportInfo {
                length: 1000,
                read_only: name == "ro",
                preferred_bytes: 4096,
            };
            match name {
                "moved" => Err(Unavailable::Departed),
                name if self.0.contains(&name) => Ok((name.to_owned(), info)),
                _ => Err(Unavailable::Unknown),
            }
        }

        fn description(&self, name: &str) -> Option<String> {
            Some(format!("about {name}"))
        }
    }

    /// A server's side under test; time stands still unless told.
    struct Bench {
        negotiation: Negotiation,
        shelf: Shelf,
        now: Instant,
        window: Vec<u8>,
        out: Vec<u8>,
    }

    impl Bench {
        fn with(exports: &[&'static str], client_flags: u32) -> Self {
            let now = Instant::now();
            let mut out = Vec::new();
            let negotiation = Negotiation::new(now + Duration::from_secs(10), &mut out);
            assert_eq!(out, b"NBDMAGICIHAVEOPT\0\x03");
            let mut bench = Self {
                negotiation,
                shelf: Shelf(exports.to_vec()),
                now,
                window: client_flags.to_be_bytes().to_vec(),
                out: Vec::new(),
            };
            assert_eq!(bench.run(), Ok(Progress::NeedMore));
            bench
        }

        fn new() -> Self {
            Self::with(&["disk", "ro"], 3)
        }

        /// Handle everything in the window.
        fn run(&mut self) -> Result<Progress<String>, Misbehaviour> {
            loop {
                let (used, progress) =
                    self.negotiation
                        .handle(self.now, &self.window, &self.shelf, &mut self.out)?;
                self.window.drain(..used);
                match progress {
                    Progress::Advanced => {}
                    progress => return Ok(progress),
                }
            }
        }

        fn option(
            &mut self,
            code: OptionCode,
            data: &[u8],
        ) -> Result<Progress<String>, Misbehaviour> {
            self.window.extend(OPTION_MAGIC.to_be_bytes());
            self.window.extend(code.0.to_be_bytes());
            self.window.extend((data.len() as u32).to_be_bytes());
            self.window.extend(data);
            self.out.clear();
            self.run()
        }

        /// The kinds and bodies of the replies to one option.
        fn replies(&mut self, code: OptionCode, data: &[u8]) -> Vec<(OptionReply, Vec<u8>)> {
            assert_eq!(self.option(code, data), Ok(Progress::NeedMore), "{code}");
            self.parse(code)
        }

        fn parse(&self, code: OptionCode) -> Vec<(OptionReply, Vec<u8>)> {
            let mut fields = Fields(&self.out);
            let mut replies = Vec::new();
            while let Some(magic) = fields.u64() {
                assert_eq!(magic, OPTION_REPLY_MAGIC);
                assert_eq!(fields.u32(), Some(code.0));
                let kind = OptionReply(fields.u32().unwrap());
                replies.push((kind, fields.string().unwrap().to_vec()));
            }
            replies
        }

        fn kinds(&mut self, code: OptionCode, data: &[u8]) -> Vec<OptionReply> {
            let replies = self.replies(code, data);
            replies.into_iter().map(|(kind, _)| kind).collect()
        }
    }

    fn strings(texts: &[&str], count_after_first: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, text) in texts.iter().enumerate() {
            bytes.extend((text.len() as u32).to_be_bytes());
            bytes.extend(text.as_bytes());
            if number == 0 && count_after_first {
                bytes.extend((texts.len() as u32 - 1).to_be_bytes());
            }
        }
        bytes
    }

    fn go(name: &str, wanted: &[Info]) -> Vec<u8> {
        let mut data = strings(&[name], false);
        data.extend((wanted.len() as u16).to_be_bytes());
        for info in wanted {
            data.extend(info.0.to_be_bytes());
        }
        data
    }

    #[test]
    fn go_describes_the_export_and_starts() {
        let mut bench = Bench::new();
        assert_eq!(
            bench.kinds(OptionCode::STRUCTURED_REPLY, &[]),
            [OptionReply::ACK]
        );
        let wanted = [Info::NAME, Info::DESCRIPTION, Info(99)];
        let progress = bench.option(OptionCode::GO, &go("disk", &wanted));
        let agreed = Agreed {
            export: "disk".to_owned(),
            structured: true,
            allocation: false,
        };
        assert_eq!(progress, Ok(Progress::Ready(agreed)));
        let replies = bench.parse(OptionCode::GO);
        let bodies: Vec<&[u8]> = replies.iter().map(|(_, body)| &body[..]).collect();
        assert_eq!(bodies[0][..10], [0, 0, 0, 0, 0, 0, 0, 0, 3, 0xe8]);
        assert_eq!(bodies[1], b"\0\x01disk");
        assert_eq!(bodies[2], b"\0\x02about disk");
        assert_eq!(bodies[3], [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
        assert_eq!(replies[4], (OptionReply::ACK, Vec::new()));
    }

    #[test]
    fn info_describes_and_goes_on() {
        let mut bench = Bench::new();
        let kinds = bench.kinds(OptionCode::INFO, &go("ro", &[]));
        assert_eq!(
            kinds,
            [OptionReply::INFO, OptionReply::INFO, OptionReply::ACK]
        );
        let flags = u16::from_be_bytes([bench.out[30], bench.out[31]]);
        assert_ne!(flags & transmission::READ_ONLY, 0);
        assert_eq!(flags & transmission::SEND_TRIM, 0);
        assert_eq!(flags & transmission::SEND_DF, 0);
    }

    #[test]
    fn exports_are_found_by_exact_name_or_as_the_only_one() {
        for (name, reply) in [
            ("dis", OptionReply::ERR_UNKNOWN),
            ("DISK", OptionReply::ERR_UNKNOWN),
            ("", OptionReply::ERR_UNKNOWN),
            ("moved", OptionReply::ERR_SHUTDOWN),
        ] {
            let mut bench = Bench::new();
            assert_eq!(bench.kinds(OptionCode::GO, &go(name, &[])), [reply]);
            let progress = bench.option(OptionCode::GO, &go("disk", &[]));
            assert!(matches!(progress, Ok(Progress::Ready(_))));
        }
        let mut bench = Bench::with(&["disk"], 3);
        let progress = bench.option(OptionCode::GO, &go("", &[]));
        assert!(matches!(progress, Ok(Progress::Ready(agreed)) if agreed.export == "disk"));
    }

    #[test]
    fn list_names_every_export() {
        let mut bench = Bench::new();
        let replies = bench.replies(OptionCode::LIST, &[]);
        assert_eq!(replies[0].1, b"\0\0\0\x04diskabout disk");
        assert_eq!(replies[1].0, OptionReply::SERVER);
        assert_eq!(replies[2].0, OptionReply::ACK);
    }

    #[test]
    fn contexts_need_structured_replies() {
        let mut bench = Bench::new();
        let data = strings(&["disk", BASE_ALLOCATION], true);
        for option in [OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT] {
            assert_eq!(bench.kinds(option, &data), [OptionReply::ERR_INVALID]);
        }
    }

    #[test]
    fn contexts_are_listed_by_wildcard_and_set_by_name() {
        let mut bench = Bench::new();
        bench.kinds(OptionCode::STRUCTURED_REPLY, &[]);
        let (list, set) = (OptionCode::LIST_META_CONTEXT, OptionCode::SET_META_CONTEXT);
        let (found, none) = (
            vec![OptionReply::META_CONTEXT, OptionReply::ACK],
            vec![OptionReply::ACK],
        );
        for (option, queries, kinds) in [
            (list, &["disk"][..], &found),
            (list, &["disk", "base:"], &found),
            (list, &["disk", "qemu:", "base:allocation"], &found),
            (list, &["disk", "qemu:"], &none),
            (set, &["disk"], &none),
            (set, &["disk", "base:"], &none),
            (set, &["disk", "base:allocation"], &found),
        ] {
            let data = strings(queries, true);
            assert_eq!(&bench.kinds(option, &data), kinds, "{option} {queries:?}");
        }
        let data = strings(&["other", BASE_ALLOCATION], true);
        assert_eq!(bench.kinds(set, &data), [OptionReply::ERR_UNKNOWN]);
    }

    #[test]
    fn a_context_counts_for_its_own_export_only() {
        for (name, allocation) in [("disk", true), ("ro", false)] {
            let mut bench = Bench::new();
            bench.kinds(OptionCode::STRUCTURED_REPLY, &[]);
            let data = strings(&["disk", BASE_ALLOCATION], true);
            bench.kinds(OptionCode::SET_META_CONTEXT, &data);
            let progress = bench.option(OptionCode::GO, &go(name, &[]));
            assert!(
                matches!(progress, Ok(Progress::Ready(agreed)) if agreed.allocation == allocation)
            );
        }
    }

    #[test]
    fn the_old_option_starts_without_a_reply() {
        for (flags, length) in [(3, 10), (1, 134), (0, 134)] {
            let mut bench = Bench::with(&["disk"], flags);
            let progress = bench.option(OptionCode::EXPORT_NAME, b"disk");
            assert!(matches!(progress, Ok(Progress::Ready(_))));
            assert_eq!(bench.out.len(), length);
        }
        let mut bench = Bench::new();
        assert_eq!(
            bench.option(OptionCode::EXPORT_NAME, b"other"),
            Err(Misbehaviour::ExportName(Unavailable::Unknown))
        );
        let mut bench = Bench::new();
        assert_eq!(
            bench.option(OptionCode::EXPORT_NAME, &[0xff]),
            Err(Misbehaviour::ExportNameInvalid(1))
        );
    }

    #[test]
    fn abort_is_acknowledged() {
        let mut bench = Bench::new();
        assert_eq!(
            bench.option(OptionCode::ABORT, b"why"),
            Ok(Progress::Goodbye)
        );
        assert_eq!(bench.parse(OptionCode::ABORT)[0].0, OptionReply::ACK);
    }

    #[test]
    fn unknown_options_are_refused_and_the_handshake_goes_on() {
        let mut bench = Bench::new();
        for option in [
            OptionCode::STARTTLS,
            OptionCode::EXTENDED_HEADERS,
            OptionCode(4),
            OptionCode(0xffff_ffff),
        ] {
            assert_eq!(bench.kinds(option, b"data"), [OptionReply::ERR_UNSUP]);
        }
    }

    #[test]
    fn unknown_client_flags_end_it() {
        let mut bench = Bench::new();
        bench.negotiation.phase = Phase::ClientFlags;
        bench.window = 4u32.to_be_bytes().to_vec();
        assert_eq!(bench.run(), Err(Misbehaviour::ClientFlags(4)));
    }

    #[test]
    fn an_option_without_its_magic_ends_it_at_once() {
        let mut bench = Bench::new();
        bench.window = b"GET / HT".to_vec();
        assert!(matches!(bench.run(), Err(Misbehaviour::OptionMagic(_))));
    }

    #[test]
    fn a_client_that_is_not_fixed_may_only_name_an_export() {
        let mut bench = Bench::with(&["disk"], 0);
        assert_eq!(
            bench.option(OptionCode::LIST, &[]),
            Err(Misbehaviour::NotFixed(OptionCode::LIST))
        );
    }

    #[test]
    fn an_option_at_the_limit_is_read_and_one_above_it_skipped() {
        let mut bench = Bench::new();
        let longest = vec![0; OPTION_BYTES_MAX as usize];
        assert_eq!(
            bench.kinds(OptionCode(99), &longest),
            [OptionReply::ERR_UNSUP]
        );
        let longer = vec![0; OPTION_BYTES_MAX as usize + 1];
        assert_eq!(
            bench.kinds(OptionCode::INFO, &longer),
            [OptionReply::ERR_TOO_BIG]
        );
        assert_eq!(
            bench.option(OptionCode::EXPORT_NAME, &longer),
            Err(Misbehaviour::ExportNameInvalid(OPTION_BYTES_MAX + 1))
        );
    }

    #[test]
    fn malformed_options_are_refused_and_the_handshake_goes_on() {
        let mut bench = Bench::new();
        bench.kinds(OptionCode::STRUCTURED_REPLY, &[]);
        let long_name = "x".repeat(STRING_BYTES_MAX + 1);
        let trailing = [go("disk", &[]), vec![0]].concat();
        let short = go("disk", &[Info::NAME]);
        let contexts = strings(&["disk", BASE_ALLOCATION], true);
        let mut many = contexts.clone();
        many[8] = 0xff;
        for (option, data) in [
            (OptionCode::LIST, &b"x"[..]),
            (OptionCode::STRUCTURED_REPLY, b"x"),
            (OptionCode::GO, b""),
            (OptionCode::GO, &trailing),
            (OptionCode::GO, &short[..short.len() - 1]),
            (OptionCode::GO, &go(&long_name, &[])),
            (OptionCode::INFO, &[0xff; 40]),
            (
                OptionCode::SET_META_CONTEXT,
                &contexts[..contexts.len() - 1],
            ),
            (
                OptionCode::SET_META_CONTEXT,
                &[&contexts[..], b"x"].concat(),
            ),
            (OptionCode::LIST_META_CONTEXT, &many),
        ] {
            assert_eq!(bench.kinds(option, data), [OptionReply::ERR_INVALID]);
        }
        let longest_name = go(&"x".repeat(STRING_BYTES_MAX), &[]);
        assert_eq!(
            bench.kinds(OptionCode::GO, &longest_name),
            [OptionReply::ERR_UNKNOWN]
        );
    }

    #[test]
    fn a_client_that_takes_too_long_is_dropped() {
        let mut bench = Bench::new();
        bench.now = bench.negotiation.deadline() - Duration::from_nanos(1);
        bench.kinds(OptionCode::LIST, &[]);
        bench.now = bench.negotiation.deadline();
        assert_eq!(
            bench.option(OptionCode::GO, &go("disk", &[])),
            Err(Misbehaviour::TimedOut)
        );
    }

    #[test]
    fn any_split_of_the_input_gives_the_same_replies() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let mut whole = Bench::new();
        let mut script = Vec::new();
        for (option, data) in [
            (OptionCode::STRUCTURED_REPLY, Vec::new()),
            (OptionCode(77), vec![1; 500]),
            (OptionCode::INFO, vec![2; OPTION_BYTES_MAX as usize + 9]),
            (OptionCode::LIST, Vec::new()),
            (
                OptionCode::SET_META_CONTEXT,
                strings(&["disk", BASE_ALLOCATION], true),
            ),
        ] {
            script.extend(OPTION_MAGIC.to_be_bytes());
            script.extend(option.0.to_be_bytes());
            script.extend((data.len() as u32).to_be_bytes());
            script.extend(data);
        }
        whole.window.clone_from(&script);
        assert_eq!(whole.run(), Ok(Progress::NeedMore));
        for _ in 0..50 {
            let mut split = Bench::new();
            let mut rest = &script[..];
            while !rest.is_empty() {
                let most = rest.len().min([3, 40, 9000][random.usize(..3)]);
                let (piece, tail) = rest.split_at(random.usize(1..=most));
                split.window.extend(piece);
                assert_eq!(split.run(), Ok(Progress::NeedMore));
                rest = tail;
            }
            assert!(split.out == whole.out);
        }
    }

    #[test]
    fn block_sizes_are_powers_of_two_in_bounds() {
        for (bytes, announced) in [
            (0, 512),
            (512, 512),
            (4095, 4096),
            (1 << 25, 1 << 25),
            (u32::MAX, 1 << 25),
        ] {
            assert_eq!(preferred(bytes), announced);
        }
    }
}
