//! The one way into `ioctl`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Call `ioctl` with an argument of `T`; gives what it returned. A signal does not end it.
///
/// # Safety
/// `request` takes a pointer to a `T` (or none), and whatever `argument` points to is as the request
/// wants it: readable or writable memory of the lengths it says.
pub(crate) unsafe fn ioctl<T>(
    fd: BorrowedFd<'_>,
    request: u32,
    argument: &mut T,
) -> io::Result<usize> {
    loop {
        // SAFETY: promised by the caller; `argument` is valid for reads and writes of a `T`.
        let result = unsafe {
            libc::ioctl(
                fd.as_raw_fd(),
                libc::Ioctl::from(request),
                std::ptr::from_mut(argument),
            )
        };
        if let Ok(result) = usize::try_from(result) {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
