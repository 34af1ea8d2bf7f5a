//! Streams of real QEMUs: memory afterwards is what `vmferry extract ram` finds in them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;

use vmferry_inspect::{BlockImage, Blocks, Event, MemoryImage, VisitError, Visitor, walk};
use vmferry_savevm::Incoming;
use vmferry_stream::{Command, Name, PageSizes, RamRecord};

use super::*;

fn capture(file: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let packed = File::open(folder.join(file)).unwrap();
    let mut bytes = Vec::new();
    xz2::read::XzDecoder::new(packed)
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// Every captured stream from source to destination, with its name.
fn captures() -> impl Iterator<Item = (String, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".xz") && !name.ends_with(".rp.xz"))
        .collect();
    names.sort();
    names.into_iter().map(|name| {
        let bytes = capture(&name);
        (name, bytes)
    })
}

/// The blocks that a stream lists.
#[derive(Default)]
struct Listing(Vec<BlockLayout>);

impl Visitor for Listing {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        if let Event::Record(
            _,
            Record::Ram(RamRecord::Block {
                name,
                used_bytes,
                page_bytes,
                guest_address,
                ..
            }),
        ) = event
        {
            // As in the machines that wrote them.
            let is_shared = guest_address.is_some() && name.as_str() == "m0";
            self.0.push(BlockLayout {
                idstr: name.clone(),
                used_bytes: *used_bytes,
                max_bytes: *used_bytes,
                page_bytes: page_bytes.unwrap_or(PAGE_BYTES),
                guest_address: *guest_address,
                sharing: if is_shared {
                    Sharing::Shared
                } else {
                    Sharing::Private
                },
            });
        }
        Ok(())
    }
}

/// Content of each block, by name.
fn extracted(stream: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut image = MemoryImage::new(
        tempfile::tempfile().unwrap(),
        Blocks::All { start_bytes: 0 },
    );
    walk(stream, &mut image).unwrap();
    let (mut file, blocks) = image.finish().unwrap();
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    let content = |block: &BlockImage| {
        let start = block.file_offset.unwrap() as usize;
        bytes[start..start + block.length_bytes as usize].to_vec()
    };
    blocks
        .iter()
        .map(|block| (block.name.to_string(), content(block)))
        .collect()
}

/// Postcopies, and what this destination refuses, are other tests' business.
fn is_plain(name: &str) -> bool {
    ![
        "postcopy-1",
        "postcopy-7",
        "postcopy-h",
        "preempt",
        "multifd",
        "mapped-ram",
    ]
    .iter()
    .any(|kind| name.contains(kind))
}

#[test]
fn precopies_of_real_qemus_arrive() {
    let mut kinds = BTreeMap::new();
    for (file, stream) in captures().filter(|(file, _)| is_plain(file)) {
        let mut listing = Listing::default();
        walk(&stream[..], &mut listing).unwrap();
        let ignore_shared = listing.0.iter().any(|block| block.guest_address.is_some());
        let options = RamDestinationOptions {
            ignore_shared,
            ..RamDestinationOptions::default()
        };
        let ram = TestRam::new(listing.0);
        let handler = RamDestination::new(ram.clone(), options).unwrap();
        let postcopy = match &file {
            file if file.contains("advised-only") => Incoming::Ram(PageSizes {
                all_bytes: PAGE_BYTES,
                target_bytes: PAGE_BYTES,
            }),
            _ => Incoming::Bitmaps,
        };
        load_as(&stream, handler, postcopy).unwrap_or_else(|error| panic!("{file}: {error}"));
        if ram.blocks.is_empty() {
            continue; // The machine `none`, in which nothing can be extracted.
        }
        for (index, (block, expected)) in (0..).zip(ordered(&ram, extracted(&stream))) {
            assert!(ram.content(index) == expected, "{file}: {block} differs");
        }
        for kind in ["xbzrle", "compress", "bgsnap", "ignore-shared", "running"] {
            *kinds.entry(kind).or_insert(0) += usize::from(file.starts_with(kind));
        }
    }
    assert!(kinds.values().all(|count| *count > 0), "{kinds:?}");
}

/// In the order of the guest's blocks.
fn ordered(ram: &TestRam, mut extracted: BTreeMap<String, Vec<u8>>) -> Vec<(String, Vec<u8>)> {
    assert_eq!(ram.blocks.len(), extracted.len());
    let blocks = ram.blocks.iter().map(|block| {
        let name = block.idstr().to_string();
        let content = extracted.remove(&name).unwrap();
        (name, content)
    });
    blocks.collect()
}

/// What an engine does with a stream, devices aside: another one finds where they end.
struct Engine {
    handler: RamDestination,
    incoming: IncomingRam,
    payload: Vec<u8>,
    expected: usize,
    discarding: Option<Name>,
    listened: bool,
}

impl Engine {
    fn new(handler: RamDestination) -> Self {
        Self {
            incoming: handler.incoming(),
            handler,
            payload: Vec::new(),
            expected: 0,
            discarding: None,
            listened: false,
        }
    }

    fn record(&mut self, record: &Record) -> Result<(), VisitError> {
        self.expected = 0;
        match record {
            Record::Ram(ram) => {
                self.handler.record(record)?;
                self.expected = ram.payload_bytes() as usize;
                self.payload.clear();
            }
            Record::Command(Command::PostcopyAdvise(Some(sizes))) => {
                assert_eq!(*sizes, self.incoming.page_sizes());
                self.incoming.advise()?;
            }
            Record::Command(Command::PostcopyRamDiscard { block, .. }) => {
                self.discarding = Some(block.clone());
            }
            Record::DiscardRange(range) => {
                let block = self.discarding.as_ref().unwrap();
                self.incoming.discard(block, *range)?;
            }
            Record::Command(Command::PostcopyListen) => {
                self.incoming.listen()?;
                self.listened = true;
            }
            _ => {}
        }
        Ok(())
    }
}

impl Visitor for Engine {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Record(_, record) => self.record(record)?,
            Event::Payload(_, bytes) if self.expected > 0 => {
                self.payload.extend(bytes);
                if self.payload.len() == self.expected {
                    let room = self.handler.payload(self.expected)?;
                    room.copy_from_slice(&self.payload);
                    self.handler.payload_filled()?;
                    self.expected = 0;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// Every page comes after POSTCOPY_RUN that was discarded before, huge ones whole; with a second
/// channel, of which nothing is known here, one page does not.
#[test]
fn postcopies_of_real_qemus_arrive() {
    if !can_postcopy() {
        return;
    }
    let mut tried = 0;
    let is_postcopy = |file: &str| file.starts_with("postcopy-") || file.starts_with("preempt-");
    for (file, stream) in captures().filter(|(file, _)| is_postcopy(file)) {
        let mut listing = Listing::default();
        walk(&stream[..], &mut listing).unwrap();
        let ram = TestRam::new(listing.0);
        let mut engine = Engine::new(with_postcopy(&ram));
        walk(&stream[..], &mut engine).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert_eq!(engine.listened, !file.contains("advised-only"), "{file}");
        if file.starts_with("preempt") {
            let missing = engine.incoming.finish().unwrap_err();
            assert_eq!(missing.pages, 1, "{file}");
            continue;
        }
        engine.incoming.finish().unwrap();
        for (index, (block, expected)) in (0..).zip(ordered(&ram, extracted(&stream))) {
            assert!(ram.content(index) == expected, "{file}: {block} differs");
        }
        tried += 1;
    }
    assert_eq!(tried, 7);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    for (file, expected) in [
        (
            "mapped-ram-100.xz",
            "a record of mapped-ram, which is not supported here",
        ),
        (
            "multifd-100.conn0.fwd.xz",
            "a record of multifd, which is not supported here",
        ),
    ] {
        let stream = capture(file);
        let mut listing = Listing::default();
        let _ = walk(&stream[..], &mut listing);
        let error = load(&stream, destination(&TestRam::new(listing.0))).unwrap_err();
        assert!(error.ends_with(expected), "{file}: {error}");
    }
}
