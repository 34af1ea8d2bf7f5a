//! Descriptors that this process was started with; the only unsafe code of the crate.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};

use crate::{ChannelError, Result};

/// Take the inherited descriptor `number`, once.
///
/// A descriptor that has come through `exec` is not close-on-exec, while every descriptor that
/// this process opens is. Taking one sets the flag, so that neither our own descriptors nor one
/// that was taken before can be taken by their number.
pub(crate) fn take(number: i32, peer: &str) -> Result<OwnedFd> {
    let failed = |errno| ChannelError::io("take", peer, errno);
    // The standard library keeps these three: a duplicate, which is ours.
    match number {
        0 => return fcntl_dupfd_cloexec(std::io::stdin(), 3).map_err(failed),
        1 => return fcntl_dupfd_cloexec(std::io::stdout(), 3).map_err(failed),
        2 => return fcntl_dupfd_cloexec(std::io::stderr(), 3).map_err(failed),
        3.. => {}
        _ => return Err(failed(rustix::io::Errno::BADF)),
    }
    // SAFETY: the number is not -1, and the borrow only lives for the two flag calls below, which
    // answer EBADF if no such descriptor is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(borrowed).map_err(failed)?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(ChannelError::unsuitable(
            peer,
            "the descriptor was not inherited, or is in use already",
        ));
    }
    fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC).map_err(failed)?;
    // SAFETY: the descriptor is open, and nothing in this process owns it: what this process opens
    // is close-on-exec from the start, and what was taken here before is so since then.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Take standard input and output. `/dev/null` takes their places, so that a stray print does not
/// get into a stream and a half that is closed is closed.
pub(crate) fn take_stdio() -> Result<(OwnedFd, OwnedFd)> {
    let failed = |errno| ChannelError::io("take", "standard input and output", errno);
    let input = fcntl_dupfd_cloexec(std::io::stdin(), 3).map_err(failed)?;
    let output = fcntl_dupfd_cloexec(std::io::stdout(), 3).map_err(failed)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed)?;
    rustix::stdio::dup2_stdin(null.as_fd()).map_err(failed)?;
    rustix::stdio::dup2_stdout(null.as_fd()).map_err(failed)?;
    Ok((input, output))
}
