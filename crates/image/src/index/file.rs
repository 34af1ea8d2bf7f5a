//! Files that are whole or not there.

use std::ffi::OsString;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// Names that are tried for a file before it gets its own.
const NAMES_MAX: u32 = 16;

/// What a file of ours begins with.
pub(crate) type Magic = [u8; 8];

/// A file that is being written.
#[derive(Debug)]
pub(crate) struct NewFile {
    pub(crate) file: File,
    /// It may take the place of its like only.
    magic: Magic,
    /// Its name for now, if it needs one.
    name: Option<PathBuf>,
}

impl NewFile {
    /// A file in the folder of `path`, which has that name when it is published. Nothing is there, or a
    /// file that begins with `magic`, too.
    pub(crate) fn beside(path: &Path, magic: Magic) -> io::Result<Self> {
        check_free(path, magic)?;
        let folder = folder(path);
        if let Some(file) = nameless(&folder)? {
            let name = None;
            return Ok(Self { file, magic, name });
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let (name, file) = first_free(path, |name| {
            rustix::fs::open(name, flags, Mode::RUSR | Mode::WUSR)
        })?;
        Ok(Self {
            file: file.into(),
            magic,
            name: Some(name),
        })
    }

    /// A file that nobody else sees, wherever there is room.
    pub(crate) fn unnamed() -> io::Result<Self> {
        let folder = std::env::temp_dir();
        let file = match nameless(&folder) {
            Ok(Some(file)) => file,
            _ => unlinked(&folder).or_else(|_| in_memory())?,
        };
        Ok(Self {
            file,
            magic: Magic::default(),
            name: None,
        })
    }

    /// A second file like this one, which nobody else sees.
    pub(crate) fn companion(path: Option<&Path>) -> io::Result<File> {
        if let Some(path) = path {
            if let Some(file) = nameless(&folder(path))? {
                return Ok(file);
            }
            return unlinked(&folder(path));
        }
        Self::unnamed()?.file.try_clone()
    }

    /// Make it durable under `path`, in place of what is there, with these permissions.
    pub(crate) fn publish(mut self, path: &Path, mode: u32) -> io::Result<()> {
        check_free(path, self.magic)?;
        let mode = Mode::from_raw_mode(mode & 0o666) | Mode::RUSR | Mode::WUSR;
        rustix::fs::fchmod(&self.file, mode)?;
        self.file.sync_all()?;
        let name = match self.name.take() {
            Some(name) => name,
            None => {
                let link = PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
                let follow = AtFlags::SYMLINK_FOLLOW;
                let (name, ()) = first_free(path, |name| {
                    rustix::fs::linkat(CWD, &link, CWD, name, follow)
                })?;
                name
            }
        };
        if let Err(error) = std::fs::rename(&name, path) {
            self.name = Some(name);
            return Err(error);
        }
        // The name is durable when the folder is. One that may not be read is left to the host.
        match File::open(folder(path)) {
            Ok(folder) => folder.sync_all(),
            Err(_) => Ok(()),
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // Nobody knows of it; what is left of it does no harm.
            let _ = std::fs::remove_file(name);
        }
    }
}

/// Somebody's file is not replaced, whatever was said; least of all the image itself.
fn check_free(path: &Path, magic: Magic) -> io::Result<()> {
    let there = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        there => there?,
    };
    if there.is_file() {
        let mut start = Vec::new();
        File::open(path)?.take(8).read_to_end(&mut start)?;
        // One that was cut short is ours, too.
        if magic.starts_with(&start) {
            return Ok(());
        }
    }
    let what = "something else is there, which is not replaced";
    Err(io::Error::new(io::ErrorKind::AlreadyExists, what))
}

fn folder(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// A file without a name that may get one; `None` where the file system has no such thing.
fn nameless(folder: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    match rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(Some(file.into())),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A file that loses its name at once.
fn unlinked(folder: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let (name, file) = first_free(&folder.join("vmferry"), |name| {
        rustix::fs::open(name, flags, Mode::RUSR | Mode::WUSR)
    })?;
    std::fs::remove_file(name)?;
    Ok(file.into())
}

fn in_memory() -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("vmferry-index", flags)?;
    Ok(file.into())
}

/// Try names beside `path` until one is free.
fn first_free<T>(
    path: &Path,
    mut make: impl FnMut(&Path) -> rustix::io::Result<T>,
) -> io::Result<(PathBuf, T)> {
    let mut last = Errno::EXIST;
    for _ in 0..NAMES_MAX {
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(format!(".{:016x}", random()));
        let name = folder(path).join(name);
        match make(&name) {
            Ok(made) => return Ok((name, made)),
            Err(Errno::EXIST) => last = Errno::EXIST,
            Err(error) => return Err(error.into()),
        }
    }
    Err(last.into())
}

/// A number that nobody else has.
pub(crate) fn random() -> u64 {
    // Seeded by the host, for every thread anew.
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish()
}
