//! The two codes of Zstandard: FSE and Huffman.

use super::Wrong;
use super::bits::{Backward, Forward};

/// What to do in one state.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cell {
    pub(super) symbol: u8,
    bits: u8,
    base: u16,
}

/// An FSE decoding table.
#[derive(Clone, Debug)]
pub(super) struct Fse {
    cells: Vec<Cell>,
    log: u32,
}

impl Fse {
    /// A table of one symbol.
    pub(super) fn constant(symbol: u8) -> Self {
        Self {
            cells: vec![Cell {
                symbol,
                bits: 0,
                base: 0,
            }],
            log: 0,
        }
    }

    /// A table for these frequencies, which add up to `1 << log`; -1 is less than one.
    pub(super) fn new(frequencies: &[i16], log: u32) -> Result<Self, Wrong> {
        const BROKEN: Wrong = "a table of frequencies does not add up";
        let size = 1_usize << log;
        let mut cells = vec![Cell::default(); size];
        let mut high = size;
        let mut next = vec![0_usize; frequencies.len()];
        for (symbol, frequency) in frequencies.iter().enumerate() {
            let next = next.get_mut(symbol).ok_or(BROKEN)?;
            *next = usize::try_from(*frequency).unwrap_or(1);
            if *frequency < 0 {
                high = high.checked_sub(1).ok_or(BROKEN)?;
                cells.get_mut(high).ok_or(BROKEN)?.symbol = symbol as u8;
            }
        }
        let step = (size >> 1) + (size >> 3) + 3;
        let mut at = 0;
        for (symbol, frequency) in frequencies.iter().enumerate() {
            for _ in 0..usize::try_from(*frequency).unwrap_or(0) {
                cells.get_mut(at).ok_or(BROKEN)?.symbol = symbol as u8;
                at = (at + step) & (size - 1);
                while at >= high && high > 0 {
                    at = (at + step) & (size - 1);
                }
            }
        }
        if at != 0 {
            return Err(BROKEN);
        }
        for cell in &mut cells {
            let next = next.get_mut(usize::from(cell.symbol)).ok_or(BROKEN)?;
            if *next == 0 || *next >= 2 * size {
                return Err(BROKEN);
            }
            let bits = log - next.ilog2();
            cell.bits = bits as u8;
            cell.base = ((*next << bits) - size) as u16;
            *next += 1;
        }
        Ok(Self { cells, log })
    }

    /// Read the description of a table; its length is the second result.
    pub(super) fn read(
        bytes: &[u8],
        log_max: u32,
        symbols_max: usize,
    ) -> Result<(Self, usize), Wrong> {
        let mut input = Forward::new(bytes);
        let log = input.read(4) + 5;
        if log > log_max {
            return Err("a table is too large");
        }
        let mut left = 1_u32 << log;
        let mut frequencies: Vec<i16> = Vec::new();
        while left > 0 {
            if frequencies.len() >= symbols_max {
                return Err("a table has too many symbols");
            }
            let bits = (left + 1).ilog2() + 1;
            let low_mask = (1 << (bits - 1)) - 1;
            let short = (1 << bits) - 1 - (left + 1);
            let mut value = input.read(bits);
            if value & low_mask < short {
                input.unread_bit();
                value &= low_mask;
            } else if value > low_mask {
                value -= short;
            }
            let frequency = i16::try_from(value).map_err(|_| "a frequency is too high")? - 1;
            let share = u32::from(frequency.unsigned_abs());
            left = left.checked_sub(share).ok_or("a frequency is too high")?;
            frequencies.push(frequency);
            let mut more = if frequency == 0 { 3 } else { 0 };
            while more == 3 && frequencies.len() <= symbols_max {
                more = input.read(2);
                frequencies.resize(frequencies.len() + more as usize, 0);
            }
        }
        if frequencies.len() > symbols_max {
            return Err("a table has too many symbols");
        }
        Ok((Self::new(&frequencies, log)?, input.used_bytes()?))
    }

    /// The first state.
    pub(super) fn start(&self, input: &mut Backward<'_>) -> usize {
        input.read(self.log) as usize
    }

    pub(super) fn cell(&self, state: usize) -> Cell {
        self.cells.get(state).copied().unwrap_or_default()
    }

    pub(super) fn next(&self, state: usize, input: &mut Backward<'_>) -> usize {
        let cell = self.cell(state);
        usize::from(cell.base) + input.read(u32::from(cell.bits)) as usize
    }
}

const HUFFMAN_BITS_MAX: u32 = 11;
const WEIGHTS_LOG_MAX: u32 = 6;
const WEIGHT_MAX: u8 = 11;

/// A Huffman decoding table.
#[derive(Clone, Debug)]
pub(super) struct Huffman {
    /// Symbol and length of the code that starts like the index.
    cells: Vec<(u8, u8)>,
    bits: u32,
}

impl Huffman {
    /// Read the description of a tree; its length is the second result.
    pub(super) fn read(bytes: &[u8]) -> Result<(Self, usize), Wrong> {
        let (head, rest) = bytes.split_first().ok_or("a tree is cut short")?;
        let mut weights = Vec::new();
        let used = match usize::from(*head) {
            length @ ..128 => {
                let coded = rest.get(..length).ok_or("a tree is cut short")?;
                read_weights(coded, &mut weights)?;
                length
            }
            count => {
                let count = count - 127;
                let packed = rest.get(..count.div_ceil(2)).ok_or("a tree is cut short")?;
                weights.extend(packed.iter().flat_map(|byte| [byte >> 4, byte & 15]));
                weights.truncate(count);
                packed.len()
            }
        };
        Ok((Self::new(weights)?, used + 1))
    }

    /// A tree of these weights and of one more, which makes it complete.
    fn new(mut weights: Vec<u8>) -> Result<Self, Wrong> {
        const BROKEN: Wrong = "the weights of a tree do not add up";
        if weights.iter().any(|weight| *weight > WEIGHT_MAX) || weights.len() > 255 {
            return Err(BROKEN);
        }
        let share = |weight: &u8| match weight {
            0 => 0,
            weight => 1_u32 << (weight - 1),
        };
        let sum: u32 = weights.iter().map(share).sum();
        if sum == 0 {
            return Err(BROKEN);
        }
        let bits = sum.ilog2() + 1;
        let left = (1 << bits) - sum;
        if bits > HUFFMAN_BITS_MAX || !left.is_power_of_two() {
            return Err(BROKEN);
        }
        weights.push(left.ilog2() as u8 + 1);
        let mut cells = Vec::with_capacity(1 << bits);
        for weight in 1..=bits as u8 {
            let symbols = weights.iter().enumerate();
            for (symbol, _) in symbols.filter(|(_, found)| **found == weight) {
                let cell = (symbol as u8, bits as u8 + 1 - weight);
                cells.resize(cells.len() + (1 << (weight - 1)), cell);
            }
        }
        Ok(Self { cells, bits })
    }

    /// Append `count` literals of one stream.
    pub(super) fn decode(
        &self,
        bytes: &[u8],
        count: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), Wrong> {
        let mut input = Backward::new(bytes)?;
        for _ in 0..count {
            let index = input.peek(self.bits) as usize;
            let (symbol, bits) = self.cells.get(index).copied().unwrap_or_default();
            input.skip(u32::from(bits));
            out.push(symbol);
        }
        input.finish()
    }
}

/// Weights coded with FSE, two states in turn, until the bits are used up.
fn read_weights(bytes: &[u8], weights: &mut Vec<u8>) -> Result<(), Wrong> {
    let (table, used) = Fse::read(bytes, WEIGHTS_LOG_MAX, usize::from(WEIGHT_MAX) + 1)?;
    let mut input = Backward::new(bytes.get(used..).unwrap_or_default())?;
    let mut state = table.start(&mut input);
    let mut other = table.start(&mut input);
    if input.is_overrun() {
        return Err("the weights of a tree are cut short");
    }
    while weights.len() < 255 {
        weights.push(table.cell(state).symbol);
        state = table.next(state, &mut input);
        if input.is_overrun() {
            weights.push(table.cell(other).symbol);
            return Ok(());
        }
        std::mem::swap(&mut state, &mut other);
    }
    Err("a tree has too many weights")
}
