//! Where devices end, in streams that make it hard to tell.

use vmferry_inspect::{DeviceState, Found, Report};

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
