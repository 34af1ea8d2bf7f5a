//! Zstandard streams (RFC 8878), as far as multifd needs them: each packet holds whole blocks, and what
//! they unpack to is wanted at once, although the frame goes on.
//!
//! ```text
//! frame   28 b5 2f fd │ descriptor, [window], [dictionary], [content size] │ blocks … │ [checksum]
//! block   u24: last, kind, size │ raw, one byte, or literals and sequences
//! ```
//!
//! The decoder of `ruzstd` keeps a whole window back until a frame ends, and takes as much memory as a
//! frame asks for; here every block is held to what the format allows it, every packet to its pages.
//! Checksums are stepped over: QEMU writes none.

#![expect(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    reason = "all numbers come from fields of at most 32 bits and are held to their ranges where they are read"
)]

mod bits;
mod entropy;

use bits::Backward;
use entropy::{Fse, Huffman};

use crate::compression::{TOO_LONG, TOO_SHORT};

/// What is wrong with a stream.
type Wrong = &'static str;

const CUT: Wrong = "its zstd stream is cut short";
const FRAME_MAGIC: u32 = 0xfd2f_b528;
const SKIPPABLE_MAGIC: u32 = 0x184d_2a50;
const CHECKSUM_BYTES: usize = 4;

/// History that a frame may ask for: what QEMU's highest level (20) does.
pub(crate) const ZSTD_WINDOW_BYTES_MAX: u64 = 32 << 20;

/// Bytes that one block unpacks to.
const BLOCK_BYTES_MAX: usize = 128 << 10;

/// Unpacks the blobs of one channel, in their order.
#[derive(Default)]
pub(crate) struct Zstd {
    /// What was unpacked; at least the window, if there was so much.
    history: Vec<u8>,
    frame: Option<Frame>,
}

/// What blocks of one frame share.
struct Frame {
    window_bytes: usize,
    has_checksum: bool,
    huffman: Option<Huffman>,
    literal_lengths: Option<Fse>,
    offsets: Option<Fse>,
    match_lengths: Option<Fse>,
    /// The offsets used last.
    recent: [usize; 3],
    literals: Vec<u8>,
}

impl Zstd {
    /// Fill `pages`, no more and no less, with what all of `blob` unpacks to.
    pub(crate) fn unpack(&mut self, mut blob: &[u8], pages: &mut [u8]) -> Result<(), Wrong> {
        let start = self.history.len();
        let end = start + pages.len();
        while !blob.is_empty() {
            let Some(frame) = &mut self.frame else {
                blob = match skippable(blob)? {
                    Some(rest) => rest,
                    None => {
                        let (frame, rest) = Frame::read(blob)?;
                        self.frame = Some(frame);
                        rest
                    }
                };
                continue;
            };
            let (is_last, rest) = frame.block(blob, &mut self.history, end)?;
            blob = rest;
            if is_last {
                let checksum_bytes = if frame.has_checksum {
                    CHECKSUM_BYTES
                } else {
                    0
                };
                blob = blob.get(checksum_bytes..).ok_or(CUT)?;
                self.frame = None;
            }
        }
        let unpacked = self.history.get(start..).unwrap_or_default();
        if unpacked.len() != pages.len() {
            return Err(TOO_SHORT);
        }
        pages.copy_from_slice(unpacked);
        self.forget();
        Ok(())
    }

    /// Forget what no block can refer to, unless that would be done too often.
    fn forget(&mut self) {
        let keep = self.frame.as_ref().map_or(0, |frame| frame.window_bytes);
        let surplus = self.history.len().saturating_sub(keep);
        if surplus >= keep.max(BLOCK_BYTES_MAX) {
            self.history.drain(..surplus);
        }
    }
}

/// What follows a frame that is to be skipped; `None` if it is another frame.
fn skippable(bytes: &[u8]) -> Result<Option<&[u8]>, Wrong> {
    let magic = bytes.first_chunk().ok_or(CUT)?;
    if u32::from_le_bytes(*magic) & !0xf != SKIPPABLE_MAGIC {
        return Ok(None);
    }
    let (length, rest) = take(bytes, 8)?;
    let length = number(length.get(4..).unwrap_or_default());
    Ok(Some(take(rest, length as usize)?.1))
}

fn take(bytes: &[u8], count: usize) -> Result<(&[u8], &[u8]), Wrong> {
    bytes.split_at_checked(count).ok_or(CUT)
}

/// A little-endian number of at most 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl Frame {
    /// Read the header of a frame.
    fn read(bytes: &[u8]) -> Result<(Self, &[u8]), Wrong> {
        let (head, rest) = take(bytes, 5)?;
        let (magic, descriptor) = head.split_at_checked(4).ok_or(CUT)?;
        if number(magic) != u64::from(FRAME_MAGIC) {
            return Err("no zstd stream");
        }
        let descriptor = number(descriptor);
        if descriptor & 0x08 != 0 {
            return Err("a zstd frame with a reserved bit");
        }
        let is_single = descriptor & 0x20 != 0;
        let (window, rest) = take(rest, usize::from(!is_single))?;
        let dictionary_bytes = match descriptor & 3 {
            3 => 4,
            bytes => bytes as usize,
        };
        let (dictionary, rest) = take(rest, dictionary_bytes)?;
        if number(dictionary) != 0 {
            return Err("a zstd frame with a dictionary");
        }
        let size_bytes = match descriptor >> 6 {
            0 => usize::from(is_single),
            log => 1 << log,
        };
        let (size, rest) = take(rest, size_bytes)?;
        let size = number(size) + if size_bytes == 2 { 256 } else { 0 };
        let window_bytes = match window.first() {
            None => size,
            Some(window) => {
                let base = 1_u64 << (10 + (window >> 3));
                base + base / 8 * u64::from(window & 7)
            }
        };
        if window_bytes > ZSTD_WINDOW_BYTES_MAX {
            return Err("a zstd frame with a window above 32 MiB");
        }
        let frame = Self {
            window_bytes: window_bytes as usize,
            has_checksum: descriptor & 0x04 != 0,
            huffman: None,
            literal_lengths: None,
            offsets: None,
            match_lengths: None,
            recent: [1, 4, 8],
            literals: Vec::new(),
        };
        Ok((frame, rest))
    }

    /// Unpack one block behind `history`, which may grow up to `end`. Whether it was the last, and what
    /// follows it.
    fn block<'a>(
        &mut self,
        bytes: &'a [u8],
        history: &mut Vec<u8>,
        end: usize,
    ) -> Result<(bool, &'a [u8]), Wrong> {
        let (head, rest) = take(bytes, 3)?;
        let head = number(head);
        let size = (head >> 3) as usize;
        if size > BLOCK_BYTES_MAX {
            return Err("a zstd block above 128 KiB");
        }
        let end = end.min(history.len() + BLOCK_BYTES_MAX);
        let rest = match head >> 1 & 3 {
            0 => {
                let (raw, rest) = take(rest, size)?;
                append(history, raw, end)?;
                rest
            }
            1 => {
                let (byte, rest) = rest.split_first().ok_or(CUT)?;
                if history.len() + size > end {
                    return Err(TOO_LONG);
                }
                history.resize(history.len() + size, *byte);
                rest
            }
            2 => {
                let (content, rest) = take(rest, size)?;
                let sequences = self.read_literals(content)?;
                self.sequences(sequences, history, end)?;
                rest
            }
            _ => return Err("a zstd block of an unknown kind"),
        };
        Ok((head & 1 != 0, rest))
    }

    /// Read the literals of a block; what follows them is the result.
    fn read_literals<'a>(&mut self, bytes: &'a [u8]) -> Result<&'a [u8], Wrong> {
        let first = *bytes.first().ok_or(CUT)?;
        self.literals.clear();
        let format = first >> 2 & 3;
        if first & 2 == 0 {
            let (head_bytes, shift) = match format {
                0 | 2 => (1, 3),
                1 => (2, 4),
                _ => (3, 4),
            };
            let (head, rest) = take(bytes, head_bytes)?;
            let size = literals_size(number(head) >> shift)?;
            if first & 1 == 0 {
                let (raw, rest) = take(rest, size)?;
                self.literals.extend(raw);
                return Ok(rest);
            }
            let (byte, rest) = rest.split_first().ok_or(CUT)?;
            self.literals.resize(size, *byte);
            return Ok(rest);
        }
        let (head_bytes, bits, streams) = match format {
            0 => (3, 10, 1),
            1 => (3, 10, 4),
            2 => (4, 14, 4),
            _ => (5, 18, 4),
        };
        let (head, rest) = take(bytes, head_bytes)?;
        let sizes = number(head) >> 4;
        let mask = (1 << bits) - 1;
        let size = literals_size(sizes & mask)?;
        let (mut coded, rest) = take(rest, (sizes >> bits & mask) as usize)?;
        if first & 1 == 0 {
            let (huffman, used) = Huffman::read(coded)?;
            self.huffman = Some(huffman);
            coded = take(coded, used)?.1;
        }
        let huffman = self.huffman.as_ref().ok_or("a block without a tree")?;
        if streams == 1 {
            huffman.decode(coded, size, &mut self.literals)?;
            return Ok(rest);
        }
        let (jumps, mut coded) = take(coded, 6)?;
        let part = size.div_ceil(4);
        let last = size.checked_sub(3 * part).ok_or("too few literals")?;
        for jump in jumps.chunks(2) {
            let (stream, others) = take(coded, number(jump) as usize)?;
            huffman.decode(stream, part, &mut self.literals)?;
            coded = others;
        }
        huffman.decode(coded, last, &mut self.literals)?;
        Ok(rest)
    }

    /// Carry out the sequences of a block: literals, and copies of what was unpacked before.
    fn sequences(&mut self, bytes: &[u8], history: &mut Vec<u8>, end: usize) -> Result<(), Wrong> {
        let (count, bytes) = sequences_count(bytes)?;
        let mut literals = &self.literals[..];
        if count == 0 {
            return match bytes {
                [] => append(history, literals, end),
                _ => Err("bytes behind the literals"),
            };
        }
        let (modes, bytes) = bytes.split_first().ok_or(CUT)?;
        let bytes = LITERAL_LENGTHS.table(modes >> 6, bytes, &mut self.literal_lengths)?;
        let bytes = OFFSETS.table(modes >> 4 & 3, bytes, &mut self.offsets)?;
        let bytes = MATCH_LENGTHS.table(modes >> 2 & 3, bytes, &mut self.match_lengths)?;
        let (Some(literal_lengths), Some(offsets), Some(match_lengths)) =
            (&self.literal_lengths, &self.offsets, &self.match_lengths)
        else {
            return Err(NO_TABLE);
        };
        let input = &mut Backward::new(bytes)?;
        let mut literal_state = literal_lengths.start(input);
        let mut offset_state = offsets.start(input);
        let mut match_state = match_lengths.start(input);
        for left in (0..count).rev() {
            let offset_bits = u32::from(offsets.cell(offset_state).symbol);
            let offset_value = (1 << offset_bits) + input.read(offset_bits) as usize;
            let match_bytes = MATCH_LENGTHS.value(match_lengths.cell(match_state).symbol, input)?;
            let literal_bytes =
                LITERAL_LENGTHS.value(literal_lengths.cell(literal_state).symbol, input)?;
            if input.is_overrun() {
                return Err(CUT);
            }
            let (now, later) = take(literals, literal_bytes)?;
            literals = later;
            append(history, now, end)?;
            let offset = next_offset(&mut self.recent, offset_value, literal_bytes == 0)?;
            copy(history, offset, match_bytes, end)?;
            if left > 0 {
                literal_state = literal_lengths.next(literal_state, input);
                match_state = match_lengths.next(match_state, input);
                offset_state = offsets.next(offset_state, input);
            }
        }
        input.finish()?;
        append(history, literals, end)
    }
}

const NO_TABLE: Wrong = "a block without a table";
const TOO_FAR: Wrong = "a copy of what is not there";

fn literals_size(size: u64) -> Result<usize, Wrong> {
    match size as usize {
        size @ ..=BLOCK_BYTES_MAX => Ok(size),
        _ => Err("too many literals"),
    }
}

fn sequences_count(bytes: &[u8]) -> Result<(usize, &[u8]), Wrong> {
    match bytes {
        [low @ ..128, rest @ ..] => Ok((usize::from(*low), rest)),
        [255, low, high, rest @ ..] => {
            let count = usize::from(*low) + (usize::from(*high) << 8) + 0x7f00;
            Ok((count, rest))
        }
        [high, low, rest @ ..] => {
            let count = ((usize::from(*high) - 128) << 8) + usize::from(*low);
            Ok((count, rest))
        }
        _ => Err(CUT),
    }
}

fn append(history: &mut Vec<u8>, bytes: &[u8], end: usize) -> Result<(), Wrong> {
    if history.len() + bytes.len() > end {
        return Err(TOO_LONG);
    }
    history.extend(bytes);
    Ok(())
}

/// Repeat what stands `offset` bytes before the end; the copy may overlap itself.
fn copy(history: &mut Vec<u8>, offset: usize, bytes: usize, end: usize) -> Result<(), Wrong> {
    let start = history.len().checked_sub(offset).ok_or(TOO_FAR)?;
    if history.len() + bytes > end {
        return Err(TOO_LONG);
    }
    let mut left = bytes;
    while left > 0 {
        // Each round doubles what can be copied at once.
        let piece = left.min(history.len() - start);
        history.extend_from_within(start..start + piece);
        left -= piece;
    }
    Ok(())
}

/// The offset that a value means: one of the recent ones, or a new one.
fn next_offset(
    recent: &mut [usize; 3],
    value: usize,
    is_without_literals: bool,
) -> Result<usize, Wrong> {
    let [a, b, c] = *recent;
    let offset = match value + usize::from(is_without_literals) {
        1 => a,
        2 => b,
        3 => c,
        4 if value == 3 => a - 1,
        _ => value - 3,
    };
    if offset == 0 {
        return Err(TOO_FAR);
    }
    *recent = match value + usize::from(is_without_literals) {
        1 => [a, b, c],
        2 => [b, a, c],
        _ => [offset, a, b],
    };
    Ok(offset)
}

/// One of the three numbers of a sequence.
struct Kind {
    /// The table of mode 0.
    frequencies: &'static [i16],
    log: u32,
    log_max: u32,
    symbols: usize,
    /// From this code on, each has its base and its number of extra bits; before, `first` more than
    /// itself. Empty for offsets, which have as many extra bits as their code says.
    plain: u8,
    first: usize,
    coded: &'static [(usize, u32)],
}

const LITERAL_LENGTHS: Kind = Kind {
    frequencies: &[
        4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1,
        1, 1, -1, -1, -1, -1,
    ],
    log: 6,
    log_max: 9,
    symbols: 36,
    plain: 16,
    first: 0,
    coded: &[
        (16, 1),
        (18, 1),
        (20, 1),
        (22, 1),
        (24, 2),
        (28, 2),
        (32, 3),
        (40, 3),
        (48, 4),
        (64, 6),
        (128, 7),
        (256, 8),
        (512, 9),
        (1024, 10),
        (2048, 11),
        (4096, 12),
        (8192, 13),
        (16384, 14),
        (32768, 15),
        (65536, 16),
    ],
};

const MATCH_LENGTHS: Kind = Kind {
    frequencies: &[
        1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
        1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1,
    ],
    log: 6,
    log_max: 9,
    symbols: 53,
    plain: 32,
    first: 3,
    coded: &[
        (35, 1),
        (37, 1),
        (39, 1),
        (41, 1),
        (43, 2),
        (47, 2),
        (51, 3),
        (59, 3),
        (67, 4),
        (83, 4),
        (99, 5),
        (131, 7),
        (259, 8),
        (515, 9),
        (1027, 10),
        (2051, 11),
        (4099, 12),
        (8195, 13),
        (16387, 14),
        (32771, 15),
        (65539, 16),
    ],
};

const OFFSETS: Kind = Kind {
    frequencies: &[
        1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1,
    ],
    log: 5,
    log_max: 8,
    symbols: 32,
    plain: 0,
    first: 0,
    coded: &[],
};

impl Kind {
    /// Set the table that a mode means; what follows its description is the result.
    fn table<'a>(
        &self,
        mode: u8,
        bytes: &'a [u8],
        table: &mut Option<Fse>,
    ) -> Result<&'a [u8], Wrong> {
        match mode {
            0 => {
                *table = Some(Fse::new(self.frequencies, self.log)?);
                Ok(bytes)
            }
            1 => {
                let (symbol, rest) = bytes.split_first().ok_or(CUT)?;
                if usize::from(*symbol) >= self.symbols {
                    return Err("a table of an unknown symbol");
                }
                *table = Some(Fse::constant(*symbol));
                Ok(rest)
            }
            2 => {
                let (read, used) = Fse::read(bytes, self.log_max, self.symbols)?;
                *table = Some(read);
                Ok(take(bytes, used)?.1)
            }
            _ if table.is_none() => Err(NO_TABLE),
            _ => Ok(bytes),
        }
    }

    /// The number that a code and its extra bits mean.
    fn value(&self, code: u8, input: &mut Backward<'_>) -> Result<usize, Wrong> {
        let Some(index) = code.checked_sub(self.plain) else {
            return Ok(usize::from(code) + self.first);
        };
        let (base, bits) = self.coded.get(usize::from(index)).ok_or(NO_TABLE)?;
        Ok(base + input.read(*bits) as usize)
    }
}

#[cfg(test)]
mod tests;
