//! The index that is written while a machine is parked.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use vmferry_image::{FileStorage, Image, IndexPlace, Storage};
use vmferry_ram::BlockIndex;
use vmferry_relay::park::{ParkOptions, Parker};

use crate::contents::{Contents, capture, captures, read, seeded};
use crate::recovery::package_end;

fn parker(path: &Path) -> Parker {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    let index = Some((path.to_owned(), IndexPlace::Beside));
    Parker::new(file, ParkOptions { index }).unwrap()
}

/// An image that must not have to be walked through.
fn open(path: &Path) -> Image {
    assert!(path.with_extension("vm.index").exists());
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, 0).unwrap());
    Image::open(storage, &IndexPlace::Beside, &mut |_| {
        panic!("the index was made anew")
    })
    .unwrap()
}

/// All of an image is what is in the stream.
fn check(name: &str, image: &Image, expected: &Contents) {
    let head = image.head();
    assert_eq!(head.blocks.len(), expected.memory.len(), "{name}");
    for (number, block) in head.blocks.iter().enumerate() {
        let (memory, absent) = &expected.memory[&block.name.to_string()];
        assert_eq!(block.absent_pages * 4096, *absent, "{name}, {}", block.name);
        for (page, content) in memory.chunks(4096).enumerate() {
            let mut found = vec![0; 4096];
            let stored = image
                .read_pages(BlockIndex(number), page as u64, &mut found)
                .unwrap();
            if stored.zero | stored.absent == 1 {
                found.fill(0);
            }
            assert!(found == content, "{name}: page {page} of {}", block.name);
        }
    }
    let devices = head.devices.iter();
    let devices: Vec<_> = devices
        .map(|device| (device.section.clone(), image.section_body(device).unwrap()))
        .collect();
    assert!(devices == expected.devices, "{name}");
    image.verify(&mut |_| ()).unwrap();
}

#[test]
fn a_parked_machine_has_its_index_at_once() {
    let mut rng = seeded();
    for name in captures() {
        let refused = ["blk-", "mapped-ram-", "multifd-", "preempt-"];
        if refused.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        let stream = capture(&name);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parked.vm");
        let mut parker = parker(&path);
        let mut rest = &stream[..];
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rng.usize(1..=rest.len().min(20_000)));
            parker
                .push(now)
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            rest = later;
        }
        parker
            .finish()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let (mut expected, ..) = read(&stream).unwrap();
        let image = open(&path);
        let description = image.description().unwrap();
        if image.head().devices.is_empty() || description.as_deref() == Some(b"{}") {
            expected.description.clone_from(&description);
        }
        assert!(description == expected.description, "{name}");
        check(&name, &image, &expected);
        // What the file does not say, for only a destination that was advised expects it.
        let mut blocks = image.head().blocks.iter();
        let is_huge = blocks.any(|block| block.page_bytes == 2 << 20);
        assert_eq!(is_huge, name.starts_with("postcopy-hugepages"), "{name}");
    }
}

/// What was half there of a page when the connection broke is not in the index, either.
#[test]
fn the_index_knows_what_came_over_other_connections() {
    let mut rng = seeded();
    let stream = capture("postcopy-100.fwd");
    let (expected, ..) = read(&stream).unwrap();
    let next = crate::recovery::NextConnection::new(&stream, &expected);
    for _ in 0..10 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("parked.vm");
        let mut parker = parker(&path);
        let cut = rng.usize(package_end(&stream)..stream.len());
        parker.push(&stream[..cut]).unwrap();
        parker.interrupted().unwrap();
        let received = expected.memory.keys().map(|block| {
            let name = vmferry_stream::Name::new(block).unwrap();
            (block.clone(), parker.received(&name).unwrap())
        });
        let rest = next.rest(&received.collect());
        parker.push(&rest).unwrap();
        parker.finish().unwrap();
        check(&format!("cut at {cut}"), &open(&path), &expected);
    }
}

#[test]
fn what_is_not_whole_has_no_index() {
    let stream = capture("pc-100");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("parked.vm");
    let mut parker = parker(&path);
    parker.push(&stream[..stream.len() - 1]).unwrap();
    parker.finish().unwrap_err();
    let names: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|it| it.unwrap().file_name())
        .collect();
    assert_eq!(names, ["parked.vm"]);
}

/// A machine is worth more than its index.
#[test]
fn a_machine_is_parked_without_an_index_where_that_cannot_be_written() {
    let stream = capture("postcopy-100.fwd");
    let folder = tempfile::tempdir().unwrap();
    let [path, index] = ["parked.vm", "there/index"].map(|name| folder.path().join(name));
    std::fs::create_dir(index.parent().unwrap()).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let place = Some((path.clone(), IndexPlace::At(index.clone())));
    let mut parker = Parker::new(file, ParkOptions { index: place }).unwrap();
    parker.push(&stream).unwrap();
    std::fs::remove_dir_all(index.parent().unwrap()).unwrap();
    let parked = parker.finish().unwrap();
    let why = parked.without_index.expect("a reason").to_string();
    assert!(why.contains("there/index"), "{why}");
    let (expected, ..) = read(&stream).unwrap();
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&path, 0).unwrap());
    let image = Image::open(storage, &IndexPlace::Beside, &mut |_| ()).unwrap();
    check("without an index", &image, &expected);
}
