//! Raw images: regular files and the host's block devices.

use std::fs::{self, File};
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::device::{
    Allocation, BlockDevice, Cached, DiskError, Extent, ExtentKind, Limits, Unmap,
};
use crate::locks::{Access, ImageLock, LockError};

/// The first bytes of a qcow2 image.
pub const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// The longest raw disk, 256 TiB: bitmaps with one bit for each MiB then have 32 MiB.
pub const RAW_BYTES_MAX: u64 = 1 << 48;

/// Granularity of files whose filesystem names none that makes sense.
const PREFERRED_BYTES: u32 = 4096;
/// `statfs(2)` says this of tmpfs.
const TMPFS_MAGIC: libc::__fsword_t = 0x0102_1994;

/// Written again and again where there is no quicker way to make zeroes.
static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// How to open a raw disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Refuse writes.
    pub read_only: bool,
    /// Take the image lock that QEMU's programs respect. Without it nothing keeps a second
    /// program from writing to the same image.
    pub lock: bool,
}

/// A raw disk could not be opened or created.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at the path.
    #[error("{}: no such file", path.display())]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// A new image was wanted where there is something.
    #[error("{}: exists already", path.display())]
    Exists {
        /// The image.
        path: PathBuf,
    },
    /// The path names a folder.
    #[error("{}: is a directory, not a disk", path.display())]
    Directory {
        /// The image.
        path: PathBuf,
    },
    /// The path names a socket, a pipe or a character device.
    #[error("{}: neither a regular file nor a block device", path.display())]
    NotADisk {
        /// The image.
        path: PathBuf,
    },
    /// We may not.
    #[error("{}: no permission to {intent} it", path.display())]
    Permission {
        /// The image.
        path: PathBuf,
        /// `read`, `read and write` or `create`.
        intent: &'static str,
    },
    /// A disk that is longer than we serve.
    #[error("{}: length {length} is more than {RAW_BYTES_MAX} bytes", path.display())]
    TooLong {
        /// The image.
        path: PathBuf,
        /// Its length.
        length: u64,
    },
    /// Another process uses the image, or it can't be locked.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Anything else that the host said.
    #[error("{}: cannot {operation}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// A raw disk: a regular file or a block device of the host.
///
/// Every byte of the file is a byte of the disk; its length need not be a multiple of anything.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    path: PathBuf,
    limits: Limits,
    /// Length in bytes of the blocks that zero-writes of a block device must keep to; 1 for files.
    zero_align: u64,
    is_device: bool,
    /// On tmpfs, which refuses RWF_NOWAIT: reading it never waits for a medium (but for swap).
    in_memory: bool,
    flushes: Flushes,
    /// The run of data that [`BlockDevice::status`] found last. Calling what was data data can
    /// never lose anything, and asking the filesystem again for every part of one long run is
    /// quadratic in its extents.
    known_data: Mutex<Range<u64>>,
    no_cached_reads: AtomicBool,
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_seek: AtomicBool,
    // After the file, so that it is dropped last: the image is ours until all is closed.
    lock: Mutex<Option<ImageLock>>,
}

impl RawDisk {
    /// Open an existing image.
    pub fn open(path: impl AsRef<Path>, options: OpenOptions) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let intent = match options.read_only {
            true => "read",
            false => "read and write",
        };
        let refused = |operation| move |source| open_error(path, intent, operation, source);
        // Asked before the open, which would wait for the other end of a pipe, and again after it.
        check_kind(path, &fs::metadata(path).map_err(refused("open"))?)?;
        let file = File::options()
            .read(true)
            .write(!options.read_only)
            .custom_flags(libc::O_NOCTTY)
            .open(path)
            .map_err(refused("open"))?;
        check_kind(path, &file.metadata().map_err(refused("stat"))?)?;
        let lock = lock_if(options.lock, &file, path, options.read_only)?;
        Self::new(file, path, options.read_only, lock)
    }

    /// Make an image of `size` bytes, all holes, that only its owner may read and write. It is
    /// durable when this returns; after an error there is no file.
    pub fn create(path: impl AsRef<Path>, size: u64, lock: bool) -> Result<Self, OpenError> {
        let path = path.as_ref();
        if size > RAW_BYTES_MAX {
            return Err(OpenError::TooLong {
                path: path.to_owned(),
                length: size,
            });
        }
        let failed = |operation| move |source| open_error(path, "create", operation, source);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed("create"))?;
        let half_made = HalfMade { path };
        let lock = lock_if(lock, &file, path, false)?;
        file.set_len(size).map_err(failed("set the length"))?;
        file.sync_all().map_err(failed("sync"))?;
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(failed("sync the folder"))?;
        let disk = Self::new(file, path, false, lock)?;
        std::mem::forget(half_made);
        Ok(disk)
    }

    fn new(
        file: File,
        path: &Path,
        read_only: bool,
        lock: Option<ImageLock>,
    ) -> Result<Self, OpenError> {
        let failed = |operation| move |source| open_error(path, "read", operation, source);
        let metadata = file.metadata().map_err(failed("stat"))?;
        let is_device = metadata.file_type().is_block_device();
        let (length, preferred, zero_align) = if is_device {
            let length =
                seek(&file, SeekFrom::End(0)).map_err(|errno| failed("measure")(errno.into()))?;
            let logical = rustix::fs::ioctl_blksszget(&file)
                .map_err(|errno| failed("ask for the sector size")(errno.into()))?;
            let physical = rustix::fs::ioctl_blkpbszget(&file).unwrap_or(logical);
            (length, physical, u64::from(logical.max(1)))
        } else {
            let preferred = u32::try_from(metadata.blksize()).unwrap_or(PREFERRED_BYTES);
            (metadata.len(), preferred, 1)
        };
        if length > RAW_BYTES_MAX {
            return Err(OpenError::TooLong {
                path: path.to_owned(),
                length,
            });
        }
        let preferred_bytes = match preferred.is_power_of_two() {
            true => preferred,
            false => PREFERRED_BYTES,
        };
        let in_memory =
            rustix::fs::fstatfs(&file).is_ok_and(|filesystem| filesystem.f_type == TMPFS_MAGIC);
        Ok(Self {
            file,
            path: path.to_owned(),
            limits: Limits {
                length,
                preferred_bytes,
                cluster_bytes: None,
                read_only,
            },
            zero_align,
            is_device,
            in_memory: in_memory && !is_device,
            flushes: Flushes::default(),
            known_data: Mutex::new(0..0),
            no_cached_reads: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            no_seek: AtomicBool::new(is_device),
            lock: Mutex::new(lock),
        })
    }

    /// Where the image is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Take the image lock if the disk was opened without, or gave it back.
    pub fn lock_image(&self) -> Result<(), LockError> {
        let mut lock = lock(&self.lock);
        if lock.is_none() {
            *lock = lock_if(true, &self.file, &self.path, self.limits.read_only)?;
        }
        Ok(())
    }

    /// Lock the image so that nobody writes to it, if the disk was opened without: what is read of
    /// it must not change.
    pub fn freeze_image(&self) -> Result<(), LockError> {
        let mut lock = lock(&self.lock);
        if lock.is_none() {
            *lock = Some(ImageLock::acquire(&self.file, &self.path, Access::Freeze)?);
        }
        Ok(())
    }

    /// Give the image lock back while the disk stays open: somebody else may use the image now.
    pub fn unlock_image(&self) {
        drop(lock(&self.lock).take());
    }

    /// Is there anything on the disk that writing to it could destroy?
    ///
    /// True if any part of a file is allocated and was written. A block device, and a file whose
    /// filesystem can't say, holds data unless it is empty: finding out would mean to read it all.
    pub fn holds_data(&self) -> Result<bool, DiskError> {
        if self.limits.length == 0 {
            return Ok(false);
        }
        let first = self.status(0, self.limits.length)?;
        Ok(first.kind == ExtentKind::Data || first.length < self.limits.length)
    }

    /// Does the disk look like a qcow2 image? Then it is most likely not meant as a raw one.
    pub fn starts_with_qcow2_magic(&self) -> Result<bool, DiskError> {
        let mut magic = [0; QCOW2_MAGIC.len()];
        if self.limits.length < magic.len() as u64 {
            return Ok(false);
        }
        self.read_at(&mut magic, 0)?;
        Ok(magic == QCOW2_MAGIC)
    }

    fn check(&self, operation: &'static str, offset: u64, length: u64) -> Result<(), DiskError> {
        match offset.checked_add(length) {
            Some(end) if end <= self.limits.length => Ok(()),
            // A write there would make the file longer.
            _ => Err(DiskError {
                operation,
                offset,
                length,
                source: io::Error::new(io::ErrorKind::InvalidInput, "past the end of the disk"),
            }),
        }
    }

    fn check_write(
        &self,
        operation: &'static str,
        offset: u64,
        length: u64,
    ) -> Result<(), DiskError> {
        if self.limits.read_only {
            return Err(DiskError {
                operation,
                offset,
                length,
                source: io::Error::new(io::ErrorKind::PermissionDenied, "the disk is read-only"),
            });
        }
        self.check(operation, offset, length)
    }

    /// Call `fallocate` on a range unless an earlier call said that it is of no use here.
    fn try_fallocate(
        &self,
        useless: &AtomicBool,
        mode: FallocateFlags,
        range: &Range<u64>,
    ) -> io::Result<Done> {
        if useless.load(Ordering::Relaxed) {
            return Ok(Done::Unsupported);
        }
        let length = range.end - range.start;
        let mode = mode | FallocateFlags::KEEP_SIZE;
        loop {
            return match fallocate(&self.file, mode, range.start, length) {
                Ok(()) => Ok(Done::Done),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY) => {
                    useless.store(true, Ordering::Relaxed);
                    Ok(Done::Unsupported)
                }
                // Some filesystems say this for a range that does not suit them.
                Err(Errno::INVAL) => Ok(Done::Unsupported),
                Err(errno) => Err(errno.into()),
            };
        }
    }

    fn punch(&self, range: &Range<u64>) -> io::Result<Done> {
        let done = self.try_fallocate(&self.no_punch, FallocateFlags::PUNCH_HOLE, range)?;
        if done == Done::Done {
            let mut known = lock(&self.known_data);
            if known.start < range.end && range.start < known.end {
                *known = 0..0;
            }
        }
        Ok(done)
    }

    /// Zero a range whose ends suit the medium without writing zeroes ourselves.
    fn zero_quickly(&self, range: &Range<u64>, unmap: Unmap, fast_only: bool) -> io::Result<Done> {
        if unmap == Unmap::May && self.punch(range)? == Done::Done {
            return Ok(Done::Done);
        }
        // On a block device the kernel may write the zeroes one by one in here.
        if fast_only && self.is_device {
            return Ok(Done::Unsupported);
        }
        self.try_fallocate(&self.no_zero_range, FallocateFlags::ZERO_RANGE, range)
    }

    fn zero(&self, range: Range<u64>, unmap: Unmap, fast_only: bool) -> io::Result<()> {
        // A device takes whole sectors only: what sticks out at the ends is written.
        let body_start = range.start.next_multiple_of(self.zero_align).min(range.end);
        let body_end = (range.end - range.end % self.zero_align).max(body_start);
        let body = body_start..body_end;
        if !body.is_empty() && self.zero_quickly(&body, unmap, fast_only)? == Done::Unsupported {
            if fast_only {
                return Err(io::ErrorKind::Unsupported.into());
            }
            self.write_out_zeroes(body)?;
        }
        self.write_out_zeroes(range.start..body_start)?;
        self.write_out_zeroes(body_end..range.end)
    }

    fn write_out_zeroes(&self, mut range: Range<u64>) -> io::Result<()> {
        while !range.is_empty() {
            let left = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
            let part = &ZEROES[..left.min(ZEROES.len())];
            self.file.write_all_at(part, range.start)?;
            range.start += part.len() as u64;
        }
        Ok(())
    }

    fn find_extent(&self, offset: u64, length: u64) -> io::Result<Extent> {
        let data = |length| Extent {
            length,
            kind: ExtentKind::Data,
        };
        let hole = |length| Extent {
            length,
            kind: ExtentKind::Hole,
        };
        if self.no_seek.load(Ordering::Relaxed) {
            return Ok(data(length));
        }
        let known = lock(&self.known_data).clone();
        if known.contains(&offset) {
            return Ok(data(length.min(known.end - offset)));
        }
        // Seeking moves the file's position, which nothing else here uses.
        let data_start = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(hole(length)),
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.no_seek.store(true, Ordering::Relaxed);
                return Ok(data(length));
            }
            Err(errno) => return Err(errno.into()),
        };
        if data_start > offset {
            return Ok(hole(length.min(data_start - offset)));
        }
        match seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(end) if end > offset => {
                *lock(&self.known_data) = offset..end;
                Ok(data(length.min(end - offset)))
            }
            // It became a hole, or the file became shorter, since the first question.
            Ok(_) | Err(Errno::NXIO) => {
                Ok(data(length.min(u64::from(self.limits.preferred_bytes))))
            }
            Err(errno) => Err(errno.into()),
        }
    }
}

impl BlockDevice for RawDisk {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let length = buf.len() as u64;
        self.check("read", offset, length)?;
        self.file
            .read_exact_at(buf, offset)
            .map_err(failed("read", offset, length))
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError> {
        let length = buf.len() as u64;
        self.check("read", offset, length)?;
        if self.in_memory && !buf.is_empty() {
            let filled = buf.len();
            // What is wrong is said by the read that follows.
            let read = self.read_at(buf, offset);
            return Ok(read.map_or(Cached::Miss, |()| Cached::Hit(filled)));
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
            Err(errno) => Err(failed("read", offset, length)(errno.into())),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        let length = buf.len() as u64;
        self.check_write("write", offset, length)?;
        self.file
            .write_all_at(buf, offset)
            .map_err(failed("write", offset, length))
    }

    /// May give space back by punching a hole; keeps it by `FALLOC_FL_ZERO_RANGE`.
    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: Unmap,
        fast_only: bool,
    ) -> Result<(), DiskError> {
        self.check_write("write zeroes", offset, length)?;
        self.zero(offset..offset + length, unmap, fast_only)
            .map_err(failed("write zeroes", offset, length))
    }

    /// Punches a hole, also on a block device: a plain discard there may bring back blocks that
    /// belonged to somebody else. Where holes can't be punched nothing happens.
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check_write("discard", offset, length)?;
        let start = offset.next_multiple_of(self.zero_align);
        let end = offset + length - (offset + length) % self.zero_align;
        if start >= end {
            return Ok(());
        }
        self.punch(&(start..end))
            .map(drop)
            .map_err(failed("discard", offset, length))
    }

    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        self.check("status", offset, length)?;
        self.find_extent(offset, length)
            .map_err(failed("status", offset, length))
    }

    fn allocation(&self, _offset: u64, length: u64) -> Result<Allocation, DiskError> {
        Ok(Allocation {
            length,
            is_own: true,
        })
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        None
    }

    fn start_writeback(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.check("write back", offset, length)?;
        if self.limits.read_only {
            return Ok(());
        }
        start_write_back(&self.file, offset, length).map_err(failed("write back", offset, length))
    }

    /// `fdatasync`. Once one has failed every later flush of this device fails too: the kernel
    /// reports lost write-back only once and then forgets it, so a second success means nothing.
    fn flush(&self) -> Result<(), DiskError> {
        if self.limits.read_only {
            return Ok(());
        }
        self.flushes
            .flush(|| self.file.sync_data())
            .map_err(failed("flush", 0, 0))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    Done,
    Unsupported,
}

/// Runs one flush at a time; those who wait meanwhile share the next one.
///
/// One at a time because an error is reported to one `fdatasync` only: another that runs beside it
/// could succeed and vouch for data that is lost.
#[derive(Debug, Default)]
struct Flushes {
    state: Mutex<FlushState>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct FlushState {
    running: bool,
    started: u64,
    succeeded: u64,
    /// What the first failed flush said: an error number, or its message.
    failed: Option<Failure>,
}

#[derive(Clone, Debug)]
enum Failure {
    Errno(i32),
    Other(io::ErrorKind),
}

impl Flushes {
    fn flush(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut state = lock(&self.state);
        // A flush that runs already may have passed over what the caller wrote.
        let wanted = state.started + 1;
        loop {
            if let Some(failure) = &state.failed {
                return Err(match *failure {
                    Failure::Errno(errno) => io::Error::from_raw_os_error(errno),
                    Failure::Other(kind) => kind.into(),
                });
            }
            if state.succeeded >= wanted {
                return Ok(());
            }
            if !state.running {
                break;
            }
            state = self
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.running = true;
        state.started += 1;
        drop(state);
        let result = sync();
        let mut state = lock(&self.state);
        state.running = false;
        match &result {
            Ok(()) => state.succeeded = state.started,
            Err(error) => {
                state.failed = Some(match error.raw_os_error() {
                    Some(errno) => Failure::Errno(errno),
                    None => Failure::Other(error.kind()),
                });
            }
        }
        self.ended.notify_all();
        result
    }
}

/// Removes a file that was not finished; forgotten when it was.
struct HalfMade<'a> {
    path: &'a Path,
}

impl Drop for HalfMade<'_> {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a half-made image stays behind");
        }
    }
}

fn lock_if(
    wanted: bool,
    file: &File,
    path: &Path,
    read_only: bool,
) -> Result<Option<ImageLock>, LockError> {
    let access = match read_only {
        true => Access::Read,
        false => Access::Write,
    };
    wanted
        .then(|| ImageLock::acquire(file, path, access))
        .transpose()
}

fn check_kind(path: &Path, metadata: &fs::Metadata) -> Result<(), OpenError> {
    let kind = metadata.file_type();
    let path = path.to_owned();
    if kind.is_dir() {
        Err(OpenError::Directory { path })
    } else if kind.is_file() || kind.is_block_device() {
        Ok(())
    } else {
        Err(OpenError::NotADisk { path })
    }
}

fn open_error(
    path: &Path,
    intent: &'static str,
    operation: &'static str,
    source: io::Error,
) -> OpenError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound if intent != "create" => OpenError::Missing { path },
        io::ErrorKind::AlreadyExists => OpenError::Exists { path },
        io::ErrorKind::IsADirectory => OpenError::Directory { path },
        io::ErrorKind::PermissionDenied => OpenError::Permission { path, intent },
        _ => OpenError::Io {
            path,
            operation,
            source,
        },
    }
}

fn failed(operation: &'static str, offset: u64, length: u64) -> impl Fn(io::Error) -> DiskError {
    move |source| DiskError {
        operation,
        offset,
        length,
        source,
    }
}

/// Start writing back a range of a file without waiting; all of it stays in the page cache. A hint:
/// files that can't do it are no error. A `length` of 0 is no range at all.
pub fn start_write_back(file: &File, offset: u64, length: u64) -> io::Result<()> {
    // The kernel takes it for "to the end of the file".
    if length == 0 {
        return Ok(());
    }
    match write_back_range(file, offset, length) {
        Err(error)
            if !matches!(
                error.raw_os_error(),
                Some(libc::ESPIPE | libc::EINVAL | libc::ENOSYS)
            ) =>
        {
            Err(error)
        }
        _ => Ok(()),
    }
}

fn write_back_range(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let unfit = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = i64::try_from(offset).map_err(unfit)?;
    let length = i64::try_from(length).map_err(unfit)?;
    // SAFETY: the call takes integers only; the descriptor is open while `file` is borrowed.
    let result = unsafe {
        libc::sync_file_range(
            file.as_raw_fd(),
            offset,
            length,
            libc::SYNC_FILE_RANGE_WRITE,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A poisoned lock is taken all the same: what it guards is whole between statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
