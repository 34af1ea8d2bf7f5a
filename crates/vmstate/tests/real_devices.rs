//! Sections of a real QEMU, loaded by our descriptions and saved again.

mod devices;

use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex};

use devices::{FwCfg, Pit, Rtc};
use vmferry_vmstate::schema::{Schema, SchemaState, dump};
use vmferry_vmstate::{
    DescriptionWriter, Device, Dialect, Loader, SavedBody, VmDescription, VmState,
};

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

fn capture(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../stream/tests/captures");
    let file = std::fs::File::open(folder.join(format!("{name}.xz"))).unwrap();
    let mut bytes = Vec::new();
    xz2::read::XzDecoder::new(file)
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// Section id, and where the body of the device's only section begins.
fn section(stream: &[u8], name: &str, version: u32) -> (u32, usize) {
    let mut header = vec![u8::try_from(name.len()).unwrap()];
    header.extend(name.bytes());
    header.extend([0; 4]);
    header.extend(version.to_be_bytes());
    let found = memmem(stream, &header);
    let at = found.unwrap_or_else(|| panic!("no section '{name}'"));
    assert_eq!(stream[at - 5], 4, "'{name}' is no full section");
    let id = u32::from_be_bytes(stream[at - 4..at].try_into().unwrap());
    (id, at + header.len())
}

/// Load the section into a device, expect its footer, save the device: the same bytes, and the same
/// description as QEMU wrote.
fn round_trip<T: VmState + Clone>(stream: &[u8], capture: &str, device: T) -> T {
    let (id, start) = section(stream, T::NAME, T::VERSION);
    let mut device = Arc::new(Mutex::new(device));
    let decoded = device.decode(T::VERSION, &stream[start..]).unwrap();
    let end = start + decoded.used;
    let footer = [&[0x7e], &id.to_be_bytes()[..]].concat();
    assert_eq!(
        stream[end..end + 5],
        footer,
        "{capture}: {} ends elsewhere",
        T::NAME
    );
    decoded.commit().unwrap();

    let body = Device::save(&mut device).unwrap();
    let mut bytes = Vec::new();
    body.encode(&mut bytes);
    assert_eq!(bytes, stream[start..end], "{capture}: {}", T::NAME);
    same_description::<T>(stream, capture, &body);
    Arc::into_inner(device).unwrap().into_inner().unwrap()
}

/// Our description of the device has the fields of QEMU's own.
fn same_description<T: VmState>(stream: &[u8], capture: &str, body: &SavedBody) {
    let start =
        memmem(stream, b"{\"configuration\": ").or_else(|| memmem(stream, b"{\"page_size\": "));
    let theirs = VmDescription::parse(&stream[start.unwrap()..]).unwrap();
    let mut writer = DescriptionWriter::new(Dialect::Qemu10, 4096, None);
    writer.device(T::NAME, 0, body);
    let ours = VmDescription::parse(writer.finish().as_bytes()).unwrap();
    assert_eq!(
        ours.devices[0].body,
        theirs.device(T::NAME, 0).unwrap().body,
        "{capture}"
    );
}

fn memmem(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|at| at == wanted)
}

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
        let pit = round_trip(&stream, name, Pit::default());
        assert_ne!(pit.channels[0].count, 0, "{name}: counter 0 ticks");
        let rtc = round_trip(&stream, name, Rtc::default());
        assert_ne!(rtc.base_rtc, 0, "{name}: it is after 1970");
        assert!(rtc.cmos_data.iter().any(|byte| *byte != 0));
        let fw_cfg = round_trip(&stream, name, machine(name));
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
