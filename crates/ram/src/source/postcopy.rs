//! What the source does when the guest runs at the destination.

use vmferry_savevm::{HandlerError, PostcopyHandler, Progress, Sink, TellDiscard};
use vmferry_stream::DiscardRange;

use super::RamSource;
use crate::block::{BlockIndex, BlockLayout, PAGE_BYTES};

/// Pages that are taken, and read, at once: a request waits for them.
const RUN_PAGES: u64 = 8;

/// A PART is ended after this many bytes, and after a request was served. As little as is taken at
/// once: whoever sends it asks in between how much more may be under way.
const PART_BYTES_MAX: u64 = RUN_PAGES * PAGE_BYTES;

/// And after so many pages, if they are zeroes.
const PART_PAGES_MAX: u64 = 4 * RUN_PAGES;

/// Ranges that are told at once.
const RANGES_MAX: usize = 1 << 10;

/// What a PART or END may carry.
#[derive(Clone, Copy)]
enum Until {
    /// So many bytes, or a request that was served.
    Part { bytes_max: u64 },
    /// Everything.
    End,
}

impl RamSource {
    pub(super) fn iterate_postcopy(
        &mut self,
        sink: &mut dyn Sink,
    ) -> Result<Progress, HandlerError> {
        let bytes_max = PART_BYTES_MAX.min(sink.allowance().max(1));
        self.send_missing(Until::Part { bytes_max }, sink)
    }

    /// Write the body of a section: requested pages first, then onwards from the last of them.
    fn send_missing(
        &mut self,
        until: Until,
        sink: &mut dyn Sink,
    ) -> Result<Progress, HandlerError> {
        self.take_up_again();
        let (before, mut pages) = (self.writer.wire_bytes(), 0);
        let progress = loop {
            let served = self.take_request();
            let Some(run) = self.schedule.next(RUN_PAGES) else {
                break Progress::Finished;
            };
            self.send(&run, sink)?;
            pages += run.pages.end - run.pages.start;
            let is_served = served && !self.schedule.is_serving() && !self.shared.has_request();
            match until {
                Until::Part { bytes_max }
                    if is_served
                        || self.writer.wire_bytes() - before >= bytes_max
                        || pages >= PART_PAGES_MAX =>
                {
                    break Progress::Unfinished;
                }
                // Somebody waits for it: it must not stay in the buffer.
                Until::End if is_served => self.writer.flush(sink)?,
                Until::Part { .. } | Until::End => {}
            }
        };
        self.end_of_section(sink)?;
        Ok(progress)
    }

    /// Is a request being served, this one or one that was begun?
    fn take_request(&mut self) -> bool {
        // Those of which everything was sent keep none waiting that comes after them.
        while !self.schedule.is_serving()
            && let Some(request) = self.shared.next_request()
        {
            self.schedule.serve(request);
        }
        self.schedule.is_serving()
    }

    /// The connection is a new one.
    fn take_up_again(&mut self) {
        if let Some(to_send) = self.shared.take_resumed() {
            self.schedule.resume(to_send);
            self.writer.discard();
            self.writer.forget_block();
        }
    }
}

impl PostcopyHandler for RamSource {
    fn discard(&mut self, tell: &mut TellDiscard<'_>) -> Result<(), HandlerError> {
        self.collect()?;
        self.enter_postcopy();
        let mut told = false;
        for (index, block) in self.listed.iter().enumerate() {
            let mut runs = self.schedule.left_of(BlockIndex(index)).peekable();
            while runs.peek().is_some() {
                let ranges: Vec<DiscardRange> = runs.by_ref().take(RANGES_MAX).map(range).collect();
                tell(&block.idstr, &ranges)?;
                told = true;
            }
        }
        if !told && let Some(block) = self.block_to_name() {
            // Without any, no real destination would start its guest.
            tell(&block.idstr, &[range(0..0)])?;
        }
        self.shared.begin_postcopy();
        self.publish();
        Ok(())
    }

    fn complete(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.send_missing(Until::End, sink).map(|_| ())
    }
}

impl RamSource {
    /// From here on each page leaves once, and whole.
    pub(super) fn enter_postcopy(&mut self) {
        self.schedule.send_once();
        self.is_postcopy = true;
        self.head_bytes = 0;
        self.writer.forget_pages();
        self.writer.forget_block();
    }

    /// A block that the destination has of us, if there is one.
    fn block_to_name(&self) -> Option<&BlockLayout> {
        let travels = |block: &&BlockLayout| self.shared.travels(block.sharing);
        self.listed.iter().find(travels).or(self.listed.first())
    }
}

fn range(pages: std::ops::Range<u64>) -> DiscardRange {
    DiscardRange {
        start_bytes: pages.start * PAGE_BYTES,
        length_bytes: (pages.end - pages.start) * PAGE_BYTES,
    }
}
