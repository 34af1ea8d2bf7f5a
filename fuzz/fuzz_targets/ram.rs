//! RAM records and the commands of a postcopy, received into the memory of a small guest.
//!
//! The first byte holds choices, the rest is a stream from behind the list of RAM blocks on, without
//! the bytes of pages: those are made up, so that inputs are small. PING stands for a broken
//! connection.

#![no_main]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use vmferry_ram::{
    AnonymousRam, BlockLayout, GuestRam, IncomingRam, PAGE_BYTES, RamDestination,
    RamDestinationOptions, Sharing,
};
use vmferry_savevm::LoadHandler;
use vmferry_stream::{
    Command, Decoder, Encoder, Footers, InstanceId, Name, Options, RamPage, RamRecord, Record,
    Section, SectionId, SectionKind, Step, xbzrle,
};

const PAGE: usize = PAGE_BYTES as usize;
/// The first byte.
const POSTCOPY: u8 = 1;
const NO_LIST: u8 = 2;

/// Name, pages in use, pages at most, sharing; the second one grows to 4 pages.
const BLOCKS: [(&str, u64, u64, Sharing); 3] = [
    ("a", 8, 8, Sharing::Private),
    ("b", 2, 6, Sharing::Private),
    ("s", 2, 2, Sharing::Shared),
];
const LISTED: [u64; 3] = [8, 4, 2];

fn name(name: &str) -> Name {
    Name::new(name).expect("short")
}

fn ram() -> Arc<AnonymousRam> {
    let layouts = BLOCKS.map(|(block, used, max, sharing)| BlockLayout {
        idstr: name(block),
        used_bytes: used * PAGE_BYTES,
        max_bytes: max * PAGE_BYTES,
        page_bytes: PAGE_BYTES,
        guest_address: Some(0),
        sharing,
    });
    Arc::new(AnonymousRam::with_layouts(layouts.into()).expect("memory"))
}

/// A stream up to where the input goes on.
fn beginning(choices: u8) -> Vec<u8> {
    let mut records = vec![
        Record::Header { version: 3 },
        Record::Section(Section {
            kind: SectionKind::Start,
            id: SectionId(2),
            name: name("ram"),
            instance: InstanceId(0),
            version: 4,
        }),
    ];
    if choices & NO_LIST == 0 {
        let pages = LISTED.iter().sum::<u64>();
        records.push(Record::Ram(RamRecord::BlockList {
            total_bytes: pages * PAGE_BYTES,
        }));
        for ((block, ..), pages) in BLOCKS.iter().zip(LISTED) {
            records.push(Record::Ram(RamRecord::Block {
                name: name(block),
                used_bytes: pages * PAGE_BYTES,
                page_bytes: None,
                guest_address: None,
                mapped: None,
            }));
        }
    }
    let (mut encoder, mut out) = (Encoder::new(true), Vec::new());
    for record in &records {
        encoder.record(record, &mut out);
    }
    out
}

/// What memory must be.
#[derive(Default)]
struct Model {
    /// Pages that were received.
    pages: BTreeMap<(String, u64), Vec<u8>>,
    is_listening: bool,
}

impl Model {
    fn page(&self, page: &RamPage) -> Option<&Vec<u8>> {
        self.pages.get(&key(page))
    }

    fn take(&mut self, page: &RamPage, bytes: Vec<u8>) {
        let new = self.pages.insert(key(page), bytes).is_none();
        assert!(new || !self.is_listening, "a page was placed twice");
    }

    /// Is memory as it must be? Pages that are missing are not looked at.
    fn check(&self, ram: &AnonymousRam, incoming: &IncomingRam, may_look: bool) {
        let is_untouched = [0; PAGE];
        for block in ram.blocks() {
            let idstr = block.idstr().as_str();
            let bitmap = incoming.received(block.idstr()).expect("it is here");
            for page in 0..block.pages() {
                let expected = self.pages.get(&(idstr.to_owned(), page * PAGE_BYTES));
                let is_here = bitmap[page as usize / 8] >> (page % 8) & 1 == 1;
                assert_eq!(is_here, expected.is_some(), "{idstr} {page}");
                if may_look || expected.is_some() {
                    let mut seen = vec![0; PAGE];
                    let read = block.read(page * PAGE_BYTES, &mut seen);
                    read.expect("it is in the block");
                    let expected = expected.map_or(&is_untouched[..], |bytes| bytes);
                    assert!(seen == expected, "{idstr} {page} differs");
                }
            }
        }
    }
}

fn key(page: &RamPage) -> (String, u64) {
    (page.block.to_string(), page.offset_bytes)
}

/// Carries a stream out, on memory and on the model. `None` once something was refused.
struct Engine<'a> {
    ram: &'a AnonymousRam,
    handler: RamDestination,
    incoming: IncomingRam,
    model: Model,
    discarding: Name,
    last: Option<RamRecord>,
}

impl Engine<'_> {
    fn record(&mut self, record: &Record) -> Option<()> {
        match record {
            Record::Ram(ram) => {
                self.handler.record(record).ok()?;
                if let RamRecord::Zero { page, fill } = ram {
                    self.model.take(page, vec![*fill; PAGE]);
                }
                let is_empty = record.payload_bytes() == 0;
                if let (RamRecord::Compressed { .. }, true) = (ram, is_empty) {
                    panic!("nothing was unpacked to a page");
                }
                self.last = Some(ram.clone());
            }
            Record::Command(command) => self.command(command)?,
            Record::DiscardRange(range) => {
                let discarding = self.discarding.clone();
                self.incoming.discard(&discarding, *range).ok()?;
                let range = range.start_bytes..range.start_bytes + range.length_bytes;
                self.model.pages.retain(|(block, offset), _| {
                    *block != *discarding.as_str() || !range.contains(offset)
                });
            }
            Record::Eof => self.incoming.finish().ok()?,
            _ => {}
        }
        Some(())
    }

    fn command(&mut self, command: &Command) -> Option<()> {
        match command {
            Command::PostcopyAdvise(_) => {
                self.incoming.advise().ok()?;
                assert!(self.model.pages.is_empty(), "memory was emptied");
            }
            Command::PostcopyRamDiscard { block, .. } => self.discarding = block.clone(),
            Command::PostcopyListen => {
                self.incoming.listen().ok()?;
                self.model.is_listening = true;
            }
            Command::Ping(_) => {
                self.incoming.pause();
                assert_eq!(self.incoming.next_request(Instant::now()), None);
            }
            _ => {}
        }
        Some(())
    }

    /// The payload of the record before.
    fn payload(&mut self, bytes: &[u8]) -> Option<()> {
        let room = self.handler.payload(bytes.len()).ok()?;
        room.copy_from_slice(bytes);
        self.handler.payload_filled().ok()?;
        match self.last.take()? {
            RamRecord::Page { page, .. } => self.model.take(&page, bytes.to_vec()),
            RamRecord::Xbzrle { page, .. } => {
                let mut changed = self.model.page(&page).expect("it was received").clone();
                assert_eq!(xbzrle::apply(&mut changed, bytes), Ok(()));
                self.model.take(&page, changed);
            }
            RamRecord::Compressed { page, .. } => {
                let mut unpacked = vec![0; PAGE];
                let mut blocks = self.ram.blocks().iter();
                let block = blocks.find(|block| *block.idstr() == page.block);
                let read = block
                    .expect("it is here")
                    .read(page.offset_bytes, &mut unpacked);
                read.expect("it is in the block");
                self.model.take(&page, unpacked);
            }
            other => panic!("{other:?} has payload"),
        }
        Some(())
    }

    /// The whole input; `None` if it was refused.
    fn run(&mut self, beginning: &[u8], input: &[u8]) -> Option<()> {
        let options = Options {
            footers: Footers::Present,
            ..Options::default()
        };
        let mut decoder = Decoder::new(options);
        let bytes = [beginning, input].concat();
        let mut window = &bytes[..];
        let mut rng = fastrand::Rng::with_seed(1);
        loop {
            let used = match decoder.step(window).ok()? {
                Step::NeedMore(_) | Step::End => return Some(()),
                Step::Record { record, used } => {
                    self.record(&record)?;
                    if let Record::Section(section) = &record
                        && section.name.as_str() != "ram"
                    {
                        return Some(());
                    }
                    used
                }
                Step::Payload(bytes) => match &self.last {
                    Some(RamRecord::Page { .. }) => {
                        let page: Vec<_> = (0..bytes).map(|_| rng.u8(..)).collect();
                        self.payload(&page)?;
                        0
                    }
                    Some(_) => {
                        let bytes = bytes as usize;
                        self.payload(window.get(..bytes)?)?;
                        bytes
                    }
                    None => return Some(()), // A package.
                },
            };
            window = &window[used..];
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&choices, input)) = data.split_first() else {
        return;
    };
    let ram = ram();
    let options = RamDestinationOptions {
        postcopy: choices & POSTCOPY != 0,
        ignore_shared: false,
    };
    let handler = RamDestination::new(ram.clone(), options).expect("names differ");
    let incoming = handler.incoming();
    let mut engine = Engine {
        ram: &ram,
        incoming: incoming.clone(),
        handler,
        model: Model::default(),
        discarding: Name::default(),
        last: None,
    };
    engine.run(&beginning(choices), input);
    engine
        .model
        .check(&ram, &incoming, !engine.model.is_listening);
    // Nobody waits any more: what is missing is zero.
    incoming.abandon();
    engine.model.check(&ram, &incoming, true);
});
