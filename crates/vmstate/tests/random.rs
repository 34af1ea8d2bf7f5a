//! Random states of a device with fields of every kind: saved, loaded, cut off, damaged.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use fastrand::Rng;
use vmferry_vmstate::{
    BodyLayout, DescriptionWriter, Device, DeviceError, Dialect, SavedBody, VmDescription, VmState,
};

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "everything", version = 7, minimum_version = 3)]
struct Everything {
    #[vmstate(bool)]
    flag: bool,
    #[vmstate(uint8)]
    count: u8,
    #[vmstate(int32)]
    length: i32,
    #[vmstate(uint32, since = 7)]
    newest: u32,
    #[vmstate(uint64, condition = Self::flag_is_set)]
    conditional: u64,
    #[vmstate(uint16, count = count, max = 9)]
    counted: Vec<u16>,
    #[vmstate(buffer, length = length, max = 40)]
    bytes: Vec<u8>,
    #[vmstate(bitmap, length = length, max = 40)]
    bits: Vec<u64>,
    #[vmstate(unused(3))]
    #[vmstate(timer)]
    timer: Option<u64>,
    #[vmstate(int16)]
    table: [[i16; 2]; 3],
    #[vmstate(struct)]
    ports: [Port; 2],
    #[vmstate(struct, count = count, max = 9)]
    queue: Vec<Port>,
    #[vmstate(vstruct = 1)]
    old: Port,
    #[vmstate(uint8, nullable)]
    pointers: [Option<u8>; 5],
    #[vmstate(qtailq, max = 4)]
    requests: Vec<Port>,
    #[vmstate(gtree, max = 4)]
    tree: BTreeMap<u64, Level>,
    #[vmstate(subsection, needed = Self::has_extra)]
    extra: Extra,
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "port", version = 2, minimum_version = 1)]
struct Port {
    #[vmstate(struct)]
    levels: [Level; 2],
    #[vmstate(uint8, since = 2)]
    control: u8,
    #[vmstate(subsection)]
    fault: Fault,
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "port/fault", version = 1, needed = Self::is_fault)]
struct Fault {
    #[vmstate(uint16)]
    code: u16,
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "level", version = 1)]
struct Level {
    #[vmstate(int8)]
    level: i8,
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "everything/extra", version = 1)]
struct Extra {
    #[vmstate(uint8)]
    count: u8,
    #[vmstate(struct, count = count, max = 2)]
    ports: Vec<Port>,
}

impl Everything {
    fn flag_is_set(&self, _: u32) -> bool {
        self.flag
    }

    fn has_extra(&self) -> bool {
        self.extra.count != 0
    }

    fn random(rng: &mut Rng) -> Self {
        let flag = rng.bool();
        let count = rng.u8(..=9);
        let length = rng.usize(..=40);
        let extra = rng.u8(..=2);
        Self {
            flag,
            count,
            length: i32::try_from(length).unwrap(),
            newest: rng.u32(..),
            conditional: if flag { rng.u64(..) } else { 0 },
            counted: (0..count).map(|_| rng.u16(..)).collect(),
            bytes: (0..length).map(|_| rng.u8(..)).collect(),
            bits: (0..length.div_ceil(64)).map(|_| rng.u64(..)).collect(),
            timer: rng.bool().then(|| rng.u64(..u64::MAX)),
            table: std::array::from_fn(|_| std::array::from_fn(|_| rng.i16(..))),
            ports: std::array::from_fn(|_| Port::random(rng)),
            queue: (0..count).map(|_| Port::random(rng)).collect(),
            old: Port {
                control: 0,
                ..Port::random(rng)
            },
            pointers: std::array::from_fn(|_| rng.bool().then(|| rng.u8(..))),
            requests: (0..rng.u8(..=4)).map(|_| Port::random(rng)).collect(),
            tree: (0..rng.u64(..=4))
                .map(|key| (key, Level::random(rng)))
                .collect(),
            extra: Extra {
                count: extra,
                ports: (0..extra).map(|_| Port::random(rng)).collect(),
            },
        }
    }

    /// A receiver that was built alike: its pointers are null in the same places.
    fn receiver(&self) -> Arc<Mutex<Self>> {
        let pointers = self.pointers.map(|pointer| pointer.map(|_| 0));
        Arc::new(Mutex::new(Self {
            pointers,
            ..Self::default()
        }))
    }
}

impl Port {
    fn random(rng: &mut Rng) -> Self {
        Self {
            levels: std::array::from_fn(|_| Level::random(rng)),
            control: rng.u8(..),
            fault: Fault {
                code: u16::from(rng.u8(..=1)) * rng.u16(..),
            },
        }
    }
}

impl Fault {
    fn is_fault(&self) -> bool {
        self.code != 0
    }
}

impl Level {
    fn random(rng: &mut Rng) -> Self {
        Self { level: rng.i8(..) }
    }
}

fn rng() -> Rng {
    let seed = std::env::var("VMFERRY_SEED").ok();
    let seed = seed.map_or_else(|| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("VMFERRY_SEED={seed}");
    Rng::with_seed(seed)
}

fn rounds(short: usize) -> usize {
    if std::env::var_os("VMFERRY_LONG").is_some() {
        short * 100
    } else {
        short
    }
}

/// What follows a body in a stream.
const FOOTER: [u8; 5] = [0x7e, 0, 0, 0, 9];

/// A body as it stands in a stream.
fn encode(state: &mut Everything) -> (SavedBody, Vec<u8>) {
    let saved = SavedBody::Described(state.save().unwrap());
    let mut bytes = Vec::new();
    saved.encode(&mut bytes);
    bytes.extend(FOOTER);
    (saved, bytes)
}

#[test]
fn what_was_saved_is_loaded() {
    let mut rng = rng();
    for _ in 0..rounds(500) {
        let mut state = Everything::random(&mut rng);
        let (_, bytes) = encode(&mut state);
        let receiver = state.receiver();
        let decoded = receiver.decode(Everything::VERSION, &bytes).unwrap();
        assert_eq!(decoded.used, bytes.len() - FOOTER.len());
        decoded.commit().unwrap();
        assert_eq!(*receiver.lock().unwrap(), state);
    }
}

#[test]
fn its_description_decodes_it_too() {
    let mut rng = rng();
    for _ in 0..rounds(300) {
        let mut state = Everything::random(&mut rng);
        let (saved, mut bytes) = encode(&mut state);
        bytes.truncate(bytes.len() - FOOTER.len());
        for dialect in [Dialect::Qemu7, Dialect::Qemu10] {
            let mut writer = DescriptionWriter::new(dialect, 4096, None);
            writer.device("everything", 0, &saved);
            let description = VmDescription::parse(writer.finish().as_bytes()).unwrap();
            let BodyLayout::Described(layout) = &description.devices[0].body else {
                panic!("not described");
            };
            let decoded = layout.decode(&bytes).unwrap();
            assert_eq!(SavedBody::Described(decoded), saved, "{dialect:?}");
        }
    }
}

#[test]
fn a_body_that_is_cut_off_is_incomplete() {
    let mut rng = rng();
    for _ in 0..rounds(20) {
        let mut state = Everything::random(&mut rng);
        let (_, bytes) = encode(&mut state);
        let receiver = state.receiver();
        for end in 0..bytes.len() - FOOTER.len() {
            let error = receiver
                .decode(Everything::VERSION, &bytes[..end])
                .unwrap_err();
            match error {
                DeviceError::Incomplete { have, field } => {
                    assert_eq!(have, end);
                    assert!(!field.is_empty(), "at byte {end}");
                }
                other => panic!("at byte {end}: {other}"),
            }
        }
    }
}

#[test]
fn damaged_bodies_do_not_panic() {
    let mut rng = rng();
    for _ in 0..rounds(100) {
        let mut state = Everything::random(&mut rng);
        let (_, bytes) = encode(&mut state);
        let receiver = state.receiver();
        for _ in 0..100 {
            let mut damaged = bytes.clone();
            for _ in 0..rng.usize(1..4) {
                let at = rng.usize(..damaged.len());
                damaged[at] ^= 1 << rng.u8(..8);
            }
            // Loaded or refused, either is fine; what was loaded can be saved.
            let Ok(decoded) = receiver.decode(Everything::VERSION, &damaged) else {
                continue;
            };
            decoded.commit().unwrap();
            receiver.lock().unwrap().save().unwrap();
        }
    }
}
