//! Zeroes and discards: changes of L2 entries alone, as far as whole clusters go.

use std::ops::Range;

use vmferry_disk::Unmap;

use crate::disk::{Qcow2Disk, SegmentKind};
use crate::error::Error;
use crate::state::State;
use crate::types::{COPIED, GuestCluster, GuestOffset, L1Index, Mapping, ZERO};

/// Written where a zero-write has no quicker way.
static ZEROES: [u8; 256 << 10] = [0; 256 << 10];
/// The lock is given away after so many clusters.
const BATCH_CLUSTERS: u64 = 1024;

/// What is to become of whole clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Zeroes; space may go.
    Zeroes,
    /// Zeroes; each cluster has space.
    AllocatedZeroes,
    /// Whatever takes the least space; zeroes if they are to be had.
    Nothing,
}

impl Qcow2Disk {
    pub(crate) fn zero_range(
        &self,
        guest: Range<u64>,
        unmap: Unmap,
        fast_only: bool,
    ) -> Result<(), Error> {
        let clusters = self.whole_clusters(&guest);
        let wanted = match unmap {
            Unmap::May => Wanted::Zeroes,
            Unmap::Never => Wanted::AllocatedZeroes,
        };
        let head_end = self.geometry.guest(GuestCluster(clusters.start)).0;
        let tail_start = self.geometry.guest(GuestCluster(clusters.end)).0;
        let (head, tail) = match clusters.is_empty() {
            true => (guest.clone(), 0..0),
            false => (guest.start..head_end, tail_start.min(guest.end)..guest.end),
        };
        let flags_do = self.flags_do(wanted, head_end..tail_start);
        if fast_only {
            let ends_are_zero = self.is_done(&head, wanted)? && self.is_done(&tail, wanted)?;
            if !ends_are_zero || (!clusters.is_empty() && !flags_do) {
                return Err(Error::NotFast);
            }
        }
        self.write_zeroes_out(head, wanted)?;
        if flags_do {
            self.change_clusters(clusters, wanted)?;
        } else if !clusters.is_empty() {
            self.write_over(head_end..tail_start.min(guest.end))?;
        }
        self.write_zeroes_out(tail, wanted)
    }

    pub(crate) fn discard_range(&self, guest: &Range<u64>) -> Result<(), Error> {
        let clusters = self.whole_clusters(guest);
        self.change_clusters(clusters, Wanted::Nothing)
    }

    /// The clusters that lie in a range as a whole. What is behind the end of the disk does not
    /// matter.
    fn whole_clusters(&self, guest: &Range<u64>) -> Range<u64> {
        let geometry = self.geometry;
        let first = geometry.clusters(guest.start);
        let end = match guest.end >= self.disk_bytes() {
            true => geometry.clusters(guest.end),
            false => geometry.guest_cluster(GuestOffset(guest.end)).0,
        };
        first..end.max(first)
    }

    /// Can flags of L2 entries say what is wanted?
    fn flags_do(&self, wanted: Wanted, guest: Range<u64>) -> bool {
        self.geometry.version >= 3 || (wanted == Wanted::Zeroes && !self.is_backed(&guest))
    }

    /// Is there already what is wanted?
    fn is_done(&self, guest: &Range<u64>, wanted: Wanted) -> Result<bool, Error> {
        let mut at = guest.start;
        while at < guest.end {
            let segment = self.first_segment(at, guest.end - at)?;
            let done = match segment.kind {
                SegmentKind::ZeroAllocated => true,
                _ if wanted == Wanted::AllocatedZeroes => false,
                SegmentKind::Zero => true,
                SegmentKind::Unallocated => !self.is_backed(&(at..at + 1)),
                _ => false,
            };
            if !done {
                return Ok(false);
            }
            at += segment.length;
        }
        Ok(true)
    }

    /// Parts of clusters: nothing to do where there are zeroes.
    fn write_zeroes_out(&self, guest: Range<u64>, wanted: Wanted) -> Result<(), Error> {
        if guest.is_empty() || self.is_done(&guest, wanted)? {
            return Ok(());
        }
        self.write_over(guest)
    }

    fn write_over(&self, guest: Range<u64>) -> Result<(), Error> {
        let mut at = guest.start;
        while at < guest.end {
            let length = usize::try_from(guest.end - at).unwrap_or(usize::MAX);
            let part = ZEROES.get(..length.min(ZEROES.len())).unwrap_or_default();
            self.write_range(part, at)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    pub(crate) fn change_clusters(
        &self,
        mut clusters: Range<u64>,
        wanted: Wanted,
    ) -> Result<(), Error> {
        while !clusters.is_empty() {
            self.make_room()?;
            let state = self.state();
            let (mut state, free) = self.wait_for_others(state, &clusters);
            clusters.start = self.change_batch(&mut state, &free, wanted)?;
        }
        Ok(())
    }

    /// Change some of the clusters; answers with the first one that is left.
    fn change_batch(
        &self,
        state: &mut State,
        clusters: &Range<u64>,
        wanted: Wanted,
    ) -> Result<u64, Error> {
        let geometry = self.geometry;
        let end = clusters.end.min(clusters.start + BATCH_CLUSTERS);
        let mut cluster = clusters.start;
        while cluster < end {
            let (l1, _) = geometry.entry_place(GuestCluster(cluster));
            let guest = geometry.guest(GuestCluster(cluster)).0;
            let table_end = (cluster / geometry.l2_entries() + 1) * geometry.l2_entries();
            let nothing_there = state.table_of(l1).is_none()
                && wanted != Wanted::AllocatedZeroes
                && !self.is_backed(&(guest..guest + 1));
            if nothing_there {
                if table_end >= end {
                    return Ok(table_end.min(clusters.end));
                }
                cluster = table_end;
                continue;
            }
            self.change_cluster(state, GuestCluster(cluster), wanted)?;
            cluster += 1;
        }
        Ok(cluster)
    }

    fn change_cluster(
        &self,
        state: &mut State,
        cluster: GuestCluster,
        wanted: Wanted,
    ) -> Result<(), Error> {
        let guest = self.geometry.guest(cluster).0;
        let backed = self.is_backed(&(guest..guest + 1));
        let old = loop {
            match state.mapping(cluster)? {
                Ok(mapping) => break mapping,
                Err(miss) => self.load_locked(state, &miss)?,
            }
        };
        let entry = match (wanted, old) {
            (
                Wanted::AllocatedZeroes,
                Mapping::Zero {
                    host: Some(_),
                    copied: true,
                },
            ) => {
                return Ok(());
            }
            (Wanted::AllocatedZeroes, Mapping::Data { host, copied: true }) => {
                host.0 | COPIED | ZERO
            }
            (Wanted::AllocatedZeroes, _) => return self.allocate_zeroes(state, cluster),
            // Version 2 has no flag that would hide what is below.
            (Wanted::Nothing, _) if backed && self.geometry.version < 3 => return Ok(()),
            (_, Mapping::Unallocated) if !backed => return Ok(()),
            (_, Mapping::Zero { host: None, .. }) => return Ok(()),
            _ if backed => ZERO,
            _ => 0,
        };
        self.replace_entry(state, cluster, entry)
    }

    fn allocate_zeroes(&self, state: &mut State, cluster: GuestCluster) -> Result<(), Error> {
        let allocation = state.allocate(&*self.storage, 1)?;
        let entry = self.geometry.host(allocation.first).0 | COPIED | ZERO;
        let replaced = self.replace_entry(state, cluster, entry);
        if replaced.is_err() {
            state.give_back(&*self.storage, allocation.clusters());
        }
        replaced
    }

    /// Drop everything from a guest cluster on, tables included: what is behind the end of the
    /// disk. Nobody else is at work.
    pub(crate) fn drop_clusters_from(&self, first: GuestCluster) -> Result<(), Error> {
        let geometry = self.geometry;
        let per_table = geometry.l2_entries();
        let whole_tables = first.0.div_ceil(per_table);
        let in_table = first.0..(whole_tables * per_table).min(self.state().guest_clusters().0);
        for cluster in in_table {
            let mut state = self.state();
            self.drop_cluster(&mut state, GuestCluster(cluster))?;
        }
        let tables = self.state().l1.len();
        for index in usize::try_from(whole_tables).unwrap_or(usize::MAX)..tables {
            self.make_room()?;
            let mut state = self.state();
            let Some(table) = state.table_of(L1Index(index)) else {
                continue;
            };
            let first = index as u64 * per_table;
            let mut shared = Vec::new();
            for cluster in first..first + per_table {
                let mapping = self.load_mapping(&mut state, GuestCluster(cluster))?;
                shared.push(mapping.host_clusters(geometry));
            }
            // Its entries die with the table; who shares the table has a share in the clusters too.
            for clusters in shared {
                state.free_later(clusters);
            }
            let cluster = geometry.host_cluster(table).0;
            state.free_later(cluster..cluster + 1);
            let end = table.0 + geometry.cluster_bytes();
            state.l2.forget(table.0..end, geometry.slice_bytes());
            state.new_tables.remove(&table.0);
            if let Some(entry) = state.l1.get_mut(index) {
                *entry = 0;
            }
            state.l1_dirty.insert(index);
        }
        Ok(())
    }

    fn drop_cluster(&self, state: &mut State, cluster: GuestCluster) -> Result<(), Error> {
        let (l1, _) = self.geometry.entry_place(cluster);
        if state.table_of(l1).is_none() {
            return Ok(());
        }
        match self.load_mapping(state, cluster)? {
            Mapping::Unallocated => Ok(()),
            _ => self.replace_entry(state, cluster, 0),
        }
    }

    fn load_mapping(&self, state: &mut State, cluster: GuestCluster) -> Result<Mapping, Error> {
        loop {
            match state.mapping(cluster)? {
                Ok(mapping) => return Ok(mapping),
                Err(miss) => self.load_locked(state, &miss)?,
            }
        }
    }
}
