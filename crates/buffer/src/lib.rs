//! Aligned buffers with a byte budget, and the zero test.
//!
//! A [`Pool`] hands out page-aligned [`Buffer`]s of one size and never more bytes than its budget,
//! so that a fast reader cannot fill the memory while a slow writer catches up. [`is_zero`] tells
//! whether a buffer needs to be sent at all.

mod memory;
mod pool;
mod zero;

pub use memory::ALIGNMENT_BYTES;
pub use pool::{Buffer, Pool};
pub use zero::is_zero;
