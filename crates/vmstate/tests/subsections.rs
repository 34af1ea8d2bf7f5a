//! Subsections whose names begin with their owner's, with a slash behind it and without.

mod sections;

use std::sync::{Arc, Mutex};

use sections::{capture, round_trip};
use vmferry_vmstate::{Device, DeviceError, Loader, VmState};

/// The keyboard controller of a PC.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "pckbd", version = 3)]
struct IsaKeyboard {
    #[vmstate(struct)]
    kbd: Keyboard,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "pckbd", version = 3)]
struct Keyboard {
    #[vmstate(uint8)]
    write_cmd: u8,
    #[vmstate(uint8)]
    status: u8,
    #[vmstate(uint8)]
    mode: u8,
    #[vmstate(uint8, name = "pending_tmp")]
    pending: u8,
    #[vmstate(subsection)]
    outport: Outport,
    #[vmstate(subsection)]
    extended: Extended,
}

/// QEMU named it without a slash.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "pckbd_outport", version = 1, needed = Self::is_set)]
struct Outport {
    #[vmstate(uint8)]
    outport: u8,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "pckbd/extended_state", version = 0)]
struct Extended {
    #[vmstate(uint32)]
    migration_flags: u32,
    #[vmstate(uint32)]
    obsrc: u32,
    #[vmstate(uint8)]
    obdata: u8,
    #[vmstate(uint8)]
    cbdata: u8,
}

impl Outport {
    fn is_set(&self) -> bool {
        self.outport != 0
    }
}

/// The section that a QEMU 10.0 wrote for a machine `pc` whose A20 gate was closed by
/// `outb 0x64 0xd1`, `outb 0x60 0xcd`, and its part of the description.
const SECTION: &[u8] = b"\x04\0\0\0\x1b\x05pckbd\0\0\0\0\0\0\0\x03\
    \x00\x18\x03\x00\
    \x05\x0dpckbd_outport\0\0\0\x01\xcd\
    \x05\x14pckbd/extended_state\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
    \x7e\0\0\0\x1b";
const DESCRIBED: &str = r#"{"page_size": 4096, "devices": [{"name": "pckbd", "instance_id": 0, "vmsd_name": "pckbd", "version": 3, "fields": [{"name": "kbd", "type": "struct", "struct": {"vmsd_name": "pckbd", "version": 3, "fields": [{"name": "write_cmd", "type": "uint8", "size": 1}, {"name": "status", "type": "uint8", "size": 1}, {"name": "mode", "type": "uint8", "size": 1}, {"name": "pending_tmp", "type": "uint8", "size": 1}], "subsections": [{"vmsd_name": "pckbd_outport", "version": 1, "fields": [{"name": "outport", "type": "uint8", "size": 1}]}, {"vmsd_name": "pckbd/extended_state", "version": 0, "fields": [{"name": "migration_flags", "type": "uint32", "size": 4}, {"name": "obsrc", "type": "uint32", "size": 4}, {"name": "obdata", "type": "uint8", "size": 1}, {"name": "cbdata", "type": "uint8", "size": 1}]}]}, "size": 60}]}]}"#;

#[test]
fn a_keyboard_controller_with_a_closed_gate() {
    let stream = [SECTION, DESCRIBED.as_bytes()].concat();
    let keyboard = round_trip(&stream, "pc 10.0", "pckbd", IsaKeyboard::default());
    let Keyboard {
        write_cmd,
        status,
        mode,
        pending,
        outport,
        ..
    } = keyboard.kbd;
    assert_eq!((write_cmd, status, mode, pending), (0, 0x18, 3, 0));
    assert_eq!(outport.outport, 0xcd);

    // Mostly there is nothing to say about the gate.
    let open = round_trip(
        &capture("pc-100"),
        "pc-100",
        "pckbd",
        IsaKeyboard::default(),
    );
    assert_eq!(open.kbd.outport.outport, 0);
}

/// Names of QEMU's, owner and subsection.
#[test]
fn names_begin_with_the_owners_and_are_longer() {
    for (owner, name, is_one) in [
        ("ide bmdma", "ide bmdma_current", true),
        ("vga", "vga.endian", true),
        ("pflash_cfi01", "pflash_cfi01_blk_write", true),
        ("fw_cfg", "fw_cfg/dma", true),
        ("fw_cfg", "fw_cfg", false),
        ("fw_cfg", "fw_cf/dma", false),
        ("fw_cfg", "", false),
    ] {
        assert_eq!(
            vmferry_vmstate::is_subsection_of(name, owner),
            is_one,
            "{name} of {owner}"
        );
    }
}

/// A struct, and a value behind it that begins like a subsection.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "board", version = 1)]
struct Board {
    #[vmstate(struct)]
    chip: Chip,
    #[vmstate(buffer)]
    data: [u8; 6],
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "chip", version = 1)]
struct Chip {
    #[vmstate(uint8)]
    level: u8,
}

#[test]
fn data_that_begins_like_a_subsection() {
    let board = Arc::new(Mutex::new(Board::default()));
    let footer = b"\x7e\0\0\0\x01";
    let decode = |data: &[u8]| {
        let body = [b"\x01", data, footer].concat();
        board.decode(1, &body)
    };
    for data in [
        b"\x05\x04chip",
        b"\x05\x03chip",
        b"\x05\xffchix",
        b"\x05\x05cows",
    ] {
        let decoded = decode(data).unwrap();
        assert_eq!(decoded.used, 7, "{data:?}");
        decoded.commit().unwrap();
        assert_eq!(board.lock().unwrap().data, *data);
    }
    // QEMU takes these for subsections, too: a body with them cannot be read by either.
    let taken = decode(b"\x05\x05chip\x7e").unwrap_err();
    assert_eq!(
        taken.to_string(),
        "field 'chip.chip~' (byte 1 of the device): subsection is not known here"
    );
    let endless = decode(b"\x05\xffchip").unwrap_err();
    assert!(matches!(endless, DeviceError::Incomplete { have: 12, .. }));
    let mut whole = Loader::whole(b"\x01\x05\xffchip");
    let mut loaded = Board::default();
    loaded.load(&mut whole, 1).unwrap();
    assert_eq!(loaded.data, *b"\x05\xffchip");
}
