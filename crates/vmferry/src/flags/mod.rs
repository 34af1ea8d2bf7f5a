//! The command line: each command's options, and a module for each kind of value.

pub(crate) mod announce;
pub(crate) mod check;
pub(crate) mod convert;
pub(crate) mod device_glob;
pub(crate) mod disk;
pub(crate) mod extract;
pub(crate) mod incoming;
mod inspect;
mod log;
mod migrate;
pub(crate) mod multifd;
pub(crate) mod output_file;
pub(crate) mod rate;
mod schema;
mod send;
pub(crate) mod size;
pub(crate) mod snapshot;
pub(crate) mod stream_file;
pub(crate) mod time;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use vmferry_channel::Uri;

use crate::output::{self, Out};
use announce::AnnounceFlag;
use check::CheckFlags;
pub(crate) use convert::ConvertFlags;
use disk::DiskFlag;
use extract::ExtractFlags;
use incoming::IncomingFlag;
pub(crate) use inspect::{DiffFlags, InspectFlags};
pub(crate) use log::LogFlags;
pub(crate) use migrate::MigrateFlags;
use multifd::MultifdFlags;
use rate::Rate;
pub(crate) use schema::{SchemaCommand, SchemaDiffFlags, SchemaDumpFlags, SchemaFlags};
pub(crate) use send::SendFlags;
use size::Size;
use time::Millis;

/// Live migration for virtual machines and their disks.
///
/// vmferry serves disks over NBD to any virtual machine monitor, and moves them to another host
/// while guests write to them. It speaks QEMU's migration stream, so either end can be a QEMU
/// that knows the "block" section. And it looks into streams of any QEMU: what is in them, where they
/// break, and memory, disks and devices out of them.
#[derive(Debug, Parser)]
#[command(
    name = "vmferry",
    version,
    propagate_version = true,
    max_term_width = 100
)]
#[command(
    disable_help_subcommand = false,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(after_long_help = MAIN_HELP)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) log: LogFlags,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const MAIN_HELP: &str = "\
Addresses (URI, ADDR):
  tcp:HOST:PORT     port 0 takes a free one; the address is reported
  unix:PATH         control sockets are made with mode 0600
  fd:N              an open descriptor of this process
  exec:COMMAND      a shell command's standard input and output
  file:PATH         a file; with ,offset=N from byte N on
  -                 standard input or output

Sizes take KiB, MiB, GiB or TiB (or K, M, G, T, which mean the same), times ms or s, rates a size
and /s.

Exit status:
  0    whole and durable
  1    failed; the source serves on and a retry is safe
  2    wrong usage
  3    undecided: nobody knows which side has the disks, they are held (see vmferry help resolve)
  4    refused before anything was sent
  130  cancelled
  inspect, diff, extract, schema, check: 0 whole or equal, 1 broken or different, 2 unreadable

First steps:
  vmferry demo      shows a live migration on this machine";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Serve(ServeFlags),
    Migrate(MigrateFlags),
    Status(StatusFlags),
    Cancel(CancelFlags),
    Set(SetFlags),
    Resolve(ResolveFlags),
    Receive(ReceiveFlags),
    Send(SendFlags),
    Convert(ConvertFlags),
    Extract(ExtractFlags),
    Inspect(InspectFlags),
    Diff(DiffFlags),
    Schema(SchemaFlags),
    Check(CheckFlags),
    Snapshot(snapshot::SnapshotFlags),
    Demo(DemoFlags),
    /// Print a shell's completions
    #[command(after_long_help = "Examples:
  vmferry completions bash > /usr/share/bash-completion/completions/vmferry
  vmferry completions fish > ~/.config/fish/completions/vmferry.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page, or write all of them into a folder
    #[command(after_long_help = "Examples:
  vmferry man | man -l -
  vmferry man /usr/share/man/man1")]
    Man {
        /// Write vmferry.1 and a page for each command here
        #[arg(value_hint = ValueHint::DirPath)]
        dir: Option<PathBuf>,
    },
}

impl Command {
    /// Where `--json` wants its objects: standard output, unless that carries the stream, or the
    /// way back to a source.
    pub(crate) fn json_out(&self) -> Option<Out> {
        match self {
            Self::Extract(flags) => return flags.json_out(),
            Self::Convert(flags) => return flags.json_out(),
            _ => {}
        }
        let (json, uri) = match self {
            Self::Serve(flags) => {
                let uri = match &flags.incoming {
                    Some(IncomingFlag::At(uri)) => Some(uri),
                    Some(IncomingFlag::Defer) | None => None,
                };
                (flags.json, uri)
            }
            Self::Migrate(flags) => (flags.json, Some(&flags.uri)),
            Self::Receive(flags) => (flags.json, Some(&flags.uri)),
            Self::Send(flags) => (flags.json, flags.uri.as_ref()),
            Self::Status(flags) => (flags.json, None),
            Self::Demo(flags) => (flags.json, None),
            Self::Schema(flags) => (flags.json(), None),
            Self::Check(flags) => (flags.json, None),
            Self::Snapshot(flags) => (flags.json(), None),
            _ => (false, None),
        };
        json.then(|| match uri {
            Some(Uri::Stdio | Uri::Fd(1)) => output::stderr(),
            _ => output::stdout(),
        })
    }
}

const ANNOUNCE_HELP: &str = "\
A guest's NIC: IFACE[,mac=MAC] (repeatable)

Announce this guest NIC on the host's interface IFACE when an incoming migration has completed, so \
that switches learn the guest's new port. QMP's announce-self does it again at any time; there the \
NIC is called IFACE.

IFACE leads to the network: the bridge that the guest is on, or the physical interface; not the \
guest's tap, which leads to the guest. mac= is the guest's address; without it the guest has the \
address of IFACE, as behind a macvtap. Needs CAP_NET_RAW. A QEMU announces its guest itself.";

const DISK_HELP: &str = "\
A disk: NAME=PATH[,format=raw|qcow2][,readonly=on][,size=S][,create=on][,overwrite=on]

NAME is what guests ask for over NBD and what the migration stream says; both ends must use the \
same. PATH is a file or a block device. Two commas in a row are one comma of the name or path.

format=: raw, or qcow2. It is never guessed, for a guest writes what is in a raw disk: without it \
the disk is raw, and refused if it starts like a qcow2 image. A qcow2 may lie on top of others, if \
its header names their formats.

readonly=on: guests cannot write. create=on with size=S: make the file, which must not exist. \
overwrite=on: a migration may fill this disk although it holds data; a qcow2 holds data if it has \
any clusters.";

/// Serve disks over NBD, and migrate them out or in.
///
/// Each disk is exported under its name. With --incoming the exports answer reads, but hold writes
/// until a migration has filled the disks. SIGTERM and Ctrl-C end the daemon in order: a running
/// migration is cancelled, requests are finished, disks are synced.
///
/// Under systemd the daemon says when it is ready, and takes sockets over: those named "nbd",
/// "qmp" and "incoming" (FileDescriptorName=) become what their names say, any other is for NBD.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  Serve two disks, controlled through a socket:
    vmferry serve --disk root=/vm/root.img --disk data=/dev/vg/data \\
        --nbd unix:/run/vmferry/nbd.sock --qmp unix:/run/vmferry/qmp.sock \\
        --state-dir /var/lib/vmferry

  Wait for a migration into a new 20 GiB file:
    vmferry serve --disk root=/vm/root.img,create=on,size=20GiB \\
        --nbd unix:/run/vmferry/nbd.sock --qmp unix:/run/vmferry/qmp.sock \\
        --incoming tcp:0.0.0.0:4444

  The same for another machine monitor, whose guest is on the bridge br0:
    vmferry serve ... --incoming tcp:0.0.0.0:4444 --announce br0,mac=52:54:00:12:34:56

  Give a QEMU the disk:
    qemu-system-x86_64 ... -drive if=virtio,format=raw,\\
        file=nbd+unix:///root?socket=/run/vmferry/nbd.sock")]
pub(crate) struct ServeFlags {
    /// A disk: NAME=PATH[,OPTION...] (repeatable; --help lists the options)
    #[arg(long, value_name = "DISK", required = true, long_help = DISK_HELP)]
    #[arg(value_parser = disk_parser(), value_hint = ValueHint::FilePath)]
    pub(crate) disk: Vec<DiskFlag>,
    /// Listen for NBD clients here (repeatable)
    #[arg(long, value_name = "ADDR")]
    pub(crate) nbd: Vec<Uri>,
    /// Listen for control connections here (QMP)
    #[arg(long, value_name = "ADDR")]
    pub(crate) qmp: Option<Uri>,
    /// Wait for a migration here; the disks take no writes before it has completed. With "defer",
    /// QMP's migrate-incoming says where
    #[arg(long, value_name = "URI")]
    pub(crate) incoming: Option<IncomingFlag>,
    /// The migration sends only what lies in its disks' top layers (QEMU's migrate -i); the disks
    /// here are empty images over the same bases
    #[arg(long)]
    pub(crate) incremental: bool,
    /// Announce this guest NIC on the host's interface IFACE when a migration has arrived:
    /// IFACE[,mac=MAC] (repeatable)
    #[arg(long, value_name = "NIC", long_help = ANNOUNCE_HELP)]
    pub(crate) announce: Vec<AnnounceFlag>,
    /// Keep the record of where each disk lives here, not beside the disk (block devices need it)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state_dir: Option<PathBuf>,
    /// Serve this disk although its record says that it moved, is arriving or is leaving
    /// (repeatable)
    ///
    /// Only when you are sure that no other host serves it: what was written there is not here.
    #[arg(long, value_name = "NAME", value_parser = name_parser())]
    pub(crate) take_back: Vec<String>,
    /// Report each listener as a JSON object on standard output
    #[arg(long)]
    pub(crate) json: bool,
}

/// The daemon to talk to.
#[derive(Args, Debug)]
pub(crate) struct DaemonFlags {
    /// Control address of the running daemon
    #[arg(long, value_name = "ADDR")]
    pub(crate) qmp: Uri,
}

/// Limits of a migration.
#[derive(Args, Debug)]
pub(crate) struct LimitFlags {
    /// How long guests may have to wait at the switch-over, such as 300ms
    #[arg(long, value_name = "TIME")]
    pub(crate) downtime: Option<Millis>,
    /// How much may be sent, such as 100MiB/s, or "unlimited"
    #[arg(long, value_name = "RATE")]
    pub(crate) bandwidth: Option<Rate>,
}

/// Say how the migration of a running daemon stands.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry status --qmp unix:/run/vmferry/qmp.sock
  vmferry status --qmp unix:/run/vmferry/qmp.sock --json | jq .status")]
pub(crate) struct StatusFlags {
    #[command(flatten)]
    pub(crate) daemon: DaemonFlags,
    /// Print the daemon's answer (QMP query-migrate) as it is
    #[arg(long)]
    pub(crate) json: bool,
}

/// Cancel the migration of a running daemon.
///
/// The source serves on. From the moment on when the destination may have taken the disks, a
/// migration cannot be cancelled any more.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry cancel --qmp unix:/run/vmferry/qmp.sock")]
pub(crate) struct CancelFlags {
    #[command(flatten)]
    pub(crate) daemon: DaemonFlags,
}

/// Change the limits of a running daemon's migration.
///
/// They hold at once, for a migration that runs and for those that follow.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  A guest writes faster than its disk can be sent: let it wait longer, once.
    vmferry set --qmp unix:/run/vmferry/qmp.sock --downtime 2s
  vmferry set --qmp unix:/run/vmferry/qmp.sock --bandwidth unlimited")]
#[command(group = clap::ArgGroup::new("limit").args(["downtime", "bandwidth"]).required(true).multiple(true))]
pub(crate) struct SetFlags {
    #[command(flatten)]
    pub(crate) daemon: DaemonFlags,
    #[command(flatten)]
    pub(crate) limits: LimitFlags,
}

/// Decide which side has the disks after an undecided migration.
///
/// The connection broke between the last byte and the destination's answer, so this side holds its
/// disks: nothing is read or written. Look at the destination. If its guest runs, or its daemon
/// says that the migration completed, the disks live there.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  The destination never took over, the disks live here:
    vmferry resolve serve --qmp unix:/run/vmferry/qmp.sock

  The destination has them:
    vmferry resolve give-up --qmp unix:/run/vmferry/qmp.sock")]
pub(crate) struct ResolveFlags {
    /// What to do
    pub(crate) decision: Decision,
    #[command(flatten)]
    pub(crate) daemon: DaemonFlags,
}

/// What becomes of held disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Decision {
    /// The disks live here: let guests go on
    Serve,
    /// The disks live at the destination: end what guests wait for here with an error
    GiveUp,
}

/// Take a migration in without a daemon: disks into files, a machine into a file.
///
/// Ends when the migration has: with status 0 everything is whole and on stable storage.
///
/// What is saved of a machine with --save is a parked machine: vmferry send lets it run on, as does
/// any QEMU (-incoming \"exec:cat FILE\"). Without --disk its source may go into postcopy, too, and
/// while it waits after a broken connection, the address here stays open for the next one.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  Park a machine, whose QEMU is told to migrate here:
    vmferry receive tcp:0.0.0.0:4444 --save /vm/guest.migration

  Take a disk in, over TCP:
    vmferry receive tcp:0.0.0.0:4444 --disk root=/vm/root.img,create=on,size=20GiB

  Read a stream that was stored, and keep what is no disk (memory, devices):
    vmferry receive file:/backup/vm.stream --disk root=/vm/root.img,overwrite=on \\
        --save /backup/vm.rest")]
#[command(group = clap::ArgGroup::new("into").args(["disk", "save"]).required(true).multiple(true))]
pub(crate) struct ReceiveFlags {
    /// Where the migration comes from
    #[arg(value_name = "URI")]
    pub(crate) uri: Uri,
    /// A disk to fill: NAME=PATH[,OPTION...] (repeatable; --help lists the options)
    #[arg(long, value_name = "DISK", long_help = DISK_HELP)]
    #[arg(value_parser = disk_parser(), value_hint = ValueHint::FilePath)]
    pub(crate) disk: Vec<DiskFlag>,
    /// Keep the record of where each disk lives here, not beside the disk (block devices need it)
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) state_dir: Option<PathBuf>,
    /// The migration sends only what lies in its disks' top layers (QEMU's migrate -i); the disks
    /// here are empty images over the same bases
    #[arg(long, requires = "disk")]
    pub(crate) incremental: bool,
    /// Write the machine, which is the stream without its disks, to this new file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) save: Option<PathBuf>,
    /// Where the index of its pages goes (default: FILE.index)
    #[arg(long, value_name = "PATH", requires = "save", value_hint = ValueHint::FilePath)]
    pub(crate) index: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) multifd: MultifdFlags,
    /// Report the outcome as a JSON object (on standard error when the URI is -)
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show a live migration on this machine: two daemons, a disk under load, verified.
///
/// Starts two daemons, writes to a disk of the first through NBD, migrates the disk to the second
/// while the writing goes on, and then reads back every write that was acknowledged. All files are
/// in a folder of their own, which is removed at the end.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  vmferry demo
  vmferry demo --size 4GiB --seed 7")]
pub(crate) struct DemoFlags {
    /// Size of the disk
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    pub(crate) size: Size,
    /// What the writes derive from; printed, so that a run can be repeated
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Report the outcome as a JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

fn disk_parser() -> impl TypedValueParser<Value = DiskFlag> {
    OsStringValueParser::new().try_map(DiskFlag::try_from)
}

fn name_parser() -> impl TypedValueParser<Value = String> {
    OsStringValueParser::new().try_map(|name: OsString| disk::disk_name(&name))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    use super::*;

    fn parse(line: &str) -> Result<Command, ErrorKind> {
        Cli::try_parse_from(line.split(' '))
            .map(|cli| cli.command)
            .map_err(|error| error.kind())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_that_people_type_has_examples() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_long_help().map(ToString::to_string);
            assert!(
                help.is_some_and(|help| help.starts_with("Examples:")),
                "{}",
                command.get_name()
            );
        }
    }

    #[test]
    fn every_option_is_described() {
        for command in Cli::command().get_subcommands() {
            for option in command.get_arguments() {
                assert!(
                    option.get_help().is_some(),
                    "{} {}",
                    command.get_name(),
                    option.get_id()
                );
            }
        }
    }

    #[test]
    fn a_whole_migration_is_said_in_one_line() {
        let Ok(Command::Migrate(flags)) = parse(
            "vmferry migrate --qmp unix:/q tcp:h:1 --disk a --disk b --downtime 300ms \
             --bandwidth 100MiB/s --no-zero-blocks --one-way --json"
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
                .as_str(),
        ) else {
            panic!("not understood");
        };
        assert_eq!(
            flags.qmp.map(|qmp| qmp.to_string()).as_deref(),
            Some("unix:/q")
        );
        assert_eq!(flags.uri.to_string(), "tcp:h:1");
        assert_eq!(flags.disk, ["a", "b"]);
        assert_eq!(flags.limits.downtime, Some(Millis(300)));
        assert_eq!(
            flags.limits.bandwidth,
            Some(Rate::BytesPerSecond(100 << 20))
        );
        assert!(flags.no_zero_blocks && flags.one_way && flags.json);
        assert!(!flags.check && !flags.detach);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        use ErrorKind as E;
        for (line, kind) in [
            ("vmferry serve", E::MissingRequiredArgument),
            ("vmferry serve --disk a", E::ValueValidation),
            ("vmferry serve --disk a=b,format=vmdk", E::ValueValidation),
            (
                "vmferry serve --disk a=b --announce br0,mac=ff:ff:ff:ff:ff:ff",
                E::ValueValidation,
            ),
            ("vmferry migrate tcp:h:1", E::MissingRequiredArgument),
            ("vmferry migrate --qmp unix:q host:1", E::ValueValidation),
            (
                "vmferry migrate --qmp unix:q tcp:h:1 --check --detach",
                E::ArgumentConflict,
            ),
            (
                "vmferry migrate --qmp unix:q tcp:h:1 --downtime 300",
                E::ValueValidation,
            ),
            ("vmferry set --qmp unix:q", E::MissingRequiredArgument),
            ("vmferry resolve --qmp unix:q", E::MissingRequiredArgument),
            ("vmferry resolve perhaps --qmp unix:q", E::InvalidValue),
            ("vmferry receive tcp:h:1", E::MissingRequiredArgument),
            ("vmferry demo --size 1GB", E::ValueValidation),
            (
                "vmferry migrate --qmp unix:q --vm v tcp:h:1",
                E::ValueValidation,
            ),
            (
                "vmferry migrate --vm unix:v file:f --incremental",
                E::ArgumentConflict,
            ),
            (
                "vmferry migrate --qmp unix:q tcp:h:1 --index i",
                E::MissingRequiredArgument,
            ),
            (
                "vmferry receive - --disk a=b --index i",
                E::MissingRequiredArgument,
            ),
            (
                "vmferry receive - --save f --multifd-channels 0",
                E::ValueValidation,
            ),
            (
                "vmferry receive - --save f --multifd-compression zlib",
                E::MissingRequiredArgument,
            ),
            ("vmferry send", E::MissingRequiredArgument),
            ("vmferry send f", E::MissingRequiredArgument),
            ("vmferry send f tcp:h:1 --vm unix:q", E::ArgumentConflict),
            (
                "vmferry send f tcp:h:1 --resume",
                E::MissingRequiredArgument,
            ),
            ("vmferry send f tcp:h:1 --learn", E::MissingRequiredArgument),
            (
                "vmferry send f file:g --one-way --postcopy",
                E::ArgumentConflict,
            ),
            ("vmferry send f --vm unix:q --one-way", E::ArgumentConflict),
            (
                "vmferry send f tcp:h:1 --postcopy --multifd-channels 2",
                E::ArgumentConflict,
            ),
            ("vmferry convert f --to stream", E::MissingRequiredArgument),
            ("vmferry convert f -o g", E::MissingRequiredArgument),
            ("vmferry convert f -o g --to qcow2", E::InvalidValue),
        ] {
            assert_eq!(parse(line).map(|_| ()), Err(kind), "{line}");
        }
    }
}
