//! Where a migration goes: an address for the daemon, or a descriptor that is opened here, as this
//! user and in this folder, and handed to it.

use std::fs::File;
use std::io::{self, IsTerminal, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::{FileType, fstat};
use vmferry_channel::{Uri, duplicate_inherited};

use crate::child;
use crate::commands::daemon::{Daemon, Refusal};
use crate::disks::MadeFiles;
use crate::exit::{Exit, Failure};

/// Name of the descriptor at the daemon.
const FD_NAME: &str = "vmferry-migrate";

/// How long a command may take to end once the migration is over.
const COMMAND_PATIENCE: Duration = Duration::from_secs(5);

/// Runs a command so that Ctrl-C and a lost terminal do not reach it: Ctrl-C cancels through the
/// daemon, and a detached migration still needs it. It stays in our process group, for a process
/// in the background could not ask for a password.
const SHELL_WRAPPER: &str = "trap '' HUP INT QUIT; eval \"$1\"";

/// What was opened for a migration.
#[derive(Debug)]
pub(super) enum Target {
    /// The daemon opens it.
    Address(Uri),
    /// A file; it is emptied from its offset on right before the migration begins. One that was
    /// made for it goes again if it does not.
    File {
        file: File,
        offset: u64,
        made: MadeFiles,
    },
    /// An open descriptor.
    Descriptor(OwnedFd),
    /// A running command.
    Command {
        socket: UnixStream,
        command: RunningCommand,
    },
}

impl Target {
    pub(super) fn open(uri: &Uri) -> Result<Self, Failure> {
        let failed =
            |error: io::Error| Failure::new(Exit::Failed, format!("cannot open {uri}: {error}"));
        match uri {
            Uri::Tcp { .. } | Uri::Unix(_) => as_daemon_sees(uri).map(Self::Address),
            Uri::File { path, offset } => {
                let mut made = MadeFiles::default();
                let file = open_file(path, *offset, &mut made).map_err(failed)?;
                Ok(Self::File {
                    file,
                    offset: *offset,
                    made,
                })
            }
            Uri::Fd(number) => duplicate_inherited(*number)
                .map(Self::Descriptor)
                .map_err(|error| Failure::new(Exit::Failed, error)),
            Uri::Stdio => {
                if io::stdout().is_terminal() {
                    return Err(Failure::usage(
                        "standard output is a terminal, not a channel",
                    ));
                }
                let fd = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
                Ok(Self::Descriptor(fd))
            }
            Uri::Exec(command) => {
                let (socket, command) = RunningCommand::start(command).map_err(failed)?;
                Ok(Self::Command { socket, command })
            }
        }
    }

    /// Can nothing come back from there?
    pub(super) fn is_one_way(&self) -> bool {
        match self {
            Self::Address(_) | Self::Command { .. } => false,
            Self::File { .. } => true,
            // The daemon finds out about anything stranger.
            Self::Descriptor(fd) => fstat(fd).is_ok_and(|stat| {
                let kind = FileType::from_raw_mode(stat.st_mode);
                matches!(kind, FileType::Fifo | FileType::RegularFile)
            }),
        }
    }

    /// Make it known to the daemon; the address that `migrate` takes.
    pub(super) fn hand_over(&self, daemon: &mut Daemon, address: &Uri) -> Result<String, Failure> {
        let fd = match self {
            Self::Address(uri) => return Ok(uri.to_string()),
            Self::File { file, .. } => file.as_fd(),
            Self::Descriptor(fd) => fd.as_fd(),
            Self::Command { socket, .. } => socket.as_fd(),
        };
        if !matches!(address, Uri::Unix(_)) {
            return Err(Failure::refused(format!(
                "a descriptor cannot be handed to the daemon at {address}"
            ))
            .hint("exec:, fd:, file: and - need a daemon whose --qmp is unix:PATH"));
        }
        daemon.getfd(FD_NAME, fd).map_err(|refusal| match refusal {
            Refusal::Refused(why) => Failure::refused(why),
            lost @ Refusal::Lost(_) => lost.into(),
        })?;
        Ok(format!("fd:{FD_NAME}"))
    }

    /// Right before the migration is asked for: what a file holds from its offset on goes.
    pub(super) fn empty(&self) -> io::Result<()> {
        match self {
            Self::File { file, offset, .. } => file.set_len(*offset),
            _ => Ok(()),
        }
    }

    /// The migration may run: a file that was made for it stays.
    pub(super) fn keep(&mut self) {
        if let Self::File { made, .. } = self {
            std::mem::take(made).keep();
        }
    }

    /// The migration is over.
    pub(super) fn finish(self) {
        if let Self::Command { socket, command } = self {
            // The end of its input, unless the daemon still holds it open.
            drop(socket);
            command.finish();
        }
    }
}

/// The daemon runs in another folder.
pub(super) fn as_daemon_sees(uri: &Uri) -> Result<Uri, Failure> {
    let absolute = |path: &Path| {
        std::path::absolute(path)
            .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
    };
    Ok(match uri {
        Uri::Unix(path) => Uri::Unix(absolute(path)?),
        Uri::File { path, offset } => Uri::File {
            path: absolute(path)?,
            offset: *offset,
        },
        other => other.clone(),
    })
}

/// What the file holds before its offset, or at all, stays until the daemon has taken it.
fn open_file(path: &Path, offset: u64, made: &mut MadeFiles) -> io::Result<File> {
    let mut options = File::options();
    options.write(true).mode(0o600);
    let mut file = match options.clone().create_new(true).open(path) {
        Ok(file) => {
            made.add(path);
            file
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            // A link that leads nowhere exists, too.
            options.create(true).truncate(false).open(path)?
        }
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other(
            "it is no regular file; for a pipe or device use exec: or fd:",
        ));
    }
    file.seek(SeekFrom::Start(offset))?;
    Ok(file)
}

/// The command of an `exec:`.
#[derive(Debug)]
pub(super) struct RunningCommand {
    child: Child,
}

impl RunningCommand {
    /// Run it with one end of a socket as its standard input and output.
    fn start(command: &str) -> io::Result<(UnixStream, Self)> {
        let (ours, theirs) = UnixStream::pair()?;
        let child = Command::new("/bin/sh")
            .args(["-c", SHELL_WRAPPER, "sh", command])
            .stdin(Stdio::from(OwnedFd::from(theirs.try_clone()?)))
            .stdout(Stdio::from(OwnedFd::from(theirs)))
            .spawn()?;
        Ok((ours, Self { child }))
    }

    /// Let it end by itself, for a while; then tell it to.
    fn finish(mut self) {
        if !child::ends_within(&self.child, COMMAND_PATIENCE) {
            tracing::warn!("the command of exec: goes on, it is told to end");
            child::tell_to_end(&self.child);
            if !child::ends_within(&self.child, COMMAND_PATIENCE) {
                return;
            }
        }
        match self.child.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!("the command of exec: ended with {status}"),
            Err(error) => tracing::warn!("the command of exec: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_command_gets_both_directions_and_ends_with_its_input() {
        let uri: Uri = "exec:printf 'ready '; exec tr a-z A-Z".parse().unwrap();
        let Target::Command {
            mut socket,
            command,
        } = Target::open(&uri).unwrap()
        else {
            panic!("no command");
        };
        socket.write_all(b"the stream").unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "ready THE STREAM");
        command.finish();
    }

    #[test]
    fn the_signals_of_the_terminal_do_not_reach_a_command() {
        let uri: Uri = "exec:kill -INT $$; kill -HUP $$; echo alive"
            .parse()
            .unwrap();
        let Target::Command {
            mut socket,
            command,
        } = Target::open(&uri).unwrap()
        else {
            panic!("no command");
        };
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "alive\n");
        command.finish();
    }

    #[test]
    fn a_file_keeps_what_is_before_the_offset_and_is_not_emptied_by_opening_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stream");
        std::fs::write(&path, b"headers and an old stream").unwrap();
        let uri: Uri = format!("file:{},offset=7", path.display()).parse().unwrap();
        let target = Target::open(&uri).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"headers and an old stream");
        target.empty().unwrap();
        let Target::File { mut file, made, .. } = target else {
            panic!("no file");
        };
        drop(made);
        file.write_all(b": new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"headers: new");
    }

    #[test]
    fn a_file_that_was_made_goes_again_unless_the_migration_begins() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("stream");
        let uri: Uri = format!("file:{}", path.display()).parse().unwrap();
        drop(Target::open(&uri).unwrap());
        assert!(!path.exists());
        let mut target = Target::open(&uri).unwrap();
        target.keep();
        drop(target);
        assert!(path.exists());
        drop(Target::open(&uri).unwrap());
        assert!(path.exists(), "it was there before");
    }

    #[test]
    fn an_inherited_descriptor_is_duplicated_and_others_are_refused() {
        use std::os::fd::AsRawFd;
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        // As one that has come through `exec`.
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let number = theirs.as_raw_fd();
        let Target::Descriptor(fd) = Target::open(&Uri::Fd(number)).unwrap() else {
            panic!("no descriptor");
        };
        drop(theirs);
        File::from(fd).write_all(b"x").unwrap();
        let mut byte = [0];
        ours.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
        assert_eq!(Target::open(&Uri::Fd(9999)).unwrap_err().exit, Exit::Failed);
    }

    #[test]
    fn paths_are_said_in_full() {
        let uri = as_daemon_sees(&"unix:socket".parse().unwrap()).unwrap();
        let here = std::env::current_dir().unwrap().join("socket");
        assert_eq!(uri, Uri::Unix(here));
    }
}
