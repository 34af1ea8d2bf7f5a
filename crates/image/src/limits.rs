//! Every maximum that an image is held to.

/// Bytes of all RAM blocks together: what bounds the memory that building an index takes (70 MiB)
/// and the length of an index (48 GiB, sparse).
pub const RAM_BYTES_MAX: u64 = 16 << 40;

/// Bytes of the body of a section. Large devices have some MiB.
pub const SECTION_BYTES_MAX: u64 = 64 << 20;

/// Sections of devices. Large machines have some hundred.
pub const DEVICES_MAX: usize = 1 << 14;

/// STARTs, PARTs and ENDs of live sections other than `ram`, without empty PARTs. A `dirty-bitmap` has
/// one for some hundred chunks of it.
pub const LIVE_BODIES_MAX: usize = 1 << 14;

/// Ranges of a working set; the rest is left off. A guest that starts touches some 10,000 pages.
pub const WORKING_SET_RANGES_MAX: usize = 1 << 16;

/// Bytes of an index's table of contents: sections, blocks and which parts of the page table there
/// are. What [`DEVICES_MAX`], [`LIVE_BODIES_MAX`] and [`RAM_BYTES_MAX`] need at most.
pub const CONTENTS_BYTES_MAX: u64 = 48 << 20;

/// Pages with XBZRLE records: their last content is kept in the index. 64 GiB of them.
pub const KEPT_PAGES_MAX: u64 = 1 << 24;
