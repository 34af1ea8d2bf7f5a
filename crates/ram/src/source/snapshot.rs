//! A background snapshot: the guest runs, and its memory is sent as it was when it was begun.
//!
//! ```text
//!   all pages are write-protected
//!     sender        takes a page ── sends it ───────────────▶ lets it be written
//!     guest writes ─ waits ─ fault thread takes it ─ copies it ─▶ lets it be written
//!                                                    └──▶ sender sends the copy
//! ```
//!
//! Whoever takes a host page first saves it; the other one leaves it alone. A guest never waits for
//! the channel, unless it writes so much that there is no room for copies.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use vmferry_savevm::{HandlerError, Pending, Progress, Sink};

use super::memory::Memory;
use super::schedule::Run;
use super::{PART_BYTES_MAX, PART_PAGES_MAX, RamSource, RamSourceError};
use crate::bitmap::PageBitmap;
use crate::block::{BlockIndex, PAGE_BYTES, RamBlock};
use crate::guest::GuestRam;
use crate::userfault::{Fault, Userfault};

/// Pages that are taken, and read, at once: a guest that writes one of them waits so long.
const RUN_PAGES: u64 = 32;

/// Memory for copies that were not sent yet; one host page may lie above it.
pub(super) const COPIES_BYTES_MAX: usize = 64 << 20;

/// How long the sender waits for a copy before it gives the turn back.
const PATIENCE: Duration = Duration::from_millis(20);

/// A snapshot that is being taken. Dropped, it lets the guest write.
pub(super) struct Snapshot {
    saving: Arc<Saving>,
    thread: Option<JoinHandle<()>>,
    /// Written to, to end the thread.
    stop: OwnedFd,
    /// Pages that were sent.
    sent: u64,
}

/// What the sender and the fault thread share.
struct Saving {
    ram: Arc<dyn GuestRam>,
    userfault: Userfault,
    /// Host pages of each block that somebody saves, or has saved.
    taken: Vec<PageBitmap>,
    copies: Mutex<Copies>,
    /// There is a copy more or less.
    changed: Condvar,
}

#[derive(Default)]
struct Copies {
    pages: VecDeque<PageCopy>,
    bytes: usize,
    failure: Option<RamSourceError>,
    is_over: bool,
}

/// A host page as it was.
struct PageCopy {
    block: BlockIndex,
    first_page: u64,
    content: Box<[u8]>,
}

impl Snapshot {
    /// From now on memory is remembered as it is. No guest runs.
    pub(super) fn begin(
        ram: Arc<dyn GuestRam>,
        travels: impl Fn(&RamBlock) -> bool,
    ) -> Result<Self, RamSourceError> {
        let userfault = Userfault::open_write_protect()?;
        for block in ram.blocks().iter().filter(|block| travels(block)) {
            userfault.register(block)?;
            userfault.protect(block, 0, block.max_bytes())?;
        }
        let host_pages = |block: &RamBlock| PageBitmap::new(block.max_bytes() / block.page_bytes());
        let saving = Arc::new(Saving {
            taken: ram.blocks().iter().map(host_pages).collect(),
            ram,
            userfault,
            copies: Mutex::default(),
            changed: Condvar::new(),
        });
        let failed = |what| move |source| RamSourceError::Thread { what, source };
        let stop = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|errno| failed("make an eventfd")(errno.into()))?;
        let stop_thread = stop.try_clone().map_err(failed("duplicate a descriptor"))?;
        let thread = {
            let saving = Arc::clone(&saving);
            std::thread::Builder::new()
                .name("ram snapshot".into())
                .spawn(move || saving.save_what_is_written(&stop_thread))
                .map_err(failed("start a thread"))?
        };
        Ok(Self {
            saving,
            thread: Some(thread),
            stop,
            sent: 0,
        })
    }

    /// A copy of a page that was written; waits a little for one if there is none.
    fn next_copy(&self, patience: Duration) -> Result<Option<PageCopy>, RamSourceError> {
        let mut copies = self.saving.lock();
        if copies.pages.is_empty() && copies.failure.is_none() && !patience.is_zero() {
            let waited = self.saving.changed.wait_timeout(copies, patience);
            copies = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if let Some(failure) = copies.failure.take() {
            return Err(failure);
        }
        let copy = copies.pages.pop_front();
        copies.bytes -= copy.as_ref().map_or(0, |copy| copy.content.len());
        drop(copies);
        self.saving.changed.notify_all();
        Ok(copy)
    }

    #[cfg(test)]
    pub(super) fn copied_bytes(&self) -> usize {
        self.saving.lock().bytes
    }

    /// Those pages of a run, which are whole host pages, that nobody else saves.
    fn take(&self, run: &Run) -> Vec<Run> {
        let Some((block, taken)) = self.saving.block(run.block) else {
            return Vec::new();
        };
        let host_pages = block.page_bytes() / PAGE_BYTES;
        let mut runs: Vec<Run> = Vec::new();
        for first in run.pages.clone().step_by(to_usize(host_pages)) {
            if !taken.set(first / host_pages) {
                continue;
            }
            let end = (first + host_pages).min(run.pages.end);
            match runs.last_mut() {
                Some(last) if last.pages.end == first => last.pages.end = end,
                _ => runs.push(Run {
                    block: run.block,
                    pages: first..end,
                }),
            }
        }
        runs
    }

    /// These pages, which were taken, have been read.
    fn let_go(&self, run: &Run) -> Result<(), RamSourceError> {
        let Some((block, _)) = self.saving.block(run.block) else {
            return Ok(());
        };
        let Range { start, end } = run.pages;
        let (start, end) = (start * PAGE_BYTES, end * PAGE_BYTES);
        let bytes = end.next_multiple_of(block.page_bytes()) - start;
        self.saving.userfault.unprotect(block, start, bytes)?;
        Ok(())
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        self.saving.lock().is_over = true;
        self.saving.changed.notify_all();
        let told = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let (Ok(_), Some(thread)) = (told, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

impl Saving {
    fn lock(&self) -> MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn block(&self, index: BlockIndex) -> Option<(&RamBlock, &PageBitmap)> {
        self.ram.blocks().get(index.0).zip(self.taken.get(index.0))
    }

    /// The fault thread.
    fn save_what_is_written(&self, stop: &OwnedFd) {
        let mut faults = Vec::new();
        let mut save = || -> Result<bool, RamSourceError> {
            let goes_on = self.userfault.wait(stop.as_fd(), &mut faults)?;
            faults.iter().try_for_each(|fault| self.save(fault))?;
            Ok(goes_on)
        };
        let failure = loop {
            match save() {
                Ok(true) => {}
                Ok(false) => return,
                Err(failure) => break failure,
            }
        };
        self.lock().failure = Some(failure);
        self.changed.notify_all();
    }

    fn save(&self, fault: &Fault) -> Result<(), RamSourceError> {
        let Some((index, offset)) = fault.locate(&*self.ram) else {
            return Ok(());
        };
        let Some((block, taken)) = self.block(index) else {
            return Ok(());
        };
        let page_bytes = block.page_bytes();
        let number = offset / page_bytes;
        if !taken.set(number) {
            // The sender has it, and will let the writer go on.
            return Ok(());
        }
        let start = number * page_bytes;
        // What can be used later only is not sent.
        let in_use = block.used_bytes().saturating_sub(start).min(page_bytes);
        if in_use > 0 {
            let mut content = vec![0; to_usize(in_use)].into_boxed_slice();
            block.read(start, &mut content)?;
            self.keep(PageCopy {
                block: index,
                first_page: start / PAGE_BYTES,
                content,
            });
        }
        self.userfault.unprotect(block, start, page_bytes)?;
        Ok(())
    }

    /// Waits for room.
    fn keep(&self, copy: PageCopy) {
        let mut copies = self.lock();
        let has_no_room = |copies: &mut Copies| {
            let is_full = copies.bytes + copy.content.len() > COPIES_BYTES_MAX;
            is_full && !copies.pages.is_empty() && !copies.is_over
        };
        while has_no_room(&mut copies) {
            let waited = self.changed.wait(copies);
            copies = waited.unwrap_or_else(PoisonError::into_inner);
        }
        copies.bytes += copy.content.len();
        copies.pages.push_back(copy);
        drop(copies);
        self.changed.notify_all();
    }
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl RamSource {
    /// Write the body of a PART, or with `to_the_end` of an END: copies first, which others wait to
    /// make room for.
    pub(super) fn iterate_snapshot(
        &mut self,
        to_the_end: bool,
        sink: &mut dyn Sink,
    ) -> Result<Progress, HandlerError> {
        let bytes_max = PART_BYTES_MAX.min(sink.allowance().max(1));
        let (before, mut pages) = (self.writer.wire_bytes(), 0);
        let progress = loop {
            let sent = self.send_some(Duration::ZERO, sink)?;
            pages += sent;
            if self.snapshot_left() == 0 {
                break Progress::Finished;
            }
            let is_full = self.writer.wire_bytes() - before >= bytes_max || pages >= PART_PAGES_MAX;
            if is_full && !to_the_end {
                break Progress::Unfinished;
            }
            if sent == 0 && self.send_some(PATIENCE, sink)? == 0 {
                sink.check()?;
                if !to_the_end {
                    break Progress::Waiting;
                }
            }
        };
        self.end_of_section(sink)?;
        Ok(progress)
    }

    /// Pages that were not sent.
    pub(super) fn snapshot_left(&self) -> u64 {
        let sent = self.snapshot.as_ref().map_or(0, |snapshot| snapshot.sent);
        self.schedule.total() - sent
    }

    pub(super) fn snapshot_pending(&self) -> Pending {
        match self.snapshot_left() {
            0 => Pending::Dirty {
                bytes: 0,
                later_bytes: 0,
                read_time: Duration::ZERO,
            },
            pages => Pending::Bulk {
                bytes: pages * PAGE_BYTES,
            },
        }
    }

    /// A copy, or the next pages; how many.
    fn send_some(&mut self, patience: Duration, sink: &mut dyn Sink) -> Result<u64, HandlerError> {
        let Some(snapshot) = &mut self.snapshot else {
            return Ok(0);
        };
        let before = snapshot.sent;
        let Memory::Live(live) = &self.memory else {
            return Ok(0);
        };
        let (stats, blocks) = (&self.shared.stats, live.ram.blocks());
        if let Some(copy) = snapshot.next_copy(patience)? {
            let pages = copy.content.len() as u64 / PAGE_BYTES;
            let run = Run {
                block: copy.block,
                pages: copy.first_page..copy.first_page + pages,
            };
            if let Some(block) = blocks.get(run.block.0) {
                self.writer.copy(block, &run, &copy.content, stats, sink)?;
            }
            snapshot.sent += pages;
        } else if let Some(run) = self.schedule.next(RUN_PAGES) {
            // Nobody shall wait for the channel while his page is taken.
            self.writer.reserve(run.pages.end - run.pages.start, sink)?;
            for run in snapshot.take(&run) {
                if let Some(block) = blocks.get(run.block.0) {
                    let mode = super::writer::Mode::Whole;
                    self.writer.run(block, &run, mode, stats, sink)?;
                }
                snapshot.let_go(&run)?;
                snapshot.sent += run.pages.end - run.pages.start;
            }
            // All of them may have been taken: that is something done, too.
            return Ok((snapshot.sent - before).max(1));
        }
        Ok(snapshot.sent - before)
    }
}
