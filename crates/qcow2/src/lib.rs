//! The qcow2 image format: disks whose clusters lie anywhere in a file.
//!
//! ```text
//! guest offset ─▶ L1 table (in memory) ─▶ L2 table (slices in memory) ─▶ data cluster
//!                                                                        compressed data
//!                                                                        zeroes, or what is below
//! host cluster ─▶ refcount table (in memory) ─▶ refcount block (slices in memory) ─▶ users
//! ```
//!
//! [`open`] opens an image with its backing files, [`create`] makes one, [`Qcow2Disk`] is a
//! [`BlockDevice`](vmferry_disk::BlockDevice), [`check`] checks and mends. [`Storage`] is the file
//! that an image lies in; tests have one that crashes.
//!
//! Versions 2 and 3, all cluster sizes and refcount widths. Refused by name: encryption, external
//! data files, extended L2 entries, unknown incompatible features, backing files whose format is
//! not named. Compressed clusters are read, and replaced by plain ones when they are written to.
//! Refcounts are never updated lazily; an image that was left dirty is repaired when it is opened
//! for writing.
//!
//! # What holds wherever the process or the machine stops
//!
//! Everything that was flushed is there, and the image is consistent or has lost space, no more.
//! Metadata changes in memory and is written back by a flush, or when too much of it is dirty.
//!
//! 1. **Data and what was kept of the old cluster are durable before an L2 entry leads there.** The
//!    entry is published in memory after the write (`write.rs`, `write_claimed`); the first sync of
//!    a write-back lies between taking the entries and writing them (`flush.rs`, `carry_out`).
//! 2. **Refcounts are durable before L2 entries, and both before L1 entries.** Clusters get their
//!    refcount when they are reserved, so that a write-back that takes an entry takes its refcount
//!    too (`alloc.rs`, `take`). An L2 table that no L1 entry in the file leads to may be written
//!    early; the L1 entry, and all other L2 tables, are written after the first sync (`flush.rs`).
//! 3. **A refcount block is durable before the table leads to it, and that before anything that it
//!    counts is in use** (`flush.rs`, the second sync). A larger table is durable with all its
//!    blocks before the header is switched to it (`refcount.rs`, `grow_table`).
//! 4. **A cluster is free only after what freed it is durable,** and no operation that could have
//!    looked it up before is under way (`state.rs`, `free_later`; `flush.rs`, `retire`). Its
//!    refcount is lowered then, and may reach the file at any time.
//! 5. **The header changes in one write,** after everything that it leads to is durable, and what it
//!    led to before is freed after it is durable (`resize.rs`, `move_l1`; `check/repair.rs`).
//! 6. **A shorter disk is shorter in the header first; a longer one is cleaned behind its old end
//!    first** (`resize.rs`).
//! 7. **Bitmaps that record changes are marked as out of date, durably, before the first change**
//!    (`bitmaps.rs`).
//!
//! 8. **COPIED flags are cleared and refcounts raised, durably, before the header leads to another
//!    user** (`snapshot/mod.rs`). A stop before that leaves flags that disagree with a refcount that
//!    is too high, and a stop before flags are set again ones that are missing.
//!
//! # Who waits for whom
//!
//! One lock guards the metadata; it is held to look things up and to change them, not for data, and
//! reading an L2 table goes on without it. Two operations that change L2 entries of the same guest
//! cluster wait for one another (`state.rs`, `InFlight`); those that write in place do not. A flush
//! runs beside everything else. Only resizing and snapshots wait for all operations to end; those that
//! wait for them in turn go before the next one (`operations.rs`).
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(clippy::indexing_slicing, clippy::unwrap_used, clippy::expect_used)
)]

mod alloc;
mod backing;
pub mod bitmaps;
mod bytes;
mod cache;
mod check;
mod compressed;
mod create;
mod device;
mod disk;
mod error;
mod flush;
pub mod header;
pub mod limits;
mod operations;
mod refcount;
mod resize;
mod snapshot;
mod snapshot_table;
mod state;
mod storage;
pub mod types;
mod write;
mod zero;

pub use backing::{ChainOptions, open};
pub use check::{CheckReport, Finding, FindingKind, Repair, check};
pub use create::{CreateOptions, create};
pub use device::{LayerExtent, LayerKind};
pub use disk::{OpenOptions, Qcow2Disk};
pub use error::Error;
pub use snapshot::{NewSnapshot, Snapshot, VmState, VmStateReader, VmStateWriter};
pub use snapshot_table::{SnapshotEntry, SnapshotTable};
pub use storage::{FileStorage, Storage};
