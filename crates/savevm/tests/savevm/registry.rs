//! Who may be registered, under which name and number, in which order, and what blocks.

use std::ops::RangeInclusive;

use vmferry_savevm::{
    Blocked, GuestStopped, LoadError, LoadMachine, LoadOptions, Opening, Priority, RegisterError,
    Registration, Registry, SaveError, begin, save_device_state,
};
use vmferry_stream::{Blame, Footers, InstanceId, SectionId};
use vmferry_vmstate::{Count, Description, Field};

use crate::parts::{
    Bytes, Log, TAIL, ToyState, head, instance, load, loader, lock, name, old_toy, scripted, state,
    toy, toy_body,
};

fn ids(registry: &Registry<'_>) -> Vec<(String, u32, u32)> {
    let id =
        |e: &vmferry_savevm::Entry<'_>| (e.idstr().to_string(), e.instance().0, e.section_id().0);
    registry.entries().map(id).collect()
}

/// Load one FULL section of a toy, which must arrive in `expected`; or nobody is found.
fn arrives(
    registry: &mut Registry<'_>,
    idstr: &str,
    number: u8,
    version: u8,
    expected: Option<&ToyState>,
) {
    let body = toy_body(b"here");
    let body = if version == 1 { &body[..8] } else { &body };
    let section = instance(4, 9, idstr, number, version, body);
    let bytes = [head(""), section, TAIL.to_vec()].concat();
    let options = LoadOptions {
        refuse_rest: Some("no such device"),
        ..LoadOptions::default()
    };
    let loaded = load(&mut LoadMachine::new(options), registry, &bytes);
    match expected {
        Some(state) => {
            loaded.expect("found");
            assert_eq!(std::mem::take(&mut *lock(state)).0, b"here");
        }
        None => {
            let error = loaded.expect_err("nobody").to_string();
            let words = format!("unknown section '{idstr}' instance {number}: no such device");
            assert!(error.ends_with(&words), "{error}");
        }
    }
}

#[test]
fn higher_priorities_first_then_as_registered() {
    let log = Log::default();
    let mut registry = Registry::new();
    for (index, priority) in [0, 5, 0, 5, 9].into_iter().enumerate() {
        let script = Box::new(scripted("x", &log));
        let section = Registration::saving(&format!("s{index}"), 1, script);
        let id = registry.register(section.priority(Priority(priority)));
        assert_eq!(id, Ok(SectionId(index as u32 + 1)));
    }
    let expected = [("s4", 5), ("s1", 2), ("s3", 4), ("s0", 1), ("s2", 3)];
    assert_eq!(
        ids(&registry),
        expected.map(|(name, id)| (name.to_owned(), 0, id))
    );
}

#[test]
fn instances_are_counted_and_never_taken_twice() {
    let mut registry = Registry::new();
    let mut register = |instance| {
        let dma = Registration::device("dma", toy(&state(b"")));
        registry.register(match instance {
            Some(instance) => dma.instance(InstanceId(instance)),
            None => dma,
        })
    };
    register(None).expect("0");
    register(Some(7)).expect("7");
    register(None).expect("8");
    for taken in [0, 7, 8] {
        let error = register(Some(taken)).expect_err("taken");
        assert_eq!(
            error,
            RegisterError::Taken {
                idstr: name("dma"),
                instance: InstanceId(taken)
            }
        );
        let words = format!("section 'dma' instance {taken} is registered already");
        assert_eq!(error.to_string(), words);
    }
    let numbers: Vec<_> = registry.entries().map(|e| e.instance().0).collect();
    assert_eq!(numbers, [0, 7, 8]);
}

#[test]
fn path_and_name_fit_into_255_bytes() {
    for (path, fits) in [(250, true), (251, false)] {
        let mut registry = Registry::new();
        let device = Registration::device("disk", toy(&state(b"")));
        let registered = registry.register(device.at(&"p".repeat(path)));
        assert_eq!(registered.is_ok(), fits);
        match registered {
            Ok(_) => assert_eq!(registry.entries().next().expect("one").idstr().len(), 255),
            Err(error) => {
                assert!(matches!(error, RegisterError::NameTooLong { .. }));
                assert!(error.to_string().contains("has a name of 256 bytes"));
            }
        }
    }
}

/// With its path, or as streams without paths count devices of that name.
#[test]
fn a_device_on_a_bus_answers_to_two_names() {
    let states = [state(b""), state(b""), state(b""), state(b"")];
    let mut registry = Registry::new();
    let mut register = |path, which: usize, number: Option<u32>| {
        let device = Registration::device("nic", toy(&states[which])).at(path);
        registry.register(match number {
            Some(number) => device.instance(InstanceId(number)),
            None => device,
        })
    };
    register("0:3", 0, None).expect("nic 0");
    register("0:4", 1, Some(5)).expect("nic 5");
    register("0:5", 2, None).expect("nic 6");
    registry
        .register(Registration::device("other", toy(&states[3])).at("0:3"))
        .expect("other 0");
    let own: Vec<_> = ids(&registry)
        .into_iter()
        .map(|(name, n, _)| (name, n))
        .collect();
    let expected = ["0:3/nic", "0:4/nic", "0:5/nic", "0:3/other"];
    assert_eq!(own, expected.map(|name| (name.to_owned(), 0)));

    for (idstr, number, which) in [
        ("0:3/nic", 0, Some(0)),
        ("0:4/nic", 0, Some(1)),
        ("nic", 0, Some(0)),
        ("nic", 5, Some(1)),
        ("nic", 6, Some(2)),
        ("other", 0, Some(3)),
        ("nic", 1, None),
        ("0:4/nic", 5, None),
        ("0:3", 0, None),
        ("ni", 0, None),
        ("0:9/nic", 0, None),
    ] {
        arrives(
            &mut registry,
            idstr,
            number,
            2,
            which.map(|k: usize| &states[k]),
        );
    }
}

/// In every version that is read, and under the name without the path too: what requires the alias
/// matters when registering alone.
#[test]
fn an_alias_is_a_second_instance_of_each_name() {
    let (rtc, nic) = (state(b""), state(b""));
    let mut registry = Registry::new();
    let device = Registration::device("rtc", toy(&rtc)).alias(InstanceId(3), 2);
    registry.register(device).expect("free");
    let device = Registration::device("nic", toy(&nic)).at("0:4");
    let device = device.instance(InstanceId(1)).alias(InstanceId(0x70), 2);
    registry.register(device).expect("free");
    for (idstr, number, found) in [
        ("rtc", 0, Some(&rtc)),
        ("rtc", 3, Some(&rtc)),
        ("rtc", 2, None),
        ("0:4/nic", 0, Some(&nic)),
        ("0:4/nic", 0x70, Some(&nic)),
        ("nic", 1, Some(&nic)),
        ("nic", 0x70, Some(&nic)),
        ("nic", 0, None),
        ("0:4/nic", 1, None),
        ("0:3/nic", 0x70, None),
    ] {
        for version in [1, 2] {
            arrives(&mut registry, idstr, number, version, found);
        }
    }
    for (required_for, accepted) in [(0, false), (1, true)] {
        let device = Registration::device("pit", toy(&rtc)).alias(InstanceId(3), required_for);
        let registered = registry.register(device);
        assert_eq!(registered.is_ok(), accepted);
        if let Err(error) = registered {
            assert_eq!(
                error.to_string(),
                "section 'pit': its alias is required for version 0, but version 1 is the lowest \
                 that is read"
            );
        }
    }
}

#[test]
fn what_was_unregistered_is_not_found_and_its_numbers_stay_unused() {
    let (serial, first, second) = (state(b""), state(b""), state(b""));
    let mut registry = Registry::new();
    let serial_at = Registration::device("serial", toy(&serial)).at("0:1");
    registry.register(serial_at).expect("1");
    for state in [&first, &second] {
        let device = Registration::device("dma", toy(state));
        registry.register(device).expect("2 and 3");
    }
    assert!(registry.unregister(None, "serial").is_empty());
    assert!(registry.unregister(Some("0:2"), "serial").is_empty());
    assert_eq!(registry.unregister(Some("0:1"), "serial").len(), 1);
    arrives(&mut registry, "0:1/serial", 0, 2, None);
    arrives(&mut registry, "serial", 0, 2, None);

    assert!(registry.remove(SectionId(9)).is_none());
    let removed = registry.remove(SectionId(2)).expect("dma 0");
    assert_eq!((removed.idstr().as_str(), removed.instance().0), ("dma", 0));
    arrives(&mut registry, "dma", 0, 2, None);
    arrives(&mut registry, "dma", 1, 2, Some(&second));
    let id = registry.register(Registration::device("dma", toy(&first)));
    assert_eq!(id, Ok(SectionId(4)));
    assert_eq!(registry.unregister(None, "dma").len(), 2);
    assert_eq!(registry.entries().count(), 0);
}

#[test]
fn what_cannot_be_is_refused() {
    let log = Log::default();
    let refused = |registration: Registration<'_>, words: &str| {
        let error = Registry::new().register(registration).expect_err(words);
        assert_eq!(error.to_string(), words);
    };
    let it = state(b"");
    refused(
        Registration::device("slirp", Box::new(old_toy(&it))),
        "device 'slirp' has no description",
    );
    let empty = RangeInclusive::new(3, 2);
    refused(
        Registration::loading("block", empty, loader(&log, "")),
        "section 'block': lowest version 3 is above version 2",
    );
    let only = "the bodies of 'block', 'ram' and 'dirty-bitmap', and only those, are received live";
    for reserved in ["block", "ram", "dirty-bitmap"] {
        let words = format!("section '{reserved}' cannot be a device: {only}");
        refused(Registration::device(reserved, toy(&it)), &words);
        let device = Registration::device(reserved, toy(&it)).at("0:1");
        Registry::new().register(device).expect("another name");
    }
    refused(
        Registration::loading("vfio", 1..=1, loader(&log, "")),
        &format!("section 'vfio' cannot be received live: {only}"),
    );
}

#[test]
fn an_unmigratable_device_blocks_both_directions_by_name() {
    let mut device = toy(&state(b""));
    if let Some(description) = &mut device.description {
        description.unmigratable = true;
    }
    let mut registry = Registry::new();
    let good = Registration::device("rtc", toy(&state(b"")));
    registry.register(good).expect("free");
    let bad = Registration::device("ivshmem", device).at("0:5");
    registry.register(bad).expect("free");
    let words = "device '0:5/ivshmem' instance 0 cannot be migrated";

    let mut sink = Bytes::default();
    let stopped = GuestStopped::assert_drained();
    let begun = begin(&Opening::default(), &mut registry, &mut sink);
    let alone = save_device_state(true, &stopped, &mut registry, &mut sink);
    for error in [begun.expect_err("blocked"), alone.expect_err("blocked")] {
        assert!(matches!(error, SaveError::Blocked(Blocked::Device { .. })));
        assert_eq!(error.to_string(), words);
    }
    assert!(sink.bytes.is_empty());

    for mut machine in [
        LoadMachine::new(LoadOptions::default()),
        LoadMachine::of_device_state(Footers::Auto, &stopped),
    ] {
        let error = load(&mut machine, &mut registry, b"QEVM\0\0\0\x03").expect_err("blocked");
        assert!(matches!(error, LoadError::Blocked(_)));
        assert_eq!(error.blame(), Blame::Caller);
        assert_eq!(error.to_string(), words);
    }
    registry.unregister(Some("0:5"), "ivshmem");
    begin(&Opening::default(), &mut registry, &mut sink).expect("it is gone");
}

/// Its state cannot be sent, wherever in the device it is.
#[test]
fn an_unmigratable_part_blocks_its_device() {
    let part = |unmigratable| Description {
        name: "toy/part".into(),
        version: 1,
        minimum_version: 1,
        unmigratable,
        fields: Vec::new(),
        subsections: Vec::new(),
    };
    let of_struct = |inner| Field {
        name: "part".into(),
        type_name: "struct".into(),
        since: 0,
        conditional: true,
        count: Count::Variable,
        element_bytes: None,
        inner: Some(inner),
    };
    let owner = |fields, subsections| Description {
        fields,
        subsections,
        ..part(false)
    };
    for unmigratable in [true, false] {
        for description in [
            owner(vec![of_struct(part(unmigratable))], vec![]),
            owner(vec![], vec![part(false), part(unmigratable)]),
            owner(
                vec![],
                vec![owner(vec![of_struct(part(unmigratable))], vec![])],
            ),
        ] {
            let mut device = toy(&state(b""));
            device.description = Some(description);
            let mut registry = Registry::new();
            let device = Registration::device("nic", device).at("0:5");
            registry.register(device).expect("free");
            for checked in [registry.check_saving(), registry.check_loading()] {
                let error = checked.err().map(|error| error.to_string());
                let words = "device '0:5/nic' instance 0 cannot be migrated";
                assert_eq!(error.as_deref(), unmigratable.then_some(words));
            }
        }
    }
}

#[test]
fn blockers_keep_from_saving_until_all_are_taken_back() {
    let mut registry = Registry::new();
    let first = registry.add_blocker("a snapshot is being made");
    let second = registry.add_blocker("vhost-user has no log");
    let blocked = |registry: &mut Registry<'_>| {
        let begun = begin(&Opening::default(), registry, &mut Bytes::default());
        begun.err().map(|error| error.to_string())
    };
    let both = "migration is blocked: a snapshot is being made; vhost-user has no log";
    assert_eq!(blocked(&mut registry).as_deref(), Some(both));
    registry.remove_blocker(first);
    registry.remove_blocker(first);
    let one = "migration is blocked: vhost-user has no log";
    assert_eq!(blocked(&mut registry).as_deref(), Some(one));
    registry.check_loading().expect("blockers are about saving");
    registry.remove_blocker(second);
    assert_eq!(blocked(&mut registry), None);
}
