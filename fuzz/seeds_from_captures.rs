//! Makes `seeds/` from the captured streams: small, and with a few records of every kind.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::mem::{Discriminant, discriminant};
use std::path::Path;

use vmferry_stream::{
    BlockChunk, Content, Decoder, Encoder, MappedBlock, Options, PageBits, RamRecord, Record,
    Section, SectionKind, Step,
};
use vmferry_vmstate::{DescriptionWriter, Dialect, SavedBody, VmDescription};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let seeds = root.join("seeds");
    for target in [
        "stream",
        "return_path",
        "xbzrle",
        "vmdescription",
        "inspect",
        "image_index",
    ] {
        fs::create_dir_all(seeds.join(target))?;
    }
    // Lengths of two bytes, one of them longer than it had to be.
    let long = b"\x0c\0\x81\0\x07\xff\x0f\x84\x01";
    let long = [&long[..], &[7; 0x84]].concat();
    fs::write(seeds.join("xbzrle").join("long-lengths"), long)?;
    for entry in fs::read_dir(root.join("../crates/stream/tests/captures"))? {
        let path = entry?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        let Some(name) = name.strip_suffix(".xz") else {
            continue;
        };
        let mut bytes = Vec::new();
        xz2::read::XzDecoder::new(fs::File::open(&path)?).read_to_end(&mut bytes)?;
        if name.ends_with(".rp") {
            fs::write(seeds.join("return_path").join(name), bytes)?;
            continue;
        }
        let (records, footers) = decoded(&bytes);
        if let Some(encoding) = some_encoding(&records) {
            fs::write(seeds.join("xbzrle").join(name), [&[12], encoding].concat())?;
        }
        // The first byte chooses where in its file the stream starts.
        let (choices, start) = match name {
            "mapped-ram-multifd-100" => (0x80, 1 << 20),
            _ => (0, 0),
        };
        if DESCRIBED.contains(&name) {
            for (device, seed) in described_devices(&records) {
                let device = device.replace(['/', ':'], "_");
                fs::write(
                    seeds.join("vmdescription").join(format!("{name}-{device}")),
                    seed,
                )?;
            }
        }
        if DESCRIBED.contains(&name) || INSPECTED.contains(&name) {
            let seed = thinned(records.clone(), footers, start, Describe::Kept);
            if name == "none-72" {
                fs::write(
                    seeds.join("inspect").join("libvirt"),
                    in_libvirt_file(&seed),
                )?;
            }
            if IMAGES.contains(&name) {
                // The first byte says that an image follows.
                let image = [&[2], seed.as_slice()].concat();
                fs::write(seeds.join("image_index").join(name), image)?;
            }
            fs::write(seeds.join("inspect").join(name), seed)?;
        }
        let seed = thinned(records, footers, start, Describe::Nothing);
        let seed = [vec![choices], seed].concat();
        fs::write(seeds.join("stream").join(name), seed)?;
    }
    Ok(())
}

/// Whose devices and descriptions become seeds: two machines, both dialects.
const DESCRIBED: [&str; 4] = ["none-72", "none-100", "isapc-72", "q35-100"];
/// Whose pages are found again.
const IMAGES: [&str; 6] = [
    "dirty-bitmap-100",
    "mapped-ram-100",
    "none-72",
    "pc-2.2-72",
    "postcopy-72.fwd",
    "xbzrle-100",
];
/// What is walked through besides.
const INSPECTED: [&str; 9] = [
    "bgsnap-72",
    "blk-72",
    "dirty-bitmap-100",
    "mapped-ram-100",
    "multifd-100.conn0.fwd",
    "no-vmdesc-72",
    "pc-2.2-72",
    "postcopy-72.fwd",
    "xbzrle-100",
];

/// What the description says in the end.
#[derive(Clone, Copy)]
enum Describe {
    /// The device sections that were kept.
    Kept,
    Nothing,
}

type Records = Vec<(Record, Vec<u8>)>;

/// The records of a stream, each with its payload, and whether sections have footers.
fn decoded(input: &[u8]) -> (Records, bool) {
    let mut decoder = Decoder::new(Options::default());
    let mut records: Vec<(Record, Vec<u8>)> = Vec::new();
    let mut at = 0;
    while let Ok(step) = decoder.step(&input[at..]) {
        match step {
            Step::NeedMore(_) | Step::End => break,
            Step::Payload(bytes) => {
                let payload = &input[at..input.len().min(at + bytes as usize)];
                at += payload.len();
                records.last_mut().expect("a record").1.extend(payload);
            }
            Step::Record { record, used } => {
                at += used;
                if let Record::Section(section) = &record
                    && section.content() == Content::Device
                {
                    decoder.skip_device(body_bytes(section, &input[at..]));
                }
                records.push((record, Vec::new()));
            }
        }
    }
    (records, decoder.footers() != Some(false))
}

/// The first XBZRLE encoding.
fn some_encoding(records: &Records) -> Option<&[u8]> {
    records.iter().find_map(|(record, payload)| {
        matches!(record, Record::Ram(RamRecord::Xbzrle { .. })).then_some(&payload[..])
    })
}

/// The same stream with fewer pages, and without big device sections, data of disks and description.
fn thinned(records: Records, footers: bool, start: u64, describe: Describe) -> Vec<u8> {
    let description = description(&records);
    let mut described = DescriptionWriter::new(Dialect::Qemu7, 4096, None);
    let mut encoder = Encoder::new(footers);
    let mut output = Vec::new();
    let mut counts: HashMap<Kind, usize> = HashMap::new();
    let mut skipping = false;
    let mut mapped = MappedRam::new(&records, start);
    for (record, mut payload) in records {
        let kept = match kind(&record) {
            Some((kind, kept)) => {
                let count = counts.entry(kind).or_default();
                *count += 1;
                *count <= kept
            }
            None => true,
        };
        if let Record::Section(section) = &record {
            skipping = !kept || section.content() == Content::Device && payload.len() > 400;
            let saved = saved(description.as_ref(), section, &payload);
            if let (false, Some(saved)) = (skipping, saved) {
                described.device(&section.name, section.instance.0, &saved);
            }
        }
        let record = match record {
            Record::Description { .. } => {
                payload = match describe {
                    Describe::Kept => described.finish().into_bytes(),
                    Describe::Nothing => b"{}".to_vec(),
                };
                described = DescriptionWriter::new(Dialect::Qemu7, 4096, None);
                Record::Description {
                    bytes: payload.len() as u32,
                }
            }
            Record::Configuration(_) | Record::Ram(_) if mapped.blocks > 0 => {
                mapped.shrink(record, &mut payload, &output)
            }
            Record::Block(BlockChunk::Data { sector, device }) => {
                payload.clear();
                Record::Block(BlockChunk::Zero { sector, device })
            }
            other => other,
        };
        if kept && !skipping {
            encoder.record(&record, &mut output);
            output.extend(payload);
        }
        skipping &= !matches!(record, Record::SectionEnd { .. });
    }
    output
}

fn description(records: &Records) -> Option<VmDescription> {
    let text = records.iter().find_map(|(record, payload)| {
        matches!(record, Record::Description { .. }).then_some(payload)
    });
    VmDescription::parse(text?).ok()
}

/// The body of a device, taken apart.
fn saved(description: Option<&VmDescription>, section: &Section, body: &[u8]) -> Option<SavedBody> {
    let layout = description?.device(&section.name, section.instance.0)?;
    layout.decode(body).ok()
}

/// Short devices, each with a description of nothing else.
fn described_devices(records: &Records) -> Vec<(String, Vec<u8>)> {
    const SEED_BYTES_MAX: usize = 6000;
    let description = description(records);
    let dialect = match description.as_ref().map(|text| &text.configuration) {
        Some(Some(_)) => Dialect::Qemu10,
        _ => Dialect::Qemu7,
    };
    let mut seeds = Vec::new();
    for (record, body) in records {
        let Record::Section(section) = record else {
            continue;
        };
        let Some(saved) = saved(description.as_ref(), section, body) else {
            continue;
        };
        let mut writer = DescriptionWriter::new(dialect, 4096, None);
        writer.device(&section.name, section.instance.0, &saved);
        let text = writer.finish();
        let length = (text.len() as u16).to_be_bytes();
        let seed = [&length, text.as_bytes(), &[0], body].concat();
        if seed.len() <= SEED_BYTES_MAX {
            seeds.push((section.name.to_string(), seed));
        }
    }
    seeds
}

/// As `virsh save` writes it, with XML that is none.
fn in_libvirt_file(stream: &[u8]) -> Vec<u8> {
    let xml = b"<domain/>\0";
    let mut file = b"LibvirtQemudSave".to_vec();
    for word in [2, xml.len() as u32, 1, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    file.resize(92, 0);
    [&file, &xml[..], stream].concat()
}

/// Makes a mapped-ram file small: one page of 1 KiB for each block.
struct MappedRam {
    blocks: u64,
    start: u64,
    gap_bytes: usize,
}

impl MappedRam {
    fn new(records: &Records, start: u64) -> Self {
        let is_mapped = |(record, _): &&(Record, _)| {
            matches!(
                record,
                Record::Ram(RamRecord::Block {
                    mapped: Some(_),
                    ..
                })
            )
        };
        Self {
            blocks: records.iter().filter(is_mapped).count() as u64,
            start,
            gap_bytes: 0,
        }
    }

    fn shrink(&mut self, record: Record, payload: &mut Vec<u8>, output: &[u8]) -> Record {
        const PAGE_BYTES: u64 = 1 << 10;
        match record {
            Record::Configuration(mut configuration) => {
                configuration.page_bits = PageBits::new(10);
                Record::Configuration(configuration)
            }
            Record::Ram(RamRecord::BlockList { .. }) => Record::Ram(RamRecord::BlockList {
                total_bytes: self.blocks * PAGE_BYTES,
            }),
            Record::Ram(RamRecord::Block { name, .. }) => {
                let entry_bytes = 1 + name.len() as u64 + 8 + 28;
                let bitmap_offset = self.start + output.len() as u64 + entry_bytes;
                let pages_offset = (bitmap_offset + 8).next_multiple_of(PAGE_BYTES);
                self.gap_bytes = (pages_offset - bitmap_offset - 8) as usize;
                Record::Ram(RamRecord::Block {
                    name,
                    used_bytes: PAGE_BYTES,
                    page_bytes: None,
                    guest_address: None,
                    mapped: Some(MappedBlock {
                        page_bytes: PAGE_BYTES,
                        bitmap_offset,
                        pages_offset,
                    }),
                })
            }
            other => {
                let bytes = match other {
                    Record::Ram(RamRecord::MappedBitmap { .. }) => 8,
                    Record::Ram(RamRecord::MappedGap { .. }) => self.gap_bytes,
                    Record::Ram(RamRecord::MappedPages { .. }) => PAGE_BYTES as usize,
                    _ => 0,
                };
                payload.resize(bytes, 0);
                other
            }
        }
    }
}

type Kind = (&'static str, Option<Discriminant<RamRecord>>);

/// What there is a lot of, and how much of it a seed keeps.
fn kind(record: &Record) -> Option<(Kind, usize)> {
    match record {
        Record::Ram(
            ram @ (RamRecord::Page { .. }
            | RamRecord::Zero { .. }
            | RamRecord::Xbzrle { .. }
            | RamRecord::Compressed { .. }),
        ) => Some((("page", Some(discriminant(ram))), 2)),
        Record::Section(section) if section.kind == SectionKind::Part => match section.content() {
            Content::DirtyBitmap => Some((("bitmap", None), 20)),
            _ => Some((("part", None), 8)),
        },
        _ => None,
    }
}

fn body_bytes(section: &Section, rest: &[u8]) -> u64 {
    let mut footer = vec![0x7e];
    footer.extend(section.id.0.to_be_bytes());
    let found = rest
        .windows(6)
        .position(|bytes| bytes[..5] == footer && matches!(bytes[5], 0 | 1 | 2 | 3 | 4 | 8));
    found.unwrap_or(rest.len()) as u64
}
