//! Unix sockets in the file system: created closed to others, replaced only when dead, and in their
//! place only once they accept.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, FlockOperation, Mode, OFlags, RenameFlags, Stat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::listener::BACKLOG;
use crate::{ChannelError, Result};

/// Owner may read and write, nobody else anything.
const MODE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Name of a socket file that does not accept yet.
const FRESH_SUFFIX: &str = "~";

/// How long another process may take between looking at a socket file and listening on its own.
const FOLDER_PATIENCE: Duration = Duration::from_secs(2);
const FOLDER_RETRY: Duration = Duration::from_millis(5);

/// The file of a listening socket of ours. Removed when dropped, if it is still that file.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

/// Listen on `path`. A socket file there is replaced if nobody listens on it any more.
pub(crate) fn listen(path: &Path, peer: &str) -> Result<(OwnedFd, SocketFile)> {
    let failed = |errno: Errno| ChannelError::io("listen on", peer, errno);
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(failed)?;
    // Linux gives the file the mode of the socket, less the umask.
    rustix::fs::fchmod(&socket, MODE).map_err(failed)?;

    let _folder = lock_folder(path, peer)?;
    remove_stale(path, &address, peer)?;
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(FRESH_SUFFIX);
    let fresh = PathBuf::from(fresh);
    let stat = match SocketAddrUnix::new(&fresh) {
        Ok(fresh_address) => {
            remove_stale(&fresh, &fresh_address, peer)?;
            let stat = bind_and_listen(&socket, &fresh, &fresh_address).map_err(failed)?;
            rename_new(&fresh, path).map_err(|errno| {
                let _ = rustix::fs::unlink(&fresh);
                match errno {
                    Errno::EXIST => ChannelError::InUse {
                        address: peer.to_owned(),
                    },
                    errno => failed(errno),
                }
            })?;
            stat
        }
        // Too long a path for a second name: who is quick can see it before it accepts.
        Err(_) => bind_and_listen(&socket, path, &address).map_err(failed)?,
    };
    let file = SocketFile {
        path: path.to_owned(),
        device: stat.st_dev,
        inode: stat.st_ino,
    };
    Ok((socket, file))
}

/// Nothing stays behind if it fails.
fn bind_and_listen(
    socket: &OwnedFd,
    path: &Path,
    address: &SocketAddrUnix,
) -> rustix::io::Result<Stat> {
    rustix::net::bind(socket, address)?;
    let listening = rustix::fs::lstat(path).and_then(|stat| {
        if Mode::from_raw_mode(stat.st_mode) & Mode::from_raw_mode(0o7777) != MODE {
            // Nobody can connect before `listen`, so this is not too late.
            rustix::fs::chmod(path, MODE)?;
        }
        rustix::net::listen(socket, BACKLOG)?;
        Ok(stat)
    });
    if listening.is_err() {
        let _ = rustix::fs::unlink(path);
    }
    listening
}

/// Rename; a file that has this name stays, where the file system can tell.
fn rename_new(from: &Path, to: &Path) -> rustix::io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::rename(from, to),
        renamed => renamed,
    }
}

/// One process at a time looks at the socket files of a folder: otherwise a second one could take a
/// socket that is bound but does not listen yet for a stale one. Advisory, gone with the process.
fn lock_folder(path: &Path, peer: &str) -> Result<Option<OwnedFd>> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // A folder that may be written but not listed still works, without the lock.
    let Ok(folder) = rustix::fs::open(folder, flags, Mode::empty()) else {
        return Ok(None);
    };
    let deadline = Instant::now() + FOLDER_PATIENCE;
    loop {
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(folder)),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {
                std::thread::sleep(FOLDER_RETRY);
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(ChannelError::unsuitable(
                    peer,
                    "another process holds a lock on its folder",
                ));
            }
            // File systems without locks.
            Err(_) => return Ok(None),
        }
    }
}

fn remove_stale(path: &Path, address: &SocketAddrUnix, peer: &str) -> Result<()> {
    let failed = |errno: Errno| ChannelError::io("listen on", peer, errno);
    let stat = match rustix::fs::lstat(path) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(failed(errno)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(ChannelError::unsuitable(
            peer,
            "a file that is no socket has this name",
        ));
    }
    let probe = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(failed)?;
    match rustix::net::connect(probe.as_fd(), address) {
        Err(Errno::CONNREFUSED) => match rustix::fs::unlink(path) {
            Ok(()) | Err(Errno::NOENT) => {
                tracing::debug!(%peer, "replaced a stale socket file");
                Ok(())
            }
            Err(errno) => Err(failed(errno)),
        },
        Err(Errno::NOENT) => Ok(()),
        // Connected, backlog full, another kind of socket, no permission: somebody's.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(ChannelError::InUse {
            address: peer.to_owned(),
        }),
        Err(errno) => Err(failed(errno)),
    }
}

impl SocketFile {
    fn is(&self, stat: &Stat) -> bool {
        stat.st_dev == self.device && stat.st_ino == self.inode
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Without the lock a successor could come between the look and the removal.
        let _folder = lock_folder(&self.path, "");
        let ours = rustix::fs::lstat(&self.path).is_ok_and(|stat| self.is(&stat));
        if ours && let Err(errno) = rustix::fs::unlink(&self.path) {
            let error = io::Error::from(errno);
            tracing::debug!(path = %self.path.display(), %error, "cannot remove the socket file");
        }
    }
}
