//! Makes `seeds/` from the captured streams: small, and with a few records of every kind.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::mem::{Discriminant, discriminant};
use std::path::Path;

use vmferry_stream::{
    BlockChunk, Content, Decoder, Encoder, Options, RamRecord, Record, Section, SectionKind, Step,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let seeds = root.join("seeds");
    fs::create_dir_all(seeds.join("stream"))?;
    fs::create_dir_all(seeds.join("return_path"))?;
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
        let seed = [vec![0], thinned(&bytes)].concat();
        fs::write(seeds.join("stream").join(name), seed)?;
    }
    Ok(())
}

/// The same stream with fewer pages, and without big device sections, data of disks and description.
fn thinned(input: &[u8]) -> Vec<u8> {
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
    let mut encoder = Encoder::new(decoder.footers() != Some(false));
    let mut output = Vec::new();
    let mut counts: HashMap<Kind, usize> = HashMap::new();
    let mut skipping = false;
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
        }
        let record = match record {
            Record::Description { .. } => {
                payload = b"{}".to_vec();
                Record::Description { bytes: 2 }
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
