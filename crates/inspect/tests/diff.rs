//! Real streams compared.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use vmferry_inspect::Report;
use vmferry_inspect::diff::{self, DiffOptions, Difference, Sides};

fn capture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let packed = File::open(folder.join(format!("{name}.xz"))).unwrap();
    let mut stream = Vec::new();
    xz2::read::XzDecoder::new(packed)
        .read_to_end(&mut stream)
        .unwrap();
    stream
}

fn compared(first: &[u8], second: &[u8], clocks: bool) -> Vec<Difference> {
    diff::diff(
        &Report::of(first),
        &Report::of(second),
        DiffOptions { clocks },
    )
}

/// `stream` with one byte of a field changed.
fn changed(stream: &[u8], device: &str, path: &[&str], byte: usize) -> Vec<u8> {
    let report = Report::of(stream);
    let found = report.devices.iter().find(|it| it.section.name == *device);
    let found = found.unwrap();
    let layout = report.layout(found).unwrap();
    let vmferry_vmstate::BodyLayout::Described(layout) = &layout.body else {
        panic!("{device} is described");
    };
    let mut at = found.offset as usize;
    let mut fields = &layout.fields;
    for (depth, name) in path.iter().enumerate() {
        let place = fields.iter().position(|it| *it.name == **name).unwrap();
        at += fields[..place]
            .iter()
            .map(|it| it.element_bytes as usize * it.count as usize)
            .sum::<usize>();
        if depth + 1 < path.len() {
            fields = &fields[place].inner[0].fields;
        }
    }
    let mut stream = stream.to_vec();
    stream[at + byte] ^= 1;
    stream
}

#[test]
fn a_stream_does_not_differ_from_itself() {
    for name in [
        "pc-72",
        "q35-100",
        "blk-72",
        "postcopy-100.fwd",
        "pc-2.2-72",
    ] {
        let stream = capture(name);
        assert_eq!(compared(&stream, &stream, true), [], "{name}");
    }
}

#[test]
fn a_changed_field_is_named_and_nothing_else() {
    let stream = capture("pc-100");
    for (device, path, byte, field) in [
        (
            "i8254",
            &["channels", "count_latched"][..],
            0,
            "channels[0]/count_latched",
        ),
        ("cpu", &["env.regs"], 8 * 2 + 7, "env.regs[2]"),
        ("fw_cfg", &["cur_entry"], 1, "cur_entry"),
        ("pckbd", &["kbd", "mode"], 0, "kbd/mode"),
    ] {
        let other = changed(&stream, device, path, byte);
        let found = compared(&stream, &other, false);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].device.as_deref(), Some(device));
        assert_eq!(found[0].field, field);
        assert!(matches!(found[0].sides, Sides::Fields(..)), "{found:?}");
    }
}

#[test]
fn clocks_differ_only_if_they_are_asked_for() {
    let stream = capture("pc-100");
    for (device, path, byte) in [
        ("timer", &["cpu_clock_offset"][..], 7),
        ("i8254", &["channels", "count_load_time"], 7),
        ("mc146818rtc", &["base_rtc"], 7),
        ("mc146818rtc", &["update_timer"], 0),
        ("mc146818rtc", &["cmos_data"], 4),
    ] {
        let other = changed(&stream, device, path, byte);
        assert_eq!(compared(&stream, &other, false), [], "{device} {path:?}");
        assert_eq!(
            compared(&stream, &other, true).len(),
            1,
            "{device} {path:?}"
        );
    }
    // The rest of the clock's memory is no time.
    let other = changed(&stream, "mc146818rtc", &["cmos_data"], 0x10);
    assert_eq!(compared(&stream, &other, false).len(), 1);
}

#[test]
fn two_versions_of_one_machine_differ_where_their_descriptions_do() {
    let found = compared(&capture("pc-72"), &capture("pc-7.2-100"), false);
    let mut devices: Vec<_> = found.iter().filter_map(|it| it.device.as_deref()).collect();
    devices.dedup();
    assert_eq!(devices, ["globalstate", "hpet"], "{found:?}");
    let field = |name: &str| found.iter().find(|it| it.field == name).map(|it| &it.sides);
    assert_eq!(field("num_timers"), Some(&Sides::OnlyFirst));
    assert_eq!(field("num_timers_save"), Some(&Sides::OnlySecond));
}

#[test]
fn what_only_one_machine_has_is_told() {
    let found = compared(&capture("pc-72"), &capture("q35-72"), false);
    let sides = |part: &str| found.iter().find(|it| it.part == part).map(|it| &it.sides);
    let machine = ("pc-i440fx-7.2".to_owned(), "pc-q35-7.2".to_owned());
    assert_eq!(sides("machine"), Some(&Sides::Words(machine.0, machine.1)));
    assert_eq!(
        sides("device '0000:00:01.0/PIIX3' 0"),
        Some(&Sides::OnlyFirst)
    );
    assert_eq!(
        sides("device '0000:00:1f.0/ICH9LPC' 0"),
        Some(&Sides::OnlySecond)
    );
}

#[test]
fn contents_of_memory_and_disks() {
    let memory = |stream: &[u8]| diff::paint_memory(stream, tempfile::tempfile().unwrap()).unwrap();
    let (first, second) = (capture("pc-100"), capture("running-100"));
    assert_eq!(
        diff::compare(&memory(&second), &memory(&second)).unwrap(),
        []
    );
    let found = diff::compare(&memory(&first), &memory(&second)).unwrap();
    let ram = found
        .iter()
        .find(|it| it.part == "memory 'pc.ram'")
        .unwrap();
    // The guest counts in 128 pages from 64 KiB on.
    assert_eq!(
        ram.sides,
        Sides::Contents {
            units: 128,
            unit_bytes: 4096,
            first_at: 0x10000
        }
    );
    let disk = |stream: &[u8]| diff::paint_disk(stream, "dd", tempfile::tempfile().unwrap());
    let stream = capture("blk-72");
    let mut other = stream.clone();
    other[0x100000] ^= 1;
    assert_eq!(
        diff::compare(&disk(&stream).unwrap(), &disk(&stream).unwrap()).unwrap(),
        []
    );
    let found = diff::compare(&disk(&stream).unwrap(), &disk(&other).unwrap()).unwrap();
    assert!(
        matches!(found[0].sides, Sides::Contents { units: 1, .. }),
        "{found:?}"
    );
    assert!(disk(&first).is_err());
}
