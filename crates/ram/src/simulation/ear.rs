//! Hears what the source puts on the link, and knows what that must be.

use std::collections::BTreeSet;

use vmferry_stream::{Command, Decoder, Options, RamPage, RamRecord, Record, Step, xbzrle};

use super::geometry::{Contents, Geometry, Page};
use super::source::Source;
use crate::PAGE_BYTES;

pub(super) struct Ear {
    decoder: Decoder,
    window: Vec<u8>,
    /// What payload of this length is for.
    awaited: Option<(u32, Option<(Page, Kind)>)>,
    /// What the records so far amount to.
    pub(super) shadow: Contents,
    /// Pages that came so far.
    pub(super) sent: BTreeSet<Page>,
    discarding: usize,
    discarded: BTreeSet<Page>,
    pub(super) is_postcopy: bool,
    /// In a postcopy, the pages that must still be sent on this connection.
    pub(super) expected: BTreeSet<Page>,
    /// A section has ended since somebody looked.
    pub(super) section_ended: bool,
    pub(super) pages: u64,
    pub(super) xbzrle_pages: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Page,
    Changes,
}

impl Ear {
    pub(super) fn new(geometry: &Geometry) -> Self {
        Self {
            decoder: Decoder::new(Options::default()),
            window: Vec::new(),
            awaited: None,
            shadow: Contents::zeroes(geometry),
            sent: BTreeSet::new(),
            discarding: 0,
            discarded: BTreeSet::new(),
            is_postcopy: false,
            expected: BTreeSet::new(),
            section_ended: false,
            pages: 0,
            xbzrle_pages: 0,
        }
    }

    /// A new connection, on which exactly these pages must come.
    pub(super) fn resume(&mut self, expected: BTreeSet<Page>) {
        self.decoder = self.decoder.resumed();
        self.window.clear();
        self.awaited = None;
        self.expected = expected;
    }

    /// True if a package was announced.
    pub(super) fn hear(&mut self, bytes: &[u8], source: &Source, geometry: &Geometry) -> bool {
        self.window.extend_from_slice(bytes);
        let mut is_package = false;
        loop {
            if let Some((bytes, page)) = self.awaited {
                if self.window.len() < bytes as usize {
                    return is_package;
                }
                let payload: Vec<u8> = self.window.drain(..bytes as usize).collect();
                self.awaited = None;
                if let Some((page, kind)) = page {
                    self.payload(page, kind, &payload, source);
                }
            }
            match self.decoder.step(&self.window).expect("our own stream") {
                Step::Record { record, used } => {
                    self.window.drain(..used);
                    is_package |= matches!(record, Record::Command(Command::Packaged { .. }));
                    self.record(record, source, geometry);
                }
                Step::NeedMore(_) | Step::End => return is_package,
                Step::Payload(bytes) => self.awaited = Some((bytes, None)),
            }
        }
    }

    fn record(&mut self, record: Record, source: &Source, geometry: &Geometry) {
        match record {
            Record::Ram(RamRecord::Zero { page, fill }) => {
                assert_eq!(fill, 0);
                let page = self.page(&page, geometry);
                self.came(page, &[0; PAGE_BYTES as usize], source);
            }
            Record::Ram(RamRecord::Page { page, bytes }) => {
                let page = self.page(&page, geometry);
                self.await_payload(bytes, page, Kind::Page);
            }
            Record::Ram(RamRecord::Xbzrle { page, bytes }) => {
                assert!(!self.is_postcopy, "changes in a postcopy");
                let page = self.page(&page, geometry);
                assert!(self.sent.contains(&page), "changes of what was never sent");
                self.xbzrle_pages += 1;
                self.await_payload(u32::from(bytes), page, Kind::Changes);
            }
            Record::Command(Command::PostcopyRamDiscard { block, .. }) => {
                self.discarding = geometry.index(&block);
            }
            Record::DiscardRange(range) => {
                let (start, length) = (range.start_bytes, range.length_bytes);
                for page in start / PAGE_BYTES..(start + length) / PAGE_BYTES {
                    let is_new = self.discarded.insert((self.discarding, page));
                    assert!(is_new, "discarded twice");
                }
            }
            Record::Command(Command::Packaged { .. }) => self.switched(source, geometry),
            Record::SectionEnd { .. } => self.section_ended = true,
            Record::Eof => self.ended(source, geometry),
            _ => {}
        }
    }

    fn await_payload(&mut self, bytes: u32, page: Page, kind: Kind) {
        // The announcement of the payload comes next, and says the same.
        let announced = self.decoder.step(&[]).expect("our own stream");
        assert!(matches!(announced, Step::Payload(announced) if announced == bytes));
        self.awaited = Some((bytes, Some((page, kind))));
    }

    fn page(&self, page: &RamPage, geometry: &Geometry) -> Page {
        let block = geometry.index(&page.block);
        assert!(
            geometry.shapes[block].travels,
            "a page of a block that stays"
        );
        (block, page.offset_bytes / PAGE_BYTES)
    }

    fn payload(&mut self, page: Page, kind: Kind, payload: &[u8], source: &Source) {
        match kind {
            Kind::Page => self.came(page, payload, source),
            Kind::Changes => {
                let mut content = self.shadow.page(page).to_vec();
                xbzrle::apply(&mut content, payload).expect("our own");
                self.came(page, &content, source);
            }
        }
    }

    fn came(&mut self, page: Page, content: &[u8], source: &Source) {
        self.pages += 1;
        self.shadow.page_mut(page).copy_from_slice(content);
        if self.is_postcopy {
            assert!(
                self.expected.remove(&page),
                "page {page:?} was sent twice, or is there already"
            );
            assert!(content == source.truth.page(page), "page {page:?} is wrong");
            return;
        }
        assert!(self.discarded.is_empty(), "a page after the discards");
        self.sent.insert(page);
    }

    /// What was discarded is exactly what was never sent or was dirtied since, in whole host pages.
    fn switched(&mut self, source: &Source, geometry: &Geometry) {
        assert!(!source.runs);
        let mut lacking = BTreeSet::new();
        for page in geometry.pages() {
            assert!(
                !source.logged[page],
                "the log was not asked after the guest had stopped"
            );
            if source.to_send[page] {
                lacking.extend(geometry.host_page_pages(page));
            } else {
                assert!(
                    self.shadow.page(page) == source.truth.page(page),
                    "page {page:?} was sent, is not dirty, and is wrong"
                );
            }
        }
        assert_eq!(self.discarded, lacking);
        self.expected = lacking;
        self.is_postcopy = true;
    }

    fn ended(&mut self, source: &Source, geometry: &Geometry) {
        assert!(!source.runs);
        if self.is_postcopy {
            assert!(self.expected.is_empty(), "EOF, without {:?}", self.expected);
            return;
        }
        for page in geometry.pages() {
            assert!(source.was_read[page], "page {page:?} was never sent");
            assert!(!source.logged[page] && !source.to_send[page]);
            assert!(
                self.shadow.page(page) == source.truth.page(page),
                "page {page:?} is wrong"
            );
        }
    }
}
