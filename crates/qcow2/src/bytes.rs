//! Big-endian numbers in tables. What lies outside reads as zero: lengths are checked before.
#![deny(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    field(bytes, at).map_or(0, u16::from_be_bytes)
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    field(bytes, at).map_or(0, u32::from_be_bytes)
}

pub(crate) fn be64(bytes: &[u8], at: usize) -> u64 {
    field(bytes, at).map_or(0, u64::from_be_bytes)
}

pub(crate) fn put64(bytes: &mut [u8], at: usize, value: u64) {
    put(bytes, at, &value.to_be_bytes());
}

pub(crate) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    put(bytes, at, &value.to_be_bytes());
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    let end = at.saturating_add(value.len());
    debug_assert!(end <= bytes.len(), "a field outside of its table");
    if let Some(place) = bytes.get_mut(at..end) {
        place.copy_from_slice(value);
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// All 8-byte entries of a table.
pub(crate) fn entries(bytes: &[u8]) -> Vec<u64> {
    let (chunks, _) = bytes.as_chunks::<8>();
    chunks
        .iter()
        .map(|entry| u64::from_be_bytes(*entry))
        .collect()
}

/// The bytes of a table of 8-byte entries.
pub(crate) fn table(entries: &[u64]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| entry.to_be_bytes())
        .collect()
}
