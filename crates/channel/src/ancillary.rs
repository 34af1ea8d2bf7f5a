//! Descriptors that travel over a unix socket, as QMP's `getfd` wants them.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Most descriptors that one message may carry. QMP needs one for each command.
pub const DESCRIPTORS_MAX: usize = 16;

/// Receive bytes, and the descriptors that came with them, which are appended to `fds`.
/// 0 bytes are the end of the stream (or an empty `buf`).
///
/// Never waits: [`io::ErrorKind::WouldBlock`] when nothing is there. A message with more than
/// [`DESCRIPTORS_MAX`] descriptors is [`io::ErrorKind::InvalidData`], and all of them are closed.
/// Received descriptors are close-on-exec. The socket need not be a unix socket; others carry no
/// descriptors.
pub fn recv_with_fds(
    socket: impl AsFd,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(
            socket.as_fd(),
            &mut [IoSliceMut::new(buf)],
            &mut control,
            RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(Errno::INTR) => {}
            outcome => break outcome?,
        }
    };
    let mut received = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            received.extend(rights);
        }
    }
    // The space is rounded up, so the kernel may have found room for more than we asked for.
    if message.flags.contains(ReturnFlags::CTRUNC) || received.len() > DESCRIPTORS_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message carries more than {DESCRIPTORS_MAX} descriptors"),
        ));
    }
    fds.append(&mut received);
    Ok(message.bytes)
}

/// Send bytes (at least one) together with descriptors; answers how many bytes went out. The
/// descriptors go with the first byte.
///
/// Never waits: [`io::ErrorKind::WouldBlock`] when there is no room. More than [`DESCRIPTORS_MAX`]
/// descriptors, or descriptors without a byte, are [`io::ErrorKind::InvalidInput`].
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if fds.len() > DESCRIPTORS_MAX || bytes.is_empty() && !fds.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message carries 1 to {DESCRIPTORS_MAX} descriptors and at least one byte"),
        ));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match sendmsg(
            socket.as_fd(),
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        ) {
            Err(Errno::INTR) => {}
            outcome => return Ok(outcome?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    #[test]
    fn descriptors_arrive_with_the_bytes_and_are_the_same_files() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        file.rewind().unwrap();
        assert_eq!(send_with_fds(&a, b"hi", &[file.as_fd()]).unwrap(), 2);
        let mut buf = [0; 16];
        let mut fds = Vec::new();
        assert_eq!(recv_with_fds(&b, &mut buf, &mut fds).unwrap(), 2);
        assert_eq!(&buf[..2], b"hi");
        let fd = fds.pop().unwrap();
        assert!(fds.is_empty());
        assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
        let mut content = String::new();
        std::fs::File::from(fd)
            .read_to_string(&mut content)
            .unwrap();
        assert_eq!(content, "content");
    }

    #[test]
    fn without_descriptors_it_is_plain_io_that_never_waits() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut buf = [0; 16];
        let mut fds = Vec::new();
        let error = recv_with_fds(&b, &mut buf, &mut fds).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert_eq!(send_with_fds(&a, b"x", &[]).unwrap(), 1);
        assert_eq!(recv_with_fds(&b, &mut buf, &mut fds).unwrap(), 1);
        while send_with_fds(&a, &[0; 4096], &[]).is_ok() {}
        let error = send_with_fds(&a, b"x", &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(a);
        while recv_with_fds(&b, &mut [0; 4096], &mut fds).unwrap() > 0 {}
        assert!(fds.is_empty());
    }

    #[test]
    fn the_number_of_descriptors_is_limited_on_both_sides() {
        let (a, b) = UnixStream::pair().unwrap();
        let many = [a.as_fd(); DESCRIPTORS_MAX + 1];
        let error = send_with_fds(&a, b"x", &many).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let error = send_with_fds(&a, b"", &many[..1]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);

        let mut buf = [0; 16];
        let mut fds = Vec::new();
        send_with_fds(&a, b"x", &many[1..]).unwrap();
        assert_eq!(recv_with_fds(&b, &mut buf, &mut fds).unwrap(), 1);
        assert_eq!(fds.len(), DESCRIPTORS_MAX);
        fds.clear();

        // A peer that does not obey the limit.
        for count in [DESCRIPTORS_MAX + 1, 100] {
            let rights = vec![a.as_fd(); count];
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(&rights)));
            sendmsg(&a, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
            let error = recv_with_fds(&b, &mut buf, &mut fds).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(fds.is_empty());
        }
    }
}
