//! Machines of both QEMUs with all that their buses take: every device is understood, to its last field.

use vmferry_inspect::{ItemKind, Report};

use super::machines::{Equipped, ISAPC, MICROVM, NONE, PC, Q35};
use super::streams::{Stream, is_understood};
use crate::need;
use crate::peers::qemu::Version;

fn is_understood_with_its_devices(equipped: &Equipped) {
    for version in [Version::V7_2, Version::V10_0] {
        let name = format!("{} of {version:?}", equipped.machine);
        let stream = Stream::fresh(&name, need!(equipped.ready(version)));
        is_understood(&stream);
        let report = Report::of(&stream.bytes[..]);
        for (section, device) in equipped.of(version) {
            let mut names = report.devices.iter().map(|device| &device.section.name);
            let is_it = |name: &str| name.rsplit('/').next() == Some(section);
            assert!(
                names.any(|name| is_it(name)),
                "{name}: no {section} of '{device}' among {:?}",
                report
                    .devices
                    .iter()
                    .map(|device| device.section.name.as_str())
                    .collect::<Vec<_>>()
            );
        }
    }
}

#[test]
fn a_pc_with_twenty_devices() {
    is_understood_with_its_devices(&PC);
}

#[test]
fn a_q35_with_thirty_devices() {
    is_understood_with_its_devices(&Q35);
}

#[test]
fn a_microvm_with_virtio_devices() {
    is_understood_with_its_devices(&MICROVM);
}

#[test]
fn an_isapc_with_old_cards() {
    is_understood_with_its_devices(&ISAPC);
}

#[test]
fn a_machine_with_nothing() {
    is_understood_with_its_devices(&NONE);
}

/// What virtio-mem sends before the pages stands there in the report, and its description at the end is
/// found.
#[test]
fn a_device_before_the_pages() {
    let stream = Stream::fresh("q35", need!(Q35.ready(Version::V10_0)));
    let report = Report::of(&stream.bytes[..]);
    let mut items = report.items.iter();
    let early = items.position(|item| match item.kind {
        ItemKind::Device(place) => report.devices[place]
            .section
            .name
            .ends_with("virtio-mem-device-early"),
        _ => false,
    });
    let pages = report.items.iter().position(|item| match &item.kind {
        ItemKind::Section(section) => section.kind == vmferry_stream::SectionKind::Part,
        _ => false,
    });
    assert!(early.is_some() && early < pages, "{early:?} {pages:?}");
}
