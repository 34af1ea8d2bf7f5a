//! A stream and what a destination makes of it.

use std::collections::{BTreeMap, BTreeSet};

use vmferry_savevm::{PostcopyHandler, Progress, SaveHandler};
use vmferry_stream::{
    Command, Decoder, DiscardRange, Encoder, InstanceId, Name, Options, RamPage, RamRecord, Record,
    Section, SectionId, SectionKind, Step, xbzrle,
};

use super::*;

/// A stream that is being written, and decoded at once by a model of a destination.
pub(super) struct Stream {
    encoder: Encoder,
    decoder: Decoder,
    pub(super) destination: Destination,
}

/// What a destination has.
#[derive(Default)]
pub(super) struct Destination {
    pub(super) blocks: BTreeMap<Name, Vec<u8>>,
    pub(super) listed: Vec<RamRecord>,
    /// Every page record: block, page, kind, bytes of payload.
    pub(super) records: Vec<(Name, u64, Kind, usize)>,
    /// Pages that were discarded and did not come.
    pub(super) missing: BTreeSet<(Name, u64)>,
    /// Pages that came in some form, and were not discarded.
    received: BTreeSet<(Name, u64)>,
    is_postcopy: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Zero,
    Page,
    Changes,
}

impl Stream {
    /// With the START of this source in it.
    pub(super) fn begin(source: &mut RamSource) -> Self {
        let options = Options {
            configuration: vmferry_stream::Expect::Absent,
            ..Options::default()
        };
        let mut stream = Self {
            encoder: Encoder::new(true),
            decoder: Decoder::new(options),
            destination: Destination::default(),
        };
        stream.take(&[Record::Header { version: 3 }]);
        stream.section(SectionKind::Start, |sink| {
            source.setup(sink).map(|()| Progress::Finished)
        });
        stream
    }

    pub(super) fn part(&mut self, source: &mut RamSource) -> Progress {
        self.section(SectionKind::Part, |sink| source.iterate(sink))
    }

    pub(super) fn end(&mut self, source: &mut RamSource, stopped: &GuestStopped) {
        self.section(SectionKind::End, |sink| {
            SaveHandler::complete(source, stopped, sink).map(|()| Progress::Finished)
        });
    }

    pub(super) fn end_postcopy(&mut self, source: &mut RamSource) {
        self.section(SectionKind::End, |sink| {
            PostcopyHandler::complete(source, sink).map(|()| Progress::Finished)
        });
    }

    /// What it discards; how many ranges.
    pub(super) fn discard(&mut self, source: &mut RamSource) -> usize {
        let mut told: Vec<(Name, Vec<DiscardRange>)> = Vec::new();
        let mut tell = |block: &Name, ranges: &[DiscardRange]| {
            assert!(!ranges.is_empty());
            told.push((block.clone(), ranges.to_vec()));
            Ok(())
        };
        source.discard(&mut tell).expect("it can");
        let mut count = 0;
        for (block, ranges) in told {
            count += ranges.len();
            let ranges_u16 = u16::try_from(ranges.len()).expect("few");
            let command = Command::PostcopyRamDiscard {
                block,
                ranges: ranges_u16,
            };
            let mut records = vec![Record::Command(command)];
            records.extend(ranges.into_iter().map(Record::DiscardRange));
            self.take(&records);
        }
        // From now on blocks are named again.
        self.destination.is_postcopy = true;
        self.break_off();
        count
    }

    /// A new connection.
    pub(super) fn break_off(&mut self) {
        self.decoder = self.decoder.resumed();
    }

    /// A section of which only the first bytes arrive.
    pub(super) fn part_cut(&mut self, source: &mut RamSource, arrive: impl FnOnce(usize) -> usize) {
        let mut bytes = Vec::new();
        self.encoder.record(&header(SectionKind::Part), &mut bytes);
        source.iterate(&mut bytes).expect("it goes on");
        let arrive = arrive(bytes.len());
        self.decode(&bytes[..arrive]);
        self.break_off();
    }

    fn section(
        &mut self,
        kind: SectionKind,
        body: impl FnOnce(&mut dyn Sink) -> Result<Progress, HandlerError>,
    ) -> Progress {
        let mut bytes = Vec::new();
        self.encoder.record(&header(kind), &mut bytes);
        let progress = body(&mut bytes).expect("it goes on");
        let id = SectionId(2);
        self.encoder.record(&Record::SectionEnd { id }, &mut bytes);
        assert_eq!(self.decode(&bytes), bytes.len(), "whole records");
        progress
    }

    fn take(&mut self, records: &[Record]) {
        let mut bytes = Vec::new();
        for record in records {
            self.encoder.record(record, &mut bytes);
        }
        assert_eq!(self.decode(&bytes), bytes.len());
    }

    /// How much of it was whole.
    fn decode(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        let mut before = None;
        let mut discarded = None;
        while at < bytes.len() {
            match self.decoder.step(&bytes[at..]).expect("a right stream") {
                Step::Record { record, used } => {
                    at += used;
                    match &record {
                        Record::Command(Command::PostcopyRamDiscard { block, .. }) => {
                            discarded = Some(block.clone());
                        }
                        Record::DiscardRange(range) => {
                            let block = discarded.clone().expect("a block");
                            self.destination.discard(&block, *range);
                        }
                        _ => {}
                    }
                    if record.payload_bytes() == 0 {
                        self.destination.record(&record, &[]);
                    }
                    before = Some(record);
                }
                Step::Payload(length) => {
                    let end = at + length as usize;
                    let Some(payload) = bytes.get(at..end) else {
                        return at;
                    };
                    self.destination
                        .record(before.as_ref().expect("one"), payload);
                    at = end;
                }
                Step::NeedMore(_) | Step::End => return at,
            }
        }
        at
    }
}

fn header(kind: SectionKind) -> Record {
    Record::Section(Section {
        kind,
        id: SectionId(2),
        name: Name::new("ram").expect("short"),
        instance: InstanceId(0),
        version: 4,
    })
}

impl Destination {
    fn record(&mut self, record: &Record, payload: &[u8]) {
        let Record::Ram(record) = record else {
            return;
        };
        match record {
            RamRecord::BlockList { .. } => self.listed.push(record.clone()),
            RamRecord::Block {
                name, used_bytes, ..
            } => {
                self.listed.push(record.clone());
                self.blocks
                    .insert(name.clone(), vec![0; *used_bytes as usize]);
            }
            RamRecord::Zero { page, fill } => {
                assert_eq!(*fill, 0);
                self.page(page, Kind::Zero, 0).fill(0);
            }
            RamRecord::Page { page, .. } => {
                let target = self.page(page, Kind::Page, payload.len());
                target.copy_from_slice(payload);
            }
            RamRecord::Xbzrle { page, .. } => {
                let target = self.page(page, Kind::Changes, payload.len());
                xbzrle::apply(target, payload).expect("a right encoding");
            }
            RamRecord::EndOfSection => {}
            other => panic!("{other:?}"),
        }
    }

    fn page(&mut self, page: &RamPage, kind: Kind, bytes: usize) -> &mut [u8] {
        let number = page.offset_bytes / PAGE_BYTES;
        let at = (page.block.clone(), number);
        self.records.push((page.block.clone(), number, kind, bytes));
        if self.is_postcopy {
            assert!(self.missing.remove(&at), "{at:?} is there already");
            assert_ne!(kind, Kind::Changes);
        } else if kind == Kind::Changes {
            assert!(self.received.contains(&at), "{at:?} was not sent before");
        }
        self.received.insert(at);
        let block = self.blocks.get_mut(&page.block).expect("it was listed");
        &mut block[page.offset_bytes as usize..][..4096]
    }

    fn discard(&mut self, block: &Name, range: DiscardRange) {
        let start = range.start_bytes / PAGE_BYTES;
        let content = self.blocks.get_mut(block).expect("it was listed");
        // What a destination that takes it for there would read.
        content[range.start_bytes as usize..][..range.length_bytes as usize].fill(0xdc);
        for page in start..start + range.length_bytes / PAGE_BYTES {
            self.received.remove(&(block.clone(), page));
            assert!(
                self.missing.insert((block.clone(), page)),
                "discarded twice"
            );
        }
    }

    /// What it has of a block, as RECV_BITMAP says it.
    pub(super) fn received(&self, block: &Name) -> Vec<u8> {
        let pages = self.blocks[block].len() as u64 / PAGE_BYTES;
        let bitmap = crate::PageBitmap::new(pages);
        for page in 0..pages {
            if !self.missing.contains(&(block.clone(), page)) {
                bitmap.set(page);
            }
        }
        bitmap.to_wire(pages)
    }

    /// Its memory is the same, all of it.
    pub(super) fn assert_equals(&self, ram: &AnonymousRam) {
        for block in ram.blocks() {
            let there = &self.blocks[block.idstr()];
            let here = content(block);
            let pages = here.chunks(4096).zip(there.chunks(4096));
            let wrong: Vec<usize> = pages
                .enumerate()
                .filter_map(|(page, (here, there))| (here != there).then_some(page))
                .collect();
            assert!(wrong.is_empty(), "{}: pages {wrong:?}", block.idstr());
        }
    }
}
