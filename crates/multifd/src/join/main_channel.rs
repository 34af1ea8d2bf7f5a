//! The main connection: everything but the channels' pages, and when to wait for them.

use std::sync::Arc;
use std::time::Duration;

use vmferry_channel::{Listener, Reader};
use vmferry_stream::{
    Command, Configuration, Content, Decoder, Options, PageBits, RamRecord, Record, Section,
    SectionKind, Step,
};

use crate::error::{MultifdError, Unsupported, Uuid};
use crate::gather::surplus_channel;
use crate::join::junction::Junction;
use crate::window::{EARLY_DEVICE_BYTES_MAX, Window};

/// Items that are no pages are held until they are whole, so that channels can write meanwhile; longer
/// ones make them wait.
pub(crate) const HELD_BYTES_MAX: usize = 4 << 20;

/// Records of the main connection that are written at once, payload included.
const RECORDS_BYTES_MAX: usize = 256 << 10;

/// A channel too many, which is connected, has said its number before; it has only to be read.
const SURPLUS_PATIENCE: Duration = Duration::from_secs(5);

/// When the main thread waits for the channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// At each end of a section (7.2; machine types up to 8.0).
    EachSection,
    /// At each flush word (newer).
    EachRound,
}

/// Where the decoder is, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
enum Inside {
    /// Between items.
    Nothing,
    /// A section of ram.
    Ram(SectionKind),
    /// Another section, or another item.
    Item,
}

pub(crate) struct MainChannel {
    junction: Arc<Junction>,
    reader: Reader,
    window: Window,
    decoder: Decoder,
    inside: Inside,
    /// Section of ram, once it has begun.
    ram: Option<Section>,
    waits: Waits,
    /// The END of ram has held a flush word.
    is_flushed: bool,
    /// Sections have footers, or so it is believed: machine types up to 2.3 have neither them nor a
    /// configuration.
    footers: bool,
    is_set_up: bool,
    is_over: bool,
    /// What is to be written at the end of the item.
    held: Vec<u8>,
    /// Some of the item was written.
    is_spilled: bool,
    /// Records of ram that are not written yet.
    records: Vec<(RamRecord, Vec<u8>)>,
    records_bytes: usize,
    /// What the channels have said.
    uuid: [u8; 16],
    channels: u8,
    /// Where a channel too many would wait.
    listener: Listener,
}

impl MainChannel {
    pub(crate) fn new(
        junction: Arc<Junction>,
        reader: Reader,
        first_bytes: Vec<u8>,
        listener: Listener,
        (uuid, channels): ([u8; 16], u8),
    ) -> Self {
        Self {
            junction,
            reader,
            window: Window::starting_with(first_bytes),
            decoder: Decoder::new(Options::default()),
            inside: Inside::Nothing,
            ram: None,
            waits: Waits::EachSection,
            is_flushed: false,
            footers: false,
            is_set_up: false,
            is_over: false,
            held: Vec::new(),
            is_spilled: false,
            records: Vec::new(),
            records_bytes: 0,
            uuid,
            channels,
            listener,
        }
    }

    /// Pass the stream on to its end.
    pub(crate) fn run(mut self) {
        match self.items() {
            Ok(()) => {}
            // The consumer knows by itself where a stream ends, and whether it wants more of it.
            Err(MultifdError::Consumer(_)) if self.is_over => {}
            Err(error) => return self.junction.fail(error),
        }
        self.junction.end();
    }

    fn items(&mut self) -> Result<(), MultifdError> {
        loop {
            match self.decoder.step(self.window.bytes())? {
                Step::NeedMore(bytes) => {
                    self.write_records()?;
                    let filled = self.window.fill(&mut self.reader, bytes);
                    if !filled.map_err(MultifdError::main)? {
                        return self.input_ended();
                    }
                }
                Step::Record { record, used } => {
                    let raw = self.window.first(used).to_vec();
                    self.window.consume(used);
                    self.record(record, &raw)?;
                }
                Step::Payload(bytes) => self.pass_payload(bytes)?,
                Step::End => return Ok(()),
            }
        }
    }

    fn input_ended(&self) -> Result<(), MultifdError> {
        if self.is_over && self.junction.is_given_up() {
            return Ok(());
        }
        self.decoder.finish_at(self.end())?;
        Ok(())
    }

    /// Byte of the stream up to which it was read.
    fn end(&self) -> u64 {
        let unused = u64::try_from(self.window.bytes().len()).unwrap_or(u64::MAX);
        self.decoder.offset().saturating_add(unused)
    }

    fn record(&mut self, record: Record, raw: &[u8]) -> Result<(), MultifdError> {
        match record {
            Record::Configuration(configuration) => {
                self.configuration(&configuration)?;
                self.footers = true;
                self.pass(raw)
            }
            Record::Section(section) => self.section(&section, raw),
            Record::Ram(record) => self.ram_record(record, raw),
            Record::SectionEnd { .. } => self.section_end(raw),
            Record::Command(
                Command::Packaged { .. }
                | Command::PostcopyListen
                | Command::PostcopyRun
                | Command::PostcopyRamDiscard { .. }
                | Command::PostcopyResume,
            ) => Err(self.unsupported(Unsupported::Postcopy)),
            Record::Eof if self.is_set_up && !self.is_over => {
                Err(self.unsupported(Unsupported::NoEnd))
            }
            Record::Block(_) | Record::Bitmap(_) => self.pass(raw),
            Record::Header { .. }
            | Record::Command(_)
            | Record::DiscardRange(_)
            | Record::Eof
            | Record::Description { .. } => {
                self.pass(raw)?;
                self.item_end()
            }
        }
    }

    fn configuration(&mut self, configuration: &Configuration) -> Result<(), MultifdError> {
        if configuration.has_capability("mapped-ram") {
            return Err(self.unsupported(Unsupported::MappedRam));
        }
        if let Some(uuid) = configuration.uuid
            && uuid != self.uuid
        {
            return Err(MultifdError::Uuid {
                channel: 0,
                found: Uuid(self.uuid),
                expected: Uuid(uuid),
            });
        }
        self.set_page_bits(configuration.page_bits.unwrap_or(PageBits::X86))
    }

    fn set_page_bits(&self, page: PageBits) -> Result<(), MultifdError> {
        self.junction.with(|state| {
            state.page.get_or_insert(page);
            Ok(())
        })
    }

    fn section(&mut self, section: &Section, raw: &[u8]) -> Result<(), MultifdError> {
        // A stream without a configuration has the usual pages.
        self.set_page_bits(PageBits::X86)?;
        match (section.content(), section.kind) {
            (Content::Ram, SectionKind::Start) if self.ram.is_none() => {
                self.ram = Some(section.clone());
                self.inside = Inside::Ram(SectionKind::Start);
                self.pass(raw)
            }
            (Content::Ram, kind @ (SectionKind::Part | SectionKind::End))
                if self.is_set_up && !self.is_over =>
            {
                self.inside = Inside::Ram(kind);
                self.junction.with(|state| state.begin_pages(kind))
            }
            (Content::Ram, _) => Err(self.unsupported(Unsupported::SecondRamSection)),
            (Content::Device, _) if !self.is_over => {
                self.inside = Inside::Item;
                self.pass(raw)?;
                // Devices come behind the pages, but for a few.
                self.find_device_end(section)
            }
            (Content::Device, _) => {
                self.pass(raw)?;
                self.decoder.pass_rest();
                Ok(())
            }
            _ => {
                self.inside = Inside::Item;
                self.pass(raw)
            }
        }
    }

    /// A device in front of the END of ram: its length is not in the stream.
    fn find_device_end(&mut self, section: &Section) -> Result<(), MultifdError> {
        loop {
            if let Some(bytes) = self.window.device_bytes(section) {
                self.decoder
                    .skip_device(u64::try_from(bytes).unwrap_or(u64::MAX));
                return Ok(());
            }
            let seen = self.window.bytes().len();
            if seen >= EARLY_DEVICE_BYTES_MAX {
                let device = Unsupported::EarlyDevice(section.name.clone());
                return Err(self.unsupported(device));
            }
            let filled = self.window.fill(&mut self.reader, seen.saturating_add(1));
            if !filled.map_err(MultifdError::main)? {
                return Ok(self.decoder.finish_at(self.end()).map(drop)?);
            }
        }
    }

    fn ram_record(&mut self, record: RamRecord, raw: &[u8]) -> Result<(), MultifdError> {
        let Inside::Ram(kind) = self.inside else {
            return Err(self.unsupported(Unsupported::SecondRamSection));
        };
        let is_setup = kind == SectionKind::Start;
        match record {
            RamRecord::BlockList { .. } | RamRecord::Block { .. } if !is_setup => {
                Err(self.unsupported(Unsupported::SecondBlockList))
            }
            RamRecord::BlockList { .. } => self.pass(raw),
            RamRecord::Block {
                name, used_bytes, ..
            } => {
                // Channels may need it as soon as they have synchronised.
                self.junction.with(|state| {
                    state.blocks.insert(name, used_bytes);
                    Ok(())
                })?;
                self.pass(raw)
            }
            RamRecord::MultifdFlush if is_setup => {
                self.waits = Waits::EachRound;
                self.pass_sync()
            }
            RamRecord::MultifdFlush if self.waits == Waits::EachRound => {
                self.is_flushed = kind == SectionKind::End;
                self.pass_sync()
            }
            RamRecord::MultifdFlush => Err(self.unsupported(Unsupported::Flush)),
            RamRecord::EndOfSection => {
                // The footer is awaited before the end is written, and channels may go on until then.
                let is_due = match (self.waits, kind) {
                    (Waits::EachSection, _) => true,
                    // Each source synchronises in END; without a word, at its end.
                    (Waits::EachRound, SectionKind::End) => !self.is_flushed,
                    (Waits::EachRound, _) => false,
                };
                self.write_records()?;
                if is_due {
                    self.pass_sync()?;
                }
                if is_setup { self.set_up() } else { Ok(()) }
            }
            RamRecord::MappedBitmap { .. }
            | RamRecord::MappedGap { .. }
            | RamRecord::MappedPages { .. } => Err(self.unsupported(Unsupported::MappedRam)),
            _ if is_setup => Err(self.unsupported(Unsupported::PageInSetup)),
            RamRecord::Zero { .. }
            | RamRecord::Page { .. }
            | RamRecord::Xbzrle { .. }
            | RamRecord::Compressed { .. } => self.hold_record(record),
        }
    }

    /// Keep a page until enough of them can be written.
    fn hold_record(&mut self, record: RamRecord) -> Result<(), MultifdError> {
        let payload_bytes = usize::try_from(record.payload_bytes()).unwrap_or(usize::MAX);
        // Its payload is announced next; see `pass_payload`.
        self.records_bytes = self
            .records_bytes
            .saturating_add(payload_bytes)
            .saturating_add(size_of::<u64>());
        self.records.push((record, Vec::new()));
        if payload_bytes == 0 && self.records_bytes >= RECORDS_BYTES_MAX {
            return self.write_records();
        }
        Ok(())
    }

    fn write_records(&mut self) -> Result<(), MultifdError> {
        if self.records.is_empty() {
            return Ok(());
        }
        let records = std::mem::take(&mut self.records);
        self.records_bytes = 0;
        self.junction.with(|state| state.write_records(&records))
    }

    fn pass_payload(&mut self, bytes: u32) -> Result<(), MultifdError> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        if let (Inside::Ram(_), Some((_, payload))) = (&self.inside, self.records.last_mut()) {
            let filled = self.window.fill(&mut self.reader, bytes);
            if !filled.map_err(MultifdError::main)? {
                return self.cut(bytes);
            }
            payload.extend(self.window.first(bytes));
            self.window.consume(bytes);
            if self.records_bytes >= RECORDS_BYTES_MAX {
                self.write_records()?;
            }
            return Ok(());
        }
        let mut left = bytes;
        while left > 0 {
            let filled = self.window.fill(&mut self.reader, 1);
            if !filled.map_err(MultifdError::main)? {
                return self.cut(left);
            }
            let piece = self.window.first(left).to_vec();
            self.window.consume(piece.len());
            left = left.saturating_sub(piece.len());
            self.pass(&piece)?;
        }
        Ok(())
    }

    /// The input has ended `left` bytes before the end of announced payload.
    fn cut(&self, left: usize) -> Result<(), MultifdError> {
        let left = left.saturating_sub(self.window.bytes().len());
        let end = u64::try_from(left)
            .ok()
            .and_then(|left| self.decoder.offset().checked_sub(left));
        self.decoder.finish_at(end.unwrap_or_default())?;
        Ok(())
    }

    fn section_end(&mut self, raw: &[u8]) -> Result<(), MultifdError> {
        match std::mem::replace(&mut self.inside, Inside::Nothing) {
            Inside::Ram(SectionKind::Start) => match self.decoder.footers() {
                Some(found) if found != self.footers => {
                    Err(self.unsupported(Unsupported::Footers { found }))
                }
                _ => Ok(()),
            },
            Inside::Ram(kind) => {
                self.write_records()?;
                self.junction.with(|state| state.end_pages(kind))?;
                self.is_over = kind == SectionKind::End;
                Ok(())
            }
            _ => {
                self.pass(raw)?;
                self.item_end()
            }
        }
    }

    /// The list of blocks has ended. Its footer may be a long time coming: the source keeps it back until
    /// it has more to say on the main connection, and sends pages meanwhile. So it is written before it
    /// has come, and compared later.
    fn set_up(&mut self) -> Result<(), MultifdError> {
        // Every channel of the source has synchronised, so all of them are connected.
        let surplus = surplus_channel(&self.listener, self.reader.stop(), SURPLUS_PATIENCE)?;
        if let Some(handshake) = surplus {
            return Err(MultifdError::SurplusChannel {
                channel: handshake.channel,
                channels: self.channels,
            });
        }
        self.is_set_up = true;
        let footers = self.decoder.footers().unwrap_or(self.footers);
        self.footers = footers;
        let Some(ram) = self.ram.clone() else {
            return Ok(());
        };
        self.junction.with(|state| state.set_up(ram, footers))
    }

    /// Wait for the channels. Whatever stands before must be in the plain stream before they go on.
    fn pass_sync(&mut self) -> Result<(), MultifdError> {
        self.write_records()?;
        self.junction.pass_sync()
    }

    /// Pass on bytes of an item that is no page.
    fn pass(&mut self, bytes: &[u8]) -> Result<(), MultifdError> {
        if !self.is_set_up || self.is_over {
            return self.junction.with(|state| state.write(bytes));
        }
        self.held.extend(bytes);
        if self.held.len() > HELD_BYTES_MAX {
            self.is_spilled = true;
            let held = std::mem::take(&mut self.held);
            return self.junction.with(|state| state.write_items(&held, false));
        }
        Ok(())
    }

    fn item_end(&mut self) -> Result<(), MultifdError> {
        if self.held.is_empty() && !self.is_spilled {
            return Ok(());
        }
        self.is_spilled = false;
        let held = std::mem::take(&mut self.held);
        self.junction.with(|state| state.write_items(&held, true))
    }

    fn unsupported(&self, what: Unsupported) -> MultifdError {
        MultifdError::Unsupported {
            offset: self.decoder.offset(),
            what,
        }
    }
}
