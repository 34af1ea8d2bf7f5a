//! Parked machines in other forms.

#[path = "../park/contents.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod contents;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use vmferry_image::{FileStorage, Image, IndexPlace, Storage};
use vmferry_relay::convert::{ConvertError, to_mapped_ram, to_stream};
use vmferry_stream::{RamRecord, Record};

use contents::{Contents, capture, captures, read, records};

fn open(path: &Path) -> Result<Image, String> {
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, 0).unwrap());
    let index = IndexPlace::At(path.with_extension("index"));
    Image::open(storage, &index, &mut |_| ()).map_err(|error| error.to_string())
}

/// The image of a stream, as a plain stream.
fn plain(image: &Image) -> Vec<u8> {
    let mut stream = Vec::new();
    let mut done = 0;
    let length = to_stream(image, &mut stream, &mut |progress| {
        assert!(progress.done_bytes > done && progress.done_bytes <= progress.total_bytes);
        done = progress.done_bytes;
    })
    .unwrap();
    assert_eq!(length, stream.len() as u64);
    assert_eq!(
        done,
        image
            .head()
            .blocks
            .iter()
            .map(|block| block.used_bytes)
            .sum::<u64>()
    );
    stream
}

/// What both forms must have in common with the image: its pages and devices. A description is made up
/// where there was none; parts of other sections that say nothing are left out.
fn check(name: &str, stream: &[u8], expected: &Contents) -> Contents {
    let (mut found, commands, finish) =
        read(stream).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!(finish.bytes, stream.len() as u64, "{name}");
    assert_eq!(commands, Vec::<String>::new(), "{name}");
    if expected.description.is_none() {
        assert_eq!(
            found.description.take().as_deref(),
            Some(&b"{}"[..]),
            "{name}"
        );
    }
    assert!(found.memory == expected.memory, "{name}: memory");
    assert!(found.devices == expected.devices, "{name}: devices");
    assert!(
        found.description == expected.description,
        "{name}: description"
    );
    let says = |contents: &Contents| {
        let mut live = contents.live.clone();
        live.retain(|(record, _)| record != "EndOfSection");
        live
    };
    assert_eq!(says(&found), says(expected), "{name}");
    found
}

#[test]
fn every_machine_goes_into_both_forms_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let (path, mapped) = (folder.path().join("image"), folder.path().join("mapped"));
    let mut converted = 0;
    for name in captures() {
        let stream = capture(&name);
        fs::write(&path, &stream).unwrap();
        let refused = ["blk-", "multifd-", "preempt-"];
        if refused.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        let image = open(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (expected, ..) = read(&stream).unwrap();
        let first = plain(&image);
        check(&name, &first, &expected);

        let out = File::create_new(&mapped).unwrap();
        match to_mapped_ram(&image, &out, &mut |_| ()) {
            Ok(length) => {
                assert_eq!(length, out.metadata().unwrap().len(), "{name}");
                let again = fs::read(&mapped).unwrap();
                check(&name, &again, &expected);
                check_layout(&name, &again);
                let image = open(&mapped).unwrap_or_else(|error| panic!("{name}: {error}"));
                assert!(image.is_mapped());
                // Canonical: the way it came does not matter.
                assert!(plain(&image) == first, "{name}");
                converted += 1;
            }
            Err(error @ ConvertError::NotMappable { .. }) => {
                let text = error.to_string();
                let reason = match &name {
                    name if name.starts_with("no-config") => "configuration",
                    name if name.starts_with("ignore-shared") => "x-ignore-shared",
                    name if name.starts_with("pc-2.") => "2.3",
                    _ => panic!("{name}: {error}"),
                };
                assert!(text.contains(reason), "{name}: {text}");
                assert_eq!(out.metadata().unwrap().len(), 0);
            }
            Err(error) => panic!("{name}: {error}"),
        }
        fs::remove_file(&mapped).unwrap();
        fs::remove_file(path.with_extension("index")).ok();
        fs::remove_file(mapped.with_extension("index")).ok();
    }
    println!("{converted} converted");
    assert!(converted > 25);
}

/// Pages lie at multiples of 1 MiB.
fn check_layout(name: &str, stream: &[u8]) {
    for (_, record, _) in records(stream) {
        if let Record::Ram(RamRecord::Block { mapped, .. }) = record {
            let mapped = mapped.unwrap_or_else(|| panic!("{name}: a block without a place"));
            assert_eq!(mapped.pages_offset % (1 << 20), 0, "{name}");
        }
    }
}

#[test]
fn pages_of_zeroes_are_holes() {
    let folder = tempfile::tempdir().unwrap();
    let (path, mapped) = (folder.path().join("image"), folder.path().join("mapped"));
    fs::write(&path, capture("running-100")).unwrap();
    // What was in the file before does not shine through.
    fs::write(&mapped, vec![0x55; 4 << 20]).unwrap();
    let image = open(&path).unwrap();
    let out = File::options()
        .read(true)
        .write(true)
        .open(&mapped)
        .unwrap();
    let length = to_mapped_ram(&image, &out, &mut |_| ()).unwrap();
    let metadata = out.metadata().unwrap();
    let allocated = metadata.blocks() * 512;
    println!("{allocated} of {length} bytes allocated");
    assert!(allocated < length / 4);
    let (expected, ..) = read(&capture("running-100")).unwrap();
    check("running-100", &fs::read(&mapped).unwrap(), &expected);
}

#[test]
fn damage_is_not_converted() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    let mut stream = capture("pc-100");
    fs::write(&path, &stream).unwrap();
    let image = open(&path).unwrap();
    let is_page = |record: &Record| matches!(record, Record::Ram(RamRecord::Page { .. }));
    let records = records(&stream);
    let (_, _, end) = records
        .iter()
        .find(|(_, record, _)| is_page(record))
        .unwrap();
    stream[end - 1] ^= 1;
    fs::write(&path, &stream).unwrap();
    let error = to_stream(&image, &mut Vec::new(), &mut |_| ()).unwrap_err();
    let text = error.to_string();
    assert!(
        matches!(error, ConvertError::Image(_)) && text.contains("byte "),
        "{text}"
    );
}

/// A place for so many bytes.
struct Full(usize);

impl std::io::Write for Full {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        match taken {
            0 => Err(std::io::ErrorKind::StorageFull.into()),
            _ => Ok(taken),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn what_cannot_be_written_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    fs::write(&path, capture("pc-72")).unwrap();
    let image = open(&path).unwrap();
    for room in [0, 20, 5000, 100_000] {
        let error = to_stream(&image, &mut Full(room), &mut |_| ()).unwrap_err();
        assert!(
            matches!(error, ConvertError::Write { offset, .. } if offset <= room as u64),
            "{error}"
        );
    }
}
