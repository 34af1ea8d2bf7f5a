//! Where a machine's RAM blocks are in the guest's physical memory.
//!
//! The stream does not say it; the machine type does, as QEMU 7.2 and 10.0 show it (`info mtree`):
//!
//! | machine | RAM below 4 GiB (the rest follows at 4 GiB) |
//! |---|---|
//! | pc-i440fx from 2.0 on | all if less than 3.5 GiB, else 3 GiB |
//! | pc-i440fx before 2.0, isapc | at most 3.5 GiB |
//! | pc-q35 | all if less than 2.75 GiB, else 2 GiB |
//! | microvm | at most 3 GiB |
//!
//! The firmware ends at 4 GiB, and its last 128 KiB are seen below 1 MiB too. There the chipset's
//! registers (PAM) choose for each 16 KiB from `c0000` on whether a read meets RAM or ROM.

use std::fs::File;
use std::io;

use vmferry_stream::Name;

use super::canvas::read_sparse;
use super::memory::BlockImage;

const GIB: u64 = 1 << 30;
const FOUR_GIB: u64 = 4 * GIB;
const LOW_ROM: u64 = 0xc_0000;
const LOW_BIOS: u64 = 0xe_0000;
const LOW_END: u64 = 0x10_0000;
/// Registers of the chipset that map ROM or RAM.
const PAM_REGISTERS: usize = 7;

/// Consecutive guest-physical memory, and where its bytes are in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhysicalRange {
    /// First address.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// Place of the first byte in the file.
    pub file_offset: u64,
}

/// Kinds of machines that lay out their memory alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineKind {
    /// `pc-i440fx-2.0` and newer.
    Pc,
    /// `pc-i440fx-1.7` and older, whose streams have no name of a machine.
    OldPc,
    /// `pc-q35-…`.
    Q35,
    /// `microvm`.
    Microvm,
    /// `isapc`.
    Isapc,
}

impl MachineKind {
    /// By the name in the configuration section.
    #[must_use]
    pub fn of_machine(name: &str) -> Option<Self> {
        let old = ["pc-0.", "pc-1.", "pc-i440fx-1."];
        if old.iter().any(|prefix| name.starts_with(prefix)) {
            return Some(Self::OldPc);
        }
        let kinds = [
            ("pc-i440fx-", Self::Pc),
            ("pc-q35-", Self::Q35),
            ("microvm", Self::Microvm),
            ("isapc", Self::Isapc),
        ];
        let mut kinds = kinds.into_iter();
        kinds.find_map(|(prefix, kind)| name.starts_with(prefix).then_some(kind))
    }

    /// Bytes of RAM below 4 GiB, of `ram` in all.
    fn below_4g(self, ram: u64) -> u64 {
        match self {
            Self::Pc if ram >= 0xe000_0000 => 3 * GIB,
            Self::Q35 if ram >= 0xb000_0000 => 2 * GIB,
            Self::Pc | Self::Q35 => ram,
            Self::OldPc | Self::Isapc => ram.min(0xe000_0000),
            Self::Microvm => ram.min(3 * GIB),
        }
    }

    /// Where the chipset's PAM registers stand in its PCI configuration.
    pub(crate) fn pam_offset(self) -> Option<usize> {
        match self {
            Self::Pc | Self::OldPc => Some(0x59),
            Self::Q35 => Some(0x90),
            Self::Microvm | Self::Isapc => None,
        }
    }
}

/// What there is to lay out.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) kind: MachineKind,
    /// RAM blocks that make up the memory, in order.
    pub(crate) ram: Vec<&'a BlockImage>,
    pub(crate) blocks: &'a [BlockImage],
    /// Overrides what the machine kind says.
    pub(crate) below_4g: Option<u64>,
    /// The chipset's PAM registers.
    pub(crate) pam: Option<[u8; PAM_REGISTERS]>,
}

/// Guest-physical memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PhysicalMemory {
    /// In ascending order, without overlaps.
    ranges: Vec<PhysicalRange>,
}

impl Plan<'_> {
    /// The memory, and the blocks that have a place in it.
    pub(crate) fn lay_out(&self) -> (PhysicalMemory, Vec<Name>) {
        let mut memory = PhysicalMemory::default();
        let mut placed: Vec<Name> = self.ram.iter().map(|block| block.name.clone()).collect();
        self.lay_out_ram(&mut memory);
        let block = |name: &str| self.blocks.iter().find(|block| block.name == *name);
        for name in ["pc.bios", "system.flash0"] {
            if let Some(bios) = block(name).filter(|bios| bios.length_bytes <= GIB) {
                let start = FOUR_GIB.saturating_sub(bios.length_bytes);
                memory.put(start, bios, 0, bios.length_bytes);
                self.lay_out_low_bios(&mut memory, bios);
                placed.push(bios.name.clone());
            }
        }
        if let Some(rom) = block("pc.rom").filter(|_| self.kind != MachineKind::Microvm) {
            let end = LOW_BIOS.min(LOW_ROM.saturating_add(rom.length_bytes));
            for (start, end) in self.rom_pieces(LOW_ROM, end) {
                let offset = start.saturating_sub(LOW_ROM);
                memory.put(start, rom, offset, end.saturating_sub(start));
            }
            placed.push(rom.name.clone());
        }
        (memory, placed)
    }

    fn lay_out_ram(&self, memory: &mut PhysicalMemory) {
        let total = self
            .ram
            .iter()
            .fold(0_u64, |sum, block| sum.saturating_add(block.length_bytes));
        let below = self.below_4g.map_or_else(
            || self.kind.below_4g(total),
            |below| below.min(total).min(FOUR_GIB),
        );
        let mut at = 0_u64;
        for block in &self.ram {
            let low = below.saturating_sub(at).min(block.length_bytes);
            memory.put(at, block, 0, low);
            let high = FOUR_GIB.saturating_add(at.max(below).saturating_sub(below));
            memory.put(high, block, low, block.length_bytes.saturating_sub(low));
            at = at.saturating_add(block.length_bytes);
        }
    }

    /// The end of the firmware, as it is seen below 1 MiB.
    fn lay_out_low_bios(&self, memory: &mut PhysicalMemory, bios: &BlockImage) {
        let seen = bios.length_bytes.min(LOW_END.saturating_sub(LOW_BIOS));
        let first = LOW_END.saturating_sub(seen);
        for (start, end) in self.rom_pieces(first, LOW_END) {
            let before_end = LOW_END.saturating_sub(start);
            let offset = bios.length_bytes.saturating_sub(before_end);
            memory.put(start, bios, offset, end.saturating_sub(start));
        }
    }

    /// The parts of `start..end` in which reads meet ROM.
    fn rom_pieces(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        if self.kind.pam_offset().is_none() {
            return vec![(start, end)];
        }
        let windows = pam_windows(self.pam.unwrap_or([0x33; PAM_REGISTERS]));
        let parts = windows.into_iter().filter(|(.., reads_ram)| !reads_ram);
        let parts = parts.map(|(from, to, _)| (from.max(start), to.min(end)));
        parts.filter(|(from, to)| from < to).collect()
    }
}

/// Address ranges of the PAM registers, and whether reads in them meet RAM.
fn pam_windows(registers: [u8; PAM_REGISTERS]) -> Vec<(u64, u64, bool)> {
    let [bios, rest @ ..] = registers;
    let mut windows = Vec::new();
    let mut at = LOW_ROM;
    for register in rest {
        for reads_ram in [register & 0x01 != 0, register & 0x10 != 0] {
            let end = at.saturating_add(0x4000);
            windows.push((at, end, reads_ram));
            at = end;
        }
    }
    windows.push((at, LOW_END, bios & 0x10 != 0));
    windows
}

#[cfg(test)]
impl From<Vec<PhysicalRange>> for PhysicalMemory {
    fn from(ranges: Vec<PhysicalRange>) -> Self {
        Self { ranges }
    }
}

impl PhysicalMemory {
    /// All of it, in ascending order.
    #[must_use]
    pub fn ranges(&self) -> &[PhysicalRange] {
        &self.ranges
    }

    /// Place a part of a block over what is there.
    fn put(&mut self, start: u64, block: &BlockImage, offset: u64, bytes: u64) {
        let Some(file_offset) = block.file_offset.filter(|_| bytes > 0) else {
            return;
        };
        let new = PhysicalRange {
            start,
            bytes,
            file_offset: file_offset.saturating_add(offset),
        };
        let old = std::mem::take(&mut self.ranges);
        for range in old {
            let before = range.until(new.start);
            let after = range.from(new.end());
            self.ranges.extend([before, after].into_iter().flatten());
        }
        self.ranges.push(new);
        self.ranges.sort_by_key(|range| range.start);
        self.ranges.dedup_by(|next, range| {
            let joined = range.is_followed_by(next);
            if joined {
                range.bytes = range.bytes.saturating_add(next.bytes);
            }
            joined
        });
    }

    /// The parts of `bytes` bytes at `start` that exist.
    pub(crate) fn parts(&self, start: u64, bytes: u64) -> impl Iterator<Item = PhysicalRange> + '_ {
        let end = start.saturating_add(bytes);
        let first = self.ranges.partition_point(|range| range.end() <= start);
        let ranges = self.ranges.iter().skip(first);
        ranges
            .take_while(move |range| range.start < end)
            .filter_map(move |range| range.from(start)?.until(end))
    }

    /// Read memory that lies in one range; `false` if it does not.
    pub(crate) fn read(&self, file: &File, start: u64, bytes: &mut [u8]) -> io::Result<bool> {
        let wanted = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        match self.parts(start, wanted).next() {
            Some(part) if part.start == start && part.bytes == wanted => {
                read_sparse(file, part.file_offset, bytes)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

impl PhysicalRange {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes)
    }

    fn is_followed_by(&self, next: &Self) -> bool {
        self.end() == next.start && self.file_offset.saturating_add(self.bytes) == next.file_offset
    }

    /// The part before `end`.
    fn until(self, end: u64) -> Option<Self> {
        let bytes = end.checked_sub(self.start)?.min(self.bytes);
        (bytes > 0).then_some(Self { bytes, ..self })
    }

    /// The part from `start` on.
    fn from(self, start: u64) -> Option<Self> {
        let cut = start.saturating_sub(self.start);
        let bytes = self.bytes.checked_sub(cut).filter(|bytes| *bytes > 0)?;
        Some(Self {
            start: self.start.saturating_add(cut),
            bytes,
            file_offset: self.file_offset.saturating_add(cut),
        })
    }
}

#[cfg(test)]
mod tests;
