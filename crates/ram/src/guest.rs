//! Guest memory as a VMM hands it to us.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use vmferry_stream::Name;

use crate::block::{BlockIndex, BlockLayout, LayoutError, PAGE_BYTES, RamBlock, Sharing};

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

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

/// Memory of this process that has no name: the simplest [`GuestRam`].
///
/// A private block is anonymous memory, a shared one a `memfd`, which another process can map too;
/// both of huge pages where the layout says so.
#[derive(Debug)]
pub struct AnonymousRam {
    blocks: Vec<RamBlock>,
    /// One for each block; `None` for private ones.
    files: Vec<Option<OwnedFd>>,
}

/// Memory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The layout is wrong.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The host refused.
    #[error(
        "RAM block '{idstr}': {bytes:#x} bytes in pages of {page_bytes:#x} cannot be mapped: {source}"
    )]
    Map {
        /// The block's name.
        idstr: Name,
        /// How many.
        bytes: u64,
        /// In pages of which size; what huge ones take must have been reserved (`vm.nr_hugepages`).
        page_bytes: u64,
        /// What the host said.
        source: io::Error,
    },
}

impl AnonymousRam {
    /// Map private blocks of these names and lengths, one behind the other in the guest, full of
    /// zeroes.
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

    /// Map blocks, full of zeroes. Those with room to grow can be resized.
    ///
    /// # Errors
    /// The host has no memory, no huge pages reserved, or a layout is wrong.
    pub fn with_layouts(layouts: Vec<BlockLayout>) -> Result<Self, MapError> {
        Self::with_files(layouts.into_iter().map(|layout| (layout, None)).collect())
    }

    /// As [`AnonymousRam::with_layouts`], but a shared block lies in the file that is given for it,
    /// from its beginning, and holds what is there: an [`AnonymousRam::file`] of another process.
    ///
    /// # Errors
    /// As [`AnonymousRam::with_layouts`]; a file that is too short.
    pub fn with_files(blocks: Vec<(BlockLayout, Option<OwnedFd>)>) -> Result<Self, MapError> {
        let mut ram = Self {
            blocks: Vec::new(),
            files: Vec::new(),
        };
        for (layout, file) in blocks {
            let (block, file) = map(layout, file)?;
            ram.blocks.push(block);
            ram.files.push(file);
        }
        Ok(ram)
    }

    /// The file that a shared block lies in.
    #[must_use]
    pub fn file(&self, block: BlockIndex) -> Option<BorrowedFd<'_>> {
        self.files.get(block.0)?.as_ref().map(AsFd::as_fd)
    }
}

fn map(
    layout: BlockLayout,
    file: Option<OwnedFd>,
) -> Result<(RamBlock, Option<OwnedFd>), MapError> {
    let (idstr, max_bytes, page_bytes) =
        (layout.idstr.clone(), layout.max_bytes, layout.page_bytes);
    let failed = |source: io::Error| MapError::Map {
        idstr: idstr.clone(),
        bytes: max_bytes,
        page_bytes,
        source,
    };
    let bytes =
        usize::try_from(max_bytes).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
    let file = match (layout.sharing, file) {
        (Sharing::Private, _) => None,
        (Sharing::Shared, Some(file)) => {
            let length = fstat(&file).map_err(|errno| failed(errno.into()))?.st_size;
            if u64::try_from(length).is_ok_and(|length| length < max_bytes) {
                // What is not in the file could be mapped, but not touched.
                return Err(failed(io::Error::other(format!(
                    "its file has only {length:#x}"
                ))));
            }
            Some(file)
        }
        (Sharing::Shared, None) => Some(memfd(max_bytes, page_bytes).map_err(failed)?),
    };
    let start = match &file {
        // SAFETY: the host picks a place where nothing is.
        Some(file) => unsafe {
            let flags = MapFlags::SHARED;
            mmap(ptr::null_mut(), bytes, READ_WRITE, flags, file, 0)
        },
        None => {
            let flags = match huge_page_flag(page_bytes) {
                0 => MapFlags::NORESERVE,
                // Reserved, so that what is missing is missing now.
                size => MapFlags::HUGETLB | MapFlags::from_bits_retain(size),
            };
            // SAFETY: the host picks a place where nothing is.
            unsafe {
                mmap_anonymous(
                    ptr::null_mut(),
                    bytes,
                    READ_WRITE,
                    MapFlags::PRIVATE | flags,
                )
            }
        }
    };
    let start = start.map_err(|errno| failed(errno.into()))?.cast::<u8>();
    let start = NonNull::new(start).ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
    // SAFETY: it was mapped just now, readable and writable, and is unmapped when the block is gone.
    let block = unsafe { RamBlock::new(layout, start) };
    let block = block.inspect_err(|_| {
        // SAFETY: nobody has it.
        let _ = unsafe { munmap(start.as_ptr().cast(), bytes) };
    })?;
    Ok((block, file))
}

fn memfd(bytes: u64, page_bytes: u64) -> io::Result<OwnedFd> {
    let huge = match huge_page_flag(page_bytes) {
        0 => MemfdFlags::empty(),
        size => MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(size),
    };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = memfd_create("guest-ram", flags | huge)?;
    ftruncate(&file, bytes)?;
    // Nobody who gets the file can take memory away from under a mapping.
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// How `mmap` and `memfd_create` are told the size of huge pages; 0 for normal ones.
fn huge_page_flag(page_bytes: u64) -> u32 {
    const SHIFT: u32 = 26;
    if page_bytes == PAGE_BYTES {
        return 0;
    }
    page_bytes.trailing_zeros() << SHIFT
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

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(bytes: u64) -> BlockLayout {
        BlockLayout {
            idstr: Name::new("pc.ram").unwrap(),
            used_bytes: bytes,
            max_bytes: bytes,
            page_bytes: PAGE_BYTES,
            guest_address: Some(0),
            sharing: Sharing::Shared,
        }
    }

    #[test]
    fn a_shared_block_can_be_mapped_again() {
        let first = AnonymousRam::with_layouts(vec![shared(2 << 12)]).unwrap();
        let file = || {
            let file = first.file(BlockIndex(0)).unwrap();
            Some(file.try_clone_to_owned().unwrap())
        };
        let second = AnonymousRam::with_files(vec![(shared(1 << 12), file())]).unwrap();
        first.blocks()[0].write(8, &[7; 8]).unwrap();
        let mut bytes = [0; 8];
        second.blocks()[0].read(8, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 8]);

        let longer = AnonymousRam::with_files(vec![(shared(3 << 12), file())]);
        assert_eq!(
            longer.unwrap_err().to_string(),
            "RAM block 'pc.ram': 0x3000 bytes in pages of 0x1000 cannot be mapped: its file has only 0x2000"
        );
        assert!(ftruncate(file().unwrap(), 0).is_err());
        let private = AnonymousRam::new(&[("pc.ram", 1 << 12)]).unwrap();
        assert!(private.file(BlockIndex(0)).is_none());
        assert!(private.file(BlockIndex(1)).is_none());
    }

    #[test]
    fn says_what_cannot_be_mapped() {
        let layout = BlockLayout {
            page_bytes: 1 << 30,
            ..shared(1 << 50)
        };
        let private = BlockLayout {
            sharing: Sharing::Private,
            ..layout.clone()
        };
        for layout in [layout, private] {
            let error = AnonymousRam::with_layouts(vec![layout]).unwrap_err();
            assert!(matches!(error, MapError::Map { .. }), "{error}");
        }
    }
}
