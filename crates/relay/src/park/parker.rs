//! A stream, pushed in pieces, becomes a file.

mod judge;

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;

use vmferry_image::{FileStorage, ImageError, IndexBuilder, IndexPlace};
use vmferry_inspect::limits::HELD_BYTES_MAX;
use vmferry_inspect::{BodyEnd, find_body_end};
use vmferry_stream::limits::MAX_HEADER_BYTES;
use vmferry_stream::{
    Command, Content, Decoder, Encoder, Ending, Name, Options, RamRecord, Record, Section, Step,
};

use super::error::{MemoryFault, ParkError};
use super::indexer::{IncomingPage, Indexer};
use super::memory::Memory;
use super::output::{Output, Window, put};
use super::package::Package;
use super::tail::{self, Guessed};

/// The description of a machine whose source sent none.
const EMPTY_DESCRIPTION: &[u8] = b"{}";

const DEVICE_TOO_LONG: &str = "the state of a device is longer than can be held";
const DEVICES_TOO_LONG: &str = "the devices at the end are longer than can be held";

/// How to park.
#[derive(Debug, Default)]
pub struct ParkOptions {
    /// Make an index, too: of the file that will have this path in the end, at this place.
    pub index: Option<(PathBuf, IndexPlace)>,
}

/// What whoever carries the stream has to know, or to answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParkEvent {
    /// The source listens.
    OpenReturnPath,
    /// To be answered with a pong.
    Ping(u32),
    /// Postcopy may follow.
    Advised,
    /// The package is here: from now on the source may be gone for good.
    PackageLoaded,
    /// The source wants [`Parker::received`] of this block.
    ReceivedBitmap(Name),
    /// The source goes on; wants to hear so.
    Resume,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parking {
    /// Bytes that were pushed.
    pub received_bytes: u64,
    /// Sum of the blocks' lengths.
    pub memory_bytes: u64,
    /// Pages that came as they are, or compressed.
    pub pages: u64,
    /// Pages of zeroes.
    pub zero_pages: u64,
    /// Pages that came as what changed in them.
    pub xbzrle_pages: u64,
    /// Pages that were discarded and have not come since, and their size.
    pub missing_pages: u64,
    /// Bytes of a page.
    pub page_bytes: u64,
    /// The package of a postcopy has come: its source does not take the guest back by itself.
    pub is_postcopy: bool,
}

/// A machine that is parked.
#[derive(Debug)]
pub struct Parked {
    /// The file.
    pub file: File,
    /// Its length.
    pub bytes: u64,
    /// Sum of the blocks' lengths.
    pub memory_bytes: u64,
    /// Does the stream describe its devices? One that came by postcopy has an empty description.
    pub ending: Ending,
    /// It came by postcopy.
    pub was_postcopy: bool,
    /// Was the source told? If not, it may let its guest run on there. `None` if it does not listen: it
    /// takes the end of its stream for success.
    pub source_told: Option<bool>,
    /// Why there is no index although one was wanted. It can be made later.
    pub without_index: Option<ImageError>,
}

/// Writes what comes as a complete precopy stream into a file, and its index. Knows no sockets: bytes
/// are pushed, in pieces of any length, and [`Parker::heard`] says what is to be answered.
#[derive(Debug)]
pub struct Parker {
    output: Output,
    index: Indexer,
    decoder: Decoder,
    /// What came of something that is not whole yet.
    carry: Vec<u8>,
    /// Of a device's body in `carry`, so much need not be searched again.
    searched: usize,
    state: State,
    payload: Payload,
    payload_left: u64,
    memory: Memory,
    /// The section that has begun.
    open: Option<Section>,
    /// Its body is over, its footer is not.
    body_ended: bool,
    ram: Ram,
    /// Where the devices at the end start in the file.
    tail_start: Option<u64>,
    /// Devices whose ends were looked for, since the last section of another kind.
    guessed: Option<Guessed>,
    /// Block of the discarded ranges that follow.
    discard: Option<Name>,
    advised: bool,
    /// A package has come, perhaps one that is of no use.
    packaged: bool,
    resuming: bool,
    /// Offset in the file behind the last record that is whole.
    whole: u64,
    events: VecDeque<ParkEvent>,
    figures: Parking,
    failed: bool,
}

#[derive(Debug)]
enum State {
    Precopy,
    /// The devices are held until all memory has come.
    Postcopy(Package),
    /// The postcopy's devices are written.
    Over,
}

/// Where the `ram` section stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ram {
    NotYet,
    Live,
    Ended,
}

/// What to do with payload.
#[derive(Debug)]
enum Payload {
    /// A page. The index hears of it when it is whole.
    Page(IncomingPage),
    Package {
        /// Where it starts in the stream.
        offset: u64,
        bytes: Vec<u8>,
    },
    Description {
        /// Where it starts in the file.
        offset: u64,
        text: Vec<u8>,
    },
    /// The body of this device, which is in the window whole.
    Device(Section),
    /// Goes into the file, and is not looked at.
    Kept,
}

/// What becomes of a record.
enum Fate {
    Keep,
    /// The index hears of it later, with all that follows.
    KeepUnread,
    Drop,
    /// These bytes stand in the file instead.
    Replace(Vec<u8>),
}

fn is_discard(record: &Record) -> bool {
    matches!(
        record,
        Record::Command(Command::PostcopyRamDiscard { .. }) | Record::DiscardRange(_)
    )
}

impl Parker {
    /// Write into `file` from its first byte on.
    ///
    /// # Errors
    /// The index cannot be made.
    pub fn new(file: File, options: ParkOptions) -> Result<Self, ParkError> {
        let builder = |(path, place): (PathBuf, IndexPlace)| {
            let twin = file.try_clone();
            let twin = twin.map_err(|source| ParkError::File { offset: 0, source })?;
            let storage = FileStorage::of(twin, &path, 0)?;
            let builder = IndexBuilder::new(&place, &storage)?;
            Ok::<_, ParkError>((builder, storage))
        };
        let index = Indexer::new(options.index.map(builder).transpose()?);
        Ok(Self {
            output: Output::new(file),
            index,
            decoder: Decoder::new(Options::default()),
            carry: Vec::new(),
            searched: 0,
            state: State::Precopy,
            payload: Payload::Kept,
            payload_left: 0,
            memory: Memory::new(),
            open: None,
            body_ended: false,
            ram: Ram::NotYet,
            tail_start: None,
            guessed: None,
            discard: None,
            advised: false,
            packaged: false,
            resuming: false,
            whole: 0,
            events: VecDeque::new(),
            figures: Parking::default(),
            failed: false,
        })
    }

    /// The next bytes of the stream. What is behind its end is ignored.
    ///
    /// # Errors
    /// The stream is broken or cannot be parked, or the file cannot be written. Nothing can be
    /// pushed then, except after [`Parker::interrupted`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), ParkError> {
        if self.failed {
            return Err(ParkError::FailedBefore);
        }
        let pushed = self.push_all(bytes);
        self.failed = pushed.is_err();
        pushed
    }

    fn push_all(&mut self, mut bytes: &[u8]) -> Result<(), ParkError> {
        self.figures.received_bytes += bytes.len() as u64;
        while !self.carry.is_empty() && !bytes.is_empty() {
            let before = self.carry.len();
            let wanted = match self.is_searching() {
                true => bytes.len(),
                // Enough for any header; little, for it is copied.
                false => MAX_HEADER_BYTES.max(before + 1) - before,
            };
            let taken = wanted.min(bytes.len());
            self.carry.extend_from_slice(&bytes[..taken]);
            let mut window = std::mem::take(&mut self.carry);
            let used = self.consume(&window, false)?;
            if used >= before {
                bytes = &bytes[used - before..];
                window.clear();
            } else {
                bytes = &bytes[taken..];
                window.drain(..used);
            }
            self.carry = window;
        }
        if !bytes.is_empty() {
            let used = self.consume(bytes, false)?;
            self.carry.extend_from_slice(&bytes[used..]);
        }
        if self.carry.len() > HELD_BYTES_MAX {
            return Err(self.refused(DEVICE_TOO_LONG));
        }
        Ok(())
    }

    /// What has happened since the last call.
    pub fn heard(&mut self) -> impl Iterator<Item = ParkEvent> + use<> {
        std::mem::take(&mut self.events).into_iter()
    }

    /// How the stream would end, if nothing more came; `None` if it would be truncated.
    /// [`Ending::WithDescription`] is the end for sure.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        match self.state {
            State::Over => Some(Ending::WithDescription),
            State::Postcopy(_) => None,
            State::Precopy if self.failed || !self.carry.is_empty() => None,
            State::Precopy if self.payload_left > 0 => None,
            State::Precopy => self.decoder.ending(),
        }
    }

    /// The package of a postcopy is here: another connection can bring the rest.
    #[must_use]
    pub fn holds_package(&self) -> bool {
        matches!(self.state, State::Postcopy(_))
    }

    /// The stream is over for sure: [`Parker::finish`] can be called.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.ending() == Some(Ending::WithDescription)
    }

    /// Another connection has come, and has not said yet that it goes on.
    pub(super) fn is_resuming(&self) -> bool {
        self.resuming
    }

    /// PINGs of the package.
    pub(super) fn package_pings(&self) -> &[u32] {
        match &self.state {
            State::Postcopy(package) => &package.pings,
            State::Precopy | State::Over => &[],
        }
    }

    /// Header and configuration have been accepted.
    #[must_use]
    pub fn is_greeted(&self) -> bool {
        self.decoder.offset() > 8
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Parking {
        Parking {
            memory_bytes: self.memory.total_bytes,
            missing_pages: self.memory.missing_pages,
            page_bytes: self.memory.page_bytes(),
            is_postcopy: self.packaged,
            ..self.figures
        }
    }

    /// Which pages of a block have come, as the return path carries it. `None` for blocks that are not
    /// here, or if postcopy was not advised.
    #[must_use]
    pub fn received(&self, block: &Name) -> Option<Vec<u8>> {
        self.memory.received(block)
    }

    /// The connection broke. The stream goes on where its next one says, with what is pushed next; what
    /// had come of a record that was not whole is forgotten.
    ///
    /// # Errors
    /// There is no package, so nothing can go on; or the file cannot be written.
    pub fn interrupted(&mut self) -> Result<(), ParkError> {
        if !self.holds_package() {
            return Err(ParkError::FailedBefore);
        }
        let cut = self.output.cut(self.whole);
        cut.map_err(|source| ParkError::File {
            offset: self.whole,
            source,
        })?;
        self.carry.clear();
        // What nobody answered any more was asked on the connection that broke.
        self.events.clear();
        self.payload = Payload::Kept;
        self.payload_left = 0;
        self.discard = None;
        if let Some(section) = self.open.take() {
            let end = match section.content() {
                Content::DirtyBitmap => Record::Bitmap(vmferry_stream::BitmapRecord::EndOfSection),
                _ => Record::Ram(RamRecord::EndOfSection),
            };
            if !std::mem::take(&mut self.body_ended) {
                self.append(&end)?;
            }
            self.append(&Record::SectionEnd { id: section.id })?;
        }
        self.whole = self.output.offset();
        self.decoder = self.decoder.resumed();
        self.resuming = true;
        self.failed = false;
        Ok(())
    }

    /// All of it is there: file and index are on stable storage when this returns. Where the index cannot
    /// be written there is none.
    ///
    /// # Errors
    /// It is not all there, its devices are broken, or the file cannot be written.
    pub fn finish(mut self) -> Result<Parked, ParkError> {
        let ending = self.end_of_input()?;
        let footers = self.decoder.footers() != Some(false);
        let length = self.output.offset();
        let file_error = |source| ParkError::File {
            offset: length,
            source,
        };
        let file = self.output.finish().map_err(file_error)?;
        if let Some(start) = self.tail_start {
            tail::read_tail(file, start, length, footers, &mut self.index)
                .map_err(ParkError::Devices)?;
        } else if let (Some(guessed), State::Precopy) = (&self.guessed, &self.state) {
            // The description, which came later, must say the same.
            guessed
                .check(file, length, footers)
                .map_err(ParkError::Devices)?;
        }
        file.sync_all().map_err(file_error)?;
        let file = self.output.into_file();
        let without_index = self.index.publish();
        Ok(Parked {
            file,
            bytes: length,
            memory_bytes: self.memory.total_bytes,
            ending,
            was_postcopy: matches!(self.state, State::Over),
            source_told: None,
            without_index,
        })
    }

    /// The input ends here; an error unless the stream is whole.
    pub(super) fn end_of_input(&mut self) -> Result<Ending, ParkError> {
        if self.failed {
            return Err(ParkError::FailedBefore);
        }
        if self.is_searching() {
            let window = std::mem::take(&mut self.carry);
            let used = self.consume(&window, true)?;
            self.carry.extend_from_slice(&window[used..]);
        }
        if let Some(ending) = self.ending() {
            let pages = self.memory.missing_pages;
            return match pages {
                0 => Ok(ending),
                _ => Err(ParkError::Missing { pages }),
            };
        }
        // What is carried was not passed; payload that was announced was, although not all has come.
        let carried = self.carry.len() as u64;
        let end = (self.decoder.offset() + carried).saturating_sub(self.payload_left);
        match self.decoder.finish_at(end) {
            Err(error) => Err(ParkError::of_stream(error)),
            Ok(_) => Err(ParkError::Missing {
                pages: self.memory.missing_pages,
            }),
        }
    }

    /// Take as much of `bytes` as can be understood; how much that is. `is_all`: nothing follows.
    fn consume(&mut self, bytes: &[u8], is_all: bool) -> Result<usize, ParkError> {
        let mut window = Window {
            bytes,
            run: 0,
            at: 0,
        };
        loop {
            if self.payload_left > 0 {
                if window.rest().is_empty() {
                    break;
                }
                self.payload(&mut window)?;
                continue;
            }
            if self.is_searching() {
                if !self.search(&window, is_all)? {
                    break;
                }
                continue;
            }
            match self.decoder.step(window.rest()) {
                Err(error) => return Err(ParkError::of_stream(error)),
                Ok(Step::NeedMore(_)) => break,
                Ok(Step::End) => {
                    window.write(&mut self.output)?;
                    return Ok(bytes.len());
                }
                Ok(Step::Payload(length)) => self.payload_left = u64::from(length),
                Ok(Step::Record { record, used }) => self.take(record, used, &mut window)?,
            }
        }
        window.write(&mut self.output)?;
        Ok(window.at)
    }

    fn take(
        &mut self,
        record: Record,
        used: usize,
        window: &mut Window<'_>,
    ) -> Result<(), ParkError> {
        let fate = self.judge(&record, window)?;
        let payload_bytes = record.payload_bytes();
        let is_eof = record == Record::Eof;
        match fate {
            Fate::Keep => {
                let offset = window.offset(&self.output);
                window.at += used;
                match &mut self.payload {
                    Payload::Page(page) if payload_bytes > 0 => {
                        page.record = Some((record, offset, used as u64));
                    }
                    _ => self.index.record(offset, used as u64, &record)?,
                }
            }
            Fate::KeepUnread => window.at += used,
            Fate::Drop => {
                window.write(&mut self.output)?;
                window.drop(used);
                if is_discard(&record) {
                    let offset = window.offset(&self.output);
                    self.index.record(offset, 0, &record)?;
                }
            }
            Fate::Replace(bytes) => {
                window.write(&mut self.output)?;
                let offset = self.output.offset();
                self.index.record(offset, bytes.len() as u64, &record)?;
                put(&mut self.output, &bytes)?;
                window.drop(used);
            }
        }
        if let Payload::Description { offset, .. } = &mut self.payload {
            *offset = window.offset(&self.output);
        }
        if payload_bytes == 0 {
            self.payload_over()?;
            self.whole = window.offset(&self.output);
        }
        if is_eof && matches!(self.state, State::Postcopy(_)) {
            self.end_postcopy()?;
        }
        Ok(())
    }

    /// Take what there is of the payload.
    fn payload(&mut self, window: &mut Window<'_>) -> Result<(), ParkError> {
        let rest = window.rest();
        let left = usize::try_from(self.payload_left).unwrap_or(usize::MAX);
        let piece = rest.get(..left).unwrap_or(rest);
        let offset = window.offset(&self.output);
        match &mut self.payload {
            Payload::Package { bytes, .. } => {
                bytes.extend_from_slice(piece);
                window.drop(piece.len());
            }
            payload => {
                match payload {
                    Payload::Page(page) => page.take(piece, left, &mut self.index)?,
                    Payload::Description { text, .. } => text.extend_from_slice(piece),
                    Payload::Device(section) => self.index.device(section, offset, piece)?,
                    Payload::Package { .. } | Payload::Kept => {}
                }
                window.at += piece.len();
            }
        }
        self.payload_left -= piece.len() as u64;
        if self.payload_left == 0 {
            self.payload_over()?;
            self.whole = window.offset(&self.output);
        }
        match self.tail_start {
            Some(start) if self.whole.saturating_sub(start) > HELD_BYTES_MAX as u64 => {
                Err(self.refused(DEVICES_TOO_LONG))
            }
            _ => Ok(()),
        }
    }

    /// The record, with its payload, is whole.
    fn payload_over(&mut self) -> Result<(), ParkError> {
        match std::mem::replace(&mut self.payload, Payload::Kept) {
            Payload::Page(page) => self.memory.came(page.place),
            Payload::Package { offset, bytes } => self.package(offset, bytes)?,
            Payload::Description { offset, text } => self.index.description(offset, &text)?,
            Payload::Device(_) | Payload::Kept => {}
        }
        Ok(())
    }

    fn package(&mut self, offset: u64, bytes: Vec<u8>) -> Result<(), ParkError> {
        self.packaged = true;
        let Some(footers) = self.decoder.footers() else {
            return Err(self.refused("a postcopy without memory"));
        };
        let package = Package::read(bytes, footers)
            .map_err(|source| ParkError::Package { offset, source })?;
        self.events.push_back(ParkEvent::PackageLoaded);
        let pings = package.pings.iter().map(|value| ParkEvent::Ping(*value));
        self.events.extend(pings);
        self.state = State::Postcopy(package);
        self.index.be_late();
        Ok(())
    }

    /// All memory has come: the devices follow.
    fn end_postcopy(&mut self) -> Result<(), ParkError> {
        let missing = self.memory.missing_pages;
        if missing > 0 {
            return Err(ParkError::Missing { pages: missing });
        }
        let State::Postcopy(package) = std::mem::replace(&mut self.state, State::Over) else {
            return Ok(());
        };
        for device in &package.devices {
            let (section, offset) = (&device.section, self.output.offset());
            let header_bytes = Package::header_bytes(device) as u64;
            let (whole, body) = (package.whole(device), package.body(device));
            let end = header_bytes + body.len() as u64;
            let record = Record::Section(section.clone());
            self.index.record(offset, header_bytes, &record)?;
            self.index.device(section, offset + header_bytes, body)?;
            let footer_bytes = whole.len() as u64 - end;
            let record = Record::SectionEnd { id: section.id };
            self.index.record(offset + end, footer_bytes, &record)?;
            put(&mut self.output, whole)?;
        }
        self.append(&Record::Eof)?;
        let bytes = u32::try_from(EMPTY_DESCRIPTION.len()).unwrap_or(u32::MAX);
        self.append(&Record::Description { bytes })?;
        let offset = self.output.offset();
        self.index.description(offset, EMPTY_DESCRIPTION)?;
        put(&mut self.output, EMPTY_DESCRIPTION)
    }

    /// Write a record that did not come.
    fn append(&mut self, record: &Record) -> Result<(), ParkError> {
        let bytes = self.encoded(record);
        let offset = self.output.offset();
        self.index.record(offset, bytes.len() as u64, record)?;
        put(&mut self.output, &bytes)
    }

    fn encoded(&self, record: &Record) -> Vec<u8> {
        let mut bytes = Vec::new();
        Encoder::new(self.decoder.footers() != Some(false)).record(record, &mut bytes);
        bytes
    }

    /// A device has begun whose end has to be found: memory follows, or may.
    fn is_searching(&self) -> bool {
        let is_device = |section: &Section| section.content() == Content::Device;
        self.payload_left == 0
            && self.tail_start.is_none()
            && !self.body_ended
            && self.open.as_ref().is_some_and(is_device)
    }

    /// Look for the end of the device that has begun; true if it is in the window.
    fn search(&mut self, window: &Window<'_>, is_all: bool) -> Result<bool, ParkError> {
        let Some(section) = &self.open else {
            return Ok(false);
        };
        let bytes = window.rest();
        match find_body_end(&self.decoder, section, bytes, self.searched, is_all) {
            BodyEnd::At(length) if length > HELD_BYTES_MAX => Err(self.refused(DEVICE_TOO_LONG)),
            BodyEnd::At(length) => {
                self.decoder.skip_device(length as u64);
                self.body_ended = true;
                let offset = window.offset(&self.output);
                if let Some(guessed) = &mut self.guessed
                    && guessed.push(offset, length as u64) > HELD_BYTES_MAX as u64
                {
                    return Err(self.refused(DEVICES_TOO_LONG));
                }
                if length == 0 {
                    // Nothing will be announced.
                    self.index.device(section, offset, &[])?;
                }
                self.payload = Payload::Device(section.clone());
                Ok(true)
            }
            BodyEnd::NotYet { searched } => {
                self.searched = searched;
                Ok(false)
            }
        }
    }

    /// Something that cannot be parked was read last.
    pub(super) fn refused(&self, reason: impl Into<String>) -> ParkError {
        ParkError::Refused {
            offset: self.decoder.offset(),
            reason: reason.into(),
        }
    }

    fn wrong(&self, fault: MemoryFault) -> ParkError {
        ParkError::Memory {
            offset: self.decoder.offset(),
            fault,
        }
    }
}
