//! What is in a stream, whatever way it came.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use vmferry_inspect::{
    Blocks, BodyEnd, Event, Finish, MemoryImage, VisitError, Visitor, WalkError, find_body_end,
    walk,
};
use vmferry_relay::park::{ParkError, ParkOptions, Parked, Parker};
use vmferry_stream::{Content, Decoder, Options, Record, Section, SectionKind, Step};

/// A stream that a real QEMU made.
pub(crate) fn capture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let packed = File::open(folder.join(format!("{name}.xz"))).expect("a capture");
    let mut stream = Vec::new();
    xz2::read::XzDecoder::new(packed)
        .read_to_end(&mut stream)
        .expect("a packed stream");
    stream
}

/// The names of all streams from a source.
pub(crate) fn captures() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let mut names: Vec<_> = fs::read_dir(folder)
        .expect("captures")
        .map(|file| file.expect("a file").path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "xz"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .filter(|name| !name.ends_with(".rp"))
        .collect();
    names.sort();
    names
}

/// What matters of a stream.
#[derive(Debug, PartialEq)]
pub(crate) struct Contents {
    /// Bytes and length of pages that came, by block.
    pub(crate) memory: BTreeMap<String, (Vec<u8>, u64)>,
    /// Sections of devices.
    pub(crate) devices: Vec<(Section, Vec<u8>)>,
    /// Bodies of other live sections.
    pub(crate) live: Vec<(String, Vec<u8>)>,
    pub(crate) description: Option<Vec<u8>>,
}

struct Reader {
    memory: MemoryImage,
    devices: Vec<(Section, Vec<u8>)>,
    live: Vec<(String, Vec<u8>)>,
    open: Option<Section>,
    description: Option<Vec<u8>>,
    commands: Vec<String>,
}

impl Visitor for Reader {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match &event {
            Event::Record(_, Record::Command(command)) => {
                self.commands.push(command.name().to_owned());
            }
            Event::Record(_, Record::Section(section)) => self.open = Some(section.clone()),
            Event::Record(_, Record::Bitmap(record)) => {
                self.live.push((format!("{record:?}"), Vec::new()));
            }
            Event::Payload(_, bytes) => {
                let is_live = |section: &Section| section.content() == Content::DirtyBitmap;
                if let (true, Some(last)) = (
                    self.open.as_ref().is_some_and(is_live),
                    self.live.last_mut(),
                ) {
                    last.1.extend_from_slice(bytes);
                }
            }
            Event::Device(body) => {
                self.devices
                    .push((body.section.clone(), body.bytes.to_vec()));
            }
            Event::Description(description) => {
                self.description = Some(description.text.to_vec());
            }
            _ => {}
        }
        match self.memory.event(event) {
            // A machine may have none.
            Err(error) if error.to_string().contains("no guest memory") => Ok(()),
            told => told,
        }
    }
}

/// Walk through a stream: what is in it, the commands in it, how it ended.
pub(crate) fn read(stream: &[u8]) -> Result<(Contents, Vec<String>, Finish), WalkError> {
    let file = tempfile::tempfile().expect("a file");
    let mut reader = Reader {
        memory: MemoryImage::new(file, Blocks::All { start_bytes: 0 }),
        devices: Vec::new(),
        live: Vec::new(),
        open: None,
        description: None,
        commands: Vec::new(),
    };
    let finish = walk(stream, &mut reader)?;
    let mut memory = BTreeMap::new();
    // A machine without memory has no image of it.
    if let Ok((file, blocks)) = reader.memory.finish() {
        for block in blocks {
            let mut bytes = vec![0; usize::try_from(block.length_bytes).unwrap()];
            file.read_exact_at(&mut bytes, block.file_offset.unwrap())
                .expect("the image of a block");
            memory.insert(block.name.to_string(), (bytes, block.absent_bytes));
        }
    }
    let contents = Contents {
        memory,
        devices: reader.devices,
        live: reader.live,
        description: reader.description,
    };
    Ok((contents, reader.commands, finish))
}

/// Park a stream that is pushed in pieces of these lengths, over and over.
pub(crate) fn park_in_pieces(
    stream: &[u8],
    mut piece: impl FnMut() -> usize,
) -> Result<(Vec<u8>, Parked), ParkError> {
    let file = tempfile::tempfile().expect("a file");
    let mut parker = Parker::new(file, ParkOptions::default())?;
    let mut rest = stream;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
        parker.push(now)?;
        rest = later;
    }
    let parked = parker.finish()?;
    Ok((bytes_of(&parked.file), parked))
}

pub(crate) fn park(stream: &[u8]) -> Result<Vec<u8>, ParkError> {
    park_in_pieces(stream, || usize::MAX).map(|(bytes, _)| bytes)
}

pub(crate) fn bytes_of(file: &File) -> Vec<u8> {
    let length = file.metadata().expect("a file").len();
    let mut bytes = vec![0; usize::try_from(length).unwrap()];
    file.read_exact_at(&mut bytes, 0).expect("a file");
    bytes
}

/// Where records of a stream begin, with where they and their payload end; devices' bodies count as
/// payload.
pub(crate) fn records(stream: &[u8]) -> Vec<(usize, Record, usize)> {
    let mut decoder = Decoder::new(Options::default());
    let mut records: Vec<(usize, Record, usize)> = Vec::new();
    let mut at = 0;
    loop {
        match decoder.step(&stream[at..]).expect("a stream that is right") {
            Step::NeedMore(_) | Step::End => return records,
            Step::Payload(bytes) => {
                at += bytes as usize;
                records.last_mut().expect("a record before its payload").2 = at;
            }
            Step::Record { record, used } => {
                let start = at;
                at += used;
                if let Record::Section(section) = &record
                    && section.content() == Content::Device
                    && section.kind == SectionKind::Full
                    && let BodyEnd::At(length) =
                        find_body_end(&decoder, section, &stream[at..], 0, true)
                {
                    decoder.skip_device(length as u64);
                }
                records.push((start, record, at));
            }
        }
    }
}

/// A generator whose seed is printed; `VMFERRY_SEED` repeats a run.
pub(crate) fn seeded() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}
