//! Options of `vmferry schema`.

use clap::{Args, Subcommand, ValueHint};

use super::device_glob::DeviceGlob;
use super::inspect::stream_file;
use super::stream_file::StreamFile;

/// Compare what two programs know of device state, before a migration.
///
/// A schema is the JSON that QEMU writes with -dump-vmstate: the fields of every device type it
/// knows, with their versions.
#[derive(Debug, Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
#[command(disable_help_subcommand = true)]
#[command(after_long_help = "Examples:
  Will these two QEMUs load each other's guests?
    qemu-7.2 -M pc-i440fx-7.2 -display none -dump-vmstate old.json
    qemu-10.0 -M pc-i440fx-7.2 -display none -dump-vmstate new.json
    vmferry schema diff old.json new.json

  Will this saved guest load in that QEMU?
    vmferry schema diff guest.migration new.json")]
pub(crate) struct SchemaFlags {
    #[command(subcommand)]
    pub(crate) command: SchemaCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SchemaCommand {
    Diff(SchemaDiffFlags),
    Dump(SchemaDumpFlags),
}

impl SchemaFlags {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            SchemaCommand::Diff(flags) => flags.json,
            SchemaCommand::Dump(_) => false,
        }
    }
}

/// Say for each device whether NEW loads what OLD sends, and the reverse, and why not.
///
/// Three answers: yes, no, and "depends" on what a schema does not tell: conditions of fields,
/// whether a subsection is sent, lengths that are known when saving. A "no" is a load that fails, or
/// that puts values into the wrong fields. It matters only if the machine has such a device.
///
/// A schema covers device types. CPUs, buses and timers are in streams but not in it: nothing is
/// said about them.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry schema diff old.json new.json
  vmferry schema diff --device 'virtio-*' --all old.json new.json
  vmferry schema diff --json old.json new.json | jq 'select(.verdict == \"no\")'
  qemu-10.0 -M q35 -display none -dump-vmstate /dev/stdout | \\
      vmferry schema diff guest.migration -

Exit status:
  0    nothing speaks against it
  1    something is incompatible
  2    wrong usage, or a file cannot be read")]
pub(crate) struct SchemaDiffFlags {
    /// A schema, or a migration stream: what is sent by the old program
    #[arg(value_name = "OLD", value_hint = ValueHint::FilePath, value_parser = stream_file())]
    pub(crate) old: StreamFile,
    /// The schema of the new program; - is standard input
    #[arg(value_name = "NEW", value_hint = ValueHint::FilePath, value_parser = stream_file())]
    pub(crate) new: StreamFile,
    /// Only device types whose name, or whose description's, matches; may be repeated
    #[arg(long, value_name = "GLOB")]
    pub(crate) device: Vec<DeviceGlob>,
    /// Tell of devices that fit, too, and of fields that were only renamed
    #[arg(long)]
    pub(crate) all: bool,
    /// Print a JSON object for each device, one a line, and one for the whole
    #[arg(long)]
    pub(crate) json: bool,
}

/// Print a schema of the devices in a migration stream.
///
/// It holds what the stream says about itself: the fields that were sent, with their lengths on the
/// wire. Each device type is called like its description, for a stream does not carry the type's name.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry schema dump guest.migration > guest.json
  virsh save demo /dev/stdout | vmferry schema dump -")]
pub(crate) struct SchemaDumpFlags {
    /// The stream; - is standard input
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath, value_parser = stream_file())]
    pub(crate) file: StreamFile,
}
