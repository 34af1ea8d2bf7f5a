//! What is in a QEMU migration stream, where it breaks, and how to get memory and disks out of it.
//!
//! [`walk`] goes through a stream once, front to back, from any source of bytes, and tells a
//! [`Visitor`] what it finds.

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

mod container;
pub mod diff;
mod extract;
mod layouts;
pub mod limits;
mod report;
mod scan;
mod source;
mod walk;

pub use container::{Container, ContainerError, LibvirtHeader};
pub use extract::{
    AddressSpace, Addresses, BlockImage, Blocks, CoreImage, CoreOptions, CoreReport, CpuState,
    DescriptionText, DeviceBody, DeviceBytes, DiskImage, DiskReport, ExtractError, MachineKind,
    MemoryImage, PhysicalMemory, PhysicalRange, Piece, Segment, WhyPhysical,
};
pub use report::{
    BitmapSummary, DescriptionSource, DeviceReport, DeviceState, DiskSummary, Item, ItemKind,
    MappedSummary, PageCounts, Problem, RamBlockSummary, RamSummary, Report,
};
pub use scan::{BodyEnd, find_body_end};
pub use walk::{
    Body, Description, Event, Finish, Found, VisitError, Visitor, WalkError, walk, walk_skipping,
};
