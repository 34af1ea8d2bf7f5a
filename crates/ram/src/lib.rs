//! The RAM of a virtual machine in a migration: the `ram` section, precopy and postcopy.
//!
//! A VMM says what memory its guest has ([`GuestRam`]) and how to learn what the guest writes
//! ([`DirtyLog`]).
//!
//! Rules: `ram.md` and `postcopy.md` of the wire format notes.

mod bitmap;
mod block;
mod destination;
mod dirty_log;
mod guest;
#[cfg(test)]
mod simulation;
mod source;
mod stored;
mod sys;
#[cfg(test)]
mod testing;
mod userfault;
#[cfg(feature = "vm-memory")]
mod vm_memory;
mod xbzrle_cache;

pub use bitmap::PageBitmap;
pub use block::{BlockIndex, BlockLayout, LayoutError, OutOfBlock, PAGE_BYTES, RamBlock, Sharing};
pub use destination::{
    CompressedFault, Histogram, IncomingRam, MissingPages, PageFault, PageRequest, RamDestination,
    RamDestinationError, RamDestinationOptions, RamDestinationStats,
};
pub use dirty_log::{
    DirtyLog, DirtyLogError, KvmLog, KvmSlot, MarkedLog, Marker, UserfaultLog, report_bits,
};
pub use guest::{AnonymousRam, GuestRam, MapError};
pub use source::{
    LEARNT_MAX, OutgoingRam, RamSource, RamSourceError, RamSourceOptions, RamSourceStats,
    RecoverError, RequestError, Throttle, ThrottleParameters,
};
pub use stored::{STORED_PAGES_MAX, StoredPages, StoredRam, StoredRange};
pub use userfault::{Fault, Placed, Userfault, UserfaultError, check_postcopy};
#[cfg(feature = "vm-memory")]
pub use vm_memory::{VmMemory, VmMemoryLog};

/// Name of the section.
pub const SECTION_NAME: &str = "ram";
/// The only version of its layout.
pub const SECTION_VERSION: u32 = 4;
