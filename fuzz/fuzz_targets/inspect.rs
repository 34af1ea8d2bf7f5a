//! A walk through anything, read in pieces of any size.

#![no_main]

use std::io::{self, Read};

use libfuzzer_sys::fuzz_target;
use vmferry_inspect::{Body, Container, Event, VisitError, Visitor, walk};
use vmferry_stream::Record;

/// What was told, payload in one piece.
#[derive(Debug, Default, PartialEq)]
struct Told(Vec<Seen>);

#[derive(Debug, PartialEq)]
enum Seen {
    Container(Container),
    Record(u64, Record),
    Payload(u64, Vec<u8>),
    Package(u64),
    PackageEnd(u64),
    Device(String, Vec<u8>),
    Description(u64, Vec<u8>, bool),
}

impl Visitor for Told {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        let seen = match event {
            Event::Container(container) => Seen::Container(container.clone()),
            Event::Record(offset, record) => Seen::Record(offset, record.clone()),
            Event::Payload(offset, bytes) => match self.0.last_mut() {
                Some(Seen::Payload(start, payload)) => {
                    assert_eq!(*start + payload.len() as u64, offset, "payload has no gaps");
                    payload.extend(bytes);
                    return Ok(());
                }
                _ => Seen::Payload(offset, bytes.to_vec()),
            },
            Event::Package(offset) => Seen::Package(offset),
            Event::PackageEnd(offset) => Seen::PackageEnd(offset),
            Event::Device(body) => {
                let Body {
                    section,
                    offset,
                    bytes,
                    found,
                } = body;
                let text = format!("{section:?} at {offset}, {found:?}");
                Seen::Device(text, bytes.to_vec())
            }
            Event::Description(description) => Seen::Description(
                description.offset,
                description.text.to_vec(),
                description.parsed.is_ok(),
            ),
        };
        self.0.push(seen);
        Ok(())
    }
}

/// Reads as much as it likes.
struct Pieces<'a>(&'a [u8], fastrand::Rng);

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = if self.1.bool() { 3 } else { 3000 };
        let bytes = buffer.len().min(self.1.usize(1..=most));
        self.0.read(&mut buffer[..bytes])
    }
}

fuzz_target!(|data: &[u8]| {
    let (mut whole, mut cut) = (Told::default(), Told::default());
    let ending = walk(data, &mut whole);
    let pieces = Pieces(data, fastrand::Rng::with_seed(data.len() as u64));
    let again = walk(pieces, &mut cut);
    assert_eq!(whole, cut);
    match (ending, again) {
        (Ok(ending), Ok(again)) => {
            assert_eq!(ending, again);
            assert!(ending.bytes <= data.len() as u64);
            assert_eq!(ending.is_followed, ending.bytes < data.len() as u64);
        }
        (Err(ending), Err(again)) => assert_eq!(ending.to_string(), again.to_string()),
        (ending, again) => panic!("{ending:?} and {again:?}"),
    }
});
