//! A parked machine in a file: what is where in it, its pages by block and offset.
//!
//! An image is a migration stream in a file, in the VM state of a qcow2 snapshot, or a mapped-ram
//! file. [`Image::open`] makes it the memory of a guest that stands still
//! ([`StoredRam`](vmferry_ram::StoredRam)): any page is found at once, wherever in the image it is.
//!
//! ```text
//! Storage ─── bytes ───▶ Image ─── pages by block and offset ───▶ vmferry_ram
//!                          │ ▲    sections, configuration    ───▶ who restores it
//!                          ▼ │
//!                        Index: place and checksum of each page   ◀── IndexBuilder
//! ```
//!
//! A stream has no table of its pages, so an index is kept beside it: written while the machine is
//! parked ([`IndexBuilder`]), or when the image is opened without one. It is a cache: one that is
//! missing, damaged, stale or of another image is made anew. A mapped-ram file needs none.
//!
//! A page is handed out only if the record in front of it is the one that was indexed and its
//! checksum is right; so damage to an image whose index was made before is always noticed. Mapped-ram
//! files have no checksums.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

mod error;
mod head;
mod image;
mod index;
pub mod limits;
mod mapped;
mod outline;
mod page;
mod storage;
mod verify;
mod walk;
mod working_set;

pub use error::ImageError;
pub use head::{Head, ImageBlock, ImageSection, LiveSection};
pub use image::Image;
pub use index::IndexBuilder;
pub use storage::{FileStorage, Identity, IndexPlace, SnapshotStorage, Storage};

/// How far something that takes long has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the image that are done.
    pub done_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
}
