//! The zero test: most of a disk and of a guest's memory is zero, and need not be sent.

/// Looked at as one piece before the first early exit: large enough for the compiler to keep the
/// vector units busy, small enough that data (which is rarely zero at its start) costs nothing.
const BLOCK_BYTES: usize = 1024;

/// Are all bytes zero? True for an empty slice. Stops at the first block of 1 KiB that is not.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // One look at the start settles most data without touching a block.
    if bytes.first().is_some_and(|byte| *byte != 0) {
        return false;
    }
    let (blocks, rest) = bytes.as_chunks::<BLOCK_BYTES>();
    blocks.iter().all(block_is_zero) && rest.iter().fold(0, |seen, byte| seen | byte) == 0
}

/// No early exit inside, so that it compiles to a run of vector ORs.
fn block_is_zero(block: &[u8; BLOCK_BYTES]) -> bool {
    let (lanes, _) = block.as_chunks::<64>();
    let mut seen = [0u8; 64];
    for lane in lanes {
        for (seen, byte) in seen.iter_mut().zip(lane) {
            *seen |= byte;
        }
    }
    seen == [0; 64]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_alignment_and_length_with_and_without_a_set_byte() {
        let mut bytes = vec![0u8; 64 + 300 + 64];
        for start in 0..64 {
            for length in 0..=300 {
                // What lies around the slice does not count.
                bytes.fill(0xff);
                bytes[start..start + length].fill(0);
                assert!(is_zero(&bytes[start..start + length]), "{start} {length}");
                for set in [0, length / 2, length.saturating_sub(1)] {
                    if length > 0 {
                        bytes[start + set] = 0x80;
                        assert!(
                            !is_zero(&bytes[start..start + length]),
                            "{start} {length} {set}"
                        );
                        bytes[start + set] = 0;
                    }
                }
            }
        }
    }

    #[test]
    fn one_bit_anywhere_in_a_page() {
        let mut page = [0u8; 4096];
        assert!(is_zero(&page));
        for position in 0..page.len() {
            for bit in [0x01, 0x80] {
                page[position] = bit;
                assert!(!is_zero(&page), "byte {position}");
                assert!(!is_zero(&page[position..]), "from byte {position}");
                assert!(is_zero(&page[..position]), "up to byte {position}");
                assert!(is_zero(&page[position + 1..]), "after byte {position}");
            }
            page[position] = 0;
        }
    }

    #[test]
    fn one_byte_anywhere_in_a_long_odd_run() {
        let mut bytes = vec![0u8; 5 * BLOCK_BYTES + 37];
        for position in 0..bytes.len() {
            bytes[position] = 1;
            assert!(!is_zero(&bytes), "byte {position}");
            bytes[position] = 0;
        }
        assert!(is_zero(&bytes));
    }
}
