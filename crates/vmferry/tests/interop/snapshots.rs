//! Internal snapshots with VM state, made by us and started by QEMU 7.2 and 10.0, and the other way round.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;
use tempfile::TempDir;
use vmferry_disk::BlockDevice;
use vmferry_qcow2::{CreateOptions, FileStorage, NewSnapshot, OpenOptions, Qcow2Disk, create};

use crate::need;
use crate::peers::image::Format;
use crate::peers::nbd::run_tool;
use crate::peers::qemu::{Machine, Qemu, Version};
use crate::peers::{seeded, until};

const DISK_BYTES: usize = 3 << 20;

/// The whole program of the guest: it counts passes over 128 pages at [`PASSES`] in each of them, for ever.
///
/// ```text
/// cli; ss = 0; sp = 7000h; dl = 'A'; ebp = 0
/// pass:  bx = 1000h
/// page:  ds = bx; inc dword [10h]; [20h] = ebp; dword [800h] = deadbeefh; bx += 100h; bx < 9000h: page
///        inc ebp; out 3f8h, (bp & 1fh) + 'A'; 4000h times nothing; pass
/// ```
const FIRMWARE: [u8; 71] = [
    0xfa, 0x31, 0xc0, 0x8e, 0xd0, 0xbc, 0x00, 0x70, 0xb2, 0x41, 0x66, 0x31, 0xed, 0xbb, 0x00, 0x10,
    0x8e, 0xdb, 0x66, 0xff, 0x06, 0x10, 0x00, 0x66, 0x89, 0x2e, 0x20, 0x00, 0x66, 0xc7, 0x06, 0x00,
    0x08, 0xef, 0xbe, 0xad, 0xde, 0x81, 0xc3, 0x00, 0x01, 0x81, 0xfb, 0x00, 0x90, 0x72, 0xe1, 0x66,
    0x45, 0xba, 0xf8, 0x03, 0x89, 0xe8, 0x24, 0x1f, 0x04, 0x41, 0xee, 0x66, 0xb9, 0x00, 0x40, 0x00,
    0x00, 0x66, 0x49, 0x75, 0xfc, 0xeb, 0xc6,
];
/// Where a processor starts: a jump to the first byte of the firmware.
const RESET: (usize, [u8; 5]) = (0xfff0, [0xea, 0x00, 0x00, 0x00, 0xf0]);
/// Where the guest counts, as its monitor writes it.
const PASSES: &str = "0x10010";

struct Host {
    dir: TempDir,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let mut firmware = vec![0; 64 << 10];
        firmware[..FIRMWARE.len()].copy_from_slice(&FIRMWARE);
        firmware[RESET.0..][..RESET.1.len()].copy_from_slice(&RESET.1);
        std::fs::write(dir.path().join("firmware"), firmware).expect("a file in the folder");
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A guest on the image.
    fn machine(&self, version: Version) -> Option<Machine> {
        let firmware = self.path("firmware");
        let machine = Machine::new(version)?
            .args(["-bios", utf8(&firmware), "-serial", "null"])
            .disk_in(Format::Qcow2, "disk0", &self.path("image"));
        Some(machine)
    }

    fn open(&self) -> Qcow2Disk {
        let storage =
            FileStorage::open(self.path("image"), false, true).expect("the image is free");
        let options = OpenOptions::default();
        Qcow2Disk::open(Arc::new(storage), options, None).expect("the image can be opened")
    }

    /// The image is what its structures say, and its disk holds this.
    fn assert_holds(&self, content: &[u8]) {
        let image = self.path("image");
        run_tool("qemu-img", ["check", "-q", "-f", "qcow2", utf8(&image)]);
        let disk = self.open();
        let mut read = vec![0; DISK_BYTES];
        disk.read_at(&mut read, 0).expect("the disk can be read");
        assert!(
            read == content,
            "the disk does not hold what the snapshot holds"
        );
    }
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

fn monitor(qemu: &mut Qemu, line: &str) -> String {
    let arguments = json!({"command-line": line});
    let answer = qemu.qmp.execute("human-monitor-command", &arguments);
    answer.as_str().unwrap_or_default().to_owned()
}

/// How many passes the guest has made.
fn passes(qemu: &mut Qemu) -> u32 {
    let answer = monitor(qemu, &format!("xp /1wx {PASSES}"));
    let word = answer.split("0x").last().unwrap_or_default().trim();
    u32::from_str_radix(word, 16).unwrap_or_else(|_| panic!("no number: {answer:?}"))
}

/// The guest goes on from where it was, and not from its start.
fn assert_goes_on(qemu: &mut Qemu, from: u32) {
    assert_eq!(passes(qemu), from, "{}", qemu.errors());
    qemu.qmp.execute("cont", &json!({}));
    until("the guest to go on", || {
        (passes(qemu) > from + 3).then_some(())
    });
}

/// Runs a guest for a while; how far it got, and its migration stream.
fn run_and_save(host: &Host, version: Version) -> Option<(u32, Vec<u8>)> {
    let stream = host.path("stream");
    let mut qemu = host.machine(version)?.start();
    until("the guest to make some passes", || {
        (passes(&mut qemu) > 20).then_some(())
    });
    qemu.qmp.execute("stop", &json!({}));
    let made = passes(&mut qemu);
    let uri = format!("exec:cat > {}", utf8(&stream));
    qemu.qmp.execute("migrate", &json!({"uri": uri}));
    qemu.migrated();
    qemu.quit();
    Some((made, std::fs::read(stream).expect("QEMU wrote the stream")))
}

/// A snapshot whose VM state is an ordinary stream: both QEMUs start from it, whichever wrote the stream.
fn ours_starts(saver: Version, starters: &[Version], cluster_bits: u32) {
    let mut rng = seeded();
    let host = Host::new();
    let storage = FileStorage::create(host.path("image"), true).expect("a new file");
    let options = CreateOptions {
        cluster_bits,
        ..CreateOptions::new(DISK_BYTES as u64)
    };
    create(&storage, &options).expect("a new image");
    drop(storage);
    let Some((made, stream)) = run_and_save(&host, saver) else {
        return;
    };
    let kept: Vec<u8> = std::iter::repeat_with(|| rng.u8(..))
        .take(DISK_BYTES)
        .collect();
    let disk = host.open();
    disk.write_at(&kept, 0).expect("the disk can be written");
    let mut writer = disk.vm_state_writer().expect("a state can be written");
    writer.write_all(&stream).expect("a state can be written");
    let new = NewSnapshot {
        name: "ours",
        date: (1_700_000_000, 0),
        guest_nanoseconds: 1_000_000_000,
        vm_state_bytes: writer.finish().expect("a state can be written"),
        icount: None,
    };
    disk.create_snapshot(&new).expect("a snapshot can be made");
    disk.write_at(&vec![0xAA; DISK_BYTES], 0)
        .expect("the disk can be written");
    disk.close().expect("the image can be closed");
    for starter in starters {
        let machine = need!(host.machine(*starter)).args(["-loadvm", "ours", "-S"]);
        let mut qemu = machine.start();
        assert_goes_on(&mut qemu, made);
        qemu.quit();
        host.assert_holds(&kept);
        // For the next one.
        let disk = host.open();
        disk.write_at(&vec![0xBB; DISK_BYTES], 0)
            .expect("the disk can be written");
        disk.close().expect("the image can be closed");
    }
}

#[test]
fn both_qemus_start_from_a_snapshot_with_the_state_of_7_2() {
    ours_starts(Version::V7_2, &[Version::V7_2, Version::V10_0], 16);
}

#[test]
fn both_qemus_start_from_a_snapshot_with_the_state_of_10_0() {
    ours_starts(Version::V10_0, &[Version::V10_0, Version::V7_2], 12);
}

/// QEMU's own snapshots stay what they are while we make, apply and delete ours beside them.
fn theirs_stays(version: Version) {
    let host = Host::new();
    let storage = FileStorage::create(host.path("image"), true).expect("a new file");
    create(&storage, &CreateOptions::new(DISK_BYTES as u64)).expect("a new image");
    drop(storage);
    let disk = host.open();
    let kept = vec![0x5C; DISK_BYTES];
    disk.write_at(&kept, 0).expect("the disk can be written");
    disk.close().expect("the image can be closed");
    let mut qemu = need!(host.machine(version)).start();
    until("the guest to make some passes", || {
        (passes(&mut qemu) > 20).then_some(())
    });
    assert_eq!(monitor(&mut qemu, "savevm other"), "");
    qemu.qmp.execute("stop", &json!({}));
    let made = passes(&mut qemu);
    assert_eq!(monitor(&mut qemu, "savevm theirs"), "");
    qemu.quit();

    let disk = host.open();
    let found = disk.snapshots();
    let names: Vec<&str> = found.iter().map(|known| known.name.as_str()).collect();
    assert_eq!(names, ["other", "theirs"]);
    let mut stream = Vec::new();
    let mut reader = disk.vm_state_reader("theirs").expect("it has a state");
    reader
        .read_to_end(&mut stream)
        .expect("the state can be read");
    assert_eq!(stream.len() as u64, found[1].vm_state_bytes);
    let report = vmferry_inspect::Report::of(&stream[..]);
    assert!(report.end.is_ok(), "{:?}", report.end);

    disk.write_at(&vec![1; DISK_BYTES], 0).expect("a write");
    let mut writer = disk.vm_state_writer().expect("a state can be written");
    writer.write_all(&stream).expect("a state can be written");
    let new = NewSnapshot {
        name: "copy",
        date: (1_700_000_000, 0),
        guest_nanoseconds: 0,
        vm_state_bytes: writer.finish().expect("a state can be written"),
        icount: None,
    };
    disk.create_snapshot(&new).expect("a snapshot can be made");
    disk.write_at(&vec![2; DISK_BYTES], 0).expect("a write");
    disk.apply_snapshot("theirs").expect("it can be applied");
    disk.write_at(&vec![3; DISK_BYTES / 2], 0).expect("a write");
    disk.delete_snapshot("other").expect("it can be deleted");
    disk.close().expect("the image can be closed");

    for (name, content) in [("theirs", kept), ("copy", vec![1; DISK_BYTES])] {
        let machine = need!(host.machine(version)).args(["-loadvm", name, "-S"]);
        let mut qemu = machine.start();
        assert_goes_on(&mut qemu, made);
        qemu.quit();
        host.assert_holds(&content);
    }
}

#[test]
fn a_snapshot_of_7_2_stays_what_it_is() {
    theirs_stays(Version::V7_2);
}

#[test]
fn a_snapshot_of_10_0_stays_what_it_is() {
    theirs_stays(Version::V10_0);
}
