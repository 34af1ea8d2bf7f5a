//! Descriptors that this process was started with; the only unsafe code of the crate.

use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};

use crate::{ChannelError, Result};

/// Standard input, output and error keep their numbers.
const FREE_MIN: i32 = 3;

/// Take the inherited descriptor `number`, once.
///
/// A descriptor that has come through `exec` is not close-on-exec, while every descriptor that
/// this process opens is. Taking one sets the flag, so that neither our own descriptors nor one
/// that was taken before can be taken by their number.
pub(crate) fn take(number: i32, peer: &str) -> Result<OwnedFd> {
    let failed = |errno| ChannelError::io("take", peer, errno);
    // The standard library keeps these three: a duplicate, which is ours.
    match number {
        0 => return fcntl_dupfd_cloexec(std::io::stdin(), FREE_MIN).map_err(failed),
        1 => return fcntl_dupfd_cloexec(std::io::stdout(), FREE_MIN).map_err(failed),
        2 => return fcntl_dupfd_cloexec(std::io::stderr(), FREE_MIN).map_err(failed),
        3.. => {}
        _ => return Err(failed(rustix::io::Errno::BADF)),
    }
    // SAFETY: the number is not -1, and the borrow only lives for the two flag calls below, which
    // answer EBADF if no such descriptor is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(borrowed).map_err(failed)?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(not_inherited(peer));
    }
    fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC).map_err(failed)?;
    // SAFETY: the descriptor is open, and nothing in this process owns it: what this process opens
    // is close-on-exec from the start, and what was taken here before is so since then.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A duplicate of the inherited descriptor `number`, which stays where it is.
///
/// # Errors
/// There is no such descriptor, or it is one of this process's own.
pub fn duplicate_inherited(number: i32) -> Result<OwnedFd> {
    let peer = format!("fd:{number}");
    let failed = |errno| ChannelError::io("duplicate", peer.as_str(), errno);
    match number {
        0 => return fcntl_dupfd_cloexec(std::io::stdin(), FREE_MIN).map_err(failed),
        1 => return fcntl_dupfd_cloexec(std::io::stdout(), FREE_MIN).map_err(failed),
        2 => return fcntl_dupfd_cloexec(std::io::stderr(), FREE_MIN).map_err(failed),
        3.. => {}
        _ => return Err(failed(rustix::io::Errno::BADF)),
    }
    // SAFETY: the number is not -1, and the borrow only lives for the two calls below, which
    // answer EBADF if no such descriptor is open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    if fcntl_getfd(borrowed)
        .map_err(failed)?
        .contains(FdFlags::CLOEXEC)
    {
        return Err(not_inherited(&peer));
    }
    fcntl_dupfd_cloexec(borrowed, FREE_MIN).map_err(failed)
}

/// Is this an inherited listening socket?
#[must_use]
pub fn is_inherited_listener(number: i32) -> bool {
    duplicate_inherited(number)
        .is_ok_and(|fd| rustix::net::sockopt::socket_acceptconn(fd) == Ok(true))
}

fn not_inherited(peer: &str) -> ChannelError {
    ChannelError::unsuitable(
        peer,
        "the descriptor was not inherited, or is in use already",
    )
}

/// Take standard input and output. `/dev/null` takes their places, so that a stray print does not
/// get into a stream and a half that is closed is closed.
pub(crate) fn take_stdio() -> Result<(OwnedFd, OwnedFd)> {
    let failed = |errno| ChannelError::io("take", "standard input and output", errno);
    let input = fcntl_dupfd_cloexec(std::io::stdin(), FREE_MIN).map_err(failed)?;
    let output = fcntl_dupfd_cloexec(std::io::stdout(), FREE_MIN).map_err(failed)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed)?;
    rustix::stdio::dup2_stdin(null.as_fd()).map_err(failed)?;
    rustix::stdio::dup2_stdout(null.as_fd()).map_err(failed)?;
    Ok((input, output))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    /// As a descriptor that has come through `exec`.
    fn inherited(fd: &impl AsFd) {
        fcntl_setfd(fd, FdFlags::empty()).unwrap();
    }

    #[test]
    fn a_listening_socket_is_told_apart() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(!is_inherited_listener(listener.as_raw_fd()), "it is ours");
        inherited(&listener);
        assert!(is_inherited_listener(listener.as_raw_fd()));
        let connected = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        inherited(&connected);
        assert!(!is_inherited_listener(connected.as_raw_fd()));
        assert!(!is_inherited_listener(9999));
        assert!(!is_inherited_listener(-1));
    }

    #[test]
    fn a_duplicate_leaves_the_descriptor_where_it_is() {
        use std::io::{Read, Write};
        let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        inherited(&theirs);
        let number = theirs.as_raw_fd();
        drop(duplicate_inherited(number).unwrap());
        let twice = duplicate_inherited(number).unwrap();
        drop(theirs);
        std::fs::File::from(twice).write_all(b"x").unwrap();
        let mut byte = [0];
        ours.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }
}
