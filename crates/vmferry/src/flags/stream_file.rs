//! A stream that lies in a file, or comes from a pipe.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::exit::{Exit, Failure};

/// `FILE` or `-`.
#[derive(Clone, Debug)]
pub(crate) struct StreamFile(PathBuf);

impl From<PathBuf> for StreamFile {
    fn from(path: PathBuf) -> Self {
        Self(path)
    }
}

impl StreamFile {
    /// Standard input?
    pub(crate) fn is_stdin(&self) -> bool {
        self.0 == Path::new("-")
    }

    /// Its path, for what cannot come from a pipe.
    pub(crate) fn path(&self) -> Result<&Path, Failure> {
        if self.is_stdin() {
            let message = "standard input cannot be an image";
            return Err(Failure::usage(message));
        }
        Ok(&self.0)
    }

    /// Open it for reading.
    pub(crate) fn open(&self) -> Result<Box<dyn Read>, Failure> {
        if self.is_stdin() {
            return Ok(Box::new(io::stdin().lock()));
        }
        let file = File::open(&self.0).map_err(|error| self.unreadable(error))?;
        let is_folder = file.metadata().is_ok_and(|metadata| metadata.is_dir());
        if is_folder {
            return Err(self.unreadable("it is a folder"));
        }
        Ok(Box::new(file))
    }

    /// It cannot be read at all.
    pub(crate) fn unreadable(&self, why: impl fmt::Display) -> Failure {
        Failure::new(Exit::Unreadable, format!("{self}: {why}"))
    }
}

impl fmt::Display for StreamFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_stdin() {
            f.write_str("standard input")
        } else {
            write!(f, "{}", self.0.display())
        }
    }
}
