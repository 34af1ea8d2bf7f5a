//! Opening an address as a channel.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::fs::{FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, addr::SocketAddrArg};

use crate::channel::Kind;
use crate::command::Command;
use crate::listener::{family, tcp_uri, tune_tcp};
use crate::reader::Source;
use crate::wait::Patience;
use crate::writer::Sink;
use crate::{
    Channel, ChannelError, Direction, Listener, Reader, Result, Socket, Stop, Uri, Writer,
    inherited,
};

/// Pause before connecting again to a unix socket whose backlog is full, which poll cannot tell.
const BACKLOG_PAUSE: Duration = Duration::from_millis(10);

/// A channel to read a migration from.
///
/// `tcp:` and `unix:` listen, take one connection and stop listening; who needs to know the port
/// beforehand, or more connections, uses a [`Listener`]. `fd:` is a connected socket, a pipe or a
/// file. `exec:` runs the command, both ways. `file:` is read from its offset on. `-` is standard
/// input, with standard output as the way back if it is a pipe or a socket; afterwards `/dev/null`
/// stands in their places.
pub fn open_incoming(uri: &Uri, stop: &Stop) -> Result<Channel> {
    match uri {
        Uri::Tcp { .. } | Uri::Unix(_) => Ok(Listener::bind(uri)?.accept(stop)?.into_channel(stop)),
        Uri::File { path, offset } => open_file_to_read(path, *offset, uri.to_string(), stop),
        Uri::Fd(_) | Uri::Exec(_) | Uri::Stdio => open_either(uri, Direction::Incoming, stop),
    }
}

/// A channel to write a migration to.
///
/// `tcp:` and `unix:` connect within `connect_timeout`. `fd:` and `exec:` as in [`open_incoming`].
/// `file:` is created with mode 0600 if it does not exist; without an offset it is emptied, with
/// one only what lies behind it is overwritten. `-` is standard output, with standard input as the
/// way back if it is a pipe or a socket.
pub fn open_outgoing(uri: &Uri, stop: &Stop, connect_timeout: Duration) -> Result<Channel> {
    match uri {
        Uri::Tcp { .. } | Uri::Unix(_) => {
            Ok(connect(uri, stop, connect_timeout)?.into_channel(stop))
        }
        Uri::File { path, offset } => open_file_to_write(path, *offset, uri.to_string(), stop),
        Uri::Fd(_) | Uri::Exec(_) | Uri::Stdio => open_either(uri, Direction::Outgoing, stop),
    }
}

fn open_either(uri: &Uri, direction: Direction, stop: &Stop) -> Result<Channel> {
    let peer = uri.to_string();
    match uri {
        Uri::Fd(number) => {
            Channel::from_fd(inherited::take(*number, &peer)?, direction, peer, stop)
        }
        Uri::Exec(command) => Command::open(command, peer, stop),
        _ => {
            let (input, output) = inherited::take_stdio()?;
            Channel::over_stdio(input, output, direction, stop)
        }
    }
}

/// Connect to `tcp:` or `unix:` within `timeout`. All addresses of a name are tried in turn.
pub fn connect(uri: &Uri, stop: &Stop, timeout: Duration) -> Result<Socket> {
    let peer = uri.to_string();
    let deadline = Instant::now().checked_add(timeout);
    match uri {
        Uri::Tcp { host, port } => connect_tcp(host, *port, &peer, stop, deadline),
        Uri::Unix(path) => {
            let patience = Patience::new("connect to", &peer, stop, deadline);
            let address = SocketAddrUnix::new(path.as_path()).map_err(|e| patience.failed(e))?;
            let fd = connect_one(AddressFamily::UNIX, &address, &patience)?;
            Ok(Socket::new(fd, peer))
        }
        _ => Err(ChannelError::unsuitable(peer, "nobody can connect there")),
    }
}

fn connect_tcp(
    host: &str,
    port: u16,
    peer: &str,
    stop: &Stop,
    deadline: Option<Instant>,
) -> Result<Socket> {
    let addresses = resolve(host, port, peer, stop, deadline)?;
    let mut last = ChannelError::unsuitable(peer, "the name has no address");
    let mut left = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
    for address in addresses {
        // One address that swallows packets must not use up the time of the others.
        let share = deadline.map(|deadline| {
            let now = Instant::now();
            now + deadline.saturating_duration_since(now) / left.max(1)
        });
        left = left.saturating_sub(1);
        let name = tcp_uri(address).to_string();
        let patience = Patience::new("connect to", &name, stop, share);
        match connect_one(family(address), &address, &patience) {
            Ok(fd) if is_itself(fd.as_fd()) => last = patience.failed(Errno::CONNREFUSED),
            Ok(fd) => {
                tune_tcp(fd.as_fd());
                return Ok(Socket::new(fd, name));
            }
            Err(ChannelError::Stopped) => return Err(ChannelError::Stopped),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Is this socket connected to itself? TCP can do that when nobody listens on a port of this host
/// and the kernel picks the very same port for our side; whoever retries for long will see it.
fn is_itself(fd: BorrowedFd<'_>) -> bool {
    let local = rustix::net::getsockname(fd).map(SocketAddr::try_from);
    let remote = rustix::net::getpeername(fd).map(|peer| peer.map(SocketAddr::try_from));
    matches!((local, remote), (Ok(Ok(local)), Ok(Some(Ok(remote)))) if local == remote)
}

/// Addresses of a host. Names are looked up in a thread of their own, because the look-up of the
/// system cannot be called off; after a stop that thread ends by itself, its answer unread.
fn resolve(
    host: &str,
    port: u16,
    peer: &str,
    stop: &Stop,
    deadline: Option<Instant>,
) -> Result<Vec<SocketAddr>> {
    let host = if host.is_empty() { "localhost" } else { host };
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let failed = |source| ChannelError::io("resolve", peer, source);
    let (sender, receiver) = mpsc::channel();
    let answered = Stop::new().map_err(failed)?;
    let (signal, name) = (answered.clone(), host.to_owned());
    std::thread::Builder::new()
        .name("resolve".to_owned())
        .spawn(move || {
            let addresses = (name.as_str(), port).to_socket_addrs();
            // The receiver is gone after a stop.
            let _ = sender.send(addresses.map(Iterator::collect));
            signal.trigger();
        })
        .map_err(failed)?;
    Patience::new("resolve", peer, stop, deadline).wait(answered.as_fd(), PollFlags::IN)?;
    receiver
        .recv()
        .unwrap_or_else(|_| Err(std::io::Error::other("the look-up failed")))
        .map_err(failed)
}

fn connect_one(
    family: AddressFamily,
    address: &impl SocketAddrArg,
    patience: &Patience<'_>,
) -> Result<OwnedFd> {
    let failed = |errno| patience.failed(errno);
    patience.check()?;
    let fd = rustix::net::socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(failed)?;
    loop {
        match rustix::net::connect(&fd, address) {
            Ok(()) => break,
            Err(Errno::INPROGRESS | Errno::INTR) => {
                patience.wait(fd.as_fd(), PollFlags::OUT)?;
                rustix::net::sockopt::socket_error(&fd)
                    .map_err(failed)?
                    .map_err(failed)?;
                break;
            }
            Err(Errno::AGAIN) => patience.sleep_until(Instant::now() + BACKLOG_PAUSE)?,
            Err(errno) => return Err(failed(errno)),
        }
    }
    // Nobody shares it yet; whoever gets it expects a socket like any other.
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(failed)?;
    rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK).map_err(failed)?;
    Ok(fd)
}

fn open_file_to_read(path: &Path, offset: u64, peer: String, stop: &Stop) -> Result<Channel> {
    let fd = open_file(path, offset, OFlags::RDONLY, &peer)?;
    let kind = Kind::of(fd.as_fd(), &peer)?;
    let source = Source::over(kind, Arc::new(fd));
    Ok(Channel::In(Reader::new(source, peer, stop)))
}

fn open_file_to_write(path: &Path, offset: u64, peer: String, stop: &Stop) -> Result<Channel> {
    let mut flags = OFlags::WRONLY | OFlags::CREATE;
    if offset == 0 {
        flags |= OFlags::TRUNC;
    }
    let fd = open_file(path, offset, flags, &peer)?;
    let sink = match Kind::of(fd.as_fd(), &peer)? {
        Kind::File => Sink::File {
            fd: Arc::new(fd),
            directory: open_folder(path),
        },
        kind => Sink::over(kind, Arc::new(fd)),
    };
    Ok(Channel::Out(Writer::new(sink, peer, stop)))
}

fn open_file(path: &Path, offset: u64, flags: OFlags, peer: &str) -> Result<OwnedFd> {
    let failed = |errno| ChannelError::io("open", peer, errno);
    // Without O_NONBLOCK the open of a FIFO waits for its other end, where no stop event reaches.
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    let fd = match rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR) {
        Err(Errno::NXIO) => return Err(not_for_file(peer)),
        outcome => outcome.map_err(failed)?,
    };
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Fifo {
        return Err(not_for_file(peer));
    }
    let status = rustix::fs::fcntl_getfl(&fd).map_err(failed)?;
    rustix::fs::fcntl_setfl(&fd, status - OFlags::NONBLOCK).map_err(failed)?;
    if offset != 0 {
        rustix::fs::seek(&fd, SeekFrom::Start(offset)).map_err(failed)?;
    }
    Ok(fd)
}

fn not_for_file(peer: &str) -> ChannelError {
    ChannelError::unsuitable(
        peer,
        "it is no file; for a FIFO or a socket use fd: or exec:",
    )
}

/// To make a new file's entry durable. A folder that cannot be read cannot be synced.
fn open_folder(path: &Path) -> Option<OwnedFd> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::empty()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_connected_to_itself_is_told_from_others() {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let lonely = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&lonely, &any).unwrap();
        let own = SocketAddr::try_from(rustix::net::getsockname(&lonely).unwrap()).unwrap();
        assert!(!is_itself(lonely.as_fd()));
        rustix::net::connect(&lonely, &own).unwrap();
        assert!(is_itself(lonely.as_fd()));

        let listener = std::net::TcpListener::bind(any).unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!is_itself(client.as_fd()));
    }

    #[test]
    fn a_look_up_can_be_called_off() {
        let stop = Stop::new().unwrap();
        stop.trigger();
        let error = resolve("localhost", 1, "tcp:localhost:1", &stop, None).unwrap_err();
        assert!(error.is_stopped(), "{error}");
        let stop = Stop::new().unwrap();
        let addresses = resolve("localhost", 7, "tcp:localhost:7", &stop, None).unwrap();
        assert!(
            addresses
                .iter()
                .all(|address| address.ip().is_loopback() && address.port() == 7)
        );
        assert!(!addresses.is_empty());
    }
}
