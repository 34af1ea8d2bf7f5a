//! How much memory a large machine takes: that of this process, so there is one test.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use vmferry_image::{Identity, Image, IndexBuilder, IndexPlace, Storage};
use vmferry_ram::BlockIndex;
use vmferry_stream::{Name, RamPage, RamRecord, Record};

const PAGE: u64 = 4096;
const RECORD: u64 = 8 + PAGE;
/// 64 GiB.
const PAGES: u64 = 1 << 24;
const MEMORY_MAX_KIB: u64 = 64 << 10;

/// An image that is made up where it is read: the page at the `n`-th place is filled with `n`.
struct Endless {
    index: PathBuf,
}

/// In no order, but each once.
fn page_at(place: u64) -> u64 {
    place.wrapping_mul(0x9e37_79b1) % PAGES
}

fn content(place: u64) -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    for word in page.chunks_exact_mut(8) {
        word.copy_from_slice(&(place + 1).to_le_bytes());
    }
    page
}

impl Storage for Endless {
    fn read_at(&self, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let place = offset / RECORD;
            let word = (page_at(place) * PAGE) | 0x28;
            let record = [&word.to_be_bytes()[..], &content(place)].concat();
            let record = &record[usize::try_from(offset % RECORD).unwrap()..];
            let now = record.len().min(into.len());
            let (part, rest) = into.split_at_mut(now);
            part.copy_from_slice(&record[..now]);
            offset += now as u64;
            into = rest;
        }
        Ok(())
    }

    fn start(&self) -> u64 {
        0
    }

    fn length(&self) -> u64 {
        PAGES * RECORD
    }

    fn identity(&self) -> Identity {
        Identity {
            bytes: self.length(),
            modified_ns: 0,
            tag: 0,
        }
    }

    fn name(&self) -> String {
        "endless".into()
    }

    fn index_path(&self) -> Option<PathBuf> {
        Some(self.index.clone())
    }

    fn mode(&self) -> u32 {
        0o600
    }
}

/// The most that this process has had.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

/// A guest of 64 GiB whose pages come in no order at all: the worst case, each in another chunk than the
/// one before.
#[test]
fn a_large_machine_takes_little_memory() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Arc::new(Endless {
        index: folder.path().join("index"),
    });
    let before = peak_kib();
    let mut index = IndexBuilder::new(&IndexPlace::Beside, &*storage).unwrap();
    let name = Name::new("pc.ram").unwrap();
    let block = RamRecord::Block {
        name: name.clone(),
        used_bytes: PAGES * PAGE,
        page_bytes: None,
        guest_address: None,
        mapped: None,
    };
    index.record(0, 0, &Record::Ram(block)).unwrap();
    let step = 1 << 9;
    for place in (0..PAGES).step_by(step) {
        let page = RamPage {
            block: name.clone(),
            offset_bytes: page_at(place) * PAGE,
        };
        let offset = place * RECORD;
        let bytes = PAGE as u32;
        let record = Record::Ram(RamRecord::Page { page, bytes });
        index.record(offset, 8, &record).unwrap();
        index.payload(offset + 8, &content(place)).unwrap();
    }
    index.record(0, 1, &Record::Eof).unwrap();
    index.publish(&*storage).unwrap();
    let made = peak_kib() - before;
    assert!(made < MEMORY_MAX_KIB, "{made} KiB to make an index");

    let open = || {
        Image::open(storage.clone(), &IndexPlace::Beside, &mut |_| {
            panic!("indexed")
        })
    };
    let image = open().unwrap();
    assert_eq!(image.head().blocks[0].absent_pages, PAGES - (PAGES >> 9));
    let mut into = [0; PAGE as usize];
    for place in (0..PAGES).step_by(step) {
        let found = image
            .read_pages(BlockIndex(0), page_at(place), &mut into)
            .unwrap();
        assert_eq!((found.zero, found.absent), (0, 0));
        assert!(into == content(place));
    }
    let read = peak_kib() - before;
    println!("{made} KiB to make an index, {read} KiB to read it");
    assert!(read < MEMORY_MAX_KIB, "{read} KiB");
}
