//! Fresh images of QEMU 7.2 and 10.0 with snapshots and VM state: read, changed by us, read by QEMU.
//!
//! Each QEMU runs a machine without processors and memory, and does what its monitor is told. They
//! are found by `VMFERRY_QEMU72` and `VMFERRY_QEMU10` (`scripts/peers`); without them the tests say
//! so and pass, unless `VMFERRY_REQUIRE_PEERS` is 1.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use fastrand::Rng;
use vmferry_qcow2::{Qcow2Disk, open};

use crate::interop::{WRITE, assert_clean, assert_same, change, read_all};
use crate::snapshots::{assert_whole_stream, create_with_state, read_state};
use crate::support::{Folder, mixed_bytes, qemu_img_ok, rounds, seed};

struct Qemu(String);

impl Qemu {
    fn find(variable: &str) -> Option<Self> {
        let path = std::env::var(variable).ok();
        let path = path.filter(|path| Path::new(path).exists());
        if path.is_none() {
            let required = std::env::var("VMFERRY_REQUIRE_PEERS").is_ok_and(|value| value == "1");
            assert!(!required, "{variable} names no QEMU");
            println!("left out: needs {variable} (scripts/peers)");
        }
        path.map(Self)
    }

    /// Type these lines into its monitor, and leave.
    fn run(&self, image: &str, lines: &[String]) {
        let drive = format!("if=none,id=d0,format=qcow2,file={image}");
        let mut qemu = Command::new(&self.0)
            .args(["-accel", "tcg", "-machine", "none", "-nodefaults"])
            .args(["-nic", "none", "-display", "none", "-monitor", "stdio"])
            .args(["-drive", &drive])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let typed = lines.join("\n") + "\nquit\n";
        qemu.stdin
            .take()
            .unwrap()
            .write_all(typed.as_bytes())
            .unwrap();
        let output = qemu.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let told = String::from_utf8_lossy(&output.stdout);
        // What is typed comes back letter by letter, in lines of its own.
        let mut answers = told.lines().filter(|line| !line.contains('\x1b'));
        let failed = answers.find(|line| {
            let line = line.to_lowercase();
            line.contains("error") || line.contains("failed") || line.contains("invalid")
        });
        assert_eq!(failed, None, "{lines:?}");
    }
}

/// Writes and zeroes of a guest, in the model already.
fn guest_lines(rng: &mut Rng, model: &mut [u8]) -> Vec<String> {
    let mut line = || {
        let start = rng.usize(..model.len() / 512) * 512;
        let size = rng.usize(1..=200) * 512;
        let size = size.min(model.len() - start);
        let range = start..start + size;
        match rng.u8(..5) {
            0 => {
                model[range].fill(0);
                format!("qemu-io d0 \"write -z {start} {size}\"")
            }
            1 => {
                model[range].fill(0);
                format!("qemu-io d0 \"write -z -u {start} {size}\"")
            }
            _ => {
                let byte = rng.u8(1..);
                model[range].fill(byte);
                format!("qemu-io d0 \"write -P {byte} {start} {size}\"")
            }
        }
    };
    (0..12).map(|_| line()).collect()
}

struct Kept {
    name: String,
    model: Vec<u8>,
    state: Vec<u8>,
}

/// QEMU's snapshot brings its content back, on a copy of the image.
fn assert_applies(qemu: &Qemu, folder: &Folder, image: &str, kept: &Kept) {
    let (copy, raw) = (folder.path("copy.qcow2"), folder.path("copy.raw"));
    std::fs::copy(image, &copy).unwrap();
    qemu.run(&copy, &[format!("loadvm {}", kept.name)]);
    assert_clean(&copy);
    std::fs::write(&raw, &kept.model).unwrap();
    qemu_img_ok(&["compare", "-f", "qcow2", "-F", "raw", &copy, &raw]);
}

fn make(rng: &mut Rng, qemu: &Qemu, image: &str, options: &str, model: &mut [u8]) -> Vec<Kept> {
    let size = model.len().to_string();
    qemu_img_ok(&["create", "-q", "-f", "qcow2", "-o", options, image, &size]);
    let mut lines = Vec::new();
    let mut kept = Vec::new();
    for number in 0..4 {
        lines.extend(guest_lines(rng, model));
        let name = format!("theirs-{number}");
        lines.push(format!("savevm {name}"));
        kept.push(Kept {
            name,
            model: model.to_vec(),
            state: Vec::new(),
        });
    }
    lines.extend(guest_lines(rng, model));
    qemu.run(image, &lines);
    kept
}

/// What we do to it: one of QEMU's snapshots goes, one is applied, one of ours comes.
fn work(rng: &mut Rng, disk: &Qcow2Disk, model: &mut Vec<u8>, kept: &mut Vec<Kept>) {
    change(rng, disk, model, 25);
    let state = mixed_bytes(rng, 70_000);
    create_with_state(disk, "ours", &state);
    let ours = Kept {
        name: "ours".to_owned(),
        model: model.clone(),
        state,
    };
    change(rng, disk, model, 25);
    let gone = kept.remove(rng.usize(..kept.len()));
    disk.delete_snapshot(&gone.name).unwrap();
    let applied = &kept[rng.usize(..kept.len())];
    disk.apply_snapshot(&applied.name).unwrap();
    model.clone_from(&applied.model);
    assert_same(&read_all(disk), model);
    change(rng, disk, model, 25);
    kept.push(ours);
}

fn made_by(variable: &str) {
    let Some(qemu) = Qemu::find(variable) else {
        return;
    };
    let seed = seed();
    println!("VMFERRY_SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let shapes = [
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=8",
        "cluster_size=64k",
        "cluster_size=1k,compat=0.10",
        "cluster_size=2k,refcount_bits=64,lazy_refcounts=on",
        "cluster_size=2M",
    ];
    for number in 0..rounds(6) {
        let options = shapes[number as usize % shapes.len()];
        println!("{options}");
        let folder = Folder::new();
        let image = folder.path("image.qcow2");
        let mut model = vec![0; rng.usize(300..3000) * 512];
        let mut kept = make(&mut rng, &qemu, &image, options, &mut model);
        let disk = open(&image, WRITE).unwrap();
        assert_same(&read_all(&disk), &model);
        for kept in &mut kept {
            kept.state = read_state(&disk, &kept.name);
            assert_whole_stream(&kept.state, &kept.name, 0);
        }
        work(&mut rng, &disk, &mut model, &mut kept);
        disk.close().unwrap();
        assert_clean(&image);
        let disk = open(&image, WRITE).unwrap();
        assert_same(&read_all(&disk), &model);
        let found = disk.snapshots();
        let names: Vec<&str> = found.iter().map(|found| found.name.as_str()).collect();
        let expected: Vec<&str> = kept.iter().map(|kept| kept.name.as_str()).collect();
        assert_eq!(names, expected);
        for kept in &kept {
            assert!(read_state(&disk, &kept.name) == kept.state, "{}", kept.name);
        }
        disk.close().unwrap();
        let (ours, theirs) = kept.split_last().unwrap();
        for kept in theirs {
            assert_applies(&qemu, &folder, &image, kept);
        }
        // The state of ours is no stream, so that only its disk can be applied.
        qemu_img_ok(&["snapshot", "-q", "-a", &ours.name, &image]);
        let raw = folder.path("ours.raw");
        std::fs::write(&raw, &ours.model).unwrap();
        qemu_img_ok(&["compare", "-f", "qcow2", "-F", "raw", &image, &raw]);
        // And QEMU goes on with it: one of its own, then all are deleted.
        let mut lines = guest_lines(&mut rng, &mut model);
        lines.push("savevm last".to_owned());
        for kept in &kept {
            lines.push(format!("delvm {}", kept.name));
        }
        qemu.run(&image, &lines);
        assert_clean(&image);
        assert_eq!(open(&image, WRITE).unwrap().snapshots().len(), 1);
    }
}

#[test]
fn snapshots_of_7_2_apply_with_their_old_content() {
    made_by("VMFERRY_QEMU72");
}

#[test]
fn snapshots_of_10_0_apply_with_their_old_content() {
    made_by("VMFERRY_QEMU10");
}
