//! Disks: what a storage backend must do ([`BlockDevice`]), raw files and block
//! devices ([`RawDisk`]), the lock bytes that keep QEMU's programs and us off each
//! other's images ([`ImageLock`]), and [`Node`], the only way in to a disk that a
//! guest uses.

mod device;
mod dirty;
mod node;

pub use device::{BlockDevice, Cached, DiskError, Extent, ExtentKind, Limits, Unmap};
pub use dirty::{CHUNK_BYTES, Chunk, DirtyBitmap};
pub use node::{
    Claim, Claimer, Hold, InUse, Lease, Leaving, Node, ReadPermit, Refusal, Subscription, WritePermit,
};
