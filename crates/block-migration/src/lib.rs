//! The block section: schedule, source and destination of a disk migration.
//!
//! [`Schedule`] decides what is read and sent next, without I/O. [`Source`] carries that out and
//! writes the section; [`Destination`] reads the section and fills the disks.
//!
//! Rules: `block-migration.md` of the wire format notes.

mod apply;
mod destination;
mod reads;
mod schedule;
mod source;
#[cfg(test)]
mod testing;

pub use apply::{ApplyError, Syncer};
pub use destination::{Coverage, Destination, DestinationError, DestinationStats};
pub use reads::{Finished, Reads, ThreadReads};
pub use schedule::{
    BulkOver, Content, DirtyView, DiskIndex, Frame, Left, QUERY_CHUNKS, READS_MAX, RunKind,
    Schedule, Ticket, Work, chunk_runs,
};
pub use source::{Source, SourceError, SourceOptions, SourceStats};

/// Name of the section.
pub const SECTION_NAME: &str = "block";
/// The only version of its layout.
pub const SECTION_VERSION: u32 = 1;
