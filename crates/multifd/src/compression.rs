//! How pages of a packet are compressed.

use std::fmt;
use std::str::FromStr;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

use crate::packet::PACKET_BLOB_BYTES_MAX;
use crate::zstd;

/// How pages are compressed; both sides must be told the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// zlib: one stream for each channel, flushed after each packet.
    Zlib,
    /// Zstandard: one stream for each channel, flushed after each packet.
    Zstd,
}

/// A text is no [`Compression`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{}' is no compression (expected none, zlib or zstd)", .0.escape_debug())]
pub struct CompressionError(String);

impl FromStr for Compression {
    type Err = CompressionError;

    fn from_str(text: &str) -> Result<Self, CompressionError> {
        match text {
            "none" => Ok(Self::None),
            "zlib" => Ok(Self::Zlib),
            "zstd" => Ok(Self::Zstd),
            _ => Err(CompressionError(text.to_owned())),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "none",
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        })
    }
}

/// zlib's fastest, which is also QEMU's default.
const ZLIB_LEVEL: u32 = 1;

/// A zlib stream has ended, or does not fill its pages.
pub(crate) const TOO_SHORT: &str = "fewer bytes than its pages have";
pub(crate) const TOO_LONG: &str = "more bytes than its pages have";

/// Unpacks the blobs of one channel, in their order.
pub(crate) enum Unpacker {
    /// They are no blobs.
    None,
    Zlib(Box<Decompress>),
    Zstd(Box<zstd::Unpack>),
}

impl Unpacker {
    pub(crate) fn new(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Zlib => Self::Zlib(Box::new(Decompress::new(true))),
            Compression::Zstd => Self::Zstd(Box::new(zstd::Unpack::new())),
        }
    }

    /// Fill `pages`, no more and no less, with what all of `blob` unpacks to.
    pub(crate) fn unpack(&mut self, blob: &[u8], pages: &mut [u8]) -> Result<(), &'static str> {
        match self {
            Self::None => {
                if blob.len() != pages.len() {
                    return Err(TOO_SHORT);
                }
                pages.copy_from_slice(blob);
                Ok(())
            }
            Self::Zlib(stream) => unpack_zlib(stream, blob, pages),
            Self::Zstd(stream) => stream.unpack(blob, pages),
        }
    }
}

/// One step: bytes of input and output used.
fn inflate(
    stream: &mut Decompress,
    input: &[u8],
    output: &mut [u8],
) -> Result<(usize, usize), &'static str> {
    let (read, written) = (stream.total_in(), stream.total_out());
    let status = stream
        .decompress(input, output, FlushDecompress::Sync)
        .map_err(|_| "no zlib stream")?;
    if status == Status::StreamEnd {
        return Err("its zlib stream has ended");
    }
    let used = |now: u64, before: u64| usize::try_from(now.saturating_sub(before)).unwrap_or(0);
    Ok((
        used(stream.total_in(), read),
        used(stream.total_out(), written),
    ))
}

fn unpack_zlib(
    stream: &mut Decompress,
    mut blob: &[u8],
    mut pages: &mut [u8],
) -> Result<(), &'static str> {
    while !pages.is_empty() {
        let (read, written) = inflate(stream, blob, pages)?;
        if (read, written) == (0, 0) {
            return Err(TOO_SHORT);
        }
        blob = blob.get(read..).unwrap_or_default();
        pages = pages.get_mut(written..).unwrap_or_default();
    }
    // The end of the flush is still to be read, and must not hold data.
    loop {
        match inflate(stream, blob, &mut [0])? {
            (_, 1..) => return Err(TOO_LONG),
            (0, _) if blob.is_empty() => return Ok(()),
            (0, _) => return Err("bytes behind its zlib stream"),
            (read, _) => blob = blob.get(read..).unwrap_or_default(),
        }
    }
}

/// Packs the pages of one channel, in their order.
pub(crate) enum Packer {
    None,
    Zlib(Box<Compress>),
    Zstd(Box<zstd::Pack>),
}

impl Packer {
    pub(crate) fn new(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Zlib => {
                let level = flate2::Compression::new(ZLIB_LEVEL);
                Self::Zlib(Box::new(Compress::new(level, true)))
            }
            Compression::Zstd => Self::Zstd(Box::new(zstd::Pack::new())),
        }
    }

    /// Replace `blob` with what the other side unpacks to `pages`. False if the pages are to be sent as
    /// they are.
    pub(crate) fn pack(&mut self, pages: &[u8], blob: &mut Vec<u8>) -> Result<bool, &'static str> {
        blob.clear();
        match self {
            Self::None => return Ok(false),
            Self::Zlib(stream) => pack_zlib(stream, pages, blob)?,
            Self::Zstd(stream) => stream.pack(pages, blob)?,
        }
        let max = usize::try_from(PACKET_BLOB_BYTES_MAX).unwrap_or(usize::MAX);
        if blob.len() > max {
            return Err("compressed pages do not fit into a packet");
        }
        Ok(true)
    }
}

/// In one call, with room for anything: where the room ends in the middle of a flush, flate2 does not tell
/// whether it is complete.
fn pack_zlib(stream: &mut Compress, pages: &[u8], blob: &mut Vec<u8>) -> Result<(), &'static str> {
    blob.reserve(usize::try_from(PACKET_BLOB_BYTES_MAX).unwrap_or(0));
    let before = stream.total_in();
    stream
        .compress_vec(pages, blob, FlushCompress::Sync)
        .map_err(|_| "zlib failed")?;
    let read = stream.total_in().saturating_sub(before);
    if usize::try_from(read) != Ok(pages.len()) || !blob.ends_with(&FLUSHED) {
        return Err("compressed pages do not fit into a packet");
    }
    Ok(())
}

/// An empty stored block: how a flush ends.
const FLUSHED: [u8; 4] = [0, 0, 0xff, 0xff];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::PACKET_PAGES_BYTES;

    /// Pages that compress more or less well.
    fn pages(rng: &mut fastrand::Rng) -> Vec<u8> {
        let pages = rng.usize(1..=PACKET_PAGES_BYTES as usize >> 12);
        if rng.bool() {
            let mut bytes = vec![rng.u8(..); pages << 12];
            for page in bytes.chunks_mut(4096) {
                let noise = rng.usize(..=4096);
                rng.fill(&mut page[..noise]);
            }
            return bytes;
        }
        let (noise, period) = (rng.u8(..), rng.usize(1..5000));
        let mut bytes: Vec<u8> = Vec::new();
        for at in 0..pages << 12 {
            bytes.push(match at.checked_sub(period) {
                Some(before) if rng.u8(..) >= noise => bytes[before],
                _ => rng.u8(..),
            });
        }
        bytes
    }

    #[test]
    fn what_is_packed_unpacks_packet_by_packet() {
        let mut rng = crate::test_rng();
        for compression in [Compression::Zlib, Compression::Zstd] {
            let (mut packer, mut unpacker) = (Packer::new(compression), Unpacker::new(compression));
            let mut blob = Vec::new();
            for _ in 0..8 {
                let pages = pages(&mut rng);
                assert_eq!(packer.pack(&pages, &mut blob), Ok(true));
                let mut seen = vec![0; pages.len()];
                assert_eq!(unpacker.unpack(&blob, &mut seen), Ok(()), "{compression}");
                assert!(seen == pages, "{compression}");
            }
        }
    }

    #[test]
    fn a_blob_holds_exactly_its_pages() {
        let pages = vec![5; 3 << 12];
        for compression in [Compression::None, Compression::Zlib, Compression::Zstd] {
            let mut blob = Vec::new();
            if !Packer::new(compression)
                .pack(&pages, &mut blob)
                .expect("packed")
            {
                blob.clone_from(&pages);
            }
            for wrong in [2 << 12, 4 << 12] {
                let mut unpacker = Unpacker::new(compression);
                let outcome = unpacker.unpack(&blob, &mut vec![0; wrong]);
                assert!(outcome.is_err(), "{compression} {wrong}");
            }
            let mut unpacker = Unpacker::new(compression);
            let short = &blob[..blob.len() / 2];
            let outcome = unpacker.unpack(short, &mut vec![0; pages.len()]);
            assert!(outcome.is_err(), "{compression}");
        }
    }

    #[test]
    fn damaged_blobs_are_refused_or_unpack_to_something() {
        let mut rng = crate::test_rng();
        for compression in [Compression::Zlib, Compression::Zstd] {
            for _ in 0..60 {
                let pages = pages(&mut rng);
                let mut blob = Vec::new();
                let packed = Packer::new(compression).pack(&pages, &mut blob);
                assert_eq!(packed, Ok(true));
                for _ in 0..rng.usize(1..4) {
                    let place = rng.usize(..blob.len());
                    blob[place] = rng.u8(..);
                }
                let mut seen = vec![0; pages.len()];
                // Neither panics nor takes for ever; there is no checksum behind it.
                let _ = Unpacker::new(compression).unpack(&blob, &mut seen);
            }
        }
    }

    #[test]
    fn names_read_back_equal() {
        for compression in [Compression::None, Compression::Zlib, Compression::Zstd] {
            assert_eq!(compression.to_string().parse(), Ok(compression));
        }
        assert!("ZLIB".parse::<Compression>().is_err());
    }
}
