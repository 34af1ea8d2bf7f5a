//! Live handlers in both machines: order, rounds, who may complete, what is owned and what is
//! passed on.

use std::time::Duration;

use vmferry_savevm::{
    Describe, DirtyTotal, GuestStopped, LoadError, LoadMachine, LoadOptions, Machine, Opening,
    Pending, Progress, Ready, Registration, Registry, TotalPending, begin, cleanup, load_cleanup,
};
use vmferry_stream::{Blame, Command, Ending, Record, SectionKind};

use crate::parts::{
    Bytes, EOS, Loaded, Log, NOTHING_LEFT, Scripted, TAIL, head, load as load_with, loader, name,
    records, save, scripted, section, taken,
};

/// `block` sections 0, 1, …, one for each script.
fn registry(scripts: Vec<Scripted>) -> Registry<'static> {
    let mut registry = Registry::new();
    for script in scripts {
        let saving = Registration::saving("block", 1, Box::new(script));
        registry.register(saving).expect("free");
    }
    registry
}

#[test]
fn a_whole_save() {
    let log = Log::default();
    let mut registry = registry(vec![scripted("a", &log), scripted("b", &log)]);
    let mut sink = Bytes::default();
    let opening = Opening {
        machine: Machine::named(name("none")),
        describe: Describe::Empty,
        commands: vec![Command::OpenReturnPath, Command::Ping(1)],
        ..Opening::default()
    };
    let mut iterating = begin(&opening, &mut registry, &mut sink).expect("begun");
    let progress = iterating
        .iterate(&mut registry, &mut sink)
        .expect("iterated");
    assert_eq!(progress, Progress::Finished);
    iterating
        .command(Command::Ping(2), &mut sink)
        .expect("sent");
    let Ready::Go(completing) = iterating.try_complete(&mut registry, |_| true) else {
        panic!("nothing is left");
    };
    let stopped = GuestStopped::assert_drained();
    let ended = completing
        .end_live(&stopped, &mut registry, Some(3), &mut sink)
        .expect("ended")
        .save_devices(&stopped, &mut registry, &mut sink)
        .expect("there are none");
    let before = sink.bytes.len();
    sink.puts_left = Some(1);
    ended
        .finish(&mut sink)
        .expect("EOF and description are one piece");
    assert_eq!(&sink.bytes[before..], b"\0\x06\0\0\0\x02{}");
    cleanup(&mut registry);
    let expected = [
        "a setup",
        "b setup",
        "a iterate",
        "b iterate",
        "a complete",
        "b complete",
        "a cleanup",
        "b cleanup",
    ];
    assert_eq!(taken(&log), expected);

    let kinds: Vec<_> = records(&sink.bytes)
        .iter()
        .filter_map(|record| match record {
            Record::Section(section) => Some((section.kind, section.id.0, section.instance.0)),
            _ => None,
        })
        .collect();
    use SectionKind::{End, Part, Start};
    assert_eq!(
        kinds,
        [
            (Start, 1, 0),
            (Start, 2, 1),
            (Part, 1, 0),
            (Part, 2, 1),
            (End, 1, 0),
            (End, 2, 1)
        ]
    );
    let commands: Vec<_> = records(&sink.bytes)
        .into_iter()
        .filter(|record| matches!(record, Record::Command(_)))
        .collect();
    let ping = |value| Record::Command(Command::Ping(value));
    let open = Record::Command(Command::OpenReturnPath);
    assert_eq!(commands, [open, ping(1), ping(2), ping(3)]);
}

/// What changes fast is not sent again and again while another is in its bulk phase.
#[test]
fn a_round_ends_after_the_first_that_is_in_its_bulk_phase() {
    let log = Log::default();
    let bulk = Pending::Bulk { bytes: 1 };
    let dirty = Pending::Dirty {
        bytes: 1,
        later_bytes: 0,
        read_time: Duration::ZERO,
    };
    for (first, pending, asked) in [
        (Progress::Unfinished, bulk, &["a iterate"][..]),
        (Progress::Waiting, bulk, &["a iterate"]),
        (Progress::Unfinished, dirty, &["a iterate", "b iterate"]),
        (Progress::Finished, dirty, &["a iterate", "b iterate"]),
    ] {
        let mut a = scripted("a", &log);
        (a.progress, a.pending) = (first, pending);
        let mut registry = registry(vec![a, scripted("b", &log)]);
        let mut sink = Bytes::default();
        let mut iterating = begin(&Opening::default(), &mut registry, &mut sink).expect("begun");
        taken(&log);
        let progress = iterating
            .iterate(&mut registry, &mut sink)
            .expect("iterated");
        assert_eq!(progress, first);
        assert_eq!(taken(&log), asked);
    }
}

/// A guest dirties `a` as fast as the limit lets it go: `b` gets its share.
#[test]
fn who_found_no_allowance_is_first_in_the_next_round() {
    let log = Log::default();
    let mut a = scripted("a", &log);
    a.progress = Progress::Unfinished;
    let mut registry = registry(vec![a, scripted("b", &log)]);
    let mut sink = Bytes::default();
    let mut iterating = begin(&Opening::default(), &mut registry, &mut sink).expect("begun");
    let mut rounds = Vec::new();
    for _ in 0..4 {
        sink.slice = Some(sink.bytes.len());
        taken(&log);
        let progress = iterating.iterate(&mut registry, &mut sink);
        assert_eq!(progress.expect("iterated"), Progress::Unfinished);
        rounds.extend(
            taken(&log)
                .into_iter()
                .filter(|call| call.ends_with("iterate")),
        );
    }
    assert_eq!(rounds, ["a iterate", "b iterate", "a iterate", "b iterate"]);
}

#[test]
fn without_allowance_nothing_is_sent() {
    let log = Log::default();
    let mut registry = registry(vec![scripted("a", &log)]);
    let mut sink = Bytes::default();
    let mut iterating = begin(&Opening::default(), &mut registry, &mut sink).expect("begun");
    let before = sink.bytes.len();
    sink.exhausted = true;
    let progress = iterating
        .iterate(&mut registry, &mut sink)
        .expect("iterated");
    assert_eq!(progress, Progress::Unfinished);
    assert_eq!(sink.bytes.len(), before);
}

/// The flaw of QEMU's block migration: little is pending, but the first pass is not over.
#[test]
fn nobody_completes_in_a_bulk_phase() {
    let log = Log::default();
    let dirty = Pending::Dirty {
        bytes: 30,
        later_bytes: 0,
        read_time: Duration::from_millis(4),
    };
    for (first, second, total) in [
        (
            Pending::Bulk { bytes: 0 },
            NOTHING_LEFT,
            TotalPending::Bulk { bytes: 0 },
        ),
        (
            dirty,
            Pending::Bulk { bytes: 5 },
            TotalPending::Bulk { bytes: 35 },
        ),
        (
            Pending::Bulk { bytes: 1 },
            Pending::Bulk { bytes: 2 },
            TotalPending::Bulk { bytes: 3 },
        ),
    ] {
        let (mut a, mut b) = (scripted("a", &log), scripted("b", &log));
        (a.pending, b.pending) = (first, second);
        let mut registry = registry(vec![a, b]);
        let mut sink = Bytes::default();
        let iterating = begin(&Opening::default(), &mut registry, &mut sink).expect("begun");
        assert_eq!(iterating.pending(&mut registry), total);
        let ready = iterating.try_complete(&mut registry, |_| panic!("not even asked"));
        assert!(matches!(ready, Ready::NotYet(_, pending) if pending == total));
    }
}

#[test]
fn what_is_dirty_is_summed_and_judged() {
    let log = Log::default();
    let (mut a, mut b) = (scripted("a", &log), scripted("b", &log));
    a.pending = Pending::Dirty {
        bytes: 10,
        later_bytes: 0,
        read_time: Duration::from_millis(1),
    };
    b.pending = Pending::Dirty {
        bytes: 15,
        later_bytes: 5,
        read_time: Duration::from_millis(2),
    };
    let total = DirtyTotal {
        bytes: 30,
        later_bytes: 0,
        read_time: Duration::from_millis(3),
    };
    let mut registry = registry(vec![a, b]);
    let mut sink = Bytes::default();
    let iterating = begin(&Opening::default(), &mut registry, &mut sink).expect("begun");
    let Ready::NotYet(iterating, pending) = iterating.try_complete(&mut registry, |dirty| {
        assert_eq!(*dirty, total);
        false
    }) else {
        panic!("it does not fit");
    };
    assert_eq!(pending, TotalPending::Dirty(total));
    assert!(matches!(
        iterating.try_complete(&mut registry, |_| true),
        Ready::Go(_)
    ));
}

#[test]
fn a_failure_names_its_section_and_leaves_handlers_to_clean_up() {
    for step in ["setup", "iterate", "complete"] {
        let log = Log::default();
        let mut b = scripted("b", &log);
        b.fails_at = step;
        let mut registry = registry(vec![scripted("a", &log), b]);
        let mut sink = Bytes::default();
        let error = save(&Opening::default(), &mut registry, &mut sink).expect_err(step);
        assert_eq!(error.to_string(), "section 'block' instance 1: out of luck");
        cleanup(&mut registry);
        let log = taken(&log);
        assert_eq!(log[log.len() - 2..], ["a cleanup", "b cleanup"]);
    }
}

/// Whichever write fails, the save fails, and no earlier.
#[test]
fn a_broken_channel_is_noticed_at_once() {
    let log = Log::default();
    let saved = |puts_left| {
        let mut registry = registry(vec![scripted("a", &log)]);
        let mut sink = Bytes {
            puts_left,
            ..Bytes::default()
        };
        (
            save(&Opening::default(), &mut registry, &mut sink),
            sink.bytes,
        )
    };
    let (whole, bytes) = saved(None);
    assert!(whole.is_ok());
    let mut puts = 0;
    loop {
        let (result, sent) = saved(Some(puts));
        assert!(bytes.starts_with(&sent));
        match result {
            Ok(()) => break,
            Err(error) => assert!(error.to_string().ends_with("broken pipe")),
        }
        puts += 1;
    }
    assert!(puts > 5);
}

fn loaders(log: &Log, fails_at: &'static str) -> Registry<'static> {
    let mut registry = Registry::new();
    let loading = Registration::loading("block", 1..=1, loader(log, fails_at));
    registry.register(loading).expect("free");
    registry
}

/// Load everything; returns the bytes of the rest.
fn load(
    bytes: &[u8],
    options: LoadOptions,
    registry: &mut Registry<'_>,
) -> Result<(Vec<u8>, Ending), LoadError> {
    let mut machine = LoadMachine::new(options);
    let Loaded { rest, ending, .. } = load_with(&mut machine, registry, bytes)?;
    Ok((rest, ending.expect("it has ended")))
}

#[test]
fn a_handler_sees_its_section_from_start_to_end() {
    let log = Log::default();
    let data = [
        &[0u8, 0, 0, 0, 0, 0, 0, 1, 1][..],
        b"d",
        &[7; 1 << 20],
        &EOS,
    ]
    .concat();
    let bytes = [
        head("none"),
        section(1, 9, "block", 1, &EOS),
        section(2, 9, "", 0, &data),
        section(3, 9, "", 0, &EOS),
        TAIL.to_vec(),
    ]
    .concat();
    let mut registry = loaders(&log, "");
    let (rest, ending) = load(&bytes, LoadOptions::default(), &mut registry).expect("loaded");
    assert_eq!(rest, [&head("none"), TAIL].concat());
    assert_eq!(ending, Ending::WithDescription);
    let expected = [
        "start", "record", "record", "payload", "filled", "record", "record", "end",
    ];
    assert_eq!(taken(&log), expected);
}

#[test]
fn a_full_section_starts_and_ends_at_once() {
    let log = Log::default();
    let bytes = [head(""), section(4, 3, "block", 1, &EOS), TAIL.to_vec()].concat();
    load(&bytes, LoadOptions::default(), &mut loaders(&log, "")).expect("loaded");
    assert_eq!(taken(&log), ["start", "record", "end"]);
}

#[test]
fn a_failing_handler_fails_the_load_by_name() {
    let data = [
        &[0u8, 0, 0, 0, 0, 0, 0, 1, 1][..],
        b"d",
        &[7; 1 << 20],
        &EOS,
    ]
    .concat();
    let bytes = [
        head(""),
        section(1, 1, "block", 1, &EOS),
        section(2, 1, "", 0, &data),
        section(3, 1, "", 0, &EOS),
        TAIL.to_vec(),
    ]
    .concat();
    for step in ["start", "record", "payload", "filled", "end"] {
        let log = Log::default();
        let mut registry = loaders(&log, step);
        let error = load(&bytes, LoadOptions::default(), &mut registry).expect_err(step);
        assert_eq!(
            error.to_string(),
            "section 'block' instance 0 (id 0x1): out of luck"
        );
        assert_eq!(error.blame(), Blame::Host);
        assert_eq!(taken(&log).last().map(String::as_str), Some(step));
        load_cleanup(&mut registry);
        assert_eq!(taken(&log), ["cleanup"]);
    }
}

#[test]
fn foreign_machines_and_sections_are_refused() {
    let log = Log::default();
    let local = |machine: &str| LoadOptions {
        machine: Some(Machine::named(name(machine))),
        refuse_rest: Some("keep it elsewhere"),
        ..LoadOptions::default()
    };
    let refused = |bytes: &[u8], machine: &str| {
        let error = load(bytes, local(machine), &mut loaders(&log, "")).expect_err("refused");
        assert_eq!(error.blame(), Blame::Peer);
        error.to_string()
    };
    let bare = |machine: &str| [&head(machine), TAIL].concat();
    assert_eq!(
        refused(&bare("q35"), ""),
        "received machine 'q35', here is ''"
    );
    assert_eq!(
        refused(&bare("q35"), "q3"),
        "received machine 'q35', here is 'q3'"
    );
    for (received, here) in [("", "q35"), ("q3", "q35"), ("q35", "q35"), ("", "")] {
        load(&bare(received), local(here), &mut loaders(&log, "")).expect("a prefix");
    }
    let device = [head(""), section(4, 3, "timer", 2, &[1; 24]), TAIL.to_vec()].concat();
    let error = refused(&device, "");
    assert!(
        error.ends_with("unknown section 'timer' instance 0: keep it elsewhere"),
        "{error}"
    );
    let newer = [head(""), section(1, 3, "block", 2, &EOS), TAIL.to_vec()].concat();
    assert!(refused(&newer, "").contains("version 2 of 'block'"));
    assert_eq!(taken(&log), [""; 0]);
}

/// Payload that nobody asked for, or for a handler that is not at work.
#[test]
fn payload_without_an_open_section_is_an_error() {
    let log = Log::default();
    let mut registry = loaders(&log, "");
    let machine = LoadMachine::new(LoadOptions::default());
    let error = machine.payload(&mut registry, 1).expect_err("nobody");
    assert!(error.to_string().contains("no handler is at work"));
    assert!(machine.payload_filled(&mut registry).is_err());
}

/// The bytes of sections without an owner come out as they went in, whatever the windows are.
#[test]
fn the_rest_is_a_stream_of_its_own() {
    let log = Log::default();
    let device = section(4, 3, "timer", 2, &[1; 24]);
    let bytes = [
        head("none"),
        section(1, 1, "block", 1, &EOS),
        section(3, 1, "", 0, &EOS),
        device.clone(),
        TAIL.to_vec(),
    ]
    .concat();
    let (rest, ending) =
        load(&bytes, LoadOptions::default(), &mut loaders(&log, "")).expect("loaded");
    assert_eq!(rest, [&head("none"), &device[..], TAIL].concat());
    assert_eq!(ending, Ending::WithDescription);
}
