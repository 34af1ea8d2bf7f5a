//! Snapshots of disks that a daemon serves: `vmferry snapshot … --qmp`, and the jobs beside those of a QEMU.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::need;
use crate::peers::guest::Guest;
use crate::peers::nbd::run_tool;
use crate::peers::qemu::{Machine, Version};
use crate::peers::qmp::Qmp;
use crate::peers::serve::Serve;
use crate::peers::vmferry::{run, run_well};
use crate::peers::{image, patterns, until};

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// An empty image of 4 MiB.
fn make(dir: &TempDir, name: &str) -> Option<PathBuf> {
    let path = dir.path().join(name);
    run_tool(
        "qemu-img",
        ["create", "-q", "-f", "qcow2", utf8(&path), "4M"],
    )?;
    Some(path)
}

/// What it printed on standard error; it must end with this status.
#[track_caller]
fn fails(output: &Output, status: i32) -> String {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{errors}");
    errors
}

fn write(daemon: &Serve, disk: &str, byte: u8) {
    let command = format!("write -P {byte} 1M 64k");
    let wrote = run_tool("qemu-io", ["-f", "raw", "-c", &command, &daemon.nbd(disk)]);
    assert!(wrote.is_some_and(|said| said.contains("wrote 65536")));
}

fn assert_reads(daemon: &Serve, disk: &str, byte: u8) {
    let command = format!("read -P {byte} 1M 64k");
    let read = run_tool("qemu-io", ["-f", "raw", "-c", &command, &daemon.nbd(disk)]);
    let read = read.expect("qemu-io is there");
    assert!(!read.contains("failed"), "{read}");
}

#[test]
fn disks_in_use_have_snapshots_through_the_control_socket() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (a, b) = (need!(make(&dir, "a")), need!(make(&dir, "b")));
    let flag = |name: &str, path: &Path| format!("{name}={},format=qcow2", path.display());
    let disks = ["--disk", &flag("root", &a), "--disk", &flag("data", &b)];
    let daemon = Serve::start(dir.path(), "host", disks);
    let control = daemon.control();
    let qmp = ["--qmp", control.as_str()];
    let snapshot = |args: &[&str]| run(["snapshot"].iter().chain(args).chain(&qmp));
    let well = |args: &[&str]| run_well(["snapshot"].iter().chain(args).chain(&qmp));

    write(&daemon, "root", 1);
    write(&daemon, "data", 2);
    assert_eq!(well(&["create", "old"]), "");
    assert_eq!(well(&["create", "odd", "data"]), "");
    write(&daemon, "root", 3);
    write(&daemon, "data", 4);
    let table = well(&["list"]);
    assert!(table.contains("\n--     old "), "{table}");
    assert!(table.contains("\nOn data and not on all"), "{table}");
    let live: Value = serde_json::from_str(&well(&["list", "--json"])).expect("JSON");
    assert_eq!(live["whole"][0]["name"], "old");
    assert_eq!(live["whole"][0]["disk-size"], 4 << 20);
    // One disk alone is shown with the ids of its snapshots.
    let table = well(&["list", "data"]);
    assert!(table.contains("\n2      odd "), "{table}");

    assert_eq!(well(&["apply", "old"]), "");
    assert_reads(&daemon, "root", 1);
    assert_reads(&daemon, "data", 2);
    assert_eq!(well(&["delete", "odd", "root", "data"]), "");

    for (args, status, why) in [
        (
            &["create", "old"][..],
            1,
            "error: disk 'root' has a snapshot 'old' already",
        ),
        (
            &["apply", "odd"],
            1,
            "error: disk 'root' has no snapshot 'odd'",
        ),
        (&["delete", "odd"], 1, "error: no disk has a snapshot 'odd'"),
        (
            &["create", "new", "root", "root"],
            2,
            "error: disk 'root' is named twice",
        ),
        (
            &["create", "new", "root.qcow2"],
            4,
            "error: the daemon has no disk 'root.qcow2'\nhint: it has: data, root",
        ),
        (&["create", ""], 1, "the snapshot's name"),
        (
            &["export", "root", "old", "-o", "-"],
            2,
            "unexpected argument '--qmp'",
        ),
    ] {
        let errors = fails(&snapshot(args), status);
        assert!(errors.contains(why), "{args:?}: {errors}");
    }
    // Without its address the images are somebody else's.
    for args in [&["list", utf8(&a)][..], &["create", "new", utf8(&a)]] {
        let errors = fails(&run(["snapshot"].iter().chain(args)), 2);
        let hint = "\nhint: if a vmferry daemon serves it, see --qmp of vmferry snapshot";
        assert!(errors.contains("lock") && errors.contains(hint), "{errors}");
    }
    let errors = fails(&run(["snapshot", "create", "new"]), 2);
    assert!(errors.contains("<DISK>"), "{errors}");

    daemon.end();
    let offline = run_well(["snapshot", "list", "--json", utf8(&a), utf8(&b)]);
    let offline: Value = serde_json::from_str(&offline).expect("JSON");
    assert_eq!(offline["whole"], live["whole"]);
    need!(image::assert_clean(&a));
    need!(image::assert_clean(&b));
}

#[test]
fn a_raw_disk_is_refused_by_name_before_anything_happens() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let a = need!(make(&dir, "a"));
    let raw = dir.path().join("raw");
    std::fs::write(&raw, [0; 4096]).expect("a file in the folder");
    let first = format!("root={},format=qcow2", a.display());
    let second = format!("data={}", raw.display());
    let third = format!("cd={},readonly=on", raw.display());
    let disks = ["--disk", &first, "--disk", &second];
    let daemon = Serve::start(dir.path(), "host", disks);
    let control = daemon.control();
    let refused = run(["snapshot", "create", "new", "--qmp", &control]);
    let errors = fails(&refused, 4);
    let why = "error: disk 'data' is raw, and only qcow2 images can have snapshots\n";
    assert!(errors.contains(why), "{errors}");
    let list = ["snapshot", "list", "root", "--json", "--qmp", &control];
    assert_eq!(run_well(list), "{\"partial\":[],\"whole\":[]}\n");
    daemon.end();
    // What is only read is no part of the machine's state.
    let daemon = Serve::start(dir.path(), "host", ["--disk", &first, "--disk", &third]);
    let control = daemon.control();
    assert_eq!(
        run_well(["snapshot", "create", "new", "--qmp", &control]),
        ""
    );
    daemon.end();
}

/// A job, as a client of QEMU's sees it: its states in their order, and what `query-jobs` says in the end.
fn job(qmp: &mut Qmp, command: &str, tag: &str) -> (Vec<String>, Value) {
    let mut arguments = json!({"job-id": "job0", "tag": tag, "devices": ["a", "b"]});
    if command != "snapshot-delete" {
        arguments["vmstate"] = json!("a");
    }
    qmp.execute(command, &arguments);
    let mut states = Vec::new();
    let mut wait_for = |qmp: &mut Qmp, last: &str| {
        while states.last().is_none_or(|state| state != last) {
            let event = qmp.event("JOB_STATUS_CHANGE");
            assert_eq!(event["data"]["id"], "job0");
            states.push(
                event["data"]["status"]
                    .as_str()
                    .expect("a status")
                    .to_owned(),
            );
        }
    };
    wait_for(qmp, "concluded");
    let mut jobs = qmp.execute("query-jobs", &json!({}));
    qmp.execute("job-dismiss", &json!({"id": "job0"}));
    wait_for(qmp, "null");
    assert_eq!(qmp.execute("query-jobs", &json!({})), json!([]));
    let mut job = jobs[0].take();
    // Each has its own words.
    if let Some(error) = job.get_mut("error") {
        *error = json!("some");
    }
    (states, job)
}

fn names(qmp: &mut Qmp) -> Vec<Value> {
    let nodes = qmp.execute("query-named-block-nodes", &json!({}));
    let nodes = nodes.as_array().expect("a list of nodes").iter();
    let of = |node: &Value| {
        let snapshots = node["image"]["snapshots"].as_array().cloned();
        let names = snapshots.unwrap_or_default().into_iter();
        json!([
            node["node-name"],
            names.map(|mut one| one["name"].take()).collect::<Value>()
        ])
    };
    let named = |node: &&Value| node["node-name"] == "a" || node["node-name"] == "b";
    let mut names: Vec<Value> = nodes.filter(named).map(of).collect();
    names.sort_by_key(|node| node[0].as_str().map(str::to_owned));
    names
}

#[test]
fn jobs_look_like_those_of_a_qemu() {
    let [theirs, ours] = [(); 2].map(|()| tempfile::tempdir().expect("a temporary folder"));
    let mut machine = need!(Machine::new(Version::V10_0));
    let mut disks = Vec::new();
    for name in ["a", "b"] {
        let path = need!(make(&theirs, name));
        let node = format!("driver=qcow2,node-name={name},file.driver=file,file.filename=");
        machine = machine.args(["-blockdev", &(node + utf8(&path))]);
        let path = need!(make(&ours, name));
        disks.extend([
            "--disk".to_owned(),
            format!("{name}={},format=qcow2", path.display()),
        ]);
    }
    let mut qemu = machine.start();
    let daemon = Serve::start(ours.path(), "host", disks);
    let mut qmp = daemon.qmp();
    for (command, tag) in [
        ("snapshot-save", "one"),
        ("snapshot-save", "two"),
        ("snapshot-save", "one"),
        ("snapshot-load", "one"),
        ("snapshot-delete", "one"),
        ("snapshot-delete", "one"),
        ("snapshot-load", "one"),
    ] {
        let expected = job(&mut qemu.qmp, command, tag);
        assert_eq!(job(&mut qmp, command, tag), expected, "{command} {tag}");
        assert_eq!(names(&mut qmp), names(&mut qemu.qmp), "{command} {tag}");
    }
    for arguments in [
        json!({"job-id": "1", "tag": "t", "vmstate": "a", "devices": ["a"]}),
        json!({"job-id": "job", "vmstate": "a", "devices": ["a"]}),
        json!({"job-id": "job", "tag": "t", "devices": ["a"]}),
        json!({"job-id": "job", "tag": "t", "vmstate": "a", "devices": "a"}),
    ] {
        let expected = qemu.qmp.try_execute("snapshot-save", &arguments);
        let expected = expected.expect_err("a QEMU refuses this");
        assert_eq!(qmp.try_execute("snapshot-save", &arguments), Err(expected));
    }
    qemu.quit();
    daemon.end();
}

/// A guest with a cache of its own, as most have.
#[test]
fn a_guest_sees_no_wrong_byte_while_snapshots_come_and_go() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("image");
    need!(run_tool(
        "qemu-img",
        ["create", "-q", "-f", "qcow2", utf8(&path), "32M"]
    ));
    let disk = format!("disk0={},format=qcow2", path.display());
    let daemon = Serve::start(dir.path(), "host", ["--disk", &disk]);
    let mut guest = Guest::new();
    let machine = need!(guest.host_of_patterns(daemon.nbd_socket(), "disk0", false));
    let mut qemu = machine.start();
    let ticks = guest.wait_more_ticks(5);
    let control = daemon.control();
    let mut number = 0;
    until("the guest to write much", || {
        let name = format!("snapshot {number}");
        run_well(["snapshot", "create", &name, "--qmp", &control]);
        if number >= 2 {
            let old = format!("snapshot {}", number - 2);
            run_well(["snapshot", "delete", &old, "--qmp", &control]);
        }
        number += 1;
        let now = guest.ticks().len() as u64;
        (number >= 10 && now >= ticks + 50).then_some(())
    });
    assert_eq!(qemu.run_state(), "running");
    qemu.qmp.execute("stop", &json!({}));
    qemu.quit();
    daemon.end();
    need!(image::assert_clean(&path));
    let raw = dir.path().join("raw");
    let select = format!("snapshot.name=snapshot {}", number - 1);
    let convert = ["convert", "-l", &select, "-f", "qcow2", "-O", "raw"];
    let files = [utf8(&path), utf8(&raw)];
    need!(run_tool("qemu-img", convert.into_iter().chain(files)));
    assert!(patterns::assert_patterns(&raw) > 0);
}
