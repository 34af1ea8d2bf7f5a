//! A file that appears when it is whole.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufReader, IsTerminal, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};

use crate::exit::{Exit, Failure};
use crate::flags::output_file::OutputFlags;
use crate::output;

/// Guest memory holds secrets.
const MODE: u32 = 0o600;

/// Where the bytes go.
pub(crate) struct Output {
    file: File,
    place: Place,
    /// The file under another name, where it cannot be without one.
    temporary: Option<Temporary>,
}

enum Place {
    Stdout,
    Path { path: PathBuf, force: bool },
}

/// Removed unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may have been renamed: nothing to do about an error.
        let _ = fs::remove_file(&self.0);
    }
}

impl Output {
    /// Get ready to write; nothing is to be seen of it yet.
    pub(crate) fn create(to: &OutputFlags, is_text: bool) -> Result<Self, Failure> {
        if to.is_stdout() {
            if !is_text && io::stdout().is_terminal() {
                let message = "a terminal cannot show raw bytes";
                return Err(Failure::usage(message).hint("say -o PATH, or pipe it into something"));
            }
            let failed = |error| Failure::new(Exit::Failed, format!("no temporary file: {error}"));
            let (file, temporary) = unnamed(&std::env::temp_dir()).map_err(failed)?;
            // Nobody needs its name.
            drop(temporary);
            return Ok(Self {
                file,
                place: Place::Stdout,
                temporary: None,
            });
        }
        let path = free(&to.output, to.force)?;
        let (file, temporary) = unnamed(folder_of(&path)).map_err(|error| {
            let path = path.display();
            Failure::new(Exit::Failed, format!("cannot write {path}: {error}"))
        })?;
        Ok(Self {
            file,
            place: Place::Path {
                path,
                force: to.force,
            },
            temporary,
        })
    }

    /// The file to write into.
    pub(crate) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// All of it is written: let it be seen.
    pub(crate) fn publish(mut self) -> io::Result<()> {
        let (path, force) = match &self.place {
            Place::Stdout => {
                self.file.rewind()?;
                let mut stdout = output::stdout();
                io::copy(
                    &mut BufReader::with_capacity(1 << 18, &self.file),
                    &mut stdout,
                )?;
                return stdout.flush();
            }
            Place::Path { path, force } => (path, *force),
        };
        self.file.sync_all()?;
        if self.temporary.is_none() && !force {
            link(&self.file, path)?;
        } else {
            let temporary = match self.temporary.take() {
                Some(temporary) => temporary,
                None => {
                    let temporary = Temporary(neighbour(path));
                    link(&self.file, &temporary.0)?;
                    temporary
                }
            };
            if force {
                fs::rename(&temporary.0, path)?;
            } else {
                fs::hard_link(&temporary.0, path)?;
            }
        }
        File::open(folder_of(path))?.sync_all()
    }
}

/// Write bytes that were held.
pub(crate) fn write(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)
}

/// The path to write to: nothing is there, or a file that may be replaced.
fn free(path: &Path, force: bool) -> Result<PathBuf, Failure> {
    let shown = path.display();
    let there = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path.to_owned()),
        Err(error) => {
            return Err(Failure::usage(format!("cannot write {shown}: {error}")));
        }
        Ok(there) => there,
    };
    if !force {
        return Err(Failure::usage(format!("{shown} exists"))
            .hint("--force replaces it; nothing was read or written"));
    }
    let unreadable = |error| Failure::usage(format!("cannot write {shown}: {error}"));
    let target = if there.is_symlink() {
        fs::canonicalize(path).map_err(unreadable)?
    } else {
        path.to_owned()
    };
    if !fs::metadata(&target).map_err(unreadable)?.is_file() {
        return Err(Failure::usage(format!("{shown} is not a regular file"))
            .hint("say -o - and redirect standard output into it"));
    }
    Ok(target)
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// A file in `folder` that goes away with this process, whatever ends it. Not every file system
/// can do that: else one that goes away with the second value.
fn unnamed(folder: &Path) -> io::Result<(File, Option<Temporary>)> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    if let Ok(file) = rustix::fs::open(folder, flags, Mode::from_raw_mode(MODE)) {
        return Ok((file.into(), None));
    }
    let path = neighbour(&folder.join("vmferry"));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(MODE)
        .open(&path)?;
    Ok((file, Some(Temporary(path))))
}

/// A hidden name beside `path` that nothing else has.
fn neighbour(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{:016x}.part", fastrand::u64(..)));
    path.with_file_name(name)
}

/// Give a file without a name one, which must be free.
fn link(file: &File, path: &Path) -> io::Result<()> {
    let descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::linkat(
        CWD,
        descriptor,
        CWD,
        path,
        AtFlags::SYMLINK_FOLLOW,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(path: &Path, force: bool) -> Result<Output, String> {
        let output = path.into();
        let output = Output::create(&OutputFlags { output, force }, false);
        output.map_err(|failure| failure.message().to_owned())
    }

    fn names(folder: &Path) -> Vec<OsString> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name()).collect()
    }

    #[test]
    fn a_file_is_there_when_it_is_whole_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let output = create(&path, false).unwrap();
        write(&output.file().unwrap(), b"one").unwrap();
        assert!(!fs::exists(&path).unwrap());
        output.publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one");
        drop(create(&path, true).unwrap());
        assert_eq!(names(folder.path()), ["out"]);
        assert_eq!(fs::read(&path).unwrap(), b"one");
    }

    #[test]
    fn a_file_is_replaced_only_by_force() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        fs::write(&path, "old").unwrap();
        let error = create(&path, false).map(|_| ()).unwrap_err();
        assert_eq!(error, format!("{} exists", path.display()));
        let output = create(&path, true).unwrap();
        write(&output.file().unwrap(), b"new").unwrap();
        output.publish().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["out"]);

        // One that came in between is not replaced.
        let late = folder.path().join("late");
        let output = create(&late, false).unwrap();
        fs::write(&late, "theirs").unwrap();
        let error = output.publish().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&late).unwrap(), b"theirs");
    }

    #[test]
    fn a_link_is_followed_and_what_is_no_file_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("target");
        let symlink = folder.path().join("link");
        fs::write(&target, "old").unwrap();
        std::os::unix::fs::symlink(&target, &symlink).unwrap();
        create(&symlink, true).unwrap().publish().unwrap();
        assert!(fs::symlink_metadata(&symlink).unwrap().is_symlink());
        assert_eq!(fs::read(&target).unwrap(), b"");
        for path in [folder.path(), Path::new("/dev/null")] {
            let error = create(path, true).map(|_| ()).unwrap_err();
            assert!(error.ends_with("is not a regular file"), "{error}");
        }
    }

    #[test]
    fn without_files_that_have_no_name_it_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let temporary = folder.path().join(".x.part");
        let named = |force| {
            fs::write(&temporary, "bytes").unwrap();
            Output {
                file: File::open(&temporary).unwrap(),
                place: Place::Path {
                    path: folder.path().join("out"),
                    force,
                },
                temporary: Some(Temporary(temporary.clone())),
            }
        };
        named(false).publish().unwrap();
        assert_eq!(names(folder.path()), ["out"]);
        assert!(named(false).publish().is_err());
        named(true).publish().unwrap();
        drop(named(true));
        assert_eq!(names(folder.path()), ["out"]);
    }
}
