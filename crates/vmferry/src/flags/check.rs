//! Options of `vmferry check`.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};
use vmferry_qcow2::Repair;

/// Check a qcow2 image, and mend it if asked to.
///
/// Finds leaked clusters (they take space and harm nothing), clusters whose refcount is too low
/// (they may be handed out twice), metadata that overlaps, entries that lead out of the file, tables
/// that make no sense, and flags that disagree with refcounts; in snapshots and bitmaps, too. Backing
/// files are not looked at.
///
/// The image is locked: nobody may write to it meanwhile, so a daemon or a QEMU that uses it must
/// end first. Without --repair nothing in it is changed.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry check root.qcow2
  vmferry check --repair leaks root.qcow2
  vmferry check --json root.qcow2 | jq '.findings[] | select(.kind != \"leak\")'

Exit status:
  0  nothing is wrong (any more)
  1  something is wrong: leaks or errors; after a repair, what is left of them
  2  wrong usage, or the image cannot be read, is in use, or is no qcow2")]
pub(crate) struct CheckFlags {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// Mend this; content of the disk is never changed
    #[arg(long, value_name = "WHAT")]
    pub(crate) repair: Option<RepairWhat>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// What a check may mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RepairWhat {
    /// Free what nobody uses
    Leaks,
    /// Make refcounts and flags right, too
    All,
}

impl From<RepairWhat> for Repair {
    fn from(what: RepairWhat) -> Self {
        match what {
            RepairWhat::Leaks => Self::Leaks,
            RepairWhat::All => Self::All,
        }
    }
}
