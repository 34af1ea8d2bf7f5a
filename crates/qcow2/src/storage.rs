//! The file that an image lies in.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, FsWord, SeekFrom, fallocate, fstatfs, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use vmferry_disk::{Access, Cached, ImageLock, OpenError, start_write_back};

/// `statfs(2)` says this of tmpfs.
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// A host file: bytes that grow, callable from several threads at once.
///
/// Writes are durable only after [`Storage::flush`]; until then any part of them, in any order, may
/// survive a crash. Tests implement this to make just that happen.
pub trait Storage: Send + Sync {
    /// Length in bytes now.
    fn length(&self) -> io::Result<u64>;

    /// Fill `buf` from `offset`. What lies past the end reads as zeroes.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Fill as much of `buf` as can be had without waiting for the medium.
    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<Cached>;

    /// Write all of `buf` at `offset`; the file grows as needed, a gap reads as zeroes.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Make the file this long; new bytes read as zeroes.
    fn set_length(&self, length: u64) -> io::Result<()>;

    /// Give the space of a range back. A hint: what it reads as afterwards is not defined.
    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Start writing back the range without waiting. A hint.
    fn start_writeback(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Make everything written so far durable, the length included.
    fn flush(&self) -> io::Result<()>;
}

/// A file or a block device of the host.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    is_device: bool,
    no_punch: AtomicBool,
    no_cached_reads: AtomicBool,
    /// On tmpfs, which refuses `RWF_NOWAIT`: reading it never waits for a medium (but for swap).
    in_memory: bool,
    // After the file, so that it is dropped last: the image is ours until all is closed.
    lock: Option<ImageLock>,
}

impl FileStorage {
    /// Open an existing file; `lock` takes the image lock that QEMU's programs respect.
    pub fn open(path: impl AsRef<Path>, read_only: bool, lock: bool) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => OpenError::Missing {
                path: path.to_owned(),
            },
            io::ErrorKind::PermissionDenied => OpenError::Permission {
                path: path.to_owned(),
                intent: if read_only { "read" } else { "read and write" },
            },
            io::ErrorKind::IsADirectory => OpenError::Directory {
                path: path.to_owned(),
            },
            _ => OpenError::Io {
                path: path.to_owned(),
                operation: "open",
                source,
            },
        };
        let check = |metadata: &std::fs::Metadata| {
            let kind = metadata.file_type();
            let path = path.to_owned();
            if kind.is_dir() {
                return Err(OpenError::Directory { path });
            }
            if !kind.is_file() && !kind.is_block_device() {
                return Err(OpenError::NotADisk { path });
            }
            Ok(kind.is_block_device())
        };
        // Asked before the open, which would wait for the other end of a pipe, and again after it.
        check(&std::fs::metadata(path).map_err(failed)?)?;
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(failed)?;
        let is_device = check(&file.metadata().map_err(failed)?)?;
        // Not only to read: tables that somebody changes make no image.
        let access = if read_only {
            Access::Freeze
        } else {
            Access::Write
        };
        let lock = lock
            .then(|| ImageLock::acquire(&file, path, access))
            .transpose()?;
        Ok(Self::of(file, is_device, lock))
    }

    /// Make an empty file that only its owner may read and write.
    pub fn create(path: impl AsRef<Path>, lock: bool) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|source| match source.kind() {
                io::ErrorKind::AlreadyExists => OpenError::Exists {
                    path: path.to_owned(),
                },
                _ => OpenError::Io {
                    path: path.to_owned(),
                    operation: "create",
                    source,
                },
            })?;
        let lock = lock
            .then(|| ImageLock::acquire(&file, path, Access::Write))
            .transpose()?;
        Ok(Self::of(file, false, lock))
    }

    fn of(file: File, is_device: bool, lock: Option<ImageLock>) -> Self {
        let in_memory = fstatfs(&file).is_ok_and(|filesystem| filesystem.f_type == TMPFS_MAGIC);
        Self {
            file,
            is_device,
            in_memory: in_memory && !is_device,
            no_punch: AtomicBool::new(false),
            no_cached_reads: AtomicBool::new(false),
            lock,
        }
    }

    /// Lock the image so that nobody writes to it, if it was opened without: what is read of it must
    /// not change. `path` is for messages.
    pub fn freeze(&mut self, path: impl AsRef<Path>) -> Result<(), OpenError> {
        if self.lock.is_none() {
            let lock = ImageLock::acquire(&self.file, path.as_ref(), Access::Freeze)?;
            self.lock = Some(lock);
        }
        Ok(())
    }

    /// The file itself, to tell it from others.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Storage for FileStorage {
    fn length(&self) -> io::Result<u64> {
        if self.is_device {
            return Ok(seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    break;
                }
                Ok(read) => {
                    buf = buf.get_mut(read..).unwrap_or_default();
                    offset += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<Cached> {
        if self.in_memory && !buf.is_empty() {
            self.read_at(buf, offset)?;
            return Ok(Cached::Hit(buf.len()));
        }
        if self.no_cached_reads.load(Ordering::Relaxed) {
            return Ok(Cached::Unsupported);
        }
        let buf = &mut [IoSliceMut::new(buf)];
        match preadv2(&self.file, buf, offset, ReadWriteFlags::NOWAIT) {
            Ok(0) | Err(Errno::AGAIN | Errno::INTR) => Ok(Cached::Miss),
            Ok(read) => Ok(Cached::Hit(read)),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.no_cached_reads.store(true, Ordering::Relaxed);
                Ok(Cached::Unsupported)
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        if self.is_device {
            // A device is as long as it is; a write past its end says so.
            return Ok(());
        }
        self.file.set_len(length)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.no_punch.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, mode, offset, length) {
            Ok(()) | Err(Errno::INVAL | Errno::INTR) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY) => {
                self.no_punch.store(true, Ordering::Relaxed);
                Ok(())
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn start_writeback(&self, offset: u64, length: u64) -> io::Result<()> {
        start_write_back(&self.file, offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_writes_cannot_be_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.qcow2");
        let writer = FileStorage::create(&path, true).expect("created");
        let error = FileStorage::open(&path, true, true).expect_err("it is in use");
        assert!(matches!(error, OpenError::Lock(_)), "{error}");
        drop(writer);
        let readers = [(); 2].map(|()| FileStorage::open(&path, true, true));
        assert!(readers.iter().all(Result::is_ok));
        let error = FileStorage::open(&path, false, true).expect_err("it is read");
        assert!(matches!(error, OpenError::Lock(_)), "{error}");
    }
}
