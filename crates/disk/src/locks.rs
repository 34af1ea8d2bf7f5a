//! The lock bytes that keep QEMU's programs and us off each other's images.
//!
//! A program that opens an image takes shared locks (`F_OFD_SETLK`, `F_RDLCK`) on single bytes of
//! the file that say what it does and what it will not have others do, then asks whether somebody
//! holds a byte that forbids it. The content of the file at these offsets does not matter, and
//! nothing but the will of the programs enforces any of it.
//!
//! ```text
//! byte   held by one who …             byte   held by one who does not share …
//!  100   reads consistently             200   consistent reading
//!  101   writes                         201   writing
//!  102   writes unchanged data          202   writing unchanged data
//!  103   resizes                        203   resizing
//! ```
//!
//! | we | take | so that |
//! |---|---|---|
//! | write | 100, 101, 201, 203 | nobody else writes or resizes, as with a running guest's disk |
//! | read  | 100, 203 | nobody resizes, as with `qemu-nbd -r` |
//! | freeze | 100, 201, 203 | nobody writes or resizes, as with a backing file, or a checked image |
//!
//! Source: the table that QEMU's documentation and the kernel's list of locks show.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Something that a program does to an image; the number is its place in both rows of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// Reading what nobody changes half-way.
    ConsistentRead = 0,
    /// Writing.
    Write = 1,
    /// Writing what is there already (a copy job's work).
    WriteUnchanged = 2,
    /// Changing the length.
    Resize = 3,
}

const DOES_FIRST_BYTE: i64 = 100;
const SHARES_NOT_FIRST_BYTE: i64 = 200;

impl Deed {
    fn does_byte(self) -> i64 {
        DOES_FIRST_BYTE + self as i64
    }

    fn shares_not_byte(self) -> i64 {
        SHARES_NOT_FIRST_BYTE + self as i64
    }
}

impl fmt::Display for Deed {
    /// The word that QEMU uses.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::WriteUnchanged => "write unchanged",
            Self::Resize => "resize",
        })
    }
}

/// What the holder of a lock wants with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read; others may write, nobody may resize.
    Read,
    /// Read and write; nobody else may write or resize.
    Write,
    /// Read; nobody may write or resize, for what is read must not change.
    Freeze,
}

impl Access {
    fn does(self) -> &'static [Deed] {
        match self {
            Self::Read | Self::Freeze => &[Deed::ConsistentRead],
            Self::Write => &[Deed::ConsistentRead, Deed::Write],
        }
    }

    fn shares_not(self) -> &'static [Deed] {
        match self {
            Self::Read => &[Deed::Resize],
            Self::Write | Self::Freeze => &[Deed::Write, Deed::Resize],
        }
    }

    fn bytes(self) -> impl Iterator<Item = i64> {
        let does = self.does().iter().map(|deed| deed.does_byte());
        does.chain(self.shares_not().iter().map(|deed| deed.shares_not_byte()))
    }
}

/// An image could not be locked. Nothing of the lock is left behind.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another program does not allow what we would do.
    #[error("failed to get \"{deed}\" lock on {}: is another process using the image?", path.display())]
    Forbidden {
        /// The image.
        path: PathBuf,
        /// What we would do.
        deed: Deed,
    },
    /// Another program does what we would not allow.
    #[error("failed to get shared \"{deed}\" lock on {}: is another process using the image?", path.display())]
    Done {
        /// The image.
        path: PathBuf,
        /// What the other program does.
        deed: Deed,
    },
    /// The filesystem has no such locks, or the kernel ran out of them.
    #[error("cannot lock {}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// A lock on an image, until it is dropped (or the process ends).
#[derive(Debug)]
pub struct ImageLock {
    file: File,
    access: Access,
}

impl ImageLock {
    /// Lock the image that `file` is open on; `path` is for messages.
    ///
    /// The lock belongs to the open file: several locks on duplicates of one descriptor are one
    /// lock, and the first one dropped ends it.
    pub fn acquire(file: &File, path: &Path, access: Access) -> Result<Self, LockError> {
        let failed = |source| LockError::Io {
            path: path.to_owned(),
            source,
        };
        let lock = Self {
            file: file.try_clone().map_err(failed)?,
            access,
        };
        // All bytes are taken before the first question: of two programs that start at once each
        // sees the other, and at most one goes on.
        for byte in access.bytes() {
            set(&lock.file, byte, libc::F_RDLCK).map_err(failed)?;
        }
        for &deed in access.does() {
            if held_by_others(&lock.file, deed.shares_not_byte()).map_err(failed)? {
                let path = path.to_owned();
                return Err(LockError::Forbidden { path, deed });
            }
        }
        for &deed in access.shares_not() {
            if held_by_others(&lock.file, deed.does_byte()).map_err(failed)? {
                let path = path.to_owned();
                return Err(LockError::Done { path, deed });
            }
        }
        Ok(lock)
    }

    /// What the lock allows its holder.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        // The disk may hold a duplicate of the descriptor open: closing ours would not unlock.
        for byte in self.access.bytes() {
            if let Err(error) = set(&self.file, byte, libc::F_UNLCK) {
                tracing::warn!(byte, %error, "an image stays locked until it is closed");
            }
        }
    }
}

fn request(byte: i64, kind: i32) -> libc::flock {
    // SAFETY: `flock` is a plain C structure of integers; all zeroes is a value of it. It is made
    // this way because some targets have private padding fields.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // The constants are ints in C and their field is a short.
    lock.l_type = kind as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn set(file: &File, byte: i64, kind: i32) -> io::Result<()> {
    let lock = request(byte, kind);
    // SAFETY: the descriptor is open while `file` is borrowed; `lock` is a valid `flock` that the
    // call only reads.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn held_by_others(file: &File, byte: i64) -> io::Result<bool> {
    let mut lock = request(byte, libc::F_WRLCK);
    // SAFETY: the descriptor is open while `file` is borrowed; `lock` is a valid `flock`, ours
    // alone, that the call may write to.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}
