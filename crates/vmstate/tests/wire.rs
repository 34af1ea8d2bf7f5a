//! Every plain type of the wire, with its literal bytes.

mod round_trip;

use round_trip::{decode, is_refused, is_sent_as};
use vmferry_vmstate::{Content, DeviceError, Shape, VmState};

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
