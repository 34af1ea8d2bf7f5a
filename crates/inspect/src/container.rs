//! What stands before a stream.
//!
//! A file that `virsh save` made begins with libvirt's own header, in the byte order of the host:
//!
//! ```text
//!  0  16  "LibvirtQemudSave", or "LibvirtQemudPart" while it is being written
//! 16   4  version: 1, 2 (with a cookie), 3 (a mapped-ram stream)
//! 20   4  bytes from the end of this header to the stream: the domain's XML, a cookie, padding
//! 24   4  the guest ran
//! 28   4  compression of the stream
//! 32   4  offset of the cookie behind this header; 0 without one
//! 36  56  reserved
//! 92      XML
//! ```
//!
//! Source: libvirt's documented save image format.

use std::io::Read;

use crate::limits::LIBVIRT_XML_BYTES_MAX;
use crate::source::Source;
use crate::walk::WalkError;

const HEADER_BYTES: usize = 92;
const SAVED: &[u8] = b"LibvirtQemudSave";
const UNFINISHED: &[u8] = b"LibvirtQemudPart";

/// What stands before a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Container {
    /// Nothing: the input is the stream.
    None,
    /// A file of `virsh save`.
    Libvirt(LibvirtHeader),
}

/// Header of a file that `virsh save` made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtHeader {
    /// Version of the header.
    pub version: u32,
    /// The guest ran when it was saved.
    pub was_running: bool,
    /// The save did not finish.
    pub is_unfinished: bool,
    /// Bytes of XML, cookie and padding.
    pub data_bytes: u32,
}

/// The input is no stream, or what stands before it is broken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContainerError {
    /// Something else that people have lying about.
    #[error("this is {found}, not a migration stream; {hint}")]
    NotAStream {
        /// What it is.
        found: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// The header of libvirt ends too early.
    #[error("truncated inside libvirt's header, at byte {0}")]
    Truncated(u64),
    /// A number in libvirt's header.
    #[error("libvirt's header: {field} is {found}, {expected} expected")]
    Field {
        /// Which number.
        field: &'static str,
        /// Its value.
        found: u32,
        /// What it may be.
        expected: &'static str,
    },
}

/// Read what stands before the stream, up to the stream's first byte.
pub(crate) fn read<R: Read>(source: &mut Source<R>) -> Result<Container, WalkError> {
    source.wait_for(SAVED.len())?;
    let window = source.window();
    if let Some(known) = KNOWN.iter().find(|known| window.starts_with(known.magic)) {
        return Err(WalkError::Container(ContainerError::NotAStream {
            found: known.what,
            hint: known.hint,
        }));
    }
    let is_unfinished = window.starts_with(UNFINISHED);
    if !is_unfinished && !window.starts_with(SAVED) {
        return Ok(Container::None);
    }
    if !source.wait_for(HEADER_BYTES)? {
        let end = source.offset_of_end();
        return Err(WalkError::Container(ContainerError::Truncated(end)));
    }
    let header = libvirt(source.window(), is_unfinished).map_err(WalkError::Container)?;
    source.consume(HEADER_BYTES);
    let mut left = usize::try_from(header.data_bytes).unwrap_or(usize::MAX);
    while left > 0 {
        if !source.wait_for(1)? {
            let end = source.offset_of_end();
            return Err(WalkError::Container(ContainerError::Truncated(end)));
        }
        let now = source.window().len().min(left);
        source.consume(now);
        left = left.saturating_sub(now);
    }
    Ok(Container::Libvirt(header))
}

fn libvirt(header: &[u8], is_unfinished: bool) -> Result<LibvirtHeader, ContainerError> {
    let word = |at: usize, swapped: bool| {
        let bytes = header.get(at..).and_then(<[u8]>::first_chunk::<4>);
        let word = u32::from_le_bytes(bytes.copied().unwrap_or_default());
        if swapped { word.swap_bytes() } else { word }
    };
    // A version of more than 16 bits was written on a host of the other byte order.
    let swapped = word(16, false) > u32::from(u16::MAX);
    let number = |at| word(at, swapped);
    let (version, data_bytes, compression) = (number(16), number(20), number(28));
    if !(1..=3).contains(&version) {
        return Err(ContainerError::Field {
            field: "version",
            found: version,
            expected: "1 to 3",
        });
    }
    if data_bytes > LIBVIRT_XML_BYTES_MAX {
        return Err(ContainerError::Field {
            field: "length of the XML",
            found: data_bytes,
            expected: "at most 128 MiB",
        });
    }
    if compression != 0 && version < 3 {
        return Err(ContainerError::Field {
            field: "compression",
            found: compression,
            expected: "0 (save_image_format \"raw\")",
        });
    }
    Ok(LibvirtHeader {
        version,
        was_running: number(24) != 0,
        is_unfinished,
        data_bytes,
    })
}

struct Known {
    magic: &'static [u8],
    what: &'static str,
    hint: &'static str,
}

const KNOWN: [Known; 6] = [
    Known {
        magic: b"QFI\xfb",
        what: "a qcow2 image",
        hint: "the VM state of a snapshot in it is one (inspect --snapshot NAME)",
    },
    Known {
        magic: b"\xfd7zXZ\0",
        what: "compressed with xz",
        hint: "pipe it through xz -dc",
    },
    Known {
        magic: b"\x1f\x8b",
        what: "compressed with gzip",
        hint: "pipe it through gzip -dc",
    },
    Known {
        magic: b"\x28\xb5\x2f\xfd",
        what: "compressed with zstd",
        hint: "pipe it through zstd -dc",
    },
    Known {
        magic: b"\x11\x22\x33\x44\0\0\0\x01",
        what: "a multifd channel",
        hint: "the devices are on the main channel",
    },
    Known {
        magic: b"\x7fELF",
        what: "an ELF file",
        hint: "perhaps an extracted core; gdb opens it",
    },
];
