//! One block of guest memory, as its VMM has mapped it.

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use vmferry_stream::Name;

use crate::bitmap::PageBitmap;

/// Size of a guest page in bytes, which is what records of the stream are about.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes of one access to guest memory.
const WORD_BYTES: usize = size_of::<u64>();

/// Place of a block in [`GuestRam::blocks`](crate::GuestRam::blocks).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockIndex(pub usize);

/// Who else has the memory of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Nobody: anonymous, or a private mapping.
    Private,
    /// Whoever maps the same file. With `x-ignore-shared` it stays where it is and does not travel.
    Shared,
}

/// What a block is, without its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockLayout {
    /// Its name in the stream, such as `pc.ram`; unique in a machine.
    pub idstr: Name,
    /// Bytes in use, a multiple of [`PAGE_BYTES`].
    pub used_bytes: u64,
    /// Bytes that it can grow to, at least `used_bytes`. More only for blocks that a migration may
    /// resize, as QEMU's firmware blobs.
    pub max_bytes: u64,
    /// Size of the host's pages under it: [`PAGE_BYTES`], or that of huge pages. A postcopy moves
    /// whole ones.
    pub page_bytes: u64,
    /// Where the guest sees it; `None` if it is not mapped directly.
    pub guest_address: Option<u64>,
    /// Who else has it.
    pub sharing: Sharing,
}

/// A layout that no block can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("RAM block '{idstr}': {reason}")]
pub struct LayoutError {
    /// The block's name.
    pub idstr: Name,
    /// What is wrong.
    pub reason: String,
}

/// An access that does not lie in the bytes in use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("RAM block '{idstr}' has {used_bytes:#x} bytes; {bytes:#x} at {offset:#x} are not in it")]
pub struct OutOfBlock {
    /// The block's name.
    pub idstr: Name,
    /// Where the access begins.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
}

/// A block and its memory.
///
/// The guest reads and writes it meanwhile, so nobody here ever has a reference to it: bytes are
/// copied in and out with relaxed atomic accesses of eight bytes.
pub struct RamBlock {
    idstr: Name,
    start: NonNull<u8>,
    used_bytes: AtomicU64,
    max_bytes: u64,
    page_bytes: u64,
    guest_address: Option<u64>,
    sharing: Sharing,
}

// SAFETY: the memory is accessed atomically only, which any thread may do.
unsafe impl Send for RamBlock {}
// SAFETY: as above; everything else in it is atomic or never changes.
unsafe impl Sync for RamBlock {}

impl RamBlock {
    /// A block whose memory begins at `start`.
    ///
    /// # Errors
    /// Lengths that are no multiples of the page sizes, a page size that is no power of two or less
    /// than [`PAGE_BYTES`], a start that does not lie on a host page.
    ///
    /// # Safety
    /// `layout.max_bytes` bytes from `start` are mapped, readable and writable, as long as the block
    /// lives. No reference to them exists that the guest's writes would make wrong.
    pub unsafe fn new(layout: BlockLayout, start: NonNull<u8>) -> Result<Self, LayoutError> {
        let wrong = |reason: String| LayoutError {
            idstr: layout.idstr.clone(),
            reason,
        };
        let BlockLayout {
            used_bytes,
            max_bytes,
            page_bytes,
            ..
        } = layout;
        if !page_bytes.is_power_of_two() || page_bytes < PAGE_BYTES {
            return Err(wrong(format!("host pages of {page_bytes} bytes")));
        }
        if used_bytes == 0 || !used_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(wrong(format!("{used_bytes:#x} bytes are no whole pages")));
        }
        if max_bytes < used_bytes || !max_bytes.is_multiple_of(page_bytes) {
            return Err(wrong(format!(
                "at most {max_bytes:#x} bytes, with {used_bytes:#x} in use, in pages of {page_bytes:#x}"
            )));
        }
        if usize::try_from(max_bytes).is_err() {
            return Err(wrong(format!("{max_bytes:#x} bytes cannot be mapped")));
        }
        let address = start.addr().get() as u64;
        if !address.is_multiple_of(page_bytes) {
            return Err(wrong(format!(
                "its memory at {address:#x} begins inside a host page"
            )));
        }
        Ok(Self {
            idstr: layout.idstr,
            start,
            used_bytes: used_bytes.into(),
            max_bytes,
            page_bytes,
            guest_address: layout.guest_address,
            sharing: layout.sharing,
        })
    }

    /// Its name in the stream.
    #[must_use]
    pub fn idstr(&self) -> &Name {
        &self.idstr
    }

    /// Bytes in use.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Acquire)
    }

    /// Bytes it can grow to.
    #[must_use]
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Guest pages in use.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.used_bytes() / PAGE_BYTES
    }

    /// Size of the host's pages under it.
    #[must_use]
    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Where the guest sees it.
    #[must_use]
    pub fn guest_address(&self) -> Option<u64> {
        self.guest_address
    }

    /// Who else has it.
    #[must_use]
    pub fn sharing(&self) -> Sharing {
        self.sharing
    }

    /// What it is, now.
    #[must_use]
    pub fn layout(&self) -> BlockLayout {
        BlockLayout {
            idstr: self.idstr.clone(),
            used_bytes: self.used_bytes(),
            max_bytes: self.max_bytes,
            page_bytes: self.page_bytes,
            guest_address: self.guest_address,
            sharing: self.sharing,
        }
    }

    /// Where its memory begins in this process.
    #[must_use]
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// A bitmap with a bit for each guest page that the block can have.
    #[must_use]
    pub fn bitmap(&self) -> PageBitmap {
        PageBitmap::new(self.max_bytes / PAGE_BYTES)
    }

    /// Another number of bytes is in use from now on. For [`GuestRam::resize`](crate::GuestRam::resize).
    ///
    /// # Errors
    /// No whole pages, or more than it can grow to.
    pub fn set_used_bytes(&self, bytes: u64) -> Result<(), LayoutError> {
        if bytes == 0 || bytes > self.max_bytes || !bytes.is_multiple_of(PAGE_BYTES) {
            return Err(LayoutError {
                idstr: self.idstr.clone(),
                reason: format!(
                    "it cannot have {bytes:#x} bytes, at most {:#x}",
                    self.max_bytes
                ),
            });
        }
        self.used_bytes.store(bytes, Ordering::Release);
        Ok(())
    }

    /// Copy bytes out. Where the guest writes meanwhile, each eight bytes are old or new.
    ///
    /// # Errors
    /// They are not in use.
    ///
    /// # Panics
    /// If `offset` or the length is no multiple of 8.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), OutOfBlock> {
        let words = self.words(offset, into.len())?;
        for (word, bytes) in words.iter().zip(into.chunks_exact_mut(WORD_BYTES)) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        Ok(())
    }

    /// Copy bytes in.
    ///
    /// # Errors
    /// They are not in use.
    ///
    /// # Panics
    /// If `offset` or the length is no multiple of 8.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), OutOfBlock> {
        let words = self.words(offset, from.len())?;
        for (word, bytes) in words.iter().zip(from.chunks_exact(WORD_BYTES)) {
            let mut value = [0; WORD_BYTES];
            value.copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Are all of these bytes `fill`?
    ///
    /// # Errors
    /// They are not in use.
    ///
    /// # Panics
    /// If `offset` or `bytes` is no multiple of 8.
    pub fn is_filled(&self, offset: u64, bytes: usize, fill: u8) -> Result<bool, OutOfBlock> {
        let expected = u64::from_ne_bytes([fill; WORD_BYTES]);
        let words = self.words(offset, bytes)?;
        // The first bytes tell most pages apart; then in runs, which the compiler can unroll.
        Ok(words.chunks(16).all(|run| {
            run.iter().fold(0, |seen, word| {
                seen | (word.load(Ordering::Relaxed) ^ expected)
            }) == 0
        }))
    }

    /// Fill bytes with `fill`, reading first: memory that was never touched stays so.
    ///
    /// # Errors
    /// They are not in use.
    ///
    /// # Panics
    /// If `offset` or `bytes` is no multiple of 8.
    pub fn fill(&self, offset: u64, bytes: usize, fill: u8) -> Result<(), OutOfBlock> {
        if self.is_filled(offset, bytes, fill)? {
            return Ok(());
        }
        let value = u64::from_ne_bytes([fill; WORD_BYTES]);
        for word in self.words(offset, bytes)? {
            word.store(value, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The memory from `offset` on, eight bytes each.
    ///
    /// # Errors
    /// It is not in use.
    ///
    /// # Panics
    /// If `offset` or `bytes` is no multiple of 8.
    pub fn words(&self, offset: u64, bytes: usize) -> Result<&[AtomicU64], OutOfBlock> {
        #[cfg(test)]
        crate::testing::accessed(self, offset);
        let used_bytes = self.used_bytes();
        let length = bytes as u64;
        let end = offset.checked_add(length);
        if end.is_none_or(|end| end > used_bytes) {
            return Err(OutOfBlock {
                idstr: self.idstr.clone(),
                offset,
                bytes: length,
                used_bytes,
            });
        }
        assert!(
            offset.is_multiple_of(WORD_BYTES as u64) && bytes.is_multiple_of(WORD_BYTES),
            "{bytes} bytes at {offset:#x} are no whole words"
        );
        // It fits: `new` refused what does not, and `end` is not behind `max_bytes`.
        let offset = usize::try_from(offset).expect("a block fits in the address space");
        // SAFETY: `offset..offset + bytes` lies in the mapping, which is there as long as `self`
        // (promised to `new`) and begins on a page, so the words are aligned. They are atomics:
        // others may write to them.
        let words = unsafe {
            std::slice::from_raw_parts(
                self.start.add(offset).cast::<AtomicU64>().as_ptr(),
                bytes / WORD_BYTES,
            )
        };
        Ok(words)
    }
}

impl fmt::Debug for RamBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlock")
            .field("idstr", &self.idstr)
            .field("used_bytes", &self.used_bytes())
            .field("max_bytes", &self.max_bytes)
            .field("page_bytes", &self.page_bytes)
            .field("guest_address", &self.guest_address)
            .field("sharing", &self.sharing)
            .finish_non_exhaustive()
    }
}
