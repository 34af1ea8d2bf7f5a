//! Positions, and the entries of L1 and L2 tables.
//!
//! ```text
//! guest offset   │ L1 index │ L2 index │ in cluster │     L2 table = 1 cluster of 8-byte entries
//!                            cluster_bits-3 cluster_bits
//!
//! L1, L2 entry   63 COPIED  62 COMPRESSED (L2)   55..9 host offset   0 ZERO (L2, version 3)
//! compressed     61..x sectors of 512 bytes, less 1   x-1..0 host offset   x = 70 - cluster_bits
//! ```

use std::ops::Range;

use crate::error::Error;
use crate::limits::SLICE_BYTES;

/// A byte of the image file. Below 2^56.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

/// A byte of the disk that the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// A cluster of the image file, by number. Below 2^47.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostCluster(pub u64);

/// A cluster of the disk, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestCluster(pub u64);

/// An entry of an L1 table. Below 2^22.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct L1Index(pub usize);

/// The flag of an entry whose target has the refcount 1: it may be written to in place.
pub const COPIED: u64 = 1 << 63;
/// The flag of an L2 entry that leads to compressed data.
pub const COMPRESSED: u64 = 1 << 62;
/// The flag of an L2 entry that reads as zeroes, whatever its cluster holds.
pub const ZERO: u64 = 1;
/// The bits of an entry that hold a host offset.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an L2 entry that is not compressed that must be 0.
pub const L2_RESERVED: u64 = !(OFFSET_MASK | COPIED | COMPRESSED | ZERO);
/// Bits of an L1 entry that must be 0.
pub const L1_RESERVED: u64 = !(OFFSET_MASK | COPIED);

/// The sizes that everything else follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// 2 or 3.
    pub version: u32,
    /// Cluster size is 2 to the power of this; 9 to 21.
    pub cluster_bits: u32,
    /// Refcount width is 2 to the power of this; 0 to 6.
    pub refcount_order: u32,
}

impl Geometry {
    /// Bytes in a cluster.
    #[must_use]
    pub const fn cluster_bytes(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries in an L2 table.
    #[must_use]
    pub const fn l2_entries(self) -> u64 {
        self.cluster_bytes() / 8
    }

    /// Bytes of disk behind one entry of an L1 table.
    #[must_use]
    pub const fn l1_coverage(self) -> u64 {
        self.cluster_bytes() * self.l2_entries()
    }

    /// Refcounts in a refcount block.
    #[must_use]
    pub const fn block_refcounts(self) -> u64 {
        (self.cluster_bytes() * 8) >> self.refcount_order
    }

    /// The largest refcount.
    #[must_use]
    pub const fn refcount_max(self) -> u64 {
        u64::MAX >> (64 - (1_u32 << self.refcount_order))
    }

    /// Bytes in a slice of a table.
    #[must_use]
    pub const fn slice_bytes(self) -> u64 {
        if self.cluster_bytes() < SLICE_BYTES {
            self.cluster_bytes()
        } else {
            SLICE_BYTES
        }
    }

    /// Clusters that so many bytes fill or begin to fill.
    #[must_use]
    pub const fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_bytes())
    }

    /// Entries that an L1 table needs for a disk of this length.
    #[must_use]
    pub const fn l1_entries(self, disk_bytes: u64) -> u64 {
        disk_bytes.div_ceil(self.l1_coverage())
    }

    /// `offset` down to the start of its cluster.
    #[must_use]
    pub const fn cluster_start(self, offset: u64) -> u64 {
        offset & !(self.cluster_bytes() - 1)
    }

    /// `offset` up to the next start of a cluster.
    #[must_use]
    pub const fn cluster_end(self, offset: u64) -> u64 {
        self.cluster_start(offset.saturating_add(self.cluster_bytes() - 1))
    }

    /// Is this the start of a cluster?
    #[must_use]
    pub const fn is_aligned(self, offset: u64) -> bool {
        offset & (self.cluster_bytes() - 1) == 0
    }

    pub(crate) fn host(self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// The number of the cluster that a byte of the file is in.
    pub(crate) const fn cluster_of(self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// The byte of a disk of this length where VM state begins: behind its last L1 entry.
    pub(crate) const fn vm_state_start(self, disk_bytes: u64) -> u64 {
        self.l1_entries(disk_bytes) * self.l1_coverage()
    }

    pub(crate) fn host_cluster(self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    pub(crate) fn guest(self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    pub(crate) fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// The place of a cluster's entry: which L1 entry, and how many bytes into the L2 table.
    pub(crate) fn entry_place(self, cluster: GuestCluster) -> (L1Index, u64) {
        let l1 = cluster.0 >> (self.cluster_bits - 3);
        let l2 = cluster.0 & (self.l2_entries() - 1);
        // A guest offset is below 2^63, and a table in memory has at most 2^22 entries: an index
        // that does not fit is past its end like any other.
        (L1Index(usize::try_from(l1).unwrap_or(usize::MAX)), l2 * 8)
    }

    /// What an L2 entry says. `at` is where it lies in the file, for the error.
    pub fn decode_l2(self, entry: u64, at: HostOffset) -> Result<Mapping, Error> {
        if entry & COMPRESSED != 0 {
            let shift = 70 - self.cluster_bits;
            let sectors = ((entry & (COMPRESSED - 1)) >> shift) + 1;
            let host = entry & ((1 << shift) - 1) & (crate::limits::HOST_BYTES_MAX - 1);
            return Ok(Mapping::Compressed {
                host: HostOffset(host),
                bytes: sectors * 512 - (host & 511),
            });
        }
        let host = entry & OFFSET_MASK;
        if !self.is_aligned(host) {
            let problem = format!("it leads to byte {host}, where no cluster starts");
            return Err(Error::corrupt("L2 entry", at.0, problem));
        }
        let place = (host != 0).then_some(HostOffset(host));
        let copied = entry & COPIED != 0;
        if entry & ZERO != 0 {
            if self.version < 3 {
                let problem = "a zero flag in an image of version 2";
                return Err(Error::corrupt("L2 entry", at.0, problem));
            }
            return Ok(Mapping::Zero {
                host: place,
                copied,
            });
        }
        Ok(match place {
            None => Mapping::Unallocated,
            Some(host) => Mapping::Data { host, copied },
        })
    }
}

/// What a cluster of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Reads what the backing file has, or zeroes.
    Unallocated,
    /// Reads as zeroes.
    Zero {
        /// The cluster that is kept for it, if there is one. What it holds means nothing.
        host: Option<HostOffset>,
        /// That cluster belongs to nobody else.
        copied: bool,
    },
    /// A cluster of the file.
    Data {
        /// Which.
        host: HostOffset,
        /// It belongs to nobody else.
        copied: bool,
    },
    /// Compressed data, somewhere in the file.
    Compressed {
        /// First byte.
        host: HostOffset,
        /// How many bytes it has at most.
        bytes: u64,
    },
}

impl Mapping {
    /// The host clusters that the entry has a share in.
    pub(crate) fn host_clusters(self, geometry: Geometry) -> Range<u64> {
        match self {
            Self::Unallocated | Self::Zero { host: None, .. } => 0..0,
            Self::Zero {
                host: Some(host), ..
            }
            | Self::Data { host, .. } => {
                let cluster = geometry.host_cluster(host).0;
                cluster..cluster + 1
            }
            Self::Compressed { host, bytes } => {
                let first = geometry.host_cluster(host).0;
                let last = geometry.host_cluster(HostOffset(host.0 + bytes - 1)).0;
                first..last + 1
            }
        }
    }
}
