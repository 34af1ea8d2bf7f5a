//! One page.

use std::io::Read;

use crate::error::ImageError;
use crate::storage::Storage;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// The longest zlib stream of a page that the wire format allows.
pub(crate) const ZLIB_BYTES_MAX: usize = PAGE + 14;

/// Only zeroes?
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    // The first bytes tell most pages apart; then in runs, which the compiler can unroll.
    let zero = |run: &[[u8; 16]]| {
        run.iter()
            .fold(0, |seen, word| seen | u128::from_ne_bytes(*word))
            == 0
    };
    words.chunks(8).all(zero) && rest.iter().all(|byte| *byte == 0)
}

/// A page as a whole zlib stream.
pub(crate) fn inflate(payload: &[u8], page: &mut [u8]) -> Result<(), String> {
    let mut zlib = flate2::read::ZlibDecoder::new(payload);
    let fault = |error: std::io::Error| format!("its zlib stream is wrong: {error}");
    zlib.read_exact(page).map_err(fault)?;
    match zlib.read(&mut [0]).map_err(fault)? {
        0 => Ok(()),
        _ => Err("its zlib stream holds more than a page".into()),
    }
}

/// Read a zlib page, whose length stands before its payload.
pub(crate) fn fetch_zlib(
    storage: &dyn Storage,
    offset: u64,
    page: &mut [u8],
) -> Result<(), ImageError> {
    let failed = |source| ImageError::Read {
        image: storage.name(),
        offset,
        source,
    };
    let broken = |problem: String| ImageError::BrokenRam {
        image: storage.name(),
        offset,
        problem,
    };
    let mut length = [0; 4];
    storage
        .read_at(offset.saturating_sub(4), &mut length)
        .map_err(failed)?;
    let mut payload = [0; ZLIB_BYTES_MAX];
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    let Some(payload) = payload.get_mut(..length) else {
        return Err(broken(format!("a zlib stream of {length} bytes")));
    };
    storage.read_at(offset, payload).map_err(failed)?;
    inflate(payload, page).map_err(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_counts() {
        let mut page = [0; PAGE];
        assert!(is_zero(&page));
        for at in 0..PAGE {
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
        assert!(is_zero(&[0; 5]));
        assert!(!is_zero(&[0, 0, 0, 0, 1]));
    }
}
