//! Devices on their way: windows of any length, versions, footers, and everything that can be wrong.

use vmferry_savevm::{
    LoadError, LoadMachine, LoadOptions, LoadStep, MAX_DEVICE_BYTES, Opening, Registration,
    Registry,
};
use vmferry_stream::{Blame, Ending, InstanceId};
use vmferry_vmstate::{Decoded, Description, Device, DeviceError, SavedBody};

use crate::parts::{
    TAIL, ToyState, head, load, load_in, lock, old_toy, saved, section, seed, state, toy, toy_body,
};

fn one(idstr: &str, state: &ToyState) -> Registry<'static> {
    let mut registry = Registry::new();
    let device = Registration::device(idstr, toy(state));
    registry.register(device).expect("free");
    registry
}

fn strict() -> LoadMachine {
    LoadMachine::new(LoadOptions {
        refuse_rest: Some("no such device"),
        ..LoadOptions::default()
    })
}

fn stream(sections: &[&[u8]]) -> Vec<u8> {
    [&head(""), &sections.concat(), TAIL].concat()
}

fn refused(registry: &mut Registry<'_>, sections: &[&[u8]]) -> LoadError {
    load(&mut strict(), registry, &stream(sections)).expect_err("it is wrong")
}

/// What one end saves the other loads, whatever the reads are.
#[test]
fn state_arrives_whole_in_windows_of_any_length() {
    let mut rng = fastrand::Rng::with_seed(seed());
    for _ in 0..50 {
        let random = |rng: &mut fastrand::Rng| {
            let length = if rng.bool() {
                rng.usize(..64)
            } else {
                rng.usize(..9000)
            };
            state(
                &std::iter::repeat_with(|| rng.u8(..))
                    .take(length)
                    .collect::<Vec<_>>(),
            )
        };
        let from: Vec<ToyState> = (0..4).map(|_| random(&mut rng)).collect();
        let to: Vec<ToyState> = (0..4).map(|_| state(b"before")).collect();
        let registry = |states: &[ToyState]| {
            let mut registry = Registry::new();
            for registration in [
                Registration::device("dma", toy(&states[0])),
                Registration::device("dma", toy(&states[1])),
                Registration::device("disk", toy(&states[2])).at("0000:00:03.0"),
                Registration::old_style("slirp", old_toy(&states[3])),
            ] {
                registry.register(registration).expect("free");
            }
            registry
        };
        let bytes = saved(&Opening::default(), &mut registry(&from));
        let most = [1, 7, 300, 1 << 16][rng.usize(..4)];
        let mut read = || rng.usize(..=most);
        let loaded = load_in(&mut strict(), &mut registry(&to), &bytes, &mut read).expect("loaded");
        assert_eq!(loaded.ending, Some(Ending::WithDescription));
        for (from, to) in from.iter().zip(&to) {
            assert_eq!(*lock(from), *lock(to));
        }
    }
}

/// More bytes than the body has may never come: the sender may wait for an answer.
#[test]
fn never_more_is_asked_for_than_a_sender_must_send() {
    let to = state(b"");
    let mut registry = one("rtc", &to);
    let full = section(4, 1, "rtc", 2, &toy_body(&[5; 3000]));
    let bytes = [&head(""), &full[..], b"\0"].concat();
    let mut machine = LoadMachine::new(LoadOptions {
        description: false,
        ..LoadOptions::default()
    });
    let mut read = || 0;
    let loaded = load_in(&mut machine, &mut registry, &bytes, &mut read).expect("loaded");
    assert_eq!(loaded.ending, Some(Ending::WithoutDescription));
    assert_eq!(lock(&to).len(), 3000);
}

#[test]
fn without_a_description_the_stream_ends_at_eof() {
    let to = state(b"");
    let expecting = |description| {
        LoadMachine::new(LoadOptions {
            description,
            ..LoadOptions::default()
        })
    };
    let bare = [&head("")[..], b"\0"].concat();
    let described = [head(""), TAIL.to_vec()].concat();
    let steps = |description, bytes: &[u8]| {
        let mut machine = expecting(description);
        let registry = &mut one("rtc", &to);
        let loaded = load(&mut machine, registry, bytes).expect("loaded");
        // Asked again, it says the same.
        assert!(!matches!(
            machine.step(b"", registry),
            Ok(LoadStep::Record { .. })
        ));
        loaded.ending
    };
    assert_eq!(steps(true, &described), Some(Ending::WithDescription));
    assert_eq!(steps(true, &bare), Some(Ending::WithoutDescription));
    assert_eq!(steps(false, &bare), Some(Ending::WithoutDescription));
    assert_eq!(steps(false, &described), Some(Ending::WithoutDescription));
}

#[test]
fn older_versions_are_read_in_their_layout() {
    let to = state(b"");
    let body = toy_body(b"old");
    let full = section(4, 1, "rtc", 1, &body[..7]);
    load(&mut strict(), &mut one("rtc", &to), &stream(&[&full])).expect("loaded");
    assert_eq!(lock(&to).0, b"old");
}

#[test]
fn other_versions_are_refused_by_number() {
    let to = state(b"kept");
    for (version, words) in [
        (
            3,
            "section 'rtc' instance 0 (id 0x1) has version 3, the highest that is read here is 2",
        ),
        (
            0,
            "section 'rtc' instance 0 (id 0x1) has version 0, the lowest that is read here is 1",
        ),
    ] {
        let full = section(4, 1, "rtc", version, &toy_body(b""));
        let error = refused(&mut one("rtc", &to), &[&full]);
        assert_eq!(error.to_string(), words);
        assert_eq!(error.blame(), Blame::Peer);
    }
    assert_eq!(lock(&to).0, b"kept");
}

#[test]
fn unknown_sections_are_named() {
    let to = state(b"");
    let mut registry = one("rtc", &to);
    let full = section(4, 1, "pit", 2, &toy_body(b""));
    let error = refused(&mut registry, &[&full]);
    assert_eq!(
        error.to_string(),
        "byte 30: unknown section 'pit' instance 0: no such device"
    );
    registry.unregister(None, "rtc");
    let device = Registration::device("rtc", toy(&to)).instance(InstanceId(2));
    registry.register(device).expect("free");
    let full = section(4, 1, "rtc", 2, &toy_body(b""));
    let error = refused(&mut registry, &[&full]);
    assert!(error.to_string().contains("'rtc' instance 0"), "{error}");
}

/// Nothing changes before the footer was right.
#[test]
fn a_wrong_footer_keeps_the_device_as_it_was() {
    let to = state(b"kept");
    let good = section(4, 1, "rtc", 2, &toy_body(b"new"));
    let footer = good.len() - 5;
    let mut missing = good.clone();
    missing[footer] = 0x7f;
    let mut other = good.clone();
    other[footer + 4] = 2;
    for (bytes, words) in [
        (
            missing,
            "footer of section 'rtc' (0x1) missing: byte 0x7f instead of 0x7e",
        ),
        (other, "footer of section 'rtc' has id 0x2 instead of 0x1"),
    ] {
        // The first section has a footer, so that all must have one.
        let first = section(4, 9, "rtc", 2, &toy_body(b"kept"));
        let error = refused(&mut one("rtc", &to), &[&first, &bytes]);
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(lock(&to).0, b"kept");
    }
}

#[test]
fn a_wrong_body_is_named_down_to_its_field() {
    let to = state(b"kept");
    let mut body = toy_body(b"new");
    body[8] ^= 1;
    let full = section(4, 1, "rtc", 2, &body);
    let error = refused(&mut one("rtc", &to), &[&full]);
    assert_eq!(
        error.to_string(),
        "section 'rtc' instance 0 (id 0x1), from byte 30: \
         field 'sum' (byte 7 of the device): is not the sum of the data"
    );
    assert_eq!(error.blame(), Blame::Peer);
    assert_eq!(lock(&to).0, b"kept");
}

#[test]
fn a_hook_that_refuses_is_this_hosts() {
    let mut device = toy(&state(b""));
    device.fails_at = "post_load";
    let mut registry = Registry::new();
    let device = Registration::device("rtc", device);
    registry.register(device).expect("free");
    let full = section(4, 1, "rtc", 2, &toy_body(b"new"));
    let error = refused(&mut registry, &[&full]);
    assert_eq!(
        error.to_string(),
        "section 'rtc' instance 0 (id 0x1), from byte 30: post_load of 'toy': out of luck"
    );
    assert_eq!(error.blame(), Blame::Host);
}

#[test]
fn truncated_state_is_named_down_to_its_field() {
    let full = section(4, 1, "rtc", 2, &toy_body(b"new"));
    let bytes = [head(""), full].concat();
    for (end, field) in [(32, "length"), (36, "data"), (38, "sum")] {
        let registry = &mut one("rtc", &state(b""));
        let error = load(&mut strict(), registry, &bytes[..end]).expect_err("truncated");
        let words = format!(
            "stream truncated at byte {end}, in field '{field}' of \
             section 'rtc' instance 0 (id 0x1), from byte 30"
        );
        assert_eq!(error.to_string(), words);
        assert_eq!(error.blame(), Blame::Peer);
    }
}

/// A device whose state never ends.
struct Endless(Description);

impl Device for Endless {
    fn description(&self) -> Option<&Description> {
        Some(&self.0)
    }
    fn is_needed(&self) -> bool {
        true
    }
    fn save(&mut self) -> Result<SavedBody, DeviceError> {
        Ok(SavedBody::OldStyle(Vec::new()))
    }
    fn decode(&self, _version: u32, window: &[u8]) -> Result<Decoded, DeviceError> {
        match window.last() {
            Some(1) => Ok(Decoded::new(window.len(), || Ok(()))),
            _ => Err(DeviceError::Incomplete {
                have: window.len(),
                field: "more".into(),
            }),
        }
    }
}

#[test]
fn state_has_at_most_64_mib() {
    let start = |registry: &mut Registry<'_>| {
        let description = Description {
            name: "big".into(),
            version: 0,
            minimum_version: 0,
            unmigratable: false,
            fields: Vec::new(),
            subsections: Vec::new(),
        };
        registry
            .register(Registration::device("big", Box::new(Endless(description))))
            .expect("free");
        let mut machine = strict();
        let full = section(4, 1, "big", 0, b"");
        let bytes = [head(""), full].concat();
        let mut at = 0;
        while let LoadStep::Record { used, record, .. } =
            machine.step(&bytes[at..], registry).expect("right")
        {
            at += used;
            if matches!(record, vmferry_stream::Record::Section(_)) {
                return machine;
            }
        }
        panic!("no section");
    };
    let mut body = vec![0; MAX_DEVICE_BYTES + 1];

    let registry = &mut Registry::new();
    let mut machine = start(registry);
    let step = machine.step(&body[..MAX_DEVICE_BYTES - 1], registry);
    assert_eq!(
        step.expect("may go on"),
        LoadStep::NeedMore(MAX_DEVICE_BYTES)
    );
    let error = machine.step(&body, registry).expect_err("too long");
    assert_eq!(
        error.to_string(),
        "section 'big' instance 0 (id 0x1), from byte 30: \
         more than 67108864 bytes, still in field 'more'"
    );
    assert_eq!(error.blame(), Blame::Peer);

    let registry = &mut Registry::new();
    let mut machine = start(registry);
    body[MAX_DEVICE_BYTES - 1] = 1;
    let step = machine.step(&body, registry).expect("long enough");
    let used = MAX_DEVICE_BYTES;
    assert_eq!(step, LoadStep::Device { used });
}

/// A device that a stream says in pieces, as a live section: QEMU reads that too.
#[test]
fn a_device_may_come_as_a_live_section() {
    let to = state(b"");
    let pieces = [
        section(1, 1, "rtc", 2, &toy_body(b"first")),
        section(2, 1, "", 0, &toy_body(b"second")),
    ];
    let mut registry = one("rtc", &to);
    load(
        &mut strict(),
        &mut registry,
        &stream(&[&pieces[0], &pieces[1]]),
    )
    .expect("loaded");
    assert_eq!(lock(&to).0, b"second");
}

/// A device that was taken away in the middle of its section.
#[test]
fn a_device_that_went_away_is_an_error() {
    let mut registry = one("rtc", &state(b""));
    let mut machine = strict();
    let bytes = [head(""), section(4, 1, "rtc", 2, b"")].concat();
    let mut at = 0;
    loop {
        match machine.step(&bytes[at..at + 30.min(bytes.len() - at)], &mut registry) {
            Ok(LoadStep::Record { used, .. }) => at += used,
            Ok(_) => drop(registry.unregister(None, "rtc")),
            Err(error) => {
                let words = "section 'rtc' instance 0 (id 0x1): no handler is at work";
                assert_eq!(error.to_string(), words);
                break;
            }
        }
    }
}
