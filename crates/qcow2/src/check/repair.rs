//! Mending refcounts and flags.
//!
//! Leaks are mended where they are: a refcount is lowered in its block. Anything worse gets new
//! blocks and a new table behind the end of the file, and the header is switched when they are
//! durable, so that a stop anywhere leaves the image as it was or as it shall be.

use crate::bytes::table;
use crate::check::walk::Usage;
use crate::check::{Repair, Stored, for_active_entries, read_cluster};
use crate::error::Error;
use crate::header::{CORRUPT, DIRTY, Header};
use crate::limits::REFCOUNT_TABLE_BYTES_MAX;
use crate::refcount::{get_count, put_count};
use crate::storage::Storage;
use crate::types::{COPIED, Geometry, OFFSET_MASK};

pub(super) fn repair(
    storage: &dyn Storage,
    header: &mut Header,
    usage: &mut Usage,
    stored: &Stored,
    repair: Repair,
) -> Result<(), Error> {
    let mut pairs = usage.counts.iter().zip(&stored.counts);
    let rebuild = usage.refcounts_broken || pairs.any(|(used, count)| used > count);
    match (rebuild, repair) {
        (true, Repair::All) => rebuild_refcounts(storage, header, usage)?,
        // Refcounts that can't be trusted don't say what is a leak.
        (true, _) => return Ok(()),
        (false, _) => lower_leaks(storage, header.geometry, usage, stored)?,
    }
    if repair == Repair::All {
        mend_flags(storage, header, usage)?;
        flush(storage)?;
    }
    Ok(())
}

/// Say in the header that the image is as it must be.
pub(super) fn clear_marks(storage: &dyn Storage, header: &mut Header) -> Result<(), Error> {
    header.incompatible &= !(DIRTY | CORRUPT);
    header.write(storage)?;
    flush(storage)
}

fn flush(storage: &dyn Storage) -> Result<(), Error> {
    storage.flush().map_err(Error::storage("flush", "image", 0))
}

/// Lower what is too high, block by block.
fn lower_leaks(
    storage: &dyn Storage,
    geometry: Geometry,
    usage: &Usage,
    stored: &Stored,
) -> Result<(), Error> {
    let per_block = geometry.block_refcounts();
    for (index, entry) in stored.table.iter().enumerate() {
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            continue;
        }
        let mut block = read_cluster(storage, geometry, "refcount block", offset)?;
        let mut changed = false;
        for number in 0..per_block {
            let cluster = index as u64 * per_block + number;
            let cluster = usize::try_from(cluster).unwrap_or(usize::MAX);
            let used = usage.counts.get(cluster).copied().unwrap_or_default();
            let place = usize::try_from(number).unwrap_or_default();
            let order = geometry.refcount_order;
            if get_count(&block, place, order) > u64::from(used) {
                put_count(&mut block, place, order, u64::from(used));
                changed = true;
            }
        }
        if changed {
            storage.write_at(&block, offset).map_err(Error::storage(
                "write",
                "refcount block",
                offset,
            ))?;
        }
    }
    flush(storage)
}

/// New blocks and a new table behind the end of the file, for what is used now; the old ones are
/// free then.
fn rebuild_refcounts(
    storage: &dyn Storage,
    header: &mut Header,
    usage: &mut Usage,
) -> Result<(), Error> {
    let geometry = header.geometry;
    let per_block = geometry.block_refcounts();
    // The old table and its blocks have no use from now on.
    for cluster in std::mem::take(&mut usage.refcount_clusters) {
        if let Some(count) = usage.counts.get_mut(cluster) {
            *count = count.saturating_sub(1);
        }
    }
    let mut counts = usage.counts.clone();
    let max = geometry.refcount_max();
    if let Some(cluster) = counts.iter().position(|count| u64::from(*count) > max) {
        let offset = (cluster as u64) << geometry.cluster_bits;
        return Err(Error::RefcountOverflow { offset, max });
    }
    let end = counts.len() as u64;
    let step = usize::try_from(per_block).unwrap_or(usize::MAX);
    let used_blocks: Vec<bool> = counts
        .chunks(step)
        .map(|chunk| chunk.iter().any(|count| *count > 0))
        .collect();
    let is_used = |block: u64| {
        let known = usize::try_from(block)
            .ok()
            .and_then(|block| used_blocks.get(block));
        known.copied().unwrap_or(false)
    };
    // The new clusters, and the blocks that count them, grow with one another.
    let mut new = 2;
    let (blocks, table_clusters) = loop {
        let all = (end + new).div_ceil(per_block);
        let first_new = end / per_block;
        let blocks: Vec<u64> = (0..all)
            .filter(|block| *block >= first_new || is_used(*block))
            .collect();
        let table_clusters = geometry.clusters(all * 8);
        let needed = blocks.len() as u64 + table_clusters;
        if needed <= new {
            break (blocks, table_clusters);
        }
        new = needed;
    };
    let wanted = table_clusters << geometry.cluster_bits;
    if wanted > REFCOUNT_TABLE_BYTES_MAX {
        return Err(Error::TooLarge {
            structure: "refcount table",
            wanted,
            max: REFCOUNT_TABLE_BYTES_MAX,
        });
    }
    let last = end + blocks.len() as u64 + table_clusters;
    counts.resize(usize::try_from(last).unwrap_or_default(), 1);
    let mut entries = vec![0; usize::try_from(table_clusters * geometry.l2_entries()).unwrap_or(0)];
    for (place, block) in (end..).zip(&blocks) {
        let mut bytes = vec![0; usize::try_from(geometry.cluster_bytes()).unwrap_or_default()];
        let first = usize::try_from(block * per_block).unwrap_or(usize::MAX);
        let known = counts.iter().skip(first).take(step);
        for (index, count) in known.enumerate() {
            put_count(
                &mut bytes,
                index,
                geometry.refcount_order,
                u64::from(*count),
            );
        }
        let offset = place << geometry.cluster_bits;
        storage.write_at(&bytes, offset).map_err(Error::storage(
            "write",
            "refcount block",
            offset,
        ))?;
        let entry = usize::try_from(*block)
            .ok()
            .and_then(|block| entries.get_mut(block));
        if let Some(entry) = entry {
            *entry = offset;
        }
    }
    let offset = (end + blocks.len() as u64) << geometry.cluster_bits;
    storage
        .write_at(&table(&entries), offset)
        .map_err(Error::storage("write", "refcount table", offset))?;
    flush(storage)?;
    header.refcount_table_offset = offset;
    header.refcount_table_clusters = u32::try_from(table_clusters).unwrap_or(u32::MAX);
    header.write(storage)?;
    flush(storage)
}

/// Set COPIED where a cluster has one user, and clear it elsewhere.
fn mend_flags(storage: &dyn Storage, header: &Header, usage: &Usage) -> Result<(), Error> {
    for_active_entries(storage, header, usage.counts.len(), |_, entry, cluster| {
        let alone = usage.counts.get(cluster) == Some(&1);
        Some(match alone {
            true => entry | COPIED,
            false => entry & !COPIED,
        })
    })
}
