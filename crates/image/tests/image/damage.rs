//! Images that are not what they were.

use std::fs;
use std::os::unix::fs::FileExt;

use vmferry_image::{Image, ImageError};
use vmferry_ram::BlockIndex;

use crate::script::Script;
use crate::support::{PAGE, Parked, capture, captures, read_all, rng, rounds, try_read_all};

/// A machine with pages of all kinds, one behind the other.
fn machine() -> Script {
    let mut script = Script::new(&[("pc.ram", 40)]);
    for page in 0..40 {
        match page % 8 {
            7 => script.zlib("pc.ram", page, vec![page as u8; PAGE]),
            _ => script.page("pc.ram", page, vec![page as u8 | 0x80; PAGE]),
        }
        if page == 20 {
            script.name_again();
        }
    }
    script.device("cpu", 9, &[5; 300]);
    // The last bytes are compared when the image is opened.
    script.device("disk", 10, &[6; 9000]);
    script.finish()
}

/// Change the image without anybody noticing.
fn rot(parked: &Parked, at: u64, bits: u8) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(parked.path())
        .unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ bits], at).unwrap();
    file.set_modified(time).unwrap();
}

/// Any bit of an image that has changed since it was indexed: no page of it is handed out, the
/// message says where it is, and `verify` finds it.
#[test]
fn a_rotten_bit_is_noticed() {
    let script = machine();
    let parked = Parked::in_memory(&script.bytes);
    parked.open().unwrap();
    let mut rng = rng();
    let (mut at_open, mut at_read) = (0, 0);
    for _ in 0..rounds(600) {
        let at = rng.u64(..script.bytes.len() as u64);
        let bits = 1 << rng.u8(..8);
        rot(&parked, at, bits);
        // Not with another index: it might be that of the rotten image.
        let index = fs::read(parked.index()).unwrap();
        match parked.open_counting() {
            (Ok(image), 0) => {
                if image.verify(&mut |_| {}).is_ok() {
                    // It means nothing, to a QEMU neither.
                    let mut lax = script.lax.iter();
                    assert!(lax.any(|range| range.contains(&at)), "byte {at}, {bits:#x}");
                    assert!(read_all(&image) == script.memory, "byte {at}");
                }
                match try_read_all(&image, 16) {
                    Ok(memory) => assert!(memory == script.memory, "byte {at}"),
                    Err(error) => {
                        at_read += 1;
                        assert!(
                            error.contains("of RAM block 'pc.ram' is damaged"),
                            "{error}"
                        );
                        let place = error.split("(byte ").nth(1).unwrap();
                        let place = place.split(')').next().unwrap();
                        let place: u64 = place.parse().unwrap();
                        let behind = at - place;
                        assert!(behind < PAGE as u64 + 32, "byte {at}: {error}");
                    }
                }
            }
            // A sample has changed.
            (_, _) => at_open += 1,
        }
        rot(&parked, at, bits);
        fs::write(parked.index(), index).unwrap();
    }
    println!("{at_open} when it is opened, {at_read} when it is read");
    assert!(at_read > 0 && at_open > 0);
    let image = parked.open().unwrap();
    assert!(read_all(&image) == script.memory);
    image.verify(&mut |_| {}).unwrap();
}

/// What else reads from the run of a damaged page is not handed out either, the rest is.
#[test]
fn other_pages_are_still_there() {
    let script = machine();
    let parked = Parked::new(&script.bytes);
    let image = parked.open().unwrap();
    let page = script
        .bytes
        .windows(4)
        .position(|it| it == [0x83; 4])
        .unwrap() as u64;
    rot(&parked, page + 1000, 1);
    let image = {
        drop(image);
        parked.open().unwrap()
    };
    let mut into = [0; 4 * PAGE];
    let error = image.read_pages(BlockIndex(0), 0, &mut into).unwrap_err();
    let ImageError::DamagedPage {
        page_offset,
        offset,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert_eq!((*page_offset, *offset), (3 * PAGE as u64, page - 8));
    assert!(error.to_string().contains("checksum"), "{error}");
    image.read_pages(BlockIndex(0), 4, &mut into).unwrap();
    assert_eq!(into[..PAGE], [0x84; PAGE]);
}

#[test]
fn sections_are_checked() {
    let script = machine();
    let parked = Parked::new(&script.bytes);
    parked.open().unwrap();
    let body = script.bytes.windows(9).position(|it| it == [5; 9]).unwrap() as u64;
    rot(&parked, body + 5, 1);
    let image = parked.open().unwrap();
    assert_eq!(image.head().devices[1].section.name, "disk");
    let error = image.section_body(&image.head().devices[0]).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("section 'cpu' (0x9) is damaged"), "{error}");
    assert!(error.contains(&format!("byte {body}")), "{error}");
    image.section_body(&image.head().devices[1]).unwrap();
    assert!(image.verify(&mut |_| {}).is_err());
}

/// Cut anywhere, an image is refused, with the place; whatever index lies beside it.
#[test]
fn a_truncated_image_is_refused() {
    let mut rng = rng();
    for (name, stream) in captures() {
        let skip = ["multifd", "preempt", "blk-72"]
            .iter()
            .any(|it| name.starts_with(it));
        // Without a description, the last sections' end is where the input ends.
        if skip || name.starts_with("pc-2.2") || name.starts_with("pc-2.3") {
            continue;
        }
        let parked = Parked::in_memory(&stream);
        let image = parked
            .open()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let text = image
            .description()
            .unwrap()
            .map_or(0, |text| text.len() + 5);
        // A stream may end with its EOF.
        let end = stream.len() - text;
        let length = rng.usize(..end);
        let file = fs::File::options().write(true).open(parked.path()).unwrap();
        file.set_len(length as u64).unwrap();
        let error = parked.open().unwrap_err().to_string();
        assert!(
            error.contains(&format!("byte {length}")) || error.contains("truncated"),
            "{name} of {length} bytes: {error}"
        );
    }
}

/// While it is open.
#[test]
fn an_image_may_become_shorter_under_us() {
    let script = machine();
    let parked = Parked::new(&script.bytes);
    let image = parked.open().unwrap();
    let file = fs::File::options().write(true).open(parked.path()).unwrap();
    file.set_len(50_000).unwrap();
    let error = try_read_all(&image, 64).unwrap_err();
    assert!(error.contains("damaged"), "{error}");
    let mut page = [0; PAGE];
    image.read_pages(BlockIndex(0), 1, &mut page).unwrap();
    let error = image.section_body(&image.head().devices[0]).unwrap_err();
    assert!(error.to_string().contains("cannot read byte"), "{error}");
    assert!(image.verify(&mut |_| {}).is_err());
    file.set_len(0).unwrap();
    assert!(image.read_pages(BlockIndex(0), 1, &mut page).is_err());
    assert!(parked.open().is_err());
}

/// Somebody writes to it while it is indexed.
#[test]
fn an_image_that_changes_is_not_indexed() {
    let stream = capture("pc-72");
    let parked = Parked::new(&stream);
    let storage = Growing {
        file: vmferry_image::FileStorage::open(&parked.path(), 0).unwrap(),
        path: parked.path(),
        left: std::sync::atomic::AtomicU32::new(3),
    };
    let place = vmferry_image::IndexPlace::Beside;
    let error = Image::open(std::sync::Arc::new(storage), &place, &mut |_| {}).unwrap_err();
    assert!(matches!(error, ImageError::Changing { .. }), "{error}");
    assert!(!parked.index().exists());
}

struct Growing {
    file: vmferry_image::FileStorage,
    path: std::path::PathBuf,
    left: std::sync::atomic::AtomicU32,
}

impl vmferry_image::Storage for Growing {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        use std::io::Write;
        use std::sync::atomic::Ordering;
        let left = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        if left == Ok(1) {
            let mut file = fs::File::options().append(true).open(&self.path)?;
            file.write_all(b"more")?;
        }
        self.file.read_at(offset, into)
    }

    fn start(&self) -> u64 {
        self.file.start()
    }

    fn length(&self) -> u64 {
        self.file.length()
    }

    fn identity(&self) -> vmferry_image::Identity {
        self.file.identity()
    }

    fn name(&self) -> String {
        self.file.name()
    }

    fn index_path(&self) -> Option<std::path::PathBuf> {
        self.file.index_path()
    }

    fn mode(&self) -> u32 {
        self.file.mode()
    }
}

/// Where the records of pages are in an image.
#[derive(Default)]
struct PageRecords(Vec<u64>);

impl vmferry_inspect::Visitor for PageRecords {
    fn event(
        &mut self,
        event: vmferry_inspect::Event<'_>,
    ) -> Result<(), vmferry_inspect::VisitError> {
        use vmferry_stream::{RamRecord, Record};
        if let vmferry_inspect::Event::Record(offset, Record::Ram(RamRecord::Page { .. })) = event {
            self.0.push(offset);
        }
        Ok(())
    }
}

/// The content is that of the page, and the record in front of it says another one: a QEMU that reads the
/// image would put it there.
#[test]
fn a_page_whose_record_is_anothers_is_not_handed_out() {
    let script = machine();
    let parked = Parked::new(&script.bytes);
    parked.open().unwrap();
    let mut records = PageRecords::default();
    vmferry_inspect::walk(&script.bytes[..], &mut records).unwrap();
    let mut refused = 0;
    for offset in records.0 {
        // A bit of the page's number.
        rot(&parked, offset + 6, 0x10);
        let (image, walked) = parked.open_counting();
        if let (Ok(image), 0) = (image, walked) {
            let error = try_read_all(&image, 64).unwrap_err();
            assert!(error.contains("its record is 0x"), "{error}");
            assert!(error.contains(&format!("(byte {offset})")), "{error}");
            refused += 1;
        } else {
            // It is one of those that are looked at when it is opened; its index goes.
            fs::remove_file(parked.index()).ok();
        }
        rot(&parked, offset + 6, 0x10);
        parked.open().unwrap();
    }
    assert!(refused > 10, "{refused}");
}
