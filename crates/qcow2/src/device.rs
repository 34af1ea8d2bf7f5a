//! The image as a disk for everybody else.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use vmferry_disk::{Allocation, BlockDevice, Cached, DiskError, Extent, ExtentKind, Limits, Unmap};

use crate::disk::{Qcow2Disk, SegmentKind};
use crate::error::Error;

/// What the image itself says about a run of bytes, whatever lies below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// Nothing: the backing file shows through.
    Unallocated,
    /// Reads as zeroes, without a cluster.
    Zero,
    /// Reads as zeroes, with a cluster.
    ZeroAllocated,
    /// Data.
    Data,
    /// Compressed data.
    Compressed,
}

/// A run of bytes of one kind, in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerExtent {
    /// Length in bytes, at least 1.
    pub length: u64,
    /// What it is.
    pub kind: LayerKind,
}

impl Qcow2Disk {
    /// What the range that starts at `offset` is in this image alone; the answer covers at least
    /// one byte and at most `length`, which is not 0.
    pub fn layer_status(&self, offset: u64, length: u64) -> Result<LayerExtent, Error> {
        let _operation = self.operation();
        self.check_range(offset, length)?;
        let segment = self.first_segment(offset, length)?;
        let kind = match segment.kind {
            SegmentKind::Unallocated => LayerKind::Unallocated,
            SegmentKind::Zero => LayerKind::Zero,
            SegmentKind::ZeroAllocated => LayerKind::ZeroAllocated,
            SegmentKind::Data { .. } => LayerKind::Data,
            SegmentKind::Compressed { .. } => LayerKind::Compressed,
        };
        Ok(LayerExtent {
            length: segment.length,
            kind,
        })
    }

    /// Bring everything into the file, and close it.
    pub fn close(self) -> Result<(), Error> {
        match self.read_only {
            true => Ok(()),
            false => self.write_back_all(),
        }
        // Dropping finds nothing left to do.
    }

    /// Called before every change: may there be one, and does the file say that there was one?
    pub(crate) fn before_change(&self) -> Result<(), Error> {
        if self.read_only {
            return Err(Error::ReadOnly);
        }
        if self.announced.load(Ordering::Acquire) {
            // A plain look is enough: a write that runs beside the discovery is no worse than one
            // before it.
            return match self.state().corrupt {
                true => Err(Error::MarkedCorrupt),
                false => Ok(()),
            };
        }
        let mut state = self.state();
        if state.corrupt {
            return Err(Error::MarkedCorrupt);
        }
        crate::bitmaps::before_first_change(&*self.storage, &mut state)?;
        self.announced.store(true, Ordering::Release);
        Ok(())
    }

    /// Without a backing file an image owns what it has no clusters for, too.
    fn find_allocation(&self, offset: u64, length: u64) -> Result<Allocation, Error> {
        if self.backing.is_none() {
            let is_own = true;
            return Ok(Allocation { length, is_own });
        }
        let segment = self.first_segment(offset, length)?;
        Ok(Allocation {
            length: segment.length,
            is_own: !matches!(segment.kind, SegmentKind::Unallocated),
        })
    }

    fn find_extent(&self, offset: u64, length: u64) -> Result<Extent, Error> {
        let segment = self.first_segment(offset, length)?;
        let extent = |length, kind| Ok(Extent { length, kind });
        match segment.kind {
            SegmentKind::Zero => extent(segment.length, ExtentKind::Hole),
            SegmentKind::ZeroAllocated => extent(segment.length, ExtentKind::Zero),
            SegmentKind::Data { .. } | SegmentKind::Compressed { .. } => {
                extent(segment.length, ExtentKind::Data)
            }
            SegmentKind::Unallocated => match &self.backing {
                Some(backing) if offset < self.backing_bytes => {
                    let below = segment.length.min(self.backing_bytes - offset);
                    backing.status(offset, below).map_err(Error::BackingIo)
                }
                _ => extent(segment.length, ExtentKind::Hole),
            },
        }
    }

    fn write_back_hint(&self, offset: u64, length: u64) -> Result<(), Error> {
        let mut segments = Vec::new();
        let mut at = offset;
        while at < offset + length {
            let _epoch = self.find(at, offset + length - at, &mut segments)?;
            for segment in &segments {
                if let SegmentKind::Data { host } = segment.kind {
                    self.storage
                        .start_writeback(host, segment.length)
                        .map_err(Error::storage("write back", "data", host))?;
                }
                at += segment.length;
            }
        }
        Ok(())
    }
}

impl BlockDevice for Qcow2Disk {
    fn limits(&self) -> Limits {
        // A cluster has at most 2 MiB.
        let cluster_bytes = self.geometry.cluster_bytes() as u32;
        Limits {
            length: self.disk_bytes(),
            preferred_bytes: cluster_bytes,
            cluster_bytes: Some(cluster_bytes),
            read_only: self.read_only,
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let length = buf.len() as u64;
        let _operation = self.operation();
        self.check_range(offset, length)
            .and_then(|()| self.read_range(buf, offset))
            .map_err(failed("read", offset, length))
    }

    /// Hits what the page cache holds, if the L2 table is in memory and nobody changes one.
    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError> {
        let length = buf.len() as u64;
        let Some(_operation) = self.operations.try_begin() else {
            return Ok(Cached::Miss);
        };
        self.check_range(offset, length)
            .and_then(|()| self.read_cached(buf, offset))
            .map_err(failed("read", offset, length))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        let length = buf.len() as u64;
        let _operation = self.operation();
        self.before_change()
            .and_then(|()| self.check_range(offset, length))
            .and_then(|()| self.write_range(buf, offset))
            .map_err(failed("write", offset, length))
    }

    /// Whole clusters by a flag of their L2 entries (version 3, or nothing below), the rest by
    /// writing.
    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: Unmap,
        fast_only: bool,
    ) -> Result<(), DiskError> {
        let _operation = self.operation();
        self.before_change()
            .and_then(|()| self.check_range(offset, length))
            .and_then(|()| self.zero_range(offset..offset + length, unmap, fast_only))
            .map_err(failed("write zeroes", offset, length))
    }

    /// Whole clusters read as zeroes afterwards (in version 2 only if there is no backing file);
    /// parts of clusters stay as they are.
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let _operation = self.operation();
        self.before_change()
            .and_then(|()| self.check_range(offset, length))
            .and_then(|()| self.discard_range(&(offset..offset + length)))
            .map_err(failed("discard", offset, length))
    }

    /// A run ends after [`crate::limits::LOOK_UP_CLUSTERS_MAX`] clusters at the latest, so that no
    /// answer takes long. `Data` says that there is a cluster, not that anything was written to it:
    /// one that was allocated in advance is `Data`, too.
    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        let _operation = self.operation();
        self.check_range(offset, length)
            .and_then(|()| self.find_extent(offset, length))
            .map_err(failed("status", offset, length))
    }

    fn allocation(&self, offset: u64, length: u64) -> Result<Allocation, DiskError> {
        let _operation = self.operation();
        self.check_range(offset, length)
            .and_then(|()| self.find_allocation(offset, length))
            .map_err(failed("allocation", offset, length))
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        self.backing.as_deref()
    }

    fn start_writeback(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        let _operation = self.operation();
        if self.read_only {
            return Ok(());
        }
        self.check_range(offset, length)
            .and_then(|()| self.write_back_hint(offset, length))
            .map_err(failed("write back", offset, length))
    }

    fn flush(&self) -> Result<(), DiskError> {
        if self.read_only {
            return Ok(());
        }
        let _operation = self.operation();
        self.write_back().map_err(failed("flush", 0, 0))
    }
}

impl Drop for Qcow2Disk {
    fn drop(&mut self) {
        if self.read_only {
            return;
        }
        let must_write = {
            let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
            state.must_write() || state.refcounts.cache.dirty() > 0
        };
        if (must_write || *self.unsynced.get_mut())
            && let Err(error) = self.write_back_all()
        {
            tracing::warn!(%error, "an image was not written back when it was closed");
        }
    }
}

fn failed(operation: &'static str, offset: u64, length: u64) -> impl FnOnce(Error) -> DiskError {
    move |error| DiskError {
        operation,
        offset,
        length,
        source: error.into_io(),
    }
}
