//! Options of `vmferry send`.

use clap::{Args, ValueHint};
use vmferry_channel::Uri;

use super::convert::ImageFlags;
use super::disk::DiskFlag;
use super::disk_parser;
use super::multifd::MultifdFlags;
use super::rate::Rate;
use crate::output::{self, Out};

/// Let a parked machine run on: send it to a QEMU, all of it first or on demand.
///
/// Without --postcopy the guest runs when all of its memory has arrived. With --postcopy it runs at
/// once: its devices go first, the memory that it touches is sent when it touches it, and the rest
/// follows. The destination then needs this command until everything has arrived.
///
/// The parked file is only read: any number of machines may come out of it, also at the same time.
/// Not with disks that they write to, of course: each needs its own.
///
/// The URI leads to a QEMU that was started with the same machine, devices and memory and waits with
/// -incoming (for --postcopy with its capability postcopy-ram on). With --vm this command does all
/// that by itself: it takes a QEMU that was started with -incoming defer.
#[derive(Args, Debug)]
#[command(after_long_help = "Examples:
  At once, into a QEMU that waits with -incoming defer -qmp unix:/run/vm/qmp.sock,server=on,wait=off:
    vmferry send guest.migration --vm unix:/run/vm/qmp.sock --postcopy

  The connection broke, or this command died: the guest waits. Go on:
    vmferry send guest.migration --vm unix:/run/vm/qmp.sock --postcopy --resume

  Remember what a guest needs first, so that the next ones get it sooner:
    vmferry send guest.migration --vm unix:/run/vm/qmp.sock --postcopy --learn

  All of it first, to another host, whose QEMU waits with -incoming tcp:0.0.0.0:4444:
    vmferry send guest.migration tcp:host2:4444 --verify

  The state of a machine in a qcow2 snapshot:
    vmferry send root.qcow2 --snapshot running tcp:host2:4444

  With a disk, to a host whose vmferry takes it:
    vmferry send guest.migration tcp:host2:4444 --disk root=/vm/root.img")]
#[command(override_usage = "vmferry send [OPTIONS] <FILE> <URI|--vm <QMP>>")]
#[command(group = clap::ArgGroup::new("to").args(["uri", "vm"]).required(true))]
pub(crate) struct SendFlags {
    #[command(flatten)]
    pub(crate) image: ImageFlags,
    /// Where the destination waits
    #[arg(value_name = "URI")]
    pub(crate) uri: Option<Uri>,
    /// Or the QMP address of the destination: a QEMU that was started with -incoming defer
    #[arg(long, value_name = "QMP")]
    pub(crate) vm: Option<Uri>,
    /// A disk that travels along: NAME=PATH[,format=raw|qcow2] (repeatable); it is only read
    ///
    /// NAME is what the destination calls it. Two commas in a row are one comma of the name or path.
    /// The format is never guessed: without it the disk is raw, and refused if it starts like a qcow2
    /// image. A QEMU up to 9.0 takes it, or vmferry receive.
    #[arg(long, value_name = "DISK")]
    #[arg(value_parser = disk_parser(), value_hint = ValueHint::FilePath)]
    pub(crate) disk: Vec<DiskFlag>,
    /// Let the guest run at once, and send its memory as it needs it
    #[arg(long, conflicts_with_all = ["one_way", "multifd_channels"])]
    pub(crate) postcopy: bool,
    /// Go on with a postcopy that was interrupted; with a URI the destination must have been told
    /// where to wait (QMP migrate-recover)
    ///
    /// FILE must be the same: nobody can tell pages of one machine from those of another. Disks are
    /// there already, and do not travel again.
    #[arg(long, requires = "postcopy")]
    pub(crate) resume: bool,
    /// Afterwards keep, with the index, what the guest asked for first: the next postcopy sends that
    /// first
    #[arg(long, requires = "postcopy")]
    pub(crate) learn: bool,
    /// Check all of the file before anything is sent
    #[arg(long)]
    pub(crate) verify: bool,
    #[command(flatten)]
    pub(crate) multifd: MultifdFlags,
    /// How much may be sent, such as 100MiB/s, or "unlimited", which it is by default
    ///
    /// From the moment that a postcopy's guest is to run, nothing is held back.
    #[arg(long, value_name = "RATE")]
    pub(crate) bandwidth: Option<Rate>,
    /// The destination cannot answer: a file, or a pipe
    ///
    /// Nobody then says whether the machine arrived.
    #[arg(long, conflicts_with = "vm")]
    pub(crate) one_way: bool,
    /// Report as JSON objects, one a line (on standard error when the URI is -)
    #[arg(long)]
    pub(crate) json: bool,
}

impl SendFlags {
    /// Where reports go: standard output, unless that carries the stream.
    pub(crate) fn out(&self) -> Out {
        match self.uri {
            Some(Uri::Stdio | Uri::Fd(1)) => output::stderr(),
            _ => output::stdout(),
        }
    }
}
