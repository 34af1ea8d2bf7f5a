//! Two daemons: a disk on the one, and the other waits for it.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::peers::disk;
use crate::peers::serve::Serve;
use crate::peers::vmferry::{Vmferry, run_well};

pub(crate) const MIB: u64 = 1 << 20;

/// Options of `migrate` that keep the bulk phase of 16 MiB going until [`let_go`] is called.
pub(crate) const SLOWLY: [&str; 2] = ["--bandwidth", "256KiB/s"];

pub(crate) struct Hosts {
    pub(crate) from: PathBuf,
    pub(crate) to: PathBuf,
    pub(crate) source: Serve,
    pub(crate) destination: Serve,
    /// Last, for it holds everybody's files.
    pub(crate) dir: TempDir,
}

impl Hosts {
    /// `disk0` of this size, full of random data.
    pub(crate) fn new(size: u64, rng: &mut fastrand::Rng) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let [from, to] = ["from", "to"].map(|name| dir.path().join(name));
        disk::random(&from, size, rng);
        let source = serve(dir.path(), "source", &from);
        let made = format!("disk0={},create=on,size={size}", to.display());
        let incoming = ["--disk", &made, "--incoming", "tcp:127.0.0.1:0"];
        let destination = Serve::start(dir.path(), "destination", incoming);
        Self {
            from,
            to,
            source,
            destination,
            dir,
        }
    }

    /// Starts to migrate, too slowly to be through before [`let_go`], and waits until it has begun.
    pub(crate) fn migrate_slowly(&self) -> Vmferry {
        let migrate = self.source.migrate(&self.destination.incoming(), SLOWLY);
        self.source.wait_status("active");
        migrate
    }
}

/// A daemon with `disk0`.
pub(crate) fn serve(dir: &Path, name: &str, disk: &Path) -> Serve {
    Serve::start(dir, name, ["--disk".to_owned(), disk_flag(disk)])
}

/// What `--disk` says of `disk0`.
pub(crate) fn disk_flag(disk: &Path) -> String {
    format!("disk0={}", disk.display())
}

/// From now on a migration that was started too slowly, and is still under way, may end.
pub(crate) fn let_go(source: &Serve) {
    let status = source.wait_status("active");
    assert_ne!(status["disk"]["remaining"], 0, "{status}");
    lift_limits(source);
}

/// A migration may be as fast as it can. Guests that dirty all of their disk again and again take a downtime.
pub(crate) fn lift_limits(source: &Serve) {
    let control = source.control();
    let limits = ["--bandwidth", "unlimited", "--downtime", "20s"];
    run_well(["set", "--qmp", &control].into_iter().chain(limits));
}
