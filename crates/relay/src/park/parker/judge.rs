//! What is kept of a stream, what is not, and what cannot be parked.

use vmferry_inspect::limits::HELD_BYTES_MAX;
use vmferry_stream::{Command, Content, RamPage, RamRecord, Record, Section, SectionKind};

use super::{Fate, ParkEvent, Parker, Payload, Ram};
use crate::park::error::ParkError;
use crate::park::indexer::IncomingPage;
use crate::park::output::Window;
use crate::park::tail::Guessed;

impl Parker {
    /// What becomes of a record, and of its payload.
    pub(super) fn judge(
        &mut self,
        record: &Record,
        window: &Window<'_>,
    ) -> Result<Fate, ParkError> {
        self.payload = Payload::Kept;
        match record {
            Record::Configuration(configuration) => {
                if configuration.has_capability("mapped-ram") {
                    return Err(self.refused(
                        "the stream has its memory at fixed file offsets (capability mapped-ram): it is \
                         a file, and nothing that is received",
                    ));
                }
                self.memory.page = configuration.page_bits.unwrap_or(self.memory.page);
                Ok(Fate::Keep)
            }
            Record::Section(section) => self.section(section, window),
            Record::SectionEnd { .. } => {
                let ended = self.open.take();
                self.body_ended = false;
                if ended.is_some_and(|section| {
                    section.content() == Content::Ram && section.kind == SectionKind::End
                }) {
                    self.ram_ended()?;
                }
                Ok(Fate::Keep)
            }
            Record::Ram(record) => self.ram_record(record),
            Record::Bitmap(record) => {
                self.body_ended = *record == vmferry_stream::BitmapRecord::EndOfSection;
                Ok(Fate::Keep)
            }
            Record::Command(command) => self.command(command),
            Record::DiscardRange(range) => {
                if let Some(block) = &self.discard {
                    let discarded = self.memory.discard(block, *range);
                    discarded.map_err(|fault| self.wrong(fault))?;
                }
                Ok(Fate::Drop)
            }
            Record::Eof if self.holds_package() => Ok(Fate::Drop),
            Record::Description { bytes } => {
                self.payload = Payload::Description {
                    offset: 0,
                    text: Vec::new(),
                };
                match usize::try_from(*bytes) {
                    Ok(bytes) if bytes <= HELD_BYTES_MAX => Ok(Fate::Keep),
                    _ => Err(self.refused("the description is longer than can be held")),
                }
            }
            Record::Header { .. } | Record::Block(_) | Record::Eof => Ok(Fate::Keep),
        }
    }

    fn section(&mut self, section: &Section, window: &Window<'_>) -> Result<Fate, ParkError> {
        self.open = Some(section.clone());
        self.body_ended = false;
        self.searched = 0;
        let start = window.offset(&self.output);
        if (section.content(), section.kind) == (Content::Device, SectionKind::Full) {
            self.guessed.get_or_insert_with(|| Guessed::at(start));
        } else {
            self.guessed = None;
        }
        match (section.content(), section.kind) {
            (Content::Block, _) => Err(self.refused(
                "the stream holds disks (section 'block'), which a parked machine does not: say --disk to \
                 take them out",
            )),
            (Content::Device, SectionKind::Full) if self.holds_package() => {
                let name = &section.name;
                Err(self.refused(format!("device '{name}' comes behind the package")))
            }
            (Content::Device, SectionKind::Full) if self.ram == Ram::Ended => {
                // Their ends stand in the description, at the very end.
                self.tail_start = Some(start);
                self.decoder.pass_rest();
                Ok(Fate::KeepUnread)
            }
            (Content::Device, SectionKind::Full) => Ok(Fate::Keep),
            (Content::Device, _) => {
                let name = &section.name;
                Err(self.refused(format!(
                    "live section '{name}' is unknown: such a machine cannot be parked"
                )))
            }
            (Content::Ram, SectionKind::Start | SectionKind::Full) if self.ram != Ram::NotYet => {
                Err(self.refused("a second 'ram' section"))
            }
            (Content::Ram, SectionKind::Start) => {
                self.ram = Ram::Live;
                Ok(Fate::Keep)
            }
            (Content::Ram, SectionKind::Full) => Err(self.refused("'ram' is no live section")),
            (Content::Ram | Content::DirtyBitmap, _) => Ok(Fate::Keep),
        }
    }

    fn ram_ended(&mut self) -> Result<(), ParkError> {
        self.ram = Ram::Ended;
        // A machine has firmware, at least, which is not zero; unless its memory is shared with its
        // successor. Pages that are discarded are counted anyway.
        let zero_bytes = self
            .figures
            .zero_pages
            .saturating_mul(self.memory.page_bytes());
        let has_come = self.figures.pages > 0 || zero_bytes >= self.memory.total_bytes;
        if !has_come && !self.memory.is_shared && !self.holds_package() {
            return Err(ParkError::NoPages {
                offset: self.decoder.offset(),
                total_bytes: self.memory.total_bytes,
            });
        }
        Ok(())
    }

    fn ram_record(&mut self, record: &RamRecord) -> Result<Fate, ParkError> {
        match record {
            RamRecord::Block {
                name,
                used_bytes,
                page_bytes,
                guest_address,
                ..
            } => {
                self.memory.is_shared |= guest_address.is_some();
                let added = self.memory.add(name, *used_bytes);
                added.map_err(|fault| self.wrong(fault))?;
                if page_bytes.is_none() {
                    return Ok(Fate::Keep);
                }
                // Only a destination that was advised expects it.
                let plain = Record::Ram(RamRecord::Block {
                    name: name.clone(),
                    used_bytes: *used_bytes,
                    page_bytes: None,
                    guest_address: *guest_address,
                    mapped: None,
                });
                Ok(Fate::Replace(self.encoded(&plain)))
            }
            RamRecord::Page { page, .. } | RamRecord::Compressed { page, .. } => {
                self.figures.pages += 1;
                self.page(page)
            }
            RamRecord::Zero { page, .. } => {
                self.figures.zero_pages += 1;
                self.page(page)
            }
            RamRecord::Xbzrle { .. } if self.holds_package() => {
                Err(self.refused("a page comes as what changed in it, behind the package"))
            }
            RamRecord::Xbzrle { page, .. } => {
                self.figures.xbzrle_pages += 1;
                self.page(page)
            }
            RamRecord::MultifdFlush => Err(self.refused(
                "the source sends pages over other connections (multifd); say --multifd-channels here, or \
                 turn multifd off there",
            )),
            RamRecord::EndOfSection => {
                self.body_ended = true;
                Ok(Fate::Keep)
            }
            RamRecord::BlockList { .. }
            | RamRecord::MappedBitmap { .. }
            | RamRecord::MappedGap { .. }
            | RamRecord::MappedPages { .. } => Ok(Fate::Keep),
        }
    }

    fn page(&mut self, page: &RamPage) -> Result<Fate, ParkError> {
        let place = self.memory.place(page);
        self.payload = Payload::Page(IncomingPage::at(place.map_err(|fault| self.wrong(fault))?));
        Ok(Fate::Keep)
    }

    fn command(&mut self, command: &Command) -> Result<Fate, ParkError> {
        let is_postcopy = self.holds_package();
        match command {
            Command::OpenReturnPath => self.events.push_back(ParkEvent::OpenReturnPath),
            Command::Ping(value) => self.events.push_back(ParkEvent::Ping(*value)),
            Command::SwitchoverStart if !is_postcopy => return Ok(Fate::Keep),
            Command::SwitchoverStart => {}
            Command::PostcopyAdvise(sizes) => {
                if std::mem::replace(&mut self.advised, true) {
                    return Err(self.refused("a second POSTCOPY_ADVISE"));
                }
                if sizes.is_some() {
                    self.advise()?;
                }
                self.events.push_back(ParkEvent::Advised);
            }
            Command::PostcopyRamDiscard { block, .. } if self.advised && !is_postcopy => {
                self.discard = Some(block.clone());
            }
            Command::Packaged { bytes } if self.advised && !is_postcopy => {
                if usize::try_from(*bytes).is_ok_and(|bytes| bytes > HELD_BYTES_MAX) {
                    self.packaged = true;
                    return Err(self.refused("the postcopy's package is longer than can be held"));
                }
                self.payload = Payload::Package {
                    offset: self.decoder.offset(),
                    bytes: Vec::new(),
                };
            }
            Command::ReceivedBitmap(block) if self.resuming => {
                self.events
                    .push_back(ParkEvent::ReceivedBitmap(block.clone()));
            }
            Command::PostcopyResume if self.resuming => {
                self.resuming = false;
                self.events.push_back(ParkEvent::Resume);
            }
            Command::ReceivedBitmap(_) | Command::PostcopyResume => {}
            Command::EnableColo => return Err(self.refused("COLO cannot be parked")),
            Command::PostcopyListen
            | Command::PostcopyRun
            | Command::PostcopyRamDiscard { .. }
            | Command::Packaged { .. } => {
                let name = command.name();
                return Err(self.refused(format!("{name} does not belong here")));
            }
        }
        Ok(Fate::Drop)
    }

    fn advise(&mut self) -> Result<(), ParkError> {
        if self.figures.pages + self.figures.zero_pages > 0 {
            return Err(self.refused("POSTCOPY_ADVISE comes behind the first page"));
        }
        let tracked = self.memory.track();
        tracked.map_err(|fault| self.wrong(fault))
    }
}
