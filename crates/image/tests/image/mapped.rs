//! Files whose pages have fixed places.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use vmferry_image::{FileStorage, Image, IndexPlace};
use vmferry_ram::{BlockIndex, StoredRam, StoredRange};

use crate::support::{PAGE, Parked, capture, painted, read_all, rng};

const AREA: u64 = 1 << 20;

/// Put a mapped-ram file together: header, a block of so many pages, and the rest of a real one.
/// Answers with the places of bitmap and pages.
fn file(start: u64, pages: u64) -> (Parked, u64, u64) {
    let real = capture("mapped-ram-100");
    let at = real.windows(4).position(|it| it == b"\x03ram").unwrap();
    let list = at + 12;
    let tail = real
        .windows(17)
        .rposition(|it| it[..5] == [3, 0, 0, 0, 1] && it[12] == 0x10);
    // END of `ram`, devices, EOF and description.
    let tail = &real[tail.unwrap()..];
    let used = pages * PAGE as u64;
    let mut head = real[..list].to_vec();
    head.extend((used | 4).to_be_bytes());
    head.extend(b"\x04vram");
    head.extend(used.to_be_bytes());
    head.extend(1_u32.to_be_bytes());
    head.extend((PAGE as u64).to_be_bytes());
    let bitmap = start + head.len() as u64 + 16;
    let area = (bitmap + pages.div_ceil(64) * 8).next_multiple_of(AREA);
    head.extend(bitmap.to_be_bytes());
    head.extend(area.to_be_bytes());
    let parked = Parked::new(&[]);
    let out = fs::File::options().write(true).open(parked.path()).unwrap();
    out.write_all_at(&head, start).unwrap();
    let mut rest = 0x10_u64.to_be_bytes().to_vec();
    rest.extend([0x7e, 0, 0, 0, 1]);
    rest.extend(tail);
    out.write_all_at(&rest, area + used).unwrap();
    (parked, bitmap, area)
}

fn put(parked: &Parked, bitmap: u64, area: u64, page: u64, fill: u8) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(parked.path())
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bitmap + page / 8).unwrap();
    byte[0] |= 1 << (page % 8);
    file.write_all_at(&byte, bitmap + page / 8).unwrap();
    file.write_all_at(&[fill; PAGE], area + page * PAGE as u64)
        .unwrap();
}

/// Wherever in a file it begins: its offsets are those of the file.
#[test]
fn begin_anywhere() {
    for start in [0, 1, 77_777] {
        let (parked, bitmap, area) = file(start, 100);
        for page in [0, 5, 6, 7, 99] {
            put(&parked, bitmap, area, page, page as u8 + 1);
        }
        let storage = FileStorage::open(&parked.path(), start).unwrap();
        let image = Image::open(Arc::new(storage), &IndexPlace::Beside, &mut |_| {}).unwrap();
        assert!(image.is_mapped());
        let memory = &read_all(&image)["vram"];
        for (page, content) in memory.iter().enumerate() {
            let fill = if [0, 5, 6, 7, 99].contains(&page) {
                page as u8 + 1
            } else {
                0
            };
            assert_eq!(
                content.as_deref(),
                Some(&[fill; PAGE][..]),
                "{start}: {page}"
            );
        }
        assert_eq!(
            image.head().devices.last().unwrap().section.name,
            "globalstate"
        );
        image.verify(&mut |_| {}).unwrap();
        if start > 0 {
            // At the file's first byte there is nothing.
            assert!(parked.open().is_err());
        }
    }
}

/// A terabyte is opened without reading it, and no index is made of it.
#[test]
fn of_any_length_are_opened_at_once() {
    let pages = 1 << 28;
    let (parked, bitmap, area) = file(0, pages);
    let mut rng = rng();
    let mut there: Vec<u64> = (0..50).map(|_| rng.u64(..pages)).collect();
    there.push(pages - 1);
    for page in &there {
        put(&parked, bitmap, area, *page, 0xab);
    }
    let image = parked.open().unwrap();
    let mut into = vec![0; 64 * PAGE];
    for page in &there {
        let first = page - page % 64;
        let found = image.read_pages(BlockIndex(0), first, &mut into).unwrap();
        for step in 0..64 {
            let is_there = there.contains(&(first + step));
            assert_eq!(found.zero >> step & 1 == 0, is_there);
            let at = usize::try_from(step).unwrap() * PAGE;
            assert!(!is_there || into[at..at + PAGE] == [0xab; PAGE]);
        }
    }
    assert_eq!(fs::read_dir(parked.folder()).unwrap().count(), 1);
    assert!(fs::metadata(parked.path()).unwrap().blocks() * 512 < 4 << 20);
}

#[test]
fn keep_a_working_set() {
    let parked = Parked::new(&capture("mapped-ram-100"));
    let image = parked.open().unwrap();
    let largest = image.blocks().iter().enumerate();
    let (largest, _) = largest.max_by_key(|(_, block)| block.used_bytes).unwrap();
    let order = [StoredRange {
        block: BlockIndex(largest),
        first_page: 3,
        pages: 4,
    }];
    image.keep_working_set(&order).unwrap();
    assert_eq!(parked.open().unwrap().working_set(), order);
}

/// Their capability is the file's, not the machine's.
#[test]
fn have_a_configuration_without_themselves() {
    for name in ["mapped-ram-100", "mapped-ram-multifd-100"] {
        let stream = capture(name);
        let image = Parked::new(&stream).open().unwrap();
        let configuration = image.head().configuration.as_ref().unwrap();
        assert_eq!(configuration.capabilities, None, "{name}");
        assert_eq!(painted(&stream).len(), image.blocks().len());
    }
}

#[test]
fn cut_inside_their_pages_are_refused() {
    let (parked, bitmap, area) = file(0, 100);
    put(&parked, bitmap, area, 99, 1);
    let file = fs::File::options().write(true).open(parked.path()).unwrap();
    for length in [area + 99 * PAGE as u64, area - 1, bitmap + 3, bitmap - 1] {
        file.set_len(length).unwrap();
        let error = parked.open().unwrap_err().to_string();
        assert!(error.contains("truncated"), "{length}: {error}");
    }
}
