//! Memory, disks and devices, out of a stream into files.
//!
//! Each is a [`Visitor`](crate::Visitor) of the walk that reads the stream once, and writes into a
//! file as it goes: memory does not grow with what is extracted.

mod canvas;
mod error;
mod memory;
mod pages;
mod xbzrle;

pub use error::ExtractError;
pub use memory::{BlockImage, Blocks, MemoryImage};
