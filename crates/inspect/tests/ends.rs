//! Where devices end, in streams that make it hard to tell.

use vmferry_inspect::{BodyEnd, DeviceState, Found, Report, find_body_end};
use vmferry_stream::{Decoder, Options, Record, Section, Step};

const HEADER: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";

/// A FULL section `name` with this id and body, with or without a footer.
fn section(name: &str, id: u8, body: &[u8], footer: bool) -> Vec<u8> {
    let mut bytes = vec![4, 0, 0, 0, id, u8::try_from(name.len()).unwrap()];
    bytes.extend(name.bytes());
    bytes.extend([0, 0, 0, 0, 0, 0, 0, 1]);
    bytes.extend(body);
    if footer {
        bytes.extend([0x7e, 0, 0, 0, id]);
    }
    bytes
}

/// A device with one buffer of so many bytes.
fn described(name: &str, bytes: usize) -> String {
    format!(
        r#"{{"name": "{name}", "instance_id": 0, "vmsd_name": "{name}", "version": 1, "fields": [{{"name": "data", "type": "buffer", "size": {bytes}}}]}}"#
    )
}

fn finished(sections: &[Vec<u8>], devices: &[String]) -> Vec<u8> {
    let text = format!(
        r#"{{"page_size": 4096, "devices": [{}]}}"#,
        devices.join(", ")
    );
    let length = u32::try_from(text.len()).unwrap().to_be_bytes();
    [
        HEADER,
        &sections.concat(),
        b"\0\x06",
        &length,
        text.as_bytes(),
    ]
    .concat()
}

#[test]
fn a_first_section_without_a_footer_ends_where_its_description_says() {
    let sections = [
        section("timer", 1, &[0x55; 24], false),
        section("serial", 2, &[0x66; 11], false),
    ];
    let devices = [described("timer", 24), described("serial", 11)];
    let report = Report::of(&finished(&sections, &devices)[..]);
    assert!(report.is_clean(), "{:?} {:?}", report.end, report.problems);
    assert_eq!(report.footers, Some(false));
    let lengths: Vec<_> = report
        .devices
        .iter()
        .map(|it| (it.bytes, it.found))
        .collect();
    assert_eq!(
        lengths,
        [(24, Found::ByDescription), (11, Found::ByDescription)]
    );
}

#[test]
fn what_looks_like_an_end_inside_a_device_is_passed_over() {
    // The section's own footer, an EOF and a description that is none.
    let decoy = b"\x11\x7e\0\0\0\x01\0\x06\0\0\0\x02{!\x22\x33\x44";
    let sections = [
        section("disk", 1, decoy, true),
        section("serial", 2, &[0x66; 11], true),
    ];
    let devices = [described("disk", decoy.len()), described("serial", 11)];
    let report = Report::of(&finished(&sections, &devices)[..]);
    assert!(report.is_clean(), "{:?} {:?}", report.end, report.problems);
    assert_eq!(report.devices.len(), 2);
    assert_eq!(report.devices[0].bytes, decoy.len() as u64);
}

#[test]
fn a_device_that_is_described_and_not_there_is_a_problem() {
    let sections = [section("timer", 1, &[0x55; 24], true)];
    let devices = [described("timer", 24), described("serial", 11)];
    let report = Report::of(&finished(&sections, &devices)[..]);
    assert!(report.end.is_ok(), "{:?}", report.end);
    assert_eq!(report.problems.len(), 1);
    let text = &report.problems[0].text;
    assert_eq!(text, "device 'serial' 0 is described and not there");
    assert!(!report.is_clean());
}

/// A few bytes of description must not become millions of parts.
#[test]
fn an_array_of_structs_without_bytes_is_refused() {
    let device = r#"{"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, "fields": [{"name": "a", "array_len": 262000, "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": []}, "size": 0}]}"#;
    let sections = [section("d", 1, &[], true)];
    let report = Report::of(&finished(&sections, &[device.to_owned()])[..]);
    let state = report.state(&report.devices[0]);
    let DeviceState::Broken(_, error) = state else {
        panic!("{state:?}");
    };
    assert!(error.to_string().contains("parts"), "{error}");
}

/// A decoder behind the header of the first device of a stream, that device, and where its body starts.
fn at_first_device(stream: &[u8]) -> (Decoder, Section, usize) {
    let mut decoder = Decoder::new(Options::default());
    let mut at = 0;
    loop {
        match decoder.step(&stream[at..]).unwrap() {
            Step::Record {
                record: Record::Section(section),
                used,
            } => return (decoder, section, at + used),
            Step::Record { used, .. } => at += used,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_end_is_found_as_soon_as_what_follows_it_is_there() {
    // Something like a footer in the body, with nothing behind it that follows a section.
    let body = [&[0x55; 30][..], &[0x7e, 0, 0, 0, 1, 0x33], &[0x66; 20]].concat();
    let sections = [
        section("timer", 1, &body, true),
        section("serial", 2, &[0x66; 11], true),
    ];
    let stream = finished(&sections, &[]);
    let (decoder, first, start) = at_first_device(&stream);
    let mut searched = 0;
    for end in start..stream.len() {
        match find_body_end(&decoder, &first, &stream[start..end], searched, false) {
            BodyEnd::At(bytes) => {
                assert_eq!(bytes, body.len());
                // Behind the footer stands a header of 20 bytes.
                assert_eq!(end, start + body.len() + 5 + 20);
                return;
            }
            BodyEnd::NotYet { searched: so_far } => {
                assert!(so_far >= searched && so_far <= end - start);
                searched = so_far;
            }
        }
    }
    panic!("no end was found");
}

#[test]
fn what_is_all_ends_where_nothing_follows() {
    let stream = [HEADER, &section("timer", 1, &[0x55; 30], true), &[0]].concat();
    let (decoder, first, start) = at_first_device(&stream);
    let rest = &stream[start..];
    let not_yet = find_body_end(&decoder, &first, rest, 0, false);
    assert_eq!(not_yet, BodyEnd::NotYet { searched: 30 });
    assert_eq!(
        find_body_end(&decoder, &first, rest, 30, true),
        BodyEnd::At(30)
    );
}
