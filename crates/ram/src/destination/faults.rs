//! The thread that sees who waits for a page.
//!
//! It only writes down what is wanted: the network is other threads' business. So a fault is known,
//! and answered, whatever the connection does.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use super::memory::Memory;
use super::requests::{self, HostPage, Requests};
use super::stats::{RamDestinationStats, count};
use crate::block::RamBlock;
use crate::userfault::{Placed, Userfault, UserfaultError};

/// What the kernel does about missing pages, as [`Userfault`] says it. A trait of its own because no
/// clock but the real one moves the kernel: a test that has another plays its part.
pub(crate) trait Kernel: Send + Sync {
    fn register(&self, block: &RamBlock) -> Result<(), UserfaultError>;
    fn unregister(&self, block: &RamBlock) -> Result<(), UserfaultError>;
    fn place(&self, block: &RamBlock, offset: u64, bytes: &[u8]) -> Result<Placed, UserfaultError>;
    fn place_zero(&self, block: &RamBlock, offset: u64) -> Result<Placed, UserfaultError>;
    fn wake(&self, block: &RamBlock, offset: u64, bytes: u64) -> Result<(), UserfaultError>;
}

/// Guest memory whose pages are missing until they are placed.
///
/// Dropping it ends that: whoever waits goes on, and finds zeroes.
pub(super) struct Faults {
    watched: Arc<Watched>,
    thread: Mutex<Option<Thread>>,
}

/// The thread, and what ends it.
struct Thread {
    handle: JoinHandle<()>,
    stop: OwnedFd,
}

/// What the thread has.
struct Watched {
    kernel: Arc<dyn Kernel>,
    memory: Arc<Memory>,
    requests: Arc<Requests>,
    stats: Arc<RamDestinationStats>,
    /// Why the thread ended by itself.
    failure: OnceLock<String>,
}

impl Faults {
    /// Faults of all blocks that travel come from now on.
    pub(super) fn watch(
        memory: Arc<Memory>,
        requests: Arc<Requests>,
        stats: Arc<RamDestinationStats>,
    ) -> Result<Self, UserfaultError> {
        let userfault = Arc::new(Userfault::open_missing()?);
        let failed = |what: &str, source: io::Error| UserfaultError::Failed {
            what: what.into(),
            source,
        };
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed("make an event", errno.into()))?;
        let stop_thread = stop.try_clone();
        let stop_thread = stop_thread.map_err(|source| failed("duplicate an event", source))?;
        let kernel = Arc::clone(&userfault);
        let faults = Self::new(kernel, memory, requests, stats);
        let watched = Arc::clone(&faults.watched);
        let handle = std::thread::Builder::new()
            .name("ram-faults".into())
            .spawn(move || watched.run(&userfault, &stop_thread))
            .map_err(|source| failed("start a thread", source))?;
        *faults.lock() = Some(Thread { handle, stop });
        faults.register()?;
        Ok(faults)
    }

    /// The same without a thread: who plays the kernel's part says what is touched.
    #[cfg(test)]
    pub(super) fn simulated(
        kernel: Arc<dyn Kernel>,
        memory: Arc<Memory>,
        requests: Arc<Requests>,
        stats: Arc<RamDestinationStats>,
    ) -> Result<Self, UserfaultError> {
        let faults = Self::new(kernel, memory, requests, stats);
        faults.register()?;
        Ok(faults)
    }

    #[cfg(test)]
    pub(super) fn touched(&self, page: HostPage, seen: Instant) {
        self.watched.fault(page, seen);
    }

    fn new(
        kernel: Arc<dyn Kernel>,
        memory: Arc<Memory>,
        requests: Arc<Requests>,
        stats: Arc<RamDestinationStats>,
    ) -> Self {
        Self {
            watched: Arc::new(Watched {
                kernel,
                memory,
                requests,
                stats,
                failure: OnceLock::new(),
            }),
            thread: Mutex::default(),
        }
    }

    fn register(&self) -> Result<(), UserfaultError> {
        let watched = &self.watched;
        let mut blocks = watched.memory.travelling();
        blocks.try_for_each(|(_, block)| watched.kernel.register(block))
    }

    /// Nobody sees faults any more, and why.
    pub(super) fn failure(&self) -> Option<&str> {
        self.watched.failure.get().map(String::as_str)
    }

    /// Put a host page in its place. It counts as received, and whoever waited goes on.
    pub(super) fn place(
        &self,
        page: HostPage,
        bytes: Option<&[u8]>,
    ) -> Result<Placed, UserfaultError> {
        let Some(block) = self.watched.memory.block(page.block) else {
            return Ok(Placed::AlreadyThere);
        };
        let placed = match bytes {
            Some(bytes) => self.watched.kernel.place(block, page.offset, bytes),
            None => self.watched.kernel.place_zero(block, page.offset),
        }?;
        if placed == Placed::Now {
            let memory = &self.watched.memory;
            memory.mark(page.block, page.offset, block.page_bytes());
            count(&self.watched.stats.placed);
            if self.watched.requests.placed(page) {
                // Placing has woken all who waited. But a page can be given back and touched again
                // before it is marked: whoever did that shall look once more.
                let kernel = &self.watched.kernel;
                kernel.wake(block, page.offset, block.page_bytes())?;
            }
        }
        Ok(placed)
    }

    /// No faults come any more; whoever waits goes on. Ends the thread.
    pub(super) fn end(&self) {
        // First: it would find nothing to be placed where nobody waits any more. Who faults after that
        // is woken below.
        self.join();
        for (_, block) in self.watched.memory.travelling() {
            if let Err(error) = self.watched.kernel.unregister(block) {
                tracing::error!("{error}");
            }
        }
    }

    fn join(&self) {
        let Some(Thread { handle, stop }) = self.lock().take() else {
            return;
        };
        // It polls this, and waits for nothing else.
        let _ = rustix::io::write(&stop, &1_u64.to_ne_bytes());
        if handle.join().is_err() {
            tracing::error!("the thread for faults of guest memory has panicked");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Thread>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.join();
    }
}

impl Watched {
    fn run(&self, userfault: &Userfault, stop: &OwnedFd) {
        let mut faults = Vec::new();
        loop {
            match userfault.wait(stop.as_fd(), &mut faults) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::error!("faults of guest memory cannot be read: {error}");
                    let _ = self.failure.set(error.to_string());
                    return;
                }
            }
            let seen = Instant::now();
            for fault in &faults {
                let Some((block, offset)) = fault.locate(self.memory.ram()) else {
                    tracing::error!("a fault at {:#x}, outside of guest memory", fault.address);
                    continue;
                };
                let page = HostPage {
                    block: block.0,
                    offset,
                };
                self.fault(page, seen);
            }
        }
    }

    fn fault(&self, page: HostPage, seen: Instant) {
        let is_here = || self.memory.has(page.block, page.offset);
        match self.requests.fault(page, seen, is_here) {
            requests::Fault::New | requests::Fault::Known => {}
            requests::Fault::Here => self.revive(page),
        }
    }

    /// A page is touched that was received. Most likely it came after the fault, and who waits is
    /// woken anyhow. If not, its memory was given back since (a balloon does that), or never taken
    /// for a page of zeroes: without us it would read as zeroes.
    fn revive(&self, page: HostPage) {
        let Some(block) = self.memory.block(page.block) else {
            return;
        };
        if let Err(error) = self.kernel.place_zero(block, page.offset) {
            tracing::error!("{error}");
        }
    }
}

impl Kernel for Userfault {
    fn register(&self, block: &RamBlock) -> Result<(), UserfaultError> {
        self.register(block)
    }

    fn unregister(&self, block: &RamBlock) -> Result<(), UserfaultError> {
        self.unregister(block)
    }

    fn place(&self, block: &RamBlock, offset: u64, bytes: &[u8]) -> Result<Placed, UserfaultError> {
        self.place(block, offset, bytes)
    }

    fn place_zero(&self, block: &RamBlock, offset: u64) -> Result<Placed, UserfaultError> {
        self.place_zero(block, offset)
    }

    fn wake(&self, block: &RamBlock, offset: u64, bytes: u64) -> Result<(), UserfaultError> {
        self.wake(block, offset, bytes)
    }
}
