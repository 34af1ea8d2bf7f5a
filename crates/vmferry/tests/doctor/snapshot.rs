//! `vmferry snapshot`: what comes out, and the exit status.

use std::fs;

use serde_json::Value;
use tempfile::TempDir;
use vmferry_disk::BlockDevice;
use vmferry_qcow2::{ChainOptions, CreateOptions, FileStorage, Qcow2Disk};

use crate::outcome::{capture, failure, folder, printed};
use crate::peers::vmferry::run;

/// An empty image of 4 MiB.
fn image(dir: &TempDir, name: &str) -> String {
    let path = dir.path().join(name);
    let storage = FileStorage::create(&path, true).expect("a new file");
    vmferry_qcow2::create(&storage, &CreateOptions::new(4 << 20)).expect("a new image");
    path.to_str().expect("test paths are UTF-8").to_owned()
}

fn open(path: &str) -> Qcow2Disk {
    let options = ChainOptions {
        read_only: false,
        lock: true,
    };
    vmferry_qcow2::open(path, options).expect("an image that nobody uses")
}

fn write(path: &str, byte: u8) {
    let disk = open(path);
    disk.write_at(&[byte; 512], 0).expect("it can be written");
    disk.close().expect("it can be closed");
}

fn byte(path: &str) -> u8 {
    let mut byte = [0];
    open(path).read_at(&mut byte, 0).expect("it can be read");
    byte[0]
}

#[test]
fn snapshots_are_taken_listed_applied_and_deleted() {
    let dir = folder();
    let (a, b) = (image(&dir, "a"), image(&dir, "b"));
    write(&a, 1);
    write(&b, 2);
    assert_eq!(printed(&run(["snapshot", "create", "old", &a, &b]), 0), "");
    write(&a, 3);
    write(&b, 4);
    assert_eq!(printed(&run(["snapshot", "create", "odd", &b]), 0), "");
    let text = printed(&run(["snapshot", "list", &a, &b]), 0);
    assert!(text.contains("\n--     old "), "{text}");
    assert!(text.contains(&format!("\nOn {b} and not on all")), "{text}");
    let text = printed(&run(["snapshot", "list", "--json", &a, &b]), 0);
    let object: Value = serde_json::from_str(&text).expect("it is JSON");
    assert_eq!(object["whole"][0]["name"], "old");
    assert_eq!(object["whole"][0]["disk-size"], 4 << 20);
    assert_eq!(object["partial"][0]["snapshots"][0]["name"], "odd");
    let refused = failure(&run(["snapshot", "apply", "odd", &a, &b]), 1);
    assert_eq!(refused, format!("disk '{a}' has no snapshot 'odd'"));
    let refused = failure(&run(["snapshot", "create", "odd", &a, &b]), 1);
    assert_eq!(refused, format!("disk '{b}' has a snapshot 'odd' already"));
    assert_eq!((byte(&a), byte(&b)), (3, 4));
    assert_eq!(printed(&run(["snapshot", "apply", "old", &a, &b]), 0), "");
    assert_eq!((byte(&a), byte(&b)), (1, 2));
    assert_eq!(printed(&run(["snapshot", "delete", "old", &a, &b]), 0), "");
    assert_eq!(printed(&run(["snapshot", "delete", "odd", &a, &b]), 0), "");
    let text = printed(&run(["snapshot", "list", &a, &b]), 0);
    assert_eq!(text, "There is no snapshot that could be applied.\n");
    assert_eq!((byte(&a), byte(&b)), (1, 2));
    assert!(printed(&run(["check", &a]), 0).ends_with("clean\n"));
}

#[test]
fn the_state_of_a_machine_goes_in_and_comes_out() {
    let dir = folder();
    let (a, b) = (image(&dir, "a"), image(&dir, "b"));
    let stream = capture(&dir, "running-100");
    let import = run(["snapshot", "import", &a, "state", &stream, &b]);
    assert_eq!(printed(&import, 0), "");
    let out = dir.path().join("out");
    let out = out.to_str().expect("test paths are UTF-8");
    let export = run(["snapshot", "export", &a, "state", "-o", out]);
    assert_eq!(printed(&export, 0), "");
    assert!(fs::read(out).expect("it is there") == fs::read(&stream).expect("it is there"));
    let again = run(["snapshot", "export", &a, "state", "-o", out]);
    assert_eq!(again.status.code(), Some(2));
    let again = String::from_utf8_lossy(&again.stderr);
    assert!(
        again.contains("exists") && again.contains("--force"),
        "{again}"
    );
    let text = printed(&run(["snapshot", "list", "--json", &a, &b]), 0);
    let object: Value = serde_json::from_str(&text).expect("it is JSON");
    let clock = object["whole"][0]["vm-clock-ns"].as_u64();
    assert!(clock.is_some_and(|clock| clock > 0), "{object}");
    let shown = printed(&run(["inspect", &a, "--snapshot", "state"]), 0);
    assert_eq!(shown, printed(&run(["inspect", &stream]), 0));
    let none = failure(&run(["inspect", &b, "--snapshot", "state"]), 2);
    assert!(
        none.ends_with("snapshot 'state' holds no VM state"),
        "{none}"
    );
    let none = failure(&run(["inspect", &b, "--snapshot", "other"]), 2);
    assert!(none.contains("other"), "{none}");
    let none = failure(&run(["snapshot", "export", &b, "state", "-o", "-"]), 1);
    assert_eq!(
        none,
        format!("snapshot 'state' of disk '{b}' holds no VM state")
    );
}

#[test]
fn what_is_no_image_or_no_stream_is_refused() {
    let dir = folder();
    let a = image(&dir, "a");
    let stream = capture(&dir, "pc-100");
    let missing = failure(&run(["snapshot", "list", "/nowhere"]), 2);
    assert!(missing.contains("/nowhere"), "{missing}");
    let other = failure(&run(["snapshot", "list", &stream]), 2);
    assert!(other.contains("not a qcow2 image"), "{other}");
    let cut = dir.path().join("cut");
    let bytes = fs::read(&stream).expect("the stream is there");
    fs::write(&cut, &bytes[..9000]).expect("there is room");
    let cut = cut.to_str().expect("test paths are UTF-8");
    let broken = failure(&run(["snapshot", "import", &a, "state", cut]), 2);
    assert!(broken.contains("truncated"), "{broken}");
    let text = printed(&run(["snapshot", "list", &a]), 0);
    assert_eq!(text, "There is no snapshot that could be applied.\n");
    let used = open(&a);
    for args in [&["list", a.as_str()][..], &["create", "now", &a]] {
        let refused = run(["snapshot"].iter().chain(args));
        assert_eq!(refused.status.code(), Some(2), "{args:?}");
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert!(
            errors.contains("lock") && errors.contains("hint: if a vmferry daemon serves it"),
            "{errors}"
        );
    }
    drop(used);
}
