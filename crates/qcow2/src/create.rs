//! Making an image.
//!
//! ```text
//! header │ refcount table │ refcount blocks │ L1 table │        one cluster or more each
//! ```

use crate::bytes::{put, put32, put64, table};
use crate::error::Error;
use crate::header::{
    BackingFormat, COMPRESSION, Compression, EXTENSION_BACKING_FORMAT, HEADER_BYTES_V2, Header,
    LAZY_REFCOUNTS,
};
use crate::limits::{
    BACKING_NAME_BYTES_MAX, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, DISK_BYTES_MAX, L1_BYTES_MAX,
    REFCOUNT_ORDER_MAX, REFCOUNT_TABLE_BYTES_MAX,
};
use crate::refcount::put_count;
use crate::storage::Storage;
use crate::types::Geometry;

/// Bytes of the headers that we make: with the compression type, padded.
const HEADER_BYTES: u32 = 112;

/// What a new image is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Length of the disk in bytes, at most 2^48.
    pub disk_bytes: u64,
    /// 2 or 3.
    pub version: u32,
    /// 9 to 21; 16 is usual.
    pub cluster_bits: u32,
    /// Width of refcounts as a power of two, 0 to 6; version 2 has only 4.
    pub refcount_order: u32,
    /// Whoever opens it may update refcounts lazily. Version 3.
    pub lazy_refcounts: bool,
    /// How others may compress clusters. Version 2 has only deflate.
    pub compression: Compression,
    /// Name and format of the file below.
    pub backing: Option<(String, BackingFormat)>,
}

impl CreateOptions {
    /// Version 3, clusters of 64 KiB, refcounts of 16 bits, nothing below.
    #[must_use]
    pub fn new(disk_bytes: u64) -> Self {
        Self {
            disk_bytes,
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
            lazy_refcounts: false,
            compression: Compression::Deflate,
            backing: None,
        }
    }

    fn check(&self) -> Result<Geometry, Error> {
        let check = |option, value: u64, good, bound| match good {
            true => Ok(()),
            false => Err(Error::Option {
                option,
                value,
                bound,
            }),
        };
        let v3 = self.version == 3;
        let version = u64::from(self.version);
        check("version", version, v3 || version == 2, "2 or 3")?;
        let bits = self.cluster_bits;
        let good = (CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits);
        check("cluster bits", u64::from(bits), good, "9 to 21")?;
        let order = self.refcount_order;
        let good = order <= REFCOUNT_ORDER_MAX && (v3 || order == 4);
        check(
            "refcount order",
            u64::from(order),
            good,
            "0 to 6, and 4 in version 2",
        )?;
        let good = v3 || !self.lazy_refcounts;
        check("version", version, good, "3 for lazy refcounts")?;
        let good = v3 || self.compression == Compression::Deflate;
        check("version", version, good, "3 for zstd")?;
        let good = self.disk_bytes <= DISK_BYTES_MAX;
        check("disk size", self.disk_bytes, good, "at most 2^48")?;
        let geometry = Geometry {
            version: self.version,
            cluster_bits: bits,
            refcount_order: order,
        };
        let l1_bytes = geometry.l1_entries(self.disk_bytes) * 8;
        let good = l1_bytes <= L1_BYTES_MAX;
        check(
            "disk size",
            self.disk_bytes,
            good,
            "less with clusters this small",
        )?;
        if let Some((name, _)) = &self.backing {
            let length = name.len() as u64;
            let good = (1..=u64::from(BACKING_NAME_BYTES_MAX)).contains(&length);
            check("length of the backing name", length, good, "1 to 1023")?;
        }
        Ok(geometry)
    }
}

/// Make an image in an empty file. It is durable when this returns; until then the file has no
/// header.
pub fn create(storage: &dyn Storage, options: &CreateOptions) -> Result<(), Error> {
    let geometry = options.check()?;
    let layout = Layout::of(geometry, options.disk_bytes)?;
    let failed = |operation, offset| Error::storage(operation, "new image", offset);
    let length = storage.length().map_err(failed("measure", 0))?;
    if length != 0 {
        return Err(Error::Option {
            option: "length of the file",
            value: length,
            bound: "0",
        });
    }
    let first_cluster = first_cluster(options, geometry, &layout)?;
    storage
        .set_length(layout.clusters << geometry.cluster_bits)
        .map_err(failed("grow", 0))?;
    let offset = |cluster: u64| cluster << geometry.cluster_bits;
    let per_block = geometry.block_refcounts();
    for block in 0..layout.blocks {
        let first = block * per_block;
        let mut bytes = vec![0; usize::try_from(geometry.cluster_bytes()).unwrap_or_default()];
        for cluster in first..(first + per_block).min(layout.clusters) {
            let index = usize::try_from(cluster - first).unwrap_or_default();
            put_count(&mut bytes, index, geometry.refcount_order, 1);
        }
        let place = offset(layout.first_block + block);
        storage
            .write_at(&bytes, place)
            .map_err(failed("write", place))?;
    }
    let entries: Vec<u64> = (0..layout.blocks)
        .map(|block| offset(layout.first_block + block))
        .collect();
    let place = offset(1);
    storage
        .write_at(&table(&entries), place)
        .map_err(failed("write", place))?;
    storage.flush().map_err(failed("flush", 0))?;
    storage
        .write_at(&first_cluster, 0)
        .map_err(failed("write", 0))?;
    storage.flush().map_err(failed("flush", 0))
}

/// Cluster numbers of a new image.
struct Layout {
    table_clusters: u64,
    first_block: u64,
    blocks: u64,
    first_l1: u64,
    l1_entries: u64,
    /// All of them.
    clusters: u64,
}

impl Layout {
    fn of(geometry: Geometry, disk_bytes: u64) -> Result<Self, Error> {
        let l1_entries = geometry.l1_entries(disk_bytes);
        let l1_clusters = geometry.clusters(l1_entries * 8);
        let (mut table_clusters, mut blocks) = (1, 1);
        loop {
            let clusters = 1 + table_clusters + blocks + l1_clusters;
            let needed = clusters.div_ceil(geometry.block_refcounts());
            let table_needed = geometry.clusters(needed * 8);
            if needed <= blocks && table_needed <= table_clusters {
                let wanted = table_clusters << geometry.cluster_bits;
                if wanted > REFCOUNT_TABLE_BYTES_MAX {
                    return Err(Error::TooLarge {
                        structure: "refcount table",
                        wanted,
                        max: REFCOUNT_TABLE_BYTES_MAX,
                    });
                }
                return Ok(Self {
                    table_clusters,
                    first_block: 1 + table_clusters,
                    blocks,
                    first_l1: match l1_clusters {
                        0 => 0,
                        _ => 1 + table_clusters + blocks,
                    },
                    l1_entries,
                    clusters,
                });
            }
            blocks = blocks.max(needed);
            table_clusters = table_clusters.max(table_needed);
        }
    }
}

fn first_cluster(
    options: &CreateOptions,
    geometry: Geometry,
    layout: &Layout,
) -> Result<Vec<u8>, Error> {
    let v3 = geometry.version >= 3;
    let zstd = options.compression == Compression::Zstd;
    let header = Header {
        geometry,
        disk_bytes: options.disk_bytes,
        l1_entries: u32::try_from(layout.l1_entries).unwrap_or(u32::MAX),
        l1_offset: layout.first_l1 << geometry.cluster_bits,
        refcount_table_offset: 1 << geometry.cluster_bits,
        refcount_table_clusters: u32::try_from(layout.table_clusters).unwrap_or(u32::MAX),
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: if zstd { COMPRESSION } else { 0 },
        compatible: if options.lazy_refcounts {
            LAZY_REFCOUNTS
        } else {
            0
        },
        autoclear: 0,
        header_bytes: if v3 { HEADER_BYTES } else { HEADER_BYTES_V2 },
        compression: options.compression,
        backing_name: None,
        extensions: Vec::new(),
    };
    let mut bytes = vec![0; header.header_bytes as usize];
    header.encode(&mut bytes);
    if zstd {
        put(&mut bytes, 104, &[1]);
    }
    if let Some((name, format)) = &options.backing {
        let format = format.name().as_bytes();
        bytes.extend_from_slice(&EXTENSION_BACKING_FORMAT.to_be_bytes());
        bytes.extend_from_slice(&(format.len() as u32).to_be_bytes());
        bytes.extend_from_slice(format);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        // The end of the extensions.
        bytes.extend_from_slice(&[0; 8]);
        let place = bytes.len() as u64;
        put64(&mut bytes, 8, place);
        put32(&mut bytes, 16, name.len() as u32);
        bytes.extend_from_slice(name.as_bytes());
    }
    let length = bytes.len() as u64;
    if length > geometry.cluster_bytes() {
        return Err(Error::Option {
            option: "length of the header with the backing name",
            value: length,
            bound: "at most a cluster",
        });
    }
    bytes.resize(
        usize::try_from(geometry.cluster_bytes()).unwrap_or_default(),
        0,
    );
    Ok(bytes)
}
