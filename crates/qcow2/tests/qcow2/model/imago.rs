//! The crate `imago` reads what we wrote, and writes what we read: plain I/O, without snapshots.

use std::io;
use std::path::Path;

use fastrand::Rng;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{
    FormatAccess, FormatCreateBuilder, FormatDriverBuilder, PermissiveImplicitOpenGate, Storage,
    StorageCreateOptions,
};
use vmferry_disk::BlockDevice;
use vmferry_qcow2::header::Compression;
use vmferry_qcow2::{FileStorage, Repair, check, open};

use super::{Case, random_bytes};
use crate::support::{Folder, mixed_bytes, qemu_img_ok, rounds, seed};

fn access(path: &Path, write: bool) -> io::Result<FormatAccess<File>> {
    let gate = PermissiveImplicitOpenGate::default();
    let image = Qcow2::<File>::builder_path(path).write(write).open(gate)?;
    Ok(FormatAccess::new(image))
}

/// It sees what the model holds; or it does not know the feature bit that says zstd, though nothing
/// is compressed.
pub(super) fn compare(case: &Case, image: &Path) -> bool {
    if case.options.compression == Compression::Zstd {
        return false;
    }
    let image = access(image, false).unwrap_or_else(|error| panic!("{error}: {:?}", case.options));
    assert_eq!(image.size(), case.model.len() as u64);
    let mut read = vec![0xEE; case.model.len()];
    image.read(&mut read[..], 0).unwrap();
    let wrong = (0..read.len()).find(|at| read[*at] != case.model[*at]);
    assert_eq!(wrong, None, "imago reads this byte otherwise");
    true
}

/// It made and wrote the image, we read and write it, it reads and writes again.
#[test]
fn images_go_to_and_fro_between_imago_and_us() {
    let first = seed();
    for number in 0..rounds(40) {
        let seed = first.wrapping_add(number);
        println!("VMFERRY_SEED={seed}");
        to_and_fro(&mut Rng::with_seed(seed));
    }
}

fn to_and_fro(rng: &mut Rng) {
    let folder = Folder::new();
    let path = folder.path("image.qcow2");
    let cluster_bits = rng.u32(9..=21);
    let mut model = vec![
        0;
        rng.usize(1..(8 << cluster_bits).min(4 << 20))
            .next_multiple_of(512)
    ];
    let file = File::create_open(StorageCreateOptions::new().filename(&path)).unwrap();
    Qcow2::<File>::create_builder(file)
        .size(model.len() as u64)
        .cluster_size(1 << cluster_bits)
        .refcount_width(1 << rng.u32(0..=6))
        .create()
        .unwrap();
    for _ in 0..3 {
        let image = access(Path::new(&path), true).unwrap();
        for _ in 0..rng.usize(1..20) {
            let (start, data) = change(rng, &mut model, 1 << cluster_bits);
            match data {
                Some(data) => image.write(&data[..], start).unwrap(),
                None => image.write_zeroes(start, 1 << cluster_bits).unwrap(),
            }
        }
        image.flush().unwrap();
        drop(image);
        let ours = crate::interop::WRITE;
        let disk = open(&path, ours).unwrap();
        let mut read = vec![0xEE; model.len()];
        disk.read_at(&mut read, 0).unwrap();
        assert!(read == model, "we read what imago wrote");
        for _ in 0..rng.usize(1..20) {
            let (start, data) = change(rng, &mut model, 1 << cluster_bits);
            match data {
                Some(data) => disk.write_at(&data, start).unwrap(),
                None => disk.discard(start, 1 << cluster_bits).unwrap(),
            }
        }
        disk.close().unwrap();
        let image = access(Path::new(&path), false).unwrap();
        image.read(&mut read[..], 0).unwrap();
        assert!(read == model, "imago reads what we wrote");
        drop(image);
        let storage = FileStorage::open(&path, true, true).unwrap();
        let report = check(&storage, Repair::None).unwrap();
        assert!(report.is_clean(), "{report:?}");
        qemu_img_ok(&["check", "-q", "-f", "qcow2", &path]);
    }
}

/// Some bytes at some place, or nothing but zeroes in a whole cluster, in the model already.
fn change(rng: &mut Rng, model: &mut [u8], cluster: usize) -> (u64, Option<Vec<u8>>) {
    let start = rng.usize(..model.len());
    let whole = start - start % cluster;
    if rng.u8(..4) == 0 && whole + cluster <= model.len() {
        model[whole..whole + cluster].fill(0);
        return (whole as u64, None);
    }
    let most = [512, cluster, 4 * cluster][rng.usize(..3)];
    let size = rng.usize(1..=most).min(model.len() - start);
    let data = match rng.bool() {
        true => random_bytes(rng, size),
        false => mixed_bytes(rng, size),
    };
    model[start..start + size].copy_from_slice(&data);
    (start as u64, Some(data))
}
