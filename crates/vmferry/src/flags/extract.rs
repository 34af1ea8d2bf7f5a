//! The options of `vmferry extract`.

use clap::{Args, Subcommand, ValueHint};

use super::inspect::stream_file;
use super::output_file::OutputFlags;
use super::size::Size;
use super::stream_file::StreamFile;
use crate::output::{self, Out};

/// Take memory, a disk or a device out of a stream.
///
/// Reads a stream of any kind, from a file or a pipe, once. The output is a new file that appears
/// when it is whole and on stable storage; where there are only zeroes, it has holes.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  The guest's memory, as a file of raw bytes:
    vmferry extract ram vm.stream pc.ram -o memory.raw

  Memory and registers, for a debugger:
    vmferry extract ram vm.stream --core -o vm.core
    gdb -ex 'info registers' vmlinux vm.core

  A disk that travelled with migrate -b:
    vmferry extract disk vm.stream disk0 -o disk0.raw

  What a device saved, and what the stream says about its fields:
    vmferry extract device vm.stream fw_cfg -o - | xxd
    vmferry extract vmdescription vm.stream -o - | jq .

Exit status:
  0  whole
  1  the stream is broken or truncated, or the output cannot be written
  2  wrong usage, or the input cannot be read or has not what was asked for")]
pub(crate) struct ExtractFlags {
    #[command(subcommand)]
    pub(crate) what: What,
}

impl ExtractFlags {
    /// Where `--json` wants its object: standard output, unless that carries the bytes.
    pub(crate) fn json_out(&self) -> Option<Out> {
        let files = self.what.files();
        files.json.then(|| {
            if files.to.is_stdout() {
                output::stderr()
            } else {
                output::stdout()
            }
        })
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum What {
    Ram(RamFlags),
    Disk(DiskFlags),
    Device(DeviceFlags),
    Vmdescription(DescriptionFlags),
}

impl What {
    pub(crate) fn files(&self) -> &FileFlags {
        match self {
            Self::Ram(flags) => &flags.files,
            Self::Disk(flags) => &flags.files,
            Self::Device(flags) => &flags.files,
            Self::Vmdescription(flags) => &flags.files,
        }
    }
}

/// Where from and where to.
#[derive(Args, Debug)]
pub(crate) struct FileFlags {
    /// The stream; - is standard input
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath, value_parser = stream_file())]
    pub(crate) file: StreamFile,
    #[command(flatten)]
    pub(crate) to: OutputFlags,
    /// If the stream is broken or truncated, keep what was before that; the exit status is 1 anyway
    #[arg(long)]
    pub(crate) partial: bool,
    /// Report the outcome as a JSON object (on standard error with -o -)
    #[arg(long)]
    pub(crate) json: bool,
}

/// Take guest memory out of a stream.
///
/// A RAM block becomes a file of raw bytes. With --core all of them, and the registers, become an
/// ELF core file: addresses in it are those that the guest's kernel uses, found in its page tables,
/// or guest-physical ones where there are none.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  Which RAM blocks are there?
    vmferry inspect vm.stream

  vmferry extract ram vm.stream pc.ram -o memory.raw
  ssh host cat vm.stream | vmferry extract ram - pc.ram -o memory.raw

  A core of a machine whose memory is in two blocks (-numa node,memdev=...):
    vmferry extract ram vm.stream --core --memory-block m0 --memory-block m1 -o vm.core")]
pub(crate) struct RamFlags {
    #[command(flatten)]
    pub(crate) files: FileFlags,
    /// The RAM block; may be left out if there is only one
    #[arg(value_name = "NAME", conflicts_with = "core")]
    pub(crate) name: Option<String>,
    /// Make an ELF core file of all memory and the registers
    #[arg(long)]
    pub(crate) core: bool,
    /// The RAM block of the main memory (repeatable, in the order of their addresses); without it
    /// pc.ram or microvm.ram, else the largest
    #[arg(long, value_name = "NAME", requires = "core")]
    pub(crate) memory_block: Vec<String>,
    /// How much of the main memory is below 4 GiB, if the machine was given another size than its
    /// type has by itself (max-ram-below-4g)
    #[arg(long, value_name = "SIZE", requires = "core")]
    pub(crate) below_4g: Option<Size>,
}

/// Take a disk out of a stream that was made with migrate -b.
///
/// The stream does not say how long a disk is. Without --size the image ends with the last chunk of
/// 1 MiB that the stream carries.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry extract disk vm.stream disk0 -o disk0.raw --size 20GiB
  qemu-img convert -f raw -O qcow2 disk0.raw disk0.qcow2")]
pub(crate) struct DiskFlags {
    #[command(flatten)]
    pub(crate) files: FileFlags,
    /// The disk; may be left out if there is only one
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Length of the disk
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<Size>,
}

/// Take the saved state of a device out of a stream.
///
/// What is written are the bytes of its section, without header and footer.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry extract device vm.stream fw_cfg -o fw_cfg.bin
  vmferry extract device vm.stream i8259/1 -o - | xxd")]
pub(crate) struct DeviceFlags {
    #[command(flatten)]
    pub(crate) files: FileFlags,
    /// The device, with /INSTANCE behind it if there are several of that name; may be left out if
    /// there is only one device
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
}

/// Take the description of the devices out of a stream: JSON, as it stands there.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry extract vmdescription vm.stream -o - | jq '.devices[].name'")]
pub(crate) struct DescriptionFlags {
    #[command(flatten)]
    pub(crate) files: FileFlags,
}
