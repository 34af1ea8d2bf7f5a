//! What a stream is made of: order of sections, who is left out, options of old machine types,
//! descriptions, device state alone.

use vmferry_savevm::{
    Describe, GuestStopped, LoadError, LoadMachine, LoadOptions, Machine, Opening, Pending,
    Priority, Ready, Registration, Registry, begin, cleanup, save_device_state,
};
use vmferry_stream::{
    Blame, Command, Ending, Expect, Footers, Options, PageBits, Record, SectionKind,
};
use vmferry_vmstate::{BodyLayout, Dialect, Value, VmDescription};

use crate::parts::{
    Bytes, EOS, Log, head, load, loader, lock, name, old_toy, records, save, saved, scripted,
    section, sections, state, taken, toy, toy_body,
};
use SectionKind::{End, Full, Part, Start};

fn owned(expected: &[(SectionKind, &str, u32)]) -> Vec<(SectionKind, String, u32)> {
    let own =
        |(kind, name, number): &(SectionKind, &str, u32)| (*kind, (*name).to_owned(), *number);
    expected.iter().map(own).collect()
}

#[test]
fn live_sections_first_then_devices_by_priority() {
    let log = Log::default();
    let mut registry = Registry::new();
    let mut unneeded = toy(&state(b"x"));
    unneeded.needed = false;
    for registration in [
        Registration::device("timer", toy(&state(b"now"))),
        Registration::saving("block", 1, Box::new(scripted("a", &log))),
        Registration::old_style("slirp", old_toy(&state(b""))),
        Registration::device("bridge", toy(&state(b"b"))).priority(Priority(1)),
        Registration::device("globalstate", unneeded),
        Registration::device("serial", toy(&state(b"s"))).at("0:1"),
        Registration::loading("dirty-bitmap", 1..=1, loader(&log, "")),
    ] {
        registry.register(registration).expect("free");
    }
    let bytes = saved(&Opening::default(), &mut registry);
    let expected = [
        (Start, "block", 0),
        (Part, "block", 0),
        (End, "block", 0),
        (Full, "bridge", 0),
        (Full, "timer", 0),
        (Full, "slirp", 0),
        (Full, "0:1/serial", 0),
    ];
    assert_eq!(sections(&bytes), owned(&expected));
    let versions = records(&bytes)
        .into_iter()
        .filter_map(|record| match record {
            Record::Section(it) if it.kind == Full => Some(it.version),
            _ => None,
        });
    assert_eq!(versions.collect::<Vec<_>>(), [2, 2, 4, 2]);
}

#[test]
fn who_is_not_active_is_left_out_but_cleaned_up() {
    let log = Log::default();
    let mut registry = Registry::new();
    let mut idle = scripted("idle", &log);
    idle.active = false;
    // Would hold everything up.
    idle.pending = Pending::Bulk { bytes: 1 };
    for script in [idle, scripted("busy", &log)] {
        let saving = Registration::saving("block", 1, Box::new(script));
        registry.register(saving).expect("free");
    }
    let bytes = saved(&Opening::default(), &mut registry);
    let expected = [(Start, "block", 1), (Part, "block", 1), (End, "block", 1)];
    assert_eq!(sections(&bytes), owned(&expected));
    cleanup(&mut registry);
    let expected = [
        "busy setup",
        "busy iterate",
        "busy complete",
        "idle cleanup",
        "busy cleanup",
    ];
    assert_eq!(taken(&log), expected);
}

/// Who was registered after the STARTs has no section that could go on.
#[test]
fn who_comes_late_is_left_out() {
    let log = Log::default();
    let mut registry = Registry::new();
    let mut sink = Bytes::default();
    let mut iterating = begin(&Opening::default(), &mut registry, &mut sink).expect("begun");
    let before = sink.bytes.len();
    let mut late = scripted("late", &log);
    late.pending = Pending::Bulk { bytes: 1 };
    let late = Registration::saving("block", 1, Box::new(late));
    registry.register(late).expect("free");
    iterating
        .iterate(&mut registry, &mut sink)
        .expect("iterated");
    let ready = iterating.try_complete(&mut registry, |_| true);
    assert!(matches!(ready, Ready::Go(_)));
    assert_eq!(sink.bytes.len(), before);
}

#[test]
fn early_devices_come_among_the_starts_and_once() {
    let log = Log::default();
    let early_state = state(b"plugged");
    let mut registry = Registry::new();
    let mut unneeded = toy(&state(b""));
    unneeded.needed = false;
    for registration in [
        Registration::device("rtc", toy(&state(b"r"))),
        Registration::early_device("virtio-mem-device-early", toy(&early_state)),
        Registration::saving("block", 1, Box::new(scripted("a", &log))),
        Registration::early_device("nothing-early", unneeded),
    ] {
        registry.register(registration).expect("free");
    }
    let bytes = saved(&Opening::default(), &mut registry);
    let expected = [
        (Full, "virtio-mem-device-early", 0),
        (Start, "block", 0),
        (Part, "block", 0),
        (End, "block", 0),
        (Full, "rtc", 0),
    ];
    assert_eq!(sections(&bytes), owned(&expected));
    let at = bytes
        .windows(10)
        .position(|w| w == b"{\"page_siz")
        .expect("described");
    let description = VmDescription::parse(&bytes[at..]).expect("readable");
    let names: Vec<_> = description.devices.iter().map(|it| &*it.name).collect();
    assert_eq!(names, ["virtio-mem-device-early", "rtc"]);
}

#[test]
fn the_switch_is_announced_before_the_ends() {
    let log = Log::default();
    for announced in [false, true] {
        let mut registry = Registry::new();
        let saving = Registration::saving("block", 1, Box::new(scripted("a", &log)));
        registry.register(saving).expect("free");
        let opening = Opening {
            switchover_start: announced,
            ..Opening::default()
        };
        let all = records(&saved(&opening, &mut registry));
        let switch = Record::Command(Command::SwitchoverStart);
        let place = all.iter().position(|record| *record == switch);
        assert_eq!(place.is_some(), announced);
        if let Some(place) = place {
            let Record::Section(next) = &all[place + 1] else {
                panic!("a section follows");
            };
            assert_eq!(next.kind, End);
            assert!(
                all[..place]
                    .iter()
                    .all(|r| !matches!(r, Record::Section(s) if s.kind == End))
            );
        }
    }
}

#[test]
fn every_part_of_the_configuration() {
    let mut machine = Machine {
        name: name("pc"),
        page_bits: PageBits::new(14).expect("known"),
        smallest_page_bits: PageBits::new(10).expect("known"),
        capabilities: Some(vec![name("xbzrle"), name("x-ignore-shared")]),
        uuid: Some(*b"0123456789abcdef"),
    };
    let configuration = |machine: &Machine| {
        let opening = Opening {
            machine: machine.clone(),
            ..Opening::default()
        };
        match records(&saved(&opening, &mut Registry::new())).swap_remove(1) {
            Record::Configuration(configuration) => configuration,
            other => panic!("{other:?}"),
        }
    };
    let sent = configuration(&machine);
    assert_eq!(sent.machine, "pc");
    assert_eq!(sent.page_bits.map(PageBits::bits), Some(14));
    assert_eq!(sent.capabilities, Some(vec![name("x-ignore-shared")]));
    assert_eq!(sent.uuid, None, "validate-uuid is off");

    machine.capabilities = Some(vec![name("validate-uuid")]);
    machine.page_bits = machine.smallest_page_bits;
    let sent = configuration(&machine);
    assert_eq!(sent.page_bits, None);
    assert_eq!(sent.capabilities, None, "it is not one that both must have");
    assert_eq!(sent.uuid, machine.uuid);
}

/// As from a machine type up to 2.3.
#[test]
fn without_configuration_and_footers() {
    let (from, to) = (state(b"old"), state(b""));
    let mut source = Registry::new();
    let device = Registration::device("rtc", toy(&from));
    source.register(device).expect("free");
    let opening = Opening {
        configuration: false,
        footers: false,
        describe: Describe::Suppressed,
        ..Opening::default()
    };
    let bytes = saved(&opening, &mut source);
    let body = toy_body(b"old");
    let full = section(4, 1, "rtc", 2, &body);
    let bare = [b"QEVM\0\0\0\x03", &full[..full.len() - 5], b"\0"].concat();
    assert_eq!(bytes, bare);

    for (configuration, footers, wrong) in [
        (Expect::Absent, Footers::Absent, None),
        (Expect::Optional, Footers::Auto, None),
        (
            Expect::Required,
            Footers::Absent,
            Some("configuration section missing"),
        ),
        (
            Expect::Absent,
            Footers::Present,
            Some("footer of section 'rtc' (0x1) missing"),
        ),
    ] {
        lock(&to).0.clear();
        let mut registry = Registry::new();
        let device = Registration::device("rtc", toy(&to));
        registry.register(device).expect("free");
        let mut machine = LoadMachine::new(LoadOptions {
            stream: Options {
                configuration,
                footers,
                ..Options::default()
            },
            machine: Some(Machine::named(name("pc-2.3"))),
            ..LoadOptions::default()
        });
        let loaded = load(&mut machine, &mut registry, &bytes);
        match wrong {
            None => {
                let ending = loaded.expect("loaded").ending;
                assert_eq!(ending, Some(Ending::WithoutDescription));
                assert_eq!(lock(&to).0, b"old");
            }
            Some(words) => {
                let error = loaded.expect_err(words).to_string();
                assert!(error.contains(words), "{error}");
                assert!(lock(&to).is_empty(), "not before the footer");
            }
        }
    }
}

#[test]
fn three_ways_to_describe() {
    let text_of = |describe| {
        let mut registry = Registry::new();
        let device = Registration::device("rtc", toy(&state(b"abc"))).at("0:1");
        registry.register(device).expect("free");
        let device = Registration::old_style("slirp", old_toy(&state(b"d")));
        registry.register(device).expect("free");
        let opening = Opening {
            machine: Machine::named(name("none")),
            describe,
            ..Opening::default()
        };
        let bytes = saved(&opening, &mut registry);
        let mut registry = Registry::new();
        let all = load(
            &mut LoadMachine::new(LoadOptions::default()),
            &mut registry,
            &bytes,
        );
        assert!(all.is_ok());
        let at = bytes.windows(2).position(|w| w == b"{\"" || w == b"{}");
        at.map(|at| String::from_utf8(bytes[at..].to_vec()).expect("text"))
    };
    assert_eq!(text_of(Describe::Suppressed), None);
    assert_eq!(text_of(Describe::Empty).as_deref(), Some("{}"));
    let devices = concat!(
        r#""page_size": 4096, "devices": [{"name": "0:1/rtc", "instance_id": 0, "#,
        r#""vmsd_name": "toy", "version": 2, "fields": ["#,
        r#"{"name": "length", "type": "uint32", "size": 4}, "#,
        r#"{"name": "data", "type": "buffer", "size": 3}, "#,
        r#"{"name": "sum", "type": "uint16", "size": 2}]}, "#,
        r#"{"name": "slirp", "instance_id": 0, "size": 7, "fields": ["#,
        r#"{"name": "data", "size": 7, "type": "buffer"}]}]}"#,
    );
    let configuration = concat!(
        r#""configuration": {"vmsd_name": "configuration", "version": 1, "fields": ["#,
        r#"{"name": "len", "type": "uint32", "size": 4}, "#,
        r#"{"name": "name", "type": "buffer", "size": 4}]}, "#,
    );
    let seven = text_of(Describe::As(Dialect::Qemu7));
    assert_eq!(seven, Some(format!("{{{devices}")));
    let ten = text_of(Describe::As(Dialect::Qemu10));
    assert_eq!(ten, Some(format!("{{{configuration}{devices}")));
    let read = VmDescription::parse(seven.unwrap_or_default().as_bytes()).expect("ours");
    assert!(matches!(read.devices[1].body, BodyLayout::OldStyle { .. }));
}

/// As QEMU 10.0 described this configuration.
#[test]
fn a_whole_configuration_is_described() {
    let opening = Opening {
        machine: Machine {
            capabilities: Some(vec![name("x-ignore-shared"), name("validate-uuid")]),
            uuid: Some([7; 16]),
            ..Machine::named(name("microvm"))
        },
        describe: Describe::As(Dialect::Qemu10),
        ..Opening::default()
    };
    let bytes = saved(&opening, &mut Registry::new());
    let expected = concat!(
        r#"{"configuration": {"vmsd_name": "configuration", "version": 1, "fields": ["#,
        r#"{"name": "len", "type": "uint32", "size": 4}, "#,
        r#"{"name": "name", "type": "buffer", "size": 7}], "subsections": ["#,
        r#"{"vmsd_name": "configuration/capabilities", "version": 1, "fields": ["#,
        r#"{"name": "caps_count", "type": "uint32", "size": 4}, "#,
        r#"{"name": "capabilities", "type": "capability", "size": 16}]}, "#,
        r#"{"vmsd_name": "configuration/uuid", "version": 1, "fields": ["#,
        r#"{"name": "uuid.data", "array_len": 16, "type": "uint8", "size": 1}]}]}, "#,
        r#""page_size": 4096, "devices": []}"#,
    );
    assert!(String::from_utf8_lossy(&bytes).ends_with(expected));
}

/// What a real QEMU 10.0 sent, with two capabilities on: bytes and description of its configuration.
#[test]
fn several_capabilities_are_described_as_by_a_real_qemu() {
    let sent = b"\x07\0\0\0\x04none\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x02\
        \x0fx-ignore-shared\x0amapped-ram";
    let text = concat!(
        r#"{"configuration": {"vmsd_name": "configuration", "version": 1, "fields": ["#,
        r#"{"name": "len", "type": "uint32", "size": 4}, "#,
        r#"{"name": "name", "type": "buffer", "size": 4}], "subsections": ["#,
        r#"{"vmsd_name": "configuration/capabilities", "version": 1, "fields": ["#,
        r#"{"name": "caps_count", "type": "uint32", "size": 4}, "#,
        r#"{"name": "capabilities", "array_len": 2, "type": "capability", "size": 16}]}]}, "#,
        r#""page_size": 4096, "devices": []}"#,
    );
    let opening = Opening {
        machine: Machine {
            capabilities: Some(["mapped-ram", "xbzrle", "x-ignore-shared"].map(name).into()),
            ..Machine::named(name("none"))
        },
        describe: Describe::As(Dialect::Qemu10),
        ..Opening::default()
    };
    let bytes = saved(&opening, &mut Registry::new());
    let length = u32::try_from(text.len()).expect("short").to_be_bytes();
    let expected = [
        b"QEVM\0\0\0\x03",
        &sent[..],
        b"\0\x06",
        &length,
        text.as_bytes(),
    ];
    assert_eq!(
        String::from_utf8_lossy(&bytes),
        String::from_utf8_lossy(&expected.concat())
    );

    // And what it described is found in what it sent.
    let layout = VmDescription::parse(text.as_bytes()).expect("readable");
    let configuration = layout.configuration.expect("there");
    let (_, body) = sent.split_first().expect("a type byte");
    let decoded = configuration.decode(body).expect("as described");
    let mut again = Vec::new();
    decoded.encode(&mut again);
    assert_eq!(again, body);
    let capabilities = decoded.subsection("configuration/capabilities");
    let names = capabilities.and_then(|it| it.field("capabilities"));
    let names: Vec<_> = names.expect("there").values().collect();
    let expected = [&b"\x0fx-ignore-shared"[..], b"\x0amapped-ram"];
    assert_eq!(names, expected.map(Value::Bytes));
    for cut in 1..=27 {
        configuration
            .decode(&body[..body.len() - cut])
            .expect_err("truncated in a name");
    }
}

/// Described bytes are the bytes of the section, also with page bits and several capabilities.
#[test]
fn the_described_configuration_has_the_bytes_of_the_real_one() {
    let opening = Opening {
        machine: Machine {
            page_bits: PageBits::new(16).expect("known"),
            capabilities: Some(
                ["mapped-ram", "x-ignore-shared", "validate-uuid"]
                    .map(name)
                    .into(),
            ),
            uuid: Some([7; 16]),
            ..Machine::named(name("virt-9.2"))
        },
        describe: Describe::As(Dialect::Qemu10),
        ..Opening::default()
    };
    let bytes = saved(&opening, &mut Registry::new());
    let at = bytes
        .windows(9)
        .position(|w| w == b"{\"configu")
        .expect("described");
    let layout = VmDescription::parse(&bytes[at..]).expect("readable");
    let configuration = layout.configuration.expect("there");
    // Between the type byte of the configuration, and EOF and the description's header.
    let body = &bytes[9..at - 6];
    let mut again = Vec::new();
    configuration
        .decode(body)
        .expect("as described")
        .encode(&mut again);
    assert_eq!(again, body);
    assert_eq!(layout.page_bytes, 65536);
}

#[test]
fn a_failing_device_is_named_and_nothing_of_it_is_sent() {
    let mut device = toy(&state(b"x"));
    device.fails_at = "pre_save";
    let mut registry = Registry::new();
    let device = Registration::device("rtc", device).instance(vmferry_stream::InstanceId(3));
    registry.register(device).expect("free");
    let mut sink = Bytes::default();
    let error = save(&Opening::default(), &mut registry, &mut sink).expect_err("it fails");
    assert_eq!(
        error.to_string(),
        "device 'rtc' instance 3: pre_save of 'toy': out of luck"
    );
    assert_eq!(sink.bytes, head(""));
}

#[test]
fn device_state_alone_goes_over_alone() {
    let log = Log::default();
    let stopped = GuestStopped::assert_drained();
    let (early, late) = (state(b"early"), state(b"late"));
    let mut source = Registry::new();
    for registration in [
        Registration::saving("block", 1, Box::new(scripted("a", &log))),
        Registration::device("late", toy(&late)),
        Registration::early_device("early", toy(&early)),
    ] {
        source.register(registration).expect("free");
    }
    for footers in [true, false] {
        let mut sink = Bytes::default();
        save_device_state(footers, &stopped, &mut source, &mut sink).expect("saved");
        let cut = if footers { 0 } else { 5 };
        let full = |id, idstr, data: &[u8]| {
            let mut full = section(4, id, idstr, 2, &toy_body(data));
            full.truncate(full.len() - cut);
            full
        };
        let (a, b) = (full(2, "late", b"late"), full(3, "early", b"early"));
        let expected = [b"QEVM\0\0\0\x03", &a[..], &b, b"\0"].concat();
        assert_eq!(sink.bytes, expected);
        assert_eq!(taken(&log), [""; 0]);

        let (to_early, to_late) = (state(b""), state(b""));
        let mut target = Registry::new();
        for registration in [
            Registration::loading("block", 1..=1, loader(&log, "")),
            Registration::device("early", toy(&to_early)),
            Registration::device("late", toy(&to_late)),
        ] {
            target.register(registration).expect("free");
        }
        let layout = if footers {
            Footers::Present
        } else {
            Footers::Absent
        };
        let mut machine = LoadMachine::of_device_state(layout, &stopped);
        load(&mut machine, &mut target, &sink.bytes).expect("loaded");
        assert_eq!(
            (&lock(&to_early)[..], &lock(&to_late)[..]),
            (&b"early"[..], &b"late"[..])
        );
    }
}

#[test]
fn device_state_has_no_memory_disks_or_unknown_devices() {
    let log = Log::default();
    let stopped = GuestStopped::assert_drained();
    let mut registry = Registry::new();
    for live in ["ram", "block"] {
        let loading = Registration::loading(live, 1..=4, loader(&log, ""));
        registry.register(loading).expect("free");
    }
    let device = Registration::device("rtc", toy(&state(b"")));
    registry.register(device).expect("free");
    let mut refused = |rest: &[u8], words: &str| {
        let bytes = [&b"QEVM\0\0\0\x03"[..], rest].concat();
        let mut machine = LoadMachine::of_device_state(Footers::Present, &stopped);
        let error = load(&mut machine, &mut registry, &bytes).expect_err(words);
        assert_eq!(error.blame(), Blame::Peer);
        assert!(error.to_string().contains(words), "{error}");
        error
    };
    let live = " is live, but only the state of devices is loaded here";
    for (kind, idstr, version) in [(1, "ram", 4), (4, "ram", 4), (1, "block", 1), (1, "rtc", 2)] {
        let words = format!("section '{idstr}' instance 0 (id 0x5){live}");
        let error = refused(&section(kind, 5, idstr, version, &EOS), &words);
        assert!(matches!(error, LoadError::NotADevice { .. }));
    }
    refused(
        &section(4, 5, "pit", 2, &toy_body(b"")),
        "unknown section 'pit' instance 0: no such device is here",
    );
    refused(
        &head("")[8..],
        "configuration section where none is expected",
    );
    assert_eq!(taken(&log), [""; 0]);
}
