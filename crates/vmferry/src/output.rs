//! Standard output and standard error. Whoever reads them may go away at any time: that must not
//! disturb a migration, and is no failure of a command.

use std::io::{self, ErrorKind, Write};

/// One of the two streams.
pub(crate) struct Out {
    stream: Box<dyn Write>,
    /// Not even a full disk is worth ending for: there is nobody left to tell.
    is_stderr: bool,
}

/// Standard output.
pub(crate) fn stdout() -> Out {
    Out {
        stream: Box::new(io::stdout()),
        is_stderr: false,
    }
}

/// Standard error.
pub(crate) fn stderr() -> Out {
    Out {
        stream: Box::new(io::stderr()),
        is_stderr: true,
    }
}

/// One line of the program itself on standard error.
pub(crate) fn say(text: &str) {
    // Never fails.
    let _ = writeln!(stderr(), "vmferry: {text}");
}

impl Out {
    fn forgive(&self, error: io::Error) -> io::Result<()> {
        if self.is_stderr || error.kind() == ErrorKind::BrokenPipe {
            return Ok(());
        }
        Err(error)
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.stream.write(bytes) {
            Err(error) if error.kind() != ErrorKind::Interrupted => {
                self.forgive(error).map(|()| bytes.len())
            }
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush().or_else(|error| self.forgive(error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken(ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(self.0.into())
        }
    }

    #[test]
    fn a_reader_that_goes_away_is_no_failure_but_a_full_disk_is() {
        for (kind, is_stderr, fails) in [
            (ErrorKind::BrokenPipe, false, false),
            (ErrorKind::BrokenPipe, true, false),
            (ErrorKind::StorageFull, false, true),
            (ErrorKind::StorageFull, true, false),
        ] {
            let mut out = Out {
                stream: Box::new(Broken(kind)),
                is_stderr,
            };
            assert_eq!(
                out.write_all(b"text").is_err(),
                fails,
                "{kind:?} {is_stderr}"
            );
            assert_eq!(out.flush().is_err(), fails, "{kind:?} {is_stderr}");
        }
    }
}
