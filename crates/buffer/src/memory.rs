//! A page-aligned heap allocation; the only unsafe code of the crate.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Alignment of every buffer, in bytes: a page, and what O_DIRECT asks for at most.
pub const ALIGNMENT_BYTES: usize = 4096;

/// Owned, initialised, page-aligned bytes.
pub(crate) struct Memory {
    start: NonNull<u8>,
    layout: Layout,
}

impl Memory {
    /// Allocate `bytes` zero bytes. Aborts when the host has no memory, as every allocation does.
    ///
    /// # Panics
    ///
    /// If `bytes` is 0 or larger than half the address space: the size of a pool's buffers is the
    /// programmer's choice, never a peer's.
    pub(crate) fn zeroed(bytes: usize) -> Self {
        assert!(bytes > 0, "a buffer has at least one byte");
        let layout = Layout::from_size_align(bytes, ALIGNMENT_BYTES)
            .expect("a buffer fits in the address space");
        // SAFETY: the layout's size is not zero, checked above.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Self { start, layout }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: `start` points to `layout.size()` bytes that this value owns and that were
        // initialised when they were allocated; the borrow of `self` keeps writers away.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `bytes`; the exclusive borrow of `self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: `start` came from `alloc_zeroed` with this very layout and is freed only here.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

// SAFETY: `Memory` owns its bytes exclusively, like a `Box<[u8]>`; nothing is tied to a thread.
unsafe impl Send for Memory {}
// SAFETY: a shared `Memory` only gives out shared slices of plain bytes.
unsafe impl Sync for Memory {}
