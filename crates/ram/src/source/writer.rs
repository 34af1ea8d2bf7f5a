//! Pages to bytes: records and what follows them, put together in one buffer.

use std::sync::atomic::Ordering::Relaxed;

use vmferry_savevm::{HandlerError, Sink};
use vmferry_stream::limits::MAX_HEADER_BYTES;
use vmferry_stream::xbzrle::{self, Encoded};
use vmferry_stream::{Encoder, Name, RamPage, RamRecord, Record};

use super::schedule::Run;
use super::stats::RamSourceStats;
use crate::block::{OutOfBlock, PAGE_BYTES, RamBlock};
use crate::stored::StoredPages;
use crate::xbzrle_cache::{Page, XbzrleCache};

/// Records and pages are given to the channel in pieces of up to this many bytes.
pub(crate) const BATCH_BYTES: usize = 256 << 10;

/// The longest record with its page.
const RECORD_BYTES_MAX: usize = MAX_HEADER_BYTES + PAGE_LENGTH;
const PAGE_LENGTH: usize = size_of::<Page>();
const ZEROES: Page = [0; PAGE_LENGTH];

/// How the pages of a run are sent.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Mode {
    /// Whole.
    Whole,
    /// As what changed, where that is known; this is the pass.
    Changes(u64),
}

/// Writes records, together with their pages, in few pieces.
///
/// One for the whole stream: whether a record names its block depends on the one before, whatever
/// section that was in.
pub(crate) struct PageWriter {
    encoder: Encoder,
    batch: Box<[u8]>,
    filled: usize,
    header: Vec<u8>,
    cache: Option<XbzrleCache>,
    /// The page that is being encoded, which its guest may change meanwhile.
    page: Box<Page>,
    changes: Vec<u8>,
    wire_bytes: u64,
}

/// Figures of one run.
#[derive(Default)]
struct Tally {
    pages: u64,
    normal: u64,
    zero: u64,
    xbzrle: u64,
    xbzrle_bytes: u64,
    unchanged: u64,
    cache_misses: u64,
    overflows: u64,
}

impl PageWriter {
    pub(crate) fn new(cache: Option<XbzrleCache>) -> Self {
        Self {
            encoder: Encoder::new(true),
            batch: vec![0; BATCH_BYTES].into(),
            filled: 0,
            header: Vec::with_capacity(MAX_HEADER_BYTES),
            cache,
            page: Box::new(ZEROES),
            changes: Vec::with_capacity(2 * PAGE_LENGTH),
            wire_bytes: 0,
        }
    }

    /// Name the block again with the next page.
    pub(crate) fn forget_block(&mut self) {
        self.encoder.forget_ram_block();
    }

    /// Send no changes any more, and give their memory back.
    pub(crate) fn forget_pages(&mut self) {
        self.cache = None;
    }

    /// Forget what was not given to the channel: it broke.
    pub(crate) fn discard(&mut self) {
        self.filled = 0;
    }

    /// Bytes written so far.
    pub(crate) fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// Write a record without payload.
    pub(crate) fn record(
        &mut self,
        record: RamRecord,
        sink: &mut dyn Sink,
    ) -> Result<(), HandlerError> {
        self.make_room(sink)?;
        self.head(record);
        Ok(())
    }

    /// Write these pages, as they are now.
    pub(crate) fn run(
        &mut self,
        block: &RamBlock,
        run: &Run,
        mode: Mode,
        stats: &RamSourceStats,
        sink: &mut dyn Sink,
    ) -> Result<(), HandlerError> {
        let before = self.wire_bytes;
        let mut tally = Tally::default();
        for page in run.pages.clone() {
            self.make_room(sink)?;
            self.write(block, run, page, mode, &mut tally)?;
        }
        tally.pages = run.pages.end - run.pages.start;
        tally.publish(self.wire_bytes - before, stats);
        Ok(())
    }

    /// Write these pages as they were: `content`.
    pub(crate) fn copy(
        &mut self,
        block: &RamBlock,
        run: &Run,
        content: &[u8],
        stats: &RamSourceStats,
        sink: &mut dyn Sink,
    ) -> Result<(), HandlerError> {
        let before = self.wire_bytes;
        let mut tally = Tally::default();
        for (page, content) in run.pages.clone().zip(content.chunks_exact(PAGE_LENGTH)) {
            self.make_room(sink)?;
            let at = RamPage {
                block: block.idstr().clone(),
                offset_bytes: page * PAGE_BYTES,
            };
            if content == ZEROES {
                self.head(RamRecord::Zero { page: at, fill: 0 });
                tally.zero += 1;
            } else {
                self.whole_page(at, content);
                tally.normal += 1;
            }
            tally.pages += 1;
        }
        tally.publish(self.wire_bytes - before, stats);
        Ok(())
    }

    /// Write pages that are stored, from `first` on; absent ones are left out.
    pub(crate) fn stored(
        &mut self,
        block: &Name,
        first: u64,
        content: &[u8],
        kinds: StoredPages,
        stats: &RamSourceStats,
        sink: &mut dyn Sink,
    ) -> Result<(), HandlerError> {
        let before = self.wire_bytes;
        let mut tally = Tally::default();
        let pages = content.chunks_exact(PAGE_LENGTH);
        for (page, (number, content)) in (first..).zip((0..).zip(pages)) {
            tally.pages += 1;
            let is = |kind: u64| kind >> number & 1 != 0;
            if is(kinds.absent) {
                continue;
            }
            self.make_room(sink)?;
            let at = RamPage {
                block: block.clone(),
                offset_bytes: page * PAGE_BYTES,
            };
            if is(kinds.zero) {
                self.head(RamRecord::Zero { page: at, fill: 0 });
                tally.zero += 1;
            } else {
                self.whole_page(at, content);
                tally.normal += 1;
            }
        }
        tally.publish(self.wire_bytes - before, stats);
        Ok(())
    }

    /// Make room for so many pages, if there can be.
    pub(crate) fn reserve(&mut self, pages: u64, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        let records = usize::try_from(pages).unwrap_or(usize::MAX);
        let bytes = records.saturating_mul(RECORD_BYTES_MAX);
        match self.filled.saturating_add(bytes) > self.batch.len() {
            true => self.flush(sink),
            false => Ok(()),
        }
    }

    /// Give everything to the channel.
    pub(crate) fn flush(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        let filled = std::mem::take(&mut self.filled);
        match &self.batch[..filled] {
            [] => Ok(()),
            bytes => sink.put(&[bytes]),
        }
    }

    fn make_room(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        match self.filled + RECORD_BYTES_MAX > self.batch.len() {
            true => self.flush(sink),
            false => Ok(()),
        }
    }

    /// There is room for it.
    fn write(
        &mut self,
        block: &RamBlock,
        run: &Run,
        page: u64,
        mode: Mode,
        tally: &mut Tally,
    ) -> Result<(), OutOfBlock> {
        let offset_bytes = page * PAGE_BYTES;
        let at = RamPage {
            block: block.idstr().clone(),
            offset_bytes,
        };
        if block.is_filled(offset_bytes, PAGE_LENGTH, 0)? {
            self.head(RamRecord::Zero { page: at, fill: 0 });
            tally.zero += 1;
            if let (Mode::Changes(pass), Some(cache)) = (mode, &mut self.cache) {
                cache.remember(run.block, page, &ZEROES, pass);
            }
            return Ok(());
        }
        if let (Mode::Changes(pass), Some(_)) = (mode, &self.cache) {
            block.read(offset_bytes, &mut self.page[..])?;
            self.write_changes(at, run, page, pass, tally);
            return Ok(());
        }
        let bytes = PAGE_LENGTH as u32;
        self.head(RamRecord::Page { page: at, bytes });
        let room = &mut self.batch[self.filled..self.filled + PAGE_LENGTH];
        block.read(offset_bytes, room)?;
        self.filled += PAGE_LENGTH;
        self.wire_bytes += PAGE_BYTES;
        tally.normal += 1;
        Ok(())
    }

    /// Write what changed in `self.page` since it was sent, or the page. What the guest writes to it
    /// meanwhile is not in it, and so neither in the cache.
    fn write_changes(&mut self, at: RamPage, run: &Run, page: u64, pass: u64, tally: &mut Tally) {
        let Some(cache) = &mut self.cache else {
            return;
        };
        self.changes.clear();
        let encoded = cache
            .sent(run.block, page)
            .map(|sent| xbzrle::encode(sent, &self.page[..], &mut self.changes));
        cache.remember(run.block, page, &self.page, pass);
        match encoded {
            Some(Encoded::Unchanged) => tally.unchanged += 1,
            Some(Encoded::Changed) => {
                let bytes = u16::try_from(self.changes.len()).unwrap_or(u16::MAX);
                self.head(RamRecord::Xbzrle { page: at, bytes });
                let changes = std::mem::take(&mut self.changes);
                self.append(&changes);
                self.changes = changes;
                tally.xbzrle += 1;
                tally.xbzrle_bytes += u64::from(bytes);
            }
            Some(Encoded::TooLong) | None => {
                let bytes = PAGE_LENGTH as u32;
                self.head(RamRecord::Page { page: at, bytes });
                let room = &mut self.batch[self.filled..self.filled + PAGE_LENGTH];
                room.copy_from_slice(&self.page[..]);
                self.filled += PAGE_LENGTH;
                self.wire_bytes += PAGE_BYTES;
                tally.normal += 1;
                tally.overflows += u64::from(encoded.is_some());
                tally.cache_misses += u64::from(encoded.is_none());
            }
        }
    }

    /// There is room for it.
    fn whole_page(&mut self, page: RamPage, content: &[u8]) {
        let bytes = PAGE_LENGTH as u32;
        self.head(RamRecord::Page { page, bytes });
        self.append(content);
    }

    /// There is room for it: a record fits into [`MAX_HEADER_BYTES`].
    fn head(&mut self, record: RamRecord) {
        let mut header = std::mem::take(&mut self.header);
        header.clear();
        self.encoder.record(&Record::Ram(record), &mut header);
        self.append(&header);
        self.header = header;
    }

    fn append(&mut self, bytes: &[u8]) {
        let end = self.filled + bytes.len();
        self.batch[self.filled..end].copy_from_slice(bytes);
        self.filled = end;
        self.wire_bytes += bytes.len() as u64;
    }
}

impl Tally {
    fn publish(&self, wire_bytes: u64, stats: &RamSourceStats) {
        for (figure, more) in [
            (&stats.sent_pages, self.pages - self.unchanged),
            (&stats.wire_bytes, wire_bytes),
            (&stats.normal_pages, self.normal),
            (&stats.zero_pages, self.zero),
            (&stats.xbzrle_pages, self.xbzrle),
            (&stats.xbzrle_bytes, self.xbzrle_bytes),
            (&stats.xbzrle_unchanged_pages, self.unchanged),
            (&stats.xbzrle_cache_misses, self.cache_misses),
            (&stats.xbzrle_overflows, self.overflows),
        ] {
            if more > 0 {
                figure.fetch_add(more, Relaxed);
            }
        }
    }
}
