//! What is held of a stream in order to understand it.

/// Bytes that are held at once: the device sections at the end of a stream with the description
/// behind them, or a package. Large machines have some MiB.
pub const HELD_BYTES_MAX: usize = 16 << 20;

/// Bytes of a description that is looked at. Large machines have some 100 KiB.
pub const DESCRIPTION_BYTES_MAX: usize = 4 << 20;

/// Bytes of libvirt's XML in front of a stream; what libvirt accepts.
pub const LIBVIRT_XML_BYTES_MAX: u32 = 128 << 20;

/// Items of a report. PARTs of the same section are one, if nothing but other PARTs is between them.
pub const REPORT_ITEMS_MAX: usize = 1 << 14;

/// Devices of a report. Large machines have some hundred.
pub const REPORT_DEVICES_MAX: usize = 1 << 14;

/// Disks, or bitmaps, of a report.
pub const REPORT_NAMES_MAX: usize = 1 << 10;

/// Problems of a report; the others are counted.
pub const PROBLEMS_MAX: usize = 100;

/// Pages of which is remembered whether they came before: one bit each, 256 GiB of memory.
pub const SEEN_PAGES_MAX: u64 = 1 << 26;
