//! A folder for sockets that nobody else may open.

use std::fs::{self, DirBuilder};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::path::{Path, PathBuf};

use vmferry_channel::Uri;

/// Longest path of a unix socket, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Room for the name of a socket in the folder, with its slash.
const NAME_BYTES_MAX: usize = 32;
/// Where there is a folder for temporary files, whatever the environment says.
const FALLBACK: &str = "/tmp";
/// How often another name is tried.
const ATTEMPTS: usize = 16;

/// A new folder with mode 0700 for sockets; it goes, with what is in it, when it is dropped.
#[derive(Debug)]
pub struct PrivateFolder {
    path: PathBuf,
    sockets: u32,
    /// Whom it was given to.
    user: Option<u32>,
}

impl PrivateFolder {
    /// In the folder for temporary files, or in `/tmp` where that one's path is too long for
    /// sockets.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new() -> io::Result<Self> {
        Self::within(&std::env::temp_dir())
    }

    fn within(folder: &Path) -> io::Result<Self> {
        let mut failed = io::Error::from(io::ErrorKind::AlreadyExists);
        for _ in 0..ATTEMPTS {
            let random = RandomState::new().hash_one(std::process::id());
            let name = format!("vmferry-{random:016x}");
            let mut path = folder.join(&name);
            if path.as_os_str().len() + NAME_BYTES_MAX > SOCKET_PATH_BYTES_MAX {
                path = Path::new(FALLBACK).join(&name);
            }
            // What exists is never taken over: it may be somebody else's.
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {
                    return Ok(Self {
                        path,
                        sockets: 0,
                        user: None,
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => failed = error,
                Err(error) => {
                    let message = format!("cannot make folder {}: {error}", path.display());
                    return Err(io::Error::new(error.kind(), message));
                }
            }
        }
        Err(failed)
    }

    /// Let another user into it, and nobody else; only root can do that, and may still enter itself.
    ///
    /// # Errors
    /// The host refuses.
    pub fn give_to(&mut self, user: u32) -> io::Result<()> {
        chown(&self.path, Some(user), None)?;
        self.user = Some(user);
        Ok(())
    }

    /// Let whoever the folder was given to connect to a socket that was made in it.
    ///
    /// # Errors
    /// The host refuses.
    pub fn open_to_user(&self, socket: &Uri) -> io::Result<()> {
        match (socket, self.user) {
            (Uri::Unix(path), Some(user)) => chown(path, Some(user), None),
            _ => Ok(()),
        }
    }

    /// The path of a socket that was not given out before, as an address.
    pub fn socket(&mut self) -> Uri {
        self.sockets += 1;
        Uri::Unix(self.path.join(format!("migration-{}", self.sockets)))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for PrivateFolder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!("cannot remove folder {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_folder_is_private_and_goes_with_its_sockets() {
        let mut folder = PrivateFolder::new().unwrap();
        let path = folder.path().to_owned();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);
        let (first, second) = (folder.socket(), folder.socket());
        assert_ne!(first, second);
        let Uri::Unix(socket) = first else { panic!() };
        let _listener = UnixListener::bind(&socket).unwrap();
        drop(folder);
        assert!(!path.exists());
    }

    #[test]
    fn a_folder_can_be_given_to_its_own_user() {
        let mut folder = PrivateFolder::new().unwrap();
        let user = fs::metadata(folder.path()).unwrap().uid();
        folder.give_to(user).unwrap();
        let socket = folder.socket();
        let Uri::Unix(path) = &socket else { panic!() };
        let _listener = UnixListener::bind(path).unwrap();
        folder.open_to_user(&socket).unwrap();
        let metadata = fs::metadata(folder.path()).unwrap();
        assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (user, 0o700));
    }

    #[test]
    fn a_path_that_is_too_long_for_sockets_is_not_used() {
        let parent = tempfile::tempdir().unwrap();
        let deep = parent.path().join("d".repeat(100));
        fs::create_dir(&deep).unwrap();
        let mut folder = PrivateFolder::within(&deep).unwrap();
        assert!(folder.path().starts_with(FALLBACK));
        assert!(
            UnixListener::bind(folder.socket().to_string().trim_start_matches("unix:")).is_ok()
        );
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let error = PrivateFolder::within(Path::new("/nowhere")).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("cannot make folder /nowhere/vmferry-"),
            "{text}"
        );
    }
}
