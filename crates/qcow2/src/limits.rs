//! Every maximum of this crate. What is more is refused before memory is allocated for it.

/// Smallest cluster: 512 bytes.
pub const CLUSTER_BITS_MIN: u32 = 9;
/// Largest cluster: 2 MiB.
pub const CLUSTER_BITS_MAX: u32 = 21;
/// Widest refcount: 2^6 = 64 bits.
pub const REFCOUNT_ORDER_MAX: u32 = 6;
/// The longest disk, 256 TiB: no longer than a raw one.
pub const DISK_BYTES_MAX: u64 = vmferry_disk::RAW_BYTES_MAX;
/// The longest L1 table, 32 MiB, as in QEMU: it is kept in memory.
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// The longest refcount table, 8 MiB, as in QEMU: it is kept in memory.
pub const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// No structure lies at or beyond this offset in the file: entries have 56 bits for it.
pub const HOST_BYTES_MAX: u64 = 1 << 56;
/// The longest backing file name; the format says so.
pub const BACKING_NAME_BYTES_MAX: u32 = 1023;
/// The longest chain of images.
pub const CHAIN_IMAGES_MAX: usize = 64;
/// The most header extensions.
pub const EXTENSIONS_MAX: usize = 256;
/// The most internal snapshots, as in QEMU.
pub const SNAPSHOTS_MAX: u32 = 65536;
/// The longest snapshot table, 64 MiB, as in QEMU.
pub const SNAPSHOT_TABLE_BYTES_MAX: u64 = 64 << 20;
/// The longest L1 tables of all snapshots together, 1 GiB.
pub const SNAPSHOT_L1_BYTES_MAX: u64 = 1 << 30;
/// The longest extra data of a snapshot, as in QEMU.
pub const SNAPSHOT_EXTRA_BYTES_MAX: u32 = 1024;
/// The longest name of a snapshot: QEMU cuts longer ones off.
pub const SNAPSHOT_NAME_BYTES_MAX: u16 = 255;
/// The most persistent bitmaps, as in QEMU.
pub const BITMAPS_MAX: u32 = 65535;
/// The longest bitmap directory, 64 MiB.
pub const BITMAP_DIRECTORY_BYTES_MAX: u64 = 64 << 20;
/// The longest table of one bitmap, 8 MiB: no more than its bits need for the longest disk.
pub const BITMAP_TABLE_BYTES_MAX: u64 = 8 << 20;
/// The longest name of a bitmap, as in QEMU.
pub const BITMAP_NAME_BYTES_MAX: u16 = 1023;
/// The largest window that a zstd frame may ask for, 8 MiB: four clusters.
pub const ZSTD_WINDOW_BYTES_MAX: u64 = 8 << 20;
/// Memory for slices of L2 tables, 32 MiB: enough for 256 GiB of disk in 64 KiB clusters.
pub const L2_CACHE_BYTES: usize = 32 << 20;
/// Memory for slices of refcount blocks, 4 MiB.
pub const REFCOUNT_CACHE_BYTES: usize = 4 << 20;
/// Tables are read, kept and written in slices of this size, or of a cluster if that is smaller.
pub const SLICE_BYTES: u64 = 4096;
/// The longest run of clusters that one step of a write allocates, 2 MiB (but at least a cluster).
pub const RUN_BYTES_MAX: u64 = 2 << 20;
/// The most pieces that one look-up returns.
pub const SEGMENTS_MAX: usize = 64;
/// So many runs of clusters that wait to become free make the next write flush first.
pub const FREES_MAX: usize = 65536;
/// So many clusters become free before others get the lock.
pub const FREE_CLUSTERS_AT_ONCE: u64 = 4096;
/// So many clusters are looked at before others get the lock.
pub const LOOK_UP_CLUSTERS_MAX: u64 = 4096;
/// The most L2 tables that a check reads, 2^22: one table may be read for each snapshot.
pub const CHECK_TABLES_MAX: u64 = 1 << 22;
/// The most clusters in a file that is checked, 2^27 (8 TiB in 64 KiB clusters): a check needs
/// up to 9 bytes of memory for each.
pub const CHECK_CLUSTERS_MAX: u64 = 1 << 27;
/// So many findings of each kind are described by a check; the others are only counted.
pub const FINDINGS_MAX: u64 = 1000;
/// Memory for L2 tables of a VM state that is read, 16 MiB (but at least one table): enough for 128 GiB
/// in 64 KiB clusters.
pub const VM_STATE_L2_BYTES: u64 = 16 << 20;
