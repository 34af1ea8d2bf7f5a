//! Memory, disks and devices, out of a stream into files.
//!
//! Each is a [`Visitor`](crate::Visitor) of the walk that reads the stream once, and writes into a
//! file as it goes: memory does not grow with what is extracted.

mod canvas;
mod core;
mod cpu;
mod device;
mod disk;
mod elf;
mod error;
mod memory;
mod pages;
mod paging;
mod physical;

pub use core::{Addresses, CoreImage, CoreOptions, CoreReport, WhyPhysical};
pub use cpu::{CpuState, Segment};
pub use device::{DescriptionText, DeviceBody, DeviceBytes};
pub use disk::{DiskImage, DiskReport};
pub use error::ExtractError;
pub use memory::{BlockImage, Blocks, MemoryImage};
pub use paging::{AddressSpace, Piece};
pub use physical::{MachineKind, PhysicalMemory, PhysicalRange};
