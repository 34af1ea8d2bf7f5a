//! The header, and the extensions behind it. All numbers are big-endian.
//!
//! ```text
//!   0 magic 4 │ 4 version 4 │ 8 backing name offset 8 │ 16 its length 4 │ 20 cluster bits 4
//!  24 disk size 8 │ 32 encryption 4 │ 36 L1 entries 4 │ 40 L1 offset 8
//!  48 refcount table offset 8 │ 56 its clusters 4 │ 60 snapshots 4 │ 64 snapshot table offset 8
//!  ── version 3 ──
//!  72 incompatible 8 │ 80 compatible 8 │ 88 autoclear 8 │ 96 refcount order 4 │ 100 header length 4
//! 104 compression type 1 (if the header is that long)
//!     extensions: type 4, length 4, data, padded to 8; ends with type 0
//!     backing name
//! ```
//!
//! All of it lies in the first cluster. Every change of the header is one write of its first 72 or
//! 104 bytes, so that it is there as a whole or not at all; the rest is kept as it was found.
#![deny(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use crate::bytes::{be32, be64, put, put32, put64};
use crate::error::Error;
use crate::limits::{
    BACKING_NAME_BYTES_MAX, CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, DISK_BYTES_MAX, EXTENSIONS_MAX,
    L1_BYTES_MAX, REFCOUNT_ORDER_MAX, REFCOUNT_TABLE_BYTES_MAX, SNAPSHOTS_MAX,
};
use crate::storage::Storage;
use crate::types::Geometry;

/// Bytes of a header of version 2.
pub const HEADER_BYTES_V2: u32 = 72;
/// Bytes of the fixed part of a header of version 3.
pub const HEADER_BYTES_V3: usize = 104;

/// Incompatible: refcounts may be too low.
pub const DIRTY: u64 = 1;
/// Incompatible: the image was found broken.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible: data lies in another file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible: the compression type is not deflate.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible: L2 entries have 16 bytes.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Compatible: refcounts may be updated lazily.
pub const LAZY_REFCOUNTS: u64 = 1;
/// Autoclear: the bitmaps extension is valid.
pub const BITMAPS: u64 = 1;

/// Extension: format of the backing file.
pub const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Extension: names of feature bits.
pub const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
/// Extension: persistent bitmaps.
pub const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// A raw deflate stream.
    Deflate,
    /// A zstd frame.
    Zstd,
}

/// A header extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Which one.
    pub kind: u32,
    /// Where its data lies in the file.
    pub offset: u64,
    /// Its data.
    pub data: Vec<u8>,
}

/// Format of a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// A plain file.
    Raw,
    /// Another image like this one.
    Qcow2,
}

impl BackingFormat {
    /// The word in the header.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What the header says, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version, cluster size, refcount width.
    pub geometry: Geometry,
    /// Length of the disk in bytes.
    pub disk_bytes: u64,
    /// Entries in the active L1 table.
    pub l1_entries: u32,
    /// Where the active L1 table is.
    pub l1_offset: u64,
    /// Where the refcount table is.
    pub refcount_table_offset: u64,
    /// How many clusters the refcount table has.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table is.
    pub snapshots_offset: u64,
    /// Features without which the image can't be used.
    pub incompatible: u64,
    /// Features that may be ignored.
    pub compatible: u64,
    /// Features that whoever does not know them must clear before writing.
    pub autoclear: u64,
    /// Length of the fixed part.
    pub header_bytes: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Name of the backing file, as it is in the header.
    pub backing_name: Option<String>,
    /// Extensions, in their order.
    pub extensions: Vec<Extension>,
}

impl Header {
    /// Read and check the header of an image.
    pub fn read(storage: &dyn Storage) -> Result<Self, Error> {
        let failed = |operation| Error::storage(operation, "header", 0);
        let length = storage.length().map_err(failed("measure"))?;
        let mut start = [0; 112];
        storage.read_at(&mut start, 0).map_err(failed("read"))?;
        if start.get(..4) != Some(&vmferry_disk::QCOW2_MAGIC) {
            return Err(Error::NotQcow2);
        }
        let cluster_bits = bounded(
            "cluster bits",
            20,
            u64::from(be32(&start, 20)),
            u64::from(CLUSTER_BITS_MIN)..=u64::from(CLUSTER_BITS_MAX),
            "9 to 21",
        )?;
        // At most 2 MiB, and no more than there is.
        let wanted = length.min(1 << cluster_bits);
        let mut cluster = vec![0; usize::try_from(wanted).unwrap_or_default()];
        storage.read_at(&mut cluster, 0).map_err(failed("read"))?;
        Self::parse(&cluster)
    }

    /// Check a header. `cluster` is the first cluster of the image, shorter if the file ends in it.
    pub fn parse(cluster: &[u8]) -> Result<Self, Error> {
        if cluster.get(..4) != Some(&vmferry_disk::QCOW2_MAGIC) {
            return Err(Error::NotQcow2);
        }
        let have = cluster.len() as u64;
        let version = be32(cluster, 4);
        bounded("version", 4, u64::from(version), 2..=3, "2 or 3")?;
        let header_bytes = match version {
            2 => HEADER_BYTES_V2,
            _ => be32(cluster, 100),
        };
        let least = if version == 2 { 72 } else { 104 };
        if have < least {
            return Err(Error::ShortHeader { length: have });
        }
        let cluster_bits = be32(cluster, 20);
        bounded(
            "cluster bits",
            20,
            u64::from(cluster_bits),
            u64::from(CLUSTER_BITS_MIN)..=u64::from(CLUSTER_BITS_MAX),
            "9 to 21",
        )?;
        let v3 = |value: u64| if version == 2 { 0 } else { value };
        bounded(
            "header length",
            100,
            u64::from(header_bytes),
            least..=(1_u64 << cluster_bits).min(have),
            "at least 104 and within the first cluster",
        )?;
        let extension_area_end = match be64(cluster, 8) {
            0 => have,
            name => name.min(have),
        };
        let extensions = parse_extensions(cluster, u64::from(header_bytes), extension_area_end)?;
        let incompatible = v3(be64(cluster, 72));
        refuse_features(incompatible, &extensions)?;
        match be32(cluster, 32) {
            0 => {}
            kind => {
                let feature = match kind {
                    1 => "encryption (AES)".to_owned(),
                    2 => "encryption (LUKS)".to_owned(),
                    other => format!("encryption (method {other})"),
                };
                return Err(Error::Unsupported { feature });
            }
        }
        let refcount_order = match version {
            2 => 4,
            _ => be32(cluster, 96),
        };
        bounded(
            "refcount order",
            96,
            u64::from(refcount_order),
            0..=u64::from(REFCOUNT_ORDER_MAX),
            "0 to 6",
        )?;
        let geometry = Geometry {
            version,
            cluster_bits,
            refcount_order,
        };
        let header = Self {
            geometry,
            disk_bytes: be64(cluster, 24),
            l1_entries: be32(cluster, 36),
            l1_offset: be64(cluster, 40),
            refcount_table_offset: be64(cluster, 48),
            refcount_table_clusters: be32(cluster, 56),
            snapshots: be32(cluster, 60),
            snapshots_offset: be64(cluster, 64),
            incompatible,
            compatible: v3(be64(cluster, 80)),
            autoclear: v3(be64(cluster, 88)),
            header_bytes,
            compression: parse_compression(cluster, header_bytes, incompatible)?,
            backing_name: parse_backing_name(cluster)?,
            extensions,
        };
        header.check_tables()?;
        Ok(header)
    }

    fn check_tables(&self) -> Result<(), Error> {
        let geometry = self.geometry;
        let aligned = |field, offset, value: u64| {
            if value < crate::limits::HOST_BYTES_MAX && geometry.is_aligned(value) {
                return Ok(());
            }
            Err(Error::Field {
                field,
                offset,
                value,
                bound: "the start of a cluster below 2^56",
            })
        };
        bounded(
            "disk size",
            24,
            self.disk_bytes,
            0..=DISK_BYTES_MAX,
            "at most 2^48",
        )?;
        let l1_entries = u64::from(self.l1_entries);
        bounded(
            "L1 entries",
            36,
            l1_entries,
            0..=L1_BYTES_MAX / 8,
            "at most 2^22",
        )?;
        if l1_entries < geometry.l1_entries(self.disk_bytes) {
            return Err(Error::Field {
                field: "L1 entries",
                offset: 36,
                value: l1_entries,
                bound: "enough for the size of the disk",
            });
        }
        aligned("L1 offset", 40, self.l1_offset)?;
        if self.l1_entries > 0 && self.l1_offset == 0 {
            return Err(Error::Field {
                field: "L1 offset",
                offset: 40,
                value: 0,
                bound: "behind the header",
            });
        }
        aligned("refcount table offset", 48, self.refcount_table_offset)?;
        if self.refcount_table_offset == 0 {
            return Err(Error::Field {
                field: "refcount table offset",
                offset: 48,
                value: 0,
                bound: "behind the header",
            });
        }
        bounded(
            "refcount table clusters",
            56,
            u64::from(self.refcount_table_clusters),
            1..=REFCOUNT_TABLE_BYTES_MAX >> geometry.cluster_bits,
            "at least 1, and no more than 8 MiB",
        )?;
        bounded(
            "number of snapshots",
            60,
            u64::from(self.snapshots),
            0..=u64::from(SNAPSHOTS_MAX),
            "at most 65536",
        )?;
        aligned("snapshot table offset", 64, self.snapshots_offset)?;
        if self.snapshots > 0 && self.snapshots_offset == 0 {
            return Err(Error::Field {
                field: "snapshot table offset",
                offset: 64,
                value: 0,
                bound: "behind the header",
            });
        }
        Ok(())
    }

    /// Format of the backing file, or why it can't be used.
    pub fn backing_format(&self) -> Result<Option<BackingFormat>, Error> {
        let Some(name) = &self.backing_name else {
            return Ok(None);
        };
        let refused = |problem: String| Error::Backing {
            name: name.clone(),
            problem,
        };
        let Some(extension) = self.extension(EXTENSION_BACKING_FORMAT) else {
            let problem = "the header does not name its format, and formats are never guessed";
            return Err(refused(problem.into()));
        };
        match extension.data.as_slice() {
            b"raw" => Ok(Some(BackingFormat::Raw)),
            b"qcow2" => Ok(Some(BackingFormat::Qcow2)),
            other => {
                let name = String::from_utf8_lossy(other.get(..64).unwrap_or(other));
                Err(refused(format!(
                    "its format {name:?} is neither raw nor qcow2"
                )))
            }
        }
    }

    /// The first extension of a kind.
    #[must_use]
    pub fn extension(&self, kind: u32) -> Option<&Extension> {
        self.extensions
            .iter()
            .find(|extension| extension.kind == kind)
    }

    /// Write the fixed part, in one piece.
    pub(crate) fn write(&self, storage: &dyn Storage) -> Result<(), Error> {
        let mut fixed = [0; HEADER_BYTES_V3];
        let length = match self.geometry.version {
            2 => HEADER_BYTES_V2 as usize,
            _ => HEADER_BYTES_V3,
        };
        let failed = |operation| Error::storage(operation, "header", 0);
        let fixed = fixed.get_mut(..length).unwrap_or_default();
        storage.read_at(fixed, 0).map_err(failed("read"))?;
        self.encode(fixed);
        storage.write_at(fixed, 0).map_err(failed("write"))
    }

    /// Put the fields into the fixed part; the place of the backing name stays as it is.
    pub(crate) fn encode(&self, fixed: &mut [u8]) {
        put(fixed, 0, &vmferry_disk::QCOW2_MAGIC);
        put32(fixed, 4, self.geometry.version);
        put32(fixed, 20, self.geometry.cluster_bits);
        put64(fixed, 24, self.disk_bytes);
        put32(fixed, 32, 0);
        put32(fixed, 36, self.l1_entries);
        put64(fixed, 40, self.l1_offset);
        put64(fixed, 48, self.refcount_table_offset);
        put32(fixed, 56, self.refcount_table_clusters);
        put32(fixed, 60, self.snapshots);
        put64(fixed, 64, self.snapshots_offset);
        if self.geometry.version >= 3 {
            put64(fixed, 72, self.incompatible);
            put64(fixed, 80, self.compatible);
            put64(fixed, 88, self.autoclear);
            put32(fixed, 96, self.geometry.refcount_order);
            put32(fixed, 100, self.header_bytes);
        }
    }
}

fn bounded(
    field: &'static str,
    offset: u64,
    value: u64,
    range: std::ops::RangeInclusive<u64>,
    bound: &'static str,
) -> Result<u64, Error> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(Error::Field {
        field,
        offset,
        value,
        bound,
    })
}

fn parse_extensions(cluster: &[u8], start: u64, end: u64) -> Result<Vec<Extension>, Error> {
    let mut extensions = Vec::new();
    let mut at = start;
    // Without an end marker the area ends where the name, or the cluster, does.
    while at.saturating_add(8) <= end {
        let place = usize::try_from(at).unwrap_or(usize::MAX);
        let kind = be32(cluster, place);
        if kind == 0 {
            break;
        }
        let length = u64::from(be32(cluster, place.saturating_add(4)));
        let offset = at.saturating_add(8);
        let data_end = offset.saturating_add(length);
        if data_end > end || extensions.len() >= EXTENSIONS_MAX {
            let problem = if data_end > end {
                format!("its {length} bytes reach beyond the header")
            } else {
                format!("there are more than {EXTENSIONS_MAX} of them")
            };
            return Err(Error::corrupt("header extension", at, problem));
        }
        let range = usize::try_from(offset).unwrap_or(usize::MAX)
            ..usize::try_from(data_end).unwrap_or(usize::MAX);
        let data = cluster.get(range).unwrap_or_default().to_vec();
        extensions.push(Extension { kind, offset, data });
        at = data_end.next_multiple_of(8);
    }
    Ok(extensions)
}

fn refuse_features(incompatible: u64, extensions: &[Extension]) -> Result<(), Error> {
    let feature = if incompatible & DATA_FILE != 0 {
        "an external data file".to_owned()
    } else if incompatible & EXTENDED_L2 != 0 {
        "extended L2 entries".to_owned()
    } else {
        let known = DIRTY | CORRUPT | COMPRESSION;
        let unknown = incompatible & !known;
        if unknown == 0 {
            return Ok(());
        }
        let bit = unknown.trailing_zeros();
        match feature_name(bit, extensions) {
            Some(name) => format!("the feature {name:?} (incompatible bit {bit})"),
            None => format!("an unknown feature (incompatible bit {bit})"),
        }
    };
    Err(Error::Unsupported { feature })
}

/// What the image calls an incompatible feature: entries of 48 bytes, type, bit, name.
fn feature_name(bit: u32, extensions: &[Extension]) -> Option<String> {
    let names = extensions
        .iter()
        .find(|extension| extension.kind == EXTENSION_FEATURE_NAMES)?;
    let (entries, _) = names.data.as_chunks::<48>();
    entries.iter().find_map(|entry| {
        let [0, number, name @ ..] = entry else {
            return None;
        };
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        (u32::from(*number) == bit).then(|| String::from_utf8_lossy(name).into_owned())
    })
}

fn parse_compression(
    cluster: &[u8],
    header_bytes: u32,
    incompatible: u64,
) -> Result<Compression, Error> {
    let kind = match header_bytes > 104 {
        true => cluster.get(104).copied().unwrap_or_default(),
        false => 0,
    };
    let expected = incompatible & COMPRESSION != 0;
    match (kind, expected) {
        (0, false) => Ok(Compression::Deflate),
        (1, true) => Ok(Compression::Zstd),
        (kind, true) if kind > 1 => Err(Error::Unsupported {
            feature: format!("compression type {kind}"),
        }),
        (kind, _) => Err(Error::Field {
            field: "compression type",
            offset: 104,
            value: u64::from(kind),
            bound: "0 if and only if the incompatible bit for it (3) is clear",
        }),
    }
}

fn parse_backing_name(cluster: &[u8]) -> Result<Option<String>, Error> {
    let offset = be64(cluster, 8);
    if offset == 0 {
        return Ok(None);
    }
    let length = be32(cluster, 16);
    bounded(
        "backing name length",
        16,
        u64::from(length),
        1..=u64::from(BACKING_NAME_BYTES_MAX),
        "1 to 1023",
    )?;
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let end = start.saturating_add(length as usize);
    let Some(name) = cluster.get(start..end) else {
        return Err(Error::Field {
            field: "backing name offset",
            offset: 8,
            value: offset,
            bound: "such that the name is in the first cluster",
        });
    };
    match std::str::from_utf8(name) {
        Ok(name) => Ok(Some(name.to_owned())),
        Err(_) => Err(Error::corrupt("backing name", offset, "it is not UTF-8")),
    }
}
