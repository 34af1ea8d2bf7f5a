//! What a stream says about itself, compared with real programs.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use vmferry_vmstate::VmDescription;
use vmferry_vmstate::schema::{Presence, Schema, Source, Verdict, compare};

use crate::build::told;

/// The description of a captured stream.
fn described(capture: &str) -> VmDescription {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let file = File::open(folder.join(format!("{capture}.xz"))).expect("the capture is there");
    let mut stream = Vec::new();
    let mut input = xz2::read::XzDecoder::new(file);
    input.read_to_end(&mut stream).expect("it is whole");
    let at = (0..stream.len() - 5)
        .rev()
        .find(|at| {
            let length = u32::from_be_bytes(stream[at + 1..at + 5].try_into().unwrap());
            stream[*at] == 6 && length as usize == stream.len() - at - 5
        })
        .expect("it ends in a description");
    VmDescription::parse(&stream[at + 5..]).expect("it is readable")
}

fn of(capture: &str) -> Schema {
    Schema::of_stream("pc-i440fx-7.2", &described(capture))
}

/// Name, verdict and reasons of the devices that both know, if there is anything to say.
fn findings(stream: &Schema, program: &str) -> Vec<(String, Verdict, Vec<String>)> {
    let program = Schema::parse(program.as_bytes()).unwrap();
    let compared = compare(stream, &program).devices.into_iter();
    compared
        .filter(|device| device.presence == Presence::Both && device.differs())
        .map(|device| {
            assert!(device.backward.is_none(), "a stream loads nothing");
            let (verdict, reasons) = told(device.forward.as_ref().unwrap());
            (device.name, verdict, reasons)
        })
        .collect()
}

#[test]
fn a_stream_is_loaded_by_the_program_that_wrote_it_and_by_the_other() {
    for capture in ["pc-72", "pc-7.2-100", "isapc-72", "isapc-100"] {
        let stream = of(capture);
        assert_eq!(stream.source, Source::Stream);
        let names: Vec<_> = stream.devices.iter().map(|device| &*device.name).collect();
        for name in ["i8254", "mc146818rtc", "fw_cfg", "i8259"] {
            assert!(names.contains(&name), "{name} is in {capture}");
        }
        for program in [
            include_str!("qemu-7.2.json"),
            include_str!("qemu-10.0.json"),
        ] {
            let findings = findings(&stream, program);
            assert!(
                findings
                    .iter()
                    .all(|(_, verdict, _)| *verdict == Verdict::Yes),
                "{capture}: {findings:?}"
            );
        }
    }
}

#[test]
fn a_stream_is_not_loaded_where_a_field_or_a_subsection_is_missing() {
    let stream = of("pc-72");
    let program = include_str!("qemu-10.0.json");
    let without = program.replace("fw_cfg/dma", "fw_cfg/not-dma");
    let expected = vec!["fw_cfg/dma: not known to the receiver".to_owned()];
    assert_eq!(
        findings(&stream, &without)[0],
        ("fw_cfg".to_owned(), Verdict::No, expected)
    );
    let mut longer = Schema::parse(program.as_bytes()).unwrap();
    for device in &mut longer.devices {
        if device.state.name == "mc146818rtc" {
            let fields = device.state.fields.as_mut().unwrap();
            fields.insert(1, crate::build::plain("extra", 2));
        }
    }
    let expected = vec!["extra: 2 bytes read and not sent".to_owned()];
    let found = findings(&stream, &longer.to_string());
    assert!(found.contains(&("mc146818rtc".to_owned(), Verdict::No, expected)));
}

#[test]
fn devices_and_elements_that_share_a_description_are_laid_over_each_other() {
    // Two i8259 in a PC, three channels in an i8254.
    let stream = of("pc-72");
    let named = |name: &str| {
        let devices = stream.devices.iter();
        devices
            .filter(|device| device.name == name)
            .collect::<Vec<_>>()
    };
    assert_eq!(named("i8259").len(), 1);
    let pit = named("i8254")[0].state.fields.as_ref().unwrap();
    let channels = pit.iter().find(|field| field.name == "channels").unwrap();
    assert_eq!(channels.count, Some(3));
    let inner = channels.inner.as_ref().unwrap();
    assert_eq!(inner.name, "pit channel");
    assert!(
        inner
            .fields
            .iter()
            .flatten()
            .all(|field| !field.conditional)
    );
}

#[test]
fn what_only_some_elements_have_is_conditional() {
    let text = r#"{"page_size": 4096, "devices": [{"name": "d", "instance_id": 0, "vmsd_name": "d",
        "version": 1, "fields": [
        {"name": "s", "index": 0, "type": "struct", "size": 3, "struct": {"vmsd_name": "s",
            "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1},
                                     {"name": "b", "type": "uint16", "size": 2}]}},
        {"name": "s", "index": 1, "type": "struct", "size": 5, "struct": {"vmsd_name": "s",
            "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1},
                                     {"name": "c", "type": "uint32", "size": 4}]}}
        ]}]}"#;
    let described = VmDescription::parse(text.as_bytes()).unwrap();
    let schema = Schema::of_stream("m", &described);
    let structs = &schema.devices[0].state.fields.as_ref().unwrap()[0];
    assert_eq!((structs.count, structs.element_bytes), (Some(2), 0));
    let fields = structs.inner.as_ref().unwrap().fields.as_ref().unwrap();
    let fields: Vec<_> = fields
        .iter()
        .map(|field| (&*field.name, field.element_bytes, field.conditional))
        .collect();
    assert_eq!(fields, [("a", 1, false), ("b", 2, true), ("c", 4, true)]);
}
