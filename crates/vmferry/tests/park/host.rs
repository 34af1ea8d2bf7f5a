//! A QEMU with monitors for everybody: the test's, one for `vmferry --vm`, and one that answers while a guest waits for
//! its memory.

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::monitor::Monitor;
use crate::peers::qemu::{Machine, Qemu};
use crate::peers::until;

/// Where a machine is, or will be.
pub(crate) struct Host {
    pub(crate) qemu: Qemu,
    monitors: TempDir,
}

impl Host {
    /// Where a machine starts.
    pub(crate) fn running(machine: Machine) -> Self {
        let monitors = tempfile::Builder::new()
            .prefix("vmferry-monitors-")
            .tempdir()
            .expect("a temporary folder");
        let [ours, other] = ["vm", "oob"].map(|name| {
            format!(
                "unix:{},server=on,wait=off",
                monitors.path().join(name).display()
            )
        });
        let qemu = machine.args(["-qmp", &ours, "-qmp", &other]).start();
        Self { qemu, monitors }
    }

    /// One that waits for a machine.
    pub(crate) fn waiting(machine: Machine) -> Self {
        Self::running(machine.args(["-incoming", "defer"]))
    }

    /// What `--vm` takes.
    pub(crate) fn vm(&self) -> String {
        format!("unix:{}", self.monitors.path().join("vm").display())
    }

    /// A monitor that answers while the guest waits for its memory.
    pub(crate) fn out_of_band(&self) -> Monitor {
        Monitor::connect(&self.monitors.path().join("oob"))
    }

    /// Switches capabilities of the next migration on.
    pub(crate) fn enable(&mut self, names: &[&str]) {
        let list: Vec<_> = names
            .iter()
            .map(|name| json!({"capability": name, "state": true}))
            .collect();
        let arguments = json!({"capabilities": list});
        self.qemu
            .qmp
            .execute("migrate-set-capabilities", &arguments);
    }

    /// Sets parameters of the next migration.
    pub(crate) fn set(&mut self, parameters: &Value) {
        self.qemu.qmp.execute("migrate-set-parameters", parameters);
    }

    /// What `query-migrate` says.
    pub(crate) fn migration(&mut self) -> Value {
        self.qemu.qmp.execute("query-migrate", &json!({}))
    }

    /// Waits until its migration is in this state.
    pub(crate) fn wait_migration(&mut self, wanted: &str) {
        until(&format!("the migration to be {wanted}"), || {
            let answer = self.migration();
            let status = answer["status"].as_str().unwrap_or_default();
            let is_over = ["completed", "failed", "cancelled"].contains(&status);
            assert!(
                status == wanted || !is_over,
                "{answer}; {}",
                self.qemu.errors()
            );
            (status == wanted).then_some(())
        });
    }

    /// The guest stands still.
    pub(crate) fn stop(&mut self) {
        self.qemu.qmp.execute("stop", &json!({}));
    }

    /// The guest runs on.
    pub(crate) fn cont(&mut self) {
        self.qemu.qmp.execute("cont", &json!({}));
    }

    /// One line for the human monitor; its answer.
    pub(crate) fn human(&mut self, line: &str) -> String {
        let arguments = json!({"command-line": line});
        let answer = self.qemu.qmp.execute("human-monitor-command", &arguments);
        answer.as_str().unwrap_or_default().to_owned()
    }
}
