//! An open image: looking things up, and reading.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmferry_disk::{BlockDevice, Cached};

use crate::bytes::be64;
use crate::compressed::Decompressor;
use crate::error::Error;
use crate::flush::Flushes;
use crate::header::{CORRUPT, DIRTY, Header};
use crate::limits::{L2_CACHE_BYTES, LOOK_UP_CLUSTERS_MAX, SEGMENTS_MAX};
use crate::operations::{Operation, Operations};
use crate::state::State;
use crate::storage::Storage;
use crate::types::{
    Geometry, GuestCluster, GuestOffset, HostOffset, L1Index, Mapping, OFFSET_MASK,
};

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Refuse writes, and change nothing in the file.
    pub read_only: bool,
    /// Memory for slices of L2 tables; at least 16 slices are kept.
    pub l2_cache_bytes: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            l2_cache_bytes: L2_CACHE_BYTES,
        }
    }
}

/// An open image: a disk whose clusters lie anywhere in a file.
///
/// Callable from any number of threads. Dropping it writes back what is dirty; errors of that are
/// only logged, so call [`Qcow2Disk::close`] to learn of them.
pub struct Qcow2Disk {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) geometry: Geometry,
    pub(crate) read_only: bool,
    /// What lies below, if there is a backing file.
    pub(crate) backing: Option<Arc<dyn BlockDevice>>,
    pub(crate) backing_bytes: u64,
    /// Length of the disk.
    pub(crate) disk_bytes: AtomicU64,
    pub(crate) operations: Operations,
    pub(crate) state: Mutex<State>,
    /// An operation in flight has ended.
    pub(crate) ended: Condvar,
    /// Operations under way that began in an even and in an odd epoch.
    pub(crate) epochs: [AtomicUsize; 2],
    pub(crate) flushes: Flushes,
    /// Something was written since the last flush of the file began.
    pub(crate) unsynced: AtomicBool,
    /// The header says that the image was changed by us.
    pub(crate) announced: AtomicBool,
    pub(crate) decompressor: Decompressor,
}

impl std::fmt::Debug for Qcow2Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2Disk")
            .field("geometry", &self.geometry)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

/// A run of guest bytes of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) length: u64,
    pub(crate) kind: SegmentKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentKind {
    Unallocated,
    /// Reads as zeroes, without a cluster.
    Zero,
    /// Reads as zeroes, with a cluster.
    ZeroAllocated,
    Data {
        host: u64,
    },
    Compressed {
        host: HostOffset,
        bytes: u64,
        /// So many bytes into the cluster.
        skip: u64,
    },
}

/// What a look-up could not find in memory.
pub(crate) struct Miss {
    pub(crate) slice: u64,
}

/// Counts an operation as under way: clusters that it looked up stay what they are.
pub(crate) struct Epoch<'a>(&'a AtomicUsize);

impl Drop for Epoch<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Qcow2Disk {
    /// Open an image that lies in `storage`, on top of `backing`.
    ///
    /// There must be a `backing` if and only if the header names a backing file; see
    /// [`crate::open`] for a function that opens that too. An image whose dirty bit is set is
    /// repaired first; one that is marked as corrupt can only be read.
    pub fn open(
        storage: Arc<dyn Storage>,
        options: OpenOptions,
        backing: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self, Error> {
        let mut header = Header::read(&*storage)?;
        header.backing_format()?;
        if header.backing_name.is_some() != backing.is_some() {
            let (name, problem) = match &header.backing_name {
                Some(name) => (name.clone(), "it was not opened"),
                None => (String::new(), "the header names none"),
            };
            return Err(Error::Backing {
                name,
                problem: problem.into(),
            });
        }
        if !options.read_only {
            if header.incompatible & CORRUPT != 0 {
                return Err(Error::MarkedCorrupt);
            }
            if header.incompatible & DIRTY != 0 {
                crate::check::repair_dirty(&*storage)?;
                header = Header::read(&*storage)?;
            }
        }
        let decompressor = Decompressor::new(header.compression, header.geometry);
        let state = State::load(&*storage, header, options.l2_cache_bytes)?;
        Ok(Self {
            geometry: state.geometry,
            read_only: options.read_only,
            backing_bytes: backing.as_ref().map_or(0, |disk| disk.limits().length),
            backing,
            disk_bytes: AtomicU64::new(state.header.disk_bytes),
            operations: Operations::default(),
            state: Mutex::new(state),
            ended: Condvar::new(),
            epochs: [AtomicUsize::new(0), AtomicUsize::new(0)],
            flushes: Flushes::default(),
            unsynced: AtomicBool::new(false),
            announced: AtomicBool::new(false),
            decompressor,
            storage,
        })
    }

    /// Version, cluster size, refcount width.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The header as it is now.
    #[must_use]
    pub fn header(&self) -> Header {
        self.state().header.clone()
    }

    /// Length of the disk in bytes.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes.load(Ordering::Acquire)
    }

    /// The disk below this one.
    #[must_use]
    pub fn backing(&self) -> Option<&Arc<dyn BlockDevice>> {
        self.backing.as_ref()
    }

    /// A poisoned lock is taken all the same: what it guards is whole between statements.
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every operation holds this while it runs. Never taken twice by one thread.
    pub(crate) fn operation(&self) -> Operation<'_> {
        self.operations.begin()
    }

    pub(crate) fn check_range(&self, offset: u64, length: u64) -> Result<(), Error> {
        let disk_bytes = self.disk_bytes();
        let end = offset.saturating_add(length);
        if end > disk_bytes || offset.checked_add(length).is_none() {
            return Err(Error::PastEnd {
                offset,
                end,
                length: disk_bytes,
            });
        }
        Ok(())
    }

    /// Called with the state locked, together with the look-up.
    pub(crate) fn enter_epoch(&self, state: &State) -> Epoch<'_> {
        let [even, odd] = &self.epochs;
        let counter = if state.epoch.is_multiple_of(2) {
            even
        } else {
            odd
        };
        counter.fetch_add(1, Ordering::Acquire);
        Epoch(counter)
    }

    /// Read a slice of an L2 table without holding the lock, then put it into the cache.
    ///
    /// Returns with the lock held, because what was loaded may be thrown out otherwise.
    pub(crate) fn load(&self, miss: &Miss) -> Result<MutexGuard<'_, State>, Error> {
        for _ in 0..3 {
            let before = self.state().l2.unloads();
            let bytes = self.read_slice(miss.slice)?;
            let mut state = self.state();
            if state.l2.contains(miss.slice) {
                return Ok(state);
            }
            // If slices were thrown out meanwhile, a newer form of this one may be in the file.
            if state.l2.unloads() == before {
                state.l2.insert(miss.slice, bytes, false);
                return Ok(state);
            }
        }
        let mut state = self.state();
        self.load_locked(&mut state, miss)?;
        Ok(state)
    }

    /// The same with the lock held.
    pub(crate) fn load_locked(&self, state: &mut State, miss: &Miss) -> Result<(), Error> {
        if !state.l2.contains(miss.slice) {
            let bytes = self.read_slice(miss.slice)?;
            state.l2.insert(miss.slice, bytes, false);
        }
        Ok(())
    }

    fn read_slice(&self, offset: u64) -> Result<Vec<u8>, Error> {
        let length = usize::try_from(self.geometry.slice_bytes()).unwrap_or_default();
        let mut bytes = vec![0; length];
        self.storage
            .read_at(&mut bytes, offset)
            .map_err(Error::storage("read", "L2 table", offset))?;
        Ok(bytes)
    }

    /// What the bytes from `guest` on are: at least a part of them, or what must be loaded first.
    pub(crate) fn look_up(
        &self,
        state: &mut State,
        guest: u64,
        length: u64,
        segments: &mut Vec<Segment>,
    ) -> Result<Option<Miss>, Error> {
        segments.clear();
        let mut at = guest;
        let end = guest.saturating_add(length);
        for _ in 0..LOOK_UP_CLUSTERS_MAX {
            if at >= end || segments.len() >= SEGMENTS_MAX {
                break;
            }
            let cluster = self.geometry.guest_cluster(GuestOffset(at));
            let (l1, _) = self.geometry.entry_place(cluster);
            let Some(_) = state.table_of(l1) else {
                let coverage = self.geometry.l1_coverage();
                let table_end = (at / coverage + 1).saturating_mul(coverage);
                let length = table_end.min(end) - at;
                push(segments, length, SegmentKind::Unallocated);
                at += length;
                continue;
            };
            let mapping = match state.mapping(cluster)? {
                Ok(mapping) => mapping,
                Err(miss) if segments.is_empty() => return Ok(Some(miss)),
                Err(_) => break,
            };
            let start = self.geometry.guest(cluster).0;
            let skip = at - start;
            let length = (start + self.geometry.cluster_bytes()).min(end) - at;
            let kind = match mapping {
                Mapping::Unallocated => SegmentKind::Unallocated,
                Mapping::Zero { host: None, .. } => SegmentKind::Zero,
                Mapping::Zero { .. } => SegmentKind::ZeroAllocated,
                Mapping::Data { host, .. } => SegmentKind::Data {
                    host: host.0 + skip,
                },
                Mapping::Compressed { host, bytes } => {
                    SegmentKind::Compressed { host, bytes, skip }
                }
            };
            push(segments, length, kind);
            at += length;
        }
        Ok(None)
    }

    /// Look up with the lock held only as long as it takes; what was found stays until the answer
    /// is dropped.
    pub(crate) fn find(
        &self,
        guest: u64,
        length: u64,
        segments: &mut Vec<Segment>,
    ) -> Result<Epoch<'_>, Error> {
        let mut state = self.state();
        while let Some(miss) = self.look_up(&mut state, guest, length, segments)? {
            drop(state);
            state = self.load(&miss)?;
        }
        Ok(self.enter_epoch(&state))
    }

    /// Read guest bytes. The range may end behind the disk's length, not behind its tables.
    pub(crate) fn read_range(&self, mut buf: &mut [u8], mut guest: u64) -> Result<(), Error> {
        let mut segments = Vec::new();
        while !buf.is_empty() {
            let _epoch = self.find(guest, buf.len() as u64, &mut segments)?;
            for segment in &segments {
                let length = usize::try_from(segment.length).unwrap_or(usize::MAX);
                let (part, rest) = buf.split_at_mut_checked(length).unwrap_or_default();
                self.read_segment(segment.kind, part, guest)?;
                guest += segment.length;
                buf = rest;
            }
        }
        Ok(())
    }

    fn read_segment(&self, kind: SegmentKind, buf: &mut [u8], guest: u64) -> Result<(), Error> {
        match kind {
            SegmentKind::Unallocated => self.read_backing(buf, guest),
            SegmentKind::Zero | SegmentKind::ZeroAllocated => {
                buf.fill(0);
                Ok(())
            }
            SegmentKind::Data { host } => self
                .storage
                .read_at(buf, host)
                .map_err(Error::storage("read", "data", host)),
            SegmentKind::Compressed { host, bytes, skip } => {
                self.decompressor
                    .read(&*self.storage, host, bytes, skip, buf)
            }
        }
    }

    /// What lies below; behind its end, or without it, zeroes.
    pub(crate) fn read_backing(&self, buf: &mut [u8], guest: u64) -> Result<(), Error> {
        let below = self.backing_bytes.saturating_sub(guest);
        let below = usize::try_from(below).unwrap_or(usize::MAX).min(buf.len());
        let (from_backing, zeroes) = buf.split_at_mut_checked(below).unwrap_or_default();
        zeroes.fill(0);
        match &self.backing {
            Some(backing) if !from_backing.is_empty() => backing
                .read_at(from_backing, guest)
                .map_err(Error::BackingIo),
            _ => Ok(()),
        }
    }

    /// Read what is in memory, without waiting for the medium or for a lock.
    pub(crate) fn read_cached(&self, buf: &mut [u8], guest: u64) -> Result<Cached, Error> {
        let Ok(mut state) = self.state.try_lock() else {
            return Ok(Cached::Miss);
        };
        let mut segments = Vec::new();
        if self
            .look_up(&mut state, guest, buf.len() as u64, &mut segments)?
            .is_some()
        {
            return Ok(Cached::Miss);
        }
        let _epoch = self.enter_epoch(&state);
        drop(state);
        let Some(first) = segments.first() else {
            return Ok(Cached::Miss);
        };
        let length = usize::try_from(first.length).unwrap_or(usize::MAX);
        let length = length.min(buf.len());
        let part = buf.get_mut(..length).unwrap_or_default();
        match first.kind {
            SegmentKind::Zero | SegmentKind::ZeroAllocated => {
                part.fill(0);
                Ok(Cached::Hit(length))
            }
            SegmentKind::Data { host } => self
                .storage
                .read_cached_at(part, host)
                .map_err(Error::storage("read", "data", host)),
            SegmentKind::Unallocated if guest >= self.backing_bytes => {
                part.fill(0);
                Ok(Cached::Hit(length))
            }
            SegmentKind::Unallocated => {
                let below = usize::try_from(self.backing_bytes - guest).unwrap_or(usize::MAX);
                let part = part.get_mut(..length.min(below)).unwrap_or_default();
                match &self.backing {
                    Some(backing) => backing
                        .read_cached_at(part, guest)
                        .map_err(Error::BackingIo),
                    None => Ok(Cached::Miss),
                }
            }
            SegmentKind::Compressed { .. } => Ok(Cached::Miss),
        }
    }

    /// Does the disk below have these bytes?
    pub(crate) fn is_backed(&self, guest: &Range<u64>) -> bool {
        guest.start < self.backing_bytes
    }
}

impl State {
    /// Where the L2 table of an L1 entry is.
    pub(crate) fn table_of(&self, index: L1Index) -> Option<HostOffset> {
        let entry = self.l1.get(index.0)? & OFFSET_MASK;
        (entry != 0).then_some(HostOffset(entry))
    }

    /// The L2 entry of a cluster, with its place in the file.
    pub(crate) fn entry(&mut self, cluster: GuestCluster) -> Result<(u64, HostOffset), Miss> {
        let (l1, place) = self.geometry.entry_place(cluster);
        let Some(table) = self.table_of(l1) else {
            return Ok((0, HostOffset(0)));
        };
        let slice_bytes = self.geometry.slice_bytes();
        let slice = table.0 + place / slice_bytes * slice_bytes;
        let Some(bytes) = self.l2.get(slice) else {
            return Err(Miss { slice });
        };
        let in_slice = usize::try_from(place % slice_bytes).unwrap_or_default();
        Ok((be64(bytes, in_slice), HostOffset(table.0 + place)))
    }

    /// What a cluster of the disk is: checked, or what must be loaded first.
    pub(crate) fn mapping(
        &mut self,
        cluster: GuestCluster,
    ) -> Result<Result<Mapping, Miss>, Error> {
        let (entry, at) = match self.entry(cluster) {
            Ok(found) => found,
            Err(miss) => return Ok(Err(miss)),
        };
        let mapping = self.geometry.decode_l2(entry, at)?;
        let clusters = mapping.host_clusters(self.geometry);
        if clusters.end > self.file_end >> self.geometry.cluster_bits {
            let offset = clusters.start << self.geometry.cluster_bits;
            let problem = format!("it leads to byte {offset}, past the end of the file");
            return Err(Error::corrupt("L2 entry", at.0, problem));
        }
        Ok(Ok(mapping))
    }
}

fn push(segments: &mut Vec<Segment>, length: u64, kind: SegmentKind) {
    if let Some(last) = segments.last_mut() {
        let goes_on = match (last.kind, kind) {
            (SegmentKind::Data { host }, SegmentKind::Data { host: next }) => {
                host + last.length == next
            }
            (SegmentKind::Compressed { .. }, _) => false,
            (before, now) => before == now,
        };
        if goes_on {
            last.length += length;
            return;
        }
    }
    segments.push(Segment { length, kind });
}
