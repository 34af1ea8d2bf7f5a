//! Write-back: in the order that keeps the file consistent wherever it stops.
//!
//! ```text
//!  1  refcount blocks, L2 tables that nothing leads to yet, length of the file
//!  ── sync: with them everything that was written to data clusters ──
//!  2  entries of the refcount table (if blocks were added)
//!  ── sync ──
//!  3  slices of the other L2 tables, L1 entries
//!  ── sync ──
//!  4  what was freed before 1 is free, as soon as no operation uses it any more
//! ```
//!
//! A step that has nothing to write has no sync. Nobody waits for any of it but those who flush,
//! and those who would make more metadata dirty than may be.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::cache::Slice;
use crate::disk::Qcow2Disk;
use crate::error::Error;
use crate::limits::{FREE_CLUSTERS_AT_ONCE, FREES_MAX};
use crate::refcount::entry_writes;
use crate::state::{Free, State};
use crate::types::{HostCluster, OFFSET_MASK};

/// Runs of freed clusters that are shorter than a page of the host give no space back.
const PUNCH_BYTES_MIN: u64 = 4096;

/// Runs one write-back at a time; those who wait meanwhile share the next one.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    state: Mutex<FlushState>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct FlushState {
    running: bool,
    started: u64,
    succeeded: u64,
    /// A sync failed: the kernel forgets what it could not write, so a later success means nothing.
    failed: Option<io::ErrorKind>,
}

/// What one write-back brings into the file.
#[derive(Debug, Default)]
struct WriteBack {
    refcounts: Vec<Slice>,
    new_tables: HashSet<u64>,
    /// Slices of tables that nothing leads to yet.
    early: Vec<Slice>,
    /// Slices of tables in use.
    late: Vec<Slice>,
    refcount_entries: BTreeSet<usize>,
    refcount_writes: Vec<(u64, Vec<u8>)>,
    l1_entries: BTreeSet<usize>,
    l1_writes: Vec<(u64, Vec<u8>)>,
    frees: Vec<Free>,
}

/// Ends a write-back that panicked: nobody knows what is durable, and nobody must wait for it.
struct Panics<'a>(&'a Flushes);

impl Drop for Panics<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running = false;
        state.failed = Some(io::ErrorKind::Other);
        self.0.ended.notify_all();
    }
}

impl Qcow2Disk {
    /// Make everything that was acknowledged durable.
    pub(crate) fn write_back(&self) -> Result<(), Error> {
        let lock = || {
            self.flushes
                .state
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        let mut state = lock();
        // A write-back that runs already may have passed over what the caller wrote.
        let wanted = state.started + 1;
        loop {
            if let Some(kind) = state.failed {
                return Err(Error::FlushFailed(kind));
            }
            if state.succeeded >= wanted {
                return Ok(());
            }
            if !state.running {
                break;
            }
            state = self
                .flushes
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.running = true;
        state.started += 1;
        drop(state);
        let panics = Panics(&self.flushes);
        let result = self.write_back_alone();
        std::mem::forget(panics);
        let mut state = lock();
        state.running = false;
        match &result {
            Ok(()) => state.succeeded = state.started,
            Err(Error::Storage {
                operation: "flush",
                source,
                ..
            }) => state.failed = Some(source.kind()),
            Err(_) => {}
        }
        self.flushes.ended.notify_all();
        result
    }

    fn write_back_alone(&self) -> Result<(), Error> {
        let work = self.state().begin_write_back();
        let result = self.carry_out(&work);
        self.state().end_write_back(&work, result.is_ok());
        result?;
        self.retire(work.frees)
    }

    fn carry_out(&self, work: &WriteBack) -> Result<(), Error> {
        self.write_slices("refcount block", &work.refcounts)?;
        self.write_slices("L2 table", &work.early)?;
        let publishes = !work.late.is_empty() || !work.l1_writes.is_empty();
        let adds_blocks = !work.refcount_writes.is_empty();
        if publishes || adds_blocks {
            self.reach_end()?;
        }
        self.sync()?;
        for (offset, bytes) in &work.refcount_writes {
            self.write_table("refcount table", *offset, bytes)?;
        }
        self.sync()?;
        self.write_slices("L2 table", &work.late)?;
        for (offset, bytes) in &work.l1_writes {
            self.write_table("L1 table", *offset, bytes)?;
        }
        self.sync()
    }

    /// Make the file as long as its clusters reach. With the lock held: nobody is handed a cluster
    /// meanwhile that a length from before would cut off.
    fn reach_end(&self) -> Result<(), Error> {
        let state = self.state();
        let failed = |operation| Error::storage(operation, "image", state.file_end);
        if self.storage.length().map_err(failed("measure"))? < state.file_end {
            self.storage
                .set_length(state.file_end)
                .map_err(failed("grow"))?;
            self.unsynced.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn write_table(&self, structure: &'static str, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.unsynced.store(true, Ordering::Release);
        self.storage
            .write_at(bytes, offset)
            .map_err(Error::storage("write", structure, offset))
    }

    /// Slices that follow one another in the file go out together.
    fn write_slices(&self, structure: &'static str, slices: &[Slice]) -> Result<(), Error> {
        let follows = |a: &Slice, b: &Slice| a.0 + a.1.len() as u64 == b.0;
        for run in slices.chunk_by(follows) {
            match run {
                [] => {}
                [(offset, bytes)] => self.write_table(structure, *offset, bytes)?,
                [(offset, _), ..] => {
                    let bytes: Vec<u8> = run
                        .iter()
                        .flat_map(|slice| slice.1.iter().copied())
                        .collect();
                    self.write_table(structure, *offset, &bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Sync the file if anything was written since the last time.
    fn sync(&self) -> Result<(), Error> {
        if !self.unsynced.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.storage
            .flush()
            .map_err(Error::storage("flush", "image", 0))
    }

    /// Clusters that nothing in the file leads to any more become free once no operation that
    /// began before can use them.
    fn retire(&self, frees: Vec<Free>) -> Result<(), Error> {
        let mut state = self.state();
        state.retired.extend(frees);
        if state.retired.is_empty() {
            return Ok(());
        }
        // Two steps put everything behind us, if nobody who began before them is left.
        for _ in 0..2 {
            let [even, odd] = &self.epochs;
            let before = if state.epoch.is_multiple_of(2) {
                odd
            } else {
                even
            };
            if before.load(Ordering::Acquire) == 0 {
                state.epoch += 1;
            }
        }
        let epoch = state.epoch;
        let retired = std::mem::take(&mut state.retired);
        let (ready, waiting) = retired
            .into_iter()
            .partition(|free: &Free| free.epoch + 2 <= epoch);
        state.retired = waiting;
        drop(state);
        self.free_all(ready);
        Ok(())
    }

    /// In parts, so that nobody waits for long.
    fn free_all(&self, frees: Vec<Free>) {
        for free in frees {
            let mut first = free.first.0;
            let end = first + free.count;
            while first < end {
                let part = first..end.min(first + FREE_CLUSTERS_AT_ONCE);
                first = part.end;
                self.free_part(part);
            }
        }
    }

    fn free_part(&self, clusters: Range<u64>) {
        let last_users = self.lower_shared(&mut self.state(), clusters);
        for run in &last_users {
            let start = run.start << self.geometry.cluster_bits;
            let length = (run.end - run.start) << self.geometry.cluster_bits;
            if length < PUNCH_BYTES_MIN {
                continue;
            }
            if let Err(error) = self.storage.punch_hole(start, length) {
                tracing::debug!(start, length, %error, "freed clusters keep their space");
            }
        }
        let mut state = self.state();
        for cluster in last_users.into_iter().flatten() {
            state.lower(&*self.storage, HostCluster(cluster));
        }
    }

    /// Take a user away where there are more; answers with the clusters that have none but this,
    /// in runs. They keep their refcount until their space was given back: nobody gets them before.
    fn lower_shared(&self, state: &mut State, clusters: Range<u64>) -> Vec<Range<u64>> {
        let mut last_users: Vec<Range<u64>> = Vec::new();
        if state.overlaps_metadata(clusters.clone()) {
            // Tables that moved away are guarded no more.
            state.guard_tables();
        }
        for cluster in clusters {
            let count = state.refcounts.get(&*self.storage, HostCluster(cluster));
            if matches!(count, Ok(1)) && state.metadata.contains(&cluster) {
                tracing::warn!(cluster, "guest data lay where a table is: nothing is freed");
                continue;
            }
            if !matches!(count, Ok(1)) {
                state.lower(&*self.storage, HostCluster(cluster));
                continue;
            }
            match last_users.last_mut() {
                Some(run) if run.end == cluster => run.end += 1,
                _ => last_users.push(cluster..cluster + 1),
            }
        }
        last_users
    }

    /// Wait until there is room for more dirty metadata. Nothing is held by the caller but the
    /// shared lock of operations.
    pub(crate) fn make_room(&self) -> Result<(), Error> {
        let crowded = {
            let state = self.state();
            state.l2.dirty() > state.l2.capacity() / 3 || state.frees.len() > FREES_MAX
        };
        match crowded {
            true => self.write_back(),
            false => Ok(()),
        }
    }

    /// Write back everything, freed clusters included: the file is as good as closed.
    pub(crate) fn write_back_all(&self) -> Result<(), Error> {
        self.write_back()?;
        // What became free by that is in the refcounts now.
        let dirty = self.state().refcounts.cache.dirty() > 0;
        match dirty {
            true => self.write_back(),
            false => Ok(()),
        }
    }
}

impl State {
    fn begin_write_back(&mut self) -> WriteBack {
        let slices = self.l2.begin_write();
        let mask = !(self.geometry.cluster_bytes() - 1);
        let (early, late) = slices
            .into_iter()
            .partition(|slice| self.new_tables.contains(&(slice.0 & mask)));
        let l1_entries = std::mem::take(&mut self.l1_dirty);
        let l1_writes = entry_writes(&self.l1, &l1_entries, self.header.l1_offset);
        let (refcount_entries, refcount_writes) = self.refcounts.take_dirty_entries();
        let new_tables = l1_entries.iter().filter_map(|index| {
            let entry = self.l1.get(*index)? & OFFSET_MASK;
            (entry != 0).then_some(entry)
        });
        WriteBack {
            refcounts: self.refcounts.cache.begin_write(),
            new_tables: new_tables.collect(),
            early,
            late,
            refcount_entries,
            refcount_writes,
            l1_entries,
            l1_writes,
            frees: std::mem::take(&mut self.frees),
        }
    }

    fn end_write_back(&mut self, work: &WriteBack, written: bool) {
        self.refcounts.cache.end_write(&work.refcounts, written);
        self.l2.end_write(&work.early, written);
        self.l2.end_write(&work.late, written);
        if written {
            self.new_tables
                .retain(|table| !work.new_tables.contains(table));
            return;
        }
        self.l1_dirty.extend(&work.l1_entries);
        self.refcounts.dirty_entries.extend(&work.refcount_entries);
        let mut frees = work.frees.clone();
        frees.append(&mut self.frees);
        self.frees = frees;
    }
}
