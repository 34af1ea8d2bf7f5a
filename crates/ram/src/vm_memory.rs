//! Guest memory and bitmaps of the `vm-memory` crate.
//!
//! The feature `vm-memory` compiles this file against one version of it. A VMM that has another copies
//! the file and replaces `crate::` by `vmferry_ram::`: it needs nothing that is not public.

use std::ops::Range;
use std::ptr::NonNull;

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};
use vmferry_stream::Name;

use crate::{
    BlockIndex, BlockLayout, DirtyLog, DirtyLogError, GuestRam, LayoutError, RamBlock, Sharing,
    report_bits,
};

const MAP_SHARED: i32 = 1;

/// The regions of a [`GuestMemoryMmap`], one block each. They stay mapped as long as it lives.
pub struct VmMemory<B: Bitmap = ()> {
    blocks: Vec<RamBlock>,
    memory: GuestMemoryMmap<B>,
}

impl<B: Bitmap> VmMemory<B> {
    /// Blocks for all regions, with the names that `name` gives them (which source and destination
    /// must agree on). `page_bytes` is the size of the host's pages under them.
    ///
    /// # Errors
    /// A region that no block can be: its length or place, or it cannot be read and written.
    pub fn new(
        memory: GuestMemoryMmap<B>,
        page_bytes: u64,
        mut name: impl FnMut(&GuestRegionMmap<B>) -> Name,
    ) -> Result<Self, LayoutError> {
        const READ_WRITE: i32 = 3;
        let block = |region: &GuestRegionMmap<B>| {
            let layout = BlockLayout {
                idstr: name(region),
                used_bytes: region.len(),
                max_bytes: region.len(),
                page_bytes,
                guest_address: Some(region.start_addr().raw_value()),
                sharing: match region.flags() & MAP_SHARED {
                    0 => Sharing::Private,
                    _ => Sharing::Shared,
                },
            };
            let start = NonNull::new(region.as_ptr());
            let start = start.filter(|_| region.prot() & READ_WRITE == READ_WRITE);
            let start = start.ok_or_else(|| LayoutError {
                idstr: layout.idstr.clone(),
                reason: "its region cannot be read and written".to_owned(),
            })?;
            // SAFETY: the region is mapped, readable and writable, as long as `memory` has it.
            // `vm-memory` makes no references to its bytes.
            unsafe { RamBlock::new(layout, start) }
        };
        let blocks = memory.iter().map(block).collect::<Result<_, _>>()?;
        Ok(Self { blocks, memory })
    }

    /// What it was made of.
    #[must_use]
    pub fn memory(&self) -> &GuestMemoryMmap<B> {
        &self.memory
    }
}

impl<B: Bitmap + Send + Sync> GuestRam for VmMemory<B> {
    fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// Regions are as long as they are.
    fn resize(&self, block: BlockIndex, used_bytes: u64) -> Result<(), LayoutError> {
        match self.blocks.get(block.0) {
            Some(block) if block.used_bytes() != used_bytes => Err(LayoutError {
                idstr: block.idstr().clone(),
                reason: format!(
                    "it has {:#x} bytes and cannot have {used_bytes:#x}",
                    block.used_bytes()
                ),
            }),
            _ => Ok(()),
        }
    }
}

/// The log of what is written through `vm-memory`: by the VMM's devices. What vCPUs write it does not
/// see; pair it with a [`KvmLog`](crate::KvmLog).
///
/// Nobody else may read and reset the bitmaps meanwhile. Their pages are a power of two.
pub struct VmMemoryLog {
    memory: GuestMemoryMmap<AtomicBitmap>,
}

impl VmMemoryLog {
    /// A log for the memory of a [`VmMemory`].
    #[must_use]
    pub fn new(memory: GuestMemoryMmap<AtomicBitmap>) -> Self {
        Self { memory }
    }
}

impl DirtyLog for VmMemoryLog {
    fn start(&mut self, _ram: &dyn GuestRam) -> Result<(), DirtyLogError> {
        for region in self.memory.iter() {
            bitmap(region).reset();
        }
        Ok(())
    }

    fn collect(
        &mut self,
        ram: &dyn GuestRam,
        dirty: &mut dyn FnMut(BlockIndex, Range<u64>),
    ) -> Result<(), DirtyLogError> {
        let blocks = ram.blocks().iter().zip(self.memory.iter());
        for (index, (block, region)) in blocks.enumerate() {
            let bitmap = bitmap(region);
            let words = bitmap.get_and_reset();
            report_bits(block, 0, bit_bytes(bitmap), &words, &mut |pages| {
                dirty(BlockIndex(index), pages);
            });
        }
        Ok(())
    }

    /// The bitmaps are always kept.
    fn stop(&mut self, _ram: &dyn GuestRam) {}
}

fn bitmap(region: &GuestRegionMmap<AtomicBitmap>) -> &AtomicBitmap {
    vm_memory::MmapRegion::bitmap(region)
}

/// Bytes that a bit stands for, which the bitmap does not tell: a power of two of which `len` make up
/// its bytes, and no less do.
fn bit_bytes(bitmap: &AtomicBitmap) -> u64 {
    let bits = bitmap.len().max(1) as u64;
    (bitmap.byte_size() as u64)
        .div_ceil(bits)
        .next_power_of_two()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use vm_memory::{Bytes, FileOffset, GuestAddress, MmapRegion};

    use super::*;
    use crate::PAGE_BYTES;

    const BASE: u64 = 1 << 32;

    fn memory() -> GuestMemoryMmap<AtomicBitmap> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 << 12).unwrap();
        GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), 100 << 12, None),
            (GuestAddress(BASE), 8 << 12, Some(FileOffset::new(file, 0))),
        ])
        .unwrap()
    }

    fn adapt(memory: &GuestMemoryMmap<AtomicBitmap>) -> VmMemory<AtomicBitmap> {
        let name = |region: &GuestRegionMmap<_>| {
            Name::new(&format!("mem{:x}", region.start_addr().raw_value())).unwrap()
        };
        VmMemory::new(memory.clone(), PAGE_BYTES, name).unwrap()
    }

    #[test]
    fn regions_are_blocks() {
        let memory = memory();
        let ram = adapt(&memory);
        let blocks: Vec<_> = ram.blocks().iter().collect();
        assert_eq!(blocks.len(), 2);
        assert_eq!(blocks[0].idstr().to_string(), "mem0");
        assert_eq!(blocks[0].sharing(), Sharing::Private);
        assert_eq!(blocks[1].guest_address(), Some(BASE));
        assert_eq!(blocks[1].used_bytes(), 8 << 12);
        assert_eq!(blocks[1].sharing(), Sharing::Shared);
        memory.write_obj(7u64, GuestAddress(BASE + 8)).unwrap();
        let mut bytes = [0; 8];
        blocks[1].read(8, &mut bytes).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 7);
        drop(memory);
        blocks[0].write(0, &[1; 8]).unwrap();
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0)).unwrap(), 1);
        ram.resize(BlockIndex(1), 8 << 12).unwrap();
        assert!(ram.resize(BlockIndex(1), 4 << 12).is_err());
        let read_only = MmapRegion::build(None, 4096, 1, 0x22).unwrap();
        let read_only = GuestRegionMmap::<AtomicBitmap>::new(read_only, GuestAddress(0)).unwrap();
        let read_only = GuestMemoryMmap::from_regions(vec![read_only]).unwrap();
        assert!(VmMemory::new(read_only, PAGE_BYTES, |_| Name::default()).is_err());
    }

    #[test]
    fn what_is_written_through_it_is_reported() {
        let memory = memory();
        let ram = adapt(&memory);
        let mut log = VmMemoryLog::new(memory.clone());
        let mut collect = || {
            let mut all = Vec::new();
            log.collect(&ram, &mut |block, pages| all.push((block.0, pages)))
                .unwrap();
            all
        };
        memory.write_obj(7u64, GuestAddress(0)).unwrap();
        assert_eq!(collect(), [(0, 0..1)]);
        assert_eq!(collect(), []);
        memory
            .write_slice(&[1; 4097], GuestAddress(3 << 12))
            .unwrap();
        memory.write_obj(7u64, GuestAddress(99 << 12)).unwrap();
        memory
            .write_obj(7u64, GuestAddress(BASE + (7 << 12)))
            .unwrap();
        assert_eq!(collect(), [(0, 3..5), (0, 99..100), (1, 7..8)]);
        memory.write_obj(7u64, GuestAddress(0)).unwrap();
        log.start(&ram).unwrap();
        let nothing = &mut |_, pages| panic!("{pages:?}");
        log.collect(&ram, nothing).unwrap();
    }

    #[test]
    fn bits_are_as_long_as_the_bitmap_was_made_for() {
        for (bytes, page) in [
            (4096, 4096),
            (100 << 12, 4096),
            (100 << 12, 65536),
            (1 << 30, 65536),
            (3 << 16, 65536),
            ((3 << 16) + 4096, 65536),
            (1 << 21, 1 << 21),
        ] {
            let bitmap = AtomicBitmap::new(bytes, NonZeroUsize::new(page).unwrap());
            assert_eq!(bit_bytes(&bitmap), page as u64, "{bytes}");
        }
    }
}
