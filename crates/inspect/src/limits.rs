//! What is held of a stream in order to understand it.

/// Bytes that are held at once: the device sections at the end of a stream with the description
/// behind them, or a package. Large machines have some MiB.
pub const HELD_BYTES_MAX: usize = 16 << 20;

/// Bytes of a description that is looked at. Large machines have some 100 KiB.
pub const DESCRIPTION_BYTES_MAX: usize = 4 << 20;

/// Bytes of libvirt's XML in front of a stream; what libvirt accepts.
pub const LIBVIRT_XML_BYTES_MAX: u32 = 128 << 20;
