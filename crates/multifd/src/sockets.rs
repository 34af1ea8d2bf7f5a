//! Sockets, and second handles for them, by which they can be shut down from another thread.

use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vmferry_channel::{Channel, ChannelError, Direction, Reader, Socket, Stop, Writer};

use crate::error::MultifdError;

/// Both ends of a plain stream inside this process, and a second handle for each, reader's first.
pub(crate) struct PlainStream {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
    pub(crate) reading: OwnedFd,
    pub(crate) writing: OwnedFd,
}

impl PlainStream {
    /// The reader calls the other side `source`, the writer `target`.
    pub(crate) fn new(source: &str, target: &str, stop: &Stop) -> Result<Self, MultifdError> {
        let pair = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let (read, written) = pair.map_err(|errno| host("create")(errno.into()))?;
        let (reading, writing) = (duplicate(&read)?, duplicate(&written)?);
        let reader = Channel::from_fd(read, Direction::Incoming, source, stop);
        let writer = Channel::from_fd(written, Direction::Outgoing, target, stop);
        let (reader, _) = both(reader.map_err(MultifdError::connect)?)?;
        let (_, writer) = both(writer.map_err(MultifdError::connect)?)?;
        Ok(Self {
            reader,
            writer,
            reading,
            writing,
        })
    }
}

/// A second handle.
pub(crate) fn duplicate(socket: &impl AsFd) -> Result<OwnedFd, MultifdError> {
    let twin = socket.as_fd().try_clone_to_owned();
    twin.map_err(host("duplicate"))
}

/// Both halves of a connected socket.
pub(crate) fn halves(socket: Socket, stop: &Stop) -> Result<(Reader, Writer), MultifdError> {
    both(socket.into_channel(stop))
}

fn both(channel: Channel) -> Result<(Reader, Writer), MultifdError> {
    match channel {
        Channel::TwoWay(reader, writer) => Ok((reader, writer)),
        // Sockets go both ways.
        Channel::In(_) | Channel::Out(_) => Err(MultifdError::Abandoned),
    }
}

/// This host has no descriptor or thread left.
pub(crate) fn host(operation: &'static str) -> impl Fn(std::io::Error) -> MultifdError {
    move |source| {
        MultifdError::Connect(ChannelError::Io {
            operation,
            peer: "a socket or thread for multifd".to_owned(),
            source,
        })
    }
}
