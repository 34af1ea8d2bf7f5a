//! Raw disk files with known content.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

const MIB: usize = 1 << 20;

/// Creates a disk of `size` bytes full of random data.
pub(crate) fn random(path: &Path, size: u64, rng: &mut fastrand::Rng) {
    sparse(path, size, &[(0, size)], rng);
}

/// Creates a disk of `size` bytes with random data at the given offsets and lengths, and holes elsewhere.
pub(crate) fn sparse(path: &Path, size: u64, data: &[(u64, u64)], rng: &mut fastrand::Rng) {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .expect("a new disk");
    file.set_len(size).expect("a disk can be sized");
    let mut buffer = vec![0; MIB];
    for &(offset, length) in data {
        let mut done = 0;
        while done < length {
            let part = usize::try_from(length - done).map_or(MIB, |left| left.min(MIB));
            rng.fill(&mut buffer[..part]);
            file.write_all_at(&buffer[..part], offset + done)
                .expect("a disk can be written");
            done += part as u64;
        }
    }
    file.sync_all().expect("a disk can be synced");
}

/// Fails unless both disks have the same length and content, and names the first byte that differs.
pub(crate) fn assert_same(left: &Path, right: &Path) {
    let names = format!("{} and {}", left.display(), right.display());
    let [mut left, mut right] =
        [left, right].map(|path| File::open(path).expect("a disk can be opened"));
    let [left_size, right_size] =
        [&left, &right].map(|file| file.metadata().expect("a disk has metadata").len());
    assert_eq!(left_size, right_size, "lengths of {names}");
    let (mut left_part, mut right_part) = (vec![0; MIB], vec![0; MIB]);
    let mut offset = 0;
    while offset < left_size {
        let part = usize::try_from(left_size - offset).map_or(MIB, |rest| rest.min(MIB));
        left.read_exact(&mut left_part[..part])
            .expect("a disk can be read");
        right
            .read_exact(&mut right_part[..part])
            .expect("a disk can be read");
        if left_part[..part] != right_part[..part] {
            let at = left_part
                .iter()
                .zip(&right_part)
                .position(|(left, right)| left != right)
                .unwrap_or(0);
            panic!("{names} differ at byte {}", offset + at as u64);
        }
        offset += part as u64;
    }
}

/// How many bytes of a disk are data and not holes, as the file system tells after a sync.
pub(crate) fn data_bytes(path: &Path) -> u64 {
    let file = File::open(path).expect("a disk can be opened");
    file.sync_all().expect("a disk can be synced");
    let mut bytes = 0;
    let mut at = 0;
    loop {
        let start = match seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return bytes,
            Err(error) => panic!("{}: {error}", path.display()),
        };
        let end = seek(&file, SeekFrom::Hole(start)).expect("data ends in a hole or at the end");
        bytes += end - start;
        at = end;
    }
}
