//! Every limit of what is held and reported, on both sides of it.

use std::io::{self, Read};

use vmferry_inspect::limits::{
    DESCRIPTION_BYTES_MAX, HELD_BYTES_MAX, LIBVIRT_XML_BYTES_MAX, PROBLEMS_MAX, REPORT_ITEMS_MAX,
    REPORT_NAMES_MAX,
};
use vmferry_inspect::{Container, Report, WalkError};
use vmferry_stream::{
    BlockChunk, Command, Configuration, Encoder, InstanceId, Name, RamPage, RamRecord, Record,
    Section, SectionId, SectionKind, Sector,
};

/// A stream in the making.
struct Stream {
    encoder: Encoder,
    bytes: Vec<u8>,
}

impl Stream {
    fn new() -> Self {
        let mut stream = Self {
            encoder: Encoder::new(true),
            bytes: Vec::new(),
        };
        stream.put(&Record::Header { version: 3 });
        let machine = Name::new("pc").unwrap();
        stream.put(&Record::Configuration(Configuration::of_machine(machine)));
        stream
    }

    fn put(&mut self, record: &Record) {
        self.encoder.record(record, &mut self.bytes);
    }

    fn section(&mut self, kind: SectionKind, id: u32, name: &str, version: u32) {
        self.put(&Record::Section(Section {
            kind,
            id: SectionId(id),
            name: Name::new(name).unwrap(),
            instance: InstanceId(0),
            version,
        }));
    }

    fn end(&mut self, id: u32) {
        self.put(&Record::SectionEnd { id: SectionId(id) });
    }

    fn device(&mut self, id: u32, body_bytes: usize) {
        self.section(SectionKind::Full, id, "device", 1);
        self.bytes.resize(self.bytes.len() + body_bytes, 0x55);
        self.end(id);
    }

    fn finish(mut self) -> Vec<u8> {
        self.put(&Record::Eof);
        self.describe(b"{}");
        self.bytes
    }

    fn describe(&mut self, text: &[u8]) {
        let bytes = u32::try_from(text.len()).unwrap();
        self.put(&Record::Description { bytes });
        self.bytes.extend(text);
    }
}

#[test]
fn devices_are_held_up_to_a_limit() {
    // What is held begins with the body, and ends with the description.
    let behind = 5 + 1 + 5 + 2;
    let mut stream = Stream::new();
    stream.device(9, HELD_BYTES_MAX - behind);
    let report = Report::of(&stream.finish()[..]);
    assert!(report.end.is_ok(), "{:?}", report.end);
    assert_eq!(report.devices[0].bytes, (HELD_BYTES_MAX - behind) as u64);

    let mut stream = Stream::new();
    stream.device(9, HELD_BYTES_MAX + (1 << 20));
    let report = Report::of(&stream.finish()[..]);
    let error = report.end.unwrap_err();
    assert!(matches!(error, WalkError::TooLong { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("'device'") && text.contains("16777216 bytes"),
        "{text}"
    );
}

#[test]
fn packages_are_held_up_to_a_limit() {
    for (length, fits) in [(HELD_BYTES_MAX, true), (HELD_BYTES_MAX + 1, false)] {
        let mut stream = Stream::new();
        let bytes = u32::try_from(length).unwrap();
        stream.put(&Record::Command(Command::Packaged { bytes }));
        let start = stream.bytes.len();
        stream.put(&Record::Command(Command::PostcopyRun));
        stream.bytes.resize(start + length, 0);
        stream.put(&Record::Eof);
        let report = Report::of(&stream.bytes[..]);
        assert_eq!(report.end.is_ok(), fits, "{:?}", report.end);
    }
}

#[test]
fn descriptions_are_read_up_to_a_limit() {
    for (length, fits) in [
        (DESCRIPTION_BYTES_MAX, true),
        (DESCRIPTION_BYTES_MAX + 1, false),
    ] {
        let mut stream = Stream::new();
        stream.put(&Record::Eof);
        let mut text = vec![b' '; length];
        text[0] = b'{';
        text[length - 1] = b'}';
        stream.describe(&text);
        let report = Report::of(&stream.bytes[..]);
        assert_eq!(report.end.is_ok(), fits, "{:?}", report.end);
    }
}

#[test]
fn xml_of_libvirt_is_passed_over_up_to_a_limit() {
    for (length, fits) in [
        (LIBVIRT_XML_BYTES_MAX, true),
        (LIBVIRT_XML_BYTES_MAX + 1, false),
    ] {
        let mut header = b"LibvirtQemudSave".to_vec();
        for word in [2, length, 1, 0, 0] {
            header.extend(u32::to_le_bytes(word));
        }
        header.resize(92, 0);
        let stream = Stream::new().finish();
        let xml = io::repeat(b'x').take(u64::from(length));
        let report_or_error = Report::of(header.as_slice().chain(xml).chain(stream.as_slice()));
        assert_eq!(
            report_or_error.end.is_ok(),
            fits,
            "{:?}",
            report_or_error.end
        );
        if fits {
            assert_eq!(report_or_error.start, 92 + u64::from(length));
            assert!(matches!(report_or_error.container, Container::Libvirt(_)));
        }
    }
}

#[test]
fn items_are_reported_up_to_a_limit() {
    // Header, configuration, EOF and description are items, too.
    for (commands, left_out) in [(REPORT_ITEMS_MAX - 4, 0), (REPORT_ITEMS_MAX - 3, 1)] {
        let mut stream = Stream::new();
        for k in 0..commands {
            let command = match k % 2 {
                0 => Command::Ping(1),
                _ => Command::OpenReturnPath,
            };
            stream.put(&Record::Command(command));
        }
        let report = Report::of(&stream.finish()[..]);
        assert!(report.end.is_ok(), "{:?}", report.end);
        assert_eq!(report.items_left_out, left_out, "{commands}");
        assert_eq!(report.items.len(), REPORT_ITEMS_MAX);
    }
}

#[test]
fn disks_are_counted_up_to_a_limit() {
    for (disks, fits) in [(REPORT_NAMES_MAX, true), (REPORT_NAMES_MAX + 1, false)] {
        let mut stream = Stream::new();
        stream.section(SectionKind::Start, 1, "block", 1);
        for k in 0..disks {
            stream.put(&Record::Block(BlockChunk::Zero {
                sector: Sector::at_byte(0).unwrap(),
                device: Name::new(&format!("disk{k}")).unwrap(),
            }));
        }
        stream.put(&Record::Block(BlockChunk::EndOfSection));
        stream.end(1);
        let report = Report::of(&stream.finish()[..]);
        assert_eq!(report.disks.len(), REPORT_NAMES_MAX);
        assert_eq!(report.is_clean(), fits);
    }
}

#[test]
fn problems_are_told_up_to_a_limit() {
    let name = Name::new("pc.ram").unwrap();
    for (wrong, left_out) in [(PROBLEMS_MAX, 0), (PROBLEMS_MAX + 1, 1)] {
        let mut stream = Stream::new();
        stream.section(SectionKind::Start, 1, "ram", 4);
        stream.put(&Record::Ram(RamRecord::BlockList { total_bytes: 4096 }));
        stream.put(&Record::Ram(RamRecord::Block {
            name: name.clone(),
            used_bytes: 4096,
            page_bytes: None,
            guest_address: None,
            mapped: None,
        }));
        for k in 1..=wrong as u64 {
            stream.put(&Record::Ram(RamRecord::Zero {
                page: RamPage {
                    block: name.clone(),
                    offset_bytes: k * 4096,
                },
                fill: 0,
            }));
        }
        stream.put(&Record::Ram(RamRecord::EndOfSection));
        stream.end(1);
        let report = Report::of(&stream.finish()[..]);
        assert!(report.end.is_ok(), "{:?}", report.end);
        assert_eq!(report.problems.len(), PROBLEMS_MAX);
        assert_eq!(report.problems_left_out, left_out);
        let text = &report.problems[0].text;
        assert!(
            text.contains("'pc.ram'") && text.contains("0x1000"),
            "{text}"
        );
    }
}
