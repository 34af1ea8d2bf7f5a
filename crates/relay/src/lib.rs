//! What stands between a running machine and a stream.
//!
//! [`announce`] tells the network where a guest lives after it has moved, [`park`] keeps a machine that
//! comes in a file, [`restore`] lets one out of a file run, [`qemu`] is a QEMU that takes part.
#![forbid(unsafe_code)]

pub mod announce;
pub mod convert;
pub mod park;
pub mod qemu;
pub mod restore;
