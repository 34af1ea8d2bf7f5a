//! Each limit, on both sides of it.

use vmferry_stream::limits::{
    MAX_BITMAP_CHUNK_BYTES, MAX_CAPABILITIES, MAX_DESCRIPTION_BYTES, MAX_HEADER_BYTES,
    MAX_LIVE_SECTIONS, MAX_MACHINE_NAME_BYTES, MAX_NAME_BYTES, MAX_PACKAGE_BYTES, MAX_RAM_BLOCKS,
    MAX_RECEIVED_BITMAP_BYTES, MAX_RETURN_MESSAGE_BYTES, MAX_SECTOR,
};
use vmferry_stream::return_path::ReturnDecoder;
use vmferry_stream::{Fault, Name, Options, Sector, Step};

use crate::drive::{Split, pass_rest, run};

const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x04none";
const RAM: &[u8] = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04";
const BLOCK: &[u8] = b"\x01\0\0\0\x01\x05block\0\0\0\0\0\0\0\x01";
const BITMAP: &[u8] = b"\x01\0\0\0\x03\x0cdirty-bitmap\0\0\0\0\0\0\0\x01";

/// What becomes of a stream that stops after `parts`. `None`: nothing is wrong with them.
fn fault(parts: &[&[u8]]) -> Option<Fault> {
    let run = run(
        &parts.concat(),
        Options::default(),
        Split::Whole,
        &pass_rest,
    );
    match run.ending.err()?.fault {
        Fault::Truncated(_) => None,
        fault => Some(fault),
    }
}

fn over(value: u64, max: u64) -> Option<Fault> {
    Some(Fault::OverMaximum { value, max })
}

#[test]
fn names() {
    assert!(Name::new(&"n".repeat(MAX_NAME_BYTES)).is_ok());
    let error = Name::new(&"n".repeat(MAX_NAME_BYTES + 1)).expect_err("too long");
    assert_eq!(
        error.to_string(),
        "a name of 256 bytes is longer than 255 bytes"
    );
}

#[test]
fn machine_name() {
    let max = MAX_MACHINE_NAME_BYTES;
    let stream = |bytes: u32| {
        let mut stream = b"QEVM\0\0\0\x03\x07".to_vec();
        stream.extend(bytes.to_be_bytes());
        stream.extend(std::iter::repeat_n(b'm', bytes.min(1000) as usize));
        stream.push(0);
        stream
    };
    assert_eq!(fault(&[&stream(max)]), None);
    assert_eq!(
        fault(&[&stream(max + 1)]),
        over(u64::from(max) + 1, u64::from(max))
    );
    assert_eq!(
        fault(&[&stream(u32::MAX)]),
        over(u64::from(u32::MAX), u64::from(max))
    );
}

#[test]
fn capabilities() {
    let max = MAX_CAPABILITIES;
    let stream = |count: u32| {
        let mut stream = b"\x05\x1aconfiguration/capabilities\0\0\0\x01".to_vec();
        stream.extend(count.to_be_bytes());
        stream.extend([1, b'c'].repeat(count.min(100) as usize));
        stream.push(0);
        stream
    };
    assert_eq!(fault(&[HEAD, &stream(max)]), None);
    assert_eq!(
        fault(&[HEAD, &stream(max + 1)]),
        over(u64::from(max) + 1, u64::from(max))
    );
    assert_eq!(
        fault(&[HEAD, &stream(u32::MAX)]),
        over(u64::from(u32::MAX), u64::from(max))
    );
}

/// The configuration is the only header that could be longer than a window.
#[test]
fn header() {
    let configuration = |bytes: usize| {
        let mut stream = b"\x07\0\0\0\0\x05\x1aconfiguration/capabilities\0\0\0\x01".to_vec();
        stream.extend(4u32.to_be_bytes());
        let names = bytes - stream.len() - 4 - 1;
        for length in [255, 255, 255, names - 3 * 255] {
            stream.push(length as u8);
            stream.extend(std::iter::repeat_n(b'c', length));
        }
        stream.push(0);
        assert_eq!(stream.len(), bytes);
        stream
    };
    let header = &HEAD[..8];
    assert_eq!(fault(&[header, &configuration(MAX_HEADER_BYTES)]), None);
    let max = MAX_HEADER_BYTES as u64;
    assert_eq!(
        fault(&[
            header,
            &configuration(MAX_HEADER_BYTES + 1)[..MAX_HEADER_BYTES]
        ]),
        over(max + 1, max)
    );
}

#[test]
fn a_configuration_over_the_window_is_refused_however_it_arrives() {
    let mut stream = HEAD[..8].to_vec();
    stream.extend(b"\x07\0\0\0\0\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x06");
    for _ in 0..6 {
        stream.push(250);
        stream.extend([b'c'; 250]);
    }
    stream.push(0);
    let whole = run(&stream, Options::default(), Split::Whole, &pass_rest);
    let mut rng = crate::seeded();
    for _ in 0..50 {
        let cut = run(
            &stream,
            Options::default(),
            Split::Random(&mut rng),
            &pass_rest,
        );
        assert_eq!(cut, whole);
    }
    assert!(whole.ending.is_err());
}

#[test]
fn live_sections() {
    let sections = |count: usize| {
        let mut stream = HEAD.to_vec();
        for id in 0..count as u32 {
            stream.push(1);
            stream.extend(id.to_be_bytes());
            stream.extend(b"\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x10\x7e");
            stream.extend(id.to_be_bytes());
        }
        stream
    };
    let max = MAX_LIVE_SECTIONS;
    assert_eq!(fault(&[&sections(max)]), None);
    assert_eq!(
        fault(&[&sections(max + 1)]),
        over(max as u64 + 1, max as u64)
    );
}

#[test]
fn ram_blocks() {
    let list = |count: u32| {
        let mut stream = b"\0\0\0\0\0\0\x10\x04".to_vec();
        for _ in 0..count {
            stream.extend(b"\x01m\0\0\0\0\0\0\0\0");
        }
        stream
    };
    let max = MAX_RAM_BLOCKS;
    assert_eq!(fault(&[HEAD, RAM, &list(max)]), None);
    let rest = b"\x01m\0\0\0\0\0\0\x10\0";
    assert_eq!(
        fault(&[HEAD, RAM, &list(max / 2), rest, &list(max / 2)]),
        over(u64::from(max) + 1, u64::from(max)),
        "both lists of a stream count"
    );
    assert_eq!(
        fault(&[HEAD, RAM, &list(max + 1)]),
        over(u64::from(max) + 1, u64::from(max))
    );
}

#[test]
fn ram_lengths() {
    let xbzrle = |bytes: u16| {
        let head = b"\0\0\0\0\0\0\0\x40\x01m\x01";
        fault(&[HEAD, RAM, head, &bytes.to_be_bytes()])
    };
    assert_eq!(xbzrle(4096), None);
    assert_eq!(xbzrle(4097), over(4097, 4096));
    let compressed = |bytes: u32| {
        let head = b"\0\0\0\0\0\0\x01\0\x01m";
        fault(&[HEAD, RAM, head, &bytes.to_be_bytes()])
    };
    assert_eq!(compressed(4110), None);
    assert_eq!(compressed(4111), over(4111, 4110));
    assert_eq!(compressed(u32::MAX), over(u64::from(u32::MAX), 4110));
}

#[test]
fn sectors() {
    let block = |sector: u64| {
        let word = sector << 9 | 9;
        fault(&[HEAD, BLOCK, &word.to_be_bytes(), b"\x01d"])
    };
    assert_eq!(block(MAX_SECTOR), None);
    assert_eq!(block(MAX_SECTOR + 1), over(MAX_SECTOR + 1, MAX_SECTOR));
    assert!(Sector::at_byte(MAX_SECTOR << 9).is_some());
    assert_eq!(Sector::at_byte((MAX_SECTOR + 1) << 9), None);
    assert_eq!(Sector::at_byte(511), None);
}

#[test]
fn progress() {
    let progress = |percent: u64| fault(&[HEAD, BLOCK, &(percent << 9 | 4).to_be_bytes()]);
    assert_eq!(progress(100), None);
    assert_eq!(progress(101), over(101, 100));
    assert_eq!(progress(356), over(356, 100));
}

#[test]
fn bitmap_chunk() {
    let bits = |bytes: u64| {
        let head = b"\x4c\x01n\x01b\0\0\0\0\0\0\0\0\0\0\0\x08";
        fault(&[HEAD, BITMAP, head, &bytes.to_be_bytes()])
    };
    let max = MAX_BITMAP_CHUNK_BYTES;
    assert_eq!(bits(max), None);
    assert_eq!(bits(max + 1), over(max + 1, max));
    assert_eq!(bits(u64::MAX), over(u64::MAX, max));
}

#[test]
fn package() {
    let package = |bytes: u32| fault(&[HEAD, b"\x08\0\x07\0\x04", &bytes.to_be_bytes()]);
    let max = MAX_PACKAGE_BYTES;
    assert_eq!(package(max), None);
    assert_eq!(package(max + 1), over(u64::from(max) + 1, u64::from(max)));
    assert_eq!(package(u32::MAX), over(u64::from(u32::MAX), u64::from(max)));
}

#[test]
fn description() {
    let description = |bytes: u32| fault(&[HEAD, b"\0\x06", &bytes.to_be_bytes()]);
    let max = MAX_DESCRIPTION_BYTES;
    assert_eq!(description(max), None);
    assert_eq!(
        description(max + 1),
        over(u64::from(max) + 1, u64::from(max))
    );
    assert_eq!(
        description(u32::MAX),
        over(u64::from(u32::MAX), u64::from(max))
    );
}

#[test]
fn return_path() {
    let answer = |parts: &[&[u8]]| ReturnDecoder::new().step(&parts.concat());
    let max = MAX_RETURN_MESSAGE_BYTES;
    let length = |length: u16| answer(&[b"\0\x01", &length.to_be_bytes()]).map_err(|e| e.fault);
    assert!(matches!(length(max), Err(Fault::WrongLength { .. })));
    assert_eq!(
        length(max + 1).err(),
        over(u64::from(max) + 1, u64::from(max))
    );
    let bitmap = |bytes: u64| answer(&[b"\0\x05\0\x02\x01m", &bytes.to_be_bytes()]);
    let max = MAX_RECEIVED_BITMAP_BYTES;
    assert!(matches!(bitmap(max), Ok(Step::Record { .. })));
    assert_eq!(
        bitmap(max + 1).map_err(|error| error.fault).err(),
        over(max + 1, max)
    );
}
