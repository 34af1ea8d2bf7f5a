//! VM state in qcow2 images.

use std::fs;
use std::io::Write;
use std::sync::Arc;
use std::thread;

use vmferry_disk::BlockDevice;
use vmferry_image::{Image, ImageError, IndexPlace, SnapshotStorage};
use vmferry_qcow2::{ChainOptions, CreateOptions, NewSnapshot, Qcow2Disk};

use crate::script::{self, Script};
use crate::support::{PAGE, Parked, assert_same, capture, painted, qcow2_capture, read_all, rng};

fn open(parked: &Parked, snapshot: &str) -> Result<(Image, u64), ImageError> {
    let storage = Arc::new(SnapshotStorage::open(&parked.path(), snapshot)?);
    let mut walked = 0;
    let image = Image::open(storage, &IndexPlace::Beside, &mut |progress| {
        walked = progress.done_bytes;
    })?;
    Ok((image, walked))
}

/// Those that QEMU made: their content is the VM state, as the reader of qcow2 gives it.
#[test]
fn of_qemu_are_images() {
    for name in ["savevm-72.diskA", "savevm-100.diskA"] {
        let parked = Parked::new(&qcow2_capture(name));
        let disk = disk(&parked, true);
        let snapshots = disk.snapshots();
        assert!(!snapshots.is_empty());
        for snapshot in snapshots {
            let mut state = Vec::new();
            let mut reader = disk.vm_state_reader(&snapshot.id).unwrap();
            std::io::Read::read_to_end(&mut reader, &mut state).unwrap();
            let expected = painted(&state);
            for (name, expected_walk) in
                [(&snapshot.id, snapshot.vm_state_bytes), (&snapshot.name, 0)]
            {
                let (image, walked) = open(&parked, name).unwrap();
                assert_eq!(walked, expected_walk);
                assert_same(&read_all(&image), &expected, name);
                image.verify(&mut |_| {}).unwrap();
                assert!(image.name().contains(&format!("snapshot {}", snapshot.id)));
            }
            let index = format!("vm.{}.index", snapshot.id);
            assert!(parked.folder().join(index).exists());
        }
        let error = open(&parked, "no such").unwrap_err().to_string();
        assert!(error.contains("no snapshot \"no such\""), "{error}");
    }
    let parked = Parked::new(&qcow2_capture("savevm-72.diskB"));
    let error = open(&parked, "1").unwrap_err().to_string();
    assert!(error.contains("has no VM state"), "{error}");
    let parked = Parked::new(&capture("pc-72"));
    let error = open(&parked, "1").unwrap_err().to_string();
    assert!(error.contains("not a qcow2 image"), "{error}");
}

fn disk(parked: &Parked, read_only: bool) -> Qcow2Disk {
    let options = ChainOptions {
        read_only,
        lock: false,
    };
    vmferry_qcow2::open(parked.path(), options).unwrap()
}

fn save(disk: &Qcow2Disk, name: &str, date: (u32, u32), state: &[u8]) {
    let mut writer = disk.vm_state_writer().unwrap();
    writer.write_all(state).unwrap();
    let vm_state_bytes = writer.finish().unwrap();
    let new = NewSnapshot {
        name,
        date,
        guest_nanoseconds: 5,
        vm_state_bytes,
        icount: None,
    };
    disk.create_snapshot(&new).unwrap();
}

fn with_snapshot(script: &Script) -> Parked {
    let parked = Parked::new(&[]);
    fs::remove_file(parked.path()).unwrap();
    let storage = vmferry_qcow2::FileStorage::create(parked.path(), false).unwrap();
    vmferry_qcow2::create(&storage, &CreateOptions::new(4 << 20)).unwrap();
    drop(storage);
    let disk = disk(&parked, false);
    save(&disk, "a", (100, 5), &script.bytes);
    disk.close().unwrap();
    parked
}

/// The rest of the image may change, whoever changes it: the index is the snapshot's.
#[test]
fn keep_their_index_while_the_disk_changes() {
    let mut rng = rng();
    let script = script::random(&mut rng, 2000).finish();
    let parked = with_snapshot(&script);
    let (image, walked) = open(&parked, "a").unwrap();
    assert_eq!(walked, script.bytes.len() as u64);
    assert!(read_all(&image) == script.memory);

    // While it is read.
    let writing = disk(&parked, false);
    writing.write_at(&[1; 3 << 20], 1000).unwrap();
    writing.flush().unwrap();
    assert!(read_all(&image) == script.memory);
    save(&writing, "b", (100, 5), &[7; 100]);
    writing.close().unwrap();
    assert!(read_all(&image) == script.memory);
    let (again, walked) = open(&parked, "1").unwrap();
    assert_eq!(walked, 0);
    assert!(read_all(&again) == script.memory);
}

/// One that came in its place is another.
#[test]
fn have_an_index_of_their_own() {
    let mut rng = rng();
    let script = script::random(&mut rng, 1000).finish();
    let parked = with_snapshot(&script);
    let (image, _) = open(&parked, "a").unwrap();
    drop(image);
    let writing = disk(&parked, false);
    let mut other = Script::new(&[("pc.ram", 5)]);
    other.page("pc.ram", 3, vec![9; PAGE]);
    let other = other.finish();
    writing.delete_snapshot("a").unwrap();
    save(&writing, "a", (100, 5), &other.bytes);
    writing.close().unwrap();
    let (image, walked) = open(&parked, "a").unwrap();
    assert_eq!(walked, other.bytes.len() as u64);
    assert!(read_all(&image) == other.memory);
}

#[test]
fn are_read_by_several_threads() {
    let mut rng = rng();
    let script = script::random(&mut rng, 2000).finish();
    let parked = with_snapshot(&script);
    let (image, _) = open(&parked, "a").unwrap();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(read_all(&image) == script.memory));
        }
    });
}
