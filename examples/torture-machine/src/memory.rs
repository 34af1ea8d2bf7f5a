//! The guest's memory, and what the guest expects to find in it.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use vmferry_ram::{AnonymousRam, BlockLayout, GuestRam, PAGE_BYTES, RamBlock, Sharing};
use vmferry_stream::Name;

use crate::gate::Broken;

pub(crate) const PAGE: usize = PAGE_BYTES as usize;
const ROM_BYTES: u64 = 128 << 10;
const TABLES_BYTES_MAX: u64 = 2 << 20;
/// Loaded at once.
const LOAD_BYTES: usize = 1 << 20;
/// Multiplier of FNV-1a.
const DIGEST_PRIME: u64 = 0x100_0000_01b3;

/// The blocks, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    Ram,
    /// Firmware tables, whose length may differ from machine to machine: a migration resizes them.
    Tables,
    Rom,
}

#[derive(Clone)]
pub(crate) struct Memory(Arc<AnonymousRam>);

impl Memory {
    /// With the firmware in its place, and nothing else.
    pub(crate) fn new(ram_bytes: u64, tables_bytes: u64) -> Result<Self> {
        let layout = |idstr, used_bytes, max_bytes, guest_address| -> Result<_> {
            Ok(BlockLayout {
                idstr: Name::new(idstr)?,
                used_bytes,
                max_bytes,
                page_bytes: PAGE_BYTES,
                guest_address,
                sharing: Sharing::Private,
            })
        };
        let memory = Self(Arc::new(AnonymousRam::with_layouts(vec![
            layout("pc.ram", ram_bytes, ram_bytes, Some(0))?,
            layout("/rom@etc/acpi/tables", tables_bytes, TABLES_BYTES_MAX, None)?,
            layout("pc.rom", ROM_BYTES, ROM_BYTES, Some(0xfffe_0000))?,
        ])?));
        // Fresh memory comes faster in large pieces. A postcopy forbids them for as long as it must.
        memory
            .0
            .blocks()
            .iter()
            .for_each(RamBlock::allow_huge_pages);
        for block in [Block::Tables, Block::Rom] {
            let area = Area::firmware(block);
            (0..area.pages(&memory)).for_each(|page| area.write(&memory, page, 0));
        }
        Ok(memory)
    }

    /// Let memory begin with what can be read there.
    pub(crate) fn load(&self, mut from: impl Read) -> Result<()> {
        let (mut piece, mut offset) = (vec![0; LOAD_BYTES], 0);
        loop {
            let length = from.read(&mut piece)?;
            if length == 0 {
                return Ok(());
            }
            self.block(Block::Ram).write(offset, &piece[..length])?;
            offset += length as u64;
        }
    }

    pub(crate) fn ram(&self) -> Arc<dyn GuestRam> {
        Arc::<AnonymousRam>::clone(&self.0)
    }

    pub(crate) fn block(&self, block: Block) -> &RamBlock {
        &self.0.blocks()[block as usize]
    }

    /// Words of a block: what the guest's addresses lead to was checked by whoever made them.
    pub(crate) fn words(
        &self,
        block: Block,
        offset: u64,
        bytes: usize,
    ) -> Result<&[AtomicU64], Broken> {
        let words = self.block(block).words(offset, bytes);
        words.map_err(|error| Broken(error.to_string()))
    }

    /// One number for all that a block holds.
    pub(crate) fn digests(&self) -> Vec<(String, u64)> {
        let digest = |block: &RamBlock| {
            let mut digest = Digest::default();
            let mut page = [0; PAGE];
            for number in 0..block.pages() {
                block
                    .read(number * PAGE_BYTES, &mut page)
                    .expect("it is in use");
                digest.add(&page);
            }
            (block.idstr().to_string(), digest.0)
        };
        self.0.blocks().iter().map(digest).collect()
    }
}

/// Tells contents apart; not secure.
#[derive(Default)]
pub(crate) struct Digest(pub(crate) u64);

impl Digest {
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut value = [0; 8];
            value[..word.len()].copy_from_slice(word);
            self.0 =
                (self.0.rotate_left(23) ^ u64::from_le_bytes(value)).wrapping_mul(DIGEST_PRIME);
        }
    }
}

/// How the guest uses pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Every word is another one in each pass.
    Random,
    /// The same, but in each pass other pages are zero, most of them.
    Sparse,
    /// A few words change.
    Patched,
    /// Written in the first pass, and then only read.
    Once,
    /// Zero.
    Untouched,
    /// There from the beginning.
    Firmware,
}

/// Pages in one block that the guest uses in one way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    pub(crate) block: Block,
    pub(crate) first_page: u64,
    /// `None`: up to the end of the block, wherever that is.
    pub(crate) pages: Option<u64>,
    pub(crate) pattern: Pattern,
    pub(crate) seed: u64,
}

impl Area {
    /// All of a block that the firmware has filled.
    pub(crate) fn firmware(block: Block) -> Self {
        Self {
            block,
            first_page: 0,
            pages: None,
            pattern: Pattern::Firmware,
            seed: block as u64,
        }
    }

    pub(crate) fn pages(&self, memory: &Memory) -> u64 {
        let in_block = || memory.block(self.block).pages() - self.first_page;
        self.pages.unwrap_or_else(in_block)
    }

    /// Is the page as it was left `pass` passes after the beginning?
    pub(crate) fn check(&self, memory: &Memory, page: u64, pass: u64) -> Result<(), Broken> {
        let offset = (self.first_page + page) * PAGE_BYTES;
        let words = memory.words(self.block, offset, PAGE)?;
        for (index, word) in words.iter().enumerate() {
            let found = word.load(Ordering::Relaxed);
            let expected = self.pattern.word(self.seed, page, index as u64, pass);
            if found != expected {
                let block = memory.block(self.block).idstr();
                return Err(Broken(format!(
                    "block {block}, offset {:#x}: expected {expected:#x} ({:?}, pass {pass}), found {found:#x}",
                    offset + index as u64 * 8,
                    self.pattern,
                )));
            }
        }
        Ok(())
    }

    /// Leave the page as it shall be after `pass` passes. Words that stay are not written.
    pub(crate) fn write(&self, memory: &Memory, page: u64, pass: u64) {
        let offset = (self.first_page + page) * PAGE_BYTES;
        let words = memory
            .words(self.block, offset, PAGE)
            .expect("it was checked");
        for (index, word) in words.iter().enumerate() {
            let value = self.pattern.word(self.seed, page, index as u64, pass);
            if word.load(Ordering::Relaxed) != value {
                word.store(value, Ordering::Relaxed);
            }
        }
    }
}

impl Pattern {
    /// What a word holds after so many passes. Memory begins as zeroes.
    fn word(self, seed: u64, page: u64, index: u64, pass: u64) -> u64 {
        let is_zero = match self {
            Self::Untouched => true,
            Self::Firmware => false,
            Self::Sparse => pass == 0 || !mix(&[seed, page, pass]).is_multiple_of(8),
            Self::Random | Self::Patched | Self::Once => pass == 0,
        };
        let pass = match self {
            Self::Random | Self::Sparse => pass,
            Self::Patched if (index + pass).is_multiple_of(100) => pass,
            Self::Patched | Self::Once | Self::Untouched | Self::Firmware => 0,
        };
        if is_zero {
            0
        } else {
            mix(&[seed, page, index, pass])
        }
    }
}

/// Random, but always the same (the finish of SplitMix64, for each part).
pub(crate) fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |state: u64, part| {
        let z = (state ^ part).wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    })
}
