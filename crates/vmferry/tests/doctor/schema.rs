//! `vmferry schema`: what comes out, and the exit status.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::need;
use crate::outcome::{capture, failure, folder, printed};
use crate::peers::qemu::{Machine, Version};
use crate::peers::vmferry::{PROGRAM, run};

/// Excerpts of what two QEMUs dump.
fn excerpt(version: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vmstate/tests/schema");
    let path = folder.join(format!("qemu-{version}.json"));
    path.to_str().expect("test paths are UTF-8").to_owned()
}

fn objects(text: &str) -> Vec<Value> {
    let object = |line| serde_json::from_str(line).expect("each line is an object");
    text.lines().map(object).collect()
}

#[test]
fn two_programs_are_compared_device_by_device() {
    let (old, new) = (excerpt("7.2"), excerpt("10.0"));
    let text = printed(&run(["schema", "diff", &old, &new]), 1);
    let (heads, rest) = text.split_once("\n\n").expect("a blank line follows");
    assert_eq!(
        heads,
        format!(
            "OLD  {old}: pc-i440fx-7.2, 12 device types\n\
             NEW  {new}: pc-i440fx-7.2, 12 device types"
        )
    );
    assert_eq!(
        rest,
        "incompatible
  am53c974 (pciespscsi, version 2)
    OLD -> NEW  no       esp.drq_state: 1 byte read and not sent
                depends  esp.esp/pdma: not known to the receiver
    NEW -> OLD  no       esp.drq_state: 1 byte sent and not read
  vhost-user-fs-device (vhost-user-fs, version 0)
    OLD -> NEW  no       the sender cannot migrate it
    NEW -> OLD  no       the receiver cannot migrate it

depends
  e1000e (version 1)
    OLD -> NEW  depends  core.eitr_intr_pending sent, unused read: fits only under conditions or \
         at lengths that a schema does not tell
                depends  core.timadj: not sent, read under a condition
    NEW -> OLD  depends  unused sent, core.eitr_intr_pending read: fits only under conditions or \
         at lengths that a schema does not tell
                depends  core.timadj: not read, sent under a condition
  isa-i8259 (i8259, version 1)
    OLD -> NEW  yes
    NEW -> OLD  depends  i8259/ltim: not known to the receiver

only in OLD (1)
  PIIX3-xen

only in NEW (1)
  vmclock

6 compatible, 2 depend, 2 incompatible, 1 cannot be migrated, 1 only in OLD, 1 only in NEW
"
    );
}

#[test]
fn patterns_choose_devices_by_either_name() {
    let (old, new) = (excerpt("7.2"), excerpt("10.0"));
    let diff = |rest: &[&str]| run(["schema", "diff", &old, &new].iter().chain(rest));
    let text = printed(&diff(&["--device", "isa-*"]), 0);
    assert!(text.contains("isa-i8259 (i8259"), "{text}");
    assert!(
        text.ends_with("\n\n1 compatible, 1 depend, 0 incompatible\n"),
        "{text}"
    );
    let text = printed(
        &diff(&["--device", "pciesp*", "--device", "hpet", "--all"]),
        1,
    );
    assert!(
        text.contains("\ncompatible\n  hpet (version 2)\n"),
        "{text}"
    );
    assert!(
        text.contains("num_timers is read as num_timers_save\n"),
        "{text}"
    );
    let text = printed(&diff(&["--all"]), 1);
    assert!(
        text.contains("\nthe same (4)\n  rtl8139, isa-pit, mc146818rtc, fw_cfg_io\n"),
        "{text}"
    );
    assert!(
        text.contains("\ncannot be migrated (1)\n  nvme\n"),
        "{text}"
    );
    assert_eq!(
        failure(&diff(&["--device", "no-such"]), 2),
        "no device type has such a name"
    );
    let output = diff(&["--device", "["]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn with_json_each_device_is_an_object() {
    let (old, new) = (excerpt("7.2"), excerpt("10.0"));
    let lines = objects(&printed(&run(["schema", "diff", &old, &new, "--json"]), 1));
    let (summary, devices) = lines.split_last().expect("a summary is last");
    let names: Vec<_> = devices
        .iter()
        .map(|object| object["device"].clone())
        .collect();
    assert_eq!(
        json!(names),
        json!([
            "e1000e",
            "am53c974",
            "vhost-user-fs-device",
            "isa-i8259",
            "PIIX3-xen",
            "vmclock"
        ])
    );
    assert_eq!(
        devices[3],
        json!({
            "event": "device",
            "device": "isa-i8259",
            "description": "i8259",
            "presence": "both",
            "verdict": "depends",
            "old": {"version": 1, "minimum": 1},
            "new": {"version": 1, "minimum": 1},
            "new-loads-old": {"verdict": "yes", "reasons": [], "reasons-left-out": 0},
            "old-loads-new": {"verdict": "depends", "reasons-left-out": 0, "reasons": [{
                "verdict": "depends",
                "place": "i8259/ltim",
                "reason": "not known to the receiver",
            }]},
        })
    );
    assert_eq!(devices[5]["presence"], "new");
    assert_eq!(summary["event"], "summary");
    assert_eq!(summary["verdict"], "no");
    assert_eq!(
        (&summary["compatible"], &summary["incompatible"]),
        (&json!(6), &json!(2))
    );
    assert_eq!(summary["old"]["machine"], "pc-i440fx-7.2");
    let lines = objects(&printed(
        &run(["schema", "diff", &old, &new, "--json", "--all"]),
        1,
    ));
    assert_eq!(lines.len(), 13 + 1);
}

#[test]
fn a_stream_can_stand_for_the_old_program() {
    let dir = folder();
    let stream = capture(&dir, "pc-72");
    let text = printed(&run(["schema", "diff", &stream, &excerpt("10.0")]), 0);
    assert!(
        text.starts_with(&format!(
            "OLD  {stream}: a stream of pc-i440fx-7.2, 28 descriptions\n"
        )),
        "{text}"
    );
    assert!(
        text.contains("\nnot in NEW's schema (23)\n  timer, "),
        "{text}"
    );
    assert!(
        text.ends_with("\n\n5 compatible, 0 depend, 0 incompatible, 23 not in NEW's schema\n"),
        "{text}"
    );
    // Another machine does not take it.
    let other = dir.path().join("other.json");
    let schema = fs::read_to_string(excerpt("10.0")).expect("the excerpt is there");
    fs::write(&other, schema.replace("pc-i440fx-7.2", "microvm")).expect("it can be written");
    let other = other.to_str().expect("test paths are UTF-8");
    let text = printed(&run(["schema", "diff", &stream, other]), 0);
    assert!(
        text.contains("\nnote  the machine types differ: microvm does not take streams of pc-"),
        "{text}"
    );
    let line = failure(&run(["schema", "diff", &excerpt("7.2"), &stream]), 2);
    assert_eq!(
        line,
        format!("{stream}: NEW is a stream, which loads nothing; OLD may be one")
    );
}

#[test]
fn a_streams_schema_can_be_dumped_and_compared() {
    let dir = folder();
    let stream = capture(&dir, "isapc-100");
    let text = printed(&run(["schema", "dump", &stream]), 0);
    let schema: Value = serde_json::from_str(&text).expect("it is JSON");
    assert_eq!(schema["vmschkmachine"]["Name"], "isapc");
    let fields = schema["i8254"]["Description"]["Fields"]
        .as_array()
        .expect("it has fields");
    let channels = fields.iter().find(|field| field["field"] == "channels");
    assert_eq!(channels.expect("it has channels")["num"], 3);
    let dumped = dir.path().join("isapc.json");
    fs::write(&dumped, &text).expect("it can be written");
    let dumped = dumped.to_str().expect("test paths are UTF-8");
    let summary = "17 compatible, 0 depend, 0 incompatible\n";
    assert!(printed(&run(["schema", "diff", dumped, dumped]), 0).ends_with(summary));
    assert!(printed(&run(["schema", "diff", &stream, dumped]), 0).ends_with(summary));
    // From a pipe.
    let output = Command::new(PROGRAM)
        .args(["schema", "dump", "-"])
        .stdin(Stdio::from(fs::File::open(&stream).expect("it is there")))
        .output()
        .expect("vmferry can be run");
    assert_eq!(printed(&output, 0), text);
    assert_eq!(
        failure(&run(["schema", "dump", dumped]), 2),
        format!("{dumped}: it is a schema already")
    );
}

#[test]
fn what_cannot_be_read_is_said_in_one_line() {
    let dir = folder();
    let new = excerpt("10.0");
    let at = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).expect("it can be written");
        path.to_str().expect("test paths are UTF-8").to_owned()
    };
    let missing = dir
        .path()
        .join("missing")
        .to_str()
        .expect("UTF-8")
        .to_owned();
    for (path, why) in [
        (missing, "No such file or directory (os error 2)"),
        (
            at("list", b"[1, 2]"),
            "not a migration stream: magic 0x5b312c20 instead of 0x5145564d",
        ),
        (
            at("object", b"{}"),
            "not a schema as -dump-vmstate writes it: missing field",
        ),
        (
            at("cut", b"{\"vmschkmachine\": {"),
            "EOF while parsing an object at line 1 column 19",
        ),
        (at("empty", b""), "stream truncated inside the header"),
        (
            capture(&dir, "no-vmdesc-72"),
            "the stream has no description of its devices",
        ),
    ] {
        let line = failure(&run(["schema", "diff", &path, &new]), 2);
        assert!(line.contains(&path) && line.contains(why), "{line}");
    }
    let line = failure(&run(["schema", "diff", "-", "-"]), 2);
    assert_eq!(line, "only one of OLD and NEW can be standard input");
    let mut long = fs::read(&new).expect("the excerpt is there");
    long.resize((16 << 20) + 1, b' ');
    let line = failure(&run(["schema", "diff", &at("long", &long), &new]), 2);
    assert!(line.ends_with("a schema of more than 16.0 MiB"), "{line}");
    // With --json the failure is an object, too.
    let output = run(["schema", "diff", &at("object", b"{}"), &new, "--json"]);
    let objects = objects(&String::from_utf8_lossy(&output.stdout));
    assert_eq!(objects[0]["event"], "failed");
}

#[test]
fn names_cannot_command_a_terminal() {
    let dir = folder();
    let schema = fs::read_to_string(excerpt("7.2")).expect("the excerpt is there");
    let hostile = dir.path().join("hostile.json");
    let name = r#""\u001b[2Jam53c974""#;
    fs::write(&hostile, schema.replace("\"am53c974\"", name)).expect("it can be written");
    let hostile = hostile.to_str().expect("test paths are UTF-8");
    let text = printed(
        &run(["schema", "diff", hostile, &excerpt("10.0"), "--all"]),
        1,
    );
    assert!(text.contains("[2Jam53c974") && !text.contains('\u{1b}'));
}

#[test]
fn colours_are_only_for_terminals() {
    let diff = |variable: &str| {
        let mut command = Command::new(PROGRAM);
        command.args(["schema", "diff", &excerpt("7.2"), &excerpt("10.0")]);
        command.env_remove("NO_COLOR").env(variable, "1");
        command.output().expect("vmferry can be run")
    };
    let plain = printed(&diff("UNRELATED"), 1);
    assert!(!plain.contains('\u{1b}'));
    let coloured = printed(&diff("CLICOLOR_FORCE"), 1);
    assert!(coloured.contains('\u{1b}'));
    assert_eq!(without_colours(&coloured), plain);
}

fn without_colours(text: &str) -> String {
    let mut pieces = text.split('\u{1b}');
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |text, piece| {
        let (_, rest) = piece.split_once('m').expect("a colour ends in m");
        text + rest
    })
}

/// What a QEMU dumps.
fn dumped(version: Version, dir: &TempDir) -> Option<PathBuf> {
    let path = dir.path().join(format!("{version:?}.json"));
    let output = Command::new(version.program()?)
        .args([
            "-M",
            "pc-i440fx-7.2",
            "-accel",
            "tcg",
            "-nodefaults",
            "-nic",
            "none",
        ])
        .args(["-display", "none", "-dump-vmstate"])
        .arg(&path)
        .stdin(Stdio::null())
        .output()
        .expect("QEMU can be run");
    assert!(path.exists(), "{output:?}");
    Some(path)
}

/// A guest of 7.2 with these devices: does 10.0 load it, and what do we say?
#[test]
fn what_is_said_of_a_stream_is_what_happens() {
    let dir = folder();
    let schema = need!(dumped(Version::V10_0, &dir));
    for (device, loads) in [("am53c974", false), ("virtio-balloon-pci", true)] {
        let stream = dir.path().join(device);
        let machine = need!(Machine::new(Version::V7_2)).args(["-device", device, "-S"]);
        let mut sender = machine.start();
        let uri = format!("exec:cat > {}", stream.display());
        sender.qmp.execute("migrate", &json!({"uri": uri}));
        sender.migrated();
        sender.quit();
        let output = run([
            "schema".as_ref(),
            "diff".as_ref(),
            stream.as_os_str(),
            schema.as_os_str(),
        ]);
        let text = printed(&output, if loads { 0 } else { 1 });
        if !loads {
            assert!(
                text.contains("esp.drq_state: 1 byte read and not sent"),
                "{text}"
            );
        }
        assert_eq!(is_loaded(device, &stream), loads, "{device}");
    }
}

/// Does 10.0 load it?
fn is_loaded(device: &str, stream: &Path) -> bool {
    let machine = Machine::new(Version::V10_0).expect("it was found before");
    let args = ["-device", device, "-S", "-incoming", "defer"];
    let mut receiver = machine.args(args).start();
    let uri = format!("exec:cat {}", stream.display());
    let incoming = json!({"uri": uri, "exit-on-error": false});
    receiver.qmp.execute("migrate-incoming", &incoming);
    let end = receiver.migration_end();
    receiver.quit();
    end["status"] == "completed"
}
