//! Where pages are: entries of the page table, and the chunks in which they lie in the file.
//!
//! ```text
//! 0     512 × u64 place    bits 63..60 kind, 59..0 offset in the image, slot or fill byte
//! 4096  512 × u32 CRC-32 of the page
//! 6144  u64 number of the chunk
//! 6152  u32 0
//! 6156  u32 CRC-32 of the index's nonce and all that is before
//! ```
//!
//! All numbers are little endian.

/// Pages of a chunk: 2 MiB of guest memory.
pub(crate) const CHUNK_PAGES: usize = 512;
/// Bytes of a chunk in the file.
pub(crate) const CHUNK_BYTES: usize = CHUNK_PAGES * 12 + 16;
const SUMS_START: usize = CHUNK_PAGES * 8;
const SUMS_END: usize = CHUNK_PAGES * 12;
const CRC_START: usize = CHUNK_BYTES - 4;

const KIND_SHIFT: u32 = 60;
const VALUE_MASK: u64 = (1 << KIND_SHIFT) - 1;

/// Where a page is, packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place(u64);

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    /// Not in the image.
    Absent,
    /// All zeroes.
    Zero,
    /// All this byte, which is not zero.
    Fill(u8),
    /// In the image, behind its record.
    Plain(Payload),
    /// In the image, behind its record, as a zlib stream.
    Zlib(Payload),
    /// In the index.
    Kept(u64),
}

/// Payload of a page's record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Payload {
    /// Where it starts in the image.
    pub(crate) offset: u64,
    /// The record names its block.
    pub(crate) is_named: bool,
}

impl Place {
    pub(crate) const ABSENT: Self = Self(0);
    pub(crate) const ZERO: Self = Self(1 << KIND_SHIFT);

    /// `None` for an offset that does not fit.
    pub(crate) fn new(place: Where) -> Option<Self> {
        let (kind, value) = match place {
            Where::Absent => (0, 0),
            Where::Zero => (1, 0),
            Where::Fill(byte) => (2, u64::from(byte)),
            Where::Plain(payload) => (if payload.is_named { 4 } else { 3 }, payload.offset),
            Where::Zlib(payload) => (if payload.is_named { 6 } else { 5 }, payload.offset),
            Where::Kept(slot) => (7, slot),
        };
        (value <= VALUE_MASK).then_some(Self(kind << KIND_SHIFT | value))
    }

    /// `None` for what no index says.
    pub(crate) fn get(self) -> Option<Where> {
        let value = self.0 & VALUE_MASK;
        let payload = |is_named| Payload {
            offset: value,
            is_named,
        };
        Some(match self.0 >> KIND_SHIFT {
            0 => Where::Absent,
            1 => Where::Zero,
            2 => Where::Fill(u8::try_from(value).ok()?),
            3 => Where::Plain(payload(false)),
            4 => Where::Plain(payload(true)),
            5 => Where::Zlib(payload(false)),
            6 => Where::Zlib(payload(true)),
            7 => Where::Kept(value),
            _ => return None,
        })
    }
}

/// Entries of 512 pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) places: [Place; CHUNK_PAGES],
    /// CRC-32 of those in the image.
    pub(crate) sums: [u32; CHUNK_PAGES],
}

impl Chunk {
    pub(crate) fn filled(place: Place) -> Self {
        Self {
            places: [place; CHUNK_PAGES],
            sums: [0; CHUNK_PAGES],
        }
    }

    /// Entry of the chunk's page `page`.
    pub(crate) fn entry(&self, page: usize) -> Option<(Place, u32)> {
        Some((*self.places.get(page)?, *self.sums.get(page)?))
    }

    pub(crate) fn encode(&self, nonce: u64, number: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CHUNK_BYTES);
        for place in &self.places {
            bytes.extend(place.0.to_le_bytes());
        }
        for sum in &self.sums {
            bytes.extend(sum.to_le_bytes());
        }
        bytes.extend(number.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(seeded(nonce, &bytes).to_le_bytes());
        bytes
    }

    /// `None` if these are not the bytes of this chunk.
    pub(crate) fn decode(bytes: &[u8; CHUNK_BYTES], nonce: u64, number: u64) -> Option<Self> {
        let (body, crc) = bytes.split_at_checked(CRC_START)?;
        if seeded(nonce, body).to_le_bytes() != crc
            || body.get(SUMS_END..)?.first_chunk()? != &number.to_le_bytes()
        {
            return None;
        }
        let mut chunk = Self::filled(Place::ABSENT);
        let (words, _) = body.get(..SUMS_START)?.as_chunks();
        for (place, word) in chunk.places.iter_mut().zip(words) {
            *place = Place(u64::from_le_bytes(*word));
        }
        let (words, _) = body.get(SUMS_START..SUMS_END)?.as_chunks();
        for (sum, word) in chunk.sums.iter_mut().zip(words) {
            *sum = u32::from_le_bytes(*word);
        }
        Some(chunk)
    }
}

/// CRC-32 of bytes that belong to one index alone.
pub(crate) fn seeded(nonce: u64, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&nonce.to_le_bytes());
    hasher.update(bytes);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_survive() {
        for place in [
            Where::Absent,
            Where::Zero,
            Where::Fill(0xff),
            Where::Plain(Payload {
                offset: VALUE_MASK,
                is_named: false,
            }),
            Where::Plain(Payload {
                offset: 8,
                is_named: true,
            }),
            Where::Zlib(Payload {
                offset: 9,
                is_named: false,
            }),
            Where::Zlib(Payload {
                offset: 9,
                is_named: true,
            }),
            Where::Kept(7),
        ] {
            assert_eq!(Place::new(place).unwrap().get(), Some(place));
        }
        assert_eq!(Place::new(Where::Kept(VALUE_MASK + 1)), None);
        assert_eq!(Place(8 << KIND_SHIFT).get(), None);
        assert_eq!(Place(2 << KIND_SHIFT | 256).get(), None);
    }

    #[test]
    fn a_chunk_is_that_of_one_place_in_one_index() {
        let mut chunk = Chunk::filled(Place::ZERO);
        chunk.places[511] = Place::new(Where::Kept(3)).unwrap();
        chunk.sums[511] = 0xdead_beef;
        let bytes: [u8; CHUNK_BYTES] = chunk.encode(77, 5).try_into().unwrap();
        assert_eq!(Chunk::decode(&bytes, 77, 5), Some(chunk));
        assert_eq!(Chunk::decode(&bytes, 77, 6), None);
        assert_eq!(Chunk::decode(&bytes, 78, 5), None);
        for at in 0..CHUNK_BYTES {
            let mut flipped = bytes;
            flipped[at] ^= 0x10;
            assert_eq!(Chunk::decode(&flipped, 77, 5), None, "{at}");
        }
    }
}
