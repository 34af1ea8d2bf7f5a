//! Random operations on random images, compared with bytes in memory after each, and with our
//! check, `qemu-img` and `imago` at the end. `VMFERRY_SEED=n` runs sequence `n` first;
//! `VMFERRY_LONG=1` runs 10,000.

mod imago;
mod snapshots;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::support::{MemoryFile, qemu_img_ok, rounds, seed};
use fastrand::Rng;
use vmferry_disk::{BlockDevice, ExtentKind, Unmap};
use vmferry_qcow2::header::{BackingFormat, Compression};
use vmferry_qcow2::{
    CheckReport, CreateOptions, Error, LayerKind, OpenOptions, Qcow2Disk, Repair, check, create,
};

struct Case {
    options: CreateOptions,
    file: MemoryFile,
    backing: Option<Vec<u8>>,
    disk: Option<Qcow2Disk>,
    model: Vec<u8>,
    kept: Vec<snapshots::Kept>,
    l2_cache_bytes: usize,
}

fn memory_disk(bytes: &[u8]) -> Arc<dyn BlockDevice> {
    Arc::new(vmferry_disk::simulated::MemoryDisk::from_bytes(bytes))
}

fn random_bytes(rng: &mut Rng, length: usize) -> Vec<u8> {
    // Never zero, so that lost data can't look like a hole.
    let first = rng.u8(1..=255);
    (0..length)
        .map(|index| first.wrapping_add(index as u8) | 1)
        .collect()
}

impl Case {
    fn new(rng: &mut Rng) -> Self {
        let version = if rng.u8(..4) == 0 { 2 } else { 3 };
        let cluster_bits = match rng.u8(..8) {
            0 => rng.u32(17..=21),
            1..=3 => rng.u32(12..=16),
            _ => rng.u32(9..=12),
        };
        let disk_max = match cluster_bits {
            9..=12 => 1 << 20,
            13..=16 => 4 << 20,
            _ => 24 << 20,
        };
        let mut disk_bytes = rng.u64(1..=disk_max);
        if rng.bool() {
            disk_bytes = disk_bytes.next_multiple_of(512);
        }
        let backing = (rng.u8(..3) == 0).then(|| {
            let length = rng.usize(1..=(disk_bytes as usize) * 3 / 2);
            random_bytes(rng, length)
        });
        let options = CreateOptions {
            disk_bytes,
            version,
            cluster_bits,
            refcount_order: if version == 2 { 4 } else { rng.u32(0..=6) },
            lazy_refcounts: version == 3 && rng.bool(),
            compression: match version == 3 && rng.bool() {
                true => Compression::Zstd,
                false => Compression::Deflate,
            },
            backing: backing
                .is_some()
                .then(|| ("backing.raw".to_owned(), BackingFormat::Raw)),
        };
        let file = MemoryFile::default();
        create(&file, &options).unwrap();
        let mut model = vec![0; disk_bytes as usize];
        if let Some(backing) = &backing {
            let length = backing.len().min(model.len());
            model[..length].copy_from_slice(&backing[..length]);
        }
        let l2_cache_bytes = if rng.bool() { 0 } else { 1 << 20 };
        Self {
            options,
            file,
            backing,
            disk: None,
            model,
            kept: Vec::new(),
            l2_cache_bytes,
        }
    }

    fn disk(&mut self) -> &Qcow2Disk {
        self.disk.get_or_insert_with(|| {
            let options = OpenOptions {
                l2_cache_bytes: self.l2_cache_bytes,
                ..OpenOptions::default()
            };
            let backing = self.backing.as_deref().map(memory_disk);
            Qcow2Disk::open(Arc::new(self.file.clone()), options, backing).unwrap()
        })
    }

    fn range(&self, rng: &mut Rng) -> (usize, usize) {
        let cluster = 1 << self.options.cluster_bits;
        let length = self.model.len();
        let mut start = rng.usize(..length);
        let mut size = match rng.u8(..4) {
            0 => rng.usize(1..=length),
            1 => rng.usize(1..=3) * cluster,
            _ => rng.usize(1..=cluster * 2),
        };
        match rng.u8(..3) {
            0 => start -= start % cluster,
            1 => start -= start % 512,
            _ => {}
        }
        size = size.min(length - start);
        (start, size)
    }

    fn step(&mut self, rng: &mut Rng) {
        match rng.u8(..24) {
            0..=7 => {
                let (start, size) = self.range(rng);
                let data = random_bytes(rng, size);
                println!("write {start} {size}");
                self.disk().write_at(&data, start as u64).unwrap();
                self.model[start..start + size].copy_from_slice(&data);
            }
            8..=10 => {
                let (start, size) = self.range(rng);
                let unmap = if rng.bool() { Unmap::May } else { Unmap::Never };
                let fast = rng.u8(..4) == 0;
                match self
                    .disk()
                    .write_zeroes(start as u64, size as u64, unmap, fast)
                {
                    Ok(()) => self.model[start..start + size].fill(0),
                    Err(error) => {
                        assert!(fast, "{error}");
                        assert_eq!(error.source.kind(), std::io::ErrorKind::Unsupported);
                    }
                }
            }
            11 | 12 => self.discard(rng),
            13 | 14 => {
                let (start, size) = self.range(rng);
                self.compare(start, size);
            }
            15 => self.disk().flush().unwrap(),
            16 => {
                self.disk = None;
                let report = self.check();
                assert!(report.is_clean(), "{report:?}");
            }
            17 => self.resize(rng),
            20..=23 => self.snapshot_step(rng),
            _ => {
                let (start, size) = self.range(rng);
                self.status(start, size);
            }
        }
    }

    fn discard(&mut self, rng: &mut Rng) {
        let (start, size) = self.range(rng);
        self.disk().discard(start as u64, size as u64).unwrap();
        let cluster = 1_usize << self.options.cluster_bits;
        let first = start.next_multiple_of(cluster);
        let end = match start + size == self.model.len() {
            true => start + size,
            false => (start + size) / cluster * cluster,
        };
        for at in (first..end).step_by(cluster) {
            let backed = self.backing.as_ref().is_some_and(|below| at < below.len());
            if self.options.version == 3 || !backed {
                self.model[at..(at + cluster).min(end)].fill(0);
            }
        }
    }

    fn resize(&mut self, rng: &mut Rng) {
        let length = self.model.len();
        let wanted = match rng.bool() {
            true => rng.usize(1..=length),
            false => length + rng.usize(1..=length.min(4 << 20)),
        };
        let refused = self.options.version == 2 && !self.kept.is_empty();
        let resized = self.disk().resize(wanted as u64);
        if refused {
            assert!(matches!(resized, Err(Error::Option { .. })), "{resized:?}");
            return;
        }
        resized.unwrap();
        self.model.resize(wanted, 0);
    }

    fn compare(&mut self, start: usize, size: usize) {
        let mut read = vec![0xAA; size];
        self.disk().read_at(&mut read, start as u64).unwrap();
        let wrong = (0..size).find(|index| read[*index] != self.model[start + index]);
        if let Some(index) = wrong {
            panic!(
                "byte {} reads {}, not {} (of {:?})",
                start + index,
                read[index],
                self.model[start + index],
                self.options,
            );
        }
    }

    fn status(&mut self, start: usize, size: usize) {
        let extent = self.disk().status(start as u64, size as u64).unwrap();
        assert!(extent.length >= 1 && extent.length <= size as u64);
        let range = start..start + extent.length as usize;
        if extent.kind != ExtentKind::Data {
            assert!(
                self.model[range].iter().all(|byte| *byte == 0),
                "{extent:?}"
            );
        }
        let layer = self.disk().layer_status(start as u64, size as u64).unwrap();
        let range = start..start + layer.length as usize;
        if matches!(layer.kind, LayerKind::Zero | LayerKind::ZeroAllocated) {
            assert!(self.model[range].iter().all(|byte| *byte == 0), "{layer:?}");
        }
    }

    fn check(&self) -> CheckReport {
        check(&self.file, Repair::None).unwrap()
    }
}

/// How many operations there were, and whether imago could read the image.
fn run(seed: u64) -> (usize, bool) {
    let mut rng = Rng::with_seed(seed);
    let mut case = Case::new(&mut rng);
    let operations = rng.usize(5..40);
    for _ in 0..operations {
        case.step(&mut rng);
        case.compare(0, case.model.len());
    }
    case.compare_snapshots();
    case.disk.take().unwrap().close().unwrap();
    let report = case.check();
    assert!(report.is_clean(), "{:?}: {report:?}", case.options);
    let read_by_imago = compare_with_others(&case);
    (operations, read_by_imago)
}

fn compare_with_others(case: &Case) -> bool {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    case.file
        .bytes()
        .to_file(&folder.path().join("image.qcow2"));
    std::fs::write(path("model.raw"), &case.model).unwrap();
    if let Some(backing) = &case.backing {
        std::fs::write(path("backing.raw"), backing).unwrap();
    }
    let image = path("image.qcow2");
    let read_by_imago = imago::compare(case, image.as_ref());
    qemu_img_ok(&["check", "-q", "-f", "qcow2", &image]);
    // qemu-img rounds lengths that are not whole sectors.
    let backing_bytes = case.backing.as_ref().map_or(0, Vec::len);
    if case.model.len().is_multiple_of(512) && backing_bytes.is_multiple_of(512) {
        let model = path("model.raw");
        qemu_img_ok(&["compare", "-f", "qcow2", "-F", "raw", &image, &model]);
    }
    snapshots::compare_with_qemu(case, &path, backing_bytes.is_multiple_of(512));
    read_by_imago
}

/// Sequences that run beside one another: `qemu-img` waits for the host's disk most of the time.
const AT_ONCE: usize = 4;

#[test]
fn random_sequences_match_a_model() {
    let first = seed();
    let count = rounds(500);
    let [next, operations, by_imago] = [const { AtomicU64::new(0) }; 3];
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                break;
            }
            let seed = first.wrapping_add(number);
            match std::panic::catch_unwind(|| run(seed)) {
                Ok((done, read_by_imago)) => {
                    operations.fetch_add(done as u64, Ordering::Relaxed);
                    by_imago.fetch_add(u64::from(read_by_imago), Ordering::Relaxed);
                }
                Err(panic) => {
                    println!("sequence {number}: VMFERRY_SEED={seed}");
                    std::panic::resume_unwind(panic);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(work);
        }
    });
    let [operations, by_imago] = [operations.into_inner(), by_imago.into_inner()];
    println!("{count} sequences from VMFERRY_SEED={first}, {operations} operations");
    println!("imago read {by_imago} images; the others say zstd");
    assert!(by_imago > count / 4);
}

#[test]
fn small_images_are_what_qemu_makes_of_them() {
    let file = MemoryFile::default();
    create(&file, &CreateOptions::new(10 << 20)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new.qcow2");
    file.bytes().to_file(&path);
    let info = qemu_img_ok(&[
        "info",
        "--output=json",
        "-f",
        "qcow2",
        path.to_str().unwrap(),
    ]);
    assert!(info.contains("\"virtual-size\": 10485760"), "{info}");
}
