//! Bits of a Zstandard block, read from the front or from the back.

use super::Wrong;

/// Reads from the lowest bit of the first byte on.
pub(super) struct Forward<'a> {
    bytes: &'a [u8],
    at_bit: usize,
}

impl<'a> Forward<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at_bit: 0 }
    }

    /// The next `bits` bits, at most 16; zeros behind the end.
    pub(super) fn read(&mut self, bits: u32) -> u32 {
        let value = window(self.bytes, self.at_bit) & mask(bits);
        self.at_bit += bits as usize;
        u32::try_from(value).unwrap_or(0)
    }

    /// One bit was too many.
    pub(super) fn unread_bit(&mut self) {
        self.at_bit -= 1;
    }

    /// Bytes that were begun.
    pub(super) fn used_bytes(&self) -> Result<usize, Wrong> {
        let used = self.at_bit.div_ceil(8);
        if used > self.bytes.len() {
            return Err("a table is cut short");
        }
        Ok(used)
    }
}

/// Reads from below the highest set bit of the last byte, towards the front.
pub(super) struct Backward<'a> {
    bytes: &'a [u8],
    /// Bits left; below 0 if more were read.
    left: isize,
}

impl<'a> Backward<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, Wrong> {
        let last = bytes.last().copied().unwrap_or(0);
        if last == 0 {
            return Err("a stream of bits has no end");
        }
        let bits = bytes.len() * 8 - last.leading_zeros() as usize - 1;
        Ok(Self {
            bytes,
            left: isize::try_from(bits).unwrap_or(0),
        })
    }

    /// The next `bits` bits, at most 32, without moving; zeros in front of the beginning.
    pub(super) fn peek(&self, bits: u32) -> u64 {
        match usize::try_from(self.left) {
            Ok(left) if left >= bits as usize => {
                window(self.bytes, left - bits as usize) & mask(bits)
            }
            Ok(left) => (window(self.bytes, 0) & mask(left as u32)) << (bits as usize - left),
            Err(_) => 0,
        }
    }

    pub(super) fn skip(&mut self, bits: u32) {
        self.left -= bits as isize;
    }

    pub(super) fn read(&mut self, bits: u32) -> u64 {
        let value = self.peek(bits);
        self.skip(bits);
        value
    }

    /// Were more bits read than there are?
    pub(super) fn is_overrun(&self) -> bool {
        self.left < 0
    }

    /// Every bit must have been read.
    pub(super) fn finish(&self) -> Result<(), Wrong> {
        match self.left {
            0 => Ok(()),
            _ => Err("a stream of bits has another length than its content"),
        }
    }
}

fn mask(bits: u32) -> u64 {
    (1 << bits) - 1
}

/// At least 56 bits from this bit on; zeros behind the end.
fn window(bytes: &[u8], at_bit: usize) -> u64 {
    let rest = bytes.get(at_bit / 8..).unwrap_or_default();
    let word = match rest.first_chunk() {
        Some(word) => u64::from_le_bytes(*word),
        None => {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(rest) {
                *to = *from;
            }
            u64::from_le_bytes(word)
        }
    };
    word >> (at_bit % 8)
}
