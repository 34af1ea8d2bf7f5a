//! Internal snapshots: what the disk held at some moment, kept in the same file.
//!
//! ```text
//! header ─▶ active L1 ─▶ L2 ─▶ data            each L1 counts as a user of every L2 table and
//!    └─▶ snapshot table ─▶ L1 ─▶ same L2, data of every cluster that it leads to
//! ```
//!
//! All of this waits until every operation has ended, and lets none begin before it is through.
//! What is changed, in this order, each step durable before the next one begins:
//!
//! | | create | apply | delete |
//! |-|--------|-------|--------|
//! | 1 | what is dirty is written back | the same | the same |
//! | 2 | refcounts of all that the active L1 reaches are raised, its COPIED flags cleared; its copy and the new snapshot table lie in new clusters | the same for the snapshot's L1, whose copy is the new active L1 | the new snapshot table lies in new clusters |
//! | 3 | the header leads to the new table | the header leads to the new L1, with the disk's length | the header leads to the new table |
//! | 4 | the old table is freed | all that the old L1 reaches loses a user | all that the snapshot reaches loses a user, COPIED is set where the active L1 is alone |
//!
//! A stop before 3 leaves refcounts that are too high and flags that disagree with them; after it,
//! space that is not free yet, and flags that are not set yet. An error before 3 is taken back; an
//! error after it costs space, is logged, and does not undo what has happened.

mod share;
mod vm_state;

use crate::bitmaps::mark_in_use;
use crate::bytes::table;
use crate::disk::Qcow2Disk;
use crate::error::Error;
use crate::header::Header;
use crate::limits::{DISK_BYTES_MAX, L1_BYTES_MAX, SNAPSHOT_NAME_BYTES_MAX};
use crate::refcount::read_table;
use crate::snapshot_table::{SnapshotEntry, SnapshotTable};
use crate::state::State;
use crate::types::{COPIED, GuestCluster, HostCluster};

pub use vm_state::{VmState, VmStateReader, VmStateWriter};

/// A snapshot to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSnapshot<'a> {
    /// Its name: 1 to 255 bytes, none of them zero, not the name or id of another.
    pub name: &'a str,
    /// When it is taken: seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
    /// How long the guest has run, in nanoseconds.
    pub guest_nanoseconds: u64,
    /// So many bytes of VM state were written before, see [`Qcow2Disk::vm_state_writer`]; 0 if it
    /// has none.
    pub vm_state_bytes: u64,
    /// How many instructions the guest has run, if they are counted.
    pub icount: Option<u64>,
}

/// What is known of an internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// A number in decimal, as a rule.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was taken: seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
    /// How long the guest had run, in nanoseconds.
    pub guest_nanoseconds: u64,
    /// Bytes of VM state; 0 if it has none.
    pub vm_state_bytes: u64,
    /// Length of the disk, if it is known.
    pub disk_bytes: Option<u64>,
    /// How many instructions the guest had run, if they were counted.
    pub icount: Option<u64>,
}

impl From<&SnapshotEntry> for Snapshot {
    fn from(entry: &SnapshotEntry) -> Self {
        Self {
            id: String::from_utf8_lossy(&entry.id).into_owned(),
            name: String::from_utf8_lossy(&entry.name).into_owned(),
            date: (entry.date_seconds, entry.date_nanoseconds),
            guest_nanoseconds: entry.guest_nanoseconds,
            vm_state_bytes: entry.vm_state_bytes,
            disk_bytes: entry.disk_bytes,
            icount: entry.icount(),
        }
    }
}

impl Qcow2Disk {
    /// All internal snapshots, in the order of their table.
    #[must_use]
    pub fn snapshots(&self) -> Vec<Snapshot> {
        let state = self.state();
        state.snapshots.entries.iter().map(Into::into).collect()
    }

    /// Keep what the disk holds now, together with the VM state that was written to it. Durable
    /// when it returns; the VM state is not reached from the disk itself any more.
    pub fn create_snapshot(&self, new: &NewSnapshot<'_>) -> Result<Snapshot, Error> {
        let _alone = self.operations.alone();
        self.before_change()?;
        self.check_new(new)?;
        if new.vm_state_bytes == 0 {
            // Half a state that somebody left there is not kept.
            self.drop_vm_state()?;
        }
        self.write_back_all()?;
        let l1 = self.state().l1_in_use();
        self.share(&l1)?;
        let (header, table) = match self.prepare_create(new, &l1) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.take_back(&l1);
                return Err(error);
            }
        };
        let made = table.entries.last().map(Snapshot::from);
        self.switch_table(header, table)?;
        logged(
            "the VM state stays a part of the disk",
            self.drop_vm_state(),
        );
        logged("clusters are leaked", self.write_back_all());
        made.ok_or_else(|| no_such(new.name.as_bytes()))
    }

    /// Let the disk hold what the snapshot holds, and have its length; what it holds now is lost.
    /// `name` is an id, or else a name. Durable when it returns. Bitmaps are marked as not up to
    /// date. The VM state is read apart, with [`Qcow2Disk::vm_state_reader`].
    pub fn apply_snapshot(&self, name: &str) -> Result<(), Error> {
        let _alone = self.operations.alone();
        self.before_change()?;
        let (l1, disk_bytes) = self.read_disk_of(name)?;
        {
            let state = self.state();
            mark_in_use(&*self.storage, &state.header, state.file_end, true)?;
        }
        self.write_back_all()?;
        self.share(&l1)?;
        let prepared = self.prepare_apply(&l1);
        let mut header = match prepared {
            Ok(header) => header,
            Err(error) => {
                self.take_back(&l1);
                return Err(error);
            }
        };
        header.disk_bytes = disk_bytes;
        let (old_l1, old_header) = {
            let state = self.state();
            (state.l1.clone(), state.header.clone())
        };
        self.switch_header(header, |state| {
            state.l1 = l1;
            state.vm_state_writer += 1;
        })?;
        self.disk_bytes
            .store(disk_bytes, std::sync::atomic::Ordering::Release);
        logged("clusters are leaked", self.release(&old_l1));
        let geometry = self.geometry;
        let first = geometry.cluster_of(old_header.l1_offset);
        let count = geometry.clusters(u64::from(old_header.l1_entries) * 8);
        self.state().free_later(first..first + count);
        logged("clusters are leaked", self.write_back_all());
        Ok(())
    }

    /// Forget a snapshot, and free what nobody else uses. `name` is an id, or else a name. Durable
    /// when it returns.
    pub fn delete_snapshot(&self, name: &str) -> Result<(), Error> {
        let _alone = self.operations.alone();
        self.before_change()?;
        self.write_back_all()?;
        let (removed, table) = {
            let state = self.state();
            let index = state.snapshots.find(name)?;
            let mut entries = state.snapshots.entries.clone();
            let removed = entries.remove(index);
            (removed, SnapshotTable::of(entries)?)
        };
        let l1 = self.read_l1_of(&removed)?;
        let header = self.prepare_table(&table)?;
        self.switch_table(header, table)?;
        logged("clusters are leaked", self.release(&l1));
        let geometry = self.geometry;
        let first = geometry.cluster_of(removed.l1_offset);
        let count = geometry.clusters(u64::from(removed.l1_entries) * 8);
        let freed = self.free_if_unguarded(first..first + count);
        logged("clusters are leaked", freed);
        logged("clusters are leaked", self.write_back_all());
        logged("COPIED flags are not set", self.set_copied());
        logged("COPIED flags are not set", self.write_back_all());
        Ok(())
    }

    fn check_new(&self, new: &NewSnapshot<'_>) -> Result<(), Error> {
        let option = |option, value, bound| {
            Err(Error::Option {
                option,
                value,
                bound,
            })
        };
        let length = new.name.len() as u64;
        if length == 0 || length > u64::from(SNAPSHOT_NAME_BYTES_MAX) {
            return option("length of the snapshot's name", length, "1 to 255");
        }
        if new.name.contains('\0') {
            return option("a byte of the snapshot's name", 0, "anything else");
        }
        let state = self.state();
        if state.snapshots.find(new.name).is_ok() {
            return Err(Error::SnapshotExists {
                name: new.name.to_owned(),
            });
        }
        let start = self.geometry.vm_state_start(self.disk_bytes());
        let covered = (state.l1.len() as u64).saturating_mul(self.geometry.l1_coverage());
        if new.vm_state_bytes > covered.saturating_sub(start) {
            let bound = "no more than was written";
            return option("size of the VM state", new.vm_state_bytes, bound);
        }
        Ok(())
    }

    /// Everything of a new snapshot but the switch of the header.
    fn prepare_create(
        &self,
        new: &NewSnapshot<'_>,
        l1: &[u64],
    ) -> Result<(Header, SnapshotTable), Error> {
        {
            let mut state = self.state();
            let changed: Vec<usize> = (0..).zip(&mut state.l1).filter_map(clear_copied).collect();
            state.l1_dirty.extend(changed);
        }
        let place = self.write_new("L1 table", &table(l1))?;
        let ids = {
            let mut state = self.state();
            state.last_id += 1;
            (state.snapshots.next_id(), state.last_id)
        };
        let entry = SnapshotEntry::new(
            new,
            ids,
            self.geometry.host(HostCluster(place.start)).0,
            u32::try_from(l1.len()).unwrap_or(u32::MAX),
            self.disk_bytes(),
        );
        let mut entries = self.state().snapshots.entries.clone();
        entries.push(entry);
        let prepared = SnapshotTable::of(entries).and_then(|table| {
            let header = self.prepare_table(&table)?;
            Ok((header, table))
        });
        if prepared.is_err() {
            self.state().give_back(&*self.storage, place);
        }
        prepared
    }

    /// A copy of the L1 table is durable, with the refcounts; the header that leads there.
    fn prepare_apply(&self, l1: &[u64]) -> Result<Header, Error> {
        let place = self.write_new("L1 table", &table(l1))?;
        if let Err(error) = self.write_back() {
            self.state().give_back(&*self.storage, place);
            return Err(error);
        }
        let mut header = self.state().header.clone();
        header.l1_offset = self.geometry.host(HostCluster(place.start)).0;
        header.l1_entries = u32::try_from(l1.len()).unwrap_or(u32::MAX);
        Ok(header)
    }

    /// A snapshot table is durable, with everything else; the header that leads there.
    fn prepare_table(&self, table: &SnapshotTable) -> Result<Header, Error> {
        let place = match table.entries.is_empty() {
            true => 0..0,
            false => self.write_new("snapshot table", &table.encode())?,
        };
        if let Err(error) = self.write_back() {
            self.state().give_back(&*self.storage, place);
            return Err(error);
        }
        let mut header = self.state().header.clone();
        header.snapshots = u32::try_from(table.entries.len()).unwrap_or(u32::MAX);
        header.snapshots_offset = self.geometry.host(HostCluster(place.start)).0;
        Ok(header)
    }

    /// Put a table into new clusters.
    fn write_new(
        &self,
        structure: &'static str,
        bytes: &[u8],
    ) -> Result<std::ops::Range<u64>, Error> {
        let geometry = self.geometry;
        let mut state = self.state();
        let count = geometry.clusters(bytes.len() as u64);
        let allocation = state.allocate_exactly(&*self.storage, count)?;
        let offset = geometry.host(allocation.first).0;
        let mut whole = bytes.to_vec();
        let length = allocation.count << geometry.cluster_bits;
        whole.resize(usize::try_from(length).unwrap_or_default(), 0);
        if let Err(error) = self.write_metadata(structure, &whole, offset) {
            state.give_back(&*self.storage, allocation.clusters());
            return Err(error);
        }
        Ok(allocation.clusters())
    }

    /// The header leads to another snapshot table from now on; the old one is free later.
    fn switch_table(&self, header: Header, table: SnapshotTable) -> Result<(), Error> {
        let geometry = self.geometry;
        let old = {
            let state = self.state();
            let first = geometry.cluster_of(state.header.snapshots_offset);
            first..first + geometry.clusters(state.snapshots.bytes())
        };
        self.switch_header(header, |state| {
            state.snapshots = table;
            state.vm_state_writer += 1;
        })?;
        self.state().free_later(old);
        Ok(())
    }

    /// Everything that the header leads to is durable.
    ///
    /// If it fails nobody knows which header the file has: what either leads to keeps its
    /// refcounts, and that costs space at most.
    fn switch_header(&self, header: Header, change: impl FnOnce(&mut State)) -> Result<(), Error> {
        let mut state = self.state();
        header.write(&*self.storage)?;
        self.storage
            .flush()
            .map_err(Error::storage("flush", "header", 0))?;
        state.header = header;
        change(&mut state);
        state.guard_tables();
        Ok(())
    }

    /// The part of a snapshot's L1 table that the disk needs, and the length of that.
    fn read_disk_of(&self, name: &str) -> Result<(Vec<u64>, u64), Error> {
        let (entry, at) = {
            let state = self.state();
            let index = state.snapshots.find(name)?;
            let entry = state.snapshots.entries.get(index).cloned();
            (
                entry.ok_or_else(|| no_such(name.as_bytes()))?,
                state.header.snapshots_offset,
            )
        };
        let disk_bytes = entry.disk_bytes.unwrap_or_else(|| self.disk_bytes());
        // A table without entries would be one without a place.
        let needed = self.geometry.l1_entries(disk_bytes).max(1);
        if disk_bytes > DISK_BYTES_MAX || needed * 8 > L1_BYTES_MAX {
            let name = String::from_utf8_lossy(&entry.name);
            let problem = format!("snapshot {name:?} of a disk of {disk_bytes} bytes");
            return Err(Error::corrupt("snapshot table", at, problem));
        }
        let mut l1 = self.read_l1_of(&entry)?;
        l1.resize(usize::try_from(needed).unwrap_or_default(), 0);
        Ok((l1, disk_bytes))
    }

    /// All of a snapshot's L1 table, without flags.
    fn read_l1_of(&self, entry: &SnapshotEntry) -> Result<Vec<u64>, Error> {
        let bytes = u64::from(entry.l1_entries) * 8;
        let file_end = self.state().file_end;
        let mut l1 = read_table(
            &*self.storage,
            "L1 table of a snapshot",
            entry.l1_offset,
            bytes,
            file_end,
        )?;
        for entry in &mut l1 {
            *entry &= !COPIED;
        }
        Ok(l1)
    }

    /// Drop what lies behind the end of the disk. Where QEMU keeps the L2 tables and makes their
    /// entries zeroes, they go as a whole here: no reader can tell, and nothing has to be copied.
    fn drop_vm_state(&self) -> Result<(), Error> {
        let start = self.geometry.vm_state_start(self.disk_bytes());
        self.drop_clusters_from(GuestCluster(start >> self.geometry.cluster_bits))
    }
}

impl State {
    /// The active L1 table without flags, and without empty entries behind the end of the disk.
    fn l1_in_use(&self) -> Vec<u64> {
        let needed = self.geometry.l1_entries(self.header.disk_bytes);
        let used = self.l1.iter().rposition(|entry| *entry != 0);
        let used = used.map_or(0, |last| last + 1);
        let needed = usize::try_from(needed).unwrap_or(usize::MAX);
        let mut l1: Vec<u64> = self.l1.iter().map(|entry| entry & !COPIED).collect();
        // A table without entries would be one without a place.
        l1.resize(used.max(needed).max(1), 0);
        l1
    }
}

fn clear_copied((index, entry): (usize, &mut u64)) -> Option<usize> {
    let changes = *entry & COPIED != 0;
    *entry &= !COPIED;
    changes.then_some(index)
}

pub(crate) fn no_such(name: &[u8]) -> Error {
    Error::NoSuchSnapshot {
        name: String::from_utf8_lossy(name).into_owned(),
    }
}

/// For what comes after the deed is done.
fn logged(consequence: &'static str, result: Result<(), Error>) {
    if let Err(error) = result {
        tracing::warn!(%error, "{consequence}");
    }
}
