//! Checking an image: does every cluster have as many users as its refcount says?
//!
//! Works on the file alone, apart from the code that reads and writes disks, so that each is a
//! test of the other.

mod repair;
mod walk;

use crate::bytes::entries;
use crate::error::Error;
use crate::header::{CORRUPT, DIRTY, Header};
use crate::limits::FINDINGS_MAX;
use crate::refcount::get_count;
use crate::storage::Storage;
use crate::types::{COPIED, Geometry, OFFSET_MASK};
use walk::Usage;

/// What a check may mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: the file is only read.
    None,
    /// Clusters that nobody uses become free.
    Leaks,
    /// Refcounts and flags become right. No guest data is changed.
    All,
}

/// What is wrong with a place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// A cluster has fewer users than its refcount says: space is lost, nothing else.
    Leak,
    /// A cluster has more users than its refcount says: it could be handed out twice.
    Refcount,
    /// An entry leads past the end of the file, or to where no cluster starts.
    OutOfRange,
    /// Two structures lie in one cluster.
    Overlap,
    /// A COPIED flag disagrees with the refcount.
    Copied,
    /// A table can't be made sense of.
    Broken,
}

impl FindingKind {
    /// All kinds, the worst first.
    pub const ALL: [Self; 6] = [
        Self::Broken,
        Self::OutOfRange,
        Self::Overlap,
        Self::Refcount,
        Self::Copied,
        Self::Leak,
    ];
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub kind: FindingKind,
    /// Where in the file: the cluster, or the entry.
    pub offset: u64,
    /// In words.
    pub text: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "byte {}: {}", self.offset, self.text)
    }
}

/// Result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// What was found, at most [`FINDINGS_MAX`] of each kind.
    pub findings: Vec<Finding>,
    /// Number of leaked clusters.
    pub leaks: u64,
    /// Number of COPIED flags that disagree with a refcount that is high enough.
    pub flags: u64,
    /// Number of all other findings.
    pub errors: u64,
    /// Number of findings by [`FindingKind`].
    counts: [u64; FindingKind::ALL.len()],
    /// Findings that were mended.
    pub repaired: u64,
    /// The image says that its refcounts may be wrong.
    pub marked_dirty: bool,
    /// The image says that it is broken.
    pub marked_corrupt: bool,
    /// Clusters of the disk.
    pub guest_clusters: u64,
    /// Clusters of the disk that have a place in the file.
    pub allocated_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// End of the last cluster in use.
    pub image_end: u64,
}

impl CheckReport {
    /// Nothing is wrong, or nothing any more.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.total() == self.repaired && !self.marked_corrupt && !self.marked_dirty
    }

    /// Number of all findings.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.leaks + self.flags + self.errors
    }

    /// Number of findings of a kind, of which only some may be described.
    #[must_use]
    pub fn count(&self, kind: FindingKind) -> u64 {
        self.counts.get(kind as usize).copied().unwrap_or_default()
    }

    fn add(&mut self, kind: FindingKind, offset: u64, text: impl FnOnce() -> String) {
        match kind {
            FindingKind::Leak => self.leaks += 1,
            FindingKind::Copied => self.flags += 1,
            _ => self.errors += 1,
        }
        let Some(count) = self.counts.get_mut(kind as usize) else {
            return;
        };
        *count += 1;
        if *count <= FINDINGS_MAX {
            let text = text();
            self.findings.push(Finding { kind, offset, text });
        }
    }
}

/// Check an image that nobody writes to, and mend what may be mended. Backing files are not
/// looked at.
///
/// An image without a readable header, or with a table of snapshots that can't be read, is an
/// error; anything else is a finding.
pub fn check(storage: &dyn Storage, repair: Repair) -> Result<CheckReport, Error> {
    let mut header = Header::read(storage)?;
    let (mut report, mut usage, stored) = inspect(storage, &header)?;
    if repair == Repair::None {
        return Ok(report);
    }
    repair::repair(storage, &mut header, &mut usage, &stored, repair)?;
    drop((usage, stored));
    // Only a second look tells what is right now.
    let left = match report.total() {
        0 => 0,
        _ => inspect(storage, &header)?.0.total(),
    };
    report.repaired = report.total().saturating_sub(left);
    let marked = report.marked_dirty || report.marked_corrupt;
    if repair == Repair::All && left == 0 && marked {
        repair::clear_marks(storage, &mut header)?;
        report.marked_dirty = false;
        report.marked_corrupt = false;
    }
    Ok(report)
}

fn inspect(storage: &dyn Storage, header: &Header) -> Result<(CheckReport, Usage, Stored), Error> {
    let mut report = CheckReport {
        marked_dirty: header.incompatible & DIRTY != 0,
        marked_corrupt: header.incompatible & CORRUPT != 0,
        ..CheckReport::default()
    };
    let usage = walk::walk(storage, header, &mut report)?;
    let stored = compare(storage, header, &usage, &mut report)?;
    check_flags(storage, header, &stored, &mut report)?;
    Ok((report, usage, stored))
}

/// Make the refcounts of an image right that was not closed by whoever updated them lazily.
pub(crate) fn repair_dirty(storage: &dyn Storage) -> Result<(), Error> {
    let report = check(storage, Repair::All)?;
    if report.is_clean() {
        return Ok(());
    }
    let problem = match report.findings.first() {
        Some(finding) => format!("it was not closed, and can't be repaired: {finding}"),
        None => "it was not closed, and can't be repaired".to_owned(),
    };
    Err(Error::corrupt("image", 0, problem))
}

/// The refcounts as the file has them.
pub(crate) struct Stored {
    pub(crate) table: Vec<u64>,
    /// For each cluster up to the end of the file.
    pub(crate) counts: Vec<u32>,
}

/// Compare the refcounts with the users.
fn compare(
    storage: &dyn Storage,
    header: &Header,
    usage: &Usage,
    report: &mut CheckReport,
) -> Result<Stored, Error> {
    let geometry = header.geometry;
    let per_block = geometry.block_refcounts();
    let mut stored = Stored {
        table: usage.refcount_table.clone(),
        counts: vec![0; usage.counts.len()],
    };
    for (index, entry) in usage.refcount_table.iter().enumerate() {
        let offset = entry & OFFSET_MASK;
        if offset == 0 || !usage.contains(geometry, offset) {
            continue;
        }
        let block = read_cluster(storage, geometry, "refcount block", offset)?;
        let first = index as u64 * per_block;
        for number in 0..per_block {
            let place = usize::try_from(number).unwrap_or_default();
            let count = get_count(&block, place, geometry.refcount_order);
            let cluster = first + number;
            let known = usize::try_from(cluster).unwrap_or(usize::MAX);
            if let Some(slot) = stored.counts.get_mut(known) {
                *slot = u32::try_from(count).unwrap_or(u32::MAX);
            } else if count > 0 {
                let at = cluster << geometry.cluster_bits;
                report.add(FindingKind::Leak, at, || {
                    format!("refcount {count} past the end of the file")
                });
            }
        }
    }
    for (cluster, (used, count)) in usage.counts.iter().zip(&stored.counts).enumerate() {
        let at = (cluster as u64) << geometry.cluster_bits;
        if used > count {
            report.add(FindingKind::Refcount, at, || {
                format!("refcount {count}, but {used} users")
            });
        } else if used < count {
            report.add(FindingKind::Leak, at, || {
                format!("leaked: refcount {count}, but {used} users")
            });
        }
        if *used > 0 {
            report.image_end = at + geometry.cluster_bytes();
        }
    }
    Ok(stored)
}

/// Compare the COPIED flags of the active tables with the refcounts.
fn check_flags(
    storage: &dyn Storage,
    header: &Header,
    stored: &Stored,
    report: &mut CheckReport,
) -> Result<(), Error> {
    for_active_entries(
        storage,
        header,
        stored.counts.len(),
        |at, entry, cluster| {
            let count = stored.counts.get(cluster).copied().unwrap_or_default();
            let copied = entry & COPIED != 0;
            if copied != (count == 1) && count > 0 {
                report.add(FindingKind::Copied, at, || {
                    let flag = if copied { "set" } else { "not set" };
                    format!("the COPIED flag is {flag}, but the refcount is {count}")
                });
            }
            None
        },
    )
}

/// Visit the entries of the active L1 and L2 tables that lead to a cluster of their own: place,
/// entry, number of the cluster. What the visitor returns replaces the entry.
pub(crate) fn for_active_entries(
    storage: &dyn Storage,
    header: &Header,
    file_clusters: usize,
    mut visit: impl FnMut(u64, u64, usize) -> Option<u64>,
) -> Result<(), Error> {
    let geometry = header.geometry;
    let cluster_of = |entry: u64| {
        let offset = entry & OFFSET_MASK;
        let cluster = usize::try_from(offset >> geometry.cluster_bits).unwrap_or(usize::MAX);
        (offset != 0 && geometry.is_aligned(offset) && cluster < file_clusters).then_some(cluster)
    };
    let mut put = |at: u64, entry: u64, cluster: usize| match visit(at, entry, cluster) {
        Some(new) if new != entry => storage
            .write_at(&new.to_be_bytes(), at)
            .map_err(Error::storage("write", "table entry", at)),
        _ => Ok(()),
    };
    for (l1_index, &l1_entry) in walk::read_l1(storage, header)?.iter().enumerate() {
        let Some(cluster) = cluster_of(l1_entry) else {
            continue;
        };
        put(header.l1_offset + 8 * l1_index as u64, l1_entry, cluster)?;
        let table = l1_entry & OFFSET_MASK;
        let bytes = read_cluster(storage, geometry, "L2 table", table)?;
        for (l2_index, &entry) in entries(&bytes).iter().enumerate() {
            if entry & crate::types::COMPRESSED != 0 {
                continue;
            }
            if let Some(cluster) = cluster_of(entry) {
                put(table + 8 * l2_index as u64, entry, cluster)?;
            }
        }
    }
    Ok(())
}

pub(crate) fn read_cluster(
    storage: &dyn Storage,
    geometry: Geometry,
    structure: &'static str,
    offset: u64,
) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; usize::try_from(geometry.cluster_bytes()).unwrap_or_default()];
    storage
        .read_at(&mut bytes, offset)
        .map_err(Error::storage("read", structure, offset))?;
    Ok(bytes)
}
