//! Real streams, walked through to their last byte.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use vmferry_inspect::{Event, Found, VisitError, Visitor, walk};
use vmferry_stream::Section;
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
