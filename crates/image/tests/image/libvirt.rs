//! Files of `virsh save`.

use crate::script;
use crate::support::{Parked, capture, painted, read_all, rng};

/// A header of libvirt with so many bytes of XML, in either byte order.
fn header(bytes: u32, is_swapped: bool) -> Vec<u8> {
    let word = |word: u32| {
        if is_swapped {
            word.to_be_bytes()
        } else {
            word.to_le_bytes()
        }
    };
    let mut header = b"LibvirtQemudSave".to_vec();
    for number in [2, bytes, 1, 0] {
        header.extend(word(number));
    }
    header.resize(92 + bytes as usize, b'<');
    header
}

#[test]
fn are_images() {
    let mut rng = rng();
    for is_swapped in [false, true] {
        let script = script::random(&mut rng, 500).finish();
        let bytes = rng.u32(..100_000);
        let file = [header(bytes, is_swapped), script.bytes].concat();
        let parked = Parked::new(&file);
        let image = parked.open().unwrap();
        let libvirt = image.head().libvirt.as_ref().unwrap();
        assert!(libvirt.was_running && !libvirt.is_unfinished);
        assert!(read_all(&image) == script.memory);
        let (again, walked) = parked.open_counting();
        assert_eq!(walked, 0);
        assert_eq!(again.unwrap().head(), image.head());
    }
}

/// Its stream may be one with fixed places, which are those of the file.
#[test]
fn of_mapped_ram_are_images() {
    let plain = capture("mapped-ram-100");
    for is_swapped in [false, true] {
        // The stream begins where its places in the file fit: QEMU wrote it there.
        let header = header(1000, is_swapped);
        let moved = shift(&plain, header.len() as u64);
        let file = [header, moved].concat();
        let image = Parked::new(&file).open().unwrap();
        assert!(image.is_mapped() && image.head().libvirt.is_some());
        let expected = painted(&plain);
        let memory = read_all(&image);
        for (name, pages) in memory {
            for (number, page) in pages.iter().enumerate() {
                let start = number * 4096;
                assert!(page.as_ref().unwrap() == &expected[&name][start..start + 4096]);
            }
        }
    }
}

/// As if the stream began at byte `start` of its file: each block's gap shrinks, so that its pages stay
/// aligned.
fn shift(plain: &[u8], start: u64) -> Vec<u8> {
    let mut moved: Vec<u8> = Vec::new();
    let mut rest = plain;
    let mut at = 0;
    // An entry's header: version 1, page size 4096, two places.
    let mark = [&1_u32.to_be_bytes()[..], &4096_u64.to_be_bytes()].concat();
    while let Some(found) = rest.windows(12).position(|it| it == mark) {
        let entry = &rest[..found];
        let used = u64::from_be_bytes(entry[entry.len() - 8..].try_into().unwrap());
        let word = |at: usize| u64::from_be_bytes(rest[at..at + 8].try_into().unwrap());
        let (bitmap, pages) = (word(found + 12), word(found + 20));
        let bitmap_bytes = (used / 4096).div_ceil(64) * 8;
        moved.extend(entry);
        moved.extend(&mark);
        let new_bitmap = start + moved.len() as u64 + 16;
        let new_pages = (new_bitmap + bitmap_bytes).next_multiple_of(4096);
        moved.extend(new_bitmap.to_be_bytes());
        moved.extend(new_pages.to_be_bytes());
        let plain_at = |place: u64, bytes: u64| {
            &plain[usize::try_from(place).unwrap()..][..usize::try_from(bytes).unwrap()]
        };
        moved.extend(plain_at(bitmap, bitmap_bytes));
        moved.resize(usize::try_from(new_pages - start).unwrap(), 0);
        moved.extend(plain_at(pages, used));
        at = pages + used;
        rest = &plain[usize::try_from(at).unwrap()..];
    }
    assert!(at > 0);
    moved.extend(rest);
    moved
}
