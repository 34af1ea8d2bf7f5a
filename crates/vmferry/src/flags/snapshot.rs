//! Options of `vmferry snapshot`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueHint};
use vmferry_channel::Uri;

use super::inspect::stream_file;
use super::output_file::OutputFlags;
use super::stream_file::StreamFile;

/// List, take, apply and delete internal snapshots of qcow2 images.
///
/// Several images are the disks of one machine: a snapshot is taken of all of them or of none, and
/// applied only if all of them have it. Images that nobody else has open are named by their paths,
/// disks of a running daemon by --qmp and their names there.
#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
#[command(disable_help_subcommand = true)]
#[command(after_long_help = "Examples:
  vmferry snapshot create before-update root.qcow2 data.qcow2
  vmferry snapshot list root.qcow2 data.qcow2
  vmferry snapshot apply before-update root.qcow2 data.qcow2

  The disks of a daemon, while guests use them:
    vmferry snapshot create before-update --qmp unix:/run/vmferry/qmp.sock
    vmferry snapshot delete before-update root --qmp unix:/run/vmferry/qmp.sock

  The state of the machine, out of a snapshot and into one:
    vmferry snapshot export root.qcow2 running -o guest.migration
    vmferry snapshot import root.qcow2 running2 guest.migration
    qemu-system-x86_64 ... -drive file=root.qcow2 -loadvm running2")]
pub(crate) struct SnapshotFlags {
    #[command(subcommand)]
    pub(crate) command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    List(ListFlags),
    Create(CreateFlags),
    Apply(ApplyFlags),
    Delete(DeleteFlags),
    Export(ExportFlags),
    Import(ImportFlags),
}

impl SnapshotFlags {
    pub(crate) fn json(&self) -> bool {
        matches!(&self.command, SnapshotCommand::List(flags) if flags.json)
    }
}

/// Which disks.
#[derive(Args, Debug)]
pub(crate) struct WhichFlags {
    /// The images; with --qmp the names of disks, and none means all that can be written to
    #[arg(value_name = "DISK", required_unless_present = "qmp", value_hint = ValueHint::FilePath)]
    pub(crate) disks: Vec<PathBuf>,
    /// The disks are those of the running daemon with this control address
    #[arg(long, value_name = "ADDR")]
    pub(crate) qmp: Option<Uri>,
}

/// List the snapshots of images: those that all of them have, and the others.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry snapshot list root.qcow2
  vmferry snapshot list --json root.qcow2 data.qcow2 | jq '.whole[].name'
  vmferry snapshot list --qmp unix:/run/vmferry/qmp.sock")]
pub(crate) struct ListFlags {
    #[command(flatten)]
    pub(crate) which: WhichFlags,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// The snapshot, and which disks.
#[derive(Args, Debug)]
pub(crate) struct DisksFlags {
    /// The snapshot
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) which: WhichFlags,
}

/// Take a snapshot of images, of all or of none.
///
/// With --qmp guests' writes wait meanwhile: no disk has a write in its snapshot that was begun after
/// one that another lacks. It holds what a guest would find after a power cut.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry snapshot create before-update root.qcow2 data.qcow2
  vmferry snapshot create before-update --qmp unix:/run/vmferry/qmp.sock")]
pub(crate) struct CreateFlags {
    #[command(flatten)]
    pub(crate) disks: DisksFlags,
}

/// Bring images back to what they held when a snapshot was taken; what they hold now is lost.
///
/// All of them must have it. With --qmp no guest may be running on them: it would not notice that
/// its disk is another one.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry snapshot apply before-update root.qcow2 data.qcow2
  vmferry snapshot apply before-update --qmp unix:/run/vmferry/qmp.sock")]
pub(crate) struct ApplyFlags {
    #[command(flatten)]
    pub(crate) disks: DisksFlags,
}

/// Delete a snapshot from those images that have it.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry snapshot delete before-update root.qcow2 data.qcow2
  vmferry snapshot delete before-update --qmp unix:/run/vmferry/qmp.sock")]
pub(crate) struct DeleteFlags {
    #[command(flatten)]
    pub(crate) disks: DisksFlags,
}

/// Take the state of the machine out of a snapshot: an ordinary migration stream.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry snapshot export root.qcow2 running -o guest.migration
  vmferry snapshot export root.qcow2 running -o - | vmferry inspect -")]
pub(crate) struct ExportFlags {
    /// The image
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// The snapshot
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) to: OutputFlags,
}

/// Make a snapshot that holds a migration stream as the state of the machine.
///
/// QEMU's -loadvm starts from it. The other disks of the machine need a snapshot of the same name:
/// name them, too.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry snapshot import root.qcow2 running guest.migration
  vmferry snapshot import root.qcow2 running guest.migration data.qcow2")]
pub(crate) struct ImportFlags {
    /// The image that holds the state
    #[arg(value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) image: PathBuf,
    /// The snapshot
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    /// The stream; - is standard input
    #[arg(value_name = "STREAM", value_hint = ValueHint::FilePath, value_parser = stream_file())]
    pub(crate) stream: StreamFile,
    /// The other disks of the machine
    #[arg(value_name = "OTHER", value_hint = ValueHint::FilePath)]
    pub(crate) others: Vec<PathBuf>,
}
