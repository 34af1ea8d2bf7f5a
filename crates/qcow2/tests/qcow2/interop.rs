//! Images that QEMU made are read and changed; images that we made are read and changed by QEMU.

use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;
use vmferry_disk::{BlockDevice, ExtentKind, Unmap};
use vmferry_qcow2::bitmaps::BitmapDirectory;
use vmferry_qcow2::header::{BITMAPS, BackingFormat, Compression, DIRTY, Header};
use vmferry_qcow2::{
    ChainOptions, CreateOptions, Error, FileStorage, LayerKind, OpenOptions, Qcow2Disk, Repair,
    Storage, check, create, open,
};

use crate::support::{Bytes, Folder, MemoryFile, mixed_bytes, qemu_img, qemu_img_ok, rounds, seed};

pub(crate) const WRITE: ChainOptions = ChainOptions {
    read_only: false,
    lock: true,
};
const READ: ChainOptions = ChainOptions {
    read_only: true,
    lock: true,
};

fn rng() -> Rng {
    let seed = seed();
    println!("VMFERRY_SEED={seed}");
    Rng::with_seed(seed)
}

pub(crate) fn read_all(disk: &Qcow2Disk) -> Vec<u8> {
    let mut bytes = vec![0xEE; disk.disk_bytes() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

pub(crate) fn assert_same(left: &[u8], right: &[u8]) {
    assert_eq!(left.len(), right.len());
    let differs = (0..left.len()).find(|at| left[*at] != right[*at]);
    assert_eq!(differs, None, "they differ at this byte");
}

pub(crate) fn assert_clean(path: &str) {
    qemu_img_ok(&["check", "-q", "-f", "qcow2", path]);
    let storage = FileStorage::open(path, true, true).unwrap();
    let report = check(&storage, Repair::None).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// Writes, zeroes and discards all over the disk, mirrored in `model`.
pub(crate) fn change(rng: &mut Rng, disk: &Qcow2Disk, model: &mut [u8], count: usize) {
    let cluster = 1 << disk.geometry().cluster_bits;
    for _ in 0..count {
        let start = rng.usize(..model.len());
        let most = [1, cluster, 8 * cluster][rng.usize(..3)];
        let size = rng.usize(1..=most).min(model.len() - start);
        let (range, at) = (start..start + size, start as u64);
        match rng.u8(..5) {
            0 => {
                let unmap = if rng.bool() { Unmap::May } else { Unmap::Never };
                disk.write_zeroes(at, size as u64, unmap, false).unwrap();
                model[range].fill(0);
            }
            1 => {
                disk.discard(at, size as u64).unwrap();
                disk.read_at(&mut model[range], at).unwrap();
            }
            2 if rng.u8(..4) == 0 => disk.flush().unwrap(),
            _ => {
                let data = vec![rng.u8(1..); size];
                disk.write_at(&data, at).unwrap();
                model[range].copy_from_slice(&data);
            }
        }
    }
}

#[test]
fn all_shapes_that_qemu_makes_are_read_and_changed() {
    let mut rng = rng();
    let folder = Folder::new();
    let (raw, image) = (folder.path("raw"), folder.path("image"));
    let shapes: &[&[&str]] = &[
        &[],
        &["-c"],
        &["-c", "-o", "compression_type=zstd"],
        &["-c", "-o", "cluster_size=512"],
        &["-c", "-o", "cluster_size=4k,compression_type=zstd"],
        &["-c", "-o", "cluster_size=2M"],
        &["-c", "-o", "cluster_size=2M,compression_type=zstd"],
        &["-c", "-o", "compat=0.10"],
        &["-o", "compat=0.10,cluster_size=1k"],
        &["-o", "refcount_bits=1"],
        &["-o", "refcount_bits=2,cluster_size=1k"],
        &["-o", "refcount_bits=4"],
        &["-o", "refcount_bits=8,cluster_size=512"],
        &["-o", "refcount_bits=32"],
        &["-o", "refcount_bits=64,cluster_size=512"],
        &["-o", "lazy_refcounts=on"],
        &["-o", "preallocation=metadata"],
        &["-o", "preallocation=falloc"],
        &["-o", "preallocation=full,cluster_size=8k"],
    ];
    for shape in shapes {
        println!("{shape:?}");
        let length = rng.usize(1..8 << 20).next_multiple_of(512);
        let mut model = mixed_bytes(&mut rng, length);
        std::fs::write(&raw, &model).unwrap();
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2"];
        arguments.extend_from_slice(shape);
        arguments.extend_from_slice(&[&raw, &image]);
        qemu_img_ok(&arguments);
        assert_clean(&image);
        let disk = open(&image, READ).unwrap();
        assert_same(&read_all(&disk), &model);
        drop(disk);
        let disk = open(&image, WRITE).unwrap();
        change(&mut rng, &disk, &mut model, 60);
        assert_same(&read_all(&disk), &model);
        disk.close().unwrap();
        assert_clean(&image);
        std::fs::write(&raw, &model).unwrap();
        qemu_img_ok(&["compare", "-f", "raw", "-F", "qcow2", &raw, &image]);
    }
}

#[test]
fn chains_are_opened_to_their_end() {
    let mut rng = rng();
    let folder = Folder::new();
    let names = ["base", "middle", "top"].map(|name| folder.path(name));
    let [base, middle, top] = &names;
    let mut model = mixed_bytes(&mut rng, 300_032);
    std::fs::write(base, &model).unwrap();
    let backed = |format: &str, below: &str, options: &str, image: &str, size: &str| {
        let arguments = ["create", "-q", "-f", "qcow2", "-F", format, "-b", below];
        qemu_img_ok(&[&arguments[..], &["-o", options, image, size]].concat());
    };
    // Longer than what is below, then shorter again.
    backed("raw", base, "cluster_size=4k", middle, "1M");
    backed("qcow2", "middle", "cluster_size=64k", top, "700k");
    model.resize(700 << 10, 0);
    let disk = open(middle, WRITE).unwrap();
    let mut lower = model.clone();
    change(&mut rng, &disk, &mut lower, 20);
    disk.close().unwrap();
    let disk = open(top, WRITE).unwrap();
    assert_same(&read_all(&disk), &lower);
    let extent = disk.layer_status(0, 700 << 10).unwrap();
    assert_eq!(extent.kind, LayerKind::Unallocated);
    assert_eq!(extent.length, 700 << 10);
    change(&mut rng, &disk, &mut lower, 20);
    disk.resize(900 << 10).unwrap();
    lower.resize(900 << 10, 0);
    assert_same(&read_all(&disk), &lower);
    disk.close().unwrap();
    assert_clean(top);
    let flat = folder.path("flat");
    std::fs::write(&flat, &lower).unwrap();
    qemu_img_ok(&["compare", "-f", "raw", "-F", "qcow2", &flat, top]);
}

#[test]
fn what_is_below_is_never_guessed_and_never_a_loop() {
    let folder = Folder::new();
    let (a, b) = (folder.path("a"), folder.path("b"));
    let make = |path: &str, below: &str, format: BackingFormat| {
        let options = CreateOptions {
            backing: Some((below.to_owned(), format)),
            ..CreateOptions::new(1 << 20)
        };
        let _ = std::fs::remove_file(path);
        create(&FileStorage::create(path, true).unwrap(), &options).unwrap();
    };
    let refusal = |path: &str| open(path, READ).unwrap_err().to_string();
    make(&a, "b", BackingFormat::Qcow2);
    make(&b, "a", BackingFormat::Qcow2);
    assert!(refusal(&a).contains("comes back"), "{}", refusal(&a));
    make(&a, "a", BackingFormat::Raw);
    assert!(refusal(&a).contains("comes back"), "{}", refusal(&a));
    make(&a, "missing", BackingFormat::Raw);
    assert!(refusal(&a).contains("missing"), "{}", refusal(&a));
    make(&a, "nbd:unix:/x", BackingFormat::Raw);
    assert!(refusal(&a).contains("protocol \"nbd\""), "{}", refusal(&a));
    make(&a, "json:{}", BackingFormat::Raw);
    assert!(refusal(&a).contains("protocol \"json\""), "{}", refusal(&a));
    // A guest wrote a qcow2 header into its raw disk: it is data.
    make(&b, "/etc/hostname", BackingFormat::Raw);
    make(&a, "file:b", BackingFormat::Raw);
    let disk = open(&a, READ).unwrap();
    let mut start = [0; 4];
    disk.read_at(&mut start, 0).unwrap();
    assert_eq!(start, vmferry_disk::QCOW2_MAGIC);
    drop(disk);
    // Without a format, and with one that we do not have.
    let mut bytes = std::fs::read(&a).unwrap();
    let place = bytes
        .windows(3)
        .position(|window| window == b"raw")
        .unwrap();
    bytes[place..place + 3].copy_from_slice(b"vdi");
    std::fs::write(&a, &bytes).unwrap();
    assert!(
        refusal(&a).contains("\"vdi\" is neither raw nor qcow2"),
        "{}",
        refusal(&a)
    );
    bytes[112..116].fill(0);
    std::fs::write(&a, &bytes).unwrap();
    assert!(refusal(&a).contains("never guessed"), "{}", refusal(&a));
}

#[test]
fn a_chain_has_an_end() {
    let folder = Folder::new();
    let bottom = folder.path("0");
    std::fs::write(&bottom, [0x77; 4096]).unwrap();
    for number in 1..=64 {
        let format = if number == 1 {
            BackingFormat::Raw
        } else {
            BackingFormat::Qcow2
        };
        let options = CreateOptions {
            cluster_bits: 9,
            backing: Some(((number - 1).to_string(), format)),
            ..CreateOptions::new(4096)
        };
        let path = folder.path(&number.to_string());
        create(&FileStorage::create(path, true).unwrap(), &options).unwrap();
    }
    let disk = open(folder.path("63"), READ).unwrap();
    assert_eq!(read_all(&disk), [0x77; 4096]);
    let error = open(folder.path("64"), READ).unwrap_err().to_string();
    assert!(error.contains("more than 64 images"), "{error}");
}

#[test]
fn snapshots_keep_their_content_whatever_is_written() {
    let mut rng = rng();
    let folder = Folder::new();
    let (raw, image) = (folder.path("raw"), folder.path("image"));
    for round in 0..rounds(6) {
        let length = rng.usize(1..2 << 20).next_multiple_of(512);
        let mut model = mixed_bytes(&mut rng, length);
        std::fs::write(&raw, &model).unwrap();
        let options = format!(
            "cluster_size={},refcount_bits={},compat={}",
            [512, 1024, 4096, 65536][rng.usize(..4)],
            16,
            if round % 3 == 2 { "0.10" } else { "1.1" },
        );
        println!("{options}");
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", &options];
        if rng.bool() {
            arguments.push("-c");
        }
        arguments.extend_from_slice(&[&raw, &image]);
        qemu_img_ok(&arguments);
        let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
        for number in 0..4 {
            let name = format!("s{number}");
            qemu_img_ok(&["snapshot", "-c", &name, &image]);
            snapshots.push((name, model.clone()));
            let disk = open(&image, WRITE).unwrap();
            assert_same(&read_all(&disk), &model);
            change(&mut rng, &disk, &mut model, 15);
            if round % 3 == 0 {
                let wanted = rng.usize(512..=model.len() * 5 / 4).next_multiple_of(512);
                disk.resize(wanted as u64).unwrap();
                model.resize(wanted, 0);
                assert_same(&read_all(&disk), &model);
            }
            disk.close().unwrap();
            assert_clean(&image);
        }
        let dropped = snapshots.remove(rng.usize(..snapshots.len())).0;
        qemu_img_ok(&["snapshot", "-d", &dropped, &image]);
        let disk = open(&image, WRITE).unwrap();
        change(&mut rng, &disk, &mut model, 15);
        disk.close().unwrap();
        assert_clean(&image);
        for (name, content) in &snapshots {
            qemu_img_ok(&["snapshot", "-a", name, &image]);
            std::fs::write(&raw, content).unwrap();
            qemu_img_ok(&["compare", "-f", "raw", "-F", "qcow2", &raw, &image]);
            assert_same(&read_all(&open(&image, READ).unwrap()), content);
        }
        assert_clean(&image);
    }
}

#[test]
fn bitmaps_that_record_are_marked_and_others_stay_valid() {
    let folder = Folder::new();
    let image = folder.path("image");
    qemu_img_ok(&["create", "-q", "-f", "qcow2", &image, "64M"]);
    qemu_img_ok(&["bitmap", "--add", &image, "recording"]);
    qemu_img_ok(&["bitmap", "--add", "--disable", &image, "frozen"]);
    let bitmaps = || {
        let storage = FileStorage::open(&image, true, true).unwrap();
        let header = Header::read(&storage).unwrap();
        let file_end = storage.length().unwrap();
        let directory = BitmapDirectory::read(&storage, &header, file_end.next_multiple_of(65536));
        let directory = directory.unwrap().unwrap();
        let states = directory.bitmaps.into_iter();
        let mut states: Vec<_> = states.map(|bitmap| (bitmap.name, bitmap.in_use)).collect();
        states.sort();
        states
    };
    let state = |frozen, recording| {
        vec![
            ("frozen".to_owned(), frozen),
            ("recording".to_owned(), recording),
        ]
    };
    // Opened, not changed.
    let disk = open(&image, WRITE).unwrap();
    disk.read_at(&mut [0; 512], 0).unwrap();
    disk.close().unwrap();
    assert_eq!(bitmaps(), state(false, false));
    let disk = open(&image, WRITE).unwrap();
    disk.write_at(&[1; 512], 0).unwrap();
    disk.close().unwrap();
    assert_eq!(bitmaps(), state(false, true));
    assert_clean(&image);
    let info = qemu_img_ok(&["info", "-f", "qcow2", &image]);
    assert!(info.contains("in-use") && info.contains("frozen"), "{info}");
    let disk = open(&image, WRITE).unwrap();
    disk.resize(128 << 20).unwrap();
    disk.close().unwrap();
    assert_eq!(bitmaps(), state(true, true));
    assert_clean(&image);
    qemu_img_ok(&["bitmap", "--remove", &image, "recording"]);
    qemu_img_ok(&["bitmap", "--remove", &image, "frozen"]);
    assert_clean(&image);
}

#[test]
fn broken_bitmaps_are_dropped() {
    let folder = Folder::new();
    let image = folder.path("image");
    qemu_img_ok(&["create", "-q", "-f", "qcow2", &image, "64M"]);
    qemu_img_ok(&["bitmap", "--add", &image, "recording"]);
    let file = MemoryFile::new(Bytes::from_file(Path::new(&image)));
    let header = Header::read(&file).unwrap();
    let extension = header
        .extension(vmferry_qcow2::header::EXTENSION_BITMAPS)
        .unwrap();
    file.write_at(&u64::MAX.to_be_bytes(), extension.offset + 16)
        .unwrap();
    let disk = Qcow2Disk::open(Arc::new(file.clone()), OpenOptions::default(), None).unwrap();
    disk.write_at(&[1; 512], 0).unwrap();
    disk.close().unwrap();
    assert_eq!(Header::read(&file).unwrap().autoclear & BITMAPS, 0);
    let report = check(&file, Repair::Leaks).unwrap();
    assert_eq!(report.errors, 0, "{report:?}");
    assert!(report.leaks > 0 && report.is_clean(), "{report:?}");
}

#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    let mut rng = rng();
    let folder = Folder::new();
    let (raw, image) = (folder.path("raw"), folder.path("image"));
    let model = mixed_bytes(&mut rng, 4 << 20);
    std::fs::write(&raw, &model).unwrap();
    let options = "lazy_refcounts=on,cluster_size=4k";
    qemu_img_ok(&[
        "convert", "-f", "raw", "-O", "qcow2", "-o", options, &raw, &image,
    ]);
    let file = MemoryFile::new(Bytes::from_file(Path::new(&image)));
    let header = Header::read(&file).unwrap();
    let mut table = [0; 8];
    file.read_at(&mut table, header.refcount_table_offset)
        .unwrap();
    // As if none of the counts had been written.
    file.write_at(&[0; 4096], u64::from_be_bytes(table))
        .unwrap();
    file.write_at(&DIRTY.to_be_bytes(), 72).unwrap();
    let read_only = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = Qcow2Disk::open(Arc::new(file.clone()), read_only, None).unwrap();
    assert_same(&read_all(&disk), &model);
    assert_eq!(disk.header().incompatible, DIRTY, "reading changes nothing");
    let disk = Qcow2Disk::open(Arc::new(file.clone()), OpenOptions::default(), None).unwrap();
    assert_same(&read_all(&disk), &model);
    assert_eq!(disk.header().incompatible, 0);
    disk.write_at(&[1; 5000], 0).unwrap();
    disk.close().unwrap();
    assert!(check(&file, Repair::None).unwrap().is_clean());
    file.bytes().to_file(Path::new(&image));
    assert_clean(&image);
}

#[test]
fn qemu_reads_and_changes_what_we_made() {
    let mut rng = rng();
    let folder = Folder::new();
    let (raw, image) = (folder.path("raw"), folder.path("image"));
    for (version, cluster_bits, refcount_order, compression) in [
        (2, 16, 4, Compression::Deflate),
        (3, 9, 0, Compression::Zstd),
        (3, 12, 6, Compression::Deflate),
        (3, 21, 3, Compression::Zstd),
    ] {
        let _ = std::fs::remove_file(&image);
        let options = CreateOptions {
            version,
            cluster_bits,
            refcount_order,
            compression,
            lazy_refcounts: version == 3,
            ..CreateOptions::new(5_000_192)
        };
        create(&FileStorage::create(&image, true).unwrap(), &options).unwrap();
        assert_clean(&image);
        let mut model = vec![0; 5_000_192];
        let disk = open(&image, WRITE).unwrap();
        change(&mut rng, &disk, &mut model, 30);
        disk.close().unwrap();
        model[1_000_000..1_500_000].fill(0x42);
        let output = std::process::Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -P 0x42 1000000 500000", &image])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        let disk = open(&image, WRITE).unwrap();
        assert_same(&read_all(&disk), &model);
        change(&mut rng, &disk, &mut model, 30);
        disk.close().unwrap();
        assert_clean(&image);
        std::fs::write(&raw, &model).unwrap();
        qemu_img_ok(&["compare", "-f", "raw", "-F", "qcow2", &raw, &image]);
    }
}

#[test]
fn an_image_in_use_is_not_opened() {
    let folder = Folder::new();
    let image = folder.path("image");
    qemu_img_ok(&["create", "-q", "-f", "qcow2", &image, "1M"]);
    let disk = open(&image, WRITE).unwrap();
    let (status, text) = qemu_img(&["snapshot", "-c", "no", &image]);
    assert!(status != 0 && text.contains("lock"), "{text}");
    let refused = open(&image, WRITE).unwrap_err();
    assert!(matches!(refused, Error::Open(_)), "{refused}");
    drop(disk);
    open(&image, WRITE).unwrap().close().unwrap();
}

#[test]
fn kinds_of_clusters_are_told_apart() {
    let file = MemoryFile::default();
    create(&file, &CreateOptions::new(1 << 20)).unwrap();
    let disk = Qcow2Disk::open(Arc::new(file), OpenOptions::default(), None).unwrap();
    let cluster = 65536;
    disk.write_at(&vec![1; cluster as usize], cluster).unwrap();
    disk.write_zeroes(2 * cluster, cluster, Unmap::Never, true)
        .unwrap();
    let status = |index: u64| disk.status(index * cluster, cluster).unwrap().kind;
    assert_eq!(status(0), ExtentKind::Hole);
    assert_eq!(status(1), ExtentKind::Data);
    assert_eq!(status(2), ExtentKind::Zero);
    assert_eq!(disk.status(0, 1 << 20).unwrap().length, cluster);
    disk.write_zeroes(cluster, cluster, Unmap::May, true)
        .unwrap();
    assert_eq!(status(1), ExtentKind::Hole);
}
