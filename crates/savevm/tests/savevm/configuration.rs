//! What a destination says to a source's configuration.

use vmferry_savevm::{
    LoadError, LoadMachine, LoadOptions, Machine, Mismatch, Notice, Opening, Registry,
};
use vmferry_stream::{Blame, Expect, Name, Options, PageBits};

use crate::parts::{TAIL, load, name, saved};

fn machine(capabilities: &[&str]) -> Machine {
    Machine {
        capabilities: Some(capabilities.iter().map(|it| name(it)).collect()),
        ..Machine::named(name("pc-i440fx-7.2"))
    }
}

fn received(bytes: &[u8], local: Option<&Machine>) -> Result<Vec<Notice>, LoadError> {
    let mut machine = LoadMachine::new(LoadOptions {
        machine: local.cloned(),
        ..LoadOptions::default()
    });
    load(&mut machine, &mut Registry::new(), bytes)?;
    Ok(machine.notices().to_vec())
}

/// A stream of `source` comes to `local`.
fn meet(source: &Machine, local: &Machine) -> Result<Vec<Notice>, Mismatch> {
    let opening = Opening {
        machine: source.clone(),
        ..Opening::default()
    };
    let bytes = saved(&opening, &mut Registry::new());
    received(&bytes, None).expect("any machine is taken");
    match received(&bytes, Some(local)) {
        Ok(notices) => Ok(notices),
        Err(error) => {
            assert_eq!(error.blame(), Blame::Peer);
            let words = error.to_string();
            let LoadError::Mismatch(mismatch) = error else {
                panic!("{error}");
            };
            assert_eq!(mismatch.to_string(), words);
            Err(mismatch)
        }
    }
}

#[test]
fn any_beginning_of_the_name_will_do() {
    let local = machine(&[]);
    for (name, fits) in [
        ("", true),
        ("pc", true),
        ("pc-i440fx-7.2", true),
        ("pc-i440fx-7.22", false),
        ("q35", false),
    ] {
        let source = Machine::named(Name::new(name).expect("short"));
        match meet(&source, &local) {
            Ok(_) => assert!(fits, "{name}"),
            Err(error) => {
                assert!(!fits, "{name}");
                let words = format!("received machine '{name}', here is 'pc-i440fx-7.2'");
                assert_eq!(error.to_string(), words);
            }
        }
    }
}

#[test]
fn pages_have_one_size() {
    let bits = |bits, smallest| Machine {
        page_bits: PageBits::new(bits).expect("known"),
        smallest_page_bits: PageBits::new(smallest).expect("known"),
        ..machine(&[])
    };
    for (source, local, wrong) in [
        (bits(12, 12), bits(12, 12), None),
        // Sent, although it is the smallest here.
        (bits(12, 10), bits(12, 12), None),
        (bits(14, 12), bits(14, 12), None),
        // Not sent: the smallest here.
        (bits(12, 12), bits(10, 10), None),
        (bits(14, 12), bits(12, 12), Some((14, 12))),
        (bits(10, 10), bits(14, 10), Some((10, 14))),
    ] {
        let result = meet(&source, &local);
        let wrong = wrong.map(|(received, local)| Mismatch::PageBits { received, local });
        assert_eq!(result.err(), wrong);
    }
    let error = meet(&bits(14, 12), &bits(12, 12)).expect_err("different");
    assert_eq!(
        error.to_string(),
        "received guest pages of 2^14 bytes, here they have 2^12"
    );
}

#[test]
fn capabilities_that_change_the_stream_are_equal() {
    for checked in ["x-ignore-shared", "mapped-ram"] {
        meet(&machine(&[checked]), &machine(&["xbzrle", checked])).expect("equal");
        let error = meet(&machine(&[checked]), &machine(&[])).expect_err("not here");
        let words = format!("capability '{checked}' is off here, but on at the source");
        assert_eq!(error.to_string(), words);
        let error = meet(&machine(&[]), &machine(&[checked])).expect_err("not there");
        let words = format!("capability '{checked}' is on here, but off at the source");
        assert_eq!(error.to_string(), words);
        let indifferent = Machine {
            capabilities: None,
            ..machine(&[])
        };
        meet(&machine(&[checked]), &indifferent).expect("not compared");
    }
    meet(&machine(&["xbzrle", "events"]), &machine(&["multifd"])).expect("nobody else's business");
}

#[test]
fn unknown_capabilities_are_refused_and_known_ones_ignored() {
    let with = |capability: &str| {
        let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0\0\x05\x1aconfiguration/capabilities".to_vec();
        bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, capability.len() as u8]);
        bytes.extend(capability.bytes());
        bytes.extend(TAIL);
        received(&bytes, Some(&machine(&[])))
    };
    for known in ["block", "zero-blocks", "xbzrle", "switchover-ack"] {
        with(known).expect(known);
    }
    let error = with("x-ray").expect_err("unknown");
    assert_eq!(
        error.to_string(),
        "the source has the unknown capability 'x-ray' on"
    );
}

#[test]
fn a_guest_has_one_uuid() {
    let with = |uuid| Machine {
        uuid,
        ..machine(&["validate-uuid"])
    };
    let (one, other) = (Some([0x11; 16]), Some(*b"0123456789abcdef"));
    assert_eq!(meet(&with(one), &with(one)), Ok(vec![]));
    assert_eq!(meet(&with(None), &with(one)), Ok(vec![]));
    assert_eq!(
        meet(&with(one), &with(None)),
        Ok(vec![Notice::UuidNotCompared])
    );
    let error = meet(&with(one), &with(other)).expect_err("two guests");
    assert_eq!(
        error.to_string(),
        "received the guest with UUID 11111111-1111-1111-1111-111111111111, here is \
         30313233-3435-3637-3839-616263646566"
    );
}

#[test]
fn a_configuration_can_be_required() {
    let bare = [b"QEVM\0\0\0\x03", TAIL].concat();
    for (configuration, accepted) in [
        (Expect::Optional, true),
        (Expect::Absent, true),
        (Expect::Required, false),
    ] {
        let mut machine = LoadMachine::new(LoadOptions {
            stream: Options {
                configuration,
                ..Options::default()
            },
            machine: Some(machine(&["mapped-ram"])),
            ..LoadOptions::default()
        });
        let loaded = load(&mut machine, &mut Registry::new(), &bare);
        assert_eq!(loaded.is_ok(), accepted, "{configuration:?}");
        if let Err(error) = loaded {
            let words = "configuration section missing: byte 0x00 instead of 0x07";
            assert!(error.to_string().starts_with(words), "{error}");
        }
    }
}
