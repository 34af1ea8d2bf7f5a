//! The VM state of a snapshot: bytes that lie behind the end of the disk, as if it went on.
//!
//! ```text
//! virtual offset   0 ─── disk ─── S ┄┄┄ ceil(S / P)·P ─── VM state ───▶     P: bytes behind one
//!                                       byte 0 of the state                 entry of the L1 table
//! ```
//!
//! It is written to the disk itself, and belongs to a snapshot from when that is made; the disk
//! loses it then. It is read through the tables of the snapshot.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bytes::entries;
use crate::check::read_cluster;
use crate::disk::Qcow2Disk;
use crate::error::Error;
use crate::limits::{L1_BYTES_MAX, RUN_BYTES_MAX, VM_STATE_L2_BYTES};
use crate::snapshot::no_such;
use crate::snapshot_table::SnapshotEntry;
use crate::types::{GuestOffset, HostOffset, Mapping, OFFSET_MASK};

impl Qcow2Disk {
    /// Write a VM state, for a snapshot to be made next. What was written by another writer before
    /// is dropped, and so is what this one wrote if the disk changes its length or a snapshot is
    /// made, applied or deleted meanwhile.
    pub fn vm_state_writer(&self) -> Result<VmStateWriter<'_>, Error> {
        let _alone = self.operations.alone();
        self.before_change()?;
        self.drop_vm_state()?;
        let mut state = self.state();
        state.vm_state_writer += 1;
        let chunk_bytes = RUN_BYTES_MAX.max(self.geometry.cluster_bytes());
        Ok(VmStateWriter {
            disk: self,
            number: state.vm_state_writer,
            start: self.geometry.vm_state_start(self.disk_bytes()),
            written: 0,
            chunk_bytes: usize::try_from(chunk_bytes).unwrap_or_default(),
            chunk: Vec::new(),
        })
    }

    /// Read the VM state of a snapshot from front to back. `name` is an id, or else a name.
    pub fn vm_state_reader(&self, name: &str) -> Result<VmStateReader<'_>, Error> {
        Ok(VmStateReader {
            disk: self,
            place: Place::find(self, name)?,
            at: 0,
        })
    }

    /// The VM state of a snapshot, to be read at any place by several threads. `name` is an id, or
    /// else a name.
    pub fn vm_state(self: Arc<Self>, name: &str) -> Result<VmState, Error> {
        let place = Place::find(&self, name)?;
        Ok(VmState { disk: self, place })
    }

    /// Let the active L1 table cover this many bytes.
    fn cover(&self, bytes: u64) -> Result<(), Error> {
        let needed = self.geometry.l1_entries(bytes);
        let mut entries = self.state().l1.len() as u64;
        if needed <= entries {
            return Ok(());
        }
        let max = L1_BYTES_MAX / 8;
        if needed > max {
            return Err(Error::TooLarge {
                structure: "L1 table",
                wanted: needed * 8,
                max: L1_BYTES_MAX,
            });
        }
        while entries < needed {
            entries = (entries * 3).div_ceil(2).max(1);
        }
        let _alone = self.operations.alone();
        self.move_l1(entries.min(max))
    }
}

/// Writes a VM state of any length. [`VmStateWriter::finish`] says how long it was.
#[must_use = "nothing is kept of a state that is not finished"]
#[derive(Debug)]
pub struct VmStateWriter<'a> {
    disk: &'a Qcow2Disk,
    /// Which writer this is: only the last one may write.
    number: u64,
    /// Where the state begins on the disk.
    start: u64,
    /// Bytes that were written there: whole clusters.
    written: u64,
    /// The chunk is written when it has as many bytes.
    chunk_bytes: usize,
    chunk: Vec<u8>,
}

impl VmStateWriter<'_> {
    /// Write what is left. Answers with the length of the state, for
    /// [`NewSnapshot::vm_state_bytes`](crate::NewSnapshot::vm_state_bytes).
    pub fn finish(mut self) -> Result<u64, Error> {
        let length = self.written + self.chunk.len() as u64;
        self.write_chunk()?;
        Ok(length)
    }

    /// Write the chunk, filled up to whole clusters: nothing that was there before is kept.
    fn write_chunk(&mut self) -> Result<(), Error> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let whole = self.disk.geometry.cluster_end(self.chunk.len() as u64);
        self.chunk
            .resize(usize::try_from(whole).unwrap_or_default(), 0);
        let at = self.start + self.written;
        self.disk.cover(at + whole)?;
        let _operation = self.disk.operation();
        if self.disk.state().vm_state_writer != self.number {
            return Err(Error::VmStateDropped);
        }
        self.disk.before_change()?;
        self.disk.write_range(&self.chunk, at)?;
        self.written += whole;
        self.chunk.clear();
        Ok(())
    }
}

impl Write for VmStateWriter<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.chunk.len() >= self.chunk_bytes {
            self.write_chunk().map_err(Error::into_io)?;
        }
        let room = self.chunk_bytes.saturating_sub(self.chunk.len());
        let part = buf.get(..room.min(buf.len())).unwrap_or_default();
        self.chunk.extend_from_slice(part);
        Ok(part.len())
    }

    /// Does nothing: a state is whole, and durable, when a snapshot was made with it.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the VM state of a snapshot. The snapshot may be deleted meanwhile, then reading fails.
#[derive(Debug)]
pub struct VmStateReader<'a> {
    disk: &'a Qcow2Disk,
    place: Place,
    /// Next byte of the state.
    at: u64,
}

impl VmStateReader<'_> {
    /// Length of the state in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.place.entry.vm_state_bytes
    }
}

impl Read for VmStateReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.place.read_some(self.disk, self.at, buf);
        let read = read.map_err(Error::into_io)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// The VM state of a snapshot, read at any place by several threads. The snapshot may be deleted
/// meanwhile, then reading fails.
#[derive(Debug)]
pub struct VmState {
    disk: Arc<Qcow2Disk>,
    place: Place,
}

impl VmState {
    /// The snapshot's entry in the table.
    #[must_use]
    pub fn entry(&self) -> &SnapshotEntry {
        &self.place.entry
    }

    /// Fill `buf` from byte `at` of the state on; fails with [`io::ErrorKind::UnexpectedEof`] if it
    /// has too few bytes.
    pub fn read_at(&self, mut buf: &mut [u8], mut at: u64) -> io::Result<()> {
        while !buf.is_empty() {
            let read = self.place.read_some(&self.disk, at, buf);
            let read = read.map_err(Error::into_io)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            at += read as u64;
            buf = buf.get_mut(read..).unwrap_or_default();
        }
        Ok(())
    }
}

/// Where the VM state of a snapshot is.
#[derive(Debug)]
struct Place {
    entry: SnapshotEntry,
    l1: Vec<u64>,
    /// Where the state begins on the disk of the snapshot.
    start: u64,
    tables: Mutex<Tables>,
}

/// L2 tables that were used before, by their place in the file; the last one used comes last.
#[derive(Debug, Default)]
struct Tables(VecDeque<(u64, Arc<[u64]>)>);

/// The run of clusters that a byte of the state begins.
struct Run {
    mapping: Mapping,
    /// From the start of the first cluster on.
    bytes: u64,
}

impl Place {
    fn find(disk: &Qcow2Disk, name: &str) -> Result<Self, Error> {
        let _operation = disk.operation();
        let state = disk.state();
        let index = state.snapshots.find(name)?;
        let entry = state.snapshots.entries.get(index).cloned();
        let entry = entry.ok_or_else(|| no_such(name.as_bytes()))?;
        let at = state.header.snapshots_offset;
        drop(state);
        let disk_bytes = entry.disk_bytes.unwrap_or(disk.disk_bytes());
        let start = disk.geometry.vm_state_start(disk_bytes);
        let coverage = disk.geometry.l1_coverage();
        let covered = u64::from(entry.l1_entries).saturating_mul(coverage);
        let covered = covered.saturating_sub(start);
        if entry.vm_state_bytes > covered {
            let problem = format!(
                "snapshot {:?} has {} bytes of VM state, but tables for {covered} only",
                String::from_utf8_lossy(&entry.name),
                entry.vm_state_bytes
            );
            return Err(Error::corrupt("snapshot table", at, problem));
        }
        let l1 = disk.read_l1_of(&entry)?;
        Ok(Self {
            entry,
            l1,
            start,
            tables: Mutex::default(),
        })
    }

    /// From byte `at` on, up to as many bytes as the buffer has; none at the end.
    fn read_some(&self, disk: &Qcow2Disk, at: u64, buf: &mut [u8]) -> Result<usize, Error> {
        let left = self.entry.vm_state_bytes.saturating_sub(at);
        let length = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        if length == 0 {
            return Ok(0);
        }
        let _operation = disk.operation();
        let file_end = {
            // What the snapshot has stays as it is while it is there.
            let state = disk.state();
            if !state.snapshots.entries.contains(&self.entry) {
                return Err(no_such(&self.entry.name));
            }
            state.file_end
        };
        let guest = self.start + at;
        let run = self.run(disk, file_end, guest, length)?;
        let skip = guest - disk.geometry.cluster_start(guest);
        let length = length.min(usize::try_from(run.bytes - skip).unwrap_or(usize::MAX));
        let part = buf.get_mut(..length).unwrap_or_default();
        match run.mapping {
            Mapping::Unallocated | Mapping::Zero { .. } => part.fill(0),
            Mapping::Data { host, .. } => disk
                .storage
                .read_at(part, host.0 + skip)
                .map_err(Error::storage("read", "VM state", host.0))?,
            Mapping::Compressed { host, bytes } => {
                disk.decompressor
                    .read(&*disk.storage, host, bytes, skip, part)?;
            }
        }
        Ok(length)
    }

    /// What the cluster of a byte is, and the run of clusters that follow it in the file; of not many
    /// more than are wanted.
    fn run(
        &self,
        disk: &Qcow2Disk,
        file_end: u64,
        guest: u64,
        wanted: usize,
    ) -> Result<Run, Error> {
        let geometry = disk.geometry;
        let cluster_bytes = geometry.cluster_bytes();
        let mapping = self.mapping(disk, file_end, guest)?;
        let mut bytes = cluster_bytes;
        let Mapping::Data { host, .. } = mapping else {
            return Ok(Run { mapping, bytes });
        };
        let start = geometry.cluster_start(guest);
        while bytes < wanted as u64 + cluster_bytes && bytes < RUN_BYTES_MAX {
            match self.mapping(disk, file_end, start + bytes)? {
                Mapping::Data { host: next, .. } if next.0 == host.0 + bytes => {
                    bytes += cluster_bytes;
                }
                _ => break,
            }
        }
        Ok(Run { mapping, bytes })
    }

    fn mapping(&self, disk: &Qcow2Disk, file_end: u64, guest: u64) -> Result<Mapping, Error> {
        let geometry = disk.geometry;
        let (l1, place) = geometry.entry_place(geometry.guest_cluster(GuestOffset(guest)));
        let table = self.l1.get(l1.0).copied().unwrap_or_default() & OFFSET_MASK;
        if table == 0 {
            return Ok(Mapping::Unallocated);
        }
        let past_end = |structure, at, offset| {
            let problem = format!("it leads to byte {offset}, past the end of the file");
            Err(Error::corrupt(structure, at, problem))
        };
        if !geometry.is_aligned(table) || table >= file_end {
            return past_end("L1 table of a snapshot", self.entry.l1_offset, table);
        }
        let index = usize::try_from(place / 8).unwrap_or(usize::MAX);
        let entry = self.table(disk, table)?.get(index).copied();
        let at = table + place;
        let mapping = geometry.decode_l2(entry.unwrap_or_default(), HostOffset(at))?;
        let clusters = mapping.host_clusters(geometry);
        if clusters.end > file_end >> geometry.cluster_bits {
            let offset = clusters.start << geometry.cluster_bits;
            return past_end("L2 entry", at, offset);
        }
        Ok(mapping)
    }

    fn table(&self, disk: &Qcow2Disk, at: u64) -> Result<Arc<[u64]>, Error> {
        if let Some(found) = self.tables().use_again(at) {
            return Ok(found);
        }
        // Without the lock: others go on with the tables that they have.
        let bytes = read_cluster(&*disk.storage, disk.geometry, "L2 table", at)?;
        let table: Arc<[u64]> = entries(&bytes).into();
        let mut tables = self.tables();
        tables.0.push_back((at, Arc::clone(&table)));
        let max = VM_STATE_L2_BYTES.div_ceil(disk.geometry.cluster_bytes());
        if tables.0.len() as u64 > max {
            tables.0.pop_front();
        }
        Ok(table)
    }

    /// A poisoned lock is taken all the same: a list is whole between statements.
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables {
    fn use_again(&mut self, at: u64) -> Option<Arc<[u64]>> {
        let is_last = self.0.back().is_some_and(|(other, _)| *other == at);
        if !is_last {
            let index = self.0.iter().position(|(other, _)| *other == at)?;
            let found = self.0.remove(index)?;
            self.0.push_back(found);
        }
        self.0.back().map(|(_, table)| Arc::clone(table))
    }
}
