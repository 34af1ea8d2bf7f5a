//! Real streams of QEMU 7.2 and 10.0: every device decoded by the stream's own description, encoded
//! again, described again.

use std::fs;
use std::io::Read;
use std::path::Path;

use vmferry_stream::{Content, Decoder, Options, Record, Step};
use vmferry_vmstate::{
    BodyLayout, DescriptionWriter, Dialect, SavedBody, SavedState, VmDescription,
};

/// Text of the description, if the stream ends in one.
fn description(stream: &[u8]) -> Option<&[u8]> {
    let starts = (5..stream.len())
        .rev()
        .filter(|at| stream[*at] == b'{' && stream[at - 5] == 6);
    let mut lengths = starts.map(|at| {
        (
            at,
            u32::from_be_bytes(stream[at - 4..at].try_into().unwrap()),
        )
    });
    let (at, _) = lengths.find(|(at, length)| *length as usize == stream.len() - at)?;
    Some(&stream[at..])
}

/// The bodies of all device sections, in stream order.
fn bodies(stream: &[u8], described: &VmDescription) -> Vec<SavedBody> {
    let mut decoder = Decoder::new(Options::default());
    let (mut at, mut bodies) = (0, Vec::new());
    loop {
        match decoder.step(&stream[at..]).expect("a real stream decodes") {
            Step::NeedMore(bytes) => panic!("truncated: {bytes} bytes wanted at {at}"),
            Step::Payload(bytes) => at += bytes as usize,
            Step::End => return bodies,
            Step::Record { record, used } => {
                at += used;
                if let Record::Section(section) = record
                    && section.content() == Content::Device
                {
                    let layout = described.device(&section.name, section.instance.0);
                    let layout = layout.expect("every device is described");
                    let length = layout.wire_bytes();
                    let body = &stream[at..at + length as usize];
                    let saved = layout.decode(body).unwrap_or_else(|error| {
                        panic!("{}: {error}", section.name);
                    });
                    let mut encoded = Vec::new();
                    saved.encode(&mut encoded);
                    assert!(
                        encoded == body,
                        "{} changes when encoded again",
                        section.name
                    );
                    bodies.push(saved);
                    decoder.skip_device(length);
                }
            }
        }
    }
}

/// The configuration as its description lays it out.
fn configuration(stream: &[u8], described: &VmDescription) -> Option<SavedState> {
    let layout = described.configuration.as_ref()?;
    let body = &stream[9..9 + layout.wire_bytes() as usize];
    Some(layout.decode(body).expect("the configuration decodes"))
}

#[test]
fn every_device_of_every_capture() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let (mut streams, mut devices, mut fields) = (0, 0, 0);
    for file in fs::read_dir(folder).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !name.ends_with(".xz") || name.contains(".rp") || name.contains("qcow2") {
            continue;
        }
        let mut stream = Vec::new();
        let packed = fs::File::open(&path).unwrap();
        xz2::read::XzDecoder::new(packed)
            .read_to_end(&mut stream)
            .unwrap();
        let Some(text) = description(&stream) else {
            continue;
        };
        let described = VmDescription::parse(text).unwrap();
        let dialect = match described.configuration {
            Some(_) => Dialect::Qemu10,
            None => Dialect::Qemu7,
        };
        let bodies = bodies(&stream, &described);
        assert_eq!(bodies.len(), described.devices.len(), "{name}");
        let configuration = configuration(&stream, &described);
        let mut writer =
            DescriptionWriter::new(dialect, described.page_bytes, configuration.as_ref());
        for (device, body) in described.devices.iter().zip(&bodies) {
            writer.device(&device.name, device.instance, body);
            if let BodyLayout::Described(state) = &device.body {
                fields += state.fields.len();
            }
        }
        let written = writer.finish();
        if written.as_bytes() != text {
            let at = written
                .bytes()
                .zip(text)
                .take_while(|(a, b)| a == *b)
                .count();
            let from = at.saturating_sub(200);
            panic!(
                "{name}: the description differs at byte {at}:\n{}\ninstead of\n{}",
                String::from_utf8_lossy(&written.as_bytes()[from..(at + 60).min(written.len())]),
                String::from_utf8_lossy(&text[from..(at + 60).min(text.len())]),
            );
        }
        streams += 1;
        devices += bodies.len();
    }
    println!("{streams} streams, {devices} devices, {fields} fields at the top");
    assert!(streams >= 30, "{streams}");
}

/// The description of another stream may lack a subsection that this one has.
#[test]
fn a_subsection_that_is_not_described_is_named() {
    let layout = "{\"page_size\": 4096, \"devices\": [{\"name\": \"d\", \"instance_id\": 0, \
                  \"vmsd_name\": \"d\", \"version\": 1, \"fields\": \
                  [{\"name\": \"f\", \"type\": \"uint8\", \"size\": 1}]}]}";
    let described = VmDescription::parse(layout.as_bytes()).unwrap();
    let layout = described.device("d", 0).unwrap();
    let broken = |body: &[u8]| layout.decode(body).unwrap_err().to_string();
    assert_eq!(
        broken(b"\x07\x05\x05d/sub\0\0\0\x01\xff"),
        "byte 1 of the device, field 'd': subsection 'd/sub' instead of none"
    );
    for other in [
        &b"\x07\x05\x05e/sub"[..],
        b"\x07\x05\x05d/s",
        b"\x07\x05",
        b"\x07\x06",
    ] {
        assert!(broken(other).contains("bytes more than described"));
    }
}
