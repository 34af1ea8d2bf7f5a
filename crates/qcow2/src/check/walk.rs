//! Who uses which cluster.

use std::collections::HashSet;

use crate::bitmaps::BitmapDirectory;
use crate::bytes::entries;
use crate::check::{CheckReport, FindingKind, read_cluster};
use crate::error::Error;
use crate::header::Header;
use crate::limits::{CHECK_CLUSTERS_MAX, CHECK_TABLES_MAX};
use crate::refcount::read_table;
use crate::snapshot_table::SnapshotTable;
use crate::storage::Storage;
use crate::types::{
    COMPRESSED, COPIED, Geometry, HostOffset, L1_RESERVED, L2_RESERVED, Mapping, OFFSET_MASK,
};

/// What lies in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Nothing,
    Data,
    L2Table,
    /// Anything that only one structure may use.
    Own(&'static str),
}

impl Content {
    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Data => "guest data",
            Self::L2Table => "an L2 table",
            Self::Own(name) => name,
        }
    }

    /// One byte for each cluster of the file.
    fn code(self) -> u8 {
        match self {
            Self::Nothing => 0,
            Self::Data => 1,
            Self::L2Table => 2,
            Self::Own(name) => OWN
                .iter()
                .position(|known| *known == name)
                .and_then(|index| u8::try_from(index + 3).ok())
                .unwrap_or(u8::MAX),
        }
    }

    fn of(code: u8) -> Self {
        match code {
            0 => Self::Nothing,
            1 => Self::Data,
            2 => Self::L2Table,
            code => {
                let name = OWN.get(usize::from(code) - 3);
                Self::Own(name.copied().unwrap_or("another structure"))
            }
        }
    }
}

const HEADER: &str = "the header";
const L1_TABLE: &str = "an L1 table";
const REFCOUNT_TABLE: &str = "the refcount table";
const REFCOUNT_BLOCK: &str = "a refcount block";
const SNAPSHOT_TABLE: &str = "the snapshot table";
const BITMAP_DIRECTORY: &str = "the bitmap directory";
const BITMAP_TABLE: &str = "a bitmap table";
const BITMAP_DATA: &str = "bits of a bitmap";
const OWN: [&str; 8] = [
    HEADER,
    L1_TABLE,
    REFCOUNT_TABLE,
    REFCOUNT_BLOCK,
    SNAPSHOT_TABLE,
    BITMAP_DIRECTORY,
    BITMAP_TABLE,
    BITMAP_DATA,
];

/// How many users each cluster of the file has.
pub(crate) struct Usage {
    pub(crate) counts: Vec<u32>,
    contents: Vec<u8>,
    pub(crate) refcount_table: Vec<u64>,
    /// Clusters of the refcount table and its blocks, as they were counted.
    pub(crate) refcount_clusters: Vec<usize>,
    /// Something is wrong with the refcount table or its blocks: only a new table ends that.
    pub(crate) refcounts_broken: bool,
    /// L2 tables read.
    tables: u64,
}

impl Usage {
    pub(crate) fn contains(&self, geometry: Geometry, offset: u64) -> bool {
        let clusters = self.counts.len() as u64;
        geometry.is_aligned(offset) && offset >> geometry.cluster_bits < clusters
    }

    /// Count `bytes` from `offset` on; `at` is the entry that leads there.
    fn add(
        &mut self,
        report: &mut CheckReport,
        geometry: Geometry,
        content: Content,
        (offset, bytes): (u64, u64),
        at: u64,
    ) -> bool {
        let first = offset >> geometry.cluster_bits;
        let end = geometry.clusters(offset.saturating_add(bytes));
        if !geometry.is_aligned(offset) && content != Content::Data {
            report.add(FindingKind::OutOfRange, at, || {
                format!(
                    "{} at byte {offset}, where no cluster starts",
                    content.name()
                )
            });
            return false;
        }
        if end > self.counts.len() as u64 {
            report.add(FindingKind::OutOfRange, at, || {
                format!(
                    "{} at byte {offset}, past the end of the file",
                    content.name()
                )
            });
            return false;
        }
        for cluster in first..end {
            let index = usize::try_from(cluster).unwrap_or(usize::MAX);
            if let Some(count) = self.counts.get_mut(index) {
                *count = count.saturating_add(1);
            }
            let Some(code) = self.contents.get_mut(index) else {
                continue;
            };
            if content == Content::Own(REFCOUNT_TABLE) || content == Content::Own(REFCOUNT_BLOCK) {
                self.refcount_clusters.push(index);
            }
            let before = Content::of(*code);
            let shared = before == content && !matches!(content, Content::Own(_));
            if before != Content::Nothing && !shared {
                report.add(
                    FindingKind::Overlap,
                    cluster << geometry.cluster_bits,
                    || {
                        format!(
                            "{} and {} lie in one cluster",
                            before.name(),
                            content.name()
                        )
                    },
                );
                let own = |name| [before, content].contains(&Content::Own(name));
                self.refcounts_broken |= own(REFCOUNT_BLOCK) || own(REFCOUNT_TABLE);
                // What only one may use is the more important.
                if matches!(before, Content::Own(_)) {
                    continue;
                }
            }
            *code = content.code();
        }
        true
    }
}

/// The active L1 table; out of range it is an error.
pub(crate) fn read_l1(storage: &dyn Storage, header: &Header) -> Result<Vec<u64>, Error> {
    let length = storage
        .length()
        .map_err(Error::storage("measure", "image", 0))?;
    read_table(
        storage,
        "L1 table",
        header.l1_offset,
        u64::from(header.l1_entries) * 8,
        header.geometry.cluster_end(length),
    )
}

/// Count all users.
pub(crate) fn walk(
    storage: &dyn Storage,
    header: &Header,
    report: &mut CheckReport,
) -> Result<Usage, Error> {
    let geometry = header.geometry;
    let length = storage
        .length()
        .map_err(Error::storage("measure", "image", 0))?;
    let file_end = geometry.cluster_end(length);
    let clusters = geometry.clusters(length);
    if clusters > CHECK_CLUSTERS_MAX {
        return Err(Error::TooLarge {
            structure: "image (in clusters)",
            wanted: clusters,
            max: CHECK_CLUSTERS_MAX,
        });
    }
    let count = usize::try_from(clusters).unwrap_or_default();
    let mut usage = Usage {
        counts: vec![0; count],
        contents: vec![0; count],
        refcount_table: Vec::new(),
        refcount_clusters: Vec::new(),
        refcounts_broken: false,
        tables: 0,
    };
    let own = |name| Content::Own(name);
    let cluster_bytes = geometry.cluster_bytes();
    usage.add(report, geometry, own(HEADER), (0, cluster_bytes), 0);
    walk_refcounts(storage, header, file_end, &mut usage, report)?;
    report.guest_clusters = geometry.clusters(header.disk_bytes);
    let l1 = read_l1(storage, header)?;
    let active = (header.l1_offset, l1.len() as u64 * 8);
    usage.add(report, geometry, own(L1_TABLE), active, 40);
    walk_l1(
        storage,
        geometry,
        header.l1_offset,
        &l1,
        &mut usage,
        report,
        true,
    )?;
    let snapshots = SnapshotTable::read(storage, header, file_end)?;
    let table = (header.snapshots_offset, snapshots.bytes());
    usage.add(report, geometry, own(SNAPSHOT_TABLE), table, 64);
    for snapshot in &snapshots.entries {
        let bytes = u64::from(snapshot.l1_entries) * 8;
        let place = (snapshot.l1_offset, bytes);
        usage.add(
            report,
            geometry,
            own(L1_TABLE),
            place,
            header.snapshots_offset,
        );
        let l1 = read_table(storage, "L1 table", snapshot.l1_offset, bytes, file_end)?;
        walk_l1(
            storage,
            geometry,
            snapshot.l1_offset,
            &l1,
            &mut usage,
            report,
            false,
        )?;
    }
    walk_bitmaps(storage, header, file_end, &mut usage, report)?;
    Ok(usage)
}

fn walk_refcounts(
    storage: &dyn Storage,
    header: &Header,
    file_end: u64,
    usage: &mut Usage,
    report: &mut CheckReport,
) -> Result<(), Error> {
    let geometry = header.geometry;
    let offset = header.refcount_table_offset;
    let bytes = u64::from(header.refcount_table_clusters) << geometry.cluster_bits;
    let content = Content::Own(REFCOUNT_TABLE);
    if !usage.add(report, geometry, content, (offset, bytes), 48) {
        usage.refcounts_broken = true;
        return Ok(());
    }
    usage.refcount_table = read_table(storage, "refcount table", offset, bytes, file_end)?;
    for (index, entry) in usage.refcount_table.clone().into_iter().enumerate() {
        let block = entry & OFFSET_MASK;
        let at = offset + 8 * index as u64;
        let content = Content::Own(REFCOUNT_BLOCK);
        let place = (block, geometry.cluster_bytes());
        let is_whole = !has_reserved(report, "refcount table entry", entry, !OFFSET_MASK, at);
        if !is_whole || block != 0 && !usage.add(report, geometry, content, place, at) {
            usage.refcounts_broken = true;
        }
    }
    Ok(())
}

/// Bits that must be 0 and are not: whoever set them meant something that nobody here knows.
fn has_reserved(
    report: &mut CheckReport,
    structure: &'static str,
    entry: u64,
    reserved: u64,
    at: u64,
) -> bool {
    let bits = entry & reserved;
    if bits != 0 {
        report.add(FindingKind::Broken, at, || {
            format!("{structure} with reserved bits: {bits:#x}")
        });
    }
    bits != 0
}

fn walk_l1(
    storage: &dyn Storage,
    geometry: Geometry,
    l1_offset: u64,
    l1: &[u64],
    usage: &mut Usage,
    report: &mut CheckReport,
    active: bool,
) -> Result<(), Error> {
    let mut seen = HashSet::new();
    for (index, l1_entry) in l1.iter().enumerate() {
        let table = l1_entry & OFFSET_MASK;
        let at = l1_offset + 8 * index as u64;
        has_reserved(report, "L1 entry", *l1_entry, L1_RESERVED, at);
        if table == 0 {
            continue;
        }
        let place = (table, geometry.cluster_bytes());
        if !usage.add(report, geometry, Content::L2Table, place, at) {
            continue;
        }
        if !seen.insert(table) {
            report.add(FindingKind::Overlap, at, || {
                format!("the L2 table at byte {table} is used twice by one L1 table")
            });
            continue;
        }
        usage.tables += 1;
        if usage.tables > CHECK_TABLES_MAX {
            return Err(Error::TooLarge {
                structure: "L2 tables (number, over all snapshots)",
                wanted: usage.tables,
                max: CHECK_TABLES_MAX,
            });
        }
        let bytes = read_cluster(storage, geometry, "L2 table", table)?;
        for (index, &entry) in entries(&bytes).iter().enumerate() {
            let at = table + 8 * index as u64;
            if entry & COMPRESSED == 0 {
                has_reserved(report, "L2 entry", entry, L2_RESERVED, at);
            } else if entry & COPIED != 0 {
                report.add(FindingKind::Broken, at, || {
                    "the COPIED flag is set for a compressed cluster".to_owned()
                });
            }
            let mapping = match geometry.decode_l2(entry, HostOffset(at)) {
                Ok(mapping) => mapping,
                Err(error) => {
                    report.add(FindingKind::Broken, at, || error.to_string());
                    continue;
                }
            };
            let place = match mapping {
                Mapping::Unallocated | Mapping::Zero { host: None, .. } => continue,
                Mapping::Zero {
                    host: Some(host), ..
                }
                | Mapping::Data { host, .. } => (host.0, geometry.cluster_bytes()),
                Mapping::Compressed { host, bytes } => (host.0, bytes),
            };
            let counted = usage.add(report, geometry, Content::Data, place, at);
            if counted && active {
                report.allocated_clusters += 1;
                report.compressed_clusters +=
                    u64::from(matches!(mapping, Mapping::Compressed { .. }));
            }
        }
    }
    Ok(())
}

fn walk_bitmaps(
    storage: &dyn Storage,
    header: &Header,
    file_end: u64,
    usage: &mut Usage,
    report: &mut CheckReport,
) -> Result<(), Error> {
    let geometry = header.geometry;
    let directory = match BitmapDirectory::read(storage, header, file_end) {
        Ok(Some(directory)) => directory,
        Ok(None) => return Ok(()),
        Err(error @ Error::Corrupt { offset, .. }) => {
            report.add(FindingKind::Broken, offset, || error.to_string());
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let start = directory.bytes.start;
    let place = (start, directory.bytes.end - start);
    usage.add(
        report,
        geometry,
        Content::Own(BITMAP_DIRECTORY),
        place,
        start,
    );
    for bitmap in &directory.bitmaps {
        let bytes = u64::from(bitmap.table_entries) * 8;
        let place = (bitmap.table_offset, bytes);
        usage.add(report, geometry, Content::Own(BITMAP_TABLE), place, start);
        let table = read_table(
            storage,
            "bitmap table",
            bitmap.table_offset,
            bytes,
            file_end,
        )?;
        for (index, entry) in table.iter().enumerate() {
            let offset = entry & OFFSET_MASK;
            let at = bitmap.table_offset + 8 * index as u64;
            if offset != 0 {
                let place = (offset, geometry.cluster_bytes());
                usage.add(report, geometry, Content::Own(BITMAP_DATA), place, at);
            }
        }
    }
    Ok(())
}
