//! Writing guest data.
//!
//! A write takes one step for each run of clusters of one kind. Where the clusters belong to the
//! image alone it writes in place. Else it reserves new clusters under the lock, writes the data
//! and what is to be kept of the old clusters without it, and then publishes the L2 entries under
//! the lock again. Meanwhile the guest clusters are *in flight*: who wants to change the same ones
//! waits; everybody else goes on, and readers see the old clusters.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{MutexGuard, PoisonError};

use crate::alloc::Allocation;
use crate::bytes::{be64, put64};
use crate::disk::{Epoch, Miss, Qcow2Disk, Segment, SegmentKind};
use crate::error::Error;
use crate::limits::{LOOK_UP_CLUSTERS_MAX, RUN_BYTES_MAX};
use crate::state::State;
use crate::types::{
    COPIED, GuestCluster, GuestOffset, HostCluster, HostOffset, L1Index, Mapping, OFFSET_MASK,
};

/// One step of a write.
struct Step<'a> {
    /// So many bytes of the buffer.
    length: usize,
    target: Target,
    _epoch: Epoch<'a>,
}

enum Target {
    /// The first cluster.
    InPlace(HostOffset),
    Claimed(Claim),
}

/// Guest clusters in flight, with the host clusters that will be theirs.
struct Claim {
    id: u64,
    guest: Range<u64>,
    host: HostCluster,
    /// The host clusters are new: given back if nothing comes of the write.
    new: bool,
    /// The host clusters read as zeroes already.
    untouched: bool,
    /// What the first and the last cluster are until then.
    old_first: Mapping,
    old_last: Mapping,
}

/// Lets those go on who wait for an operation in flight, however it ends.
struct Ending<'a> {
    disk: &'a Qcow2Disk,
    id: u64,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.disk.state().end(self.id);
        self.disk.ended.notify_all();
    }
}

impl Qcow2Disk {
    /// Write guest bytes. The range may end behind the disk's length, not behind its tables.
    pub(crate) fn write_range(&self, mut buf: &[u8], mut guest: u64) -> Result<(), Error> {
        while !buf.is_empty() {
            self.make_room()?;
            let step = self.next_step(guest, buf.len() as u64)?;
            let (part, rest) = buf.split_at_checked(step.length).unwrap_or_default();
            match step.target {
                Target::InPlace(host) => {
                    let skip = guest - self.geometry.cluster_start(guest);
                    self.write_storage(part, host.0 + skip)?;
                }
                Target::Claimed(claim) => self.write_claimed(&claim, part, guest)?,
            }
            guest += part.len() as u64;
            buf = rest;
        }
        Ok(())
    }

    pub(crate) fn write_storage(&self, buf: &[u8], host: u64) -> Result<(), Error> {
        let written = self.storage.write_at(buf, host);
        // Behind the write: a flush that takes the mark away before its sync covers the write.
        self.unsynced.store(true, Ordering::Release);
        written.map_err(Error::storage("write", "data", host))
    }

    /// Wait until no operation is in flight on the first of these clusters; answers with the
    /// clusters from there on that are free of them.
    pub(crate) fn wait_for_others<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        clusters: &Range<u64>,
    ) -> (MutexGuard<'a, State>, Range<u64>) {
        loop {
            match state.in_flight(clusters) {
                None => return (state, clusters.clone()),
                Some(busy) if busy.start > clusters.start => {
                    return (state, clusters.start..busy.start);
                }
                Some(_) => {
                    state = self
                        .ended
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn next_step(&self, guest: u64, length: u64) -> Result<Step<'_>, Error> {
        let geometry = self.geometry;
        let first = geometry.guest_cluster(GuestOffset(guest)).0;
        let last = geometry.guest_cluster(GuestOffset(guest + length - 1)).0;
        let mut state = self.state();
        loop {
            let (locked, clusters) = self.wait_for_others(state, &(first..last + 1));
            state = locked;
            let mapping = match state.mapping(GuestCluster(first))? {
                Ok(mapping) => mapping,
                Err(miss) => {
                    drop(state);
                    state = self.load(&miss)?;
                    continue;
                }
            };
            let (target, count) = self.choose_target(&mut state, mapping, clusters)?;
            let end = geometry.guest(GuestCluster(first + count)).0;
            let length = (end - guest).min(length);
            return Ok(Step {
                length: usize::try_from(length).unwrap_or_default(),
                target,
                _epoch: self.enter_epoch(&state),
            });
        }
    }

    /// Where the first of these clusters is to be written, and how many more go with it.
    fn choose_target(
        &self,
        state: &mut State,
        mapping: Mapping,
        clusters: Range<u64>,
    ) -> Result<(Target, u64), Error> {
        let in_place = |mapping: Mapping| match mapping {
            Mapping::Data { host, copied: true } => Some((host, false)),
            Mapping::Zero {
                host: Some(host),
                copied: true,
            } => Some((host, true)),
            _ => None,
        };
        let cluster_bytes = self.geometry.cluster_bytes();
        let run_max = (RUN_BYTES_MAX / cluster_bytes).max(1);
        let rest = clusters.start + 1..clusters.end;
        let Some((host, zero)) = in_place(mapping) else {
            let mut old = vec![mapping];
            for cluster in rest.take(usize::try_from(run_max - 1).unwrap_or_default()) {
                match state.mapping(GuestCluster(cluster))? {
                    Ok(mapping) if in_place(mapping).is_none() => old.push(mapping),
                    _ => break,
                }
            }
            return self.claim_new(state, clusters.start, &old);
        };
        let mut count = 1;
        let most = if zero { run_max } else { LOOK_UP_CLUSTERS_MAX };
        for cluster in rest {
            let next = HostOffset(host.0 + count * cluster_bytes);
            let goes_on = count < most
                && state
                    .mapping(GuestCluster(cluster))?
                    .is_ok_and(|mapping| in_place(mapping) == Some((next, zero)));
            if !goes_on {
                break;
            }
            count += 1;
        }
        let first = self.geometry.host_cluster(host);
        if state.overlaps_metadata(first.0..first.0 + count) {
            let problem = "a cluster of guest data lies where a table is";
            return Err(state.mark_corrupt(&*self.storage, host.0, problem));
        }
        if !zero {
            return Ok((Target::InPlace(host), count));
        }
        let guest = clusters.start..clusters.start + count;
        let claim = Claim {
            id: state.begin(guest.clone()),
            guest,
            host: first,
            new: false,
            untouched: false,
            old_first: mapping,
            old_last: mapping,
        };
        Ok((Target::Claimed(claim), count))
    }

    fn claim_new(
        &self,
        state: &mut State,
        first: u64,
        old: &[Mapping],
    ) -> Result<(Target, u64), Error> {
        let Allocation {
            first: host,
            count,
            untouched,
        } = state.allocate(&*self.storage, old.len() as u64)?;
        let guest = first..first + count;
        let last = usize::try_from(count - 1).unwrap_or_default();
        let claim = Claim {
            id: state.begin(guest.clone()),
            guest,
            host,
            new: true,
            untouched,
            old_first: old.first().copied().unwrap_or(Mapping::Unallocated),
            old_last: old.get(last).copied().unwrap_or(Mapping::Unallocated),
        };
        Ok((Target::Claimed(claim), count))
    }

    fn write_claimed(&self, claim: &Claim, buf: &[u8], guest: u64) -> Result<(), Error> {
        let _ending = Ending {
            disk: self,
            id: claim.id,
        };
        let written = self.fill_claimed(claim, buf, guest);
        let mut state = self.state();
        let mut published = 0;
        let result = written.and_then(|()| {
            for (cluster, host) in claim.guest.clone().zip(claim.host.0..) {
                let entry = self.geometry.host(HostCluster(host)).0 | COPIED;
                self.replace_entry(&mut state, GuestCluster(cluster), entry)?;
                published += 1;
            }
            Ok(())
        });
        if claim.new && result.is_err() {
            let count = claim.guest.end - claim.guest.start;
            let unused = claim.host.0 + published..claim.host.0 + count;
            state.give_back(&*self.storage, unused);
        }
        result
    }

    /// Write the data, and around it what the clusters held before.
    fn fill_claimed(&self, claim: &Claim, buf: &[u8], guest: u64) -> Result<(), Error> {
        let geometry = self.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let start = geometry.guest(GuestCluster(claim.guest.start)).0;
        let end = geometry.guest(GuestCluster(claim.guest.end)).0;
        let host = geometry.host(claim.host).0;
        let data_end = guest + buf.len() as u64;
        let head = start..guest;
        let tail = data_end..end;
        let keep_head = !head.is_empty() && !self.needs_no_fill(claim, claim.old_first, &head);
        let keep_tail = !tail.is_empty() && !self.needs_no_fill(claim, claim.old_last, &tail);
        if !keep_head && !keep_tail {
            return self.write_storage(buf, host + (guest - start));
        }
        // One cluster goes out in one piece. A long run is not copied for its ends.
        if end - start == cluster_bytes {
            let mut whole = vec![0; usize::try_from(cluster_bytes).unwrap_or_default()];
            let (before, rest) = split(&mut whole, guest - start);
            let (place, after) = split(rest, buf.len() as u64);
            place.copy_from_slice(buf);
            self.read_old(claim.old_first, before, head.start)?;
            self.read_old(claim.old_last, after, tail.start)?;
            return self.write_storage(&whole, host);
        }
        if keep_head {
            let mut kept = vec![0; usize::try_from(head.end - head.start).unwrap_or_default()];
            self.read_old(claim.old_first, &mut kept, head.start)?;
            self.write_storage(&kept, host)?;
        }
        self.write_storage(buf, host + (guest - start))?;
        if keep_tail {
            let mut kept = vec![0; usize::try_from(tail.end - tail.start).unwrap_or_default()];
            self.read_old(claim.old_last, &mut kept, tail.start)?;
            self.write_storage(&kept, host + (tail.start - start))?;
        }
        Ok(())
    }

    /// Zeroes in a cluster that is a hole need not be written.
    fn needs_no_fill(&self, claim: &Claim, old: Mapping, range: &Range<u64>) -> bool {
        claim.untouched
            && match old {
                Mapping::Zero { .. } => true,
                Mapping::Unallocated => !self.is_backed(range),
                _ => false,
            }
    }

    /// Read what a cluster held, from `guest` on (within it).
    fn read_old(&self, old: Mapping, buf: &mut [u8], guest: u64) -> Result<(), Error> {
        if buf.is_empty() {
            return Ok(());
        }
        let skip = guest - self.geometry.cluster_start(guest);
        match old {
            Mapping::Unallocated => self.read_backing(buf, guest),
            Mapping::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            Mapping::Data { host, .. } => self
                .storage
                .read_at(buf, host.0 + skip)
                .map_err(Error::storage("read", "data", host.0)),
            Mapping::Compressed { host, bytes } => {
                self.decompressor
                    .read(&*self.storage, host, bytes, skip, buf)
            }
        }
    }

    /// Put an L2 entry in the place of another, whose clusters lose a user.
    pub(crate) fn replace_entry(
        &self,
        state: &mut State,
        cluster: GuestCluster,
        entry: u64,
    ) -> Result<(), Error> {
        let geometry = self.geometry;
        let (l1, place) = geometry.entry_place(cluster);
        let table = self.own_table(state, l1)?;
        let slice_bytes = geometry.slice_bytes();
        let slice = table.0 + place / slice_bytes * slice_bytes;
        self.load_locked(state, &Miss { slice })?;
        let bytes = state.l2.get_mut(slice).unwrap_or_default();
        let in_slice = usize::try_from(place % slice_bytes).unwrap_or_default();
        // First, because an error says that nothing was replaced.
        let old = geometry.decode_l2(be64(bytes, in_slice), HostOffset(table.0 + place))?;
        put64(bytes, in_slice, entry);
        let kept = entry & OFFSET_MASK;
        let clusters = old.host_clusters(geometry);
        let same = matches!(old, Mapping::Data { .. } | Mapping::Zero { .. })
            && clusters.start << geometry.cluster_bits == kept;
        if !same {
            state.free_later(clusters);
        }
        Ok(())
    }

    /// The L2 table of an L1 entry, for a change: made if there is none, copied if others use it.
    fn own_table(&self, state: &mut State, index: L1Index) -> Result<HostOffset, Error> {
        let geometry = self.geometry;
        let Some(&entry) = state.l1.get(index.0) else {
            let problem = format!("it has no entry {}", index.0);
            return Err(Error::corrupt("L1 table", state.header.l1_offset, problem));
        };
        let old = entry & OFFSET_MASK;
        if old != 0 && entry & COPIED != 0 {
            return Ok(HostOffset(old));
        }
        let storage = &*self.storage;
        let allocation = state.allocate(storage, 1)?;
        let table = geometry.host(allocation.first);
        let end = table.0 + geometry.cluster_bytes();
        state.l2.forget(table.0..end, geometry.slice_bytes());
        let filled = match old {
            // All zeroes, as it must be.
            0 if allocation.untouched => Ok(()),
            0 => state.clear_table(storage, table),
            old => self.copy_table(state, old, table),
        };
        if let Err(error) = filled {
            state.give_back(storage, allocation.clusters());
            return Err(error);
        }
        self.unsynced.store(true, Ordering::Release);
        if let Some(entry) = state.l1.get_mut(index.0) {
            *entry = table.0 | COPIED;
        }
        state.l1_dirty.insert(index.0);
        state.new_tables.insert(table.0);
        state.metadata.insert(allocation.first.0);
        if old != 0 {
            // Somebody else may use it still: what guards it stays.
            let cluster = old >> geometry.cluster_bits;
            state.free_later(cluster..cluster + 1);
        }
        Ok(table)
    }

    fn copy_table(&self, state: &mut State, old: u64, table: HostOffset) -> Result<(), Error> {
        let geometry = self.geometry;
        let failed = |operation, offset| Error::storage(operation, "L2 table", offset);
        let mut bytes = vec![0; usize::try_from(geometry.cluster_bytes()).unwrap_or_default()];
        self.storage
            .read_at(&mut bytes, old)
            .map_err(failed("read", old))?;
        let slice_bytes = usize::try_from(geometry.slice_bytes()).unwrap_or(usize::MAX);
        for (slice, key) in bytes
            .chunks_mut(slice_bytes)
            .zip((old..).step_by(slice_bytes))
        {
            if let Some(known) = state.l2.get(key) {
                slice.copy_from_slice(known);
            }
        }
        self.storage
            .write_at(&bytes, table.0)
            .map_err(failed("write", table.0))
    }

    /// Segments of a range for `status`, in one look-up.
    pub(crate) fn first_segment(&self, guest: u64, length: u64) -> Result<Segment, Error> {
        let mut segments = Vec::new();
        let _epoch = self.find(guest, length, &mut segments)?;
        Ok(segments.first().copied().unwrap_or(Segment {
            length,
            kind: SegmentKind::Unallocated,
        }))
    }
}

impl State {
    fn clear_table(
        &mut self,
        storage: &dyn crate::storage::Storage,
        table: HostOffset,
    ) -> Result<(), Error> {
        let zeroes = vec![0; usize::try_from(self.geometry.cluster_bytes()).unwrap_or_default()];
        storage
            .write_at(&zeroes, table.0)
            .map_err(Error::storage("write", "new L2 table", table.0))
    }
}

fn split(bytes: &mut [u8], at: u64) -> (&mut [u8], &mut [u8]) {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    bytes.split_at_mut_checked(at).unwrap_or_default()
}
