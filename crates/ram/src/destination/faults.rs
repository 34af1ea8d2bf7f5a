//! The thread that sees who waits for a page.
//!
//! It only writes down what is wanted: the network is other threads' business. So a fault is known,
//! and answered, whatever the connection does.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use super::memory::Memory;
use super::requests::{self, HostPage, Requests};
use super::stats::{RamDestinationStats, count};
use crate::userfault::{Placed, Userfault, UserfaultError};

/// Guest memory whose pages are missing until they are placed.
///
/// Dropping it ends that: whoever waits goes on, and finds zeroes.
pub(super) struct Faults {
    watched: Arc<Watched>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the thread has.
struct Watched {
    userfault: Userfault,
    memory: Arc<Memory>,
    requests: Arc<Requests>,
    stats: Arc<RamDestinationStats>,
    /// Ends the thread.
    stop: OwnedFd,
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
        let userfault = Userfault::open_missing()?;
        let failed = |what: &str, source: io::Error| UserfaultError::Failed {
            what: what.into(),
            source,
        };
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed("make an event", errno.into()))?;
        let watched = Arc::new(Watched {
            userfault,
            memory,
            requests,
            stats,
            stop,
            failure: OnceLock::new(),
        });
        let thread = {
            let watched = Arc::clone(&watched);
            std::thread::Builder::new()
                .name("ram-faults".into())
                .spawn(move || watched.run())
                .map_err(|source| failed("start a thread", source))?
        };
        let faults = Self {
            watched,
            thread: Mutex::new(Some(thread)),
        };
        for (_, block) in faults.watched.memory.travelling() {
            faults.watched.userfault.register(block)?;
        }
        Ok(faults)
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
            Some(bytes) => self.watched.userfault.place(block, page.offset, bytes),
            None => self.watched.userfault.place_zero(block, page.offset),
        }?;
        if placed == Placed::Now {
            let memory = &self.watched.memory;
            memory.mark(page.block, page.offset, block.page_bytes());
            count(&self.watched.stats.placed);
            if self.watched.requests.placed(page) {
                // Placing has woken all who waited. But a page can be given back and touched again
                // before it is marked: whoever did that shall look once more.
                let userfault = &self.watched.userfault;
                userfault.wake(block, page.offset, block.page_bytes())?;
            }
        }
        Ok(placed)
    }

    /// No faults come any more; whoever waits goes on. Ends the thread.
    pub(super) fn end(&self) {
        for (_, block) in self.watched.memory.travelling() {
            if let Err(error) = self.watched.userfault.unregister(block) {
                tracing::error!("{error}");
            }
        }
        self.join();
    }

    fn join(&self) {
        // It polls this, and waits for nothing else.
        let _ = rustix::io::write(&self.watched.stop, &1_u64.to_ne_bytes());
        let thread = self.thread.lock();
        let thread = thread.unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread for faults of guest memory has panicked");
        }
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.join();
    }
}

impl Watched {
    fn run(&self) {
        let mut faults = Vec::new();
        loop {
            match self.userfault.wait(self.stop.as_fd(), &mut faults) {
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
        if let Err(error) = self.userfault.place_zero(block, page.offset) {
            tracing::error!("{error}");
        }
    }
}
