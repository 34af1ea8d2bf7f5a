//! Every type of the wire, with its literal bytes.

use std::collections::{BTreeMap, LinkedList, VecDeque};

use vmferry_vmstate::wire::Codec;
use vmferry_vmstate::{
    BoxError, Content, DeviceError, FieldType, Loader, SavedState, Shape, VmState,
};

fn encode<T: VmState>(state: &mut T) -> Vec<u8> {
    let mut bytes = Vec::new();
    state.save().unwrap().encode(&mut bytes);
    bytes
}

fn decode<T: VmState>(mut state: T, bytes: &[u8]) -> Result<T, DeviceError> {
    let mut loader = Loader::whole(bytes);
    state.load(&mut loader, T::VERSION)?;
    assert_eq!(loader.used(), bytes.len());
    Ok(state)
}

/// `state` has these bytes, and from them it comes back.
#[track_caller]
fn is_sent_as<T>(mut state: T, own: &T, bytes: &[u8])
where
    T: VmState + Clone + PartialEq + std::fmt::Debug,
{
    assert_eq!(encode(&mut state), bytes);
    assert_eq!(decode(own.clone(), bytes).unwrap(), state);
    for end in 0..bytes.len() {
        let mut loader = Loader::new(&bytes[..end]);
        let error = own.clone().load(&mut loader, T::VERSION).unwrap_err();
        assert!(
            matches!(error, DeviceError::Incomplete { have, .. } if have == end),
            "{error}"
        );
    }
}

#[track_caller]
fn is_refused<T: VmState + std::fmt::Debug>(own: T, bytes: &[u8], text: &str) {
    assert_eq!(decode(own, bytes).unwrap_err().to_string(), text);
}

fn shapes(state: &SavedState) -> Vec<(&str, &str, Shape)> {
    let fields = state.fields.iter();
    fields
        .map(|field| (&*field.name, field.kind.as_str(), field.shape))
        .collect()
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "integers", version = 1)]
struct Integers {
    #[vmstate(bool)]
    yes: bool,
    #[vmstate(int8)]
    i8: i8,
    #[vmstate(int16)]
    i16: i16,
    #[vmstate(int32)]
    i32: i32,
    #[vmstate(int64)]
    i64: i64,
    #[vmstate(uint8)]
    u8: u8,
    #[vmstate(uint16)]
    u16: u16,
    #[vmstate(uint32)]
    u32: u32,
    #[vmstate(uint64)]
    u64: u64,
}

#[test]
fn integers_are_big_endian() {
    let state = Integers {
        yes: true,
        i8: -2,
        i16: -3,
        i32: -4,
        i64: -5,
        u8: 0x12,
        u16: 0x1234,
        u32: 0x1234_5678,
        u64: 0x1234_5678_9abc_def0,
    };
    let bytes = b"\x01\xfe\xff\xfd\xff\xff\xff\xfc\xff\xff\xff\xff\xff\xff\xff\xfb\
        \x12\x12\x34\x12\x34\x56\x78\x12\x34\x56\x78\x9a\xbc\xde\xf0";
    is_sent_as(state.clone(), &Integers::default(), bytes);
    let saved = state.clone().save().unwrap();
    let names: Vec<_> = saved
        .fields
        .iter()
        .map(|field| field.kind.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"
        ]
    );
    let mut wrong = bytes.to_vec();
    wrong[0] = 2;
    is_refused(
        Integers::default(),
        &wrong,
        "field 'yes' (byte 0 of the device): is 2, must be 0 or 1",
    );
}

#[derive(Clone, Debug, PartialEq, VmState)]
#[vmstate(name = "equal", version = 1)]
struct Equal {
    #[vmstate(uint8_equal)]
    u8: u8,
    #[vmstate(uint16_equal)]
    u16: u16,
    #[vmstate(uint32_equal)]
    u32: u32,
    #[vmstate(int32_equal)]
    i32: i32,
    #[vmstate(int64_equal)]
    i64: u64,
}

#[test]
fn equal_fields_refuse_another_value() {
    let own = Equal {
        u8: 1,
        u16: 2,
        u32: 3,
        i32: -4,
        i64: 5,
    };
    let bytes = b"\x01\0\x02\0\0\0\x03\xff\xff\xff\xfc\0\0\0\0\0\0\0\x05";
    is_sent_as(own.clone(), &own, bytes);
    let kinds: Vec<_> = own.clone().save().unwrap().fields;
    let kinds: Vec<_> = kinds.iter().map(|field| field.kind.as_str()).collect();
    assert_eq!(
        kinds,
        [
            "uint8 equal",
            "uint16 equal",
            "uint32 equal",
            "int32 equal",
            "int64 equal"
        ]
    );
    for (byte, field, offset, sent, mine) in [
        (0, "u8", 0, "0", "1"),
        (2, "u16", 1, "3", "2"),
        (6, "u32", 3, "2", "3"),
        (10, "i32", 7, "-3", "-4"),
        (18, "i64", 11, "4", "5"),
    ] {
        let mut other = bytes.to_vec();
        other[byte] ^= 1;
        is_refused(
            own.clone(),
            &other,
            &format!(
                "field '{field}' (byte {offset} of the device): is {sent}, must be {mine} as on this side"
            ),
        );
    }
}

#[derive(Clone, Debug, PartialEq, VmState)]
#[vmstate(name = "le", version = 1)]
struct AtMost {
    #[vmstate(int32_le)]
    channels: i32,
}

#[test]
fn int32_le_is_from_zero_to_the_own_value() {
    let own = AtMost { channels: 8 };
    is_sent_as(AtMost { channels: 3 }, &own, &[0, 0, 0, 3]);
    is_sent_as(AtMost { channels: 0 }, &own, &[0, 0, 0, 0]);
    is_sent_as(own.clone(), &own, &[0, 0, 0, 8]);
    let refused =
        |value| format!("field 'channels' (byte 0 of the device): is {value}, must be from 0 to 8");
    is_refused(own.clone(), &[0, 0, 0, 9], &refused("9"));
    is_refused(own, &[0xff; 4], &refused("-1"));
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "timers", version = 1)]
struct Timers {
    #[vmstate(timer)]
    armed: Option<u64>,
    #[vmstate(timer)]
    idle: Option<u64>,
    #[vmstate(cpu_double)]
    double: f64,
    #[vmstate(cpu_double)]
    bits: u64,
}

#[test]
fn timers_and_doubles() {
    let state = Timers {
        armed: Some(0x01a3_0c2c),
        idle: None,
        double: 1.5,
        bits: 0x0102_0304_0506_0708,
    };
    let bytes = b"\0\0\0\0\x01\xa3\x0c\x2c\xff\xff\xff\xff\xff\xff\xff\xff\
        \x3f\xf8\0\0\0\0\0\0\x01\x02\x03\x04\x05\x06\x07\x08";
    is_sent_as(state.clone(), &Timers::default(), bytes);
    let saved = state.clone().save().unwrap();
    assert_eq!(saved.field("armed").unwrap().kind.as_str(), "timer");
    assert_eq!(saved.field("double").unwrap().kind.as_str(), "CPU_Double_U");
    let mut never = Timers {
        armed: Some(u64::MAX),
        ..state
    };
    assert_eq!(
        never.save().unwrap_err().to_string(),
        "field 'armed' cannot be saved: expiry of all ones would say that the timer is not armed"
    );
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "bytes", version = 1)]
struct Bytes {
    #[vmstate(uint16)]
    length: u16,
    #[vmstate(int32)]
    bits: i32,
    #[vmstate(buffer)]
    fixed: [u8; 3],
    #[vmstate(buffer)]
    table: [[u8; 2]; 2],
    #[vmstate(unused(2))]
    #[vmstate(buffer, length = length, max = 4)]
    counted: Vec<u8>,
    #[vmstate(buffer, length = length)]
    room: [u8; 8],
    #[vmstate(bitmap)]
    words: [u64; 1],
    #[vmstate(bitmap, length = bits, max = 128)]
    map: Vec<u64>,
}

#[test]
fn buffers_bitmaps_and_unused_bytes() {
    let state = Bytes {
        length: 2,
        bits: 65,
        fixed: *b"abc",
        table: [*b"de", *b"fg"],
        counted: b"hi".to_vec(),
        room: *b"jk\0\0\0\0\0\0",
        words: [1],
        map: vec![3, 1 << 63],
    };
    let bytes = b"\0\x02\0\0\0\x41abcdefg\0\0hijk\
        \0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x03\x80\0\0\0\0\0\0\0";
    is_sent_as(state.clone(), &Bytes::default(), bytes);
    let saved = state.clone().save().unwrap();
    assert!(saved.fields.iter().all(|field| field.shape == Shape::One));
    assert_eq!(saved.fields[4].kind.as_str(), "unused_buffer");
    assert_eq!(saved.field("map").unwrap().kind.as_str(), "bitmap");

    let mut unused = bytes.to_vec();
    unused[13..15].copy_from_slice(b"!!");
    assert_eq!(decode(Bytes::default(), &unused).unwrap(), state);

    let empty = Bytes {
        length: 0,
        bits: 0,
        ..Bytes::default()
    };
    let saved = empty.clone().save().unwrap();
    assert_eq!(saved.field("counted").unwrap().content, Content::plain([]));
    assert_eq!(saved.field("map").unwrap().content, Content::plain([]));
}

#[test]
fn lengths_are_compared_with_their_maximum() {
    let with = |length: [u8; 2], bits: [u8; 4]| [&length[..], &bits, &[0; 100]].concat();
    is_refused(
        Bytes::default(),
        &with([0, 5], [0; 4]),
        "field 'counted' (byte 13 of the device): its count is 5, at most 4 are allowed",
    );
    let bits = |bits: i32| {
        let mut bytes = with([0, 0], bits.to_be_bytes());
        bytes.truncate(6 + 3 + 4 + 2 + 8 + 16);
        decode(Bytes::default(), &bytes)
    };
    assert!(bits(128).is_ok());
    let text = |error: DeviceError| error.to_string();
    assert_eq!(
        text(bits(129).unwrap_err()),
        "field 'map' (byte 15 of the device): its count is 129, at most 128 are allowed"
    );
    assert_eq!(
        text(bits(-1).unwrap_err()),
        "field 'map' (byte 15 of the device): its count is negative"
    );
    let mut short = Bytes {
        length: 2,
        ..Bytes::default()
    };
    assert_eq!(
        text(short.save().unwrap_err()),
        "field 'counted' cannot be saved: there are not 2 of it, as its count says"
    );
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "point", version = 3, minimum_version = 1)]
struct Point {
    #[vmstate(uint8)]
    x: u8,
    #[vmstate(uint8, since = 2)]
    y: u8,
    #[vmstate(uint8, since = 3)]
    z: u8,
}

fn point(x: u8, y: u8, z: u8) -> Point {
    Point { x, y, z }
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "arrays", version = 1)]
struct Arrays {
    #[vmstate(uint8)]
    count: u8,
    #[vmstate(uint16)]
    numbers: [u16; 3],
    #[vmstate(uint8)]
    table: [[u8; 2]; 2],
    #[vmstate(uint16)]
    one: [u16; 1],
    #[vmstate(uint16)]
    none: [u16; 0],
    #[vmstate(uint16, count = count, max = 3)]
    counted: Vec<u16>,
    #[vmstate(uint8, count = 2)]
    always_two: Vec<u8>,
    #[vmstate(struct)]
    points: [Point; 2],
    #[vmstate(struct, count = count)]
    some: [Box<Point>; 3],
    #[vmstate(struct)]
    boxed: Box<Point>,
    #[vmstate(vstruct = 2)]
    old: Point,
    #[vmstate(vstruct = 1)]
    older: [Point; 2],
}

#[test]
fn arrays_and_structs() {
    let mut state = Arrays {
        count: 2,
        numbers: [1, 2, 3],
        table: [[4, 5], [6, 7]],
        one: [8],
        none: [],
        counted: vec![9, 10],
        always_two: vec![11, 12],
        points: [point(1, 2, 3), point(4, 5, 6)],
        some: [Box::new(point(7, 8, 9)), Box::default(), Box::default()],
        boxed: Box::new(point(1, 1, 1)),
        old: point(2, 2, 0),
        older: [point(3, 0, 0), point(4, 0, 0)],
    };
    let own = Arrays {
        always_two: vec![0, 0],
        ..Arrays::default()
    };
    let bytes = b"\x02\0\x01\0\x02\0\x03\x04\x05\x06\x07\0\x08\0\x09\0\x0a\x0b\x0c\
        \x01\x02\x03\x04\x05\x06\x07\x08\x09\0\0\0\x01\x01\x01\x02\x02\x03\x04";
    is_sent_as(state.clone(), &own, bytes);
    let saved = state.save().unwrap();
    assert_eq!(
        shapes(&saved),
        [
            ("count", "uint8", Shape::One),
            ("numbers", "uint16", Shape::Array),
            ("table", "uint8", Shape::Array),
            ("one", "uint16", Shape::One),
            ("counted", "uint16", Shape::Array),
            ("always_two", "uint8", Shape::Array),
            ("points", "struct", Shape::Array),
            ("some", "struct", Shape::Array),
            ("boxed", "struct", Shape::One),
            ("old", "vstruct", Shape::One),
            ("older", "vstruct", Shape::Array),
        ]
    );
    assert_eq!(saved.field("table").unwrap().content.count(), 4);
    let Content::Structs(old) = &saved.field("old").unwrap().content else {
        panic!("not a struct");
    };
    assert_eq!((old[0].version, old[0].fields.len()), (2, 2));

    state.count = 0;
    state.counted.clear();
    assert!(
        state.save().unwrap().field("counted").is_none(),
        "an empty array is not there"
    );
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "nulls", version = 1)]
struct Nulls {
    #[vmstate(uint16, nullable)]
    numbers: [Option<u16>; 6],
    #[vmstate(struct, nullable)]
    points: [Option<Box<Point>>; 2],
    #[vmstate(struct, nullable)]
    flags: [Option<Flag>; 3],
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "flag", version = 1)]
struct Flag {
    #[vmstate(bool)]
    set: bool,
    #[vmstate(uint8, condition = Self::is_set)]
    level: u8,
}

impl Flag {
    fn is_set(&self, _: u32) -> bool {
        self.set
    }
}

#[test]
fn nulls_in_an_array_split_it_into_runs() {
    let (on, off) = (
        Flag {
            set: true,
            level: 9,
        },
        Flag::default(),
    );
    let mut state = Nulls {
        numbers: [Some(1), Some(2), None, None, Some(3), None],
        points: [None, Some(Box::new(point(4, 5, 6)))],
        flags: [None, Some(on), Some(off)],
    };
    let mut own = state.clone();
    own.numbers[0] = Some(7);
    let bytes = b"\0\x01\0\x0200\0\x0300\x04\x05\x060\x01\x09\0";
    is_sent_as(state.clone(), &own, bytes);
    let element = |index, last| Shape::Element { index, last };
    assert_eq!(
        shapes(&state.save().unwrap()),
        [
            ("numbers", "uint16", Shape::Array),
            ("numbers", "nullptr", Shape::Array),
            ("numbers", "uint16", Shape::One),
            ("numbers", "nullptr", Shape::One),
            ("points", "nullptr", Shape::One),
            ("points", "struct", Shape::One),
            ("flags", "nullptr", Shape::One),
            ("flags", "struct", element(1, false)),
            ("flags", "struct", element(2, true)),
        ]
    );
    let mut wrong = bytes.to_vec();
    wrong[4] = 0x31;
    is_refused(
        state,
        &wrong,
        "field 'numbers[2]' (byte 4 of the device): is 0x31, must be 0x30 for the null of this side",
    );
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "varied", version = 1)]
struct Varied {
    #[vmstate(struct)]
    flags: [Flag; 2],
    #[vmstate(struct)]
    single: [Flag; 1],
    #[vmstate(uint8, condition = Self::always)]
    bytes: [u8; 2],
    #[vmstate(struct)]
    holders: [Holder; 2],
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "holder", version = 1)]
struct Holder {
    #[vmstate(uint8)]
    length: u8,
    #[vmstate(buffer, length = length, max = 8)]
    bytes: Vec<u8>,
}

impl Varied {
    fn always(&self, _: u32) -> bool {
        true
    }
}

#[test]
fn elements_that_may_differ_are_described_one_by_one() {
    let holder = |bytes: &[u8]| Holder {
        length: u8::try_from(bytes.len()).unwrap(),
        bytes: bytes.to_vec(),
    };
    let mut state = Varied {
        flags: [
            Flag {
                set: true,
                level: 3,
            },
            Flag::default(),
        ],
        holders: [holder(b"a"), holder(b"bc")],
        ..Varied::default()
    };
    let bytes = b"\x01\x03\0\0\0\0\x01a\x02bc";
    is_sent_as(state.clone(), &Varied::default(), bytes);
    let element = |index| Shape::Element {
        index,
        last: index == 1,
    };
    assert_eq!(
        shapes(&state.save().unwrap()),
        [
            ("flags", "struct", element(0)),
            ("flags", "struct", element(1)),
            ("single", "struct", Shape::One),
            ("bytes", "uint8", element(0)),
            ("bytes", "uint8", element(1)),
            ("holders", "struct", element(0)),
            ("holders", "struct", element(1)),
        ]
    );
    state.holders[0] = holder(b"ab");
    let saved = state.save().unwrap();
    assert_eq!(
        shapes(&saved)[5],
        ("holders", "struct", Shape::Array),
        "now they are alike"
    );
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "lists", version = 1)]
struct Lists {
    #[vmstate(qtailq, max = 3)]
    tail: Vec<Point>,
    #[vmstate(qlist, max = 3)]
    list: LinkedList<Point>,
    #[vmstate(qtailq, max = 3)]
    deque: VecDeque<Point>,
    #[vmstate(gtree, max = 2)]
    tree: BTreeMap<u64, Point>,
    #[vmstate(gtree, key = struct, max = 2)]
    by_point: BTreeMap<Key, Point>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, VmState)]
#[vmstate(name = "key", version = 1)]
struct Key {
    #[vmstate(uint8)]
    low: u8,
    #[vmstate(uint8)]
    high: u8,
}

#[test]
fn lists_and_trees_end_themselves() {
    let mut state = Lists {
        tail: vec![point(1, 2, 3), point(4, 5, 6)],
        list: LinkedList::from([point(7, 8, 9)]),
        deque: VecDeque::new(),
        tree: BTreeMap::from([(0x10, point(1, 1, 1))]),
        by_point: BTreeMap::from([(Key { low: 5, high: 6 }, point(2, 2, 2))]),
    };
    let bytes = b"\x01\x01\x02\x03\x01\x04\x05\x06\0\x01\x07\x08\x09\0\0\
        \0\0\0\x01\x01\0\0\0\0\0\0\0\x10\x01\x01\x01\0\
        \0\0\0\x01\x01\x05\x06\x02\x02\x02\0";
    let own = Lists {
        tail: vec![point(0, 0, 0)],
        ..Lists::default()
    };
    is_sent_as(state.clone(), &own, bytes);
    let saved = state.save().unwrap();
    assert_eq!(saved.field("tail").unwrap().kind, FieldType::QTAILQ);
    assert_eq!(saved.field("list").unwrap().kind, FieldType::QLIST);
    assert_eq!(saved.field("tree").unwrap().kind, FieldType::GTREE);

    state.tail = vec![Point::default(); 4];
    assert_eq!(
        state.save().unwrap_err().to_string(),
        "field 'tail' cannot be saved: it has more than 3 elements"
    );
}

#[test]
fn lists_and_trees_are_bounded() {
    is_refused(
        Lists::default(),
        &[1; 100],
        "field 'tail' (byte 12 of the device): more than 3 elements",
    );
    is_refused(
        Lists::default(),
        &[2],
        "field 'tail' (byte 0 of the device): is 2 before an element, must be 1, or 0 for the end",
    );
    let tree = |nodes: &[u8]| [b"\0\0\0", nodes].concat();
    let node = b"\x01\0\0\0\0\0\0\0\x10\x01\x01\x01";
    for (nodes, text) in [
        (
            &b"\0\0\0\x03"[..],
            "field 'tree' (byte 3 of the device): announces 3 nodes, at most 2",
        ),
        (
            &[b"\0\0\0\x02", &node[..], b"\0"].concat(),
            "field 'tree' (byte 19 of the device): ends after 1 nodes, 2 were announced",
        ),
        (
            &[b"\0\0\0\x01", &node[..], node].concat(),
            "field 'tree' (byte 19 of the device): has more than the 1 nodes announced",
        ),
        (
            &[b"\0\0\0\x02", &node[..], node, b"\0"].concat(),
            "field 'tree[1]' (byte 30 of the device): a key comes twice",
        ),
    ] {
        is_refused(Lists::default(), &tree(nodes), text);
    }
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "fpreg", version = 0)]
struct Register {
    #[vmstate(tmp = RegisterOnTheWire)]
    value: f64,
    #[vmstate(skip = "for the test")]
    refuses: bool,
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "fpreg_tmp", version = 0)]
struct RegisterOnTheWire {
    #[vmstate(uint64, name = "tmp_mant")]
    mantissa: u64,
    #[vmstate(uint16, name = "tmp_exp")]
    exponent: u16,
}

impl vmferry_vmstate::View<Register> for RegisterOnTheWire {
    fn is_needed_by(_: &Register) -> bool {
        true
    }

    fn take(owner: &mut Register) -> Result<Self, BoxError> {
        if owner.refuses {
            return Err("not now".into());
        }
        let bits = owner.value.to_bits();
        Ok(Self {
            mantissa: bits & 0xf_ffff_ffff_ffff,
            exponent: u16::try_from(bits >> 52)?,
        })
    }

    fn put(self, owner: &mut Register, _: u32) -> Result<(), BoxError> {
        if owner.refuses {
            return Err("not now".into());
        }
        owner.value = f64::from_bits(u64::from(self.exponent) << 52 | self.mantissa);
        Ok(())
    }
}

#[test]
fn computed_values() {
    let mut state = Register {
        value: 1.5,
        refuses: false,
    };
    let bytes = b"\0\x08\0\0\0\0\0\0\x03\xff";
    is_sent_as(state.clone(), &Register::default(), bytes);
    let saved = state.save().unwrap();
    assert_eq!(shapes(&saved), [("tmp", "tmp", Shape::One)]);
    state.refuses = true;
    assert_eq!(
        state.save().unwrap_err().to_string(),
        "field 'tmp' cannot be saved: not now"
    );
    is_refused(state, bytes, "field 'tmp' (byte 8 of the device): not now");
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Mode {
    #[default]
    Idle,
    Busy,
}

impl From<Mode> for u8 {
    fn from(mode: Mode) -> Self {
        mode as u8
    }
}

impl TryFrom<u8> for Mode {
    type Error = String;

    fn try_from(mode: u8) -> Result<Self, String> {
        match mode {
            0 => Ok(Self::Idle),
            1 => Ok(Self::Busy),
            _ => Err(format!("mode {mode} does not exist")),
        }
    }
}

mod microseconds {
    use std::convert::Infallible;
    use std::num::TryFromIntError;
    use std::time::Duration;

    pub(crate) fn to_wire(time: &Duration) -> Result<u32, TryFromIntError> {
        u32::try_from(time.as_micros())
    }

    pub(crate) fn from_wire(micros: u32) -> Result<Duration, Infallible> {
        Ok(Duration::from_micros(u64::from(micros)))
    }
}

/// State with a format of its own.
struct Hours;

impl Codec<u8> for Hours {
    fn type_name(&self) -> &'static str {
        "hours"
    }

    fn bytes(&self) -> Option<u64> {
        None
    }

    fn save(&self, hours: &u8, out: &mut Vec<u8>) -> Result<(), DeviceError> {
        out.extend(std::iter::repeat_n(b'h', usize::from(*hours)));
        out.push(0);
        Ok(())
    }

    fn load(&self, hours: &mut u8, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        *hours = 0;
        while loader.byte()? != 0 {
            *hours = hours
                .checked_add(1)
                .ok_or_else(|| loader.fault("more than 255 hours"))?;
        }
        Ok(())
    }
}

#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "converted", version = 1)]
struct Converted {
    #[vmstate(uint8, as = u8)]
    mode: Mode,
    #[vmstate(uint8, as = u8)]
    modes: [Mode; 2],
    #[vmstate(uint32, with = microseconds)]
    timeout: std::time::Duration,
    #[vmstate(struct, as = Point)]
    place: (u8, u8, u8),
    #[vmstate(custom = Hours)]
    opened: u8,
    #[vmstate(custom = Hours)]
    each: [u8; 2],
    #[vmstate(uint8, name = "limits.low", at = limits.0)]
    #[vmstate(uint8, name = "limits.high", at = limits.1)]
    #[vmstate(skip = "sent in two halves")]
    limits: (u8, u8),
}

impl From<(u8, u8, u8)> for Point {
    fn from((x, y, z): (u8, u8, u8)) -> Self {
        Self { x, y, z }
    }
}

impl From<Point> for (u8, u8, u8) {
    fn from(point: Point) -> Self {
        (point.x, point.y, point.z)
    }
}

#[test]
fn conversions_and_own_formats() {
    let mut state = Converted {
        mode: Mode::Busy,
        modes: [Mode::Busy, Mode::Idle],
        timeout: std::time::Duration::from_micros(258),
        place: (1, 2, 3),
        opened: 2,
        each: [1, 0],
        limits: (8, 9),
    };
    let bytes = b"\x01\x01\0\0\0\x01\x02\x01\x02\x03hh\0h\0\0\x08\x09";
    is_sent_as(state.clone(), &Converted::default(), bytes);
    let saved = state.save().unwrap();
    let element = |index| Shape::Element {
        index,
        last: index == 1,
    };
    let shapes = shapes(&saved);
    assert_eq!(shapes[4], ("opened", "hours", Shape::One));
    assert_eq!(
        shapes[5..7],
        [("each", "hours", element(0)), ("each", "hours", element(1))]
    );
    assert_eq!(shapes[7].0, "limits.low");
    let mut wrong = bytes.to_vec();
    wrong[2] = 7;
    is_refused(
        Converted::default(),
        &wrong,
        "field 'modes[1]' (byte 2 of the device): mode 7 does not exist",
    );
    state.timeout = std::time::Duration::from_secs(10_000);
    assert_eq!(
        state.save().unwrap_err().to_string(),
        "field 'timeout' cannot be saved: out of range integral type conversion attempted"
    );
}
