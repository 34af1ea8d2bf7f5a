//! Where a command writes a file to.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, ValueHint};

use crate::output::{self, Out};

/// The file to write.
#[derive(Args, Clone, Debug)]
pub(crate) struct OutputFlags {
    /// The file to write; - is standard output
    #[arg(short, long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) output: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    pub(crate) force: bool,
}

impl OutputFlags {
    pub(crate) fn is_stdout(&self) -> bool {
        self.output.as_os_str() == "-"
    }

    /// Where reports go: standard output, unless that is the file.
    pub(crate) fn beside(&self) -> Out {
        match self.is_stdout() {
            true => output::stderr(),
            false => output::stdout(),
        }
    }
}

impl fmt::Display for OutputFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_stdout() {
            f.write_str("standard output")
        } else {
            write!(f, "{}", self.output.display())
        }
    }
}
