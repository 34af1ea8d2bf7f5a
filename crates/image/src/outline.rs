//! Collects what is in a stream besides its pages, while the stream goes by.

use std::collections::HashMap;

use vmferry_inspect::{Container, LibvirtHeader};
use vmferry_ram::PAGE_BYTES;
use vmferry_stream::{
    Command, Configuration, Content, Ending, MappedBlock, Name, RamRecord, Record, Section,
    SectionId, SectionKind,
};

use crate::error::ImageError;
use crate::head::{Contents, Extent, Head, ImageBlock, ImageSection, LiveSection};
use crate::limits::{DEVICES_MAX, LIVE_BODIES_MAX, RAM_BYTES_MAX, SECTION_BYTES_MAX};
use crate::storage::Storage;

/// The capability of files whose pages have fixed places.
pub(crate) const MAPPED_RAM: &str = "mapped-ram";
/// Bytes that are read at once for a checksum.
const PIECE_BYTES: usize = 256 << 10;

/// What is known of a stream so far.
#[derive(Debug)]
pub(crate) struct Outline {
    /// For messages.
    image: String,
    configuration: Option<Configuration>,
    footers: Option<bool>,
    switchover_start: bool,
    libvirt: Option<LibvirtHeader>,
    pub(crate) blocks: Vec<ImageBlock>,
    /// Where a mapped-ram file has their pages; as many as blocks.
    pub(crate) mapped: Vec<MappedBlock>,
    pub(crate) by_name: HashMap<Name, usize>,
    ram_bytes: u64,
    /// The list of blocks is complete.
    pub(crate) is_listed: bool,
    live: Vec<LiveSection>,
    live_by_id: HashMap<SectionId, usize>,
    live_bodies: usize,
    /// The live section whose body goes by, and where that starts.
    open: Option<(Section, u64)>,
    devices: Vec<ImageSection>,
    early_devices: usize,
    /// A PART or an END went by.
    seen_more: bool,
    description: Option<Extent>,
    is_over: bool,
}

impl Outline {
    pub(crate) fn new(image: String) -> Self {
        Self {
            image,
            configuration: None,
            footers: None,
            switchover_start: false,
            libvirt: None,
            blocks: Vec::new(),
            mapped: Vec::new(),
            by_name: HashMap::new(),
            ram_bytes: 0,
            is_listed: false,
            live: Vec::new(),
            live_by_id: HashMap::new(),
            live_bodies: 0,
            open: None,
            devices: Vec::new(),
            early_devices: 0,
            seen_more: false,
            description: None,
            is_over: false,
        }
    }

    pub(crate) fn container(&mut self, container: &Container) {
        if let Container::Libvirt(header) = container {
            self.libvirt = Some(header.clone());
        }
    }

    /// A record whose header has so many bytes.
    pub(crate) fn record(
        &mut self,
        offset: u64,
        bytes: u64,
        record: &Record,
    ) -> Result<(), ImageError> {
        match record {
            Record::Configuration(configuration) => self.configuration(offset, configuration),
            Record::Section(section) => self.section(offset, bytes, section),
            Record::SectionEnd { .. } => {
                self.footers = Some(bytes > 0);
                self.end_of_section(offset)
            }
            Record::Ram(record) => self.ram(offset, record),
            Record::Command(Command::SwitchoverStart) => {
                self.switchover_start = true;
                Ok(())
            }
            Record::Command(Command::EnableColo) => {
                Err(self.refused(offset, "a COLO checkpoint, which is not restored".into()))
            }
            Record::Eof => {
                self.is_over = true;
                Ok(())
            }
            Record::Header { .. }
            | Record::Command(_)
            | Record::DiscardRange(_)
            | Record::Block(_)
            | Record::Bitmap(_)
            | Record::Description { .. } => Ok(()),
        }
    }

    fn configuration(
        &mut self,
        offset: u64,
        configuration: &Configuration,
    ) -> Result<(), ImageError> {
        if let Some(bits) = configuration.page_bits
            && u64::from(bits.bytes()) != PAGE_BYTES
        {
            let what = format!(
                "guest pages of {} bytes; only those of {PAGE_BYTES} are restored",
                bits.bytes()
            );
            return Err(self.refused(offset, what));
        }
        let mut configuration = configuration.clone();
        if let Some(names) = &mut configuration.capabilities {
            names.retain(|name| *name != MAPPED_RAM);
            if names.is_empty() {
                configuration.capabilities = None;
            }
        }
        self.configuration = Some(configuration);
        Ok(())
    }

    fn section(&mut self, offset: u64, bytes: u64, section: &Section) -> Result<(), ImageError> {
        self.seen_more |= matches!(section.kind, SectionKind::Part | SectionKind::End);
        match (section.content(), section.kind) {
            (Content::Block, _) => {
                let what = "a `block` section: this stream carries disks. Take them out first \
                            (`vmferry extract disk`), and save the stream without them";
                Err(self.refused(offset, what.into()))
            }
            (Content::Ram, _) | (Content::Device, SectionKind::Full) => Ok(()),
            (Content::DirtyBitmap, SectionKind::Full) => {
                Err(self.refused(offset, "a `dirty-bitmap` section that is not live".into()))
            }
            (Content::DirtyBitmap | Content::Device, _) => {
                self.open = Some((section.clone(), offset.saturating_add(bytes)));
                Ok(())
            }
        }
    }

    /// The body of a live section has gone by.
    fn end_of_section(&mut self, offset: u64) -> Result<(), ImageError> {
        let Some((section, start)) = self.open.take() else {
            return Ok(());
        };
        let bytes = offset.saturating_sub(start);
        // A PART of one byte says that it is empty.
        let is_empty = section.content() == Content::DirtyBitmap && bytes <= 1;
        if is_empty && section.kind == SectionKind::Part {
            return Ok(());
        }
        self.check_body(&section, start, bytes)?;
        self.live_bodies = self.live_bodies.saturating_add(1);
        if self.live_bodies > LIVE_BODIES_MAX {
            let what = "bodies of live sections".into();
            return Err(self.too_much(offset, what, LIVE_BODIES_MAX));
        }
        let body = ImageSection {
            section: section.clone(),
            offset: start,
            bytes,
            checksum: 0,
        };
        let index = match section.kind {
            SectionKind::Start => {
                self.live_by_id.insert(section.id, self.live.len());
                self.live.push(LiveSection { bodies: Vec::new() });
                self.live.len().saturating_sub(1)
            }
            _ => self
                .live_by_id
                .get(&section.id)
                .copied()
                .unwrap_or(usize::MAX),
        };
        if let Some(live) = self.live.get_mut(index) {
            live.bodies.push(body);
        }
        Ok(())
    }

    fn ram(&mut self, offset: u64, record: &RamRecord) -> Result<(), ImageError> {
        match record {
            RamRecord::Block { .. } => self.list(offset, record),
            RamRecord::BlockList { .. } if self.is_listed => {
                Err(self.broken(offset, "RAM blocks are listed twice".into()))
            }
            RamRecord::MultifdFlush => {
                let what = "this is the main channel of a multifd migration: its pages went over \
                            other channels";
                Err(self.refused(offset, what.into()))
            }
            RamRecord::EndOfSection => {
                self.is_listed = true;
                Ok(())
            }
            RamRecord::BlockList { .. }
            | RamRecord::Zero { .. }
            | RamRecord::Page { .. }
            | RamRecord::Xbzrle { .. }
            | RamRecord::Compressed { .. }
            | RamRecord::MappedBitmap { .. }
            | RamRecord::MappedGap { .. }
            | RamRecord::MappedPages { .. } => Ok(()),
        }
    }

    fn list(&mut self, offset: u64, record: &RamRecord) -> Result<(), ImageError> {
        let RamRecord::Block {
            name,
            used_bytes,
            page_bytes,
            guest_address,
            mapped,
        } = record
        else {
            return Ok(());
        };
        if self.by_name.contains_key(name) {
            return Err(self.broken(offset, format!("RAM block '{name}' is listed twice")));
        }
        self.ram_bytes = self.ram_bytes.saturating_add(*used_bytes);
        if self.ram_bytes > RAM_BYTES_MAX {
            return Err(ImageError::TooMuch {
                image: self.image.clone(),
                offset,
                what: format!("RAM blocks of {} bytes", self.ram_bytes),
                max: RAM_BYTES_MAX,
            });
        }
        let page_bytes = page_bytes.unwrap_or(PAGE_BYTES);
        if !page_bytes.is_power_of_two() || page_bytes < PAGE_BYTES {
            let problem = format!("RAM block '{name}' has pages of {page_bytes} bytes");
            return Err(self.broken(offset, problem));
        }
        self.by_name.insert(name.clone(), self.blocks.len());
        self.mapped.extend(*mapped);
        self.blocks.push(ImageBlock {
            name: name.clone(),
            used_bytes: *used_bytes,
            page_bytes,
            guest_address: *guest_address,
            absent_pages: 0,
        });
        Ok(())
    }

    /// A device's section, whose body these bytes are.
    pub(crate) fn device(
        &mut self,
        section: &Section,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), ImageError> {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.check_body(section, offset, length)?;
        if self.devices.len() >= DEVICES_MAX {
            return Err(self.too_much(offset, "sections of devices".into(), DEVICES_MAX));
        }
        if !self.seen_more {
            self.early_devices = self.devices.len().saturating_add(1);
        }
        self.devices.push(ImageSection {
            section: section.clone(),
            offset,
            bytes: length,
            checksum: crc32fast::hash(bytes),
        });
        Ok(())
    }

    pub(crate) fn description(&mut self, offset: u64, text: &[u8]) {
        self.description = Some(Extent {
            offset,
            bytes: u64::try_from(text.len()).unwrap_or(u64::MAX),
            checksum: crc32fast::hash(text),
        });
    }

    /// The stream is over: everything but the count of absent pages.
    pub(crate) fn finish(mut self, storage: &dyn Storage) -> Result<Contents, ImageError> {
        if !self.is_over {
            return Err(ImageError::Incomplete {
                image: self.image,
                missing: "the end of the stream",
            });
        }
        for body in self.live.iter_mut().flat_map(|live| &mut live.bodies) {
            body.checksum = checksum(storage, body.offset, body.bytes)?;
        }
        // A stream of STARTs alone has no devices before something.
        let early_devices = match self.seen_more {
            true => self.early_devices,
            false => 0,
        };
        Ok(Contents {
            head: Head {
                configuration: self.configuration,
                footers: self.footers.unwrap_or(true),
                switchover_start: self.switchover_start,
                blocks: self.blocks,
                live: self.live,
                devices: self.devices,
                early_devices,
                ending: match self.description {
                    Some(_) => Ending::WithDescription,
                    None => Ending::WithoutDescription,
                },
                libvirt: self.libvirt,
            },
            description: self.description,
        })
    }

    fn check_body(&self, section: &Section, offset: u64, bytes: u64) -> Result<(), ImageError> {
        if bytes <= SECTION_BYTES_MAX {
            return Ok(());
        }
        Err(ImageError::TooMuch {
            image: self.image.clone(),
            offset,
            what: format!("section '{}' has {bytes} bytes", section.name),
            max: SECTION_BYTES_MAX,
        })
    }

    pub(crate) fn refused(&self, offset: u64, what: String) -> ImageError {
        let image = self.image.clone();
        ImageError::Refused {
            image,
            offset,
            what,
        }
    }

    pub(crate) fn broken(&self, offset: u64, problem: String) -> ImageError {
        let image = self.image.clone();
        ImageError::BrokenRam {
            image,
            offset,
            problem,
        }
    }

    fn too_much(&self, offset: u64, what: String, max: usize) -> ImageError {
        ImageError::TooMuch {
            image: self.image.clone(),
            offset,
            what,
            max: u64::try_from(max).unwrap_or(u64::MAX),
        }
    }
}

/// CRC-32 of bytes of an image.
pub(crate) fn checksum(storage: &dyn Storage, offset: u64, bytes: u64) -> Result<u32, ImageError> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; PIECE_BYTES];
    let (mut at, mut left) = (offset, bytes);
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(PIECE_BYTES);
        let piece = buffer.get_mut(..length).unwrap_or_default();
        storage
            .read_at(at, piece)
            .map_err(|source| ImageError::Read {
                image: storage.name(),
                offset: at,
                source,
            })?;
        hasher.update(piece);
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        at = at.saturating_add(length);
        left = left.saturating_sub(length);
    }
    Ok(hasher.finalize())
}
