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

/// Runs a program to its end, which must be a good one; what it printed. `None` if it is not there.
pub(crate) fn run_tool<'a>(name: &str, args: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let outcome = try_tool(name, args)?;
    Some(outcome.unwrap_or_else(|said| panic!("{name} failed: {said}")))
}

/// Runs a program to its end; what it printed, as an error if it says that it failed. `None` if it is not there.
pub(crate) fn try_tool<'a>(
    name: &str,
    args: impl IntoIterator<Item = &'a str>,
) -> Option<Result<String, String>> {
    let mut command = Command::new(tool(name)?);
    let output = command.args(args).stdin(Stdio::null()).output();
    let output = output.expect("the program can be run");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Some(Ok(said));
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Some(Err(format!("{}: {errors}{said}", output.status)))
}

/// `fio` with its `nbd` engine against one export.
pub(crate) struct Fio {
    child: Child,
}

impl Fio {
    /// Starts one job with these options (`rw=randwrite`, `size=64m`, …); `None` if fio is not there.
    pub(crate) fn start<'a>(uri: &str, options: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        Self::spawn(&["--ioengine=nbd", &format!("--uri={uri}")], options)
    }

    /// The same on a file.
    pub(crate) fn on_file<'a>(
        path: &Path,
        options: impl IntoIterator<Item = &'a str>,
    ) -> Option<Self> {
        let file = format!("--filename={}", path.display());
        Self::spawn(&["--ioengine=psync", &file], options)
    }

    fn spawn<'a>(engine: &[&str], options: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let mut command = Command::new(tool("fio")?);
        command.args(["--name=load", "--thread", "--output-format=json"]);
        // Else it leaves a file in the current folder.
        command.arg("--verify_state_save=0").args(engine);
        command.args(options.into_iter().map(|option| format!("--{option}")));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().expect("fio can be run");
        Some(Self { child })
    }

    /// Waits for its end, which must be a good one; the report of its job.
    pub(crate) fn finish(self) -> Value {
        self.end(true)
    }

    /// Waits for its end, which must be a bad one because its disk is gone; the report of its job.
    pub(crate) fn interrupted(self) -> Value {
        self.end(false)
    }

    fn end(self, well: bool) -> Value {
        let output = self
            .child
            .wait_with_output()
            .expect("fio can be waited for");
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() == well,
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
