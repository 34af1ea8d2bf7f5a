//! Guest memory as a VMM hands it to us.

use std::ptr::NonNull;
use std::sync::Arc;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use vmferry_stream::Name;

use crate::block::{BlockIndex, BlockLayout, LayoutError, PAGE_BYTES, RamBlock, Sharing};

/// The memory of a guest: what a VMM must be able to say about it.
pub trait GuestRam: Send + Sync {
    /// All blocks, in the order in which they are sent; always the same ones.
    fn blocks(&self) -> &[RamBlock];

    /// A migration brings the block with another length. Called while no guest runs.
    ///
    /// # Errors
    /// It cannot have that length here.
    fn resize(&self, block: BlockIndex, used_bytes: u64) -> Result<(), LayoutError>;
}

impl<T: GuestRam + ?Sized> GuestRam for Arc<T> {
    fn blocks(&self) -> &[RamBlock] {
        (**self).blocks()
    }

    fn resize(&self, block: BlockIndex, used_bytes: u64) -> Result<(), LayoutError> {
        (**self).resize(block, used_bytes)
    }
}

/// Anonymous memory of this process: the simplest [`GuestRam`].
#[derive(Debug)]
pub struct AnonymousRam {
    blocks: Vec<RamBlock>,
}

/// Memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The layout is wrong.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The host refused.
    #[error("RAM block '{idstr}': {bytes:#x} bytes cannot be mapped: {source}")]
    Map {
        /// The block's name.
        idstr: Name,
        /// How many.
        bytes: u64,
        /// What the host said.
        source: std::io::Error,
    },
}

impl AnonymousRam {
    /// Map blocks of these names and lengths, one behind the other in the guest, full of zeroes.
    ///
    /// # Errors
    /// The host has no memory, or a length is no multiple of the page size.
    pub fn new(blocks: &[(&str, u64)]) -> Result<Self, MapError> {
        let mut layouts = Vec::new();
        let mut guest_address = 0;
        for (idstr, bytes) in blocks {
            layouts.push(BlockLayout {
                idstr: Name::new(idstr).map_err(|error| LayoutError {
                    idstr: Name::default(),
                    reason: error.to_string(),
                })?,
                used_bytes: *bytes,
                max_bytes: *bytes,
                page_bytes: PAGE_BYTES,
                guest_address: Some(guest_address),
                sharing: Sharing::Private,
            });
            guest_address += bytes;
        }
        Self::with_layouts(layouts)
    }

    /// Map private blocks of normal pages, full of zeroes. Those with room to grow can be resized.
    ///
    /// # Errors
    /// The host has no memory, or a layout is wrong.
    pub fn with_layouts(layouts: Vec<BlockLayout>) -> Result<Self, MapError> {
        let mut ram = Self { blocks: Vec::new() };
        for layout in layouts {
            ram.blocks.push(map(layout)?);
        }
        Ok(ram)
    }
}

fn map(layout: BlockLayout) -> Result<RamBlock, MapError> {
    let failed = |source: std::io::Error| MapError::Map {
        idstr: layout.idstr.clone(),
        bytes: layout.max_bytes,
        source,
    };
    let bytes = usize::try_from(layout.max_bytes)
        .map_err(|_| failed(std::io::ErrorKind::OutOfMemory.into()))?;
    // SAFETY: the host picks a place where nothing is.
    let start = unsafe {
        mmap_anonymous(
            std::ptr::null_mut(),
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    };
    let start = start.map_err(|errno| failed(errno.into()))?.cast::<u8>();
    let start =
        NonNull::new(start).ok_or_else(|| failed(std::io::ErrorKind::OutOfMemory.into()))?;
    // SAFETY: it was mapped just now, readable and writable, and is unmapped when the block is gone.
    let block = unsafe { RamBlock::new(layout, start) };
    block.map_err(|error| {
        // SAFETY: nobody has it.
        let _ = unsafe { munmap(start.as_ptr().cast(), bytes) };
        error.into()
    })
}

impl GuestRam for AnonymousRam {
    fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn resize(&self, block: BlockIndex, used_bytes: u64) -> Result<(), LayoutError> {
        match self.blocks.get(block.0) {
            Some(block) if block.used_bytes() == used_bytes => Ok(()),
            Some(block) => block.set_used_bytes(used_bytes),
            None => Ok(()),
        }
    }
}

impl Drop for AnonymousRam {
    fn drop(&mut self) {
        for block in self.blocks.drain(..) {
            let (start, bytes) = (block.start(), block.max_bytes());
            drop(block);
            let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
            // SAFETY: `map` mapped it, and the block that promised it is gone.
            let _ = unsafe { munmap(start.as_ptr().cast(), bytes) };
        }
    }
}
