//! The plain stream in: pages to the channels, everything else to the main connection.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_channel::{ChannelError, Reader, Socket, Stop, Uri, Writer, connect};
use vmferry_stream::{
    Command, Configuration, Content, Decoder, Encoder, Options, PageBits, RamPage, RamRecord,
    Record, Section, SectionKind, Step,
};

use crate::error::{MultifdError, Unsupported};
use crate::flush::Flush;
use crate::packet::{Handshake, PacketFormat};
use crate::sockets::{duplicate, halves, host};
use crate::split::channel::Channel;
use crate::split::lanes::{Batch, Lanes};
use crate::split::sent::Sent;
use crate::split::{PanicGuard, SplitOptions};
use crate::window::{EARLY_DEVICE_BYTES_MAX, Window};

/// Bytes for the main connection that are kept back.
const KEPT_BYTES_MAX: usize = 64 << 10;

/// A connect that waits is looked after so often.
const CONNECT_SLICE: Duration = Duration::from_millis(500);

/// Where the decoder is, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    Nothing,
    Ram(SectionKind),
}

pub(crate) struct MainChannel {
    lanes: Arc<Lanes>,
    reader: Reader,
    writer: Writer,
    window: Window,
    decoder: Decoder,
    encoder: Encoder,
    options: SplitOptions,
    /// Where to connect the channels, and how long that may take.
    uri: Uri,
    patience: Duration,
    channels: Vec<JoinHandle<()>>,
    flush: Flush,
    page: PageBits,
    inside: Inside,
    ram: Option<Section>,
    /// A PART has begun: devices of before have all come.
    has_pages: bool,
    /// No page follows.
    is_over: bool,
    sent: Sent,
    batch: Option<Batch>,
    /// The page whose payload follows.
    awaited: Option<RamPage>,
    /// For the main connection.
    kept: Vec<u8>,
}

impl MainChannel {
    pub(crate) fn new(
        lanes: Arc<Lanes>,
        (reader, writer): (Reader, Writer),
        options: SplitOptions,
        uri: Uri,
        patience: Duration,
    ) -> Self {
        Self {
            lanes,
            reader,
            writer,
            window: Window::default(),
            decoder: Decoder::new(Options::default()),
            encoder: Encoder::new(true),
            options,
            uri,
            patience,
            channels: Vec::new(),
            flush: Flush::EachRound,
            page: PageBits::X86,
            inside: Inside::Nothing,
            ram: None,
            has_pages: false,
            is_over: false,
            sent: Sent::default(),
            batch: None,
            awaited: None,
            kept: Vec::new(),
        }
    }

    /// Send the stream to its end.
    pub(crate) fn run(mut self) {
        let outcome = self.items().and_then(|()| {
            self.flush_kept()?;
            // A destination without a description waits for this.
            self.writer.shutdown().map_err(MultifdError::main)
        });
        if let Err(error) = outcome {
            self.lanes.fail(error);
        }
        self.lanes.close();
        let ends: Vec<_> = self.channels.drain(..).map(JoinHandle::join).collect();
        if ends.iter().any(Result::is_err) {
            self.lanes.fail(MultifdError::Panicked);
        }
        self.lanes.through();
    }

    fn items(&mut self) -> Result<(), MultifdError> {
        loop {
            let step = self.decoder.step(self.window.bytes());
            match step.map_err(MultifdError::Plain)? {
                Step::NeedMore(bytes) => {
                    self.flush_kept()?;
                    if !self.fill(bytes)? {
                        return self.input_ended();
                    }
                }
                Step::Record { record, used } => {
                    let raw = self.window.first(used).to_vec();
                    self.window.consume(used);
                    self.record(record, &raw)?;
                }
                Step::Payload(bytes) => self.payload(bytes)?,
                Step::End => return Ok(()),
            }
            if self.kept.len() >= KEPT_BYTES_MAX {
                self.flush_kept()?;
            }
        }
    }

    fn fill(&mut self, bytes: usize) -> Result<bool, MultifdError> {
        let filled = self.window.fill(&mut self.reader, bytes);
        filled.map_err(MultifdError::consumer)
    }

    /// Whoever writes the stream has closed it.
    fn input_ended(&self) -> Result<(), MultifdError> {
        match self.decoder.finish() {
            Ok(_) => Ok(()),
            Err(error) => {
                tracing::debug!(%error, "the stream to be sent has no end");
                Err(MultifdError::Abandoned)
            }
        }
    }

    fn flush_kept(&mut self) -> Result<(), MultifdError> {
        let outcome = self.writer.write_all(&self.kept);
        self.kept.clear();
        outcome.map_err(MultifdError::main)
    }

    fn record(&mut self, record: Record, raw: &[u8]) -> Result<(), MultifdError> {
        match record {
            Record::Configuration(configuration) => {
                self.kept.extend(raw);
                self.open_channels(&configuration)
            }
            Record::Section(section) => {
                if self.channels.is_empty() {
                    self.open_channels(&Configuration::default())?;
                }
                self.section(section, raw)
            }
            Record::Ram(record) => self.ram_record(record),
            Record::SectionEnd { .. } => {
                if self.inside == Inside::Ram(SectionKind::Start) {
                    // Known from the first section on.
                    let footers = self.decoder.footers() != Some(false);
                    self.encoder = Encoder::new(footers);
                }
                if self.inside == Inside::Ram(SectionKind::End) {
                    self.is_over = true;
                }
                self.inside = Inside::Nothing;
                self.kept.extend(raw);
                Ok(())
            }
            Record::Command(
                Command::PostcopyAdvise(Some(_))
                | Command::Packaged { .. }
                | Command::PostcopyListen
                | Command::PostcopyRun
                | Command::PostcopyRamDiscard { .. }
                | Command::PostcopyResume,
            ) => Err(self.unsupported(Unsupported::Postcopy)),
            Record::Eof => {
                self.settle()?;
                self.kept.extend(raw);
                Ok(())
            }
            Record::Header { .. }
            | Record::Block(_)
            | Record::Bitmap(_)
            | Record::Command(_)
            | Record::DiscardRange(_)
            | Record::Description { .. } => {
                self.kept.extend(raw);
                Ok(())
            }
        }
    }

    /// Connect the channels: what they have to say is known now.
    fn open_channels(&mut self, configuration: &Configuration) -> Result<(), MultifdError> {
        if configuration.has_capability("mapped-ram") {
            return Err(self.unsupported(Unsupported::MappedRam));
        }
        let machine = configuration.machine.as_str();
        self.flush = (self.options.flush).unwrap_or_else(|| Flush::of_machine(machine));
        self.page = configuration.page_bits.unwrap_or(PageBits::X86);
        let format = PacketFormat {
            page: self.page,
            compression: self.options.compression,
        };
        let uuid = configuration.uuid.or(self.options.uuid);
        let numbers = Arc::new(AtomicU64::new(0));
        // The destination tells its main connection by what comes over it.
        self.flush_kept()?;
        let deadline = Instant::now().checked_add(self.patience);
        for channel in 0..self.options.channels {
            let stop = self.writer.stop().clone();
            let socket = self.connect(&stop, deadline)?;
            self.lanes.add_socket(duplicate(&socket)?)?;
            let (_, writer) = halves(socket, &stop)?;
            self.lanes.count(writer.counter());
            let handshake = Handshake {
                uuid: uuid.unwrap_or_default(),
                channel,
            };
            let lanes = Arc::clone(&self.lanes);
            let channel = Channel::open(lanes, writer, handshake, format, Arc::clone(&numbers))?;
            let guard = PanicGuard(Arc::clone(&self.lanes));
            let thread = std::thread::Builder::new()
                .name(format!("multifd-{}", handshake.channel))
                .spawn(move || {
                    let _guard = guard;
                    channel.run();
                });
            self.channels.push(thread.map_err(host("start"))?);
        }
        Ok(())
    }

    /// Connect one channel, unless it takes too long or nobody wants it any more.
    fn connect(&self, stop: &Stop, deadline: Option<Instant>) -> Result<Socket, MultifdError> {
        loop {
            let left = deadline.map_or(CONNECT_SLICE, |at| {
                at.saturating_duration_since(Instant::now())
            });
            match connect(&self.uri, stop, left.min(CONNECT_SLICE)) {
                Err(ChannelError::TimedOut { .. })
                    if left > CONNECT_SLICE && !self.lanes.has_failed() => {}
                outcome => return outcome.map_err(MultifdError::connect),
            }
        }
    }

    fn section(&mut self, section: Section, raw: &[u8]) -> Result<(), MultifdError> {
        match (section.content(), section.kind) {
            (Content::Ram, SectionKind::Start) if self.ram.is_none() => {
                self.inside = Inside::Ram(SectionKind::Start);
                self.ram = Some(section);
                self.kept.extend(raw);
                Ok(())
            }
            (Content::Ram, kind @ (SectionKind::Part | SectionKind::End)) if !self.is_over => {
                self.inside = Inside::Ram(kind);
                self.has_pages = true;
                // END is only begun where it ends: a synchronisation among its pages may have to end
                // a section, and nothing follows an END.
                self.begin_section(SectionKind::Part);
                Ok(())
            }
            (Content::Ram, _) => Err(self.unsupported(Unsupported::SecondRamSection)),
            (Content::Device, kind) => {
                self.kept.extend(raw);
                // Most come behind the pages; in a background snapshot there is no END before them.
                if self.is_over || self.has_pages && kind == SectionKind::Full {
                    self.settle()?;
                    self.decoder.pass_rest();
                    return Ok(());
                }
                self.find_device_end(&section)
            }
            _ => {
                self.kept.extend(raw);
                Ok(())
            }
        }
    }

    /// A device in front of the pages: its length is not in the stream.
    fn find_device_end(&mut self, section: &Section) -> Result<(), MultifdError> {
        self.flush_kept()?;
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
            if !self.fill(seen.saturating_add(1))? {
                return Err(MultifdError::Abandoned);
            }
        }
    }

    fn ram_record(&mut self, record: RamRecord) -> Result<(), MultifdError> {
        let Inside::Ram(kind) = self.inside else {
            return Err(self.unsupported(Unsupported::SecondRamSection));
        };
        let is_setup = kind == SectionKind::Start;
        match record {
            RamRecord::BlockList { .. } | RamRecord::Block { .. } if !is_setup => {
                Err(self.unsupported(Unsupported::SecondBlockList))
            }
            RamRecord::BlockList { .. } => {
                self.encode(&record);
                Ok(())
            }
            RamRecord::Block {
                ref name,
                used_bytes,
                ..
            } => {
                self.sent.add_block(name.clone(), used_bytes);
                self.encode(&record);
                Ok(())
            }
            // Ours is written where it is needed.
            RamRecord::MultifdFlush => Ok(()),
            RamRecord::EndOfSection => self.end_section(kind),
            RamRecord::Xbzrle { .. } => Err(self.unsupported(Unsupported::Xbzrle)),
            RamRecord::Compressed { .. } => Err(self.unsupported(Unsupported::CompressedPages)),
            RamRecord::MappedBitmap { .. }
            | RamRecord::MappedGap { .. }
            | RamRecord::MappedPages { .. } => Err(self.unsupported(Unsupported::MappedRam)),
            RamRecord::Zero { .. } | RamRecord::Page { .. } if is_setup => {
                Err(self.unsupported(Unsupported::PageInSetup))
            }
            RamRecord::Zero { ref page, .. } => {
                self.note(page)?;
                self.encode(&record);
                Ok(())
            }
            RamRecord::Page { page, .. } => {
                self.note(&page)?;
                self.awaited = Some(page);
                Ok(())
            }
        }
    }

    fn encode(&mut self, record: &RamRecord) {
        self.encoder
            .record(&Record::Ram(record.clone()), &mut self.kept);
    }

    /// A page goes out. If it did before, that must have arrived.
    fn note(&mut self, page: &RamPage) -> Result<(), MultifdError> {
        let noted = self.sent.note(&page.block, page.offset_bytes, self.page);
        match noted {
            Some(false) => return Ok(()),
            Some(true) => {}
            None => {
                let block = page.block.clone();
                return Err(self.unsupported(Unsupported::PageOutsideBlock(block)));
            }
        }
        self.synchronise()?;
        if self.flush == Flush::EachSection {
            self.close_section();
            self.begin_section(SectionKind::Part);
        }
        // It is gone from the notes again.
        self.sent.note(&page.block, page.offset_bytes, self.page);
        Ok(())
    }

    /// Whatever was given to the channels before arrives before what follows.
    fn synchronise(&mut self) -> Result<(), MultifdError> {
        self.give_batch()?;
        self.flush_kept()?;
        self.lanes.synchronise()?;
        if self.flush == Flush::EachRound {
            self.encode(&RamRecord::MultifdFlush);
        }
        self.sent.clear();
        Ok(())
    }

    fn end_section(&mut self, kind: SectionKind) -> Result<(), MultifdError> {
        match (kind, self.flush) {
            (SectionKind::Start, _) | (_, Flush::EachSection) => self.synchronise()?,
            (_, Flush::EachRound) => self.give_batch()?,
        }
        if kind == SectionKind::End {
            // What was begun as a PART.
            self.close_section();
            self.begin_section(SectionKind::End);
            self.synchronise()?;
        }
        self.encode(&RamRecord::EndOfSection);
        self.flush_kept()
    }

    fn begin_section(&mut self, kind: SectionKind) {
        if let Some(ram) = &self.ram {
            let section = Record::Section(ram.with_kind(kind));
            self.encoder.record(&section, &mut self.kept);
        }
    }

    fn close_section(&mut self) {
        self.encode(&RamRecord::EndOfSection);
        if let Some(ram) = &self.ram {
            let end = Record::SectionEnd { id: ram.id };
            self.encoder.record(&end, &mut self.kept);
        }
    }

    /// Pages came without an END: what is under way must arrive before devices do.
    fn settle(&mut self) -> Result<(), MultifdError> {
        if !self.is_over && !self.sent.is_empty() && self.flush == Flush::EachRound {
            let device = std::mem::take(&mut self.kept);
            self.begin_section(SectionKind::Part);
            self.synchronise()?;
            self.close_section();
            self.kept.extend(device);
        }
        self.is_over = true;
        Ok(())
    }

    fn give_batch(&mut self) -> Result<(), MultifdError> {
        match self.batch.take() {
            Some(batch) => {
                self.flush_kept()?;
                self.lanes.give(batch)
            }
            None => Ok(()),
        }
    }

    fn payload(&mut self, bytes: u32) -> Result<(), MultifdError> {
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        if let Some(page) = self.awaited.take() {
            if !self.fill(bytes)? {
                return Err(MultifdError::Abandoned);
            }
            return self.page(page, bytes);
        }
        let mut left = bytes;
        while left > 0 {
            if self.window.bytes().is_empty() {
                self.flush_kept()?;
            }
            if !self.fill(1)? {
                return Err(MultifdError::Abandoned);
            }
            let piece = self.window.first(left);
            self.kept.extend(piece);
            let used = piece.len();
            self.window.consume(used);
            left = left.saturating_sub(used);
            if self.kept.len() >= KEPT_BYTES_MAX {
                self.flush_kept()?;
            }
        }
        Ok(())
    }

    /// Put a page, whose bytes are in the window, into a packet.
    fn page(&mut self, page: RamPage, bytes: usize) -> Result<(), MultifdError> {
        let is_other = |batch: &Batch| batch.block != page.block;
        if self.batch.as_ref().is_some_and(is_other) {
            self.give_batch()?;
        }
        let lanes = &self.lanes;
        let batch = self.batch.get_or_insert_with(|| lanes.batch(page.block));
        batch.offsets.push(page.offset_bytes);
        batch.bytes.extend(self.window.first(bytes));
        self.window.consume(bytes);
        let format = PacketFormat {
            page: self.page,
            compression: self.options.compression,
        };
        let pages_max = usize::try_from(format.pages_max()).unwrap_or(1);
        if batch.offsets.len() >= pages_max {
            self.give_batch()?;
        }
        Ok(())
    }

    fn unsupported(&self, what: Unsupported) -> MultifdError {
        MultifdError::Unsupported {
            offset: self.decoder.offset(),
            what,
        }
    }
}
