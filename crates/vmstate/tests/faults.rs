//! Where an error is, and whose fault.

use std::sync::{Arc, Mutex};

use vmferry_stream::Blame;
use vmferry_vmstate::{
    Apart, BadState, BoxError, Device, DeviceError, Loader, SaveRestore, VmState,
};

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "board", version = 1, post_load = Self::check)]
struct Board {
    #[vmstate(uint8)]
    slots: u8,
    #[vmstate(struct)]
    chips: [Chip; 2],
    #[vmstate(subsection)]
    extra: Extra,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "chip", version = 1, pre_save = Self::stop, post_load = Self::check)]
struct Chip {
    #[vmstate(uint8)]
    level: u8,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "board/extra", version = 3)]
struct Extra {
    #[vmstate(struct)]
    chip: Chip,
}

impl Board {
    fn check(&mut self, _: u32) -> Result<(), BoxError> {
        match self.slots {
            8 => Err("no memory".into()),
            9 => Err(BadState("9 slots do not exist".into()).into()),
            _ => Ok(()),
        }
    }
}

impl Chip {
    fn stop(&mut self) -> Result<(), &'static str> {
        match self.level {
            8 => Err("does not stop"),
            _ => Ok(()),
        }
    }

    fn check(&mut self, _: u32) -> Result<(), BoxError> {
        match self.level {
            8 => Err("no line is free".into()),
            9 => Err(Box::new(BadState("level 9 does not exist".into()))),
            _ => Ok(()),
        }
    }
}

fn decode<T: VmState>(mut state: T, bytes: &[u8]) -> Result<T, DeviceError> {
    state.load(&mut Loader::whole(bytes), T::VERSION)?;
    Ok(state)
}

#[track_caller]
fn fails(bytes: &[u8], text: &str, blame: Blame) {
    let error = decode(Board::default(), bytes).unwrap_err();
    assert_eq!((error.to_string().as_str(), error.blame()), (text, blame));
}

#[test]
fn hooks_and_versions_say_where_they_stand() {
    fails(
        b"\0\x01\x08",
        "post_load of 'chip' (field 'chips[1]', byte 2 of the device): no line is free",
        Blame::Host,
    );
    fails(
        b"\0\x01\x09",
        "field 'chips[1]' (byte 2 of the device): post_load of 'chip': level 9 does not exist",
        Blame::Peer,
    );
    fails(
        b"\0\0\0\x05\x0bboard/extra\0\0\0\x03\x08",
        "post_load of 'chip' (field 'board/extra.chip', byte 20 of the device): no line is free",
        Blame::Host,
    );
    fails(
        b"\0\0\0\x05\x0bboard/extra\0\0\0\x02\x08",
        "version 2 of 'board/extra' (byte 16 of the device) is not supported, \
         only 3 to 3",
        Blame::Peer,
    );
    fails(b"\x08\0\0", "post_load of 'board': no memory", Blame::Host);
    fails(
        b"\x09\0\0",
        "byte 0 of the device: post_load of 'board': 9 slots do not exist",
        Blame::Peer,
    );
    let mut board = Board::default();
    board.chips[1].level = 8;
    let error = board.save().unwrap_err();
    assert_eq!(
        error.to_string(),
        "pre_save of 'chip' (field 'chips[1]'): does not stop"
    );
    assert_eq!(error.blame(), Blame::Host);
}

/// It may have no value at all, which has no form on the wire.
#[derive(Clone, Debug, Default, PartialEq)]
struct Parity(Option<u8>);

impl TryFrom<Parity> for u8 {
    type Error = &'static str;

    fn try_from(parity: Parity) -> Result<Self, &'static str> {
        parity.0.ok_or("no parity is set")
    }
}

impl From<u8> for Parity {
    fn from(parity: u8) -> Self {
        Self(Some(parity))
    }
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "port", version = 2, minimum_version = 1)]
struct Port {
    #[vmstate(uint8, as = u8)]
    parity: Parity,
    #[vmstate(uint8_equal, as = u8, since = 2)]
    fixed: Parity,
}

#[test]
fn a_value_of_this_side_is_asked_for_only_to_compare() {
    let port = |parity, fixed| Port {
        parity: Parity(parity),
        fixed: Parity(fixed),
    };
    let loaded = decode(port(None, Some(5)), b"\x01\x05").unwrap();
    assert_eq!(loaded, port(Some(1), Some(5)));
    let differs = decode(port(None, Some(5)), b"\x01\x06").unwrap_err();
    assert_eq!(
        differs.to_string(),
        "field 'fixed' (byte 1 of the device): is 6, must be 5 as on this side"
    );
    assert_eq!(differs.blame(), Blame::Peer);
    let own = decode(port(None, None), b"\x01\x05").unwrap_err();
    assert_eq!(
        own.to_string(),
        "value on this side of 'uint8 equal' (field 'fixed', byte 1 of the device): no parity is set"
    );
    assert_eq!(own.blame(), Blame::Host);
    let unsaved = port(Some(1), None).save().unwrap_err();
    assert_eq!(unsaved.blame(), Blame::Host);
}

struct Console(u8);

impl SaveRestore for Console {
    type Saved = Chip;

    fn is_needed(&self) -> bool {
        true
    }

    fn save(&mut self) -> Result<Chip, BoxError> {
        Ok(Chip { level: self.0 })
    }

    fn template(&self) -> Chip {
        Chip { level: 0 }
    }

    fn restore(&mut self, saved: Chip) -> Result<(), BoxError> {
        match saved.level {
            1 => Err("the console is gone".into()),
            2 => Err(BadState("column 2 does not exist".into()).into()),
            level => {
                self.0 = level;
                Ok(())
            }
        }
    }
}

#[test]
fn a_device_kept_apart_may_blame_the_state() {
    let console = Apart(Arc::new(Mutex::new(Console(0))));
    let error = |level| {
        let decoded = console.decode(1, &[level, 0x7e]).unwrap();
        decoded.commit().unwrap_err()
    };
    assert_eq!(
        (error(1).to_string().as_str(), error(1).blame()),
        ("restore of 'chip': the console is gone", Blame::Host)
    );
    let bad = error(2);
    assert_eq!(
        (bad.to_string().as_str(), bad.blame()),
        (
            "byte 0 of the device: restore of 'chip': column 2 does not exist",
            Blame::Peer
        )
    );
    let short = console.decode(1, b"").unwrap_err();
    assert!(matches!(short, DeviceError::Incomplete { .. }));
    assert_eq!(short.blame(), Blame::Peer);
    let mut loader = Loader::whole(b"\x01");
    let old = Chip::default().load(&mut loader, 0).unwrap_err();
    assert_eq!(
        old.to_string(),
        "version 0 of 'chip' is not supported, only 1 to 1"
    );
}
