//! What is known of the metadata: behind one lock, which is held for look-ups and changes only.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use crate::cache::SliceCache;
use crate::error::Error;
use crate::header::Header;
use crate::limits::SNAPSHOT_TABLE_BYTES_MAX;
use crate::refcount::{Refcounts, read_table};
use crate::snapshot_table::SnapshotTable;
use crate::storage::Storage;
use crate::types::{Geometry, GuestCluster, HostCluster, OFFSET_MASK};

/// Clusters that lost a user. The file may still say otherwise, and operations that looked them up
/// before may still use them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Free {
    pub(crate) first: HostCluster,
    pub(crate) count: u64,
    /// Operations that may use them began in this epoch or before.
    pub(crate) epoch: u64,
}

/// Guest clusters whose L2 entries an operation is about to change.
#[derive(Clone, Debug)]
pub(crate) struct InFlight {
    pub(crate) id: u64,
    pub(crate) clusters: Range<u64>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) geometry: Geometry,
    pub(crate) header: Header,
    /// The active L1 table.
    pub(crate) l1: Vec<u64>,
    /// L1 entries that are not in the file.
    pub(crate) l1_dirty: BTreeSet<usize>,
    pub(crate) l2: SliceCache,
    /// L2 tables that no L1 entry in the file leads to yet.
    pub(crate) new_tables: HashSet<u64>,
    pub(crate) refcounts: Refcounts,
    pub(crate) snapshots: SnapshotTable,
    /// Counts what ends the work of whoever writes a VM state.
    pub(crate) vm_state_writer: u64,
    /// No cluster before this one is free.
    pub(crate) first_free: HostCluster,
    /// From this byte of the file on everything is a hole, and was never handed out.
    pub(crate) untouched_from: u64,
    /// The file is to be this long at the next flush: the end of the last cluster in use.
    pub(crate) file_end: u64,
    /// Clusters of the tables in use: no data is ever written there.
    pub(crate) metadata: HashSet<u64>,
    /// The same for what leads to the bits of bitmaps, which never moves: runs of clusters, in
    /// order, apart from one another. Known from the first change on.
    pub(crate) bitmaps: Vec<Range<u64>>,
    /// Freed since the last write-back began.
    pub(crate) frees: Vec<Free>,
    /// Freed in the file too, but maybe still in use by an operation.
    pub(crate) retired: Vec<Free>,
    pub(crate) epoch: u64,
    pub(crate) in_flight: Vec<InFlight>,
    pub(crate) last_id: u64,
    /// Writes are refused: the image is broken.
    pub(crate) corrupt: bool,
}

impl State {
    /// Read what is kept in memory. `header` has been checked.
    pub(crate) fn load(
        storage: &dyn Storage,
        header: Header,
        l2_cache_bytes: usize,
    ) -> Result<Self, Error> {
        let geometry = header.geometry;
        let length = storage
            .length()
            .map_err(Error::storage("measure", "image", 0))?;
        let file_end = geometry.cluster_end(length);
        let l1 = read_table(
            storage,
            "L1 table",
            header.l1_offset,
            u64::from(header.l1_entries) * 8,
            file_end,
        )?;
        let refcounts = Refcounts::load(storage, &header, file_end)?;
        let snapshots = SnapshotTable::read(storage, &header, file_end)?;
        debug_assert!(snapshots.bytes() <= SNAPSHOT_TABLE_BYTES_MAX);
        let mut state = Self {
            geometry,
            header,
            l1,
            l1_dirty: BTreeSet::new(),
            l2: SliceCache::new(l2_cache_bytes, geometry.slice_bytes()),
            new_tables: HashSet::new(),
            refcounts,
            snapshots,
            vm_state_writer: 0,
            first_free: HostCluster(0),
            untouched_from: file_end,
            file_end,
            metadata: HashSet::new(),
            bitmaps: Vec::new(),
            frees: Vec::new(),
            retired: Vec::new(),
            epoch: 0,
            in_flight: Vec::new(),
            last_id: 0,
            corrupt: false,
        };
        state.check_l1(file_end)?;
        state.guard_tables();
        Ok(state)
    }

    fn check_l1(&self, file_end: u64) -> Result<(), Error> {
        for (index, entry) in self.l1.iter().enumerate() {
            let table = entry & OFFSET_MASK;
            if table == 0 || (self.geometry.is_aligned(table) && table < file_end) {
                continue;
            }
            let at = self.header.l1_offset + 8 * index as u64;
            let problem = match self.geometry.is_aligned(table) {
                true => format!("it leads to byte {table}, past the end of the file"),
                false => format!("it leads to byte {table}, where no cluster starts"),
            };
            return Err(Error::corrupt("L1 entry", at, problem));
        }
        Ok(())
    }

    /// Note where all tables lie, so that nothing is written over them. Called anew after every
    /// operation that moves one of them.
    pub(crate) fn guard_tables(&mut self) {
        let geometry = self.geometry;
        let header = &self.header;
        let mut metadata = HashSet::from([0]);
        let mut guard = |offset: u64, bytes: u64| {
            let first = offset >> geometry.cluster_bits;
            metadata.extend(first..first + geometry.clusters(bytes));
        };
        guard(header.l1_offset, u64::from(header.l1_entries) * 8);
        let refcount_table = u64::from(header.refcount_table_clusters) << geometry.cluster_bits;
        guard(header.refcount_table_offset, refcount_table);
        guard(header.snapshots_offset, self.snapshots.bytes());
        for snapshot in &self.snapshots.entries {
            guard(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8);
        }
        for entry in self.l1.iter().chain(&self.refcounts.table) {
            if entry & OFFSET_MASK != 0 {
                guard(entry & OFFSET_MASK, 1);
            }
        }
        self.metadata = metadata;
    }

    /// Is there a table in one of these clusters?
    pub(crate) fn overlaps_metadata(&self, clusters: Range<u64>) -> bool {
        let next = self
            .bitmaps
            .partition_point(|run| run.end <= clusters.start);
        let bitmap = self.bitmaps.get(next);
        bitmap.is_some_and(|run| run.start < clusters.end)
            || clusters
                .into_iter()
                .any(|cluster| self.metadata.contains(&cluster))
    }

    /// The first operation in flight on one of these clusters: where it begins and ends.
    pub(crate) fn in_flight(&self, clusters: &Range<u64>) -> Option<Range<u64>> {
        let overlapping = self.in_flight.iter().filter(|other| {
            other.clusters.start < clusters.end && clusters.start < other.clusters.end
        });
        overlapping
            .min_by_key(|other| other.clusters.start)
            .map(|other| other.clusters.clone())
    }

    pub(crate) fn begin(&mut self, clusters: Range<u64>) -> u64 {
        self.last_id += 1;
        self.in_flight.push(InFlight {
            id: self.last_id,
            clusters,
        });
        self.last_id
    }

    pub(crate) fn end(&mut self, id: u64) {
        self.in_flight.retain(|other| other.id != id);
    }

    /// Clusters lost a user. They become free after a write-back, when nobody uses them any more.
    pub(crate) fn free_later(&mut self, clusters: Range<u64>) {
        let epoch = self.epoch;
        let count = clusters.end - clusters.start;
        if count == 0 {
            return;
        }
        match self.frees.last_mut() {
            Some(last) if last.epoch == epoch && last.first.0 + last.count == clusters.start => {
                last.count += count;
            }
            _ => self.frees.push(Free {
                first: HostCluster(clusters.start),
                count,
                epoch,
            }),
        }
    }

    /// Is there anything that a flush must bring into the file?
    pub(crate) fn must_write(&self) -> bool {
        !self.l1_dirty.is_empty() || self.l2.dirty() > 0
    }

    /// End of the last cluster that the disk can have entries for.
    pub(crate) fn guest_clusters(&self) -> GuestCluster {
        GuestCluster(self.l1.len() as u64 * self.geometry.l2_entries())
    }
}
