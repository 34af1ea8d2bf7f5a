//! Refcounts: a table of blocks, each a cluster of counts of 1 to 64 bits.
//!
//! ```text
//! refcount table:  8-byte entries  ──▶  block: 1 cluster   counts narrower than a byte fill it
//! entry i stands for clusters             ┌─┬─┬─┬─┬─┐      from its lowest bits up, wider ones
//! i·n to i·n+n-1; 0: all of them free     └─┴─┴─┴─┴─┘      are big-endian
//! ```
//!
//! A block that is added describes itself: it lies in the first cluster that it counts and that is
//! wanted. Its entry in the table is written only after the block is durable, and that before any
//! L2 or L1 entry that relies on it (see the crate's invariants).

use std::collections::BTreeSet;

use crate::bytes::{entries, table};
use crate::cache::SliceCache;
use crate::error::Error;
use crate::header::Header;
use crate::limits::{HOST_BYTES_MAX, REFCOUNT_CACHE_BYTES, REFCOUNT_TABLE_BYTES_MAX};
use crate::storage::Storage;
use crate::types::{Geometry, HostCluster, OFFSET_MASK};

/// One count of a block, or a part of a block that begins with whole bytes.
pub(crate) fn get_count(bytes: &[u8], index: usize, order: u32) -> u64 {
    let whole = |width: usize| {
        let at = index.saturating_mul(width);
        let field = bytes.get(at..at.saturating_add(width)).unwrap_or_default();
        field
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    match order {
        0..=2 => {
            let per_byte = 8 >> order;
            let byte = bytes.get(index / per_byte).copied().unwrap_or_default();
            let shift = (index % per_byte) << order;
            u64::from(byte >> shift) & ((1 << (1 << order)) - 1)
        }
        _ => whole(1 << (order - 3)),
    }
}

/// Set one count; `value` fits.
pub(crate) fn put_count(bytes: &mut [u8], index: usize, order: u32, value: u64) {
    match order {
        0..=2 => {
            let per_byte = 8 >> order;
            let shift = (index % per_byte) << order;
            let mask = ((1_u16 << (1 << order)) - 1) << shift;
            if let Some(byte) = bytes.get_mut(index / per_byte) {
                let [_, mask] = mask.to_be_bytes();
                let [.., value] = (value << shift).to_be_bytes();
                *byte = (*byte & !mask) | (value & mask);
            }
        }
        _ => {
            let width = 1 << (order - 3);
            let value = value.to_be_bytes();
            let field = value.get(8 - width..).unwrap_or_default();
            crate::bytes::put(bytes, index * width, field);
        }
    }
}

#[derive(Debug)]
pub(crate) struct Refcounts {
    geometry: Geometry,
    /// The table; entries that are not in the file yet included.
    pub(crate) table: Vec<u64>,
    /// Entries that are not in the file yet.
    pub(crate) dirty_entries: BTreeSet<usize>,
    pub(crate) table_offset: u64,
    pub(crate) cache: SliceCache,
}

/// A run of counts in one slice.
struct Place {
    slice: u64,
    /// Of the cluster asked for.
    index: usize,
    /// Counts in a slice.
    count: usize,
}

impl Refcounts {
    /// Read the table. The header has been checked; `file_end` is the end of the last cluster.
    pub(crate) fn load(
        storage: &dyn Storage,
        header: &Header,
        file_end: u64,
    ) -> Result<Self, Error> {
        let geometry = header.geometry;
        let table = read_table(
            storage,
            "refcount table",
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters) << geometry.cluster_bits,
            file_end,
        )?;
        for (index, entry) in table.iter().enumerate() {
            let block = entry & OFFSET_MASK;
            if !geometry.is_aligned(block) || block >= file_end.max(1) {
                let at = header.refcount_table_offset + 8 * index as u64;
                let problem = match geometry.is_aligned(block) {
                    true => format!("it leads to byte {block}, past the end of the file"),
                    false => format!("it leads to byte {block}, where no cluster starts"),
                };
                return Err(Error::corrupt("refcount table entry", at, problem));
            }
        }
        // One block for many entries would make a search for free clusters endless.
        let mut blocks: Vec<u64> = table.iter().map(|entry| entry & OFFSET_MASK).collect();
        blocks.retain(|block| *block != 0);
        blocks.sort_unstable();
        let twice = blocks.windows(2).find(|pair| pair.first() == pair.last());
        if let Some([block, ..]) = twice {
            let problem = format!("two entries lead to the block at byte {block}");
            return Err(Error::corrupt(
                "refcount table",
                header.refcount_table_offset,
                problem,
            ));
        }
        Ok(Self {
            geometry,
            table,
            dirty_entries: BTreeSet::new(),
            table_offset: header.refcount_table_offset,
            cache: SliceCache::new(REFCOUNT_CACHE_BYTES, geometry.slice_bytes()),
        })
    }

    /// Which table entry counts a cluster.
    pub(crate) fn block_of(&self, cluster: HostCluster) -> usize {
        let index = cluster.0 / self.geometry.block_refcounts();
        usize::try_from(index).unwrap_or(usize::MAX)
    }

    /// Is there a block that counts this cluster?
    pub(crate) fn is_counted(&self, cluster: HostCluster) -> bool {
        self.block_offset(cluster) != 0
    }

    fn block_offset(&self, cluster: HostCluster) -> u64 {
        let entry = self.table.get(self.block_of(cluster));
        entry.copied().unwrap_or_default() & OFFSET_MASK
    }

    fn place(&self, cluster: HostCluster) -> Option<Place> {
        let block = self.block_offset(cluster);
        if block == 0 {
            return None;
        }
        let geometry = self.geometry;
        let in_block = cluster.0 % geometry.block_refcounts();
        let per_slice = (geometry.slice_bytes() * 8) >> geometry.refcount_order;
        Some(Place {
            slice: block + in_block / per_slice * geometry.slice_bytes(),
            index: usize::try_from(in_block % per_slice).unwrap_or_default(),
            count: usize::try_from(per_slice).unwrap_or_default(),
        })
    }

    fn load_slice(&mut self, storage: &dyn Storage, slice: u64) -> Result<(), Error> {
        if self.cache.contains(slice) {
            return Ok(());
        }
        let length = usize::try_from(self.geometry.slice_bytes()).unwrap_or_default();
        let mut bytes = vec![0; length];
        storage.read_at(&mut bytes, slice).map_err(Error::storage(
            "read",
            "refcount block",
            slice,
        ))?;
        self.insert_slice(storage, slice, bytes)
    }

    /// Counts may reach the file at any time: one that is too high is a leak, and one is lowered
    /// only after nothing in the file needs the old one.
    fn insert_slice(
        &mut self,
        storage: &dyn Storage,
        slice: u64,
        bytes: Vec<u8>,
    ) -> Result<(), Error> {
        let Some((offset, evicted)) = self.cache.insert(slice, bytes, true) else {
            return Ok(());
        };
        storage.write_at(&evicted, offset).map_err(Error::storage(
            "write",
            "refcount block",
            offset,
        ))
    }

    /// The refcount of a cluster.
    pub(crate) fn get(
        &mut self,
        storage: &dyn Storage,
        cluster: HostCluster,
    ) -> Result<u64, Error> {
        let Some(place) = self.place(cluster) else {
            return Ok(0);
        };
        self.load_slice(storage, place.slice)?;
        let bytes = self.cache.get(place.slice).unwrap_or_default();
        Ok(get_count(bytes, place.index, self.geometry.refcount_order))
    }

    /// Set the refcount of a cluster that is counted by a block.
    pub(crate) fn set(
        &mut self,
        storage: &dyn Storage,
        cluster: HostCluster,
        value: u64,
    ) -> Result<(), Error> {
        let offset = self.geometry.host(cluster).0;
        if value > self.geometry.refcount_max() {
            let max = self.geometry.refcount_max();
            return Err(Error::RefcountOverflow { offset, max });
        }
        let Some(place) = self.place(cluster) else {
            let problem = format!("no block counts the cluster at byte {offset}");
            return Err(Error::corrupt("refcount table", self.table_offset, problem));
        };
        self.load_slice(storage, place.slice)?;
        if let Some(bytes) = self.cache.get_mut(place.slice) {
            put_count(bytes, place.index, self.geometry.refcount_order, value);
        }
        Ok(())
    }

    /// The first run of free clusters at or after `from`, at most `max` long. Ends at a place that
    /// no block counts: there everything is free, but a block must be made first.
    pub(crate) fn find_free(
        &mut self,
        storage: &dyn Storage,
        from: HostCluster,
        max: u64,
    ) -> Result<(HostCluster, u64), Error> {
        let mut cluster = from.0;
        let mut start = None;
        let order = self.geometry.refcount_order;
        loop {
            let Some(place) = self.place(HostCluster(cluster)) else {
                let first = start.unwrap_or(cluster);
                return Ok((HostCluster(first), cluster - first));
            };
            self.load_slice(storage, place.slice)?;
            let bytes = self.cache.get(place.slice).unwrap_or_default();
            for index in place.index..place.count {
                let free = get_count(bytes, index, order) == 0;
                match (free, start) {
                    (true, None) => start = Some(cluster),
                    (false, Some(first)) => return Ok((HostCluster(first), cluster - first)),
                    _ => {}
                }
                cluster += 1;
                if let Some(first) = start
                    && cluster - first >= max
                {
                    return Ok((HostCluster(first), cluster - first));
                }
            }
            if cluster << self.geometry.cluster_bits >= HOST_BYTES_MAX {
                return Err(Error::TooLarge {
                    structure: "image file",
                    wanted: HOST_BYTES_MAX,
                    max: HOST_BYTES_MAX,
                });
            }
        }
    }

    /// The first cluster behind everything that is counted.
    pub(crate) fn first_uncounted(&self) -> HostCluster {
        let blocks = self
            .table
            .iter()
            .rposition(|entry| entry & OFFSET_MASK != 0);
        let blocks = blocks.map_or(0, |last| last as u64 + 1);
        HostCluster(blocks * self.geometry.block_refcounts())
    }

    /// Let `cluster` be the block of a table entry that has none, and give it refcount 1. It reads
    /// as zeroes in the file, and this block or an older one counts it.
    pub(crate) fn add_block(
        &mut self,
        storage: &dyn Storage,
        index: usize,
        cluster: HostCluster,
    ) -> Result<(), Error> {
        let offset = self.geometry.host(cluster).0;
        let slice_bytes = self.geometry.slice_bytes();
        self.cache
            .forget(offset..offset + self.geometry.cluster_bytes(), slice_bytes);
        if let Some(entry) = self.table.get_mut(index) {
            *entry = offset;
            self.dirty_entries.insert(index);
        }
        self.set(storage, cluster, 1)
    }

    /// Move the table to a larger one, with the clusters from `place` on for it and for the blocks
    /// that count them. No block counts anything from `place` on. Everything that the new table
    /// relies on is durable when the header is switched.
    ///
    /// Answers with the clusters of the old table, to be freed.
    pub(crate) fn grow_table(
        &mut self,
        storage: &dyn Storage,
        header: &mut Header,
        place: HostCluster,
    ) -> Result<(HostCluster, u64), Error> {
        let geometry = self.geometry;
        let per_block = geometry.block_refcounts();
        let per_cluster = geometry.l2_entries();
        // Half as much again if that is allowed, and enough to count itself and its blocks.
        let first_block = place.0 / per_block;
        let mut clusters = (self.table.len() as u64 * 3 / 2 / per_cluster + 1)
            .min(REFCOUNT_TABLE_BYTES_MAX >> geometry.cluster_bits)
            .max((first_block + 1).div_ceil(per_cluster));
        let (blocks, clusters) = loop {
            let mut blocks = 1;
            while first_block + blocks < (place.0 + blocks + clusters).div_ceil(per_block) {
                blocks += 1;
            }
            if first_block + blocks <= clusters * per_cluster {
                break (blocks, clusters);
            }
            clusters += 1;
        };
        let wanted = clusters << geometry.cluster_bits;
        if wanted > REFCOUNT_TABLE_BYTES_MAX {
            return Err(Error::TooLarge {
                structure: "refcount table",
                wanted,
                max: REFCOUNT_TABLE_BYTES_MAX,
            });
        }
        let mut table = self.table.clone();
        table.resize(
            usize::try_from(clusters * per_cluster).unwrap_or_default(),
            0,
        );
        let failed = |operation, offset| Error::storage(operation, "refcount table", offset);
        let mut used = place.0..place.0 + blocks + clusters;
        for block in 0..blocks {
            let first = (first_block + block) * per_block;
            let mut bytes = vec![0; usize::try_from(geometry.cluster_bytes()).unwrap_or_default()];
            while used.start < (first + per_block).min(used.end) {
                let index = usize::try_from(used.start - first).unwrap_or_default();
                put_count(&mut bytes, index, geometry.refcount_order, 1);
                used.start += 1;
            }
            let offset = geometry.host(HostCluster(place.0 + block)).0;
            storage
                .write_at(&bytes, offset)
                .map_err(failed("write", offset))?;
            let index = usize::try_from(first_block + block).unwrap_or(usize::MAX);
            if let Some(entry) = table.get_mut(index) {
                *entry = offset;
            }
        }
        let table_offset = geometry.host(HostCluster(place.0 + blocks)).0;
        storage
            .write_at(&crate::bytes::table(&table), table_offset)
            .map_err(failed("write", table_offset))?;
        // Blocks that only the new table leads to.
        for (offset, bytes) in self.cache.peek_unwritten() {
            storage
                .write_at(&bytes, offset)
                .map_err(failed("write", offset))?;
        }
        storage.flush().map_err(failed("flush", table_offset))?;
        let old = (
            HostCluster(header.refcount_table_offset >> geometry.cluster_bits),
            u64::from(header.refcount_table_clusters),
        );
        let mut switched = header.clone();
        switched.refcount_table_offset = table_offset;
        switched.refcount_table_clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
        switched.write(storage)?;
        storage.flush().map_err(failed("flush", table_offset))?;
        *header = switched;
        self.table = table;
        self.table_offset = table_offset;
        self.dirty_entries.clear();
        let slice_bytes = geometry.slice_bytes();
        let area = geometry.host(place).0..table_offset;
        self.cache.forget(area, slice_bytes);
        Ok(old)
    }

    /// The runs of table entries that are not in the file, as bytes with their places.
    pub(crate) fn take_dirty_entries(&mut self) -> (BTreeSet<usize>, Vec<(u64, Vec<u8>)>) {
        let taken = std::mem::take(&mut self.dirty_entries);
        let writes = entry_writes(&self.table, &taken, self.table_offset);
        (taken, writes)
    }
}

/// Writes that bring single entries of a table into the file.
pub(crate) fn entry_writes(
    entries: &[u64],
    dirty: &BTreeSet<usize>,
    table_offset: u64,
) -> Vec<(u64, Vec<u8>)> {
    let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
    for &index in dirty {
        let Some(entry) = entries.get(index) else {
            continue;
        };
        let offset = table_offset + 8 * index as u64;
        match writes.last_mut() {
            Some((start, bytes)) if *start + bytes.len() as u64 == offset => {
                bytes.extend_from_slice(&entry.to_be_bytes());
            }
            _ => writes.push((offset, table(&[*entry]))),
        }
    }
    writes
}

/// Read a table of 8-byte entries, `length` bytes (within its limit), that must lie in the file.
pub(crate) fn read_table(
    storage: &dyn Storage,
    structure: &'static str,
    offset: u64,
    length: u64,
    file_end: u64,
) -> Result<Vec<u64>, Error> {
    if offset.checked_add(length).is_none_or(|end| end > file_end) {
        let problem = format!("its {length} bytes reach past the end of the file ({file_end})");
        return Err(Error::corrupt(structure, offset, problem));
    }
    let mut bytes = vec![0; usize::try_from(length).unwrap_or_default()];
    storage
        .read_at(&mut bytes, offset)
        .map_err(Error::storage("read", structure, offset))?;
    Ok(entries(&bytes))
}
