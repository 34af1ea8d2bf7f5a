//! Listening sockets, and the connected sockets that come out of them.

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::unix_path::{self, SocketFile};
use crate::wait::Patience;
use crate::{Channel, ChannelError, Result, Stop, Uri, inherited};

/// Connections that may wait to be accepted.
pub(crate) const BACKLOG: i32 = 128;

/// Pause before trying again when the process has no descriptor or memory for a connection.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// A peer that has vanished without a word is noticed after about two minutes, and one that is
/// there but does not read is left alone.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 6;

/// A listening stream socket.
#[derive(Debug)]
pub struct Listener {
    /// Before `_file`: the socket is closed before its file goes.
    fd: OwnedFd,
    local: Uri,
    _file: Option<SocketFile>,
}

/// A connected stream socket. In blocking mode: use MSG_DONTWAIT and poll.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    peer: String,
}

impl Listener {
    /// Listen on `tcp:` (a name with several addresses: on the first that works), `unix:` (the file
    /// has mode 0600, replaces a stale socket file, and is removed when the listener is dropped) or
    /// on an inherited listening socket `fd:`.
    pub fn bind(uri: &Uri) -> Result<Self> {
        let peer = uri.to_string();
        match uri {
            Uri::Tcp { host, port } => bind_tcp(host, *port, &peer),
            Uri::Unix(path) => {
                let (fd, file) = unix_path::listen(path, &peer)?;
                Ok(Self {
                    fd,
                    local: uri.clone(),
                    _file: Some(file),
                })
            }
            Uri::Fd(number) => Self::over(inherited::take(*number, &peer)?, uri.clone()),
            Uri::Exec(_) | Uri::File { .. } | Uri::Stdio => {
                Err(ChannelError::unsuitable(peer, "nobody can listen there"))
            }
        }
    }

    /// A listening socket that was handed in, for example by systemd. Its flags and its file are
    /// left alone; if others accept on the same socket, [`Listener::accept`] may wait for the
    /// next connection after somebody else took the one it saw.
    pub fn from_fd(fd: OwnedFd) -> Result<Self> {
        use std::os::fd::AsRawFd;
        let fallback = Uri::Fd(fd.as_raw_fd());
        Self::over(fd, fallback)
    }

    fn over(fd: OwnedFd, fallback: Uri) -> Result<Self> {
        let listens = sockopt::socket_acceptconn(&fd)
            .and_then(|listens| Ok(listens && sockopt::socket_type(&fd)? == SocketType::STREAM));
        if listens != Ok(true) {
            return Err(ChannelError::unsuitable(
                fallback.to_string(),
                "it is no listening stream socket",
            ));
        }
        let local = local_uri(fd.as_fd()).unwrap_or(fallback);
        Ok(Self {
            fd,
            local,
            _file: None,
        })
    }

    /// Another handle for the same socket, which does not own its file.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
            local: self.local.clone(),
            _file: None,
        })
    }

    /// The address to connect to, with the port that the kernel chose. `fd:N` for a handed-in
    /// socket without a name.
    #[must_use]
    pub fn local(&self) -> &Uri {
        &self.local
    }

    /// Wait for a connection.
    pub fn accept(&self, stop: &Stop) -> Result<Socket> {
        self.accept_until(stop, None)
    }

    /// [`Listener::accept`], but [`ChannelError::TimedOut`] if nobody came before `deadline`. Who waits
    /// already is accepted even if the deadline has passed.
    pub fn accept_until(&self, stop: &Stop, deadline: Option<Instant>) -> Result<Socket> {
        let name = self.local.to_string();
        let patience = Patience::new("accept on", &name, stop, deadline);
        loop {
            // Poll first: a handed-in socket may be in blocking mode.
            patience.wait(self.fd.as_fd(), PollFlags::IN)?;
            match rustix::net::acceptfrom_with(&self.fd, SocketFlags::CLOEXEC) {
                Ok((fd, from)) => return Ok(self.accepted(fd, from)),
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    tracing::warn!(listener = %name, "no resources to accept a connection");
                    if stop.wait(EXHAUSTED_PAUSE) {
                        return Err(ChannelError::Stopped);
                    }
                }
                Err(errno) if is_of_connection(errno) => {}
                Err(errno) => return Err(patience.failed(errno)),
            }
        }
    }

    fn accepted(&self, fd: OwnedFd, from: Option<SocketAddrAny>) -> Socket {
        let peer = match from.map(SocketAddr::try_from) {
            Some(Ok(address)) => {
                tune_tcp(fd.as_fd());
                tcp_uri(address).to_string()
            }
            // The other ends of unix sockets have no names.
            _ => self.local.to_string(),
        };
        Socket { fd, peer }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Socket {
    pub(crate) fn new(fd: OwnedFd, peer: String) -> Self {
        Self { fd, peer }
    }

    /// What messages call the other side.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Use it as a channel.
    #[must_use]
    pub fn into_channel(self, stop: &Stop) -> Channel {
        Channel::over_socket(self.fd, self.peer, stop)
    }

    /// The descriptor itself.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Errors that belong to one connection (it went away before it was accepted), not to the listener.
fn is_of_connection(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::INTR
            | Errno::AGAIN
            | Errno::CONNABORTED
            | Errno::PROTO
            | Errno::PERM
            | Errno::NETDOWN
            | Errno::NOPROTOOPT
            | Errno::HOSTDOWN
            | Errno::NONET
            | Errno::HOSTUNREACH
            | Errno::NETUNREACH
            | Errno::TIMEDOUT
    )
}

fn bind_tcp(host: &str, port: u16, peer: &str) -> Result<Listener> {
    // Every address of this host: one IPv6 socket serves IPv4 too, where there is IPv6.
    let hosts: &[&str] = if host.is_empty() {
        &["::", "0.0.0.0"]
    } else {
        &[host]
    };
    let mut last = None;
    for host in hosts {
        let addresses = (*host, port)
            .to_socket_addrs()
            .map_err(|source| ChannelError::io("resolve", peer, source))?;
        for address in addresses {
            match bind_one(address, hosts.len() > 1) {
                Ok(fd) => return Listener::over(fd, tcp_uri(address)),
                Err(errno) => last = Some(errno),
            }
        }
    }
    Err(match last {
        Some(Errno::ADDRINUSE) => ChannelError::InUse {
            address: peer.to_owned(),
        },
        Some(errno) => ChannelError::io("listen on", peer, errno),
        None => ChannelError::unsuitable(peer, "the name has no address"),
    })
}

fn bind_one(address: SocketAddr, both_families: bool) -> rustix::io::Result<OwnedFd> {
    let fd = rustix::net::socket_with(
        family(address),
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    sockopt::set_socket_reuseaddr(&fd, true)?;
    if address.is_ipv6() && both_families {
        sockopt::set_ipv6_v6only(&fd, false)?;
    }
    rustix::net::bind(&fd, &address)?;
    rustix::net::listen(&fd, BACKLOG)?;
    Ok(fd)
}

pub(crate) fn family(address: SocketAddr) -> AddressFamily {
    if address.is_ipv6() {
        AddressFamily::INET6
    } else {
        AddressFamily::INET
    }
}

/// Small messages at once, dead peers noticed. Neither is needed for correctness, so a refusal is
/// only worth a note.
pub(crate) fn tune_tcp(fd: BorrowedFd<'_>) {
    let tuned = sockopt::set_tcp_nodelay(fd, true)
        .and_then(|()| sockopt::set_socket_keepalive(fd, true))
        .and_then(|()| sockopt::set_tcp_keepidle(fd, KEEPALIVE_IDLE))
        .and_then(|()| sockopt::set_tcp_keepintvl(fd, KEEPALIVE_INTERVAL))
        .and_then(|()| sockopt::set_tcp_keepcnt(fd, KEEPALIVE_PROBES));
    if let Err(errno) = tuned {
        tracing::debug!(error = %errno, "cannot tune a TCP socket");
    }
}

fn local_uri(fd: BorrowedFd<'_>) -> Option<Uri> {
    let name = rustix::net::getsockname(fd).ok()?;
    if let Ok(address) = SocketAddr::try_from(name.clone()) {
        return Some(tcp_uri(address));
    }
    let address = SocketAddrUnix::try_from(name).ok()?;
    let path = address.path_bytes()?;
    let path = std::str::from_utf8(path).ok()?;
    (!path.is_empty()).then(|| Uri::Unix(PathBuf::from(path)))
}

/// An address as messages show it: IPv4 that came through an IPv6 socket is IPv4.
pub(crate) fn tcp_uri(address: SocketAddr) -> Uri {
    let mut host = address.ip().to_canonical().to_string();
    if let SocketAddr::V6(v6) = address
        && v6.scope_id() != 0
    {
        host = format!("{host}%{}", v6.scope_id());
    }
    Uri::Tcp {
        host,
        port: address.port(),
    }
}
