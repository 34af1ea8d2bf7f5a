//! Machines with little memory of all kinds.

use std::ptr::NonNull;
use std::sync::Arc;

use fastrand::Rng;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use vmferry_stream::Name;

use crate::{BlockIndex, BlockLayout, GuestRam, LayoutError, PAGE_BYTES, RamBlock, Sharing};

/// [`PAGE_BYTES`], as the length of a slice.
pub(super) const PAGE: usize = PAGE_BYTES as usize;

/// A guest page: index of its block, number in it.
pub(super) type Page = (usize, u64);

/// A block at both ends.
pub(super) struct Shape {
    pub(super) name: Name,
    /// At the source, and so in the end at the destination.
    pub(super) pages: u64,
    /// At the destination, before.
    target_pages: u64,
    max_pages: u64,
    /// Guest pages in a host page.
    pub(super) host_pages: u64,
    sharing: Sharing,
    pub(super) travels: bool,
}

pub(super) struct Geometry {
    pub(super) shapes: Vec<Shape>,
    pub(super) ignore_shared: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Source,
    Destination,
}

impl Geometry {
    pub(super) fn seeded(rng: &mut Rng) -> Self {
        let ignore_shared = rng.bool();
        let large = rng.u8(..6) == 0;
        let mut shapes = vec![Shape::new(
            "pc.ram",
            rng.u64(1..if large { 90 } else { 20 }),
            1,
        )];
        if rng.bool() {
            let host_pages = if rng.bool() { 2 } else { 4 };
            shapes.push(Shape::new("m0", host_pages * rng.u64(1..5), host_pages));
        }
        if rng.u8(..3) == 0 {
            let max_pages = rng.u64(1..7);
            shapes.push(Shape {
                max_pages,
                target_pages: rng.u64(1..=max_pages),
                ..Shape::new("/rom@etc/acpi/tables", rng.u64(1..=max_pages), 1)
            });
        }
        if rng.u8(..3) == 0 {
            shapes.push(Shape {
                sharing: Sharing::Shared,
                travels: !ignore_shared,
                ..Shape::new("shm", rng.u64(1..4), 1)
            });
        }
        rng.shuffle(&mut shapes);
        Self {
            shapes,
            ignore_shared,
        }
    }

    pub(super) fn ram(&self, end: End) -> Arc<SimRam> {
        let layouts = self.shapes.iter().zip((0..).step_by(1 << 30));
        let layouts = layouts.map(|(shape, address)| shape.layout(end, address));
        Arc::new(SimRam::new(layouts.collect()))
    }

    pub(super) fn index(&self, name: &Name) -> usize {
        let index = self.shapes.iter().position(|shape| shape.name == *name);
        index.unwrap_or_else(|| panic!("there is no block '{name}'"))
    }

    /// Every guest page that travels.
    pub(super) fn pages(&self) -> impl Iterator<Item = Page> {
        let travelling = self
            .shapes
            .iter()
            .enumerate()
            .filter(|(_, shape)| shape.travels);
        travelling.flat_map(|(index, shape)| (0..shape.pages).map(move |page| (index, page)))
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.pages().count() as u64 * PAGE_BYTES
    }

    /// The first guest page of the host page.
    pub(super) fn host_page(&self, (block, page): Page) -> Page {
        (block, page - page % self.shapes[block].host_pages)
    }

    /// All guest pages of a host page.
    pub(super) fn host_page_pages(&self, page: Page) -> impl Iterator<Item = Page> {
        let (block, first) = self.host_page(page);
        (first..first + self.shapes[block].host_pages).map(move |page| (block, page))
    }

    /// One `value` for each guest page of each block.
    pub(super) fn map<T: Clone>(&self, value: &T) -> PageMap<T> {
        let blocks = self.shapes.iter();
        PageMap(
            blocks
                .map(|shape| vec![value.clone(); shape.pages as usize])
                .collect(),
        )
    }
}

impl Shape {
    fn new(name: &str, pages: u64, host_pages: u64) -> Self {
        Self {
            name: Name::new(name).expect("short"),
            pages,
            target_pages: pages,
            max_pages: pages,
            host_pages,
            sharing: Sharing::Private,
            travels: true,
        }
    }

    fn layout(&self, end: End, address: u64) -> BlockLayout {
        let pages = match end {
            End::Source => self.pages,
            End::Destination => self.target_pages,
        };
        BlockLayout {
            idstr: self.name.clone(),
            used_bytes: pages * PAGE_BYTES,
            max_bytes: self.max_pages * PAGE_BYTES,
            page_bytes: self.host_pages * PAGE_BYTES,
            guest_address: Some(address),
            sharing: self.sharing,
        }
    }
}

/// Something about each guest page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PageMap<T>(pub(super) Vec<Vec<T>>);

impl<T> std::ops::Index<Page> for PageMap<T> {
    type Output = T;

    fn index(&self, (block, page): Page) -> &T {
        &self.0[block][page as usize]
    }
}

impl<T> std::ops::IndexMut<Page> for PageMap<T> {
    fn index_mut(&mut self, (block, page): Page) -> &mut T {
        &mut self.0[block][page as usize]
    }
}

/// What memory holds, or should.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Contents(pub(super) Vec<Vec<u8>>);

impl Contents {
    pub(super) fn zeroes(geometry: &Geometry) -> Self {
        let blocks = geometry.shapes.iter();
        Self(
            blocks
                .map(|shape| vec![0; shape.pages as usize * PAGE])
                .collect(),
        )
    }

    pub(super) fn page(&self, (block, page): Page) -> &[u8] {
        &self.0[block][page as usize * PAGE..][..PAGE]
    }

    pub(super) fn page_mut(&mut self, (block, page): Page) -> &mut [u8] {
        &mut self.0[block][page as usize * PAGE..][..PAGE]
    }
}

/// Memory of a machine. Host pages of any size are made of ordinary ones, which is enough here: the
/// kernel that places them is not the real one.
pub(super) struct SimRam {
    blocks: Vec<RamBlock>,
    /// What was mapped for each.
    mapped: Vec<(NonNull<u8>, usize)>,
}

// SAFETY: `mapped` is only there to be unmapped.
unsafe impl Send for SimRam {}
// SAFETY: as above.
unsafe impl Sync for SimRam {}

impl SimRam {
    fn new(layouts: Vec<BlockLayout>) -> Self {
        let mut ram = Self {
            blocks: Vec::new(),
            mapped: Vec::new(),
        };
        for layout in layouts {
            let align = layout.page_bytes as usize;
            let bytes = layout.max_bytes as usize + align;
            let flags = match layout.sharing {
                Sharing::Private => MapFlags::PRIVATE,
                Sharing::Shared => MapFlags::SHARED,
            };
            let rights = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: the host picks a place where nothing is.
            let start = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, rights, flags) };
            let start = NonNull::new(start.expect("memory").cast::<u8>()).expect("not at 0");
            ram.mapped.push((start, bytes));
            let address = start.addr().get();
            let first = address.next_multiple_of(align) - address;
            // SAFETY: mapped just now, long enough to begin at a host page, and until the blocks are
            // gone.
            let block = unsafe { RamBlock::new(layout, start.add(first)) };
            ram.blocks.push(block.expect("a right layout"));
        }
        ram
    }

    pub(super) fn page(&self, (block, page): Page) -> [u8; PAGE] {
        let mut content = [0; PAGE];
        let read = self.blocks[block].read(page * PAGE_BYTES, &mut content);
        read.expect("in use");
        content
    }

    /// The block that this is.
    pub(super) fn index(&self, block: &RamBlock) -> Option<usize> {
        let is_same = |other: &RamBlock| std::ptr::eq(other, block);
        self.blocks.iter().position(is_same)
    }
}

impl Drop for SimRam {
    fn drop(&mut self) {
        self.blocks.clear();
        for (start, bytes) in self.mapped.drain(..) {
            // SAFETY: `new` mapped it, and the blocks in it are gone.
            unsafe { munmap(start.as_ptr().cast(), bytes) }.expect("it is mapped");
        }
    }
}

impl GuestRam for SimRam {
    fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn resize(&self, block: BlockIndex, used_bytes: u64) -> Result<(), LayoutError> {
        self.blocks[block.0].set_used_bytes(used_bytes)
    }
}
