//! What is where in an index file.
//!
//! ```text
//! 0       header, 4096 bytes
//! 4096    page table: chunks of 512 pages, of all blocks one behind the other; only those that are
//!         not uniform are written, the rest are holes
//!         pages whose content is kept here (XBZRLE), 4104 bytes each
//!         table of contents: sections, blocks; then a byte for each chunk: absent, zero, written
//!
//! header  0   8 bytes magic        8   u32 version         12  u32 0
//!         16  u64 nonce            24  u64 image's length  32  u64 its time   40  u64 its tag
//!         48  u64 chunks           56  u64 kept pages
//!         64  u64 contents' offset 72  u64 their bytes     80  u32 their CRC-32
//!         84  u32 CRC-32 of samples of the image           88  8 × u64 where some of these are
//!         4092  u32 CRC-32 of what is before
//! ```
//!
//! All numbers are little endian. The header is written last. Each part has a CRC-32 of its own that
//! also covers the index's nonce: parts of two indexes do not mix.

use super::chunk::{CHUNK_BYTES, seeded};
use crate::storage::{Identity, Storage};

pub(crate) const HEADER_BYTES: usize = 4096;
pub(crate) const MAGIC: &[u8; 8] = b"vmfindex";
const VERSION: u32 = 1;
const CRC_START: usize = HEADER_BYTES - 4;

/// A page with its checksum, which also covers the slot's number.
pub(crate) const SLOT_BYTES: usize = 4096 + 8;
/// Places in the image that are compared, besides its ends.
pub(crate) const SAMPLES: usize = 8;
/// Bytes of each.
const SAMPLE_BYTES: usize = 16;
/// Bytes of each end that are compared.
const END_BYTES: usize = 4096;

/// Where a chunk is.
pub(crate) fn chunk_offset(number: u64) -> u64 {
    number
        .saturating_mul(CHUNK_BYTES as u64)
        .saturating_add(HEADER_BYTES as u64)
}

/// Where a kept page is, in an index of so many chunks.
pub(crate) fn slot_offset(chunks: u64, slot: u64) -> u64 {
    slot.saturating_mul(SLOT_BYTES as u64)
        .saturating_add(slots_offset(chunks))
}

fn slots_offset(chunks: u64) -> u64 {
    chunk_offset(chunks).next_multiple_of(4096)
}

/// The header of an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) nonce: u64,
    pub(crate) identity: Identity,
    pub(crate) chunks: u64,
    pub(crate) kept_pages: u64,
    pub(crate) contents_offset: u64,
    pub(crate) contents_bytes: u64,
    pub(crate) contents_crc: u32,
    pub(crate) samples_crc: u32,
    pub(crate) samples: [u64; SAMPLES],
}

impl Header {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        for number in [
            self.nonce,
            self.identity.bytes,
            self.identity.modified_ns,
            self.identity.tag,
            self.chunks,
            self.kept_pages,
            self.contents_offset,
            self.contents_bytes,
        ] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(self.contents_crc.to_le_bytes());
        bytes.extend(self.samples_crc.to_le_bytes());
        for sample in self.samples {
            bytes.extend(sample.to_le_bytes());
        }
        bytes.resize(CRC_START, 0);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// `None` if these are not the bytes of one.
    pub(crate) fn decode(bytes: &[u8; HEADER_BYTES]) -> Option<Self> {
        let (body, crc) = bytes.split_at_checked(CRC_START)?;
        if crc32fast::hash(body).to_le_bytes() != crc || !body.starts_with(MAGIC) {
            return None;
        }
        let u32_at = |at: usize| Some(u32::from_le_bytes(*body.get(at..)?.first_chunk()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(*body.get(at..)?.first_chunk()?));
        if u32_at(8)? != VERSION {
            return None;
        }
        let mut samples = [0; SAMPLES];
        for (sample, at) in samples.iter_mut().zip((88..).step_by(8)) {
            *sample = u64_at(at)?;
        }
        Some(Self {
            nonce: u64_at(16)?,
            identity: Identity {
                bytes: u64_at(24)?,
                modified_ns: u64_at(32)?,
                tag: u64_at(40)?,
            },
            chunks: u64_at(48)?,
            kept_pages: u64_at(56)?,
            contents_offset: u64_at(64)?,
            contents_bytes: u64_at(72)?,
            contents_crc: u32_at(80)?,
            samples_crc: u32_at(84)?,
            samples,
        })
    }
}

/// CRC-32 of the first and last bytes of an image and of some in between.
pub(crate) fn sample(storage: &dyn Storage, samples: &[u64]) -> std::io::Result<u32> {
    let (start, end) = (storage.start(), storage.length());
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = [0; END_BYTES];
    let ends = [
        (start, END_BYTES),
        (end.saturating_sub(END_BYTES as u64).max(start), END_BYTES),
    ];
    let between = samples.iter().map(|at| (*at, SAMPLE_BYTES));
    for (at, bytes) in ends.into_iter().chain(between) {
        let left = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
        let piece = buffer.get_mut(..bytes.min(left)).unwrap_or_default();
        storage.read_at(at, piece)?;
        hasher.update(piece);
    }
    Ok(hasher.finalize())
}

/// The bytes of a slot.
pub(crate) fn encode_slot(nonce: u64, slot: u64, page: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(SLOT_BYTES);
    bytes.extend(page);
    bytes.extend(seeded(nonce ^ slot, page).to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

/// The page in a slot; `None` if it is damaged.
pub(crate) fn decode_slot(nonce: u64, slot: u64, bytes: &[u8; SLOT_BYTES]) -> Option<&[u8]> {
    let (page, rest) = bytes.split_at_checked(4096)?;
    let sum = seeded(nonce ^ slot, page).to_le_bytes();
    rest.starts_with(&sum).then_some(page)
}
