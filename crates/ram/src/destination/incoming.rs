//! What the engine does with guest memory that comes in, beside feeding it records.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use vmferry_stream::{DiscardRange, Name, PageSizes};

use super::RamDestinationOptions;
use super::error::{MissingPages, RamDestinationError};
use super::faults::{Faults, Kernel};
use super::memory::Memory;
use super::requests::Requests;
use super::stats::RamDestinationStats;
use crate::block::{PAGE_BYTES, Sharing};
use crate::userfault::{Userfault, UserfaultError};

/// How far the postcopy is, as far as memory is concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// There was no word of one.
    #[default]
    Precopy,
    /// One may follow: memory was emptied.
    Advised,
    /// Pages are missing, and are placed as they come.
    Listening,
    /// Everything is there, or was given up.
    Over,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Precopy => "before POSTCOPY_ADVISE",
            Self::Advised => "before POSTCOPY_LISTEN",
            Self::Listening => "after POSTCOPY_LISTEN",
            Self::Over => "after the end",
        }
    }
}

/// What the handler and all handles have.
pub(super) struct Shared {
    pub(super) memory: Arc<Memory>,
    pub(super) options: RamDestinationOptions,
    pub(super) stats: Arc<RamDestinationStats>,
    pub(super) requests: Arc<Requests>,
    /// Held during each change of the phase.
    phase: Mutex<Phase>,
    faults: OnceLock<Faults>,
    /// How often the connection broke.
    breaks: AtomicU64,
}

impl Shared {
    pub(super) fn new(memory: Memory, options: RamDestinationOptions) -> Self {
        let stats = Arc::default();
        Self {
            memory: Arc::new(memory),
            options,
            requests: Arc::new(Requests::new(Arc::clone(&stats))),
            stats,
            phase: Mutex::default(),
            faults: OnceLock::new(),
            breaks: AtomicU64::new(0),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        *self.lock()
    }

    /// Set once POSTCOPY_LISTEN has come.
    pub(super) fn faults(&self) -> Option<&Faults> {
        self.faults.get()
    }

    pub(super) fn breaks(&self) -> u64 {
        self.breaks.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A precopy after all, or nothing at all: let memory be as it was.
    pub(super) fn cleanup(&self) {
        let mut phase = self.lock();
        if *phase == Phase::Advised {
            *phase = Phase::Over;
            self.allow_huge_pages();
        }
    }

    fn allow_huge_pages(&self) {
        for (_, block) in self.memory.travelling() {
            block.allow_huge_pages();
        }
    }
}

/// A handle on a [`RamDestination`](super::RamDestination), for the engine's threads.
///
/// The order of calls is that of the commands (`postcopy.md` §3 of the wire format notes), and each
/// is refused where its command would be:
///
/// ```text
///   advise ─▶ discard … ─▶ listen ─▶ next_request … ─▶ finish
///                                ▲       │ the connection broke
///                                └─ pause, received …
/// ```
///
/// After [`IncomingRam::listen`], whoever touches a page that has not come waits for it, without end
/// if need be: a vCPU, a device, a system call. If the migration cannot go on for good, the VMM holds
/// the guest's disks, tells its vCPUs to end, and calls [`IncomingRam::abandon`]. Dropping the handler
/// and all handles does that too.
#[derive(Clone)]
pub struct IncomingRam {
    pub(super) shared: Arc<Shared>,
}

/// A page to ask the source for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// The block.
    pub block: Name,
    /// Where in the block it begins, in bytes.
    pub start: u64,
    /// A host page of the block.
    pub bytes: u32,
}

impl IncomingRam {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// What memory here is made of, to be compared with POSTCOPY_ADVISE.
    #[must_use]
    pub fn page_sizes(&self) -> PageSizes {
        let sizes = self.shared.memory.travelling();
        PageSizes {
            all_bytes: sizes.fold(0, |all, (_, block)| all | block.page_bytes()),
            target_bytes: PAGE_BYTES,
        }
    }

    /// POSTCOPY_ADVISE came: memory is emptied, and it is made sure that a postcopy will be possible.
    ///
    /// # Errors
    /// Postcopy is not on, or comes too late; no permission for userfaultfd, or memory that cannot be
    /// handled so. Says what to do.
    pub fn advise(&self) -> Result<(), RamDestinationError> {
        self.advise_with(Userfault::open_missing)
    }

    pub(super) fn advise_with<K: Kernel>(
        &self,
        open: impl FnOnce() -> Result<K, UserfaultError>,
    ) -> Result<(), RamDestinationError> {
        let memory = &self.shared.memory;
        let mut phase = self.expect("POSTCOPY_ADVISE", Phase::Precopy)?;
        if !self.shared.options.postcopy {
            return Err(RamDestinationError::PostcopyOff);
        }
        if memory
            .travelling()
            .any(|(index, _)| memory.count(index) > 0)
        {
            return Err(RamDestinationError::LateAdvice);
        }
        let kernel = open()?;
        for (_, block) in memory.travelling() {
            kernel.register(block)?;
            kernel.unregister(block)?;
        }
        *phase = Phase::Advised;
        for (_, block) in memory.travelling() {
            block.forbid_huge_pages();
            // Shared memory when the list has said that it travels.
            if block.sharing() == Sharing::Private {
                let bytes = block.used_bytes().next_multiple_of(block.page_bytes());
                block.forget(0, bytes)?;
            }
        }
        Ok(())
    }

    /// POSTCOPY_RAM_DISCARD came: forget a range of a block.
    ///
    /// # Errors
    /// No such block, one that does not travel, no whole host pages, past the end; not between
    /// POSTCOPY_ADVISE and POSTCOPY_LISTEN.
    pub fn discard(&self, name: &Name, range: DiscardRange) -> Result<(), RamDestinationError> {
        let memory = &self.shared.memory;
        let _phase = self.expect("POSTCOPY_RAM_DISCARD", Phase::Advised)?;
        self.expect_list("POSTCOPY_RAM_DISCARD")?;
        let unknown = || RamDestinationError::UnknownBlock {
            block: name.clone(),
        };
        let index = memory.index(name).ok_or_else(unknown)?;
        let block = memory.block(index).ok_or_else(unknown)?;
        let (start, length) = (range.start_bytes, range.length_bytes);
        let wrong = |reason: &'static str| RamDestinationError::Discard {
            block: name.clone(),
            start,
            length,
            reason,
        };
        if memory.is_ignored(index) {
            return Err(wrong("the block is shared and does not travel"));
        }
        let page_bytes = block.page_bytes();
        if !start.is_multiple_of(page_bytes) || !length.is_multiple_of(page_bytes) {
            return Err(wrong("these are no whole host pages"));
        }
        let end = start.checked_add(length);
        if end.is_none_or(|end| end > block.used_bytes()) {
            return Err(wrong("it reaches past the block's end"));
        }
        if length > 0 {
            memory.unmark(index, start, length);
            block.forget(start, length)?;
        }
        Ok(())
    }

    /// POSTCOPY_LISTEN came: from now on pages are placed, and whoever touches a missing one waits.
    /// Records of pages must not be read while this is called.
    ///
    /// # Errors
    /// No list of blocks came; a host page of which only a part was received; userfaultfd failed. It
    /// is as before then, and the migration can only fail.
    pub fn listen(&self) -> Result<(), RamDestinationError> {
        self.listen_with(Faults::watch)
    }

    pub(super) fn listen_with(
        &self,
        watch: impl FnOnce(
            Arc<Memory>,
            Arc<Requests>,
            Arc<RamDestinationStats>,
        ) -> Result<Faults, UserfaultError>,
    ) -> Result<(), RamDestinationError> {
        let memory = &self.shared.memory;
        let mut phase = self.expect("POSTCOPY_LISTEN", Phase::Advised)?;
        self.expect_list("POSTCOPY_LISTEN")?;
        memory.check_host_pages()?;
        let faults = watch(
            Arc::clone(memory),
            Arc::clone(&self.shared.requests),
            Arc::clone(&self.shared.stats),
        )?;
        let _ = self.shared.faults.set(faults);
        *phase = Phase::Listening;
        Ok(())
    }

    /// The next page to ask for, first come first; waits until there is one or for the deadline.
    /// `None` at the deadline, and when there will be no more. No page is told twice, unless the
    /// connection broke.
    #[must_use]
    pub fn next_request(&self, deadline: Instant) -> Option<PageRequest> {
        let page = self.shared.requests.next(deadline)?;
        let block = self.shared.memory.block(page.block)?;
        Some(PageRequest {
            block: block.idstr().clone(),
            start: page.offset,
            // The command has 32 bits for it; larger pages do not exist.
            bytes: u32::try_from(block.page_bytes()).unwrap_or(u32::MAX),
        })
    }

    /// Which pages of a block are here, one bit for each guest page, as RECV_BITMAP answers; `None`
    /// if there is no such block.
    #[must_use]
    pub fn received(&self, name: &Name) -> Option<Vec<u8>> {
        self.shared.memory.to_wire(name)
    }

    /// The connection broke, and nobody reads records of it any more. Half a host page is forgotten,
    /// and all that was asked for and did not come will be asked for again, in its order.
    pub fn pause(&self) {
        self.shared.breaks.fetch_add(1, Ordering::AcqRel);
        self.shared.requests.ask_again();
    }

    /// Has every page come that will be in memory? Before POSTCOPY_LISTEN nobody knows.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.first_missing().is_none()
    }

    /// The stream is over. If pages are missing nothing changes: a QEMU reads them as zeroes, but here
    /// the connection counts as broken. If none is, memory is as any other memory from now on; so it
    /// is after a precopy.
    ///
    /// # Errors
    /// Pages are missing.
    pub fn finish(&self) -> Result<(), MissingPages> {
        let mut phase = self.shared.lock();
        if *phase == Phase::Listening
            && let Some(missing) = self.first_missing()
        {
            return Err(missing);
        }
        self.end(&mut phase);
        Ok(())
    }

    /// The migration is given up, although pages are missing: whoever waits for one goes on, and
    /// finds zeroes. Only for a guest that will never run again, and whose disks take no more writes.
    pub fn abandon(&self) {
        self.end(&mut self.shared.lock());
    }

    /// Figures to watch.
    #[must_use]
    pub fn stats(&self) -> Arc<RamDestinationStats> {
        Arc::clone(&self.shared.stats)
    }

    fn end(&self, phase: &mut Phase) {
        if let (Phase::Listening, Some(faults)) = (*phase, self.shared.faults()) {
            faults.end();
        }
        if matches!(*phase, Phase::Listening | Phase::Advised) {
            self.shared.allow_huge_pages();
        }
        self.shared.requests.close();
        *phase = Phase::Over;
    }

    fn first_missing(&self) -> Option<MissingPages> {
        let memory = &self.shared.memory;
        memory.travelling().find_map(|(index, block)| {
            let pages = memory.missing(index);
            (pages > 0).then(|| MissingPages {
                block: block.idstr().clone(),
                pages,
            })
        })
    }

    fn expect(
        &self,
        what: &'static str,
        expected: Phase,
    ) -> Result<MutexGuard<'_, Phase>, RamDestinationError> {
        let phase = self.shared.lock();
        if *phase != expected {
            let when = phase.name();
            return Err(RamDestinationError::WrongPhase { what, when });
        }
        Ok(phase)
    }

    fn expect_list(&self, what: &'static str) -> Result<(), RamDestinationError> {
        match self.shared.memory.is_listed() {
            true => Ok(()),
            false => Err(RamDestinationError::NoList { what }),
        }
    }
}

impl fmt::Debug for IncomingRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IncomingRam")
            .field("phase", &self.shared.phase())
            .field("missing", &self.first_missing())
            .finish_non_exhaustive()
    }
}
