//! What a disk backend must be able to do.

use std::io;
use std::sync::Arc;

/// A disk backend: plain, synchronous, callable from several threads at once.
///
/// Offsets and lengths are bytes. A caller never reaches past [`Limits::length`]: [`crate::Node`]
/// and the NBD server check that before they call. Byte granularity is allowed everywhere; a
/// backend whose medium has coarser blocks reads, modifies and writes.
///
/// There are no default bodies: a backend that cannot do a thing says so.
pub trait BlockDevice: Send + Sync {
    /// Length and capabilities. Constant while the device is open.
    fn limits(&self) -> Limits;

    /// Fill `buf` from `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError>;

    /// Fill as much of `buf` as can be had without waiting for the medium.
    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError>;

    /// Write all of `buf` at `offset`. Durable only after [`BlockDevice::flush`].
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError>;

    /// Make the range read as zeroes. `fast_only` asks for [`io::ErrorKind::Unsupported`] instead of
    /// an ordinary write of zeroes when the backend has no quicker way.
    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: Unmap,
        fast_only: bool,
    ) -> Result<(), DiskError>;

    /// The range's content is no longer needed. A hint: what it reads as afterwards is not defined
    /// by this trait, but a backend never returns data of another owner.
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// What the range that starts at `offset` is; the answer covers at least one byte and at most
    /// `length`.
    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError>;

    /// Whose the content of the range that starts at `offset` is: this device's own, or that of what
    /// lies below it. The answer covers at least one byte and at most `length`. A device with
    /// nothing below owns everything.
    fn allocation(&self, offset: u64, length: u64) -> Result<Allocation, DiskError>;

    /// The device that shows through where this one owns nothing; zeroes do past its end.
    fn below(&self) -> Option<&dyn BlockDevice>;

    /// Start writing back the range without waiting. A hint that makes the next flush short.
    fn start_writeback(&self, offset: u64, length: u64) -> Result<(), DiskError>;

    /// Make everything written so far durable.
    fn flush(&self) -> Result<(), DiskError>;
}

/// A device that its maker wants to keep a handle to.
impl<D: BlockDevice + ?Sized> BlockDevice for Arc<D> {
    fn limits(&self) -> Limits {
        (**self).limits()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        (**self).read_at(buf, offset)
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError> {
        (**self).read_cached_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        (**self).write_at(buf, offset)
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: Unmap,
        fast_only: bool,
    ) -> Result<(), DiskError> {
        (**self).write_zeroes(offset, length, unmap, fast_only)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        (**self).discard(offset, length)
    }

    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        (**self).status(offset, length)
    }

    fn allocation(&self, offset: u64, length: u64) -> Result<Allocation, DiskError> {
        (**self).allocation(offset, length)
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        (**self).below()
    }

    fn start_writeback(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        (**self).start_writeback(offset, length)
    }

    fn flush(&self) -> Result<(), DiskError> {
        (**self).flush()
    }
}

/// What a device is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Length in bytes.
    pub length: u64,
    /// Smallest unit that the medium handles well, in bytes (a power of two).
    pub preferred_bytes: u32,
    /// Allocation unit in bytes for formats that have one (qcow2).
    pub cluster_bytes: Option<u32>,
    /// Writes are refused.
    pub read_only: bool,
}

/// Answer of [`BlockDevice::read_cached_at`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cached {
    /// The first `n` bytes (at least one) were filled.
    Hit(usize),
    /// Nothing was in memory; a read would wait.
    Miss,
    /// The backend cannot tell; do not ask again.
    Unsupported,
}

/// May a zero-write give the space back?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmap {
    /// The range may become a hole.
    May,
    /// The range must stay allocated (NBD's `NO_HOLE`).
    Never,
}

/// What a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Allocated, content unknown.
    Data,
    /// Not allocated, reads as zeroes.
    Hole,
    /// Allocated, known to read as zeroes.
    Zero,
}

/// A run of bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length of the run in bytes, at least 1.
    pub length: u64,
    /// What it is.
    pub kind: ExtentKind,
}

/// Whose a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Length of the run in bytes, at least 1.
    pub length: u64,
    /// The device itself says what is there, zeroes included; else a backing image shows through.
    pub is_own: bool,
}

/// A disk operation failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} at byte {offset} (length {length}): {source}")]
pub struct DiskError {
    /// `read`, `write`, `write zeroes`, `discard`, `status`, `allocation`, `write back`, `flush`.
    pub operation: &'static str,
    /// First byte of the range; 0 for a flush.
    pub offset: u64,
    /// Length of the range; 0 for a flush.
    pub length: u64,
    /// What the host said.
    pub source: io::Error,
}
