//! Snapshots of several disks, checked by what the disks hold.

use std::io::{self, Read};
use std::path::Path;

use tempfile::TempDir;
use vmferry_disk::BlockDevice;
use vmferry_qcow2::{ChainOptions, CreateOptions, FileStorage, Qcow2Disk, open};
use vmferry_snapshot::{
    Moment, NamedDisk, SnapshotError, apply, create, delete, export, import, list,
};

const MOMENT: Moment = Moment {
    date: (1_700_000_000, 5),
    guest_nanoseconds: 1_500_000_000,
};

fn disk(dir: &TempDir, name: &str) -> Qcow2Disk {
    let path = dir.path().join(name);
    let storage = FileStorage::create(&path, true).unwrap();
    vmferry_qcow2::create(&storage, &CreateOptions::new(4 << 20)).unwrap();
    drop(storage);
    reopen(&path, false)
}

fn reopen(path: &Path, read_only: bool) -> Qcow2Disk {
    let options = ChainOptions {
        read_only,
        lock: true,
    };
    open(path, options).unwrap()
}

fn byte(disk: &Qcow2Disk) -> u8 {
    let mut byte = [0];
    disk.read_at(&mut byte, 1 << 20).unwrap();
    byte[0]
}

fn write(disk: &Qcow2Disk, byte: u8) {
    disk.write_at(&[byte; 4096], 1 << 20).unwrap();
}

fn named<'a>(name: &'a str, disk: &'a Qcow2Disk) -> NamedDisk<'a> {
    NamedDisk { name, disk }
}

fn names(listed: &[vmferry_qcow2::Snapshot]) -> Vec<&str> {
    listed
        .iter()
        .map(|snapshot| snapshot.name.as_str())
        .collect()
}

#[test]
fn all_disks_go_back_together() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (disk(&dir, "a"), disk(&dir, "b"));
    let disks = [
        NamedDisk {
            name: "a",
            disk: &a,
        },
        NamedDisk {
            name: "b",
            disk: &b,
        },
    ];
    write(&a, 1);
    write(&b, 2);
    create(&disks, "before", MOMENT).unwrap();
    write(&a, 3);
    write(&b, 4);
    create(&disks, "after", MOMENT).unwrap();
    apply(&disks, "before").unwrap();
    assert_eq!((byte(&a), byte(&b)), (1, 2));
    apply(&disks, "after").unwrap();
    assert_eq!((byte(&a), byte(&b)), (3, 4));
    let listing = list(&disks);
    assert_eq!(names(&listing.whole), ["before", "after"]);
    assert_eq!(listing.whole[0].date, MOMENT.date);
    assert!(listing.partial.is_empty());
    delete(&disks, "before").unwrap();
    assert_eq!(names(&list(&disks).whole), ["after"]);
    assert_eq!((byte(&a), byte(&b)), (3, 4));
}

#[test]
fn what_not_all_disks_have_is_partial_and_not_applied() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (disk(&dir, "a"), disk(&dir, "b"));
    let disks = [
        NamedDisk {
            name: "a",
            disk: &a,
        },
        NamedDisk {
            name: "b",
            disk: &b,
        },
    ];
    write(&a, 1);
    create(&disks[..1], "alone", MOMENT).unwrap();
    write(&a, 2);
    let listing = list(&disks);
    assert!(listing.whole.is_empty());
    assert_eq!(listing.partial.len(), 1);
    assert_eq!(listing.partial[0].disk, "a");
    assert_eq!(names(&listing.partial[0].snapshots), ["alone"]);
    let refused = apply(&disks, "alone").unwrap_err();
    assert_eq!(refused.to_string(), "disk 'b' has no snapshot 'alone'");
    assert_eq!(byte(&a), 2);
    let refused = create(&disks, "alone", MOMENT).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "disk 'a' has a snapshot 'alone' already"
    );
    assert!(b.snapshots().is_empty());
    delete(&disks, "alone").unwrap();
    assert!(a.snapshots().is_empty());
    let refused = delete(&disks, "alone").unwrap_err();
    assert_eq!(refused.to_string(), "no disk has a snapshot 'alone'");
}

#[test]
fn a_disk_that_fails_takes_back_what_was_made() {
    let dir = tempfile::tempdir().unwrap();
    let a = disk(&dir, "a");
    drop(disk(&dir, "b"));
    let b = reopen(&dir.path().join("b"), true);
    let disks = [
        NamedDisk {
            name: "a",
            disk: &a,
        },
        NamedDisk {
            name: "b",
            disk: &b,
        },
    ];
    write(&a, 1);
    let refused = create(&disks, "now", MOMENT).unwrap_err();
    assert!(
        matches!(&refused, SnapshotError::Disk { disk, .. } if disk == "b"),
        "{refused}"
    );
    assert!(a.snapshots().is_empty());
    assert_eq!(byte(&a), 1);
    let refused = import(&disks, "now", MOMENT, &mut &b"QEVM"[..]).unwrap_err();
    assert!(
        matches!(&refused, SnapshotError::Disk { disk, .. } if disk == "b"),
        "{refused}"
    );
    assert!(a.snapshots().is_empty());
}

#[test]
fn a_name_is_not_taken_for_the_id_of_another_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let a = disk(&dir, "a");
    let disks = [NamedDisk {
        name: "a",
        disk: &a,
    }];
    for (k, name) in ["x", "3", "y"].into_iter().enumerate() {
        write(&a, u8::try_from(k).unwrap());
        create(&disks, name, MOMENT).unwrap();
    }
    assert_eq!(a.snapshots()[2].id, "3");
    apply(&disks, "3").unwrap();
    assert_eq!(byte(&a), 1);
    delete(&disks, "3").unwrap();
    assert_eq!(names(&list(&disks).whole), ["x", "y"]);
}

#[test]
fn what_was_done_before_a_disk_failed_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (disk(&dir, "a"), disk(&dir, "b"));
    let c = disk(&dir, "c");
    create(
        &[named("a", &a), named("b", &b), named("c", &c)],
        "old",
        MOMENT,
    )
    .unwrap();
    drop(c);
    let c = reopen(&dir.path().join("c"), true);
    let disks = [named("a", &a), named("b", &b), named("c", &c)];
    write(&a, 1);
    let torn = apply(&disks, "old").unwrap_err();
    assert!(matches!(torn, SnapshotError::Torn { .. }), "{torn}");
    let told = torn.to_string();
    assert!(told.starts_with("disk 'c': "), "{told}");
    assert!(
        told.ends_with("; and snapshot 'old' was applied before to 'a', 'b'"),
        "{told}"
    );
    assert_eq!(byte(&a), 0);
    let partly = delete(&disks, "old").unwrap_err().to_string();
    assert!(
        partly.ends_with("; and snapshot 'old' was deleted before from 'a', 'b'"),
        "{partly}"
    );
    // The first disk is as it was, and so are the others.
    let untouched = [named("c", &c), named("a", &a)];
    let refused = delete(&untouched, "old").unwrap_err();
    assert!(matches!(refused, SnapshotError::Disk { .. }), "{refused}");
}

#[test]
fn a_stream_is_kept_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (disk(&dir, "a"), disk(&dir, "b"));
    let disks = [
        NamedDisk {
            name: "a",
            disk: &a,
        },
        NamedDisk {
            name: "b",
            disk: &b,
        },
    ];
    write(&a, 1);
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let length = random.usize(1..3 << 20);
    let stream: Vec<u8> = std::iter::repeat_with(|| random.u8(..))
        .take(length)
        .collect();
    let bytes = import(&disks, "made", MOMENT, &mut stream.as_slice()).unwrap();
    assert_eq!(bytes, stream.len() as u64);
    assert_eq!(byte(&a), 1);
    assert_eq!(list(&disks).whole[0].vm_state_bytes, bytes);
    assert_eq!(b.snapshots()[0].vm_state_bytes, 0);
    let mut out = Vec::new();
    assert_eq!(export(&disks[0], "made", &mut out).unwrap(), bytes);
    assert!(out == stream);
    let refused = export(&disks[1], "made", &mut out).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "snapshot 'made' of disk 'b' holds no VM state"
    );
    let refused = export(&disks[1], "none", &mut out).unwrap_err();
    assert_eq!(refused.to_string(), "disk 'b' has no snapshot 'none'");
}

/// Half a stream, then an error.
struct Broken(usize);

impl Read for Broken {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.0 == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let bytes = out.len().min(self.0);
        self.0 -= bytes;
        Ok(bytes)
    }
}

#[test]
fn a_stream_that_breaks_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let a = disk(&dir, "a");
    let disks = [NamedDisk {
        name: "a",
        disk: &a,
    }];
    write(&a, 1);
    let broken = import(&disks, "half", MOMENT, &mut Broken(200_000)).unwrap_err();
    assert!(matches!(broken, SnapshotError::VmState(_)), "{broken}");
    assert!(a.snapshots().is_empty());
    drop(a);
    let path = dir.path().join("a");
    let storage = FileStorage::open(&path, true, true).unwrap();
    let report = vmferry_qcow2::check(&storage, vmferry_qcow2::Repair::None).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{report:?}");
}
