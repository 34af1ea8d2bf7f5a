//! Guest page tables: which memory is seen at which virtual address.
//!
//! ```text
//! long mode:  [57..48 level 5] 47..39 level 4, 38..30 level 3, 29..21 level 2, 20..12 level 1
//! PAE:                                         31..30 level 3, 29..21 level 2, 20..12 level 1
//! 32 bits:                                                     31..22 level 2, 21..12 level 1
//! entry:      bit 0 present, bit 7 (above level 1) a large page, bits 51..12 address
//! ```
//!
//! The tables are the guest's: they may be damaged, or made to be endless. A table that leads back
//! to itself is entered once (Windows maps its own tables like that), and there are bounds on how
//! many tables are read and how many pieces are found.

use std::fs::File;

use super::cpu::CpuState;
use super::error::ExtractError;
use super::physical::PhysicalMemory;

/// Tables that are read: 1 GiB of them, which is enough to map 512 GiB with the smallest pages.
pub(crate) const MAX_TABLES: u32 = 1 << 18;
/// Pieces of virtual memory: 14 MiB of program headers.
pub(crate) const MAX_PIECES: usize = 1 << 18;

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const TABLE_BYTES: usize = 4096;

const CR0_PAGING: u64 = 1 << 31;
const CR4_LARGE_PAGES: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const EFER_LONG_MODE: u64 = 1 << 10;
/// Linux's page table isolation: the tables of user space stand behind those of the kernel.
const ISOLATED: u64 = 0x1000;

/// Consecutive memory of the guest as it sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First virtual address; physical where the guest does not use paging.
    pub address: u64,
    /// First physical address.
    pub physical: u64,
    /// Length.
    pub bytes: u64,
    /// Place of the first byte in the file.
    pub file_offset: u64,
}

/// What was found in page tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressSpace {
    /// In ascending order of addresses.
    pub pieces: Vec<Piece>,
    /// There is more: the tables are endless, or larger than the bounds.
    pub cut_short: bool,
    /// The processor was in user space, with tables that hide the kernel; those of the kernel were
    /// taken instead.
    pub isolated: bool,
}

/// One level of tables.
#[derive(Clone, Copy, Debug)]
struct Level {
    /// Binary logarithm of what an entry maps.
    shift: u32,
    entries: usize,
    large_pages: bool,
}

const fn level(shift: u32, entries: usize, large_pages: bool) -> Level {
    Level {
        shift,
        entries,
        large_pages,
    }
}

const LONG: [Level; 5] = [
    level(48, 512, false),
    level(39, 512, false),
    level(30, 512, true),
    level(21, 512, true),
    level(12, 512, false),
];
const PAE: [Level; 3] = [
    level(30, 4, false),
    level(21, 512, true),
    level(12, 512, false),
];
const LEGACY: [Level; 2] = [level(22, 1024, true), level(12, 1024, false)];
const LEGACY_SMALL: [Level; 2] = [level(22, 1024, false), level(12, 1024, false)];

/// How a processor reads its tables.
struct Mode {
    levels: &'static [Level],
    entry_bytes: usize,
    root: u64,
    /// Bits of an address; the highest is repeated above.
    signed_bits: Option<u32>,
}

impl Mode {
    fn of(cpu: &CpuState) -> Option<Self> {
        let [cr0, _, cr3, cr4] = cpu.control;
        if cr0 & CR0_PAGING == 0 {
            return None;
        }
        if cpu.efer & EFER_LONG_MODE != 0 {
            let five = cr4 & CR4_FIVE_LEVELS != 0;
            return Some(Self {
                levels: if five { &LONG } else { LONG.get(1..)? },
                entry_bytes: 8,
                root: cr3 & ADDRESS,
                signed_bits: Some(if five { 57 } else { 48 }),
            });
        }
        let (levels, entry_bytes, root) = if cr4 & CR4_PAE != 0 {
            (PAE.as_slice(), 8, cr3 & 0xffff_ffe0)
        } else if cr4 & CR4_LARGE_PAGES != 0 {
            (LEGACY.as_slice(), 4, cr3 & 0xffff_f000)
        } else {
            (LEGACY_SMALL.as_slice(), 4, cr3 & 0xffff_f000)
        };
        Some(Self {
            levels,
            entry_bytes,
            root,
            signed_bits: None,
        })
    }
}

/// What the processor sees; `None` if it does not use paging.
pub(crate) fn address_space(
    cpu: &CpuState,
    memory: &PhysicalMemory,
    file: &File,
) -> Result<Option<AddressSpace>, ExtractError> {
    let Some(mode) = Mode::of(cpu) else {
        return Ok(None);
    };
    let mut walker = Walker {
        file,
        memory,
        mode,
        tables: 0,
        path: Vec::new(),
        found: AddressSpace::default(),
    };
    if !cpu.is_privileged() {
        walker.leave_isolation()?;
    }
    walker.table(walker.mode.root, walker.mode.levels, 0)?;
    let mut found = walker.found;
    found.pieces.sort_by_key(|piece| piece.address);
    Ok(Some(found))
}

struct Walker<'a> {
    file: &'a File,
    memory: &'a PhysicalMemory,
    mode: Mode,
    tables: u32,
    /// The tables above the one that is read.
    path: Vec<u64>,
    found: AddressSpace,
}

impl Walker<'_> {
    /// The kernel's tables instead of those that user space has: they stand just before, and map
    /// the same in the lower half, but for the permission to execute.
    fn leave_isolation(&mut self) -> Result<(), ExtractError> {
        let root = self.mode.root;
        if self.mode.signed_bits.is_none() || root & ISOLATED == 0 {
            return Ok(());
        }
        let kernel_root = root & !ISOLATED;
        let (user, kernel) = (self.read(root)?, self.read(kernel_root)?);
        let (Some(user), Some(kernel)) = (user, kernel) else {
            return Ok(());
        };
        let lower = |table: &[u8; TABLE_BYTES]| -> Vec<u64> {
            let entries = table.chunks_exact(8).take(256);
            entries.map(|entry| entry_of(entry) & !NO_EXECUTE).collect()
        };
        let user = lower(&user);
        if user == lower(&kernel) && user.iter().any(|entry| entry & PRESENT != 0) {
            self.mode.root = kernel_root;
            self.found.isolated = true;
        }
        Ok(())
    }

    /// Go through a table that maps what begins at `address`.
    fn table(&mut self, table: u64, levels: &[Level], address: u64) -> Result<(), ExtractError> {
        let Some((level, below)) = levels.split_first() else {
            return Ok(());
        };
        if self.path.contains(&table) || self.found.cut_short {
            return Ok(());
        }
        let Some(bytes) = self.read(table)? else {
            return Ok(());
        };
        self.path.push(table);
        let entries = bytes.chunks_exact(self.mode.entry_bytes).map(entry_of);
        let entries: Vec<_> = entries.take(level.entries).enumerate().collect();
        // The upper half first, which is the kernel's, should there be too much of the other.
        let half = match self.mode.signed_bits {
            Some(_) if self.path.len() == 1 => level.entries >> 1,
            _ => 0,
        };
        let (lower, upper) = entries.split_at_checked(half).unwrap_or_default();
        for (index, entry) in upper.iter().chain(lower).copied() {
            if entry & PRESENT == 0 {
                continue;
            }
            let index = u64::try_from(index).unwrap_or(0);
            let address = self.canonical(address | index << level.shift);
            if below.is_empty() || (level.large_pages && entry & LARGE != 0) {
                self.page(address, self.page_address(entry, *level), 1 << level.shift);
            } else {
                self.table(entry & ADDRESS, below, address)?;
            }
            if self.found.cut_short {
                break;
            }
        }
        self.path.pop();
        Ok(())
    }

    fn page_address(&self, entry: u64, level: Level) -> u64 {
        let inside = (1_u64 << level.shift).saturating_sub(1);
        let high = match self.mode.entry_bytes {
            // Large pages of 32-bit tables keep further address bits below.
            4 if level.shift > 12 => (entry >> 13 & 0xff) << 32,
            _ => 0,
        };
        entry & ADDRESS & !inside | high
    }

    fn canonical(&self, address: u64) -> u64 {
        match self.mode.signed_bits {
            Some(bits) if address >> bits.saturating_sub(1) & 1 != 0 => address | u64::MAX << bits,
            _ => address,
        }
    }

    /// A page; what is no memory (devices) is left out.
    fn page(&mut self, address: u64, physical: u64, bytes: u64) {
        for part in self.memory.parts(physical, bytes) {
            let piece = Piece {
                address: address.saturating_add(part.start.saturating_sub(physical)),
                physical: part.start,
                bytes: part.bytes,
                file_offset: part.file_offset,
            };
            if let Some(last) = self.found.pieces.last_mut()
                && last.is_followed_by(&piece)
            {
                last.bytes = last.bytes.saturating_add(piece.bytes);
            } else if self.found.pieces.len() < MAX_PIECES {
                self.found.pieces.push(piece);
            } else {
                self.found.cut_short = true;
            }
        }
    }

    fn read(&mut self, table: u64) -> Result<Option<[u8; TABLE_BYTES]>, ExtractError> {
        if self.tables >= MAX_TABLES {
            self.found.cut_short = true;
            return Ok(None);
        }
        self.tables = self.tables.saturating_add(1);
        let mut bytes = [0; TABLE_BYTES];
        // The four entries of a PAE root may stand anywhere in a page.
        let start = table & ADDRESS;
        let there = self.memory.read(self.file, start, &mut bytes);
        if !there.map_err(ExtractError::read)? {
            return Ok(None);
        }
        let skip = usize::try_from(table & !ADDRESS).unwrap_or(0);
        bytes.rotate_left(skip.min(TABLE_BYTES));
        Ok(Some(bytes))
    }
}

impl Piece {
    fn is_followed_by(&self, next: &Self) -> bool {
        let follows = |first: u64, second: u64| first.checked_add(self.bytes) == Some(second);
        follows(self.address, next.address)
            && follows(self.physical, next.physical)
            && follows(self.file_offset, next.file_offset)
    }
}

/// An entry of four or eight bytes.
fn entry_of(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |entry, byte| entry << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests;
