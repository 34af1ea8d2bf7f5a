//! The kernel's part: which host pages are there, who is woken.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::geometry::{Geometry, Page, SimRam};
use crate::destination::Kernel;
use crate::{GuestRam, PAGE_BYTES, Placed, RamBlock, UserfaultError};

/// Shared by the destination and the world. Host pages are named by their first guest page.
#[derive(Clone)]
pub(super) struct SimKernel(Arc<Mutex<State>>);

struct State {
    ram: Arc<SimRam>,
    geometry: Arc<Geometry>,
    /// Blocks whose faults are seen.
    watched: BTreeSet<usize>,
    /// Host pages of watched blocks that are not there.
    absent: BTreeSet<Page>,
    /// Host pages whose waiters go on.
    woken: Vec<Page>,
    /// Host pages that were placed.
    placed: Vec<Page>,
}

impl SimKernel {
    pub(super) fn new(ram: Arc<SimRam>, geometry: Arc<Geometry>) -> Self {
        Self(Arc::new(Mutex::new(State {
            ram,
            geometry,
            watched: BTreeSet::new(),
            absent: BTreeSet::new(),
            woken: Vec::new(),
            placed: Vec::new(),
        })))
    }

    /// These host pages are not there.
    pub(super) fn set_absent(&self, pages: BTreeSet<Page>) {
        self.lock().absent = pages;
    }

    /// The guest gives the memory of a host page back.
    pub(super) fn give_back(&self, page: Page) {
        let mut state = self.lock();
        let block = &state.ram.blocks()[page.0];
        let given = block.forget(page.1 * PAGE_BYTES, block.page_bytes());
        given.expect("a host page");
        state.absent.insert(page);
    }

    /// Would somebody who touches this host page wait?
    pub(super) fn is_absent(&self, page: Page) -> bool {
        let state = self.lock();
        state.watched.contains(&page.0) && state.absent.contains(&page)
    }

    pub(super) fn watches(&self, block: usize) -> bool {
        self.lock().watched.contains(&block)
    }

    /// Since this was asked last: what was placed, whose waiters go on.
    pub(super) fn take_events(&self) -> (Vec<Page>, Vec<Page>) {
        let mut state = self.lock();
        let placed = std::mem::take(&mut state.placed);
        (placed, std::mem::take(&mut state.woken))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn page(&self, block: &RamBlock, offset: u64) -> Page {
        let index = self.ram.index(block).expect("a block of this machine");
        assert!(offset.is_multiple_of(block.page_bytes()), "a host page");
        (index, offset / PAGE_BYTES)
    }

    fn place(&mut self, block: &RamBlock, offset: u64, bytes: &[u8]) -> Placed {
        let page = self.page(block, offset);
        assert_eq!(bytes.len() as u64, block.page_bytes());
        assert!(self.watched.contains(&page.0));
        self.woken.push(page);
        if !self.absent.remove(&page) {
            return Placed::AlreadyThere;
        }
        block.write(offset, bytes).expect("in use");
        self.placed.push(page);
        Placed::Now
    }
}

impl Kernel for SimKernel {
    fn register(&self, block: &RamBlock) -> Result<(), UserfaultError> {
        let mut state = self.lock();
        let (index, _) = state.page(block, 0);
        assert!(state.watched.insert(index), "registered twice");
        Ok(())
    }

    fn unregister(&self, block: &RamBlock) -> Result<(), UserfaultError> {
        let mut state = self.lock();
        let (index, _) = state.page(block, 0);
        state.watched.remove(&index);
        let geometry = Arc::clone(&state.geometry);
        let shape = &geometry.shapes[index];
        let pages = (0..shape.pages).step_by(shape.host_pages as usize);
        state.woken.extend(pages.map(|page| (index, page)));
        Ok(())
    }

    fn place(&self, block: &RamBlock, offset: u64, bytes: &[u8]) -> Result<Placed, UserfaultError> {
        Ok(self.lock().place(block, offset, bytes))
    }

    fn place_zero(&self, block: &RamBlock, offset: u64) -> Result<Placed, UserfaultError> {
        let zeroes = vec![0; block.page_bytes() as usize];
        Ok(self.lock().place(block, offset, &zeroes))
    }

    fn wake(&self, block: &RamBlock, offset: u64, bytes: u64) -> Result<(), UserfaultError> {
        let mut state = self.lock();
        let page = state.page(block, offset);
        assert_eq!(bytes, block.page_bytes());
        state.woken.push(page);
        Ok(())
    }
}
