//! `vmferry extract`: what comes out of real QEMUs' streams, and how its files behave.

mod disks;
mod files;
mod gdb;
mod layout;
mod memory;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::peers::disk;
use crate::peers::guest::Guest;
use crate::peers::qemu::{Machine, Qemu, Version};
use crate::peers::vmferry::PROGRAM;

/// Bytes of the Linux guest's memory.
const RAM_BYTES: u64 = 128 << 20;

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Runs `vmferry extract` with these arguments.
fn extract(args: &[&str]) -> Output {
    let mut command = Command::new(PROGRAM);
    command.arg("extract").args(args).stdin(Stdio::null());
    command.output().expect("vmferry can be run")
}

/// Runs it; it must end well. The object that it reports.
#[track_caller]
fn extracted(args: &[&str]) -> Value {
    let output = extract(&[args, &["--json"]].concat());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    let object: Value = serde_json::from_slice(&output.stdout).expect("it reports an object");
    assert_eq!(
        (&object["event"], &object["whole"]),
        (&json!("extracted"), &json!(true))
    );
    object
}

/// A Linux guest that is up; its disk is in `dir`.
fn linux(version: Version, dir: &Path, churn: bool, args: &[&str]) -> Option<(Guest, Qemu)> {
    let path = dir.join("disk");
    disk::sparse(&path, 64 << 20, &[], &mut fastrand::Rng::new());
    let mut guest = Guest::new();
    let mut machine: Machine = guest.host(version, &path, churn)?;
    for arg in args {
        machine = machine.args([arg]);
    }
    let qemu = machine.start();
    guest.wait_more_ticks(2);
    Some((guest, qemu))
}

/// Migrates into a new file; the guest is stopped then.
fn migrate_into(qemu: &mut Qemu, uri: &str) {
    qemu.qmp.execute("migrate", &json!({"uri": uri}));
    qemu.migrated();
}

/// The URI of a pipe into a file.
fn pipe_into(path: &Path) -> String {
    format!("exec:cat > {}", path.display())
}

/// The memory of a stopped guest, as QEMU itself writes it into a file.
fn memory_of(qemu: &mut Qemu) -> PathBuf {
    let path = qemu.path("pmemsave");
    let range = json!({"val": 0, "size": RAM_BYTES, "filename": utf8(&path)});
    qemu.qmp.execute("pmemsave", &range);
    path
}
