//! Every maximum that the decoders hold a peer to. A length is compared with its maximum before
//! anything is allocated or announced.

/// Bytes of window that a decoder may ask for ([`crate::Step::NeedMore`]); the longest header. The
/// largest one that QEMU sends, a section header with a full name, has 269 bytes.
pub const MAX_HEADER_BYTES: usize = 1024;

/// Bytes of an identifier: one length byte.
pub const MAX_NAME_BYTES: usize = 255;

/// Bytes of the machine type's name. The wire has 32 bits for its length; QEMU's longest is below
/// 30 bytes.
pub const MAX_MACHINE_NAME_BYTES: u32 = 255;

/// Capabilities named in the configuration section. QEMU 10.0 has 23 and sends at most two.
pub const MAX_CAPABILITIES: u32 = 64;

/// Live sections (START) of one stream, kept for PART and END. QEMU has three kinds and one for
/// each VFIO device.
pub const MAX_LIVE_SECTIONS: usize = 256;

/// RAM blocks that one stream lists. A machine with every slot filled has a few hundred.
pub const MAX_RAM_BLOCKS: u32 = 4096;

/// Bytes of a block's bitmap in a mapped-ram file: one bit for each 4 KiB page of a block of 16 TiB.
pub const MAX_MAPPED_BITMAP_BYTES: u64 = 512 << 20;

/// Bytes between a block's bitmap and its pages in a mapped-ram file. QEMU aligns pages to 1 MiB.
pub const MAX_MAPPED_GAP_BYTES: u64 = 2 << 20;

/// Pages of a mapped-ram file that are announced at once; a multiple of every page size.
pub const MAX_MAPPED_PIECE_BYTES: u32 = 1 << 30;

/// Sector numbers stay below this, so that every byte offset of a disk fits into an `i64`.
pub const MAX_SECTOR: u64 = (i64::MAX as u64) >> 9;

/// Bytes of bits in one `dirty-bitmap` chunk; what QEMU accepts.
pub const MAX_BITMAP_CHUNK_BYTES: u64 = 10_240;

/// Bytes of a postcopy package: the state of all devices. QEMU's receiver holds it in memory whole,
/// and so does ours. Packages that we saw have some 10 KiB.
pub const MAX_PACKAGE_BYTES: u32 = 256 << 20;

/// Bytes of the JSON description. Real ones have 0.5 to 200 KiB.
pub const MAX_DESCRIPTION_BYTES: u32 = 64 << 20;

/// Bytes of a return path message after its type and length; what QEMU accepts.
pub const MAX_RETURN_MESSAGE_BYTES: u16 = 512;

/// Bytes of a received-pages bitmap on the return path: one bit for each 4 KiB page of a block of
/// 16 TiB.
pub const MAX_RECEIVED_BITMAP_BYTES: u64 = 512 << 20;
