//! Sections of a real QEMU, loaded by our descriptions and saved again.

mod devices;
mod sections;

use devices::{FwCfg, Pit, Rtc};
use sections::{capture, round_trip};
use vmferry_vmstate::schema::{Schema, SchemaState, dump};
use vmferry_vmstate::{Loader, VmState};

const CAPTURES: [&str; 8] = [
    "pc-72",
    "pc-100",
    "pc-7.2-100",
    "pc-2.10-100",
    "running-72",
    "running-100",
    "isapc-72",
    "isapc-100",
];

fn machine(capture: &str) -> FwCfg {
    FwCfg {
        dma_enabled: true,
        has_acpi_tables: !capture.starts_with("isapc") && !capture.starts_with("pc-2."),
        ..FwCfg::default()
    }
}

#[test]
fn real_sections_load_and_save_to_the_same_bytes() {
    for name in CAPTURES {
        let stream = capture(name);
        let pit = round_trip(&stream, name, "i8254", Pit::default());
        assert_ne!(pit.channels[0].count, 0, "{name}: counter 0 ticks");
        let rtc = round_trip(&stream, name, "mc146818rtc", Rtc::default());
        assert_ne!(rtc.base_rtc, 0, "{name}: it is after 1970");
        assert!(rtc.cmos_data.iter().any(|byte| *byte != 0));
        let fw_cfg = round_trip(&stream, name, "fw_cfg", machine(name));
        if machine(name).has_acpi_tables {
            assert_eq!(fw_cfg.acpi.table_mr_size, 0x20000, "{name}");
        }
    }
}

/// Names, versions, conditions and counts, without the sizes: QEMU's are those of its memory.
fn without_sizes(state: &mut SchemaState) -> &SchemaState {
    for field in state.fields.iter_mut().flatten() {
        field.element_bytes = 0;
        field.inner.as_mut().map(without_sizes);
    }
    state
}

#[test]
fn our_descriptions_are_those_of_qemu() {
    let text = std::fs::read("tests/schema/qemu-10.0.json").unwrap();
    let mut theirs = Schema::parse(&text).unwrap();
    let descriptions = [
        ("isa-pit", Pit::description()),
        ("mc146818rtc", Rtc::description()),
        ("fw_cfg_io", FwCfg::description()),
    ];
    let mut ours = dump(&theirs.machine, descriptions);
    for device in &mut ours.devices {
        let mut qemus = theirs.devices.iter_mut();
        let qemus = qemus.find(|qemus| qemus.name == device.name).unwrap();
        assert_eq!(device.version, qemus.version);
        assert_eq!(device.minimum_version, qemus.minimum_version);
        assert_eq!(
            without_sizes(&mut device.state),
            without_sizes(&mut qemus.state),
            "{}",
            device.name
        );
    }
}

#[test]
fn older_versions_are_read() {
    let load = |bytes: &[u8], version| {
        let mut fw_cfg = FwCfg::default();
        let mut loader = Loader::whole(bytes);
        fw_cfg.load(&mut loader, version).unwrap();
        (fw_cfg.cur_entry, fw_cfg.cur_offset)
    };
    assert_eq!(load(b"\x80\x01\x12\x34", 1), (0x8001, 0x1234));
    assert_eq!(load(b"\x80\x01\0\x01\x12\x34", 2), (0x8001, 0x11234));

    let mut pit = Pit::default();
    let body = [&[0; 4 + 3 * 32][..], &7i64.to_be_bytes()].concat();
    pit.load(&mut Loader::whole(&body[4..]), 2).unwrap();
    assert_eq!(pit.next_transition_time, 7);
    let too_old = pit.load(&mut Loader::whole(&body), 1).unwrap_err();
    assert_eq!(
        too_old.to_string(),
        "version 1 of 'i8254' is not supported, only 2 to 3"
    );
}
