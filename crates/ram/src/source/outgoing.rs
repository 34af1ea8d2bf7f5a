//! What other threads may do while RAM is sent: requests, recovery, figures.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmferry_stream::{Name, PageSizes};

use super::schedule::{BlockPages, Run};
use super::stats::RamSourceStats;
use crate::bitmap::PageBitmap;
use crate::block::{BlockIndex, BlockLayout, PAGE_BYTES};
use crate::stored::StoredRange;

/// Requests that wait to be served first; those beyond come with all other pages. A destination's guest
/// has fewer threads that could wait for a page.
pub(crate) const REQUESTS_MAX: usize = 1 << 16;

/// Requests whose order is kept: as many as an image keeps, 1.5 MiB.
pub const LEARNT_MAX: usize = 1 << 16;

/// What is left is told exactly below this, unless somebody sets another limit.
const EXACT_BELOW_BYTES: u64 = 64 << 20;

/// RAM that is being sent, seen from other threads.
#[derive(Clone)]
pub struct OutgoingRam(pub(crate) Arc<Shared>);

impl fmt::Debug for OutgoingRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutgoingRam").finish_non_exhaustive()
    }
}

/// A page request that no destination should send.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No guest runs at the destination.
    #[error("pages were requested, but there is no postcopy")]
    NoPostcopy,
    /// The first request must name its block.
    #[error("the first request for pages names no RAM block")]
    NoBlock,
    /// No such block.
    #[error("pages of RAM block '{0}' were requested, which there is not")]
    UnknownBlock(Name),
    /// Not whole pages of this host, or none.
    #[error(
        "RAM block '{block}': {bytes:#x} bytes at {start:#x} were requested, \
         which are no whole pages of {page_bytes:#x} bytes"
    )]
    NotPages {
        /// The block.
        block: Name,
        /// First byte.
        start: u64,
        /// How many.
        bytes: u64,
        /// Size of the host's pages.
        page_bytes: u64,
    },
    /// Past the end.
    #[error(
        "RAM block '{block}' has {used_bytes:#x} bytes; {bytes:#x} at {start:#x} were requested"
    )]
    PastEnd {
        /// The block.
        block: Name,
        /// First byte.
        start: u64,
        /// How many.
        bytes: u64,
        /// Bytes in use.
        used_bytes: u64,
    },
}

/// A postcopy cannot be taken up again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecoverError {
    /// There was none.
    #[error("there is no postcopy to recover")]
    NoPostcopy,
    /// No such block was asked about.
    #[error("the destination tells what it has of RAM block '{0}', which it was not asked about")]
    UnknownBlock(Name),
    /// One bit for each page, filled up to eight bytes.
    #[error("RAM block '{block}': the bitmap of received pages has {bytes} bytes, not {expected}")]
    WrongSize {
        /// The block.
        block: Name,
        /// Bytes that came.
        bytes: u64,
        /// Bytes that a block of that length needs.
        expected: u64,
    },
    /// The destination must tell of every block.
    #[error("RAM block '{0}': the destination did not tell what it has of it")]
    Missing(Name),
}

/// What the sending thread and others share.
pub(crate) struct Shared {
    ignore_shared: bool,
    /// Page sizes of all blocks that travel, ORed.
    all_page_bytes: u64,
    /// The order of requests is kept.
    learns: bool,
    state: Mutex<State>,
    requested: Condvar,
    pub(crate) stats: Arc<RamSourceStats>,
    exact_below: AtomicU64,
}

#[derive(Default)]
struct State {
    blocks: Vec<Listed>,
    by_name: HashMap<Name, BlockIndex>,
    is_postcopy: bool,
    /// In the order in which they came.
    requests: VecDeque<Run>,
    /// What a request without a name is about.
    last_block: Option<BlockIndex>,
    /// The connection is not the first: a QEMU may not have noticed before its first request, which
    /// names no block then. Its page comes with all others.
    is_resumed: bool,
    /// What was requested, if that is to be kept.
    learnt: Vec<StoredRange>,
    /// Pages that the destination has not, once all blocks are known.
    to_send: Option<Vec<PageBitmap>>,
}

struct Listed {
    name: Name,
    layout: BlockPages,
    /// Host pages that were requested.
    requested: PageBitmap,
    /// Pages that the destination has not, if it told.
    missing: Option<PageBitmap>,
}

impl OutgoingRam {
    /// For POSTCOPY_ADVISE.
    #[must_use]
    pub fn page_sizes(&self) -> PageSizes {
        PageSizes {
            all_bytes: self.0.all_page_bytes,
            target_bytes: PAGE_BYTES,
        }
    }

    /// The destination asks for pages: they go first, those of them that were not sent. Without
    /// `block`, that of the request before.
    ///
    /// # Errors
    /// What only a broken or hostile destination asks for; nothing changes.
    pub fn request(
        &self,
        block: Option<&Name>,
        start: u64,
        bytes: u64,
    ) -> Result<(), RequestError> {
        let mut state = self.0.lock();
        let arrived = state.request(block, start, bytes, self.0.learns)?;
        self.0
            .stats
            .postcopy_requests
            .fetch_add(1, Ordering::Relaxed);
        drop(state);
        if arrived {
            self.0.requested.notify_all();
        }
        Ok(())
    }

    /// Which pages were requested so far, in that order, for memory that is stored; the first
    /// [`LEARNT_MAX`] requests.
    #[must_use]
    pub fn requested(&self) -> Vec<StoredRange> {
        self.0.lock().learnt.clone()
    }

    /// Sleep until a request is there or `deadline`; true if one is there.
    #[must_use]
    pub fn wait_for_request(&self, deadline: Instant) -> bool {
        let mut state = self.0.lock();
        while state.requests.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.0.requested.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// The blocks whose pages are sent, in the order of the list: recovery asks about each.
    #[must_use]
    pub fn blocks(&self) -> Vec<Name> {
        let state = self.0.lock();
        let listed = state.blocks.iter().filter(|block| block.layout.travels);
        listed.map(|block| block.name.clone()).collect()
    }

    /// Bytes of the bitmap that RECV_BITMAP is answered with; `None` if there is no such block that is
    /// sent.
    #[must_use]
    pub fn bitmap_bytes(&self, block: &Name) -> Option<u64> {
        let state = self.0.lock();
        let index = state.by_name.get(block)?.0;
        let layout = &state.blocks.get(index)?.layout;
        layout.travels.then(|| layout.pages.div_ceil(64) * 8)
    }

    /// Recovery: the destination has these pages of a block, as it says in RECV_BITMAP (`postcopy.md`
    /// §7). Exactly the others will be sent.
    ///
    /// # Errors
    /// There is no postcopy, no such block, or not that many pages.
    pub fn received(&self, block: &Name, bitmap: &[u8]) -> Result<(), RecoverError> {
        let mut state = self.0.lock();
        if !state.is_postcopy {
            return Err(RecoverError::NoPostcopy);
        }
        let index = state.by_name.get(block).map(|index| index.0);
        let listed = index.and_then(|index| state.blocks.get_mut(index));
        let listed = listed
            .filter(|listed| listed.layout.travels)
            .ok_or_else(|| RecoverError::UnknownBlock(block.clone()))?;
        let pages = listed.layout.pages;
        let (bytes, expected) = (bitmap.len() as u64, pages.div_ceil(64) * 8);
        if bytes != expected {
            return Err(RecoverError::WrongSize {
                block: block.clone(),
                bytes,
                expected,
            });
        }
        listed.missing = Some(complement(bitmap, pages));
        Ok(())
    }

    /// Recovery: a new connection, on which only pages go that the destination has not. It names
    /// blocks again, and what was requested before must be requested again.
    ///
    /// # Errors
    /// There is no postcopy, or the destination did not tell what it has of a block.
    pub fn resume(&self) -> Result<(), RecoverError> {
        let mut state = self.0.lock();
        if !state.is_postcopy {
            return Err(RecoverError::NoPostcopy);
        }
        let untold = |block: &&Listed| block.layout.travels && block.missing.is_none();
        if let Some(block) = state.blocks.iter().find(untold) {
            return Err(RecoverError::Missing(block.name.clone()));
        }
        let take = |block: &mut Listed| {
            block.requested.clear_range(0..u64::MAX);
            let nothing = || PageBitmap::new(block.layout.pages);
            block.missing.take().unwrap_or_else(nothing)
        };
        let to_send = state.blocks.iter_mut().map(take).collect();
        state.to_send = Some(to_send);
        state.requests.clear();
        state.last_block = None;
        state.is_resumed = true;
        Ok(())
    }

    /// Fewer bytes than this may be left when the guest is stopped: what [`pending`] says is exact
    /// below it, and a little old above. The downtime limit times the bandwidth, for instance.
    ///
    /// [`pending`]: vmferry_savevm::SaveHandler::pending
    pub fn set_exact_below(&self, bytes: u64) {
        self.0.exact_below.store(bytes, Ordering::Relaxed);
    }

    /// Figures to watch.
    #[must_use]
    pub fn stats(&self) -> Arc<RamSourceStats> {
        Arc::clone(&self.0.stats)
    }
}

impl Shared {
    pub(crate) fn new(blocks: &[BlockLayout], ignore_shared: bool, learns: bool) -> Self {
        let travels = |block: &&BlockLayout| does_travel(ignore_shared, block.sharing);
        let sizes = blocks.iter().filter(travels).map(|block| block.page_bytes);
        Self {
            ignore_shared,
            all_page_bytes: sizes.fold(0, |all, size| all | size),
            learns,
            state: Mutex::default(),
            requested: Condvar::new(),
            stats: Arc::default(),
            exact_below: EXACT_BELOW_BYTES.into(),
        }
    }

    /// Are the pages of such a block sent?
    pub(crate) fn travels(&self, sharing: crate::Sharing) -> bool {
        does_travel(self.ignore_shared, sharing)
    }

    pub(crate) fn exact_below(&self) -> u64 {
        self.exact_below.load(Ordering::Relaxed)
    }

    /// A migration begins with these blocks.
    pub(crate) fn begin(&self, blocks: impl IntoIterator<Item = (Name, BlockPages)>) {
        let listed = |(name, layout): (Name, BlockPages)| Listed {
            name,
            layout,
            requested: PageBitmap::new(layout.pages.div_ceil(layout.host_pages)),
            missing: None,
        };
        let blocks: Vec<Listed> = blocks.into_iter().map(listed).collect();
        let names = blocks.iter().map(|block| block.name.clone());
        *self.lock() = State {
            by_name: names.zip((0..).map(BlockIndex)).collect(),
            blocks,
            ..State::default()
        };
    }

    /// From now on requests are taken.
    pub(crate) fn begin_postcopy(&self) {
        self.lock().is_postcopy = true;
    }

    pub(crate) fn next_request(&self) -> Option<Run> {
        self.lock().requests.pop_front()
    }

    pub(crate) fn has_request(&self) -> bool {
        !self.lock().requests.is_empty()
    }

    #[cfg(test)]
    pub(crate) fn queued_requests(&self) -> usize {
        self.lock().requests.len()
    }

    /// What must be sent on a new connection, once, if there is one.
    pub(crate) fn take_resumed(&self) -> Option<Vec<PageBitmap>> {
        self.lock().to_send.take()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// True if there is something new to serve.
    fn request(
        &mut self,
        block: Option<&Name>,
        start: u64,
        bytes: u64,
        learns: bool,
    ) -> Result<bool, RequestError> {
        if !self.is_postcopy {
            return Err(RequestError::NoPostcopy);
        }
        let index = match block {
            Some(name) => *self
                .by_name
                .get(name)
                .ok_or_else(|| RequestError::UnknownBlock(name.clone()))?,
            None if self.is_resumed && self.last_block.is_none() => return Ok(false),
            None => self.last_block.ok_or(RequestError::NoBlock)?,
        };
        let Some(listed) = self.blocks.get(index.0) else {
            return Err(RequestError::NoBlock);
        };
        let host_pages = listed.check_request(start, bytes)?;
        self.last_block = Some(index);
        // A page is requested once: a flood of requests does not fill the queue.
        let is_new = listed.requested.set_range(host_pages.clone()) > 0;
        let is_sent = is_new && listed.layout.travels;
        if learns && is_sent && self.learnt.len() < LEARNT_MAX {
            let size = listed.layout.host_pages;
            self.learnt.push(StoredRange {
                block: index,
                first_page: host_pages.start * size,
                pages: (host_pages.end - host_pages.start) * size,
            });
        }
        if !is_new || self.requests.len() >= REQUESTS_MAX {
            return Ok(false);
        }
        let BlockPages {
            pages,
            host_pages: size,
            ..
        } = listed.layout;
        self.requests.push_back(Run {
            block: index,
            pages: host_pages.start * size..(host_pages.end * size).min(pages),
        });
        Ok(true)
    }
}

impl Listed {
    /// The host pages that are meant.
    fn check_request(&self, start: u64, bytes: u64) -> Result<std::ops::Range<u64>, RequestError> {
        let page_bytes = self.layout.host_pages * PAGE_BYTES;
        let used_bytes = self.layout.pages * PAGE_BYTES;
        let past_end = || RequestError::PastEnd {
            block: self.name.clone(),
            start,
            bytes,
            used_bytes,
        };
        let end = start.checked_add(bytes).ok_or_else(past_end)?;
        // The last host page may lie in the block with a part only.
        let is_whole = end.is_multiple_of(page_bytes) || end == used_bytes;
        if bytes == 0 || !start.is_multiple_of(page_bytes) || !is_whole {
            return Err(RequestError::NotPages {
                block: self.name.clone(),
                start,
                bytes,
                page_bytes,
            });
        }
        if end > used_bytes.next_multiple_of(page_bytes) {
            return Err(past_end());
        }
        Ok(start / page_bytes..end.div_ceil(page_bytes))
    }
}

fn does_travel(ignore_shared: bool, sharing: crate::Sharing) -> bool {
    !(ignore_shared && sharing == crate::Sharing::Shared)
}

/// The pages whose bits are not set.
fn complement(received: &[u8], pages: u64) -> PageBitmap {
    let missing = PageBitmap::new(pages);
    missing.set_range(0..pages);
    for (byte, first) in received.iter().zip((0..).step_by(8)) {
        match byte {
            0 => {}
            0xff => {
                missing.clear_range(first..first + 8);
            }
            byte => {
                for bit in (0..8).filter(|bit| byte >> bit & 1 != 0) {
                    missing.clear(first + bit);
                }
            }
        }
    }
    missing
}
