//! When hooks run, and what is left after one of them failed.

use std::sync::{Arc, Mutex};

use vmferry_vmstate::{
    Apart, BoxError, ByHand, Device, DeviceError, Loader, OldStyle, SaveRestore, SavedBody,
    Unmigratable, View, VmState,
};

type Log = Arc<Mutex<Vec<String>>>;

/// A device that writes down what happens, and fails where it is told to.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(
    name = "outer",
    version = 2,
    minimum_version = 1,
    needed = Self::needed,
    pre_save = Self::pre_save,
    post_save = Self::post_save,
    pre_load = Self::pre_load,
    post_load = Self::post_load,
    committed = Self::committed,
    subsections(Derived)
)]
struct Outer {
    #[vmstate(uint8, condition = Self::first_is_sent)]
    first: u8,
    #[vmstate(struct)]
    inner: Inner,
    #[vmstate(uint8, since = 2)]
    last: u8,
    #[vmstate(subsection, needed = Self::extra_needed)]
    extra: Extra,
    #[vmstate(skip = "for the test")]
    log: Log,
    #[vmstate(skip = "for the test")]
    failing: &'static str,
    #[vmstate(skip = "for the test")]
    derived: u8,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(
    name = "inner",
    version = 5,
    pre_save = Self::pre_save,
    post_save = Self::post_save,
    pre_load = Self::pre_load,
    post_load = Self::post_load,
    committed = Self::committed
)]
struct Inner {
    #[vmstate(uint8)]
    value: u8,
    #[vmstate(skip = "for the test")]
    log: Log,
    #[vmstate(skip = "for the test")]
    failing: &'static str,
}

#[derive(Clone, Debug, Default, VmState)]
#[vmstate(
    name = "outer/extra",
    version = 4,
    minimum_version = 3,
    pre_save = Self::pre_save,
    post_save = Self::post_save,
    pre_load = Self::pre_load,
    post_load = Self::post_load,
    committed = Self::committed
)]
struct Extra {
    #[vmstate(uint8)]
    value: u8,
    #[vmstate(skip = "for the test")]
    log: Log,
    #[vmstate(skip = "for the test")]
    failing: &'static str,
}

macro_rules! hooks {
    ($($owner:ident $name:literal;)*) => {$(
        impl $owner {
            fn log(&self, hook: &str) -> Result<(), String> {
                let text = format!("{} {hook}", $name);
                self.log.lock().unwrap().push(text.clone());
                if self.failing == text { Err(format!("{text} failed")) } else { Ok(()) }
            }

            fn pre_save(&mut self) -> Result<(), String> {
                self.log("pre_save")
            }

            fn post_save(&mut self) -> Result<(), String> {
                self.log("post_save")
            }

            fn pre_load(&mut self) -> Result<(), String> {
                self.log("pre_load")
            }

            fn post_load(&mut self, version: u32) -> Result<(), String> {
                self.log("post_load").map_err(|text| format!("{text} ({version})"))?;
                self.log(&format!("got {version}"))
            }

            fn committed(&mut self) -> Result<(), String> {
                self.log(&format!("committed {}", self.value()))
            }
        }
    )*};
}

hooks! {
    Outer "outer";
    Inner "inner";
    Extra "extra";
}

impl Inner {
    fn value(&self) -> u8 {
        self.value
    }
}

impl Extra {
    fn value(&self) -> u8 {
        self.value
    }
}

impl Outer {
    fn value(&self) -> u8 {
        self.last
    }

    fn new(failing: &'static str) -> Self {
        let log = Log::default();
        Self {
            first: 1,
            inner: Inner {
                value: 2,
                log: Arc::clone(&log),
                failing,
            },
            last: 3,
            extra: Extra {
                value: 4,
                log: Arc::clone(&log),
                failing,
            },
            log,
            failing,
            derived: 5,
        }
    }

    fn needed(&self) -> bool {
        self.log("needed").is_ok()
    }

    fn first_is_sent(&self, version: u32) -> bool {
        self.log(&format!("condition {version}")).is_ok()
    }

    fn extra_needed(&self) -> bool {
        self.log("needs extra").is_ok()
    }

    fn values(&self) -> [u8; 5] {
        [
            self.first,
            self.inner.value,
            self.last,
            self.extra.value,
            self.derived,
        ]
    }

    fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

#[derive(Clone, Debug, VmState)]
#[vmstate(name = "outer/derived", version = 1)]
struct Derived {
    #[vmstate(uint8)]
    value: u8,
}

impl View<Outer> for Derived {
    fn is_needed_by(owner: &Outer) -> bool {
        owner.log("needs derived").is_ok()
    }

    fn take(owner: &mut Outer) -> Result<Self, BoxError> {
        owner.log("take")?;
        Ok(Self {
            value: owner.derived,
        })
    }

    fn template(owner: &Outer) -> Self {
        Self {
            value: owner.derived,
        }
    }

    fn put(self, owner: &mut Outer, version: u32) -> Result<(), BoxError> {
        owner.log(&format!("put {version}"))?;
        owner.derived = self.value;
        Ok(())
    }
}

const BODY: &[u8] = b"\x0b\x0c\x0d\
    \x05\x0bouter/extra\0\0\0\x04\x0e\
    \x05\x0douter/derived\0\0\0\x01\x0f\x7e";

const SAVING: [&str; 10] = [
    "outer pre_save",
    "outer condition 2",
    "inner pre_save",
    "inner post_save",
    "outer needs extra",
    "extra pre_save",
    "extra post_save",
    "outer needs derived",
    "outer take",
    "outer post_save",
];

const LOADING: [&str; 11] = [
    "outer pre_load",
    "outer condition 2",
    "inner pre_load",
    "inner post_load",
    "inner got 5",
    "extra pre_load",
    "extra post_load",
    "extra got 4",
    "outer put 1",
    "outer post_load",
    "outer got 2",
];

#[test]
fn hooks_run_where_they_should() {
    let mut device = Arc::new(Mutex::new(Outer::new("")));
    assert!(Device::is_needed(&device));
    let body = Device::save(&mut device).unwrap();
    let mut expected = vec!["outer needed"];
    expected.extend(SAVING);
    assert_eq!(device.lock().unwrap().take_log(), expected);
    let mut bytes = Vec::new();
    body.encode(&mut bytes);
    assert_eq!(bytes.len() + 1, BODY.len());

    let decoded = device.decode(2, BODY).unwrap();
    assert_eq!(decoded.used, BODY.len() - 1);
    assert_eq!(device.lock().unwrap().take_log(), LOADING);
    assert_eq!(
        device.lock().unwrap().values(),
        [1, 2, 3, 4, 5],
        "not before the commit"
    );
    decoded.commit().unwrap();
    assert_eq!(device.lock().unwrap().values(), [11, 12, 13, 14, 15]);
    assert_eq!(
        device.lock().unwrap().take_log(),
        [
            "inner committed 12",
            "extra committed 14",
            "outer committed 13"
        ],
        "once, on the device"
    );
}

#[test]
fn what_is_not_sent_is_in_place_too() {
    let device = Arc::new(Mutex::new(Outer::new("")));
    device.decode(1, b"\x15\x16\x7e").unwrap().commit().unwrap();
    let log = device.lock().unwrap().take_log();
    assert_eq!(
        log[log.len() - 3..],
        [
            "inner committed 22",
            "extra committed 4",
            "outer committed 3"
        ]
    );
}

#[test]
fn effects_that_fail_leave_the_state_in_place() {
    let device = Arc::new(Mutex::new(Outer::new("extra committed 14")));
    let error = device.decode(2, BODY).unwrap().commit().unwrap_err();
    assert_eq!(
        error.to_string(),
        "committed of 'outer/extra': extra committed 14 failed"
    );
    assert_eq!(device.lock().unwrap().values(), [11, 12, 13, 14, 15]);
    let log = device.lock().unwrap().take_log();
    assert_eq!(
        log[log.len() - 2..],
        ["inner committed 12", "extra committed 14"]
    );
}

/// A part that writes down when it is in place.
#[derive(Clone, Debug, VmState)]
#[vmstate(name = "part", version = 1, committed = Self::tell)]
struct Part {
    #[vmstate(uint8)]
    number: u8,
    #[vmstate(skip = "for the test")]
    log: Arc<Mutex<Vec<u8>>>,
}

/// There is one for all parts that are made while loading.
static PARTS: std::sync::LazyLock<Arc<Mutex<Vec<u8>>>> = std::sync::LazyLock::new(Arc::default);

impl Default for Part {
    fn default() -> Self {
        Self {
            number: 0,
            log: Arc::clone(&PARTS),
        }
    }
}

impl Part {
    fn tell(&mut self) -> Result<(), String> {
        self.log.lock().unwrap().push(self.number);
        match self.number {
            99 => Err("99 is too much".into()),
            _ => Ok(()),
        }
    }
}

/// Parts in all the places where a struct can be.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "assembly", version = 1)]
struct Assembly {
    #[vmstate(struct)]
    single: Part,
    #[vmstate(struct)]
    boxed: Box<Part>,
    #[vmstate(vstruct = 1)]
    fixed: [Box<Part>; 2],
    #[vmstate(uint8)]
    count: u8,
    #[vmstate(struct, count = count, max = 4)]
    counted: Vec<Part>,
    #[vmstate(struct, nullable)]
    pointers: [Option<Part>; 2],
    #[vmstate(qtailq, max = 4)]
    list: Vec<Part>,
    #[vmstate(gtree, max = 4)]
    tree: std::collections::BTreeMap<u64, Part>,
}

#[test]
fn structs_are_told_wherever_they_are() {
    let own = Assembly {
        pointers: [None, Some(Part::default())],
        ..Assembly::default()
    };
    let device = Arc::new(Mutex::new(own));
    let body = |last: u8| {
        let tree = [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 5, last, 0, 0x7e];
        [
            &b"\x01\x02\x03\x04\x02\x05\x06\x30\x07\x01\x08\x01\x09\x00"[..],
            &tree,
        ]
        .concat()
    };
    let decoded = device.decode(1, &body(10)).unwrap();
    assert!(PARTS.lock().unwrap().is_empty());
    decoded.commit().unwrap();
    let told = std::mem::take(&mut *PARTS.lock().unwrap());
    assert_eq!(told, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    let failed = device.decode(1, &body(99)).unwrap().commit().unwrap_err();
    assert_eq!(
        failed.to_string(),
        "committed of 'part' (field 'tree[0]'): 99 is too much"
    );
}

#[test]
fn a_decoded_body_that_is_dropped_changes_nothing() {
    let device = Arc::new(Mutex::new(Outer::new("")));
    drop(device.decode(2, BODY).unwrap());
    assert_eq!(device.lock().unwrap().values(), [1, 2, 3, 4, 5]);
}

#[test]
fn a_failing_load_hook_leaves_the_device_untouched() {
    for hook in [
        "outer pre_load",
        "inner pre_load",
        "inner post_load",
        "extra pre_load",
        "extra post_load",
        "outer post_load",
    ] {
        let device = Arc::new(Mutex::new(Outer::new(hook)));
        let error = device.decode(2, BODY).unwrap_err();
        let (owner, hook) = hook.split_once(' ').unwrap();
        let (full, version) = match owner {
            "outer" => ("'outer'", 2),
            "inner" => ("'inner' (byte 1 of the device)", 5),
            _ => ("'outer/extra' (byte 20 of the device)", 4),
        };
        let version = if hook == "post_load" {
            format!(" ({version})")
        } else {
            String::new()
        };
        let expected = format!("{hook} of {full}: {owner} {hook} failed{version}");
        assert_eq!(error.to_string(), expected);
        assert!(matches!(error, DeviceError::Hook { .. }));
        let log = device.lock().unwrap().take_log();
        assert_eq!(log, LOADING[..log.len()], "nothing runs after the failure");
        assert_eq!(device.lock().unwrap().values(), [1, 2, 3, 4, 5]);
    }
}

#[test]
fn post_save_runs_whenever_pre_save_succeeded() {
    let log = |failing| {
        let mut device = Outer::new(failing);
        let error = device.save().unwrap_err().to_string();
        (error, device.take_log())
    };
    let (error, hooks) = log("outer pre_save");
    assert_eq!(error, "pre_save of 'outer': outer pre_save failed");
    assert_eq!(hooks, ["outer pre_save"]);
    for (failing, ran) in [
        ("inner pre_save", 3),
        ("inner post_save", 4),
        ("extra pre_save", 6),
        ("extra post_save", 7),
        ("outer take", 9),
    ] {
        let (error, hooks) = log(failing);
        assert!(error.contains(&format!("{failing} failed")), "{error}");
        assert_eq!(hooks[..ran], SAVING[..ran], "{failing}");
        assert_eq!(hooks[ran..], ["outer post_save"], "{failing}");
    }
    let (error, hooks) = log("outer post_save");
    assert_eq!(error, "post_save of 'outer': outer post_save failed");
    assert_eq!(hooks, SAVING);
}

#[test]
fn subsections_may_be_absent_or_in_another_order_but_not_unknown() {
    let device = Arc::new(Mutex::new(Outer::new("")));
    let decode = |bytes: &[u8]| {
        let decoded = device.decode(2, bytes)?;
        decoded.commit()?;
        Ok::<_, DeviceError>(device.lock().unwrap().values())
    };
    let extra: &[u8] = b"\x05\x0bouter/extra\0\0\0\x03\x18";
    let derived: &[u8] = b"\x05\x0douter/derived\0\0\0\x01\x19";
    let body = |parts: &[&[u8]]| [b"\x15\x16\x17", &parts.concat()[..], b"\x7e"].concat();
    assert_eq!(decode(&body(&[])).unwrap(), [21, 22, 23, 4, 5]);
    assert_eq!(
        decode(&body(&[derived, extra])).unwrap(),
        [21, 22, 23, 24, 25]
    );

    // What does not begin with the owner's name belongs to whatever comes next.
    assert_eq!(
        device.decode(2, &body(&[b"\x05\x05other"])).unwrap().used,
        3
    );
    for other in [&b"\x05\x05outer"[..], b"\x05\xffoux"] {
        assert_eq!(device.decode(2, &body(&[other])).unwrap().used, 3);
    }
    assert!(matches!(
        device.decode(2, b"\x15\x16\x17\x05\xffoute"),
        Err(DeviceError::Incomplete { have: 9, .. })
    ));

    let text = |parts: &[&[u8]]| decode(&body(parts)).unwrap_err().to_string();
    assert_eq!(
        text(&[extra, b"\x05\x09outer/new\0\0\0\x01"]),
        "field 'outer/new' (byte 21 of the device): subsection is not known here"
    );
    assert_eq!(
        text(&[extra, extra]),
        "field 'outer/extra' (byte 21 of the device): subsection comes twice"
    );
    assert_eq!(
        text(&[b"\x05\x0bouter/extra\0\0\0\x05\x18"]),
        "version 5 of 'outer/extra' (byte 16 of the device) is not supported, only 3 to 4"
    );
    assert_eq!(
        text(&[b"\x05\x0bouter/extra\0\0\0\x02\x18"]),
        "version 2 of 'outer/extra' (byte 16 of the device) is not supported, only 3 to 4"
    );
}

#[test]
fn versions_choose_the_fields() {
    let device = Arc::new(Mutex::new(Outer::new("")));
    let decoded = device.decode(1, b"\x15\x16\x7e").unwrap();
    assert_eq!(decoded.used, 2);
    decoded.commit().unwrap();
    assert_eq!(device.lock().unwrap().values(), [21, 22, 3, 4, 5]);
    for version in [0, 3] {
        assert_eq!(
            device.decode(version, BODY).unwrap_err().to_string(),
            format!("version {version} of 'outer' is not supported, only 1 to 2")
        );
    }
    let old = device.lock().unwrap().save_as(1).unwrap();
    assert_eq!((old.version, old.fields.len()), (1, 2));
}

/// A device whose saved state is another type.
#[derive(Default)]
struct Counter {
    total: u64,
    broken: bool,
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "counter", version = 1)]
struct SavedCounter {
    #[vmstate(uint32_equal)]
    channels: u32,
    #[vmstate(uint64)]
    total: u64,
}

impl SaveRestore for Counter {
    type Saved = SavedCounter;

    fn is_needed(&self) -> bool {
        self.total != 0
    }

    fn save(&mut self) -> Result<SavedCounter, BoxError> {
        if self.broken {
            return Err("the counter is broken".into());
        }
        Ok(SavedCounter {
            total: self.total,
            ..self.template()
        })
    }

    fn template(&self) -> SavedCounter {
        SavedCounter {
            channels: 2,
            total: 0,
        }
    }

    fn restore(&mut self, saved: SavedCounter) -> Result<(), BoxError> {
        if saved.total == 13 {
            return Err("13 is no number".into());
        }
        self.total = saved.total;
        Ok(())
    }
}

#[test]
fn saved_types_are_apart_from_their_devices() {
    let counter = Arc::new(Mutex::new(Counter {
        total: 0x102,
        broken: false,
    }));
    let mut device = Apart(Arc::clone(&counter));
    assert_eq!(device.description().unwrap().name, "counter");
    assert!(Device::is_needed(&device));
    let mut bytes = Vec::new();
    Device::save(&mut device).unwrap().encode(&mut bytes);
    assert_eq!(bytes, b"\0\0\0\x02\0\0\0\0\0\0\x01\x02");

    let body = |channels: u8, total: u8| [0, 0, 0, channels, 0, 0, 0, 0, 0, 0, 0, total, 0x7e];
    device.decode(1, &body(2, 9)).unwrap().commit().unwrap();
    assert_eq!(counter.lock().unwrap().total, 9);
    let other = device.decode(1, &body(3, 9)).unwrap_err();
    assert_eq!(
        other.to_string(),
        "field 'channels' (byte 0 of the device): is 3, must be 2 as on this side"
    );
    let refused = device
        .decode(1, &body(2, 13))
        .unwrap()
        .commit()
        .unwrap_err();
    assert_eq!(refused.to_string(), "restore of 'counter': 13 is no number");
    assert_eq!(counter.lock().unwrap().total, 9);
    counter.lock().unwrap().broken = true;
    let broken = Device::save(&mut device).unwrap_err();
    assert_eq!(
        broken.to_string(),
        "save of 'counter': the counter is broken"
    );
    counter.lock().unwrap().total = 0;
    assert!(!Device::is_needed(&device));
}

/// A device that writes its bytes by hand: a length, then so many bytes.
#[derive(Clone, Debug, Default, PartialEq)]
struct Tape(Vec<u8>);

impl OldStyle for Tape {
    const NAME: &'static str = "tape";
    const VERSION: u32 = 3;
    const MINIMUM_VERSION: u32 = 2;

    fn save(&mut self, out: &mut Vec<u8>) -> Result<(), BoxError> {
        out.push(u8::try_from(self.0.len())?);
        out.extend(&self.0);
        Ok(())
    }

    fn load(&mut self, loader: &mut Loader<'_>, version: u32) -> Result<(), DeviceError> {
        let length = loader.byte()?;
        if version == 2 && length > 2 {
            return Err(loader.fault("version 2 has at most 2 bytes"));
        }
        self.0 = loader.take(length.into())?.to_vec();
        Ok(())
    }

    fn committed(&mut self) -> Result<(), BoxError> {
        self.0.push(b'!');
        match self.0.len() {
            4 => Err("the tape is full".into()),
            _ => Ok(()),
        }
    }
}

#[test]
fn old_style_pairs() {
    let tape = Arc::new(Mutex::new(Tape(b"abc".to_vec())));
    let mut device = ByHand(Arc::clone(&tape));
    assert_eq!(ByHand::<Tape>::versions(), 2..=3);
    assert!(device.description().is_none() && Device::is_needed(&device));
    assert_eq!(
        Device::save(&mut device).unwrap(),
        SavedBody::OldStyle(b"\x03abc".to_vec())
    );
    let decoded = device.decode(3, b"\x02hi\x7e").unwrap();
    assert_eq!(
        (decoded.used, tape.lock().unwrap().0.as_slice()),
        (3, &b"abc"[..])
    );
    decoded.commit().unwrap();
    assert_eq!(tape.lock().unwrap().0, b"hi!");
    assert_eq!(
        device.decode(3, b"\x04hi").unwrap_err().to_string(),
        "device state is truncated after 3 bytes, in field 'data'"
    );
    assert_eq!(
        device.decode(2, b"\x03abc").unwrap_err().to_string(),
        "field 'data' (byte 0 of the device): version 2 has at most 2 bytes"
    );
    assert_eq!(
        device.decode(4, b"\0").unwrap_err().to_string(),
        "version 4 of 'tape' is not supported, only 2 to 3"
    );
    let full = device.decode(3, b"\x03abc").unwrap().commit();
    assert_eq!(
        full.unwrap_err().to_string(),
        "committed of 'tape': the tape is full"
    );
    tape.lock().unwrap().0 = vec![0; 256];
    assert!(Device::save(&mut device).is_err());
}

#[derive(Clone, VmState)]
#[vmstate(name = "passthrough", version = 1, unmigratable)]
struct Passthrough;

#[test]
fn devices_that_do_not_support_migration_say_so() {
    let mut marked = Arc::new(Mutex::new(Passthrough));
    let mut named = Unmigratable::new("passthrough");
    let devices: [&mut dyn Device; 2] = [&mut marked, &mut named];
    for device in devices {
        let description = device.description().unwrap();
        assert!(description.unmigratable && description.name == "passthrough");
        assert!(device.is_needed());
        for error in [
            device.save().unwrap_err(),
            device.decode(1, b"").unwrap_err(),
        ] {
            assert_eq!(error.to_string(), "device 'passthrough' cannot be migrated");
        }
    }
}
