//! Other people's NBD programs: `fio` as the guest's load, `qemu-nbd` as a server.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::{required, until};

/// A program on PATH, if it is there.
///
/// # Panics
/// If it is not, although `VMFERRY_REQUIRE_PEERS` says that all peers are.
pub(crate) fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file());
    if found.is_none() {
        assert!(
            !required(),
            "{name} is not on PATH, and VMFERRY_REQUIRE_PEERS is set"
        );
        println!("left out: needs {name} (scripts/peers)");
    }
    found
}

/// `fio` with its `nbd` engine against one export.
pub(crate) struct Fio {
    child: Child,
}

impl Fio {
    /// Starts one job with these options (`rw=randwrite`, `size=64m`, …); `None` if fio is not there.
    pub(crate) fn start<const N: usize>(uri: &str, options: [&str; N]) -> Option<Self> {
        let mut command = Command::new(tool("fio")?);
        command.args([
            "--name=load",
            "--ioengine=nbd",
            "--thread",
            "--output-format=json",
        ]);
        // Else it leaves a file in the current folder.
        command
            .arg("--verify_state_save=0")
            .arg(format!("--uri={uri}"));
        command.args(options.map(|option| format!("--{option}")));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().expect("fio can be run");
        Some(Self { child })
    }

    /// Waits for its end, which must be a good one; the report of its job.
    pub(crate) fn finish(self) -> Value {
        let output = self
            .child
            .wait_with_output()
            .expect("fio can be waited for");
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "fio ended with {}: {errors}{text}",
            output.status
        );
        // It may print notes before its report.
        let report = text.find('{').map_or("", |start| &text[start..]);
        let mut report: Value = serde_json::from_str(report)
            .unwrap_or_else(|error| panic!("fio's report ({error}): {text}{errors}"));
        report["jobs"][0].take()
    }
}

/// A `qemu-nbd` that serves one raw file; killed by its process id when dropped.
pub(crate) struct QemuNbd {
    child: Child,
    dir: TempDir,
}

impl QemuNbd {
    /// Serves `disk` as the export with the empty name; `None` if it is not there.
    pub(crate) fn start(disk: &Path) -> Option<Self> {
        let mut command = Command::new(tool("qemu-nbd")?);
        let dir = tempfile::Builder::new()
            .prefix("vmferry-nbd-")
            .tempdir()
            .expect("a temporary folder");
        let pid_file = dir.path().join("pid");
        command.args([
            "--format=raw",
            "--persistent",
            "--shared=8",
            "--discard=unmap",
        ]);
        command.arg("--socket").arg(dir.path().join("socket"));
        // Written once it listens.
        command
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(disk)
            .stdin(Stdio::null());
        let mut child = command.spawn().expect("qemu-nbd can be run");
        until("qemu-nbd to listen", || {
            let ended = child.try_wait().expect("a child can be waited for");
            assert!(ended.is_none(), "qemu-nbd ended: {ended:?}");
            pid_file.exists().then_some(())
        });
        Some(Self { child, dir })
    }

    /// Where it serves.
    pub(crate) fn uri(&self) -> String {
        format!(
            "nbd+unix:///?socket={}",
            self.dir.path().join("socket").display()
        )
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        // It may have ended already: nothing to do about either error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
