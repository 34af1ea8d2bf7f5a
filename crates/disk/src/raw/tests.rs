use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;
use std::thread;

use tempfile::TempDir;

use super::*;
use crate::testing::{rng, rounds};

const MIB: u64 = 1 << 20;
const WRITABLE: OpenOptions = OpenOptions {
    read_only: false,
    lock: true,
};
const READ_ONLY: OpenOptions = OpenOptions {
    read_only: true,
    lock: true,
};

/// A folder on the filesystem of temporary files and one in memory: they differ in what they can.
fn folders() -> Vec<TempDir> {
    let mut folders = vec![tempfile::tempdir().unwrap()];
    match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => folders.push(folder),
        Err(error) => println!("left out: files in memory: /dev/shm: {error}"),
    }
    folders
}

fn new_disk(folder: &TempDir, length: u64) -> RawDisk {
    RawDisk::create(folder.path().join("disk"), length, true).unwrap()
}

fn allocated_bytes(disk: &RawDisk) -> u64 {
    disk.file.metadata().unwrap().blocks() * 512
}

fn read(disk: &RawDisk, offset: u64, length: u64) -> Vec<u8> {
    let mut buf = vec![0xaa; usize::try_from(length).unwrap()];
    disk.read_at(&mut buf, offset).unwrap();
    buf
}

fn all_extents(disk: &RawDisk) -> Vec<(Range<u64>, ExtentKind)> {
    let end = disk.limits().length;
    let mut extents = Vec::new();
    let mut at = 0;
    while at < end {
        let extent = disk.status(at, end - at).unwrap();
        assert!(extent.length >= 1 && extent.length <= end - at);
        extents.push((at..at + extent.length, extent.kind));
        at += extent.length;
    }
    extents
}

#[test]
fn a_disk_of_odd_length_ends_at_its_last_byte() {
    for folder in folders() {
        let length = 64 * MIB + 1536;
        let disk = new_disk(&folder, length);
        assert_eq!(disk.limits().length, length);
        assert_eq!(all_extents(&disk), [(0..length, ExtentKind::Hole)]);
        assert!(!disk.holds_data().unwrap());
        disk.write_at(&[7; 1536], length - 1536).unwrap();
        assert!(disk.holds_data().unwrap());
        assert_eq!(read(&disk, length - 1537, 1537)[..2], [0, 7]);
        let last = disk.status(length - 1, 1).unwrap();
        assert_eq!((last.length, last.kind), (1, ExtentKind::Data));
        disk.write_zeroes(length - 3, 3, Unmap::May, false).unwrap();
        disk.write_zeroes(length - 5, 2, Unmap::Never, false)
            .unwrap();
        assert_eq!(read(&disk, length - 7, 7), [7, 7, 0, 0, 0, 0, 0]);
        disk.start_writeback(length - 1536, 1536).unwrap();
        disk.flush().unwrap();
        drop(disk);
        assert_eq!(
            fs::metadata(folder.path().join("disk")).unwrap().len(),
            length
        );
    }
}

#[test]
fn nothing_reaches_past_the_end() {
    for folder in folders() {
        let disk = new_disk(&folder, 1000);
        for (offset, length) in [(1000, 1), (999, 2), (u64::MAX, 1)] {
            let mut buf = vec![0; length];
            let length = length as u64;
            let errors = [
                disk.read_at(&mut buf, offset).unwrap_err(),
                disk.read_cached_at(&mut buf, offset).unwrap_err(),
                disk.write_at(&buf, offset).unwrap_err(),
                disk.write_zeroes(offset, length, Unmap::May, false)
                    .unwrap_err(),
                disk.discard(offset, length).unwrap_err(),
                disk.status(offset, length).unwrap_err(),
                disk.start_writeback(offset, length).unwrap_err(),
            ];
            for error in errors {
                assert_eq!(error.source.kind(), io::ErrorKind::InvalidInput, "{error}");
            }
        }
        assert_eq!(fs::metadata(disk.path()).unwrap().len(), 1000);
    }
}

#[test]
fn zeroes_give_space_back_only_if_they_may() {
    for folder in folders() {
        let disk = new_disk(&folder, 4 * MIB);
        disk.write_at(&vec![1; 4 << 20], 0).unwrap();
        disk.flush().unwrap();
        let full = allocated_bytes(&disk);
        assert!(full >= 4 * MIB);

        disk.write_zeroes(0, MIB, Unmap::Never, false).unwrap();
        assert!(allocated_bytes(&disk) >= 4 * MIB, "space was given back");
        disk.write_zeroes(MIB, MIB, Unmap::May, false).unwrap();
        assert!(allocated_bytes(&disk) <= full - MIB, "no hole was punched");
        disk.discard(2 * MIB, MIB).unwrap();
        assert!(
            allocated_bytes(&disk) <= full - 2 * MIB,
            "nothing was discarded"
        );
        assert!(read(&disk, 0, 3 * MIB).iter().all(|&byte| byte == 0));
        assert!(read(&disk, 3 * MIB, MIB).iter().all(|&byte| byte == 1));
        let extents = all_extents(&disk);
        assert!(
            extents.contains(&(3 * MIB..4 * MIB, ExtentKind::Data)),
            "{extents:?}"
        );
        assert_eq!(disk.status(MIB, MIB).unwrap().kind, ExtentKind::Hole);
    }
}

#[test]
fn fast_zeroes_are_fast_or_leave_the_disk_alone() {
    for folder in folders() {
        let disk = new_disk(&folder, MIB);
        disk.write_at(&vec![1; 1 << 20], 0).unwrap();
        disk.write_zeroes(0, 4096, Unmap::May, true).unwrap();
        let expected = match disk.write_zeroes(4096, 4096, Unmap::Never, true) {
            Ok(()) => 0,
            Err(error) => {
                assert_eq!(error.source.kind(), io::ErrorKind::Unsupported);
                1
            }
        };
        println!("{}: zeroes that stay: {expected}", folder.path().display());
        assert_eq!(read(&disk, 0, 4097)[4095..], [0, expected]);
        disk.write_zeroes(4096, 4096, Unmap::Never, false).unwrap();
        assert_eq!(read(&disk, 4096, 4097)[4095..], [0, 1]);

        // As on a filesystem that can do neither.
        disk.no_punch.store(true, Ordering::Relaxed);
        disk.no_zero_range.store(true, Ordering::Relaxed);
        for unmap in [Unmap::May, Unmap::Never] {
            let error = disk.write_zeroes(8192, 4096, unmap, true).unwrap_err();
            assert_eq!(error.source.kind(), io::ErrorKind::Unsupported);
            assert_eq!(read(&disk, 8192, 4096), [1; 4096]);
        }
        disk.write_zeroes(8193, 500_000, Unmap::May, false).unwrap();
        let around = read(&disk, 8192, 500_002);
        assert_eq!((around[0], around[500_001]), (1, 1));
        assert!(around[1..500_001].iter().all(|&byte| byte == 0));
        disk.discard(600_000, 4096).unwrap();
        assert_eq!(read(&disk, 600_000, 4096), [1; 4096]);
    }
}

#[test]
fn runs_of_data_are_remembered_and_punched_ones_forgotten() {
    for folder in folders() {
        let disk = new_disk(&folder, 8 * MIB);
        disk.write_at(&vec![1; 4 << 20], 2 * MIB).unwrap();
        assert_eq!(disk.status(3 * MIB, 100).unwrap().kind, ExtentKind::Data);
        assert_eq!(*lock(&disk.known_data), 3 * MIB..6 * MIB);
        disk.write_zeroes(4 * MIB, MIB, Unmap::May, false).unwrap();
        let data = ExtentKind::Data;
        let hole = ExtentKind::Hole;
        let expected = [
            (0..2 * MIB, hole),
            (2 * MIB..4 * MIB, data),
            (4 * MIB..5 * MIB, hole),
            (5 * MIB..6 * MIB, data),
            (6 * MIB..8 * MIB, hole),
        ];
        assert_eq!(all_extents(&disk), expected);
        // What was a hole is data at once.
        disk.write_at(b"x", 7 * MIB).unwrap();
        assert_eq!(disk.status(7 * MIB, 1).unwrap().kind, data);
        // A filesystem that can't say has data everywhere.
        disk.no_seek.store(true, Ordering::Relaxed);
        assert_eq!(all_extents(&disk), [(0..8 * MIB, data)]);
    }
}

#[test]
fn random_operations_do_what_they_do_to_an_array() {
    let mut rng = rng();
    for folder in folders() {
        let length = MIB + 1536;
        let disk = new_disk(&folder, length);
        let mut model = vec![0_u8; usize::try_from(length).unwrap()];
        for _ in 0..rounds(400) {
            let offset = rng.u64(0..length);
            let size = rng.u64(1..=(length - offset).min(70_000));
            let range = usize::try_from(offset).unwrap()..usize::try_from(offset + size).unwrap();
            let byte = rng.u8(1..);
            match rng.u8(0..5) {
                0 | 1 => {
                    model[range.clone()].fill(byte);
                    disk.write_at(&model[range], offset).unwrap();
                }
                2 => {
                    model[range].fill(0);
                    let unmap = [Unmap::May, Unmap::Never][rng.usize(0..2)];
                    disk.write_zeroes(offset, size, unmap, false).unwrap();
                }
                3 => {
                    assert_eq!(read(&disk, offset, size), model[range]);
                }
                _ => {
                    let extent = disk.status(offset, size).unwrap();
                    let run = &model[range.start..][..usize::try_from(extent.length).unwrap()];
                    let zero = run.iter().all(|&byte| byte == 0);
                    assert!(
                        extent.kind == ExtentKind::Data || zero,
                        "data is called a hole"
                    );
                }
            }
        }
        assert!(read(&disk, 0, length) == model);
        disk.flush().unwrap();
        drop(disk);
        assert!(fs::read(folder.path().join("disk")).unwrap() == model);
    }
}

#[test]
fn reads_from_the_cache_are_right_or_miss() {
    for folder in folders() {
        let disk = new_disk(&folder, MIB);
        let truth: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8 + 1).collect();
        disk.write_at(&truth, 0).unwrap();
        disk.flush().unwrap();
        let ask = |what: &str| {
            let mut buf = vec![0; 1 << 16];
            let cached = disk.read_cached_at(&mut buf, MIB - (1 << 16)).unwrap();
            println!("{}: {what}: {cached:?}", folder.path().display());
            if let Cached::Hit(filled) = cached {
                assert!((1..=1 << 16).contains(&filled));
                assert_eq!(buf[..filled], truth[(1 << 20) - (1 << 16)..][..filled]);
            }
            cached
        };
        let first = ask("just written");
        assert_ne!(first, Cached::Miss);
        rustix::fs::fadvise(&disk.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let second = ask("dropped from the cache");
        let unsupported = Cached::Unsupported;
        assert_eq!(first == unsupported, second == unsupported);
        assert_eq!(
            disk.no_cached_reads.load(Ordering::Relaxed),
            first == unsupported
        );
    }
}

#[test]
fn a_file_that_became_shorter_is_an_error_and_no_hang() {
    let folder = tempfile::tempdir().unwrap();
    let disk = new_disk(&folder, 8192);
    disk.file.set_len(100).unwrap();
    let error = disk.read_at(&mut [0; 200], 0).unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(
        disk.read_cached_at(&mut [0; 200], 200).unwrap(),
        Cached::Miss
    );
}

#[test]
fn what_cannot_be_a_disk_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let refusal = |name: &str| {
        let error = RawDisk::open(at(name), WRITABLE).unwrap_err();
        let line = error.to_string();
        assert!(line.contains(at(name).to_str().unwrap()), "{line}");
        assert!(!line.contains('\n'), "{line}");
        error
    };
    assert!(matches!(refusal("nothing"), OpenError::Missing { .. }));
    fs::create_dir(at("folder")).unwrap();
    assert!(matches!(refusal("folder"), OpenError::Directory { .. }));
    let _listener = UnixListener::bind(at("socket")).unwrap();
    assert!(matches!(refusal("socket"), OpenError::NotADisk { .. }));
    symlink("/dev/null", at("null")).unwrap();
    assert!(matches!(refusal("null"), OpenError::NotADisk { .. }));
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    assert!(matches!(refusal("pipe"), OpenError::NotADisk { .. }));
    symlink("loop", at("loop")).unwrap();
    assert!(matches!(refusal("loop"), OpenError::Io { .. }));
    fs::write(at("file"), "x").unwrap();
    assert!(matches!(refusal("file/below"), OpenError::Io { .. }));
    fs::set_permissions(at("file"), fs::Permissions::from_mode(0o400)).unwrap();
    match rustix::process::geteuid().is_root() {
        true => println!("left out: root may write what nobody may"),
        false => assert!(matches!(refusal("file"), OpenError::Permission { .. })),
    }
}

#[test]
fn a_read_only_disk_is_never_written() {
    let folder = tempfile::tempdir().unwrap();
    drop(new_disk(&folder, 4096));
    let path = folder.path().join("disk");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    let disk = RawDisk::open(&path, READ_ONLY).unwrap();
    assert!(disk.limits().read_only);
    let errors = [
        disk.write_at(b"x", 0).unwrap_err(),
        disk.write_zeroes(0, 1, Unmap::May, false).unwrap_err(),
        disk.discard(0, 4096).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.source.kind(), io::ErrorKind::PermissionDenied);
    }
    disk.flush().unwrap();
    disk.start_writeback(0, 4096).unwrap();
}

#[test]
fn create_makes_a_private_file_or_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new");
    let disk = RawDisk::create(&path, 12345, true).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (12345, 0o600));
    disk.write_at(b"mine", 0).unwrap();
    drop(disk);
    let error = RawDisk::create(&path, 1, true).unwrap_err();
    assert!(matches!(error, OpenError::Exists { .. }), "{error}");
    assert_eq!(&fs::read(&path).unwrap()[..4], b"mine");

    let other = folder.path().join("other");
    let error = RawDisk::create(&other, RAW_BYTES_MAX + 1, true).unwrap_err();
    assert!(matches!(error, OpenError::TooLong { .. }), "{error}");
    assert!(!other.exists());
    // More than ext4, xfs, btrfs or tmpfs can take is refused after the file was made.
    match RawDisk::create(&other, RAW_BYTES_MAX, true) {
        Err(error) => {
            assert!(
                error.to_string().contains("cannot set the length"),
                "{error}"
            );
            assert!(!other.exists(), "a half-made file stays behind");
        }
        Ok(_) => println!("left out: this filesystem takes files of {RAW_BYTES_MAX} bytes"),
    }
    let long = fs::File::create(folder.path().join("long")).unwrap();
    if long.set_len(RAW_BYTES_MAX + 1).is_ok() {
        let error = RawDisk::open(folder.path().join("long"), WRITABLE).unwrap_err();
        assert!(matches!(error, OpenError::TooLong { .. }), "{error}");
    }
    let error = RawDisk::create(folder.path().join("no/where"), 1, true).unwrap_err();
    assert!(error.to_string().contains("no/where"), "{error}");
}

#[test]
fn the_magic_of_qcow2_is_seen() {
    let folder = tempfile::tempdir().unwrap();
    let disk = new_disk(&folder, 4);
    assert!(!disk.starts_with_qcow2_magic().unwrap());
    disk.write_at(b"QFI\xfb", 0).unwrap();
    assert!(disk.starts_with_qcow2_magic().unwrap());
    fs::remove_file(disk.path()).unwrap();
    assert!(!new_disk(&folder, 3).starts_with_qcow2_magic().unwrap());
}

#[test]
fn two_writers_exclude_each_other_until_one_is_gone() {
    for folder in folders() {
        let disk = new_disk(&folder, 4096);
        let path = disk.path().to_owned();
        let error = RawDisk::open(&path, WRITABLE).unwrap_err();
        let expected = format!(
            "failed to get \"write\" lock on {}: is another process using the image?",
            path.display()
        );
        assert_eq!(error.to_string(), expected);
        // A reader may look, as with QEMU's programs; it keeps no writer out.
        let reader = RawDisk::open(&path, READ_ONLY).unwrap();
        drop(disk);
        let disk = RawDisk::open(&path, WRITABLE).unwrap();
        drop(reader);
        // The refused ones left nothing behind, and a lock can be given back and taken again.
        disk.unlock_image();
        let other = RawDisk::open(&path, WRITABLE).unwrap();
        let error = disk.lock_image().unwrap_err();
        assert!(matches!(error, LockError::Forbidden { .. }), "{error}");
        drop(other);
        disk.lock_image().unwrap();
        disk.lock_image().unwrap();
        RawDisk::open(&path, WRITABLE).unwrap_err();
        let unlocked = OpenOptions {
            lock: false,
            ..WRITABLE
        };
        RawDisk::open(&path, unlocked).unwrap();
        RawDisk::open(&path, WRITABLE).unwrap_err();
    }
}

#[test]
fn a_failed_flush_fails_for_ever() {
    let flushes = Flushes::default();
    flushes.flush(|| Ok(())).unwrap();
    let fail = || Err(io::Error::from_raw_os_error(libc::EIO));
    let error = flushes.flush(fail).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    let error = flushes
        .flush(|| panic!("asked the kernel again"))
        .unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
}

/// Start a flush, start `count` more while it runs, end it with `result`; how often the kernel was
/// asked, and how many of the later flushes succeeded.
fn flush_during_a_flush(count: usize, result: io::Result<()>) -> (usize, usize) {
    let flushes = Flushes::default();
    let asked = AtomicUsize::new(0);
    let succeeded = AtomicUsize::new(0);
    let (running, is_running) = mpsc::channel();
    let (end, may_end) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let (flushes, asked, succeeded) = (&flushes, &asked, &succeeded);
        scope.spawn(move || {
            let _ = flushes.flush(|| {
                asked.fetch_add(1, Ordering::SeqCst);
                running.send(()).unwrap();
                may_end.recv().unwrap();
                result
            });
        });
        is_running.recv().unwrap();
        for _ in 0..count {
            scope.spawn(move || {
                let flushed = flushes.flush(|| {
                    asked.fetch_add(1, Ordering::SeqCst);
                    Ok(())
                });
                succeeded.fetch_add(usize::from(flushed.is_ok()), Ordering::SeqCst);
            });
        }
        end.send(()).unwrap();
    });
    (asked.into_inner(), succeeded.into_inner())
}

#[test]
fn a_flush_never_trusts_one_that_began_before_it() {
    let (asked, succeeded) = flush_during_a_flush(8, Ok(()));
    println!(
        "8 flushes beside a running one asked the kernel {} times",
        asked - 1
    );
    assert!((2..=9).contains(&asked));
    assert_eq!(succeeded, 8);
}

#[test]
fn flushes_that_wait_for_a_failed_one_fail_too() {
    let error = io::Error::from_raw_os_error(libc::EIO);
    assert_eq!(flush_during_a_flush(8, Err(error)), (1, 0));
}

/// Give this thread its own view of mounted filesystems and mount an empty tmpfs of `bytes`.
fn mount_small_tmpfs(at: &Path, bytes: u64) -> io::Result<()> {
    let checked = |result| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let at = CString::new(at.as_os_str().as_bytes())?;
    let options = CString::new(format!("size={bytes}"))?;
    // SAFETY: only this thread's view of the filesystem tree is taken apart from the others'.
    checked(unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) })?;
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    let none = std::ptr::null();
    // SAFETY: the path is a C string; this call takes no other data.
    checked(unsafe { libc::mount(none, c"/".as_ptr(), none, flags, none.cast()) })?;
    let kind = c"tmpfs".as_ptr();
    // SAFETY: all pointers are C strings that outlive the call.
    checked(unsafe { libc::mount(kind, at.as_ptr(), kind, 0, options.as_ptr().cast()) })
}

#[test]
fn a_full_filesystem_is_reported_where_it_happened() {
    let folder = tempfile::tempdir().unwrap();
    let test = || {
        if let Err(error) = mount_small_tmpfs(folder.path(), MIB) {
            println!("left out: a full filesystem: cannot mount one: {error}");
            return;
        }
        let disk = new_disk(&folder, 8 * MIB);
        disk.write_at(&vec![1; 1 << 19], 0).unwrap();
        let error = disk.write_at(&vec![2; 1 << 20], 4 * MIB).unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(libc::ENOSPC));
        let expected = "write at byte 4194304 (length 1048576): ";
        assert!(error.to_string().starts_with(expected), "{error}");
        let error = disk
            .write_zeroes(MIB, MIB, Unmap::Never, false)
            .unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(libc::ENOSPC));
        // Holes need no space, and make some.
        disk.write_zeroes(0, 8 * MIB, Unmap::May, false).unwrap();
        disk.write_at(&vec![3; 1 << 19], 0).unwrap();
        disk.flush().unwrap();
    };
    // A thread of its own: the mount ends with it.
    thread::scope(|scope| scope.spawn(test).join().unwrap());
}

/// A loop device, detached when dropped.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn on(file: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .arg("--find")
            .arg("--show")
            .arg(file)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).unwrap();
                Some(Self(path.trim().into()))
            }
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr).into_owned();
                println!("left out: a block device: losetup: {}", why.trim());
                None
            }
            Err(error) => {
                println!("left out: a block device: losetup: {error}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn a_block_device_is_a_disk() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::write(&image, vec![1; 4 << 20]).unwrap();
    let Some(device) = LoopDevice::on(&image) else {
        return;
    };
    let disk = RawDisk::open(&device.0, WRITABLE).unwrap();
    assert_eq!(disk.limits().length, 4 * MIB);
    assert!(disk.limits().preferred_bytes >= 512);
    assert!(disk.holds_data().unwrap());
    assert_eq!(all_extents(&disk), [(0..4 * MIB, ExtentKind::Data)]);
    for (offset, unmap) in [(0, Unmap::May), (MIB, Unmap::Never)] {
        // Neither end on a sector.
        disk.write_zeroes(offset + 100, 300_000, unmap, false)
            .unwrap();
        let around = read(&disk, offset + 99, 300_002);
        assert_eq!((around[0], around[300_001]), (1, 1));
        assert!(around[1..300_001].iter().all(|&byte| byte == 0));
    }
    // A discard takes whole sectors only; this one does not hold any.
    disk.discard(2 * MIB + 1, 600).unwrap();
    assert_eq!(read(&disk, 2 * MIB, 1024), [1; 1024]);
    disk.discard(2 * MIB, MIB).unwrap();
    disk.write_at(b"odd place", 3 * MIB + 77).unwrap();
    assert_eq!(read(&disk, 3 * MIB + 76, 11), b"\x01odd place\x01");
    let mut buf = [0; 4096];
    let cached = disk.read_cached_at(&mut buf, 3 * MIB).unwrap();
    println!("a read from the cache: {cached:?}");
    disk.start_writeback(0, 4 * MIB).unwrap();
    disk.flush().unwrap();
    let error = disk.write_zeroes(0, 4096, Unmap::Never, true).unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::Unsupported);
    drop(disk);
    assert_eq!(
        &fs::read(&image).unwrap()[(3 << 20) + 77..][..9],
        b"odd place"
    );
}
