//! Streams that are made up, with the memory that they leave.

use std::collections::BTreeMap;
use std::io::Write;

use fastrand::Rng;
use vmferry_image::{FileStorage, ImageError, IndexBuilder, IndexPlace, Storage};
use vmferry_stream::{
    Command, Configuration, DiscardRange, Encoder, InstanceId, Name, RamPage, RamRecord, Record,
    Section, SectionId, SectionKind, xbzrle,
};

use crate::support::{Memory, PAGE};

const RAM: SectionId = SectionId(2);
const BITMAP: SectionId = SectionId(3);

/// A stream that is being written.
pub(crate) struct Script {
    pub(crate) bytes: Vec<u8>,
    pub(crate) memory: Memory,
    /// Where there are bits that mean nothing: in zlib streams, and in the words that end sections.
    pub(crate) lax: Vec<std::ops::Range<u64>>,
    encoder: Encoder,
    told: Vec<Told>,
    open: Option<SectionId>,
}

/// What the writer of an image tells its index.
enum Told {
    Record(u64, u64, Record),
    Payload(u64, Vec<u8>),
    Device(Section, u64, Vec<u8>),
    Description(u64, Vec<u8>),
}

fn name(name: &str) -> Name {
    Name::new(name).unwrap()
}

fn section(kind: SectionKind, id: SectionId, text: &str, version: u32) -> Section {
    Section {
        kind,
        id,
        name: name(text),
        instance: InstanceId(0),
        version,
    }
}

impl Script {
    /// Header, configuration, and the list of these blocks.
    pub(crate) fn new(blocks: &[(&str, u64)]) -> Self {
        let mut script = Self::before_ram();
        script.begin(section(SectionKind::Start, RAM, "ram", 4));
        let total_bytes = blocks.iter().map(|(_, pages)| pages * PAGE as u64).sum();
        script.ram(RamRecord::BlockList { total_bytes });
        for (block, pages) in blocks {
            script.ram(RamRecord::Block {
                name: name(block),
                used_bytes: pages * PAGE as u64,
                page_bytes: None,
                guest_address: None,
                mapped: None,
            });
            if total_bytes < 1 << 32 {
                let pages = vec![None; usize::try_from(*pages).unwrap()];
                script.memory.insert((*block).to_owned(), pages);
            }
        }
        script.end();
        script
    }

    pub(crate) fn before_ram() -> Self {
        let mut script = Self {
            bytes: Vec::new(),
            memory: BTreeMap::new(),
            lax: Vec::new(),
            encoder: Encoder::new(true),
            told: Vec::new(),
            open: None,
        };
        script.record(Record::Header { version: 3 });
        script.record(Record::Configuration(Configuration::of_machine(name("pc"))));
        script
    }

    pub(crate) fn record(&mut self, record: Record) {
        let offset = self.bytes.len() as u64;
        self.encoder.record(&record, &mut self.bytes);
        let used = self.bytes.len() as u64 - offset;
        self.told.push(Told::Record(offset, used, record));
    }

    fn payload(&mut self, bytes: &[u8]) {
        let offset = self.bytes.len() as u64;
        self.told.push(Told::Payload(offset, bytes.to_vec()));
        self.bytes.extend(bytes);
    }

    fn ram(&mut self, record: RamRecord) {
        self.record(Record::Ram(record));
    }

    fn begin(&mut self, section: Section) {
        self.open = Some(section.id);
        self.record(Record::Section(section));
    }

    /// The section of `ram` ends, if one is open.
    pub(crate) fn end(&mut self) {
        if let Some(id) = self.open.take() {
            let start = self.bytes.len() as u64;
            self.ram(RamRecord::EndOfSection);
            self.lax.push(start..self.bytes.len() as u64);
            self.record(Record::SectionEnd { id });
        }
    }

    /// A PART of `ram` is open.
    fn part(&mut self) {
        if self.open.is_none() {
            self.begin(section(SectionKind::Part, RAM, "ram", 4));
        }
    }

    fn of(&self, block: &str, page: u64) -> RamPage {
        assert!(self.memory.is_empty() || self.memory.contains_key(block));
        RamPage {
            block: name(block),
            offset_bytes: page * PAGE as u64,
        }
    }

    /// The content of a page of the model.
    pub(crate) fn at(&mut self, block: &str, page: u64) -> Option<&mut Option<Vec<u8>>> {
        let page = usize::try_from(page).unwrap();
        self.memory.get_mut(block).map(|pages| &mut pages[page])
    }

    fn set(&mut self, block: &str, page: u64, content: Vec<u8>) {
        if let Some(page) = self.at(block, page) {
            *page = Some(content);
        }
    }

    pub(crate) fn name_again(&mut self) {
        self.encoder.forget_ram_block();
    }

    pub(crate) fn zero(&mut self, block: &str, page: u64, fill: u8) {
        self.part();
        let of = self.of(block, page);
        self.ram(RamRecord::Zero { page: of, fill });
        self.set(block, page, vec![fill; PAGE]);
    }

    pub(crate) fn page(&mut self, block: &str, page: u64, content: Vec<u8>) {
        self.part();
        let of = self.of(block, page);
        let bytes = PAGE as u32;
        self.ram(RamRecord::Page { page: of, bytes });
        self.payload(&content);
        self.set(block, page, content);
    }

    pub(crate) fn zlib(&mut self, block: &str, page: u64, content: Vec<u8>) {
        self.part();
        let of = self.of(block, page);
        let mut encoder =
            flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(&content).unwrap();
        let payload = encoder.finish().unwrap();
        let bytes = u32::try_from(payload.len()).unwrap();
        self.ram(RamRecord::Compressed { page: of, bytes });
        let start = self.bytes.len() as u64;
        self.payload(&payload);
        self.lax.push(start..self.bytes.len() as u64);
        self.set(block, page, content);
    }

    /// A change of a page that came; nothing if it would be too long.
    pub(crate) fn xbzrle(&mut self, block: &str, page: u64, content: Vec<u8>) {
        let old = self.at(block, page).cloned().flatten().unwrap();
        let mut payload = Vec::new();
        if xbzrle::encode(&old, &content, &mut payload) == xbzrle::Encoded::TooLong {
            return;
        }
        self.part();
        let of = self.of(block, page);
        let bytes = u16::try_from(payload.len()).unwrap();
        self.ram(RamRecord::Xbzrle { page: of, bytes });
        self.payload(&payload);
        self.set(block, page, content);
    }

    /// XBZRLE bytes as they are.
    pub(crate) fn raw_xbzrle(&mut self, block: &str, page: u64, payload: &[u8]) {
        self.part();
        let of = self.of(block, page);
        let bytes = u16::try_from(payload.len()).unwrap();
        self.ram(RamRecord::Xbzrle { page: of, bytes });
        self.payload(payload);
    }

    pub(crate) fn discard(&mut self, block: &str, ranges: &[(u64, u64)]) {
        self.end();
        self.record(Record::Command(Command::PostcopyRamDiscard {
            block: name(block),
            ranges: u16::try_from(ranges.len()).unwrap(),
        }));
        for (first, pages) in ranges {
            self.record(Record::DiscardRange(DiscardRange {
                start_bytes: first * PAGE as u64,
                length_bytes: pages * PAGE as u64,
            }));
            for page in *first..first + pages {
                if let Some(page) = self.at(block, page) {
                    *page = None;
                }
            }
        }
    }

    /// A section of dirty bitmaps, with this body.
    pub(crate) fn bitmap(&mut self, kind: SectionKind, body: &[u8]) {
        self.end();
        let live = section(kind, BITMAP, "dirty-bitmap", 1);
        self.record(Record::Section(live));
        // The index is told of records in there, which do not matter to it.
        self.bytes.extend(body);
        self.record(Record::SectionEnd { id: BITMAP });
    }

    pub(crate) fn device(&mut self, text: &str, id: u32, body: &[u8]) {
        self.end();
        let full = section(SectionKind::Full, SectionId(id), text, 1);
        self.record(Record::Section(full.clone()));
        let offset = self.bytes.len() as u64;
        self.told.push(Told::Device(full, offset, body.to_vec()));
        self.bytes.extend(body);
        self.record(Record::SectionEnd { id: SectionId(id) });
    }

    /// END, EOF, description.
    pub(crate) fn finish(mut self) -> Self {
        self.finish_ram();
        self.device("timer", 5, &[7; 24]);
        self.eof();
        self
    }

    pub(crate) fn finish_ram(&mut self) {
        self.end();
        self.begin(section(SectionKind::End, RAM, "ram", 4));
        self.end();
    }

    pub(crate) fn eof(&mut self) {
        self.record(Record::Eof);
        let text = br#"{"page_size": 4096, "devices": []}"#;
        let bytes = u32::try_from(text.len()).unwrap();
        self.record(Record::Description { bytes });
        let offset = self.bytes.len() as u64;
        self.told.push(Told::Description(offset, text.to_vec()));
        self.bytes.extend(text);
    }

    /// Make the index while the image is written, payload in pieces of odd lengths.
    pub(crate) fn index(
        &self,
        place: &IndexPlace,
        storage: &FileStorage,
        rng: &mut Rng,
    ) -> Result<(), ImageError> {
        let mut builder = IndexBuilder::new(place, storage)?;
        for told in &self.told {
            match told {
                Told::Record(offset, bytes, record) => builder.record(*offset, *bytes, record)?,
                Told::Payload(offset, payload) => {
                    let (mut offset, mut rest) = (*offset, payload.as_slice());
                    while !rest.is_empty() {
                        let piece = rng.usize(1..=rest.len());
                        builder.payload(offset, &rest[..piece])?;
                        offset += piece as u64;
                        rest = &rest[piece..];
                    }
                }
                Told::Device(section, offset, body) => builder.device(section, *offset, body)?,
                Told::Description(offset, text) => builder.description(*offset, text)?,
            }
        }
        assert_eq!(storage.length(), self.bytes.len() as u64);
        builder.publish(storage)
    }
}

/// A machine whose memory changes while it is sent, in every way that there is.
pub(crate) fn random(rng: &mut Rng, steps: usize) -> Script {
    let blocks = [("pc.ram", 1300), ("pc.bios", 16), ("/rom@etc/acpi", 1)];
    let mut script = Script::new(&blocks);
    script.bitmap(SectionKind::Start, &[0x01]);
    let mut next = 0;
    for _ in 0..steps {
        let (block, pages) = blocks[[0, 0, 0, 1, 1, 2][rng.usize(..6)]];
        // Often the next one.
        next = if rng.u8(..4) > 0 {
            next + 1
        } else {
            rng.u64(..pages)
        };
        let page = next % pages;
        if rng.u8(..10) == 0 {
            script.name_again();
        }
        match rng.u32(..100) {
            0..15 => script.zero(block, page, 0),
            15..17 => script.zero(block, page, rng.u8(..)),
            17..19 => script.page(block, page, vec![0; PAGE]),
            19..30 => {
                let content = compressible(rng);
                script.zlib(block, page, content);
            }
            30..50 if script.at(block, page).is_some_and(|page| page.is_some()) => {
                let mut content = script.at(block, page).cloned().flatten().unwrap();
                for _ in 0..rng.usize(..5) {
                    content[rng.usize(..PAGE)] = rng.u8(..);
                }
                script.xbzrle(block, page, content);
            }
            50..52 => script.end(),
            52 => {
                let ranges = (0..rng.usize(1..4)).map(|_| {
                    let first = rng.u64(..pages);
                    (first, rng.u64(..=pages - first))
                });
                let ranges: Vec<_> = ranges.collect();
                script.discard(block, &ranges);
            }
            53 => script.bitmap(SectionKind::Part, &[0x01]),
            _ => {
                let mut content = vec![0; PAGE];
                rng.fill(&mut content);
                script.page(block, page, content);
            }
        }
    }
    script.bitmap(SectionKind::End, &[0x01]);
    script
}

fn compressible(rng: &mut Rng) -> Vec<u8> {
    let pattern: Vec<u8> = (0..rng.usize(1..50)).map(|_| rng.u8(..)).collect();
    pattern.iter().copied().cycle().take(PAGE).collect()
}
