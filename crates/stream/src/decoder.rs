//! The decoder of a whole stream, source to destination.
//!
//! ```text
//! Header ─▶ Configuration ─▶ Item ─┬─ START, FULL, PART, END ─▶ Body ─▶ Footer ─▶ Item
//!                                  ├─ command ─▶ [Discard ranges | package] ─▶ Item
//!                                  └─ EOF ─▶ AfterEof ─▶ [description] ─▶ Ended
//! Body of a device ─┬─ skip_device ─▶ Footer
//!                   └─ pass_rest ─▶ Opaque, to the end of the input
//! ```
//!
//! Every state reads one record from the start of the window; a state changes only when its record
//! was whole and right. So a decoder that answered [`Step::NeedMore`] or an error has not moved.

use std::collections::BTreeMap;

use crate::block::BlockChunk;
use crate::command::{Command, DiscardRange};
use crate::configuration::{CONFIGURATION, Configuration};
use crate::dirty_bitmap::{BitmapRecord, BitmapState};
use crate::error::{DecodeError, Fault};
use crate::limits::{MAX_DESCRIPTION_BYTES, MAX_HEADER_BYTES, MAX_LIVE_SECTIONS};
use crate::names::{InstanceId, Name, PageBits, SectionId};
use crate::ram::{RamRecord, RamState};
use crate::reader::{Parse, Reader, Stop};
use crate::section::{Content, FOOTER, Section, SectionKind};
use crate::tail::{Ending, Tail};

pub(crate) const MAGIC: u32 = 0x5145_564d;
pub(crate) const VERSION: u32 = 3;
pub(crate) const DESCRIPTION: u8 = 0x06;
/// So much of a window is passed on in one step; fits into the announcement.
const MAX_PASSED_BYTES: usize = 1 << 30;

/// What is known of a stream before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Does it have a configuration section?
    pub configuration: Expect,
    /// Do its sections end in footers?
    pub footers: Footers,
    /// Guest page size, unless the configuration says otherwise.
    pub page_bits: PageBits,
    /// Offset of the stream's first byte in its file. Matters for mapped-ram files alone, which say
    /// file offsets.
    pub start: u64,
}

impl Default for Options {
    /// A stream of any QEMU: configuration if it is there, footers if they are there, pages of 4 KiB.
    fn default() -> Self {
        Self {
            configuration: Expect::Optional,
            footers: Footers::Auto,
            page_bits: PageBits::X86,
            start: 0,
        }
    }
}

/// Is a part of the stream there?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It must be.
    Required,
    /// It may be.
    Optional,
    /// It must not be.
    Absent,
}

/// Do sections end in footers?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Footers {
    /// If the first section has one, all must. No item starts with a footer's first byte.
    Auto,
    /// All have one (machine types since 2.4).
    Present,
    /// None has one (machine types up to 2.3).
    Absent,
}

/// What a decoder says to a window of input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<R = Record> {
    /// The window must have at least so many bytes, at most
    /// [`MAX_HEADER_BYTES`](crate::limits::MAX_HEADER_BYTES).
    NeedMore(usize),
    /// A record was read; drop `used` bytes (possibly none) from the window.
    Record {
        /// The record.
        record: R,
        /// Its length in the window.
        used: usize,
    },
    /// The next bytes of input, so many, are payload of the record before. The caller takes them
    /// itself, from the window or from its source, before it calls again; they count as passed.
    /// Payload comes in one piece, except in the rest of a stream that is passed on unread.
    Payload(u32),
    /// The stream is over. What is left in the window does not belong to it.
    End,
}

/// A piece of the stream, without its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// The first eight bytes.
    Header {
        /// Always 3.
        version: u32,
    },
    /// The configuration section.
    Configuration(Configuration),
    /// A section begins; its body follows.
    Section(Section),
    /// In the body of a `block` section.
    Block(BlockChunk),
    /// In the body of a `ram` section.
    Ram(RamRecord),
    /// In the body of a `dirty-bitmap` section.
    Bitmap(BitmapRecord),
    /// A section ended, footer included.
    SectionEnd {
        /// Its id.
        id: SectionId,
    },
    /// A command.
    Command(Command),
    /// After [`Command::PostcopyRamDiscard`].
    DiscardRange(DiscardRange),
    /// The end of the guest's state.
    Eof,
    /// The description of the device sections; its JSON text is the payload that follows.
    Description {
        /// Bytes of text.
        bytes: u32,
    },
}

impl Record {
    /// Bytes of payload that follow; 0 for sections of devices, whose length is not in the record.
    #[must_use]
    pub fn payload_bytes(&self) -> u32 {
        match self {
            Self::Block(chunk) => chunk.payload_bytes(),
            Self::Ram(record) => record.payload_bytes(),
            Self::Bitmap(record) => record.payload_bytes(),
            Self::Command(command) => command.payload_bytes(),
            Self::Description { bytes } => *bytes,
            Self::Header { .. }
            | Self::Configuration(_)
            | Self::Section(_)
            | Self::SectionEnd { .. }
            | Self::DiscardRange(_)
            | Self::Eof => 0,
        }
    }
}

/// Decodes one stream. See the [crate's documentation](crate) for a loop around it.
#[derive(Clone, Debug)]
pub struct Decoder {
    options: Options,
    /// Known once the first section has ended, unless an option says it.
    footers: Option<bool>,
    state: State,
    /// The stream is the content of a package: no header, no EOF.
    package: bool,
    /// A package went by: nothing follows the EOF.
    postcopy: bool,
    described: bool,
    /// START sections, for PART and END; at most [`MAX_LIVE_SECTIONS`].
    live: BTreeMap<SectionId, Live>,
    /// The section that [`State::Body`] and [`State::Footer`] are about.
    open: Option<Section>,
    ram: RamState,
    bitmap: BitmapState,
    /// Payload that was not announced yet.
    payload_bytes: u64,
    offset: u64,
    /// How far windows reached.
    seen: u64,
    /// The field that the window was too short for.
    awaited: &'static str,
}

#[derive(Clone, Debug)]
struct Live {
    name: Name,
    instance: InstanceId,
    version: u32,
}

#[derive(Clone, Debug)]
enum State {
    Header,
    Configuration,
    Item,
    Body(Content),
    Footer,
    Discard { ranges: u16 },
    AfterEof,
    Ended,
    Opaque(Tail),
}

impl Decoder {
    /// A decoder at the first byte of a stream.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Self {
            options,
            footers: match options.footers {
                Footers::Auto => None,
                Footers::Present => Some(true),
                Footers::Absent => Some(false),
            },
            state: State::Header,
            package: false,
            postcopy: false,
            described: false,
            live: BTreeMap::new(),
            open: None,
            ram: RamState::new(options.page_bits, options.start),
            bitmap: BitmapState::default(),
            payload_bytes: 0,
            offset: 0,
            seen: 0,
            awaited: "header",
        }
    }

    /// A decoder for the content of a [`Command::Packaged`] of this stream. Its offsets start at 0.
    /// It may end after any item; what follows POSTCOPY_RUN is to be ignored.
    #[must_use]
    pub fn package(&self) -> Self {
        Self {
            package: true,
            ..self.resumed()
        }
    }

    /// A decoder for the connection on which this stream goes on after an interrupted postcopy: no
    /// header, the same section ids, the RAM block named anew. Its offsets start at 0.
    #[must_use]
    pub fn resumed(&self) -> Self {
        let mut resumed = Self {
            state: State::Item,
            open: None,
            payload_bytes: 0,
            offset: 0,
            seen: 0,
            awaited: "section type",
            ..self.clone()
        };
        resumed.ram.resume();
        resumed
    }

    /// Do sections end in footers? `None` while nothing tells.
    #[must_use]
    pub fn footers(&self) -> Option<bool> {
        self.footers
    }

    /// Offset in the stream of the next byte that was neither used nor announced as payload.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Look at the next bytes of the stream. Repeats its answer when called with the same window
    /// after [`Step::NeedMore`], [`Step::End`] or an error.
    pub fn step(&mut self, window: &[u8]) -> Result<Step, DecodeError> {
        if self.payload_bytes > 0 {
            return Ok(self.announce());
        }
        self.seen = self.seen.max(self.offset.saturating_add(bytes_of(window)));
        if let State::Opaque(tail) = &mut self.state {
            let window = window.get(..MAX_PASSED_BYTES).unwrap_or(window);
            if window.is_empty() {
                return Ok(Step::NeedMore(1));
            }
            tail.push(window);
            self.payload_bytes = bytes_of(window);
            return Ok(self.announce());
        }
        let mut reader = Reader::new(window, self.offset);
        match self.read(&mut reader) {
            Ok(Some(record)) => {
                let used = reader.used();
                self.offset = self.offset.saturating_add(u64::try_from(used).unwrap_or(0));
                self.payload_bytes = u64::from(record.payload_bytes());
                Ok(Step::Record { record, used })
            }
            Ok(None) => Ok(Step::End),
            Err(Stop::Short { needed, field }) => {
                self.awaited = field;
                if needed > MAX_HEADER_BYTES {
                    return Err(self.header_too_long(needed));
                }
                Ok(Step::NeedMore(needed))
            }
            Err(Stop::Wrong(error)) => Err(error),
        }
    }

    /// The body of the device section that was returned last has `bytes` bytes. They are announced as
    /// payload; then the footer is checked. No effect anywhere else.
    pub fn skip_device(&mut self, bytes: u64) {
        if matches!(self.state, State::Body(Content::Device)) {
            self.payload_bytes = bytes;
            self.state = State::Footer;
        }
    }

    /// `bytes` bytes belong to the body of the device section that was returned last, and there are
    /// more: [`Decoder::skip_device`] says where it ends. No effect anywhere else.
    pub fn part_of_device(&mut self, bytes: u64) {
        if matches!(self.state, State::Body(Content::Device)) {
            self.payload_bytes = bytes;
        }
    }

    /// Is this the id of a live section, which PART and END may name?
    #[must_use]
    pub fn is_live(&self, id: SectionId) -> bool {
        self.live.contains_key(&id)
    }

    /// Decode no more: announce whatever a window holds as payload, to the end of the input. For a
    /// device section whose length is not known, although it may be called at any record.
    /// [`Decoder::ending`] says whether what went by looks like a whole stream.
    pub fn pass_rest(&mut self) {
        if !matches!(self.state, State::Opaque(_)) {
            self.state = State::Opaque(Tail::new(self.footers != Some(false)));
            self.awaited = "payload";
        }
    }

    /// How the stream ends if the input ends here; `None` if it would be truncated.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        if self.payload_bytes > 0 {
            return None;
        }
        match &self.state {
            State::Opaque(tail) => tail.ending(),
            State::Ended if self.described => Some(Ending::WithDescription),
            State::Ended => Some(Ending::WithoutDescription),
            State::AfterEof if self.seen <= self.offset => Some(Ending::WithoutDescription),
            State::Item if self.package && self.seen <= self.offset => {
                Some(Ending::WithoutDescription)
            }
            _ => None,
        }
    }

    /// The input ended: all of it was shown in windows or announced and consumed as payload.
    pub fn finish(&self) -> Result<Ending, DecodeError> {
        self.finish_at(self.seen.max(self.offset))
    }

    /// The input ended at byte `end`: before [`Decoder::offset`] if announced payload was cut short.
    pub fn finish_at(&self, end: u64) -> Result<Ending, DecodeError> {
        match self.ending() {
            Some(ending) if end >= self.offset => Ok(ending),
            _ => Err(DecodeError {
                offset: end,
                field: self.awaited,
                fault: Fault::Truncated(self.place()),
            }),
        }
    }

    /// Where in the stream the decoder is, in words.
    fn place(&self) -> String {
        match (&self.state, &self.open) {
            (State::Opaque(_), None) => "what was passed on".into(),
            (State::Opaque(_), Some(section)) => {
                format!("what was passed on from section '{}' on", section.name)
            }
            (State::Header, _) => "the header".into(),
            (State::Configuration, _) => "the configuration".into(),
            (State::Body(_) | State::Footer, Some(section)) => {
                format!("section '{}' ({})", section.name, section.id)
            }
            (State::AfterEof | State::Ended, _) => "the description".into(),
            (State::Discard { .. }, _) => "a command".into(),
            _ => "the list of sections".into(),
        }
    }

    fn announce(&mut self) -> Step {
        let bytes = u32::try_from(self.payload_bytes).unwrap_or(u32::MAX);
        self.payload_bytes = self.payload_bytes.saturating_sub(u64::from(bytes));
        self.offset = self.offset.saturating_add(u64::from(bytes));
        self.awaited = "payload";
        Step::Payload(bytes)
    }

    fn header_too_long(&self, needed: usize) -> DecodeError {
        DecodeError {
            offset: self.offset,
            field: self.awaited,
            fault: Fault::OverMaximum {
                value: u64::try_from(needed).unwrap_or(u64::MAX),
                max: u64::try_from(MAX_HEADER_BYTES).unwrap_or(u64::MAX),
            },
        }
    }

    /// Read one record; `None` at the end.
    fn read(&mut self, reader: &mut Reader<'_>) -> Parse<Option<Record>> {
        match &self.state {
            State::Header => self.read_header(reader).map(Some),
            State::Configuration => self.read_configuration(reader).map(Some),
            State::Item => self.read_item(reader).map(Some),
            State::Body(content) => self.read_body(*content, reader).map(Some),
            State::Footer => self.read_footer(reader).map(Some),
            State::Discard { ranges } => {
                let left = ranges.saturating_sub(1);
                let range = DiscardRange::read(reader)?;
                self.state = match left {
                    0 => State::Item,
                    ranges => State::Discard { ranges },
                };
                Ok(Some(Record::DiscardRange(range)))
            }
            State::AfterEof => self.read_description(reader),
            State::Ended | State::Opaque(_) => Ok(None),
        }
    }

    fn read_header(&mut self, reader: &mut Reader<'_>) -> Parse<Record> {
        let magic = reader.u32("magic")?;
        if magic != MAGIC {
            return Err(reader.wrong(Fault::BadMagic(magic)));
        }
        match reader.u32("version")? {
            VERSION => {
                self.state = State::Configuration;
                Ok(Record::Header { version: VERSION })
            }
            2 => Err(reader.wrong(Fault::ObsoleteVersion)),
            version => Err(reader.wrong(Fault::UnsupportedVersion(version))),
        }
    }

    fn read_configuration(&mut self, reader: &mut Reader<'_>) -> Parse<Record> {
        let kind = reader.peek_u8("configuration")?;
        match (kind, self.options.configuration) {
            (CONFIGURATION, Expect::Required | Expect::Optional) => {}
            (_, Expect::Required) => return Err(reader.wrong(Fault::ConfigurationMissing(kind))),
            _ => return self.read_item(reader),
        }
        reader.u8("configuration")?;
        let configuration = Configuration::read(reader)?;
        if let Some(bits) = configuration.page_bits {
            self.ram.set_page_bits(bits);
        }
        self.ram.guest_addresses = configuration.has_capability("x-ignore-shared");
        self.ram.mapped = configuration.has_capability("mapped-ram");
        self.state = State::Item;
        Ok(Record::Configuration(configuration))
    }

    fn read_item(&mut self, reader: &mut Reader<'_>) -> Parse<Record> {
        match reader.u8("section type")? {
            0x00 => {
                self.state = if self.postcopy {
                    State::Ended
                } else {
                    State::AfterEof
                };
                Ok(Record::Eof)
            }
            0x01 => self.read_named(SectionKind::Start, reader),
            0x02 => self.read_continued(SectionKind::Part, reader),
            0x03 => self.read_continued(SectionKind::End, reader),
            0x04 => self.read_named(SectionKind::Full, reader),
            0x05 => Err(reader.wrong(Fault::SubsectionAtTopLevel)),
            0x06 => Err(reader.wrong(Fault::DescriptionBeforeEof)),
            CONFIGURATION => Err(reader.wrong(Fault::ConfigurationMisplaced)),
            0x08 => self.read_command(reader),
            other => Err(reader.wrong(Fault::UnknownSectionType(other))),
        }
    }

    fn read_named(&mut self, kind: SectionKind, reader: &mut Reader<'_>) -> Parse<Record> {
        let section = Section::read(reader, kind)?;
        if let Some(supported) = section.content().version()
            && section.version != supported
        {
            return Err(reader.wrong(Fault::UnsupportedSectionVersion {
                name: section.name,
                version: section.version,
                supported,
            }));
        }
        if kind == SectionKind::Start {
            if let Some(live) = self.live.get(&section.id) {
                return Err(reader.wrong(Fault::SectionStartedTwice {
                    id: section.id,
                    name: live.name.clone(),
                }));
            }
            let count = u64::try_from(self.live.len()).unwrap_or(u64::MAX);
            let max = u64::try_from(MAX_LIVE_SECTIONS).unwrap_or(u64::MAX);
            reader.at_most(count.saturating_add(1), max)?;
            self.live.insert(
                section.id,
                Live {
                    name: section.name.clone(),
                    instance: section.instance,
                    version: section.version,
                },
            );
        }
        Ok(self.enter(section))
    }

    fn read_continued(&mut self, kind: SectionKind, reader: &mut Reader<'_>) -> Parse<Record> {
        let id = SectionId(reader.u32("section id")?);
        // A QEMU would also go on with a section that was FULL. No sender does that: FULL is all there
        // is of a device. And a stream has as many of them as its peer likes, too many to remember.
        let Some(live) = self.live.get(&id) else {
            return Err(reader.wrong(Fault::SectionNeverStarted(id)));
        };
        let section = Section {
            kind,
            id,
            name: live.name.clone(),
            instance: live.instance,
            version: live.version,
        };
        Ok(self.enter(section))
    }

    fn enter(&mut self, section: Section) -> Record {
        self.state = State::Body(section.content());
        if section.content() == Content::Device {
            // The caller takes it from here: the next field is not asked for.
            self.awaited = "payload";
        }
        self.open = Some(section.clone());
        Record::Section(section)
    }

    fn read_body(&mut self, content: Content, reader: &mut Reader<'_>) -> Parse<Record> {
        let (record, ends) = match content {
            Content::Block => {
                let chunk = BlockChunk::read(reader)?;
                let ends = chunk == BlockChunk::EndOfSection;
                (Record::Block(chunk), ends)
            }
            Content::Ram => {
                let kind = self
                    .open
                    .as_ref()
                    .map_or(SectionKind::Part, |open| open.kind);
                let record = self.ram.read(reader, kind)?;
                let ends = record == RamRecord::EndOfSection;
                (Record::Ram(record), ends)
            }
            Content::DirtyBitmap => {
                let record = self.bitmap.read(reader)?;
                let ends = record == BitmapRecord::EndOfSection;
                (Record::Bitmap(record), ends)
            }
            Content::Device => {
                let (section, id) = self.open_section();
                return Err(reader.wrong(Fault::DeviceBody { section, id }));
            }
        };
        if ends {
            self.state = State::Footer;
        }
        Ok(record)
    }

    fn read_footer(&mut self, reader: &mut Reader<'_>) -> Parse<Record> {
        let (section, id) = self.open_section();
        let present = match self.footers {
            Some(present) => present,
            None => reader.peek_u8("section footer")? == FOOTER,
        };
        if present {
            let found = reader.u8("section footer")?;
            if found != FOOTER {
                return Err(reader.wrong(Fault::FooterMissing { section, id, found }));
            }
            let found = SectionId(reader.u32("section footer id")?);
            if found != id {
                return Err(reader.wrong(Fault::FooterWrong { section, id, found }));
            }
        }
        self.footers = Some(present);
        self.open = None;
        self.state = State::Item;
        Ok(Record::SectionEnd { id })
    }

    fn open_section(&self) -> (Name, SectionId) {
        let open = self.open.as_ref();
        open.map_or((Name::default(), SectionId(0)), |section| {
            (section.name.clone(), section.id)
        })
    }

    fn read_command(&mut self, reader: &mut Reader<'_>) -> Parse<Record> {
        let command = Command::read(reader)?;
        self.state = State::Item;
        match &command {
            Command::PostcopyAdvise(Some(sizes)) => self.ram.advised_page_bytes = sizes.all_bytes,
            Command::PostcopyRamDiscard { ranges, .. } => {
                self.state = State::Discard { ranges: *ranges };
            }
            Command::Packaged { .. } => self.postcopy = true,
            _ => {}
        }
        Ok(Record::Command(command))
    }

    fn read_description(&mut self, reader: &mut Reader<'_>) -> Parse<Option<Record>> {
        if reader.peek_u8("section type")? != DESCRIPTION {
            self.state = State::Ended;
            return Ok(None);
        }
        reader.u8("section type")?;
        let bytes = reader.u32("description length")?;
        reader.at_most(u64::from(bytes), u64::from(MAX_DESCRIPTION_BYTES))?;
        self.state = State::Ended;
        self.described = true;
        Ok(Some(Record::Description { bytes }))
    }
}

fn bytes_of(window: &[u8]) -> u64 {
    u64::try_from(window.len()).unwrap_or(u64::MAX)
}
