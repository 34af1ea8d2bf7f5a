//! Devices that are described here exactly as QEMU describes them load what a real QEMU saves, and a real
//! QEMU loads what they save.

use std::sync::{Arc, Mutex};

use serde_json::json;
use vmferry_inspect::{DeviceReport, Report};
use vmferry_vmstate::{Device, VmState};

use super::devices::{FwCfg, Pit, Rtc};
use super::streams::{Stream, migrate_to};
use crate::need;
use crate::peers::qemu::{Machine, Version};
use crate::peers::until;

/// A stream whose devices are changed.
struct Edited {
    version: Version,
    bytes: Vec<u8>,
}

fn section(bytes: &[u8], name: &str) -> DeviceReport {
    let report = Report::of(bytes);
    let mut devices = report.devices.into_iter();
    let device = devices.find(|device| device.section.name == *name);
    device.unwrap_or_else(|| panic!("no section '{name}'"))
}

/// Load the device's section.
fn load<T: VmState + Clone>(bytes: &[u8], empty: T) -> T {
    let device = section(bytes, T::NAME);
    // In a stream a byte follows every body, which says that no subsection does.
    let start = usize::try_from(device.offset).expect("a small stream");
    let mut loaded = Arc::new(Mutex::new(empty));
    let decoded = Device::decode(&loaded, device.section.version, &bytes[start..]);
    let decoded = decoded.unwrap_or_else(|error| panic!("{}: {error}", T::NAME));
    assert_eq!(decoded.used as u64, device.bytes, "{}", T::NAME);
    decoded
        .commit()
        .unwrap_or_else(|error| panic!("{}: {error}", T::NAME));
    let state = loaded.lock().expect("nobody panicked").clone();
    // It encodes as it was.
    assert_eq!(
        encode(&mut loaded),
        bytes[start..start + decoded_len(&device)]
    );
    state
}

fn decoded_len(device: &DeviceReport) -> usize {
    usize::try_from(device.bytes).expect("a small device")
}

fn encode(device: &mut impl Device) -> Vec<u8> {
    let mut bytes = Vec::new();
    Device::save(device)
        .expect("it can be saved")
        .encode(&mut bytes);
    bytes
}

impl Edited {
    /// Of a machine that never ran; `None` if this QEMU is not there.
    fn fresh(version: Version) -> Option<Self> {
        let stream = Stream::fresh("pc", Machine::new(version)?);
        Some(Self {
            version,
            bytes: stream.bytes,
        })
    }

    /// Put the device in the place of its section's body.
    fn put<T: VmState + Clone>(&mut self, state: &T) {
        let device = section(&self.bytes, T::NAME);
        let start = usize::try_from(device.offset).expect("a small stream");
        let body = encode(&mut Arc::new(Mutex::new(state.clone())));
        self.bytes.splice(start..start + decoded_len(&device), body);
    }

    fn target(&self) -> Machine {
        let machine = Machine::new(self.version).expect("it was there before");
        machine.args(["-S", "-incoming", "defer"])
    }

    /// Let a real QEMU load it; what that one saves then.
    fn loaded_by_qemu(&self) -> Vec<u8> {
        let stream = Stream::of("edited", self.bytes.clone());
        let mut qemu = self.target().start();
        let uri = format!("exec:cat {}", stream.path.display());
        qemu.qmp.execute("migrate-incoming", &json!({ "uri": uri }));
        qemu.migrated();
        let path = qemu.path("again");
        migrate_to(&mut qemu, &path);
        std::fs::read(path).expect("the stream can be read")
    }

    /// Let a real QEMU refuse it; what that one says.
    fn refused_by_qemu(&self) -> String {
        let stream = Stream::of("edited", self.bytes.clone());
        let mut qemu = self.target().start();
        let uri = format!("exec:cat {}", stream.path.display());
        qemu.qmp.execute("migrate-incoming", &json!({ "uri": uri }));
        // It says so and ends.
        until("QEMU to refuse", || {
            let errors = qemu.errors();
            errors
                .contains("load of migration failed")
                .then_some(errors)
        })
    }
}

fn machine() -> FwCfg {
    FwCfg {
        dma_enabled: true,
        has_acpi_tables: true,
        ..FwCfg::default()
    }
}

#[test]
fn a_real_qemu_loads_our_devices() {
    for version in [Version::V7_2, Version::V10_0] {
        let mut edited = need!(Edited::fresh(version));

        let mut pit = load(&edited.bytes, Pit::default());
        assert_ne!(pit.channels[0].count, 0, "counter 0 ticks");
        let speaker = &mut pit.channels[2];
        (speaker.count, speaker.latched_count) = (0x4321, 0x1234);
        (speaker.mode, speaker.rw_mode, speaker.gate) = (2, 3, 1);
        edited.put(&pit);

        let mut rtc = load(&edited.bytes, Rtc::default());
        rtc.cmos_data[0x40..0x4c].copy_from_slice(b"from vmferry");
        rtc.cmos_index = 0x40;
        rtc.reinject.irq_reinject_on_ack_count = 3;
        edited.put(&rtc);

        let mut fw_cfg = load(&edited.bytes, machine());
        (fw_cfg.cur_entry, fw_cfg.cur_offset, fw_cfg.dma.dma_addr) = (0x19, 4, 0x1234_5678);
        edited.put(&fw_cfg);

        let again = edited.loaded_by_qemu();
        let speaker = load(&again, Pit::default()).channels[2].clone();
        assert_eq!(speaker, pit.channels[2], "{version:?}");
        let rtc_again = load(&again, Rtc::default());
        assert_eq!(
            rtc_again.cmos_data[0x40..0x4c],
            *b"from vmferry",
            "{version:?}"
        );
        assert_eq!(rtc_again.cmos_index, 0x40, "{version:?}");
        assert_eq!(rtc_again.reinject, rtc.reinject, "{version:?}");
        assert_eq!(load(&again, machine()), fw_cfg, "{version:?}");
    }
}

/// What QEMU refuses is refused here, too.
#[test]
fn a_wrong_byte_is_refused_on_both_sides() {
    type Refused = fn(&[u8]) -> String;
    fn refusal<T: VmState + Clone>(bytes: &[u8], empty: T) -> String {
        let device = section(bytes, T::NAME);
        let loaded = Arc::new(Mutex::new(empty));
        let body = &bytes[usize::try_from(device.offset).expect("a small stream")..];
        let decoded = Device::decode(&loaded, device.section.version, body);
        match decoded.map(|decoded| decoded.used as u64) {
            Err(error) => error.to_string(),
            // What is no subsection of it belongs to what follows, which is no footer then.
            Ok(used) => {
                assert_ne!(used, device.bytes, "{} takes it", T::NAME);
                "ends elsewhere".into()
            }
        }
    }
    let pit: Refused = |bytes| refusal(bytes, Pit::default());
    let fw_cfg: Refused = |bytes| refusal(bytes, machine());
    for version in [Version::V7_2, Version::V10_0] {
        // The device, bytes from the beginning of its body, the new byte.
        for (name, ours, place, byte) in [
            // Its version.
            ("i8254", pit, -1, 4),
            // A letter in a subsection's name.
            ("fw_cfg", fw_cfg, 6 + 2 + 9, b'x'),
            // A subsection's version.
            ("fw_cfg", fw_cfg, 6 + 2 + 10 + 3, 7),
        ] {
            let mut edited = need!(Edited::fresh(version));
            let offset = section(&edited.bytes, name).offset;
            let at = usize::try_from(offset)
                .expect("a small stream")
                .checked_add_signed(place)
                .expect("it is not at the beginning");
            assert_ne!(edited.bytes[at], byte);
            edited.bytes[at] = byte;
            let says = edited.refused_by_qemu();
            assert!(says.contains(name), "{version:?}: {says}");
            let refused = ours(&edited.bytes);
            println!("{refused}\n{says}");
            let output = Stream::of("edited", edited.bytes).inspect(&[]);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{errors}");
            assert!(errors.contains(name), "{errors}");
        }
    }
}
