//! Options of `vmferry convert`.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::output_file::OutputFlags;
use crate::output::Out;

/// Turn a parked machine from one form into another.
///
/// Reads what vmferry send reads: a migration stream, a mapped-ram file, or a snapshot's VM state.
/// The result appears when it is whole; the source is not changed.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  For QEMU 9.0 and later, which can read it with several threads (capabilities mapped-ram and
  multifd, then migrate-incoming file:guest.mapped):
    vmferry convert guest.migration -o guest.mapped --to mapped-ram

  Back, for a QEMU that does not know mapped-ram; each page is in it once:
    vmferry convert guest.mapped -o guest.migration --to stream
    qemu-system-x86_64 ... -incoming \"exec:cat guest.migration\"

  The state of the machine out of a snapshot:
    vmferry convert root.qcow2 --snapshot running -o guest.mapped --to mapped-ram")]
pub(crate) struct ConvertFlags {
    #[command(flatten)]
    pub(crate) from: ImageFlags,
    #[command(flatten)]
    pub(crate) to: OutputFlags,
    /// The form to turn it into
    #[arg(long = "to", value_name = "FORM", id = "form")]
    pub(crate) form: Form,
    /// Report the outcome as a JSON object (on standard error when the output is -)
    #[arg(long)]
    pub(crate) json: bool,
}

/// Forms of a parked machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Form {
    /// A migration stream, for any QEMU that has the machine type
    Stream,
    /// A file with a place for each page, for QEMU 9.0 and later
    MappedRam,
}

/// A parked machine to be read.
#[derive(Args, Debug)]
pub(crate) struct ImageFlags {
    /// The parked machine: a migration stream, a mapped-ram file, or with --snapshot a qcow2 image
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
    /// FILE is a qcow2 image: read the VM state of this snapshot (its id or its name)
    #[arg(long, value_name = "NAME")]
    pub(crate) snapshot: Option<String>,
    /// Where the index of its pages is, or is to be made (default: FILE.index, with --snapshot
    /// FILE.ID.index)
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    pub(crate) index: Option<PathBuf>,
}

impl ConvertFlags {
    /// Where `--json` wants its object.
    pub(crate) fn json_out(&self) -> Option<Out> {
        self.json.then(|| self.to.beside())
    }
}
