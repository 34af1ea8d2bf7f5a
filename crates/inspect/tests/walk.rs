//! Real streams, walked through to their last byte.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use vmferry_inspect::{Event, Found, VisitError, Visitor, walk, walk_skipping};
use vmferry_stream::{Record, Section};
use vmferry_vmstate::VmDescription;

fn captures() -> Vec<(String, PathBuf)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let mut found: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "xz"))
        .map(|path| (path.file_stem().unwrap().to_str().unwrap().to_owned(), path))
        .filter(|(name, _)| {
            !name.ends_with(".rp") && !name.contains("conn1") && !name.contains("conn2")
        })
        .collect();
    found.sort();
    found
}

fn unpack(path: &Path) -> Vec<u8> {
    let mut stream = Vec::new();
    let packed = fs::File::open(path).unwrap();
    xz2::read::XzDecoder::new(packed)
        .read_to_end(&mut stream)
        .unwrap();
    stream
}

/// Remembers what it is told.
#[derive(Default)]
struct Told {
    described: Option<VmDescription>,
    devices: Vec<(Section, Vec<u8>, Found)>,
    depth: i32,
    bytes: u64,
}

impl Visitor for Told {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Container(_) | Event::Record(..) => {}
            Event::Payload(_, bytes) => self.bytes += bytes.len() as u64,
            Event::Package(_) => self.depth += 1,
            Event::PackageEnd(_) => self.depth -= 1,
            Event::Device(body) => {
                let (section, bytes) = (body.section.clone(), body.bytes.to_vec());
                self.devices.push((section, bytes, body.found));
            }
            Event::Description(description) => self.described = Some(description.parsed?),
        }
        Ok(())
    }
}

/// A reader that gives one to `max` bytes at a time.
struct Dribble<'a>(&'a [u8], fastrand::Rng, usize);

impl Read for Dribble<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let bytes = self.1.usize(1..=self.2).min(out.len());
        self.0.read(&mut out[..bytes])
    }
}

#[test]
fn every_capture_to_its_last_byte() {
    let mut devices = 0;
    for (name, path) in captures() {
        let stream = unpack(&path);
        let mut told = Told::default();
        let finish = walk(&stream[..], &mut told).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(finish.bytes, stream.len() as u64, "{name}");
        assert!(!finish.is_followed && told.depth == 0, "{name}");
        println!(
            "{name}: {} devices {:?}",
            told.devices.len(),
            told.devices.last().map(|d| d.2)
        );
        devices += told.devices.len();
        if let Some(described) = &told.described {
            assert_eq!(told.devices.len(), described.devices.len(), "{name}");
            for (section, body, found) in &told.devices {
                let layout = described.device(&section.name, section.instance.0).unwrap();
                let decoded = layout
                    .decode(body)
                    .unwrap_or_else(|e| panic!("{name}: {e}"));
                let mut encoded = Vec::new();
                decoded.encode(&mut encoded);
                assert!(encoded == *body, "{name}: {}", section.name);
                assert_eq!(*found, Found::ByDescription, "{name}");
            }
        }
        let mut again = Told::default();
        let dribble = Dribble(&stream, fastrand::Rng::with_seed(7), 700);
        walk(dribble, &mut again).unwrap_or_else(|error| panic!("{name} in pieces: {error}"));
        assert!(
            again.devices == told.devices && again.bytes == told.bytes,
            "{name}"
        );
    }
    println!("{devices} devices");
}

/// A file that says when somebody seeks behind its end.
struct Seekable<'a> {
    bytes: &'a [u8],
    at: usize,
    read: usize,
}

impl Read for Seekable<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let read = (&self.bytes[self.at..]).read(out)?;
        self.at += read;
        self.read += read;
        Ok(read)
    }
}

impl Seek for Seekable<'_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let SeekFrom::Current(by) = to else {
            panic!("{to:?}");
        };
        let to = self.at.checked_add_signed(isize::try_from(by).unwrap());
        let to = to.filter(|to| *to <= self.bytes.len());
        self.at = to.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        Ok(self.at as u64)
    }
}

/// Records with their places, and bytes of payload.
#[derive(Debug, Default, PartialEq)]
struct Records(Vec<(u64, Record)>, u64);

impl Visitor for Records {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Record(offset, record) => self.0.push((offset, record.clone())),
            Event::Payload(_, bytes) => self.1 += bytes.len() as u64,
            _ => {}
        }
        Ok(())
    }
}

/// All that is told is the same, but for what a mapped-ram file has between its records.
#[test]
fn what_is_stepped_over_is_not_read() {
    for (name, path) in captures() {
        let stream = unpack(&path);
        let is_mapped = name.starts_with("mapped-ram");
        let mut all = Records::default();
        let finish = walk(&stream[..], &mut all).unwrap();
        // Wherever it begins; a mapped-ram file says where that is.
        let start = if is_mapped { 0 } else { 12_345 };
        let mut told = Records::default();
        let mut file = Seekable {
            bytes: &stream,
            at: 0,
            read: 0,
        };
        let skipped = walk_skipping(&mut file, start, &mut told).unwrap();
        let moved = all.0.into_iter().map(|(at, record)| (at + start, record));
        assert!(told.0.into_iter().eq(moved), "{name}");
        assert_eq!(skipped.bytes, finish.bytes + start, "{name}");
        assert_eq!(skipped.ending, finish.ending, "{name}");
        assert_eq!(told.1 == all.1, !is_mapped, "{name}");
        if is_mapped {
            assert!(file.read < stream.len() / 2, "{name}: {} bytes", file.read);
            // Cut inside of what is stepped over.
            let cut = Seekable {
                bytes: &stream[..stream.len() / 2],
                at: 0,
                read: 0,
            };
            let error = walk_skipping(cut, 0, &mut Records::default()).unwrap_err();
            assert!(error.to_string().contains("truncated"), "{error}");
        }
    }
}

/// Found by the fuzzer: an EOF inside a package ends the package, as RUN does.
#[test]
fn what_follows_the_end_inside_a_package_is_ignored() {
    let mut stream = b"QEVM\0\0\0\x03\x07\0\0\0\x04none".to_vec();
    stream.extend(b"\x08\0\x07\0\x04\0\0\0\x05\0\x55\x55\x55\x55\0");
    let mut told = Told::default();
    let finish = walk(&stream[..], &mut told).expect("a stream");
    assert_eq!(finish.bytes, stream.len() as u64);
    assert_eq!(told.depth, 0);
}
