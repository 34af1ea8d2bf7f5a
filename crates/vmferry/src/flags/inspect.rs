//! Options of `vmferry inspect` and `vmferry diff`.

use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, ValueHint};

use super::device_glob::DeviceGlob;
use super::stream_file::StreamFile;

/// Show what is in a migration stream, and where it breaks.
///
/// Reads streams of any kind from a file or a pipe, in one pass: live migrations, with disks,
/// postcopy with its package, the main channel of multifd, mapped-ram files, background snapshots,
/// streams of old machine types, files of `virsh save`.
///
/// Devices are shown field by field, by the description that QEMU puts behind a stream. Guest memory
/// and disks are counted and never printed; the buffers of devices, which may hold what a guest has
/// written, only with --hex.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  vmferry inspect guest.migration
  vmferry inspect --device 'virtio*' --offsets guest.migration
  xz -dc guest.migration.xz | vmferry inspect -
  vmferry inspect root.qcow2 --snapshot before-update
  vmferry inspect --json guest.migration | jq '.ram.blocks[] | {name, data}'

Exit status:
  0  the stream is whole
  1  it is broken or truncated
  2  wrong usage, or it cannot be read")]
pub(crate) struct InspectFlags {
    /// The stream; - is standard input
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath, value_parser = stream_file())]
    pub(crate) file: StreamFile,
    /// Show only devices whose name matches, with or without their path; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub(crate) device: Vec<DeviceGlob>,
    /// Show where each field stands
    #[arg(long)]
    pub(crate) offsets: bool,
    /// Show the bytes of devices' buffers, and of devices that nothing describes
    #[arg(long)]
    pub(crate) hex: bool,
    /// Decode devices by the description of this stream (or a file with its text), if this one has
    /// none: of the same machine and QEMU version
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, value_parser = stream_file())]
    pub(crate) description: Option<StreamFile>,
    /// FILE is a qcow2 image: show the machine's state in this snapshot (its id or name)
    #[arg(long, value_name = "NAME")]
    pub(crate) snapshot: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Compare two migration streams, field by field.
///
/// Sections and fields are matched by their names, whatever their order and offsets. What differs
/// between any two streams of one machine is left out: clocks and armed timers, section ids, how often
/// a page was sent. Guest memory and disks are compared by their layout, and by content only if that is
/// asked for.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  vmferry diff before.migration after.migration
  vmferry diff --device cpu --all before.migration after.migration

Exit status:
  0  the streams do not differ
  1  they do, or one of them is broken
  2  wrong usage, or one of them cannot be read")]
pub(crate) struct DiffFlags {
    /// The first stream; - is standard input
    #[arg(value_name = "A", value_hint = ValueHint::FilePath, value_parser = stream_file())]
    pub(crate) first: StreamFile,
    /// The second stream
    #[arg(value_name = "B", value_hint = ValueHint::FilePath, value_parser = stream_file())]
    pub(crate) second: StreamFile,
    /// Compare only devices whose name matches, with or without their path; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub(crate) device: Vec<DeviceGlob>,
    /// Compare clocks and timers, too
    #[arg(long)]
    pub(crate) all: bool,
    /// Compare what is in guest memory and on disks, too; needs room for them in the folder for
    /// temporary files
    #[arg(long, conflicts_with = "device")]
    pub(crate) contents: bool,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Parses a path or `-`.
pub(crate) fn stream_file() -> impl TypedValueParser<Value = StreamFile> {
    PathBufValueParser::new().map(|path: PathBuf| StreamFile::from(path))
}
