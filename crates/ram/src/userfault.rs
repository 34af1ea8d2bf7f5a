//! Page faults of guest memory, handled here instead of in the kernel: what postcopy, the dirty log
//! of any memory and the background snapshot stand on. See `userfaultfd(2)` and `ioctl_userfaultfd(2)`.
//!
//! | opened with | a fault comes | who ends it |
//! |---|---|---|
//! | [`Userfault::open_missing`] | when a page is touched that is not there | [`Userfault::place`] |
//! | [`Userfault::open_write_protect`] | when a protected page is written | [`Userfault::unprotect`] |
//! | [`Userfault::open_write_protect_async`] | never: the kernel notes the write | the kernel |
//!
//! Only this process's own accesses count, those of its vCPUs (KVM) and of system calls that it makes
//! included. What another process does with memory that is shared with it is not seen.

use std::io;
use std::mem::offset_of;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl as requests;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vmferry_stream::Name;

use crate::block::{BlockIndex, PAGE_BYTES, RamBlock, Sharing};
use crate::guest::GuestRam;
use crate::sys::ioctl;

/// Of `linux/userfaultfd.h`, which the bindings leave out: they are macros with casts.
const WRITE_PROTECT: u64 = 1 << 0;
/// `_IO(0xAA, 0)`: a new userfaultfd, from its device.
const NEW_FROM_DEVICE: u32 = sys::USERFAULTFD_IOC << 8;

const DEVICE: &str = "/dev/userfaultfd";
/// Bytes of one message of the kernel.
const MESSAGE_BYTES: usize = size_of::<sys::uffd_msg>();
/// Messages that are read at once.
const MESSAGES: usize = 64;

/// Something about userfaultfd, or host pages, failed.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// This user may not.
    #[error(
        "no permission for userfaultfd: run as root (CAP_SYS_PTRACE), or allow everybody with \
         'sysctl vm.unprivileged_userfaultfd=1', or give this user access to {DEVICE} (Linux 6.1)"
    )]
    NotPermitted,
    /// This kernel cannot.
    #[error("the kernel lacks {what}")]
    Lacking {
        /// What, and since when kernels have it.
        what: &'static str,
    },
    /// Not whole host pages, or not in the block.
    #[error(
        "RAM block '{idstr}' has {used_bytes:#x} bytes in host pages of {page_bytes:#x}; {bytes:#x} \
         bytes at {offset:#x} are no whole pages of it"
    )]
    NoPages {
        /// The block's name.
        idstr: Name,
        /// Where they begin.
        offset: u64,
        /// How many bytes.
        bytes: u64,
        /// Size of the block's host pages.
        page_bytes: u64,
        /// Bytes of the block in use.
        used_bytes: u64,
    },
    /// The kernel refused.
    #[error("userfaultfd: {what}: {source}")]
    Failed {
        /// What was done, with the block's name.
        what: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// What became of a page that was to be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// It is there now, and whoever waited for it goes on.
    Now,
    /// There was one, which stays as it is.
    AlreadyThere,
}

/// Someone waits at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where, in this process; rounded down to a page.
    pub address: u64,
    /// It is a write to a protected page, not an access to a missing one.
    pub is_protected: bool,
}

impl Fault {
    /// The block, and the offset of the host page in it. `None` if it is not guest memory.
    #[must_use]
    pub fn locate(&self, ram: &dyn GuestRam) -> Option<(BlockIndex, u64)> {
        let blocks = ram.blocks().iter().enumerate();
        blocks.into_iter().find_map(|(index, block)| {
            let offset = self
                .address
                .checked_sub(block.start().addr().get() as u64)?;
            let page = offset - offset % block.page_bytes();
            (offset < block.max_bytes()).then_some((BlockIndex(index), page))
        })
    }
}

/// Which faults are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Missing,
    WriteProtect,
    WriteProtectAsync,
}

impl Kind {
    /// What the kernel must be able to do, each with its name.
    fn features(self) -> &'static [(u32, &'static str)] {
        const UNPOPULATED: (u32, &str) = (
            sys::UFFD_FEATURE_WP_UNPOPULATED,
            "userfaultfd write protection of pages that are not there (Linux 6.4)",
        );
        match self {
            Self::Missing => &[],
            Self::WriteProtect => &[
                (
                    sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP,
                    "userfaultfd write protection (Linux 5.7)",
                ),
                UNPOPULATED,
            ],
            Self::WriteProtectAsync => &[
                (
                    sys::UFFD_FEATURE_WP_ASYNC,
                    "asynchronous userfaultfd write protection (Linux 6.7)",
                ),
                UNPOPULATED,
            ],
        }
    }

    fn register_mode(self) -> u64 {
        match self {
            Self::Missing => sys::UFFDIO_REGISTER_MODE_MISSING.into(),
            Self::WriteProtect | Self::WriteProtectAsync => sys::UFFDIO_REGISTER_MODE_WP.into(),
        }
    }

    /// What must be possible with memory that is registered.
    fn ioctls(self) -> u64 {
        match self {
            Self::Missing => 1 << sys::_UFFDIO_COPY | 1 << sys::_UFFDIO_WAKE,
            Self::WriteProtect => 1 << sys::_UFFDIO_WRITEPROTECT | 1 << sys::_UFFDIO_WAKE,
            Self::WriteProtectAsync => 1 << sys::_UFFDIO_WRITEPROTECT,
        }
    }
}

/// A userfaultfd. Dropping it ends all registrations and lets everybody go on that waits.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    kind: Kind,
}

impl Userfault {
    /// For postcopy: pages that are touched and not there.
    ///
    /// # Errors
    /// No permission: faults inside system calls and of vCPUs must come too, which not every user may.
    pub fn open_missing() -> Result<Self, UserfaultError> {
        Self::open(Kind::Missing, open_privileged)
    }

    /// For a background snapshot: writes to pages that were protected wait.
    ///
    /// # Errors
    /// As [`Userfault::open_missing`], or a kernel before Linux 6.4.
    pub fn open_write_protect() -> Result<Self, UserfaultError> {
        Self::open(Kind::WriteProtect, open_privileged)
    }

    /// For a dirty log: writes to pages that were protected lift the protection, and nobody waits.
    /// Every user may have that.
    ///
    /// # Errors
    /// A kernel before Linux 6.7; a sandbox that forbids the system call.
    pub fn open_write_protect_async() -> Result<Self, UserfaultError> {
        Self::open(Kind::WriteProtectAsync, || {
            open_syscall(sys::UFFD_USER_MODE_ONLY).map_err(not_permitted)
        })
    }

    fn open(
        kind: Kind,
        open: impl Fn() -> Result<OwnedFd, UserfaultError>,
    ) -> Result<Self, UserfaultError> {
        let wanted = kind.features();
        let features = wanted.iter().fold(0, |all, (bit, _)| all | u64::from(*bit));
        let fd = open()?;
        match handshake(fd.as_fd(), features) {
            Ok(_) => Ok(Self { fd, kind }),
            // One of them is not there; a handshake that asks for nothing says which there are.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let available = handshake(open()?.as_fd(), 0).map_err(failed("handshake"))?;
                let lacking = wanted
                    .iter()
                    .find(|(bit, _)| available & u64::from(*bit) == 0);
                Err(match lacking {
                    Some((_, what)) => UserfaultError::Lacking { what },
                    None => failed("handshake")(error),
                })
            }
            Err(error) => Err(failed("handshake")(error)),
        }
    }

    /// Faults of this block come from now on: of its bytes in use, rounded up to host pages; of all
    /// that it can have for write protection.
    ///
    /// # Errors
    /// The block is registered already, here or with another one; its memory is of a kind that cannot
    /// be (only anonymous memory, tmpfs and hugetlbfs can).
    pub fn register(&self, block: &RamBlock) -> Result<(), UserfaultError> {
        let bytes = match self.kind {
            Kind::Missing => whole_pages(block),
            Kind::WriteProtect | Kind::WriteProtectAsync => block.max_bytes(),
        };
        let mut argument = sys::uffdio_register {
            range: range(block, 0, bytes),
            mode: self.kind.register_mode(),
            ioctls: 0,
        };
        let what = || format!("register RAM block '{}'", block.idstr());
        // SAFETY: takes a `uffdio_register`. What faults in the block will wait until somebody here
        // ends that; no memory changes.
        unsafe { ioctl(self.fd.as_fd(), requests::UFFDIO_REGISTER, &mut argument) }
            .map_err(|error| failed(what())(explain_register(error)))?;
        if self.kind.ioctls() & !argument.ioctls != 0 {
            self.unregister(block)?;
            return Err(failed(what())(io::Error::new(
                io::ErrorKind::Unsupported,
                "not possible with memory of this kind",
            )));
        }
        Ok(())
    }

    /// No faults of this block any more; whoever waits goes on.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn unregister(&self, block: &RamBlock) -> Result<(), UserfaultError> {
        let mut argument = range(block, 0, block.max_bytes());
        // SAFETY: takes a `uffdio_range`; no memory changes.
        unsafe { ioctl(self.fd.as_fd(), requests::UFFDIO_UNREGISTER, &mut argument) }
            .map(drop)
            .map_err(failed(format!("unregister RAM block '{}'", block.idstr())))
    }

    /// Place a whole host page at once and let go on whoever waits for it.
    ///
    /// # Errors
    /// `bytes` is no host page of the block, or the host has no memory.
    pub fn place(
        &self,
        block: &RamBlock,
        offset: u64,
        bytes: &[u8],
    ) -> Result<Placed, UserfaultError> {
        let pages = host_pages(block, offset, bytes.len() as u64)?;
        if pages.length as u64 != block.page_bytes() {
            return Err(no_pages(block, offset, bytes.len() as u64));
        }
        let placed = self.until_placed(block, offset, |done| {
            let mut argument = sys::uffdio_copy {
                dst: pages.address() + done,
                src: bytes.as_ptr().addr() as u64 + done,
                len: pages.length as u64 - done,
                mode: 0,
                copy: 0,
            };
            // SAFETY: takes a `uffdio_copy`. Reads `bytes`, and fills host pages of the block that
            // are not there, to which nobody has a reference.
            unsafe { ioctl(self.fd.as_fd(), requests::UFFDIO_COPY, &mut argument) }
                .map(drop)
                .map_err(|error| (error, argument.copy))
        });
        placed.map_err(|error| {
            let idstr = block.idstr();
            failed(format!(
                "place a page of RAM block '{idstr}' at {offset:#x}"
            ))(error)
        })
    }

    /// Place a host page of zeroes, as [`Userfault::place`].
    ///
    /// # Errors
    /// `offset` is no host page of the block, or the host has no memory.
    pub fn place_zero(&self, block: &RamBlock, offset: u64) -> Result<Placed, UserfaultError> {
        let pages = host_pages(block, offset, block.page_bytes())?;
        if block.page_bytes() != PAGE_BYTES {
            // Huge pages of hugetlbfs cannot be shared zeroes.
            return self.place(block, offset, &vec![0; pages.length]);
        }
        let placed = self.until_placed(block, offset, |done| {
            let mut argument = sys::uffdio_zeropage {
                range: sys::uffdio_range {
                    start: pages.address() + done,
                    len: pages.length as u64 - done,
                },
                mode: 0,
                zeropage: 0,
            };
            // SAFETY: takes a `uffdio_zeropage`. Fills host pages of the block that are not there, to
            // which nobody has a reference.
            unsafe { ioctl(self.fd.as_fd(), requests::UFFDIO_ZEROPAGE, &mut argument) }
                .map(drop)
                .map_err(|error| (error, argument.zeropage))
        });
        placed.map_err(|error| {
            let idstr = block.idstr();
            failed(format!(
                "place a zero page of RAM block '{idstr}' at {offset:#x}"
            ))(error)
        })
    }

    /// Call `place` with how many bytes are in place, until all are. It gives an error with the bytes
    /// it had placed before.
    fn until_placed(
        &self,
        block: &RamBlock,
        offset: u64,
        mut place: impl FnMut(u64) -> Result<(), (io::Error, i64)>,
    ) -> io::Result<Placed> {
        let mut done = 0;
        loop {
            let (error, placed) = match place(done) {
                Ok(()) => return Ok(Placed::Now),
                Err(failed) => failed,
            };
            match error.raw_os_error() {
                // The process's memory map changes at the moment.
                Some(libc::EAGAIN) => done += u64::try_from(placed).unwrap_or_default(),
                Some(libc::EEXIST) => {
                    // Whoever placed it has woken everybody, unless it came there by other ways.
                    self.wake_pages(block, offset, block.page_bytes())?;
                    return Ok(Placed::AlreadyThere);
                }
                _ => return Err(error),
            }
        }
    }

    /// Let everybody go on that waits in these host pages. Who finds the page still missing, or
    /// protected, faults again.
    ///
    /// # Errors
    /// No host pages of the block.
    pub fn wake(&self, block: &RamBlock, offset: u64, bytes: u64) -> Result<(), UserfaultError> {
        host_pages(block, offset, bytes)?;
        self.wake_pages(block, offset, bytes)
            .map_err(failed(format!("wake RAM block '{}'", block.idstr())))
    }

    fn wake_pages(&self, block: &RamBlock, offset: u64, bytes: u64) -> io::Result<()> {
        let mut argument = range(block, offset, bytes);
        // SAFETY: takes a `uffdio_range`; no memory changes.
        unsafe { ioctl(self.fd.as_fd(), requests::UFFDIO_WAKE, &mut argument) }.map(drop)
    }

    /// Writes to these host pages fault from now on; those that are not there too. When this returns,
    /// no write that went by is still on its way.
    ///
    /// # Errors
    /// No host pages of the block, or it is not registered for write protection.
    pub fn protect(&self, block: &RamBlock, offset: u64, bytes: u64) -> Result<(), UserfaultError> {
        self.write_protect(block, offset, bytes, WRITE_PROTECT)
    }

    /// Writes to these host pages are free again, and whoever waited for that goes on.
    ///
    /// # Errors
    /// As [`Userfault::protect`].
    pub fn unprotect(
        &self,
        block: &RamBlock,
        offset: u64,
        bytes: u64,
    ) -> Result<(), UserfaultError> {
        self.write_protect(block, offset, bytes, 0)
    }

    fn write_protect(
        &self,
        block: &RamBlock,
        offset: u64,
        bytes: u64,
        mode: u64,
    ) -> Result<(), UserfaultError> {
        let pages = host_pages_of_max(block, offset, bytes)?;
        if pages.length == 0 {
            return Ok(());
        }
        let mut argument = sys::uffdio_writeprotect {
            range: range(block, offset, bytes),
            mode,
        };
        loop {
            // SAFETY: takes a `uffdio_writeprotect`; no memory changes.
            let result = unsafe {
                ioctl(
                    self.fd.as_fd(),
                    requests::UFFDIO_WRITEPROTECT,
                    &mut argument,
                )
            };
            match result {
                // The process's memory map changes at the moment.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
                result => {
                    return result.map(drop).map_err(failed(format!(
                        "write-protect RAM block '{}', {bytes:#x} bytes at {offset:#x}",
                        block.idstr()
                    )));
                }
            }
        }
    }

    /// Wait for faults and put them into `faults`, emptied before; at most 64. False, and none, once
    /// `stop` is readable, as an eventfd or a `vmferry_channel::Stop` is.
    ///
    /// The same page may come more than once, if more than one waits for it.
    ///
    /// # Errors
    /// The host failed.
    pub fn wait(
        &self,
        stop: BorrowedFd<'_>,
        faults: &mut Vec<Fault>,
    ) -> Result<bool, UserfaultError> {
        faults.clear();
        while faults.is_empty() {
            let mut polled = [
                PollFd::from_borrowed_fd(stop, PollFlags::IN),
                PollFd::new(&self.fd, PollFlags::IN),
            ];
            match poll(&mut polled, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(failed("wait for faults")(errno.into())),
            }
            if !polled[0].revents().is_empty() {
                return Ok(false);
            }
            self.read(faults).map_err(failed("read faults"))?;
        }
        Ok(true)
    }

    /// Put all faults into `faults` that are there now.
    fn read(&self, faults: &mut Vec<Fault>) -> io::Result<()> {
        let mut messages = [0; MESSAGE_BYTES * MESSAGES];
        let length = match rustix::io::read(&self.fd, &mut messages) {
            Ok(length) => length,
            // Whoever faulted is gone.
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let (messages, _) = messages[..length].as_chunks::<MESSAGE_BYTES>();
        faults.extend(messages.iter().filter_map(parse));
        Ok(())
    }
}

/// For poll: readable when there are faults.
impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One `uffd_msg`.
fn parse(message: &[u8; MESSAGE_BYTES]) -> Option<Fault> {
    const FAULT: usize = offset_of!(sys::uffd_msg, arg);
    type PageFault = sys::uffd_msg__bindgen_ty_1__bindgen_ty_1;
    let word = |at: usize| {
        let bytes = message.get(at..)?.first_chunk()?;
        Some(u64::from_ne_bytes(*bytes))
    };
    if u32::from(message[offset_of!(sys::uffd_msg, event)]) != sys::UFFD_EVENT_PAGEFAULT {
        return None; // Only asked-for events come; none was asked for.
    }
    let flags = word(FAULT + offset_of!(PageFault, flags))?;
    Some(Fault {
        address: word(FAULT + offset_of!(PageFault, address))?,
        is_protected: flags & u64::from(sys::UFFD_PAGEFAULT_FLAG_WP) != 0,
    })
}

/// Faults in the kernel count too: of system calls, and of KVM. That takes privileges, or the device.
fn open_privileged() -> Result<OwnedFd, UserfaultError> {
    open_syscall(0).or_else(|error| open_device().map_err(|_| not_permitted(error)))
}

fn open_syscall(flags: u32) -> io::Result<OwnedFd> {
    let flags = flags | sys::O_CLOEXEC | sys::O_NONBLOCK;
    // SAFETY: takes flags, gives a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    own(fd)
}

fn open_device() -> io::Result<OwnedFd> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let flags = sys::O_CLOEXEC | sys::O_NONBLOCK;
    // SAFETY: takes the flags by value, gives a new descriptor.
    let fd = unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            libc::Ioctl::from(NEW_FROM_DEVICE),
            flags,
        )
    };
    own(fd.into())
}

fn own(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the kernel made it for us just now.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn not_permitted(error: io::Error) -> UserfaultError {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => UserfaultError::NotPermitted,
        Some(libc::ENOSYS) => UserfaultError::Lacking {
            what: "userfaultfd, or a sandbox forbids it",
        },
        _ => failed("open")(error),
    }
}

/// Gives the features that the kernel has.
fn handshake(fd: BorrowedFd<'_>, features: u64) -> io::Result<u64> {
    let mut argument = sys::uffdio_api {
        api: sys::UFFD_API.into(),
        features,
        ioctls: 0,
    };
    // SAFETY: takes a `uffdio_api`.
    unsafe { ioctl(fd, requests::UFFDIO_API, &mut argument) }?;
    Ok(argument.features)
}

fn explain_register(error: io::Error) -> io::Error {
    let reason = match error.raw_os_error() {
        Some(libc::EBUSY) => "its memory is registered with another userfaultfd",
        Some(libc::EINVAL) => {
            "its memory is of a kind that cannot be (anonymous, tmpfs and hugetlbfs can)"
        }
        Some(libc::EPERM) => "its memory belongs to a file that cannot be written",
        _ => return error,
    };
    io::Error::new(error.kind(), reason)
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> UserfaultError {
    let what = what.into();
    |source| UserfaultError::Failed { what, source }
}

/// Can a postcopy be received into this memory? Nothing waits for a fault afterwards.
///
/// # Errors
/// It cannot; says what to do.
pub fn check_postcopy(ram: &dyn GuestRam) -> Result<(), UserfaultError> {
    let userfault = Userfault::open_missing()?;
    for block in ram.blocks() {
        userfault.register(block)?;
        userfault.unregister(block)?;
    }
    Ok(())
}

/// Whole host pages of a block.
struct HostPages {
    start: NonNull<u8>,
    length: usize,
}

impl HostPages {
    fn address(&self) -> u64 {
        self.start.addr().get() as u64
    }
}

/// Bytes in use, rounded up to host pages.
fn whole_pages(block: &RamBlock) -> u64 {
    block.used_bytes().next_multiple_of(block.page_bytes())
}

fn host_pages(block: &RamBlock, offset: u64, bytes: u64) -> Result<HostPages, UserfaultError> {
    pages_below(
        block,
        whole_pages(block),
        offset..offset.saturating_add(bytes),
    )
}

fn host_pages_of_max(
    block: &RamBlock,
    offset: u64,
    bytes: u64,
) -> Result<HostPages, UserfaultError> {
    pages_below(
        block,
        block.max_bytes(),
        offset..offset.saturating_add(bytes),
    )
}

fn pages_below(
    block: &RamBlock,
    limit: u64,
    range: Range<u64>,
) -> Result<HostPages, UserfaultError> {
    let page_bytes = block.page_bytes();
    let bytes = range.end - range.start;
    let is_whole = range.start.is_multiple_of(page_bytes) && range.end.is_multiple_of(page_bytes);
    match (usize::try_from(range.start), usize::try_from(bytes)) {
        (Ok(offset), Ok(length)) if is_whole && range.end <= limit => Ok(HostPages {
            // SAFETY: at most `max_bytes` are mapped from the start on, and `limit` is not more.
            start: unsafe { block.start().add(offset) },
            length,
        }),
        _ => Err(no_pages(block, range.start, bytes)),
    }
}

fn no_pages(block: &RamBlock, offset: u64, bytes: u64) -> UserfaultError {
    UserfaultError::NoPages {
        idstr: block.idstr().clone(),
        offset,
        bytes,
        page_bytes: block.page_bytes(),
        used_bytes: block.used_bytes(),
    }
}

fn range(block: &RamBlock, offset: u64, bytes: u64) -> sys::uffdio_range {
    sys::uffdio_range {
        start: block.start().addr().get() as u64 + offset,
        len: bytes,
    }
}

/// What is done to the host's pages under a block.
impl RamBlock {
    /// Drop whole host pages: they take no memory, and read as zeroes until they are written, or are
    /// missing in a postcopy. A shared block's are dropped in its file, for everybody; a private
    /// block must be anonymous, for what lies in a file below it would come up.
    ///
    /// # Errors
    /// No whole host pages in use; memory that is locked.
    pub fn forget(&self, offset: u64, bytes: u64) -> Result<(), UserfaultError> {
        let pages = host_pages(self, offset, bytes)?;
        let advice = match self.sharing() {
            Sharing::Private => Advice::LinuxDontNeed,
            Sharing::Shared => Advice::LinuxRemove,
        };
        // SAFETY: the pages are mapped as long as the block lives, and nobody has a reference to
        // them that a change of their bytes would make wrong.
        unsafe { madvise(pages.start.as_ptr().cast(), pages.length, advice) }.map_err(|errno| {
            failed(format!(
                "drop {bytes:#x} bytes of RAM block '{}' at {offset:#x}",
                self.idstr()
            ))(errno.into())
        })
    }

    /// Let the kernel put no huge pages under the block by itself: a postcopy would get memory for
    /// pages that did not come. Does nothing where it would not.
    pub fn forbid_huge_pages(&self) {
        self.advise(Advice::LinuxNoHugepage);
    }

    /// Let the kernel put huge pages under the block again.
    pub fn allow_huge_pages(&self) {
        self.advise(Advice::LinuxHugepage);
    }

    fn advise(&self, advice: Advice) {
        let Ok(bytes) = usize::try_from(self.max_bytes()) else {
            return;
        };
        // A kernel without them, and hugetlbfs, say EINVAL.
        // SAFETY: it is all of the block, and changes no bytes.
        let _ = unsafe { madvise(self.start().as_ptr().cast(), bytes, advice) };
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::AnonymousRam;

    #[test]
    fn the_device_gives_one_that_works() {
        if let Err(error) = File::options().read(true).write(true).open(DEVICE) {
            println!("left out: {DEVICE}: {error}");
            return;
        }
        let open = || open_device().map_err(failed("open"));
        let userfault = Userfault::open(Kind::Missing, open).unwrap();
        let ram = AnonymousRam::new(&[("pc.ram", PAGE_BYTES)]).unwrap();
        userfault.register(&ram.blocks()[0]).unwrap();
        let page = [7; 4096];
        let placed = userfault.place(&ram.blocks()[0], 0, &page).unwrap();
        assert_eq!(placed, Placed::Now);
        assert!(ram.blocks()[0].is_filled(0, 4096, 7).unwrap());
    }
}
