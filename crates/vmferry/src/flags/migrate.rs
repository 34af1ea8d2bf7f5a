//! Options of `vmferry migrate`.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use vmferry_channel::Uri;

use super::multifd::MultifdFlags;
use super::{LimitFlags, name_parser};

/// What can be said of a daemon's disks only.
const NOT_FOR_QEMU: [&str; 6] = [
    "check",
    "disk",
    "incremental",
    "no_zero_blocks",
    "one_way",
    "detach",
];

/// Migrate the disks of a running daemon, or park the machine of a QEMU, and watch.
///
/// Ctrl-C cancels: the source serves on. When the terminal goes away the migration goes on without
/// a watcher. exec:, fd:, file: and - are opened by this command, as this user and in this folder,
/// and handed to the daemon, which must be reached through a unix socket then.
///
/// The limits that are given, and --no-zero-blocks or its absence, stay set in the daemon for
/// migrations that follow.
///
/// With --vm and file:FILE the machine of a running QEMU is parked in a new file: all of its memory
/// and devices, not its disks. When this has succeeded its guest stands still for good and that QEMU
/// may be ended; vmferry send lets the guest run on. After a failure, or Ctrl-C, it runs on where it
/// is, and its QEMU has the settings that it had before.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  Move the disks to another host:
    vmferry migrate --qmp unix:/run/vmferry/qmp.sock tcp:host2:4444

  Through ssh, without any daemon over there:
    vmferry migrate --qmp unix:/run/vmferry/qmp.sock \\
        \"exec:ssh host2 vmferry receive - --disk root=/vm/root.img,create=on,size=20GiB\"

  Only what a disk has beyond the backing image that both hosts have:
    vmferry migrate --qmp unix:/run/vmferry/qmp.sock --incremental tcp:host2:4444

  What would go wrong?
    vmferry migrate --qmp unix:/run/vmferry/qmp.sock --check tcp:host2:4444

  Park a machine, and let it run on later:
    vmferry migrate --vm unix:/run/vm/qmp.sock file:/vm/guest.migration
    vmferry send /vm/guest.migration --vm unix:/run/vm/new-qmp.sock --postcopy

  Disks into a file, which cannot answer:
    vmferry migrate --qmp unix:/run/vmferry/qmp.sock --one-way file:/backup/vm.stream")]
#[command(group = clap::ArgGroup::new("source").args(["qmp", "vm"]).required(true).multiple(true))]
pub(crate) struct MigrateFlags {
    /// Control address of the running daemon whose disks are migrated
    #[arg(long, value_name = "ADDR")]
    pub(crate) qmp: Option<Uri>,
    /// QMP address of the running QEMU whose machine is parked
    #[arg(long, value_name = "QMP", conflicts_with_all = NOT_FOR_QEMU)]
    pub(crate) vm: Option<Uri>,
    /// Where to
    #[arg(value_name = "URI")]
    pub(crate) uri: Uri,
    /// Say what would go wrong on this side; the destination is not asked, and nothing changes
    #[arg(long, conflicts_with_all = ["detach"])]
    pub(crate) check: bool,
    /// Migrate only this disk (repeatable); without it all disks that can be written to
    #[arg(long, value_name = "NAME", value_parser = name_parser())]
    pub(crate) disk: Vec<String>,
    #[command(flatten)]
    pub(crate) limits: LimitFlags,
    /// Send only what lies in the disks' top layers, and not what their backing images hold
    ///
    /// The destination's disks must be empty images over the same backing images, and it must be
    /// told: a vmferry there with --incremental. Nobody compares the backing images.
    #[arg(long)]
    pub(crate) incremental: bool,
    /// Send zeroes as data, for a destination that does not know zero blocks (QEMU before 1.6)
    #[arg(long)]
    pub(crate) no_zero_blocks: bool,
    /// The destination cannot answer: a file, or a pipe
    ///
    /// Nobody then says whether the disks arrived; the source gives them up as soon as the last
    /// byte is on its way.
    #[arg(long)]
    pub(crate) one_way: bool,
    /// Where the index of a parked machine's pages goes (default: FILE.index)
    #[arg(long, value_name = "PATH", requires = "vm", value_hint = ValueHint::FilePath)]
    pub(crate) index: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) multifd: MultifdFlags,
    /// Start the migration and do not watch
    #[arg(long)]
    pub(crate) detach: bool,
    /// Report as JSON objects, one a line
    #[arg(long)]
    pub(crate) json: bool,
}
