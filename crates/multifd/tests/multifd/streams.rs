//! Plain streams of made-up machines.

use vmferry_stream::{
    BitmapRecord, Command, Configuration, Encoder, InstanceId, Name, RamPage, RamRecord, Record,
    Section, SectionId, SectionKind,
};

pub(crate) const DESCRIPTION: &[u8] = b"{\"devices\": []}";
const RAM: SectionId = SectionId(2);
const BITMAPS: SectionId = SectionId(3);

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).expect("short")
}

/// Writes a stream record by record.
pub(crate) struct Stream {
    encoder: Encoder,
    pub(crate) bytes: Vec<u8>,
}

impl Stream {
    /// Header and configuration.
    pub(crate) fn new(machine: &str, uuid: Option<[u8; 16]>, footers: bool) -> Self {
        let mut stream = Self {
            encoder: Encoder::new(footers),
            bytes: Vec::new(),
        };
        stream.record(&Record::Header { version: 3 });
        stream.record(&Record::Configuration(Configuration {
            uuid,
            ..Configuration::of_machine(name(machine))
        }));
        stream
    }

    pub(crate) fn record(&mut self, record: &Record) {
        self.encoder.record(record, &mut self.bytes);
    }

    pub(crate) fn ram(&mut self, record: RamRecord) {
        self.record(&Record::Ram(record));
    }

    fn section(&mut self, kind: SectionKind, id: SectionId, text: &str, version: u32) {
        self.record(&Record::Section(Section {
            kind,
            id,
            name: name(text),
            instance: InstanceId(0),
            version,
        }));
    }

    pub(crate) fn begin_ram(&mut self, kind: SectionKind) {
        self.section(kind, RAM, "ram", 4);
    }

    pub(crate) fn end_ram(&mut self) {
        self.ram(RamRecord::EndOfSection);
        self.record(&Record::SectionEnd { id: RAM });
    }

    /// START with blocks of so many pages.
    pub(crate) fn blocks(&mut self, blocks: &[(&str, u64)]) {
        self.begin_ram(SectionKind::Start);
        let total_bytes = blocks.iter().map(|(_, pages)| pages << 12).sum();
        self.ram(RamRecord::BlockList { total_bytes });
        for (block, pages) in blocks {
            self.ram(RamRecord::Block {
                name: name(block),
                used_bytes: pages << 12,
                page_bytes: None,
                guest_address: None,
                mapped: None,
            });
        }
        self.end_ram();
    }

    pub(crate) fn page(&mut self, block: &str, number: u64, content: &[u8]) {
        self.ram(RamRecord::Page {
            page: page(block, number),
            bytes: 4096,
        });
        self.bytes.extend(content);
    }

    pub(crate) fn zero(&mut self, block: &str, number: u64) {
        self.ram(RamRecord::Zero {
            page: page(block, number),
            fill: 0,
        });
    }

    /// A section of dirty bitmaps without any.
    pub(crate) fn bitmaps(&mut self, kind: SectionKind) {
        self.section(kind, BITMAPS, "dirty-bitmap", 1);
        self.record(&Record::Bitmap(BitmapRecord::EndOfSection));
        self.record(&Record::SectionEnd { id: BITMAPS });
    }

    /// A device of an unknown layout.
    pub(crate) fn device(&mut self, id: u32, text: &str, body: &[u8]) {
        self.section(SectionKind::Full, SectionId(id), text, 1);
        self.bytes.extend(body);
        self.record(&Record::SectionEnd { id: SectionId(id) });
    }

    pub(crate) fn command(&mut self, command: Command) {
        self.record(&Record::Command(command));
    }

    pub(crate) fn end(&mut self) {
        self.record(&Record::Eof);
        self.record(&Record::Description {
            bytes: DESCRIPTION.len() as u32,
        });
        self.bytes.extend(DESCRIPTION);
    }
}

fn page(block: &str, number: u64) -> RamPage {
    RamPage {
        block: name(block),
        offset_bytes: number << 12,
    }
}

const BLOCKS: [&str; 3] = ["pc.ram", "/rom@etc/acpi/tables", "pc.bios"];
const MACHINES: [&str; 4] = ["pc-i440fx-7.2", "pc-q35-8.0", "pc-q35-10.0", "microvm"];

/// A page that is recognised, and compresses a little.
fn content(rng: &mut fastrand::Rng) -> Vec<u8> {
    let stamp = rng.u64(..).to_be_bytes();
    let noise = rng.usize(..512) * 8;
    let mut content: Vec<u8> = stamp.iter().copied().cycle().take(4096).collect();
    rng.fill(&mut content[..noise]);
    content
}

/// A random precopy of several passes. Pages change from pass to pass, and sometimes within one.
pub(crate) fn random(rng: &mut fastrand::Rng) -> Vec<u8> {
    let uuid = rng.bool().then(|| rng.u128(..).to_be_bytes());
    let mut stream = Stream::new(rng.choice(MACHINES).expect("some"), uuid, true);
    if rng.bool() {
        stream.command(Command::OpenReturnPath);
        stream.command(Command::Ping(rng.u32(..)));
    }
    let has_bitmaps = rng.bool();
    if has_bitmaps {
        stream.bitmaps(SectionKind::Start);
    }
    if rng.bool() {
        // As long as virtio-mem's.
        stream.device(9, "0000:00:03.0/virtio-mem-device-early", &[0x7e; 44]);
    }
    let blocks: Vec<(&str, u64)> = BLOCKS
        .into_iter()
        .zip([rng.u64(1..600), rng.u64(1..40), rng.u64(1..20)])
        .collect();
    stream.blocks(&blocks);
    if rng.bool() {
        stream.device(10, "early", b"body");
    }
    let passes = rng.usize(1..5);
    for pass in 0..passes {
        let is_last = pass + 1 == passes;
        let mut pages: Vec<(&str, u64)> = blocks
            .iter()
            .flat_map(|(block, pages)| (0..*pages).map(|number| (*block, number)))
            .collect();
        if pass > 0 {
            let share = rng.u8(1..=255);
            pages.retain(|_| rng.u8(..) < share);
        }
        let parts = rng.usize(1..5);
        for (at, part) in pages.chunks(pages.len().div_ceil(parts).max(1)).enumerate() {
            let is_end = is_last && (at + 1) * part.len() >= pages.len();
            if !is_end && rng.u8(..3) == 0 {
                stream.command(Command::Ping(1));
            }
            if has_bitmaps && rng.u8(..3) == 0 {
                stream.bitmaps(SectionKind::Part);
            }
            stream.begin_ram(SectionKind::Part);
            for (block, number) in part {
                for _ in 0..if rng.u8(..200) == 0 { 2 } else { 1 } {
                    match rng.u8(..4) {
                        0 => stream.zero(block, *number),
                        _ => stream.page(block, *number, &content(rng)),
                    }
                }
            }
            stream.end_ram();
        }
    }
    stream.begin_ram(SectionKind::End);
    for _ in 0..rng.usize(..200) {
        let (block, pages) = rng.choice(&blocks).expect("some");
        stream.page(block, rng.u64(..*pages), &content(rng));
    }
    stream.end_ram();
    if has_bitmaps {
        stream.bitmaps(SectionKind::End);
    }
    for device in 20..20 + rng.u32(..5) {
        let body: Vec<u8> = (0..rng.usize(..100_000)).map(|_| rng.u8(..)).collect();
        stream.device(device, "cpu", &body);
    }
    stream.end();
    stream.bytes
}
