//! Disks: what a storage backend must do ([`BlockDevice`]), raw files and block
//! devices ([`RawDisk`]), the lock bytes that keep QEMU's programs and us off each
//! other's images ([`ImageLock`]), and [`Node`], the only way in to a disk that a
//! guest uses.

mod device;
mod dirty;
mod locks;
mod node;
mod raw;
#[cfg(any(test, feature = "simulated"))]
pub mod simulated;
#[cfg(test)]
mod testing;

pub use device::{Allocation, BlockDevice, Cached, DiskError, Extent, ExtentKind, Limits, Unmap};
pub use dirty::{CHUNK_BYTES, Chunk, DirtyBitmap};
pub use locks::{Access, Deed, ImageLock, LockError};
pub use node::{
    Claim, Claimer, Filler, Hold, InUse, Lease, Leaving, Node, ReadPermit, Refusal, Subscription,
    WritePermit,
};
pub use raw::{OpenError, OpenOptions, QCOW2_MAGIC, RAW_BYTES_MAX, RawDisk, start_write_back};
