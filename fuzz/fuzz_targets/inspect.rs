//! A walk through anything, read in pieces of any size.

#![no_main]

use std::io::{self, Read};

use libfuzzer_sys::fuzz_target;
use vmferry_inspect::{Body, Container, VisitError, Visitor, walk};
use vmferry_stream::Record;
use vmferry_vmstate::{DescriptionError, VmDescription};

/// What was told, payload in one piece.
#[derive(Debug, Default, PartialEq)]
struct Told(Vec<Event>);

#[derive(Debug, PartialEq)]
enum Event {
    Container(Container),
    Record(u64, Record),
    Payload(u64, Vec<u8>),
    Package(u64),
    PackageEnd(u64),
    Device(String, Vec<u8>),
    Description(u64, Vec<u8>, bool),
}

impl Visitor for Told {
    fn container(&mut self, container: &Container) -> Result<(), VisitError> {
        self.0.push(Event::Container(container.clone()));
        Ok(())
    }

    fn record(&mut self, offset: u64, record: &Record) -> Result<(), VisitError> {
        self.0.push(Event::Record(offset, record.clone()));
        Ok(())
    }

    fn payload(&mut self, offset: u64, bytes: &[u8]) -> Result<(), VisitError> {
        match self.0.last_mut() {
            Some(Event::Payload(start, payload)) => {
                assert_eq!(*start + payload.len() as u64, offset, "payload has no gaps");
                payload.extend(bytes);
            }
            _ => self.0.push(Event::Payload(offset, bytes.to_vec())),
        }
        Ok(())
    }

    fn package(&mut self, offset: u64) -> Result<(), VisitError> {
        self.0.push(Event::Package(offset));
        Ok(())
    }

    fn package_end(&mut self, offset: u64) -> Result<(), VisitError> {
        self.0.push(Event::PackageEnd(offset));
        Ok(())
    }

    fn device(&mut self, body: Body<'_>) -> Result<(), VisitError> {
        let Body {
            section,
            offset,
            bytes,
            found,
        } = body;
        self.0.push(Event::Device(
            format!("{section:?} at {offset}, {found:?}"),
            bytes.to_vec(),
        ));
        Ok(())
    }

    fn description(
        &mut self,
        offset: u64,
        text: &[u8],
        parsed: Result<VmDescription, DescriptionError>,
    ) -> Result<(), VisitError> {
        self.0
            .push(Event::Description(offset, text.to_vec(), parsed.is_ok()));
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
