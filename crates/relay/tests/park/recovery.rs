//! Postcopies whose connections break, and go on.

use std::collections::BTreeMap;

use vmferry_relay::park::{ParkEvent, ParkOptions, Parker};
use vmferry_stream::{Command, Encoder, Name, RamPage, RamRecord, Record, Section, SectionKind};

use crate::contents::{Contents, bytes_of, capture, read, records, seeded};

/// What the next connection of a source brings: it asks what has come, and sends the rest.
pub(crate) struct NextConnection {
    /// It asks for the bitmaps with this, and says that it goes on.
    pub(crate) questions: Vec<u8>,
    section: Section,
    memory: BTreeMap<String, Vec<u8>>,
    footers: bool,
}

impl NextConnection {
    pub(crate) fn new(stream: &[u8], contents: &Contents) -> Self {
        let mut questions = Vec::new();
        let mut encoder = Encoder::new(true);
        for block in contents.memory.keys() {
            let block = Name::new(block).unwrap();
            let command = Command::ReceivedBitmap(block);
            encoder.record(&Record::Command(command), &mut questions);
        }
        let resume = Record::Command(Command::PostcopyResume);
        encoder.record(&resume, &mut questions);
        let section = records(stream)
            .into_iter()
            .find_map(|(_, record, _)| match record {
                Record::Section(section) if section.name == "ram" => Some(section),
                _ => None,
            });
        Self {
            questions,
            section: section.expect("memory"),
            memory: contents
                .memory
                .iter()
                .map(|(name, (bytes, _))| (name.clone(), bytes.clone()))
                .collect(),
            footers: true,
        }
    }

    /// The pages that are missing by these bitmaps, and the end.
    pub(crate) fn rest(&self, received: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = Encoder::new(self.footers);
        let id = self.section.id;
        let part = Record::Section(self.section.with_kind(SectionKind::Part));
        encoder.record(&part, &mut bytes);
        for (block, memory) in &self.memory {
            let bits = &received[block];
            assert_eq!(bits.len(), (memory.len() / 4096).div_ceil(64) * 8);
            for (number, content) in memory.chunks(4096).enumerate() {
                if bits[number / 8] & 1 << (number % 8) != 0 {
                    continue;
                }
                let page = RamPage {
                    block: Name::new(block).unwrap(),
                    offset_bytes: number as u64 * 4096,
                };
                let is_zero = content.iter().all(|byte| *byte == 0);
                let record = match is_zero {
                    true => RamRecord::Zero { page, fill: 0 },
                    false => RamRecord::Page { page, bytes: 4096 },
                };
                encoder.record(&Record::Ram(record), &mut bytes);
                if !is_zero {
                    bytes.extend_from_slice(content);
                }
            }
        }
        for record in [
            Record::Ram(RamRecord::EndOfSection),
            Record::SectionEnd { id },
            Record::Section(self.section.with_kind(SectionKind::End)),
            Record::Ram(RamRecord::EndOfSection),
            Record::SectionEnd { id },
            Record::Eof,
        ] {
            encoder.record(&record, &mut bytes);
        }
        bytes
    }
}

/// Where the package of a stream ends.
pub(crate) fn package_end(stream: &[u8]) -> usize {
    let package = records(stream).into_iter().find_map(|(_, record, end)| {
        matches!(record, Record::Command(Command::Packaged { .. })).then_some(end)
    });
    package.expect("a package")
}

/// Push in pieces, and answer what is asked about what has come.
fn push(
    parker: &mut Parker,
    mut bytes: &[u8],
    rng: &mut fastrand::Rng,
) -> BTreeMap<String, Vec<u8>> {
    let mut received = BTreeMap::new();
    let mut resumed = false;
    while !bytes.is_empty() {
        let (now, later) = bytes.split_at(rng.usize(1..=bytes.len()));
        parker.push(now).unwrap();
        bytes = later;
        for event in parker.heard() {
            match event {
                ParkEvent::ReceivedBitmap(block) => {
                    assert!(!resumed);
                    let bits = parker.received(&block).expect("a block");
                    received.insert(block.to_string(), bits);
                }
                ParkEvent::Resume => resumed = true,
                _ => {}
            }
        }
    }
    received
}

#[test]
fn a_postcopy_goes_on_over_other_connections() {
    let mut rng = seeded();
    for name in [
        "postcopy-72.fwd",
        "postcopy-100.fwd",
        "postcopy-100-to-72.fwd",
    ] {
        let stream = capture(name);
        let (mut expected, _, _) = read(&stream).unwrap();
        expected.description = Some(b"{}".to_vec());
        let next = NextConnection::new(&stream, &expected);
        for _ in 0..30 {
            let file = tempfile::tempfile().unwrap();
            let mut parker = Parker::new(file, ParkOptions::default()).unwrap();
            let cut = rng.usize(package_end(&stream)..stream.len());
            push(&mut parker, &stream[..cut], &mut rng);
            for again in (0..rng.u8(1..4)).rev() {
                parker.interrupted().unwrap();
                if rng.bool() {
                    // A connection that brings nothing.
                    parker.interrupted().unwrap();
                }
                let received = push(&mut parker, &next.questions, &mut rng);
                let missing = parker.progress().missing_pages;
                let rest = next.rest(&received);
                assert!(missing > 0 || rest.len() < 100, "{name}");
                let end = match again {
                    0 => rest.len(),
                    _ => rng.usize(0..rest.len()),
                };
                push(&mut parker, &rest[..end], &mut rng);
            }
            assert!(parker.is_over(), "{name} at {cut}");
            let parked = parker.finish().unwrap();
            assert!(parked.was_postcopy);
            let (found, commands, _) = read(&bytes_of(&parked.file)).unwrap();
            assert_eq!(
                commands
                    .iter()
                    .filter(|it| *it != "SWITCHOVER_START")
                    .count(),
                0
            );
            assert!(found == expected, "{name} at {cut}");
        }
    }
}

#[test]
fn only_a_package_lets_another_connection_go_on() {
    let stream = capture("postcopy-72.fwd");
    let file = tempfile::tempfile().unwrap();
    let mut parker = Parker::new(file, ParkOptions::default()).unwrap();
    parker.push(&stream[..package_end(&stream) - 1]).unwrap();
    assert!(!parker.holds_package());
    parker.interrupted().unwrap_err();
    parker
        .push(&stream[package_end(&stream) - 1..][..1])
        .unwrap();
    assert!(parker.holds_package());
    // The first connection does not go on in the middle of itself.
    let mut question = Vec::new();
    let resume = Record::Command(Command::PostcopyResume);
    Encoder::new(true).record(&resume, &mut question);
    parker.heard().for_each(drop);
    parker.push(&question).unwrap();
    assert_eq!(parker.heard().count(), 0);
    parker.interrupted().unwrap();
    parker.push(&question).unwrap();
    assert_eq!(parker.heard().collect::<Vec<_>>(), [ParkEvent::Resume]);
}

/// Whoever connects in between may say anything; the next one is not answered for it.
#[test]
fn what_a_stranger_asked_is_not_answered_to_the_source() {
    let stream = capture("postcopy-100.fwd");
    let (expected, _, _) = read(&stream).unwrap();
    let next = NextConnection::new(&stream, &expected);
    let file = tempfile::tempfile().unwrap();
    let mut parker = Parker::new(file, ParkOptions::default()).unwrap();
    parker.push(&stream[..package_end(&stream)]).unwrap();
    parker.heard().for_each(drop);
    parker.interrupted().unwrap();
    let mut words = Vec::new();
    let resume = Record::Command(Command::PostcopyResume);
    Encoder::new(true).record(&resume, &mut words);
    words.extend([2, 0xff, 0xff, 0xff, 0xff]);
    parker.push(&words).unwrap_err();
    parker.interrupted().unwrap();
    assert_eq!(parker.heard().count(), 0);
    parker.push(&next.questions).unwrap();
    let events: Vec<_> = parker.heard().collect();
    let (last, questions) = events.split_last().unwrap();
    assert_eq!(*last, ParkEvent::Resume);
    let is_question = |event: &ParkEvent| matches!(event, ParkEvent::ReceivedBitmap(_));
    assert!(questions.iter().all(is_question), "{questions:?}");
}
