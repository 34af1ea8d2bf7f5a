//! Large tables, failing flushes, hints: what random sequences do not reach.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmferry_disk::{BlockDevice, Cached, Unmap};
use vmferry_qcow2::{
    CreateOptions, FileStorage, OpenOptions, Qcow2Disk, Repair, Storage, check, create,
};

use crate::support::{Folder, MemoryFile, qemu_img_ok};

fn open(file: &MemoryFile) -> Qcow2Disk {
    Qcow2Disk::open(Arc::new(file.clone()), OpenOptions::default(), None).unwrap()
}

fn assert_clean(file: &MemoryFile) {
    let report = check(file, Repair::None).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings.first());
    let folder = Folder::new();
    let path = folder.path("image");
    file.bytes().to_file(Path::new(&path));
    qemu_img_ok(&["check", "-q", "-f", "qcow2", &path]);
}

#[test]
fn an_l1_table_may_need_more_blocks_than_there_are() {
    for refcount_order in [0, 4, 6] {
        let file = MemoryFile::default();
        let options = CreateOptions {
            cluster_bits: 9,
            refcount_order,
            ..CreateOptions::new(1 << 20)
        };
        create(&file, &options).unwrap();
        let disk = open(&file);
        disk.write_at(&[1; 100_000], 5000).unwrap();
        // 16 MiB of L1 table in one run of 32,768 clusters.
        let length = 64 << 30;
        disk.resize(length).unwrap();
        disk.write_at(&[2; 100_000], length - 100_000).unwrap();
        let mut read = vec![0; 100_000];
        disk.read_at(&mut read, length - 100_000).unwrap();
        assert!(read.iter().all(|byte| *byte == 2));
        disk.read_at(&mut read, 5000).unwrap();
        assert!(read.iter().all(|byte| *byte == 1));
        disk.close().unwrap();
        assert_clean(&file);
        // And back: the tables of what is gone go too.
        let disk = open(&file);
        disk.resize(1 << 20).unwrap();
        disk.resize(length).unwrap();
        disk.read_at(&mut read, length - 100_000).unwrap();
        assert!(read.iter().all(|byte| *byte == 0));
        disk.close().unwrap();
        assert_clean(&file);
    }
}

#[test]
fn a_refcount_table_grows_as_often_as_it_must() {
    let file = MemoryFile::default();
    let options = CreateOptions {
        cluster_bits: 9,
        refcount_order: 6,
        ..CreateOptions::new(16 << 20)
    };
    create(&file, &options).unwrap();
    let disk = open(&file);
    let before = disk.header().refcount_table_clusters;
    for start in (0..16 << 20).step_by(1 << 20) {
        disk.write_at(&[7; 1 << 20], start).unwrap();
    }
    assert!(disk.header().refcount_table_clusters > before + 2);
    disk.close().unwrap();
    assert_clean(&file);
}

#[test]
fn new_images_of_all_sizes_are_clean() {
    for (cluster_bits, refcount_order, disk_bytes) in [
        (9, 6, 1 << 37),
        (9, 0, 1 << 36),
        (16, 4, 1 << 48),
        (21, 6, 1 << 48),
        (16, 4, 0),
        (12, 3, 1),
    ] {
        let folder = Folder::new();
        let path = folder.path("image");
        let file = FileStorage::create(&path, true).unwrap();
        let options = CreateOptions {
            cluster_bits,
            refcount_order,
            ..CreateOptions::new(disk_bytes)
        };
        create(&file, &options).unwrap();
        let report = check(&file, Repair::None).unwrap();
        assert!(
            report.is_clean(),
            "{options:?}: {:?}",
            report.findings.first()
        );
        assert_eq!(report.allocated_clusters, 0);
        drop(file);
        qemu_img_ok(&["check", "-q", "-f", "qcow2", &path]);
    }
}

#[test]
fn space_that_was_freed_is_used_again() {
    let file = MemoryFile::default();
    create(&file, &CreateOptions::new(8 << 20)).unwrap();
    let disk = open(&file);
    disk.write_at(&[1; 4 << 20], 0).unwrap();
    disk.flush().unwrap();
    let length = file.length().unwrap();
    for round in 0..8 {
        disk.discard(0, 8 << 20).unwrap();
        disk.flush().unwrap();
        disk.write_at(&[2; 4 << 20], (round % 2) << 22).unwrap();
        disk.flush().unwrap();
    }
    assert_eq!(file.length().unwrap(), length);
    disk.close().unwrap();
    assert_clean(&file);
}

#[test]
fn fast_zeroes_are_fast_or_refused() {
    for (version, backed) in [(2, false), (3, false), (2, true), (3, true)] {
        let file = MemoryFile::default();
        let options = CreateOptions {
            version,
            backing: backed.then(|| {
                (
                    "below".to_owned(),
                    vmferry_qcow2::header::BackingFormat::Raw,
                )
            }),
            ..CreateOptions::new(1 << 20)
        };
        create(&file, &options).unwrap();
        let below: Option<Arc<dyn BlockDevice>> = backed.then(|| {
            let disk = vmferry_disk::simulated::MemoryDisk::from_bytes(&[9; 1 << 20]);
            let disk: Arc<dyn BlockDevice> = Arc::new(disk);
            disk
        });
        let storage = Arc::new(file.clone());
        let disk = Qcow2Disk::open(storage, OpenOptions::default(), below).unwrap();
        disk.write_at(&[1; 1 << 18], 0).unwrap();
        let zero = |offset, length, unmap| {
            let result = disk.write_zeroes(offset, length, unmap, true);
            result.map_err(|error| error.source.kind())
        };
        let flags_do = version == 3 || !backed;
        let expected = |fast: bool| match fast {
            true => Ok(()),
            false => Err(io::ErrorKind::Unsupported),
        };
        assert_eq!(zero(65536, 65536, Unmap::May), expected(flags_do));
        assert_eq!(zero(131_072, 65536, Unmap::Never), expected(version == 3));
        // A part of a cluster with data, and one of a cluster without.
        assert_eq!(zero(512, 512, Unmap::May), expected(false));
        assert_eq!(zero(1 << 19, 512, Unmap::May), expected(!backed));
        assert_eq!(zero(1 << 19, 512, Unmap::Never), expected(false));
    }
}

#[test]
fn cached_reads_hit_what_is_known() {
    let folder = Folder::new();
    let path = folder.path("image");
    create(
        &FileStorage::create(&path, true).unwrap(),
        &CreateOptions::new(1 << 30),
    )
    .unwrap();
    let storage = Arc::new(FileStorage::open(&path, false, true).unwrap());
    let disk = Qcow2Disk::open(storage, OpenOptions::default(), None).unwrap();
    disk.write_at(&[5; 4096], 1 << 20).unwrap();
    disk.start_writeback(0, 1 << 30).unwrap();
    disk.flush().unwrap();
    let mut read = [0xEE; 4096];
    // No table: zeroes. A table in memory: what the page cache has, or a miss.
    assert_eq!(
        disk.read_cached_at(&mut read, 1 << 29).unwrap(),
        Cached::Hit(4096)
    );
    assert_eq!(read, [0; 4096]);
    if let Cached::Hit(length) = disk.read_cached_at(&mut read, 1 << 20).unwrap() {
        assert_eq!(read[..length], [5; 4096][..length]);
    }
    let beyond = disk.read_cached_at(&mut read, 1 << 30).unwrap_err();
    assert_eq!(beyond.source.kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn a_disk_for_reading_only_is_not_written() {
    let file = MemoryFile::default();
    create(&file, &CreateOptions::new(1 << 20)).unwrap();
    let before = file.bytes();
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = Qcow2Disk::open(Arc::new(file.clone()), options, None).unwrap();
    let refused = |result: Result<(), vmferry_disk::DiskError>| {
        let kind = result.unwrap_err().source.kind();
        assert_eq!(kind, io::ErrorKind::PermissionDenied);
    };
    refused(disk.write_at(&[1], 0));
    refused(disk.write_zeroes(0, 1, Unmap::May, false));
    refused(disk.discard(0, 1 << 16));
    assert!(disk.resize(1).is_err());
    disk.flush().unwrap();
    disk.start_writeback(0, 1 << 20).unwrap();
    disk.close().unwrap();
    assert!(file.bytes() == before);
}

/// A file whose flushes fail, or panic, when the test says so.
#[derive(Default)]
struct Faulty {
    file: MemoryFile,
    failing: AtomicBool,
    panicking: AtomicBool,
}

impl Storage for Faulty {
    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }

    fn read_cached_at(&self, _buf: &mut [u8], _offset: u64) -> io::Result<Cached> {
        Ok(Cached::Unsupported)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_at(buf, offset)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_length(length)
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.punch_hole(offset, length)
    }

    fn start_writeback(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        assert!(!self.panicking.load(Ordering::SeqCst), "as the test wants");
        match self.failing.load(Ordering::SeqCst) {
            true => Err(io::Error::from_raw_os_error(5)),
            false => self.file.flush(),
        }
    }
}

#[test]
fn after_a_failed_flush_none_succeeds() {
    let file = MemoryFile::default();
    create(&file, &CreateOptions::new(1 << 20)).unwrap();
    let storage = Arc::new(Faulty {
        file: file.clone(),
        ..Faulty::default()
    });
    let disk = Qcow2Disk::open(storage.clone(), OpenOptions::default(), None).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.flush().unwrap();
    disk.write_at(&[2; 4096], 0).unwrap();
    storage.failing.store(true, Ordering::SeqCst);
    let error = disk.flush().unwrap_err();
    assert_eq!(error.source.raw_os_error(), Some(5), "{error}");
    storage.failing.store(false, Ordering::SeqCst);
    let error = disk.flush().unwrap_err().to_string();
    assert!(error.contains("an earlier flush failed"), "{error}");
    let mut read = [0; 4096];
    disk.read_at(&mut read, 0).unwrap();
    assert_eq!(read, [2; 4096], "it can still be read");
    assert!(disk.close().is_err());
    let report = check(&file, Repair::None).unwrap();
    assert_eq!(report.errors, 0, "{report:?}");
}

#[test]
fn nobody_waits_for_a_flush_that_panicked() {
    let file = MemoryFile::default();
    create(&file, &CreateOptions::new(1 << 20)).unwrap();
    let storage = Arc::new(Faulty {
        file: file.clone(),
        ..Faulty::default()
    });
    let disk = Qcow2Disk::open(storage.clone(), OpenOptions::default(), None).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    storage.panicking.store(true, Ordering::SeqCst);
    let flush = std::panic::AssertUnwindSafe(|| disk.flush());
    std::panic::catch_unwind(flush).unwrap_err();
    storage.panicking.store(false, Ordering::SeqCst);
    let error = disk.flush().unwrap_err().to_string();
    assert!(error.contains("an earlier flush failed"), "{error}");
    drop(disk);
    let report = check(&file, Repair::None).unwrap();
    assert_eq!(report.errors, 0, "{report:?}");
}
