//! One user more, or one less, for all that an L1 table leads to.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::bytes::{entries, table};
use crate::check::read_cluster;
use crate::disk::Qcow2Disk;
use crate::error::Error;
use crate::state::State;
use crate::types::{COMPRESSED, COPIED, HostCluster, HostOffset, OFFSET_MASK};

/// Runs of clusters, in the order of the entries that lead there.
type Users = Vec<Range<u64>>;

impl Qcow2Disk {
    /// Raise the refcounts of all L2 tables and clusters that `l1` leads to, and clear the COPIED
    /// flags of the tables' entries, in the file. All changes of tables are in the file already.
    /// An error leaves refcounts as they were.
    pub(super) fn share(&self, l1: &[u64]) -> Result<(), Error> {
        let mut raised = 0;
        let result = self.raise_all(l1, &mut raised);
        if result.is_err() {
            self.unshare(l1, raised);
            self.set_copied_or_log();
        }
        result
    }

    /// Nothing leads to a copy of `l1` yet: undo what [`Qcow2Disk::share`] did.
    pub(super) fn take_back(&self, l1: &[u64]) {
        self.unshare(l1, u64::MAX);
        self.set_copied_or_log();
    }

    fn set_copied_or_log(&self) {
        if let Err(error) = self.set_copied() {
            tracing::warn!(%error, "COPIED flags are not set");
        }
    }

    fn raise_all(&self, l1: &[u64], raised: &mut u64) -> Result<(), Error> {
        let mut seen = HashSet::new();
        let active: HashSet<u64> = {
            let mut state = self.state();
            // Tables that were active once are guarded no more: snapshots have them now.
            state.guard_tables();
            state.l1.iter().map(|entry| entry & OFFSET_MASK).collect()
        };
        for entry in l1 {
            let place = entry & OFFSET_MASK;
            if place == 0 {
                continue;
            }
            let problem = if !seen.insert(place) {
                "two entries of one L1 table lead there"
            } else if !self.state().is_table_place(place) {
                "it is not in the file, or not at the start of a cluster"
            } else if self.state().is_guarded(place) && !active.contains(&place) {
                "another table lies there"
            } else {
                self.raise_table(place, raised)?;
                continue;
            };
            return Err(Error::corrupt("L2 table", place, problem));
        }
        Ok(())
    }

    fn raise_table(&self, place: u64, raised: &mut u64) -> Result<(), Error> {
        let geometry = self.geometry;
        let bytes = read_cluster(&*self.storage, geometry, "L2 table", place)?;
        let mut l2 = entries(&bytes);
        let mut state = self.state();
        let cluster = geometry.cluster_of(place);
        let mut users = Vec::new();
        push(&mut users, cluster..cluster + 1);
        for user in state.users_of(&l2, place) {
            push(&mut users, user?);
        }
        for cluster in users.into_iter().flatten() {
            state.raise(self, HostCluster(cluster))?;
            *raised += 1;
        }
        let mut changed = false;
        for entry in &mut l2 {
            if *entry & COMPRESSED == 0 && *entry & COPIED != 0 {
                *entry &= !COPIED;
                changed = true;
            }
        }
        match changed {
            true => self.write_l2(&mut state, place, &l2),
            false => Ok(()),
        }
    }

    /// Lower the refcounts that were raised, `raised` of them. What fails is leaked.
    fn unshare(&self, l1: &[u64], mut raised: u64) {
        for place in distinct_tables(l1) {
            if raised == 0 {
                return;
            }
            let users = match self.all_users_of(place) {
                Ok(users) => users,
                Err(error) => {
                    tracing::warn!(%error, "clusters are leaked");
                    return;
                }
            };
            let mut state = self.state();
            for cluster in users.into_iter().flatten() {
                if raised == 0 {
                    return;
                }
                state.lower(&*self.storage, HostCluster(cluster));
                raised -= 1;
            }
        }
    }

    /// Nothing in the file leads from here to `l1` any more: one user less for all that it leads
    /// to. What is broken is passed over, and leaked.
    pub(super) fn release(&self, l1: &[u64]) -> Result<(), Error> {
        for place in distinct_tables(l1) {
            if !self.state().is_table_place(place) {
                tracing::warn!(place, "an L2 table that is not in the file is passed over");
                continue;
            }
            for clusters in self.all_users_of(place)? {
                self.make_room()?;
                self.free_if_unguarded(clusters)?;
            }
        }
        Ok(())
    }

    /// Clusters lost a user. Never frees what a table in use lies in, whatever refcounts say.
    pub(super) fn free_if_unguarded(&self, clusters: Range<u64>) -> Result<(), Error> {
        let mut state = self.state();
        for cluster in clusters {
            let last = state.metadata.contains(&cluster)
                && state.refcounts.get(&*self.storage, HostCluster(cluster))? <= 1;
            match last {
                true => tracing::warn!(cluster, "a table in use is not freed"),
                false => state.free_later(cluster..cluster + 1),
            }
        }
        Ok(())
    }

    /// Set COPIED where the active tables are the only users, in memory for L1 entries, else in
    /// the file.
    pub(super) fn set_copied(&self) -> Result<(), Error> {
        let geometry = self.geometry;
        let tables = self.state().l1.len();
        for index in 0..tables {
            let mut state = self.state();
            let entry = state.l1.get(index).copied().unwrap_or_default();
            let place = entry & OFFSET_MASK;
            // What a shared table leads to is shared too.
            if place == 0 || !state.is_alone(self, place)? {
                continue;
            }
            if entry & COPIED == 0 {
                if let Some(entry) = state.l1.get_mut(index) {
                    *entry |= COPIED;
                }
                state.l1_dirty.insert(index);
            }
            let bytes = read_cluster(&*self.storage, geometry, "L2 table", place)?;
            let mut l2 = entries(&bytes);
            let mut changed = false;
            for entry in &mut l2 {
                let host = *entry & OFFSET_MASK;
                let unset = *entry & (COMPRESSED | COPIED) == 0 && host != 0;
                if unset && geometry.is_aligned(host) && state.is_alone(self, host)? {
                    *entry |= COPIED;
                    changed = true;
                }
            }
            if changed {
                self.write_l2(&mut state, place, &l2)?;
            }
        }
        Ok(())
    }

    fn write_l2(&self, state: &mut State, place: u64, l2: &[u64]) -> Result<(), Error> {
        let end = place + self.geometry.cluster_bytes();
        state.l2.forget(place..end, self.geometry.slice_bytes());
        self.write_metadata("L2 table", &table(l2), place)
    }

    pub(super) fn write_metadata(
        &self,
        structure: &'static str,
        bytes: &[u8],
        offset: u64,
    ) -> Result<(), Error> {
        let written = self.storage.write_at(bytes, offset);
        self.unsynced.store(true, Ordering::Release);
        written.map_err(Error::storage("write", structure, offset))
    }

    /// The clusters of an L2 table and of its entries, in the order in which they were raised.
    fn all_users_of(&self, place: u64) -> Result<Users, Error> {
        let geometry = self.geometry;
        let bytes = read_cluster(&*self.storage, geometry, "L2 table", place)?;
        let cluster = geometry.cluster_of(place);
        let mut users = Vec::new();
        push(&mut users, cluster..cluster + 1);
        let l2 = entries(&bytes);
        for user in self.state().users_of(&l2, place) {
            match user {
                Ok(user) => push(&mut users, user),
                Err(error) => tracing::warn!(%error, "clusters are leaked"),
            }
        }
        Ok(users)
    }
}

impl State {
    /// The clusters that each entry of an L2 table has a share in.
    fn users_of(&self, l2: &[u64], place: u64) -> impl Iterator<Item = Result<Range<u64>, Error>> {
        let geometry = self.geometry;
        let file_clusters = self.file_end >> geometry.cluster_bits;
        let places = (place..).step_by(8).map(HostOffset);
        l2.iter().zip(places).map(move |(entry, at)| {
            let clusters = geometry.decode_l2(*entry, at)?.host_clusters(geometry);
            if clusters.end > file_clusters {
                let offset = clusters.start << geometry.cluster_bits;
                let problem = format!("it leads to byte {offset}, past the end of the file");
                return Err(Error::corrupt("L2 entry", at.0, problem));
            }
            Ok(clusters)
        })
    }

    fn is_table_place(&self, place: u64) -> bool {
        self.geometry.is_aligned(place) && place < self.file_end
    }

    fn is_guarded(&self, place: u64) -> bool {
        self.metadata.contains(&self.geometry.cluster_of(place))
    }

    fn is_alone(&mut self, disk: &Qcow2Disk, place: u64) -> Result<bool, Error> {
        let cluster = HostCluster(self.geometry.cluster_of(place));
        Ok(self.refcounts.get(&*disk.storage, cluster)? == 1)
    }

    fn raise(&mut self, disk: &Qcow2Disk, cluster: HostCluster) -> Result<(), Error> {
        let count = self.refcounts.get(&*disk.storage, cluster)?;
        if count == 0 {
            let offset = self.geometry.host(cluster).0;
            let problem = "it is in use, but its refcount is 0";
            return Err(Error::corrupt("cluster", offset, problem));
        }
        // The largest refcount may have 64 bits.
        self.refcounts
            .set(&*disk.storage, cluster, count.saturating_add(1))
    }
}

/// The L2 tables of an L1 table, each once.
fn distinct_tables(l1: &[u64]) -> impl Iterator<Item = u64> {
    let mut seen = HashSet::new();
    l1.iter()
        .map(|entry| entry & OFFSET_MASK)
        .filter(move |place| *place != 0 && seen.insert(*place))
}

/// Runs that follow one another become one.
fn push(users: &mut Users, user: Range<u64>) {
    match users.last_mut() {
        _ if user.is_empty() => {}
        Some(last) if last.end == user.start => last.end = user.end,
        _ => users.push(user),
    }
}
