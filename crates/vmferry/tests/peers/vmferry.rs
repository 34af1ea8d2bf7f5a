//! The program under test.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::{PATIENCE, until};

/// Where it was built.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_vmferry");

/// Runs a short command of it to its end.
pub(crate) fn run<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Output {
    let mut command = Command::new(PROGRAM);
    command.args(args).stdin(Stdio::null());
    command.output().expect("vmferry can be run")
}

/// Runs a short command of it, which must succeed; what it printed.
pub(crate) fn run_well<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> String {
    let output = run(args);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {errors}", output.status);
    String::from_utf8(output.stdout).expect("it prints UTF-8")
}

/// A running `vmferry … --json`; killed by its process id when dropped.
pub(crate) struct Vmferry {
    child: Child,
    reports: Receiver<Value>,
    dir: TempDir,
}

impl Vmferry {
    /// Starts it with these arguments and `--json`.
    pub(crate) fn start<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(args).stdin(Stdio::null());
        Self::spawn(command)
    }

    /// The same with something else than nothing as its standard input.
    pub(crate) fn start_with_input<'a>(
        args: impl IntoIterator<Item = &'a str>,
        input: impl Into<Stdio>,
    ) -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(args).stdin(input);
        Self::spawn(command)
    }

    /// Starts this command, which runs it, with `--json` at its end.
    pub(crate) fn spawn(mut command: Command) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("vmferry-run-")
            .tempdir()
            .expect("a temporary folder");
        let stderr =
            File::create(dir.path().join("stderr")).expect("a file in the temporary folder");
        command.arg("--json").stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().expect("vmferry can be run");
        let stdout = BufReader::new(child.stdout.take().expect("its output is a pipe"));
        let (sender, reports) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines() {
                let line = line.expect("its output can be read");
                let report = serde_json::from_str(&line)
                    .unwrap_or_else(|error| panic!("not JSON ({error}): {line}"));
                if sender.send(report).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            reports,
            dir,
        }
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a child can be signalled");
    }

    /// Its next report whose `event` is `name`; others before it are dropped.
    pub(crate) fn event(&mut self, name: &str) -> Value {
        loop {
            match self.reports.recv_timeout(PATIENCE) {
                Ok(report) if report["event"] == name => return report,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {
                    panic!("vmferry did not report {name}: {}", self.errors())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("vmferry ended without {name}: {}", self.errors())
                }
            }
        }
    }

    /// The address at which it listens, once it does.
    pub(crate) fn address(&mut self) -> String {
        let report = self.event("listening");
        report["address"]
            .as_str()
            .expect("a listening report has an address")
            .to_owned()
    }

    /// What it wrote to standard error so far.
    pub(crate) fn errors(&self) -> String {
        std::fs::read_to_string(self.stderr()).unwrap_or_default()
    }

    fn stderr(&self) -> PathBuf {
        self.dir.path().join("stderr")
    }

    /// Waits until it ends.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        until("vmferry to end", || {
            self.child.try_wait().expect("a child can be waited for")
        })
    }

    /// Waits until it ends, with status 0.
    pub(crate) fn succeeds(&mut self) {
        let status = self.wait();
        assert!(
            status.success(),
            "vmferry ended with {status}: {}",
            self.errors()
        );
    }

    /// Waits until it ends, with this status; the one line that says why. Only hints may follow it.
    pub(crate) fn fails(&mut self, code: i32) -> String {
        let status = self.wait();
        let errors = self.errors();
        assert_eq!(
            status.code(),
            Some(code),
            "vmferry ended with {status}: {errors}"
        );
        let (line, hints) = errors.split_once('\n').unwrap_or_default();
        assert!(!line.is_empty(), "a failure has a line that says why");
        assert!(
            hints.lines().all(|line| line.starts_with("hint: ")),
            "a failure is one line: {errors}"
        );
        line.to_owned()
    }
}

impl Drop for Vmferry {
    fn drop(&mut self) {
        // It may have ended already: nothing to do about either error.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("vmferry said: {}", self.errors());
        }
    }
}
