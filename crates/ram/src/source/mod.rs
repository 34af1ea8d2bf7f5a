//! The sending owner of the `ram` section.
//!
//! ```text
//!   guest ─ writes ─▶ DirtyLog ── collect ──▶ Schedule ── runs of pages ──▶ PageWriter ── batches ──▶ Sink
//!                                                ▲                             ▲
//!                     return path ─ OutgoingRam ─┘ requests, recovery          └ guest memory, XBZRLE
//! ```
//!
//! The dirty log runs before the first page is read, and a page's bit is cleared before the page is
//! read: whatever the guest writes after that is reported by a later look at the log.
//!
//! Rules: `ram.md` §1 to §4 and §6, `postcopy.md` §2, §4, §5 and §7 of the wire format notes.

mod memory;
mod outgoing;
mod postcopy;
mod schedule;
mod snapshot;
mod stats;
mod throttle;
mod watch;
mod writer;

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use vmferry_savevm::{
    GuestStopped, HandlerError, Pending, PostcopyHandler, Progress, SaveHandler, Sink,
};
use vmferry_stream::limits::MAX_RAM_BLOCKS;
use vmferry_stream::{Name, RamRecord};

pub use outgoing::{LEARNT_MAX, OutgoingRam, RecoverError, RequestError};
pub use stats::RamSourceStats;
pub use throttle::{Throttle, ThrottleParameters};

use crate::block::{BlockIndex, BlockLayout, OutOfBlock, PAGE_BYTES, RamBlock};
use crate::dirty_log::{DirtyLog, DirtyLogError};
use crate::guest::GuestRam;
use crate::stored::{StoredRam, StoredRange};
use crate::userfault::UserfaultError;
use crate::xbzrle_cache::XbzrleCache;
use memory::{Live, Memory, Stored};
use outgoing::Shared;
use schedule::{BlockPages, Run, Schedule};
use snapshot::Snapshot;
use throttle::AutoConverge;
use watch::Watch;
use writer::{Mode, PageWriter};

/// Pages that are taken, and read, at once.
const RUN_PAGES: u64 = 64;

/// A PART is ended after this many bytes, so that commands are heard.
const PART_BYTES_MAX: u64 = 4 << 20;

/// A PART is also ended after this many pages: zeroes are short, and what did not change is not sent
/// at all.
const PART_PAGES_MAX: u64 = 1 << 16;

/// Bytes of a working set that are sent before the guest runs, at most; the rest goes first behind that.
const HEAD_BYTES_MAX: u64 = 4 << 20;

/// Time for that: a cold disk may need long for it.
const HEAD_TIME_MAX: Duration = Duration::from_millis(10);

/// Passes that begin in one PART.
const PART_PASSES_MAX: u32 = 1;

/// How RAM is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamSourceOptions {
    /// The guest may be started at the destination before all of its memory is there (QEMU's
    /// capability `postcopy-ram`).
    pub postcopy: bool,
    /// From the second pass on send what changed in a page, as long as it is known what was sent: so
    /// many bytes of memory are used for that (`xbzrle`, `xbzrle-cache-size`).
    pub xbzrle_cache_bytes: Option<u64>,
    /// Blocks that others share stay where they are (`x-ignore-shared`).
    pub ignore_shared: bool,
    /// The guest runs on, and its memory is sent as it is when [`SaveHandler::setup`] is called, while
    /// no guest runs (`background-snapshot`). Nothing else of this makes sense together with it but
    /// `ignore_shared`.
    pub background_snapshot: bool,
    /// When to slow the guest down, if a [`Throttle`] was given (`auto-converge`).
    pub throttle: ThrottleParameters,
}

/// RAM cannot be sent.
#[derive(Debug, thiserror::Error)]
pub enum RamSourceError {
    /// What the guest writes cannot be known.
    #[error(transparent)]
    Log(#[from] DirtyLogError),
    /// Two blocks have one name.
    #[error("there are two RAM blocks '{0}'")]
    Duplicate(Name),
    /// More than a destination takes.
    #[error("there are {blocks} RAM blocks, of which {MAX_RAM_BLOCKS} can be sent")]
    TooManyBlocks {
        /// How many.
        blocks: usize,
    },
    /// More than 2^64 bytes.
    #[error("the RAM blocks are longer than a stream can say")]
    TooLong,
    /// Not even for one page.
    #[error("an XBZRLE cache of {bytes} bytes has no room for a page")]
    SmallCache {
        /// Its size.
        bytes: u64,
    },
    /// Only with what it is compatible with.
    #[error("a background snapshot cannot be combined with {0}")]
    SnapshotWith(&'static str),
    /// What the guest writes during a background snapshot cannot be known.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// The host refused what a background snapshot needs.
    #[error("background snapshot: cannot {what}: {source}")]
    Thread {
        /// What.
        what: &'static str,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// A block got another length while it was sent.
    #[error(
        "RAM block '{block}' was resized from {listed:#x} to {used_bytes:#x} bytes while it was sent"
    )]
    Resized {
        /// The block.
        block: Name,
        /// Bytes that the destination was told.
        listed: u64,
        /// Bytes in use now.
        used_bytes: u64,
    },
    /// Memory that is not in use.
    #[error(transparent)]
    Access(#[from] OutOfBlock),
}

/// Sends a guest's memory as the `ram` section.
pub struct RamSource {
    memory: Memory,
    options: RamSourceOptions,
    /// The blocks as the destination was told.
    listed: Vec<BlockLayout>,
    schedule: Schedule,
    writer: PageWriter,
    watch: Watch,
    /// What time it is; a test has a clock of its own.
    clock: Box<dyn Fn() -> Instant + Send>,
    shared: Arc<Shared>,
    /// The guest runs, or is about to run, at the destination.
    is_postcopy: bool,
    /// Bytes of a working set that go before the guest runs.
    head_bytes: u64,
    snapshot: Option<Snapshot>,
    /// The log failed where that could not be said.
    failure: Option<RamSourceError>,
}

impl RamSource {
    /// Send this memory. What `log` reports must be everything that changes it.
    ///
    /// # Errors
    /// Blocks that a stream cannot list; a cache without room for a page.
    pub fn new(
        ram: Arc<dyn GuestRam>,
        log: Box<dyn DirtyLog>,
        throttle: Option<Box<dyn Throttle>>,
        options: RamSourceOptions,
    ) -> Result<Self, RamSourceError> {
        let converge = AutoConverge::new(options.throttle);
        let throttles = throttle.is_some();
        let live = Live::new(ram, log, throttle, converge);
        Self::of(Memory::Live(live), throttles, options)
    }

    /// Send memory that nobody writes: each page once.
    ///
    /// # Errors
    /// Blocks that a stream cannot list; options that only make sense where a guest runs.
    pub fn stored(
        ram: Arc<dyn StoredRam>,
        options: RamSourceOptions,
    ) -> Result<Self, RamSourceError> {
        if options.background_snapshot {
            return Err(RamSourceError::SnapshotWith("memory that is stored"));
        }
        Self::of(Memory::Stored(Stored::new(ram)), false, options)
    }

    fn of(
        memory: Memory,
        throttles: bool,
        options: RamSourceOptions,
    ) -> Result<Self, RamSourceError> {
        let blocks = memory.layouts();
        check_blocks(&blocks)?;
        check_options(&options, throttles)?;
        let cache = new_cache(options.xbzrle_cache_bytes)?;
        let learns = matches!(memory, Memory::Stored(_));
        Ok(Self {
            shared: Arc::new(Shared::new(&blocks, options.ignore_shared, learns)),
            memory,
            options,
            listed: Vec::new(),
            schedule: Schedule::new(&[]),
            writer: PageWriter::new(cache),
            watch: Watch::new(Instant::now()),
            clock: Box::new(Instant::now),
            is_postcopy: false,
            head_bytes: 0,
            snapshot: None,
            failure: None,
        })
    }

    /// Be where a source is whose postcopy was interrupted: the guest runs at the destination, which
    /// will say what it has ([`OutgoingRam::received`]). For memory that is stored: nobody has written
    /// to it since.
    ///
    /// # Errors
    /// Blocks that a stream cannot list.
    pub fn take_up(&mut self) -> Result<(), RamSourceError> {
        self.reset()?;
        self.enter_postcopy();
        self.shared.begin_postcopy();
        Ok(())
    }

    /// What other threads may do meanwhile.
    #[must_use]
    pub fn outgoing(&self) -> OutgoingRam {
        OutgoingRam(Arc::clone(&self.shared))
    }

    #[cfg(test)]
    pub(crate) fn set_clock(&mut self, clock: impl Fn() -> Instant + Send + 'static) {
        self.clock = Box::new(clock);
    }

    /// Nothing is left of a migration before.
    fn reset(&mut self) -> Result<(), RamSourceError> {
        self.cleanup();
        self.listed = self.memory.layouts();
        check_blocks(&self.listed)?;
        let pages = |block: &BlockLayout| BlockPages {
            pages: block.used_bytes / PAGE_BYTES,
            host_pages: block.page_bytes / PAGE_BYTES,
            travels: self.shared.travels(block.sharing),
        };
        let pages: Vec<BlockPages> = self.listed.iter().map(pages).collect();
        self.schedule = Schedule::new(&pages);
        self.writer = PageWriter::new(new_cache(self.options.xbzrle_cache_bytes)?);
        if let Some(live) = self.memory.live() {
            live.converge = AutoConverge::new(self.options.throttle);
        }
        self.watch = Watch::new((self.clock)());
        self.is_postcopy = false;
        self.head_bytes = 0;
        if let Memory::Stored(stored) = &self.memory
            && self.options.postcopy
        {
            let working_set = stored.ram.working_set();
            let bytes = working_set.iter().map(StoredRange::bytes);
            self.head_bytes = bytes.fold(0, u64::saturating_add).min(HEAD_BYTES_MAX);
            self.schedule.prefer(working_set);
        }
        self.failure = None;
        let names = self.listed.iter().map(|block| block.idstr.clone());
        self.shared.begin(names.zip(pages));
        let stats = &self.shared.stats;
        let total_bytes = self.schedule.total() * PAGE_BYTES;
        stats.total_bytes.store(total_bytes, Relaxed);
        Ok(())
    }

    /// Know from now on what is written.
    fn begin(&mut self) -> Result<(), RamSourceError> {
        let Memory::Live(live) = &mut self.memory else {
            return Ok(());
        };
        if !self.options.background_snapshot {
            return Ok(live.start_log()?);
        }
        let travels = |block: &RamBlock| self.shared.travels(block.sharing());
        self.snapshot = Some(Snapshot::begin(Arc::clone(&live.ram), travels)?);
        self.schedule.send_once();
        Ok(())
    }

    fn list_blocks(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        let total_bytes = self.listed.iter().map(|block| block.used_bytes).sum();
        self.writer
            .record(RamRecord::BlockList { total_bytes }, sink)?;
        for block in &self.listed {
            let is_told = self.options.postcopy && block.page_bytes != PAGE_BYTES;
            let address = block.guest_address.unwrap_or(0);
            let record = RamRecord::Block {
                name: block.idstr.clone(),
                used_bytes: block.used_bytes,
                page_bytes: is_told.then_some(block.page_bytes),
                guest_address: self.options.ignore_shared.then_some(address),
                mapped: None,
            };
            self.writer.record(record, sink)?;
        }
        Ok(())
    }

    fn send(&mut self, run: &Run, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        // Before the second pass nothing is known to be sent; after the switch QEMU takes no changes.
        let mode = match self.schedule.is_bulk() || self.is_postcopy {
            true => Mode::Whole,
            false => Mode::Changes(self.schedule.passes()),
        };
        self.watch.sent();
        let (writer, stats) = (&mut self.writer, &self.shared.stats);
        match &mut self.memory {
            Memory::Live(live) => match live.ram.blocks().get(run.block.0) {
                Some(block) => writer.run(block, run, mode, stats, sink),
                None => Ok(()),
            },
            Memory::Stored(stored) => match self.listed.get(run.block.0) {
                Some(block) => stored.send(block, run, self.options.postcopy, writer, stats, sink),
                None => Ok(()),
            },
        }
    }

    /// Ask the log what was written since it was asked last.
    fn collect(&mut self) -> Result<(), RamSourceError> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        self.check_lengths()?;
        let (begun, mut newly) = ((self.clock)(), 0);
        let schedule = &mut self.schedule;
        if let Some(live) = self.memory.live() {
            live.collect(&mut |block, pages| newly += schedule.mark(block, pages))?;
        }
        let took = (self.clock)().saturating_duration_since(begun);
        let period = self.watch.collected(begun, took, newly);
        let stats = &self.shared.stats;
        stats
            .dirty_pages_per_second
            .store(self.watch.pages_per_second(), Relaxed);
        stats.dirty_log_us.store(micros(took), Relaxed);
        self.slow_down(period, newly);
        Ok(())
    }

    /// The destination was told the lengths.
    fn check_lengths(&self) -> Result<(), RamSourceError> {
        for (index, listed) in self.listed.iter().enumerate() {
            let used_bytes = self.memory.used_bytes(BlockIndex(index));
            if used_bytes != listed.used_bytes {
                return Err(RamSourceError::Resized {
                    block: listed.idstr.clone(),
                    listed: listed.used_bytes,
                    used_bytes,
                });
            }
        }
        Ok(())
    }

    fn slow_down(&mut self, period: Duration, newly: u64) {
        let Some(live) = self.memory.live() else {
            return;
        };
        let Some(throttle) = &mut live.throttle else {
            return;
        };
        let sent = self.watch.wire_bytes_since(self.writer.wire_bytes());
        if self.schedule.is_bulk() {
            return;
        }
        if let Some(percent) = live.converge.observe(period, newly * PAGE_BYTES, sent) {
            tracing::info!(
                percent,
                "the guest writes its memory too fast: it is slowed down"
            );
            throttle.set(percent);
            self.shared.stats.throttle_percent.store(percent, Relaxed);
        }
    }

    /// Begin the next pass; false if nothing was written.
    fn begin_pass(&mut self) -> Result<bool, RamSourceError> {
        self.collect()?;
        Ok(self.schedule.begin_pass())
    }

    fn end_of_section(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.writer.record(RamRecord::EndOfSection, sink)?;
        self.publish();
        self.writer.flush(sink)
    }

    fn publish(&self) {
        let stats = &self.shared.stats;
        stats.passes.store(self.schedule.passes(), Relaxed);
        let left = match self.options.background_snapshot {
            true => self.snapshot_left(),
            false => self.schedule.left(),
        };
        stats.remaining_bytes.store(left * PAGE_BYTES, Relaxed);
    }

    /// Write the first pages of the working set: nobody has to wait for them then.
    fn iterate_head(&mut self, sink: &mut dyn Sink) -> Result<Progress, HandlerError> {
        let deadline = (self.clock)() + HEAD_TIME_MAX;
        while self.head_bytes > 0
            && (self.clock)() < deadline
            && let Some(run) = self.schedule.next_preferred(RUN_PAGES)
        {
            self.send(&run, sink)?;
            let bytes = (run.pages.end - run.pages.start) * PAGE_BYTES;
            self.head_bytes = self.head_bytes.saturating_sub(bytes);
        }
        self.head_bytes = 0;
        self.end_of_section(sink)?;
        Ok(Progress::Finished)
    }

    /// Write the body of a PART while everything is still here.
    fn iterate_precopy(&mut self, sink: &mut dyn Sink) -> Result<Progress, HandlerError> {
        // Under a rate limit no more than this time slice allows, so that commands are heard.
        let bytes_max = PART_BYTES_MAX.min(sink.allowance().max(1));
        let (before, mut pages, mut passes) = (self.writer.wire_bytes(), 0, 0);
        let progress = loop {
            let Some(run) = self.schedule.next(RUN_PAGES) else {
                // Not pass after pass of a few pages each: whoever asks what is left gets a turn.
                if passes == PART_PASSES_MAX {
                    break Progress::Unfinished;
                }
                passes += 1;
                match self.begin_pass()? {
                    true => continue,
                    false => break Progress::Finished,
                }
            };
            self.send(&run, sink)?;
            pages += run.pages.end - run.pages.start;
            if self.writer.wire_bytes() - before >= bytes_max || pages >= PART_PAGES_MAX {
                break Progress::Unfinished;
            }
        };
        self.end_of_section(sink)?;
        Ok(progress)
    }

    /// Look at the log again where somebody may act on what is known to be left.
    fn look_again(&mut self) {
        let estimate = self.estimate_bytes();
        let now = (self.clock)();
        if self.failure.is_none()
            && self
                .watch
                .is_due(now, estimate <= self.shared.exact_below())
            && let Err(failure) = self.collect()
        {
            self.failure = Some(failure);
        }
    }

    /// What is left, together with what was probably written since the log was asked.
    fn estimate_bytes(&self) -> u64 {
        let left = self.schedule.left();
        let more = self.watch.probably_dirtied((self.clock)());
        left.saturating_add(more).min(self.schedule.total()) * PAGE_BYTES
    }

    fn tell_pending(&mut self) -> Pending {
        let left_bytes = self.schedule.left() * PAGE_BYTES;
        if self.options.background_snapshot {
            return self.snapshot_pending();
        }
        if self.is_postcopy {
            return Pending::Dirty {
                bytes: 0,
                later_bytes: left_bytes,
                read_time: Duration::ZERO,
            };
        }
        if self.head_bytes > 0 {
            return Pending::Dirty {
                bytes: self.head_bytes,
                later_bytes: left_bytes.saturating_sub(self.head_bytes),
                read_time: Duration::ZERO,
            };
        }
        if !self.schedule.is_bulk() {
            self.look_again();
        }
        // A log that failed lets nothing complete; the next iteration says why.
        if self.schedule.is_bulk() || self.failure.is_some() {
            return Pending::Bulk { bytes: left_bytes };
        }
        let estimate = self.estimate_bytes();
        let (bytes, later_bytes) = match self.options.postcopy {
            true => (0, estimate),
            false => (estimate, 0),
        };
        Pending::Dirty {
            bytes,
            later_bytes,
            read_time: Duration::ZERO,
        }
    }
}

impl SaveHandler for RamSource {
    fn is_active(&self) -> bool {
        true
    }

    fn setup(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.reset()?;
        self.begin()?;
        self.list_blocks(sink)?;
        self.end_of_section(sink)
    }

    fn iterate(&mut self, sink: &mut dyn Sink) -> Result<Progress, HandlerError> {
        if self.options.background_snapshot {
            return self.iterate_snapshot(false, sink);
        }
        match self.is_postcopy {
            true => self.iterate_postcopy(sink),
            false if self.head_bytes > 0 => self.iterate_head(sink),
            false => self.iterate_precopy(sink),
        }
    }

    fn pending(&mut self) -> Pending {
        self.tell_pending()
    }

    fn complete(
        &mut self,
        _stopped: &GuestStopped,
        sink: &mut dyn Sink,
    ) -> Result<(), HandlerError> {
        if self.options.background_snapshot {
            return self.iterate_snapshot(true, sink).map(drop);
        }
        self.collect()?;
        while self.schedule.left() > 0 {
            match self.schedule.next(RUN_PAGES) {
                Some(run) => self.send(&run, sink)?,
                None => {
                    self.schedule.begin_pass();
                }
            }
        }
        self.end_of_section(sink)
    }

    fn postcopy(&mut self) -> Option<&mut dyn PostcopyHandler> {
        self.options.postcopy.then_some(self)
    }

    fn cleanup(&mut self) {
        self.snapshot = None;
        let percent = self.shared.stats.throttle_percent.swap(0, Relaxed);
        let Some(live) = self.memory.live() else {
            return;
        };
        live.stop_log();
        if let Some(throttle) = live.throttle.as_mut().filter(|_| percent > 0) {
            throttle.set(0);
        }
    }
}

impl Drop for RamSource {
    fn drop(&mut self) {
        self.cleanup();
    }
}

fn check_blocks(blocks: &[BlockLayout]) -> Result<(), RamSourceError> {
    if blocks.len() > MAX_RAM_BLOCKS as usize {
        let blocks = blocks.len();
        return Err(RamSourceError::TooManyBlocks { blocks });
    }
    let mut names = std::collections::HashSet::new();
    let mut total: u64 = 0;
    for block in blocks {
        if !names.insert(&block.idstr) {
            return Err(RamSourceError::Duplicate(block.idstr.clone()));
        }
        let sum = total.checked_add(block.max_bytes);
        total = sum.ok_or(RamSourceError::TooLong)?;
    }
    Ok(())
}

fn check_options(options: &RamSourceOptions, throttles: bool) -> Result<(), RamSourceError> {
    let others = [
        (options.postcopy, "postcopy"),
        (options.xbzrle_cache_bytes.is_some(), "XBZRLE"),
        (throttles, "slowing the guest down"),
    ];
    let other = others.into_iter().find(|(is_on, _)| *is_on);
    match other.filter(|_| options.background_snapshot) {
        Some((_, what)) => Err(RamSourceError::SnapshotWith(what)),
        None => Ok(()),
    }
}

fn new_cache(bytes: Option<u64>) -> Result<Option<XbzrleCache>, RamSourceError> {
    bytes
        .map(|bytes| XbzrleCache::new(bytes).ok_or(RamSourceError::SmallCache { bytes }))
        .transpose()
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
