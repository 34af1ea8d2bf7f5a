//! QEMU processes under QMP control.

use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::image::Format;
use super::qmp::Qmp;
use super::{find, until};

/// Bandwidth and downtime with which QEMU 7.2 `migrate -b` sends every block ("block migration" wire notes, §2): a
/// higher downtime limit lets it finish while its bulk phase still runs.
pub(crate) const EVERY_BLOCK: (u64, u64) = (1 << 40, 1);

/// Which QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    /// The last Debian has with `migrate -b`.
    V7_2,
    /// Neither sends nor takes `block` sections.
    V10_0,
}

impl Version {
    /// Its program, if `scripts/peers` got it.
    pub(crate) fn program(self) -> Option<PathBuf> {
        match self {
            Self::V7_2 => find("VMFERRY_QEMU72", "QEMU 7.2"),
            Self::V10_0 => find("VMFERRY_QEMU10", "QEMU 10.0"),
        }
    }
}

/// A QEMU to be started.
pub(crate) struct Machine {
    command: Command,
    dir: TempDir,
}

impl Machine {
    /// A machine of type `pc-i440fx-7.2`, which both versions know, with no devices beyond the chipset's; `None` if this
    /// QEMU is not there.
    pub(crate) fn new(version: Version) -> Option<Self> {
        let mut command = Command::new(version.program()?);
        command.args(["-M", "pc-i440fx-7.2", "-accel", "tcg", "-m", "64"]);
        command.args(["-nodefaults", "-nic", "none", "-display", "none"]);
        let dir = tempfile::Builder::new()
            .prefix("vmferry-qemu-")
            .tempdir()
            .expect("a temporary folder");
        Some(Self { command, dir })
    }

    /// More arguments.
    pub(crate) fn args<const N: usize>(mut self, args: [&str; N]) -> Self {
        self.command.args(args);
        self
    }

    /// A raw virtio disk called `name` in block migration.
    pub(crate) fn disk(self, name: &str, path: &Path) -> Self {
        self.disk_in(Format::Raw, name, path)
    }

    /// The same in this format.
    pub(crate) fn disk_in(mut self, format: Format, name: &str, path: &Path) -> Self {
        let path = path
            .to_str()
            .expect("test paths are UTF-8")
            .replace(',', ",,");
        self.command.args([
            "-drive",
            &format!("file={path},format={},if=virtio,id={name}", format.name()),
        ]);
        self
    }

    /// Starts it and waits until its monitor answers.
    pub(crate) fn start(mut self) -> Qemu {
        let socket = self.dir.path().join("qmp");
        let listener = UnixListener::bind(&socket).expect("a socket in the temporary folder");
        listener
            .set_nonblocking(true)
            .expect("a listener can be non-blocking");
        let errors = self.dir.path().join("stderr");
        let stderr = File::create(&errors).expect("a file in the temporary folder");
        self.command
            .args(["-qmp", &format!("unix:{}", socket.display())]);
        self.command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let mut child = self.command.spawn().expect("QEMU can be run");
        let stream = until("QEMU to connect to its monitor socket", || {
            if let Ok(Some(status)) = child.try_wait() {
                panic!(
                    "QEMU ended, {status}: {}",
                    std::fs::read_to_string(&errors).unwrap_or_default()
                );
            }
            listener.accept().ok().map(|(stream, _)| stream)
        });
        stream.set_nonblocking(false).expect("a socket can block");
        let qmp = Qmp::negotiate(stream);
        Qemu {
            child,
            qmp,
            dir: self.dir,
        }
    }
}

/// A running QEMU; killed by its process id when dropped.
pub(crate) struct Qemu {
    child: Child,
    /// Its monitor.
    pub(crate) qmp: Qmp,
    dir: TempDir,
}

impl Qemu {
    /// A path in a folder of its own.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What it wrote to standard error so far.
    pub(crate) fn errors(&self) -> String {
        std::fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    /// The run state: `running`, `paused`, `inmigrate`, `postmigrate`, …
    pub(crate) fn run_state(&mut self) -> String {
        let status = self.qmp.execute("query-status", &json!({}));
        status["status"]
            .as_str()
            .expect("query-status has a status")
            .to_owned()
    }

    /// Waits for a run state.
    pub(crate) fn wait_run_state(&mut self, wanted: &str) {
        until(&format!("QEMU to be {wanted}"), || {
            (self.run_state() == wanted).then_some(())
        });
    }

    /// Limits of the outgoing migration, in bytes a second and milliseconds.
    pub(crate) fn limits(&mut self, (bandwidth, downtime_ms): (u64, u64)) {
        let limits = json!({"max-bandwidth": bandwidth, "downtime-limit": downtime_ms});
        self.qmp.execute("migrate-set-parameters", &limits);
    }

    /// Starts to migrate with all disks (`migrate -b`, 7.2 only).
    pub(crate) fn migrate_with_disks(&mut self, uri: &str) {
        self.qmp
            .execute("migrate", &json!({"uri": uri, "blk": true}));
    }

    /// Waits until this side's migration, outgoing or incoming, has ended; the answer of `query-migrate`.
    pub(crate) fn migration_end(&mut self) -> Value {
        until("the migration to end", || {
            let answer = self.qmp.execute("query-migrate", &json!({}));
            let ended = matches!(
                answer["status"].as_str(),
                Some("completed" | "failed" | "cancelled")
            );
            ended.then_some(answer)
        })
    }

    /// Waits until this side's migration has ended well.
    pub(crate) fn migrated(&mut self) {
        let answer = self.migration_end();
        assert_eq!(answer["status"], "completed", "{answer}; {}", self.errors());
    }

    /// Listens for a migration on a socket of its own (needs `-incoming defer`); the URI for the source.
    pub(crate) fn listen(&mut self) -> String {
        let uri = format!("unix:{}", self.path("incoming").display());
        self.qmp.execute("migrate-incoming", &json!({"uri": uri}));
        uri
    }

    /// Whether its process is no more.
    pub(crate) fn has_ended(&mut self) -> bool {
        let ended = self.child.try_wait().expect("a child can be waited for");
        ended.is_some()
    }

    /// Ends it in good order, so that its disks are closed and unlocked.
    pub(crate) fn quit(mut self) {
        self.qmp.execute("quit", &json!({}));
        until("QEMU to quit", || self.has_ended().then_some(()));
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended already: nothing to do about either error.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("QEMU said: {}", self.errors());
        }
    }
}
