//! Makes `images/`, small images of all shapes, and from them the seeds of the target `qcow2`.
//! Needs `qemu-img` and `qemu-io`.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vmferry_disk::{BlockDevice, Unmap};
use vmferry_qcow2::header::DIRTY;
use vmferry_qcow2::{
    CreateOptions, FileStorage, NewSnapshot, OpenOptions, Qcow2Disk, Storage, create,
};

type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// In the order of the target.
const NAMES: [&str; 12] = [
    "snapshots-512",
    "deflate-4k",
    "zstd-1k",
    "backed-4k",
    "zeroes-512",
    "bitmaps-512",
    "v2-1k",
    "refcounts-1-bit",
    "refcounts-64-bits",
    "vm-state-512",
    "dirty-512",
    "clusters-64k",
];

struct Folder(PathBuf);

impl Folder {
    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// A new image of `qemu-img`, with some data.
    fn make(&self, name: &str, options: &str, size: &str) -> Outcome<String> {
        let path = self.path(name);
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", options, &path, size],
        )?;
        io(&path, &["write -P 17 0 5000", "write -P 18 20000 3000"])?;
        Ok(path)
    }

    /// The same from a raw file, compressed.
    fn compress(&self, name: &str, options: &str) -> Outcome<String> {
        let (raw, path) = (self.path("raw"), self.path(name));
        let bytes: Vec<u8> = (0..40_960_u32).map(|at| (at / 100) as u8).collect();
        fs::write(&raw, bytes)?;
        run(
            "qemu-img",
            &[
                "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, &raw, &path,
            ],
        )?;
        io(&path, &["write -P 19 8000 6000"])?;
        Ok(path)
    }
}

fn run(program: &str, arguments: &[&str]) -> Outcome {
    let status = Command::new(program)
        .args(arguments)
        .stdout(std::process::Stdio::null())
        .status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{program} {arguments:?}: {status}").into()),
    }
}

fn io(path: &str, commands: &[&str]) -> Outcome {
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(path);
    run("qemu-io", &arguments)
}

fn snapshot(path: &str, name: &str) -> Outcome {
    run("qemu-img", &["snapshot", "-c", name, path])
}

fn open(path: &str) -> Outcome<Qcow2Disk> {
    let storage = FileStorage::open(path, false, true)?;
    Ok(Qcow2Disk::open(
        Arc::new(storage),
        OpenOptions::default(),
        None,
    )?)
}

/// An image that only we had a hand in.
fn ours(path: &str, options: &CreateOptions) -> Outcome<Qcow2Disk> {
    let storage = FileStorage::create(path, true)?;
    create(&storage, options)?;
    let disk = Qcow2Disk::open(Arc::new(storage), OpenOptions::default(), None)?;
    disk.write_at(&[21; 9000], 3000)?;
    Ok(disk)
}

fn make(folder: &Folder, name: &str) -> Outcome<String> {
    let path = match name {
        "snapshots-512" => {
            let path = folder.make(name, "cluster_size=512", "64k")?;
            snapshot(&path, "one")?;
            io(&path, &["write -P 22 1000 9000"])?;
            snapshot(&path, "two")?;
            io(&path, &["write -P 23 4000 900", "discard 20480 1024"])?;
            path
        }
        "deflate-4k" => folder.compress(name, "cluster_size=4k")?,
        "zstd-1k" => {
            let path = folder.compress(name, "cluster_size=1k,compression_type=zstd")?;
            snapshot(&path, "one")?;
            io(&path, &["write -P 24 0 3000"])?;
            path
        }
        "backed-4k" => {
            fs::write(folder.path("below"), [9; 50_176])?;
            let options = "cluster_size=4k,backing_file=below,backing_fmt=raw";
            folder.make(name, options, "96k")?
        }
        "zeroes-512" => {
            let path = folder.make(name, "cluster_size=512", "64k")?;
            io(
                &path,
                &[
                    "write -z 1024 2048",
                    "write -z -u 20480 1024",
                    "write -z 40960 4096",
                ],
            )?;
            path
        }
        "bitmaps-512" => {
            let path = folder.make(name, "cluster_size=512", "512k")?;
            run(
                "qemu-img",
                &["bitmap", "--add", "-g", "512", &path, "records"],
            )?;
            run(
                "qemu-img",
                &["bitmap", "--add", "--disable", &path, "frozen"],
            )?;
            io(&path, &["write -P 25 30000 9000"])?;
            path
        }
        "v2-1k" => {
            let path = folder.make(name, "compat=0.10,cluster_size=1k", "128k")?;
            snapshot(&path, "one")?;
            io(&path, &["write -P 26 0 2000"])?;
            path
        }
        "refcounts-1-bit" => folder.make(name, "refcount_bits=1,cluster_size=512", "64k")?,
        "refcounts-64-bits" => {
            let path = folder.make(name, "refcount_bits=64,cluster_size=512", "48k")?;
            snapshot(&path, "one")?;
            io(&path, &["write -P 27 0 2000"])?;
            path
        }
        "vm-state-512" => {
            let path = folder.path(name);
            let options = CreateOptions {
                cluster_bits: 9,
                refcount_order: 3,
                ..CreateOptions::new(50_001)
            };
            let disk = ours(&path, &options)?;
            let mut writer = disk.vm_state_writer()?;
            writer.write_all(&[28; 5000])?;
            let vm_state_bytes = writer.finish()?;
            disk.create_snapshot(&NewSnapshot {
                name: "with-state",
                date: (1_700_000_000, 5),
                guest_nanoseconds: 1_234_000_000,
                vm_state_bytes,
                icount: Some(77),
            })?;
            disk.write_at(&[29; 5000], 6000)?;
            disk.write_zeroes(0, 2048, Unmap::May, false)?;
            disk.close()?;
            path
        }
        "dirty-512" => {
            let path = folder.make(name, "cluster_size=512,lazy_refcounts=on", "64k")?;
            FileStorage::open(&path, false, true)?.write_at(&DIRTY.to_be_bytes(), 72)?;
            path
        }
        _ => {
            let path = folder.make(name, "cluster_size=64k", "1M")?;
            snapshot(&path, "one")?;
            io(&path, &["write -P 30 65536 100"])?;
            path
        }
    };
    // Every image that is not dirty can be opened and closed.
    if name != "backed-4k" && name != "dirty-512" {
        open(&path)?.close()?;
    }
    Ok(path)
}

/// All operations, with ranges that depend on `salt`.
fn operations(salt: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut operation = |code: u8, arguments: &[u8]| {
        bytes.push(code);
        bytes.extend(arguments);
    };
    operation(0, &[1, salt, 8, 0, 0x31]);
    operation(7, &[0, 9, 0xa0, salt]);
    operation(1, &[0, salt, 12, 3, 0x33]);
    operation(3, &[2, salt, 4, 2, salt]);
    operation(4, &[0, 0, 2, salt]);
    operation(6, &[]);
    operation(11, &[0, salt, 9, 1]);
    operation(8, &[salt]);
    operation(10, &[1]);
    operation(12, &[]);
    operation(7, &[0, 1, 0, 0]);
    operation(5, &[0x20, salt | 1]);
    operation(2, &[0, 3, 0, 201, 0x35]);
    operation(9, &[salt]);
    operation(13, &[]);
    operation(0, &[0, 77, 16, salt, 0x37]);
    bytes
}

/// Patches: place, how, value. Each breaks what the issue of hostile images is about.
const BROKEN: [(&str, u8, u16, u8, u64); 8] = [
    ("l1-of-2-31", 0, 36, 1, 1 << 31),
    ("refcount-table-of-0", 0, 56, 1, 0),
    ("snapshots-2-32", 0, 60, 1, 0xffff_ffff),
    ("table-past-end", 0, 40, 2, 1 << 40),
    ("l1-entry-elsewhere", 1, 0, 4, 2 << 16 | 1 << 63),
    ("short-file", 0, 0, 7, 4096 << 8 | 1),
    ("long-file", 0, 0, 7, 100 << 28),
    ("no-cluster-size", 0, 20, 1, 63),
];

fn main() -> Outcome {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (images, seeds) = (root.join("images"), root.join("seeds/qcow2"));
    fs::create_dir_all(&images)?;
    fs::create_dir_all(&seeds)?;
    let folder =
        Folder(std::env::temp_dir().join(format!("vmferry-images-{}", std::process::id())));
    fs::create_dir(&folder.0)?;
    let made = make_all(&folder, &images, &seeds);
    fs::remove_dir_all(&folder.0)?;
    made
}

fn make_all(folder: &Folder, images: &Path, seeds: &Path) -> Outcome {
    for (number, name) in (0_u8..).zip(NAMES) {
        let bytes = fs::read(make(folder, name)?)?;
        let mut packed = Vec::new();
        xz2::read::XzEncoder::new(&bytes[..], 9).read_to_end(&mut packed)?;
        println!("{name}: {} bytes, {} packed", bytes.len(), packed.len());
        fs::write(images.join(format!("{name}.qcow2.xz")), packed)?;
        let seed = [&[number, number & 1, 0][..], &operations(number * 7)].concat();
        fs::write(seeds.join(name), seed)?;
        let mended = [
            &[number, 0, 1, 3, 0, number, 0][..],
            &[0; 7],
            &[1],
            &operations(number),
        ];
        fs::write(seeds.join(format!("{name}-broken")), mended.concat())?;
        if name == "refcounts-64-bits" {
            let short = &bytes[..bytes.len().min(0xffff)];
            let length = (short.len() as u16).to_be_bytes();
            let seed = [&[0xff, 0][..], &length, short, &operations(3)].concat();
            fs::write(seeds.join("whole"), seed)?;
        }
    }
    for (name, place, index, how, value) in BROKEN {
        let [high, low] = index.to_be_bytes();
        let patch = [&[0, 0, 1, place, high, low, how][..], &value.to_be_bytes()].concat();
        fs::write(seeds.join(name), [&patch[..], &operations(5)].concat())?;
    }
    Ok(())
}
