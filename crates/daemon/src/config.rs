//! What a daemon is started with: plain data.

use std::path::PathBuf;
use std::sync::Arc;

use vmferry_channel::{Listener, Uri};
use vmferry_disk::Node;
use vmferry_migration::{Coverage, RecordFile, Start};
use vmferry_qcow2::Qcow2Disk;
use vmferry_qmp::types::{VersionInfo, VersionTriple};
use vmferry_relay::announce::Announcer;

/// Everything that a daemon serves, and where.
#[derive(Debug)]
pub struct Config {
    /// Name of the daemon, for `query-name`.
    pub name: Option<String>,
    /// The disks, in their order. Names are unique.
    pub disks: Vec<Disk>,
    /// Where NBD clients come.
    pub nbd: Vec<Listener>,
    /// Where QMP clients come.
    pub qmp: Vec<Listener>,
    /// Where a migration comes, if one is expected.
    pub incoming: Option<Incoming>,
    /// What it must bring. QMP's `block-incremental` makes it [`Coverage::Incremental`], too.
    pub coverage: Coverage,
    /// NICs of guests, which `announce-self` and the arrival of a migration announce.
    pub nics: Vec<Box<dyn Announcer>>,
}

/// A disk with everything that is known of it.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The disk. It rests with [`vmferry_disk::Hold::Writes`] if `start` is [`Start::Waiting`], else
    /// with nothing held.
    pub node: Arc<Node>,
    /// Where it is written down where the disk lives.
    pub record: Option<RecordFile>,
    /// How it begins, as [`vmferry_migration::start`] says.
    pub start: Start,
    /// Somebody has said that it lives here, whatever its record says.
    pub taken_back: bool,
    /// The other side, for a disk that begins [`Start::Undecided`].
    pub peer: String,
    /// The image, for people.
    pub path: PathBuf,
    /// Its format: `raw` or `qcow2`.
    pub format: &'static str,
    /// The device of `node`, if it can have internal snapshots.
    pub image: Option<Arc<Qcow2Disk>>,
}

/// How a migration comes in.
#[derive(Debug)]
pub enum Incoming {
    /// Through connections to this listener, one at a time, until one has succeeded.
    Listener(Listener),
    /// Through a channel that is opened once: `exec:`, `fd:`, `file:`, `-`.
    Once(Uri),
    /// Later: `migrate-incoming` says where.
    Deferred,
}

/// The version that QMP clients see: the QEMU whose QMP this is closest to, and our own.
#[must_use]
pub fn version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple {
            major: 10,
            minor: 0,
            micro: 0,
        },
        package: concat!("vmferry ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}
