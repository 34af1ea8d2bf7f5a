//! `vmferry diff`: what comes out, and the exit status.

use std::fs;

use serde_json::{Value, json};

use crate::need;
use crate::outcome::{capture, failure, folder, printed};
use crate::peers::qemu::{Machine, Version};
use crate::peers::vmferry::run;

#[test]
fn equal_streams_end_with_0_and_say_nothing() {
    let dir = folder();
    let stream = capture(&dir, "pc-100");
    assert_eq!(printed(&run(["diff", &stream, &stream]), 0), "");
    let contents = run(["diff", "--contents", "--all", &stream, &stream]);
    assert_eq!(printed(&contents, 0), "");
    let json = printed(&run(["diff", "--json", &stream, &stream]), 0);
    assert_eq!(json, "{\"differences\":[]}\n");
}

#[test]
fn differences_are_told_by_part_and_field() {
    let dir = folder();
    let (old, new) = (capture(&dir, "pc-72"), capture(&dir, "pc-7.2-100"));
    let text = printed(&run(["diff", &old, &new]), 1);
    assert_eq!(
        text,
        "\
device 'globalstate' 0
  has_vm_was_suspended: only in the second
  runstate: 100 B → 32 B
  unused: only in the second
  vm_was_suspended: only in the second
device 'hpet' 0
  num_timers: only in the first
  num_timers_save: only in the second
"
    );
    let text = printed(&run(["diff", "--device", "hpet", &old, &new]), 1);
    assert_eq!(text.lines().count(), 3, "{text}");
    assert_eq!(
        printed(&run(["diff", "--device", "cpu", &old, &new]), 0),
        ""
    );
    let text = printed(&run(["diff", "--json", &old, &new]), 1);
    let object: Value = serde_json::from_str(&text).expect("it is JSON");
    assert_eq!(
        object["differences"][0],
        json!({
            "part": "device 'globalstate' 0",
            "field": "has_vm_was_suspended",
            "kind": "only-second",
        })
    );
}

#[test]
fn contents_are_compared_only_if_asked_for_and_never_shown() {
    let dir = folder();
    let stream = capture(&dir, "blk-72");
    let other = dir.path().join("other");
    let mut bytes = fs::read(&stream).expect("the stream is there");
    // A byte in the first chunk that was sent: QEMU sends them as they were read.
    bytes[0x10_0000] ^= 1;
    fs::write(&other, bytes).expect("there is room");
    let other = other.to_str().expect("test paths are UTF-8");
    assert_eq!(printed(&run(["diff", &stream, other]), 0), "");
    assert_eq!(
        printed(&run(["diff", "--contents", &stream, other]), 1),
        "disk 'dd'\n  1 piece of 1.00 MiB differs, the first at 0x200000\n"
    );
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let dir = folder();
    let stream = capture(&dir, "pc-100");
    let missing = failure(&run(["diff", &stream, "/nowhere"]), 2);
    assert!(missing.starts_with("/nowhere: No such file"), "{missing}");
    let twice = failure(&run(["diff", "-", "-"]), 2);
    assert!(twice.contains("standard input"), "{twice}");
    let piped = failure(&run(["diff", "--contents", "-", &stream]), 2);
    assert!(piped.contains("standard input"), "{piped}");
    let cut = dir.path().join("cut");
    let bytes = fs::read(&stream).expect("the stream is there");
    fs::write(&cut, &bytes[..9000]).expect("there is room");
    let cut = cut.to_str().expect("test paths are UTF-8");
    let output = run(["diff", &stream, cut]);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("truncated") && error.contains("compared"),
        "{error}"
    );
}

/// The same machine, started twice: only its clocks differ, and those are told only if asked for.
#[test]
fn two_saves_of_one_machine_differ_in_its_clocks() {
    for version in [Version::V7_2, Version::V10_0] {
        let dir = folder();
        let mut saves = Vec::new();
        for name in ["first", "second"] {
            let path = dir.path().join(name);
            let path = path.to_str().expect("test paths are UTF-8").to_owned();
            let machine = need!(Machine::new(version)).args(["-device", "isa-serial", "-S"]);
            let mut qemu = machine.start();
            let uri = json!({ "uri": format!("exec:cat > {path}") });
            qemu.qmp.execute("migrate", &uri);
            qemu.migrated();
            qemu.quit();
            saves.push(path);
        }
        let [first, second] = saves.as_slice() else {
            panic!("two saves");
        };
        assert_eq!(printed(&run(["diff", first, second]), 0), "");
        let all = printed(&run(["diff", "--all", first, second]), 1);
        assert!(all.starts_with("device 'mc146818rtc' 0\n"), "{all}");
        assert!(all.contains("  last_update: 0x"), "{all}");
    }
}
