//! Growing and shrinking the disk.
//!
//! What lies behind the end of the disk means nothing and may be anything. Growing drops it before
//! the header says that it counts, and shrinking only after the header says that it does not.

use std::sync::atomic::Ordering;

use crate::bitmaps::mark_in_use;
use crate::bytes::table;
use crate::disk::Qcow2Disk;
use crate::error::Error;
use crate::limits::{DISK_BYTES_MAX, L1_BYTES_MAX};
use crate::types::GuestCluster;
use crate::zero::Wanted;

impl Qcow2Disk {
    /// Give the disk another length. New bytes read as zeroes, whatever the backing file has
    /// there. Waits until all operations have ended; durable when it returns. Bitmaps are marked
    /// as not up to date.
    pub fn resize(&self, disk_bytes: u64) -> Result<(), Error> {
        let _alone = self.operations.alone();
        self.before_change()?;
        let geometry = self.geometry;
        let option = |bound| Error::Option {
            option: "new disk size",
            value: disk_bytes,
            bound,
        };
        if disk_bytes > DISK_BYTES_MAX {
            return Err(option("at most 2^48"));
        }
        let l1_entries = geometry.l1_entries(disk_bytes);
        if l1_entries * 8 > L1_BYTES_MAX {
            return Err(option("less with clusters this small"));
        }
        if geometry.version < 3 && self.state().header.snapshots > 0 {
            return Err(option(
                "what it is: snapshots of version 2 do not say their size",
            ));
        }
        let old_bytes = self.disk_bytes();
        if disk_bytes == old_bytes {
            return Ok(());
        }
        self.write_back()?;
        {
            let mut state = self.state();
            state.vm_state_writer += 1;
            mark_in_use(&*self.storage, &state.header, state.file_end, true)?;
        }
        match disk_bytes > old_bytes {
            true => self.grow(old_bytes, disk_bytes),
            false => self.shrink(disk_bytes),
        }
    }

    fn grow(&self, old_bytes: u64, disk_bytes: u64) -> Result<(), Error> {
        let geometry = self.geometry;
        self.drop_clusters_from(GuestCluster(geometry.clusters(old_bytes)))?;
        self.move_l1(geometry.l1_entries(disk_bytes))?;
        // What is below ends here for good, and so does the last cluster's content.
        let last_end = geometry.cluster_end(old_bytes).min(disk_bytes);
        if last_end > old_bytes {
            self.zero_behind_end(old_bytes..geometry.cluster_end(old_bytes))?;
        }
        let hidden_end = self.backing_bytes.min(disk_bytes);
        let first = geometry.clusters(old_bytes);
        let end = geometry.clusters(hidden_end);
        if first < end {
            if geometry.version >= 3 {
                self.change_clusters(first..end, Wanted::Zeroes)?;
            } else {
                let start = geometry.guest(GuestCluster(first)).0;
                self.zero_behind_end(start..geometry.cluster_end(hidden_end))?;
            }
        }
        self.write_back()?;
        self.switch_length(disk_bytes)
    }

    fn shrink(&self, disk_bytes: u64) -> Result<(), Error> {
        self.switch_length(disk_bytes)?;
        self.drop_clusters_from(GuestCluster(self.geometry.clusters(disk_bytes)))?;
        self.write_back_all()
    }

    fn switch_length(&self, disk_bytes: u64) -> Result<(), Error> {
        let mut state = self.state();
        let mut header = state.header.clone();
        header.disk_bytes = disk_bytes;
        header.write(&*self.storage)?;
        self.storage
            .flush()
            .map_err(Error::storage("flush", "header", 0))?;
        state.header = header;
        self.disk_bytes.store(disk_bytes, Ordering::Release);
        Ok(())
    }

    fn zero_behind_end(&self, mut guest: std::ops::Range<u64>) -> Result<(), Error> {
        use crate::disk::SegmentKind::{Unallocated, Zero, ZeroAllocated};
        let zeroes = vec![0; 64 << 10];
        while guest.start < guest.end {
            let most = (guest.end - guest.start).min(zeroes.len() as u64);
            let segment = self.first_segment(guest.start, most)?;
            let is_zero = match segment.kind {
                Zero | ZeroAllocated => true,
                Unallocated => !self.is_backed(&guest),
                _ => false,
            };
            if !is_zero {
                let length = usize::try_from(segment.length).unwrap_or_default();
                let part = zeroes.get(..length).unwrap_or_default();
                self.write_range(part, guest.start)?;
            }
            guest.start += segment.length;
        }
        Ok(())
    }

    /// Make the active L1 table at least this long, elsewhere if it must grow.
    pub(crate) fn move_l1(&self, entries: u64) -> Result<(), Error> {
        let mut state = self.state();
        if state.l1.len() as u64 >= entries {
            return Ok(());
        }
        drop(state);
        self.write_back()?;
        state = self.state();
        let geometry = self.geometry;
        let storage = &*self.storage;
        let allocation = state.allocate_exactly(storage, geometry.clusters(entries * 8))?;
        let mut l1 = state.l1.clone();
        l1.resize(usize::try_from(entries).unwrap_or_default(), 0);
        let offset = geometry.host(allocation.first).0;
        let mut bytes = table(&l1);
        let whole = allocation.count << geometry.cluster_bits;
        bytes.resize(usize::try_from(whole).unwrap_or_default(), 0);
        storage
            .write_at(&bytes, offset)
            .map_err(Error::storage("write", "L1 table", offset))?;
        self.unsynced.store(true, Ordering::Release);
        drop(state);
        // The refcounts of the new place, before the header leads there.
        self.write_back()?;
        state = self.state();
        let mut header = state.header.clone();
        let old_clusters = geometry.clusters(u64::from(header.l1_entries) * 8);
        let old_first = header.l1_offset >> geometry.cluster_bits;
        header.l1_offset = offset;
        header.l1_entries = u32::try_from(entries).unwrap_or(u32::MAX);
        header.write(storage)?;
        storage
            .flush()
            .map_err(Error::storage("flush", "header", 0))?;
        state.header = header;
        state.l1 = l1;
        state.guard_tables();
        state.free_later(old_first..old_first + old_clusters);
        Ok(())
    }
}
