//! A daemon of the demo: this program, as a process of its own.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use vmferry_channel::Uri;
use vmferry_nbd::NbdUri;

use crate::child;
use crate::flags::LogFlags;

/// Name of the demo's disk.
pub(super) const DISK: &str = "disk0";

/// How long a daemon may take to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running `vmferry serve`.
#[derive(Debug)]
pub(super) struct Host {
    name: &'static str,
    child: Child,
    pub(super) nbd: NbdUri,
    pub(super) qmp: Uri,
    /// Where it waits for a migration.
    pub(super) incoming: Option<String>,
}

impl Host {
    /// Start one with its files in `folder`, and wait until it listens.
    pub(super) fn start(
        name: &'static str,
        folder: &Path,
        disk_options: &str,
        incoming: bool,
        log: LogFlags,
    ) -> Result<Self> {
        let socket = |kind: &str| Uri::Unix(folder.join(format!("{name}-{kind}")));
        let nbd = NbdUri {
            address: socket("nbd"),
            export: DISK.to_owned(),
        };
        let qmp = socket("qmp");
        // Commas of the path are doubled, as DISK wants it.
        let image = folder
            .join(format!("{name}.raw"))
            .display()
            .to_string()
            .replace(',', ",,");
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        command
            .args(["serve", "--json", &log.passed_on()])
            .args(["--disk", &format!("{DISK}={image}{disk_options}")])
            .args(["--nbd", &nbd.address.to_string()])
            .args(["--qmp", &qmp.to_string()])
            // Ctrl-C is for the demo, which then ends its daemons.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        if incoming {
            command.args(["--incoming", "tcp:127.0.0.1:0"]);
        }
        let child = command
            .spawn()
            .with_context(|| format!("start the {name} daemon"))?;
        let mut host = Self {
            name,
            child,
            nbd,
            qmp,
            incoming: None,
        };
        host.wait_until_it_listens(if incoming { 3 } else { 2 })?;
        Ok(host)
    }

    fn wait_until_it_listens(&mut self, listeners: usize) -> Result<()> {
        let Some(stdout) = self.child.stdout.take() else {
            bail!("the {} daemon has no output", self.name);
        };
        for line in BufReader::new(stdout).lines().take(listeners) {
            let report: Value = serde_json::from_str(&line.context("read what a daemon reports")?)
                .context("understand what a daemon reports")?;
            if report["what"] == "incoming" {
                self.incoming = report["address"].as_str().map(str::to_owned);
            }
        }
        if self.has_ended() {
            bail!("the {} daemon did not start", self.name);
        }
        Ok(())
    }

    fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Tell it to end, and see that it does so in order.
    pub(super) fn end(mut self) -> Result<()> {
        child::tell_to_end(&self.child);
        if !child::ends_within(&self.child, PATIENCE) {
            bail!("the {} daemon did not end", self.name);
        }
        let status = self
            .child
            .wait()
            .with_context(|| format!("wait for {}", self.name))?;
        if !status.success() {
            bail!("the {} daemon ended with {status}", self.name);
        }
        Ok(())
    }
}

/// Whatever happened, no daemon stays behind.
impl Drop for Host {
    fn drop(&mut self) {
        if self.has_ended() {
            return;
        }
        child::tell_to_end(&self.child);
        if !child::ends_within(&self.child, PATIENCE) {
            // Nothing that it could lose is of any worth.
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
