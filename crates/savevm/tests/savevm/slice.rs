//! Streams that are in memory as a whole, loaded at once.

use vmferry_savevm::{
    Command, Ending, Incoming, LoadMachine, LoadOptions, Opening, PageSizes, Registration,
    Registry, Sink,
};

use crate::parts::{
    Log, TAIL, ToyState, head, load, loader, lock, saved, scripted, section, state, taken, toy,
    toy_body,
};

fn source() -> Registry<'static> {
    let mut registry = Registry::new();
    for registration in [
        Registration::saving("block", 1, Box::new(scripted("block", &Log::default()))),
        Registration::device("rtc", toy(&state(b"noon"))),
    ] {
        registry.register(registration).expect("free");
    }
    registry
}

fn target(log: &Log, rtc: &ToyState) -> Registry<'static> {
    let mut registry = Registry::new();
    for registration in [
        Registration::loading("block", 1..=1, loader(log, "")),
        Registration::device("rtc", toy(rtc)),
    ] {
        registry.register(registration).expect("free");
    }
    registry
}

#[test]
fn as_in_windows() {
    let opening = Opening {
        commands: vec![Command::OpenReturnPath, Command::Ping(7)],
        ..Opening::default()
    };
    let bytes = saved(&opening, &mut source());
    let text = bytes.iter().position(|byte| *byte == b'{');
    // Behind the device's footer.
    let eof = text.expect("a description") - 6;
    for end in 0..=bytes.len() {
        let (stepped, at_once) = (Log::default(), Log::default());
        let (one, other) = (state(b""), state(b""));
        let machine = &mut LoadMachine::new(LoadOptions::default());
        let expected = load(machine, &mut target(&stepped, &one), &bytes[..end]);
        let machine = &mut LoadMachine::new(LoadOptions::default());
        let ending = machine.load_slice(&bytes[..end], &mut target(&at_once, &other));
        match (expected, ending) {
            (Ok(expected), Ok(ending)) => assert_eq!(expected.ending, Some(ending)),
            (Err(expected), Err(error)) => assert_eq!(error.to_string(), expected.to_string()),
            (expected, ending) => panic!("{end}: {expected:?}, but {ending:?}"),
        }
        assert_eq!(taken(&stepped), taken(&at_once));
        assert_eq!(lock(&one).0, lock(&other).0);
        assert_eq!(lock(&other).0.is_empty(), end < eof);
    }
}

/// Payload goes to its handler, what is behind the stream stays, and a machine that has begun goes
/// on where it is.
#[test]
fn payload_and_what_follows() {
    let log = Log::default();
    let mut body = vec![0, 0, 0, 0, 0, 0, 0, 1, 1, b'a'];
    body.extend(vec![7; 1 << 20]);
    body.extend([0, 0, 0, 0, 0, 0, 0, 2]);
    let sections = [
        section(1, 1, "block", 1, &[0, 0, 0, 0, 0, 0, 0, 2]),
        section(3, 1, "", 0, &body),
    ];
    let mut bytes = [&head("")[..], &sections.concat(), TAIL].concat();
    let length = bytes.len();
    bytes.extend(b"more");
    let mut registry = target(&log, &state(b""));
    let mut machine = LoadMachine::new(LoadOptions::default());
    machine.step(&bytes, &mut registry).expect("the header");
    let ending = machine.load_slice(&bytes[8..], &mut registry);
    assert_eq!(ending.expect("whole"), Ending::WithDescription);
    assert_eq!(machine.offset(), length as u64);
    let heard = taken(&log);
    assert_eq!(heard.iter().filter(|it| *it == "filled").count(), 1);
}

#[test]
fn packages_are_loaded_as_they_come() {
    let rtc = state(b"");
    let full = section(4, 3, "rtc", 2, &toy_body(b"time"));
    let package = [&[8, 0, 4, 0, 0], &full[..], &[8, 0, 5, 0, 0]].concat();
    let length = u32::try_from(package.len()).expect("short");
    let advise = [&[8, 0, 3, 0, 16][..], &[0; 6], &[16, 0], &[0; 6], &[16, 0]].concat();
    let mut bytes = Vec::new();
    let packaged = [&[8, 0, 7, 0, 4][..], &length.to_be_bytes(), &package].concat();
    bytes
        .put(&[&head(""), &advise, &packaged, b"\0"])
        .expect("memory takes everything");
    let sizes = PageSizes {
        all_bytes: 0x1000,
        target_bytes: 0x1000,
    };
    let mut machine = LoadMachine::new(LoadOptions {
        postcopy: Incoming::Ram(sizes),
        ..LoadOptions::default()
    });
    let ending = machine.load_slice(&bytes, &mut target(&Log::default(), &rtc));
    assert_eq!(ending.expect("whole"), Ending::WithoutDescription);
    assert_eq!(lock(&rtc).0, b"time");
}
