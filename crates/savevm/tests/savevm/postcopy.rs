//! Postcopy at both ends: order of the stream, who may go on, the package, every command in every
//! state.

use std::time::Duration;

use vmferry_savevm::{
    GuestStopped, Incoming, Iterating, LoadError, LoadMachine, LoadOptions, LoadStep, Notice,
    Opening, Packing, Pending, PostcopyState, Progress, Ready, Registration, Registry, SaveError,
    TotalPending, begin, load_cleanup,
};
use vmferry_stream::{Blame, Command, Ending, PageSizes, Record};

use crate::parts::{
    Bytes, EOS, Loaded, Log, Scripted, load, loader, lock, name, records, scripted, section, state,
    taken, toy, toy_body,
};

const PAGES: PageSizes = PageSizes {
    all_bytes: 0x1000,
    target_bytes: 0x1000,
};

fn advised(sizes: Option<PageSizes>) -> Opening {
    Opening {
        commands: vec![
            Command::OpenReturnPath,
            Command::Ping(1),
            Command::PostcopyAdvise(sizes),
        ],
        ..Opening::default()
    }
}

fn going_on(name: &'static str, log: &Log, ranges: usize) -> Scripted {
    Scripted {
        discards: Some(ranges),
        ..scripted(name, log)
    }
}

/// `disk` must end before the switch, `ram` goes on; two devices.
fn source(log: &Log, ranges: usize) -> Registry<'static> {
    let mut registry = Registry::new();
    for registration in [
        Registration::saving("block", 1, Box::new(going_on("ram", log, ranges))),
        Registration::saving("block", 1, Box::new(scripted("disk", log))),
        Registration::device("rtc", toy(&state(b"time"))),
        Registration::early_device("early", toy(&state(b"early"))),
    ] {
        registry.register(registration).expect("free");
    }
    registry
}

fn switch(
    iterating: Iterating,
    registry: &mut Registry<'_>,
    sink: &mut Bytes,
) -> Result<Packing, SaveError> {
    let Ready::Go(switching) = iterating.try_postcopy(registry, |_| true)? else {
        panic!("nothing is left");
    };
    switching.end_live(&GuestStopped::assert_drained(), registry, sink)
}

/// A whole postcopy in the order in which QEMU sends it.
fn postcopy(opening: &Opening, registry: &mut Registry<'_>) -> Vec<u8> {
    let mut sink = Bytes::default();
    let stopped = GuestStopped::assert_drained();
    let mut iterating = begin(opening, registry, &mut sink).expect("begun");
    iterating.iterate(registry, &mut sink).expect("iterated");
    let mut packing = switch(iterating, registry, &mut sink).expect("advised");
    packing.command(Command::Ping(2), &mut sink).expect("sent");
    sink.puts_left = Some(1);
    let mut postcopy = packing
        .pack(&stopped, registry, Some(3))
        .and_then(|packed| packed.send(&mut sink))
        .expect("the package is one piece");
    sink.puts_left = None;
    postcopy.command(Command::Ping(4), &mut sink).expect("sent");
    let progress = postcopy.iterate(registry, &mut sink).expect("iterated");
    assert_eq!(progress, Progress::Finished);
    assert!(matches!(postcopy.pending(registry), TotalPending::Dirty(_)));
    postcopy.complete(registry, &mut sink).expect("completed");
    sink.bytes
}

fn command_name(record: &Record) -> Option<String> {
    Some(match record {
        Record::Section(it) => format!("{:?} {} {}", it.kind, it.name, it.instance.0),
        Record::Command(Command::Ping(value)) => format!("PING {value}"),
        Record::Command(Command::PostcopyRamDiscard { ranges, .. }) => format!("DISCARD {ranges}"),
        Record::Command(command) => command.name().to_owned(),
        Record::Eof => "EOF".to_owned(),
        Record::Description { .. } => "description".to_owned(),
        _ => return None,
    })
}

fn names(records: &[Record]) -> Vec<String> {
    records.iter().filter_map(command_name).collect()
}

fn target(log: &Log, to: &[crate::parts::ToyState; 2]) -> Registry<'static> {
    let mut registry = Registry::new();
    for registration in [
        Registration::loading("block", 1..=1, loader(log, "")),
        Registration::loading("block", 1..=1, loader(log, "")),
        Registration::device("rtc", toy(&to[0])),
        Registration::device("early", toy(&to[1])),
    ] {
        registry.register(registration).expect("free");
    }
    registry
}

fn accepting(postcopy: Incoming) -> LoadMachine {
    LoadMachine::new(LoadOptions {
        refuse_rest: Some("unknown"),
        postcopy,
        ..LoadOptions::default()
    })
}

#[test]
fn a_whole_postcopy_in_order_at_both_ends() {
    let log = Log::default();
    let opening = Opening {
        switchover_start: true,
        ..advised(Some(PAGES))
    };
    let bytes = postcopy(&opening, &mut source(&log, 14));
    let expected = [
        "ram setup",
        "disk setup",
        "ram iterate",
        "disk iterate",
        "disk complete",
        "ram discard",
        "ram iterate",
        "ram complete later",
    ];
    assert_eq!(taken(&log), expected);
    let expected = [
        "OPEN_RETURN_PATH",
        "PING 1",
        "POSTCOPY_ADVISE",
        "Start block 0",
        "Start block 1",
        "Full early 0",
        "Part block 0",
        "Part block 1",
        "SWITCHOVER_START",
        "End block 1",
        "DISCARD 12",
        "DISCARD 2",
        "PING 2",
        "PACKAGED",
        "PING 4",
        "Part block 0",
        "End block 0",
        "EOF",
    ];
    assert_eq!(names(&records(&bytes)), expected);

    let to = [state(b""), state(b"")];
    let mut registry = target(&log, &to);
    let mut machine = accepting(Incoming::Ram(PAGES));
    let Loaded {
        commands,
        package,
        ending,
        ..
    } = load(&mut machine, &mut registry, &bytes).expect("loaded");
    assert_eq!(ending, Some(Ending::WithoutDescription));
    assert_eq!(machine.postcopy(), PostcopyState::Ended);
    assert!(machine.is_return_path_open());
    assert_eq!(commands.len(), 9);
    assert_eq!(lock(&to[0]).as_slice(), b"time");
    assert_eq!(lock(&to[1]).as_slice(), b"early");
    let listen = [8, 0, 4, 0, 0];
    let full = section(4, 3, "rtc", 2, &toy_body(b"time"));
    let tail = [8, 0, 2, 0, 4, 0, 0, 0, 3, 8, 0, 5, 0, 0];
    assert_eq!(package, [&listen[..], &full, &tail].concat());
    assert_eq!(taken(&log).iter().filter(|it| *it == "end").count(), 2);
    load_cleanup(&mut registry);
    assert_eq!(taken(&log), ["cleanup", "cleanup"]);
}

/// A precopy after all: the destination was only told that it could have been one.
#[test]
fn advised_only() {
    let log = Log::default();
    let mut registry = source(&log, 1);
    let opening = advised(Some(PAGES));
    let bytes = crate::parts::saved(&opening, &mut registry);
    assert!(taken(&log).contains(&"ram complete".to_owned()));
    assert_eq!(
        names(&records(&bytes)).last().map(String::as_str),
        Some("description")
    );
    let to = [state(b""), state(b"")];
    let mut machine = accepting(Incoming::Ram(PAGES));
    let loaded = load(&mut machine, &mut target(&log, &to), &bytes).expect("loaded");
    assert_eq!(loaded.ending, Some(Ending::WithDescription));
    assert_eq!(lock(&to[0]).as_slice(), b"time");
}

/// A bulk phase may go on after the switch, if its handler can; nobody else's may.
#[test]
fn only_what_cannot_go_on_holds_the_switch_up() {
    let log = Log::default();
    let bulk = Pending::Bulk { bytes: 100 };
    let dirty = Pending::Dirty {
        bytes: 3,
        later_bytes: 20,
        read_time: Duration::from_millis(5),
    };
    for (ram, disk, sums) in [
        (bulk, dirty, Some((23, 100, 5))),
        (dirty, dirty, Some((26, 20, 10))),
        (dirty, bulk, None),
        (bulk, bulk, None),
    ] {
        let mut registry = Registry::new();
        let (mut a, mut b) = (going_on("ram", &log, 1), scripted("disk", &log));
        (a.pending, b.pending) = (ram, disk);
        for script in [a, b] {
            let saving = Registration::saving("block", 1, Box::new(script));
            registry.register(saving).expect("free");
        }
        let mut sink = Bytes::default();
        let iterating = begin(&advised(Some(PAGES)), &mut registry, &mut sink).expect("begun");
        let asked = std::cell::Cell::new(None);
        let ready = iterating.try_postcopy(&mut registry, |total| {
            let millis = total.read_time.as_millis();
            asked.set(Some((total.bytes, total.later_bytes, millis)));
            false
        });
        let Ready::NotYet(iterating, pending) = ready.expect("advised") else {
            panic!("it does not fit");
        };
        assert_eq!(asked.get(), sums);
        assert_eq!(matches!(pending, TotalPending::Bulk { .. }), sums.is_none());
        // In a precopy everything comes before the guest runs.
        if let TotalPending::Dirty(total) = iterating.pending(&mut registry) {
            assert_eq!((total.bytes, total.later_bytes), (46, 0));
        } else {
            assert!(matches!(ram, Pending::Bulk { .. }) || matches!(disk, Pending::Bulk { .. }));
        }
    }
}

#[test]
fn who_said_nothing_of_it_cannot_switch() {
    let log = Log::default();
    let mut registry = source(&log, 1);
    let mut sink = Bytes::default();
    let iterating = begin(&Opening::default(), &mut registry, &mut sink).expect("begun");
    let error = switch(iterating, &mut registry, &mut sink).expect_err("not advised");
    assert!(matches!(error, SaveError::NotAdvised));
    let mut iterating = begin(&Opening::default(), &mut registry, &mut sink).expect("begun");
    let late = Command::PostcopyAdvise(Some(PAGES));
    iterating.command(late, &mut sink).expect("sent");
    switch(iterating, &mut registry, &mut sink).expect("advised late");
}

/// Real destinations do not run their guest without a discard.
#[test]
fn something_must_be_discarded_unless_it_is_about_bitmaps() {
    let log = Log::default();
    let mut registry = source(&log, 0);
    let mut sink = Bytes::default();
    let iterating = begin(&advised(Some(PAGES)), &mut registry, &mut sink).expect("begun");
    let error = switch(iterating, &mut registry, &mut sink).expect_err("nothing");
    assert!(matches!(error, SaveError::NothingDiscarded));
    let bytes = postcopy(&advised(None), &mut registry);
    let to = [state(b""), state(b"")];
    let mut machine = accepting(Incoming::Bitmaps);
    load(&mut machine, &mut target(&log, &to), &bytes).expect("loaded");
    assert_eq!(machine.postcopy(), PostcopyState::Ended);
}

#[test]
fn a_broken_channel_is_noticed_at_every_write() {
    let log = Log::default();
    let run = |puts_left: usize| {
        let mut registry = source(&log, 14);
        let mut sink = Bytes {
            puts_left: Some(puts_left),
            ..Bytes::default()
        };
        let stopped = GuestStopped::assert_drained();
        let result = begin(&advised(Some(PAGES)), &mut registry, &mut sink)
            .and_then(|iterating| switch(iterating, &mut registry, &mut sink))
            .and_then(|packing| {
                packing
                    .pack(&stopped, &mut registry, None)
                    .and_then(|packed| packed.send(&mut sink))
            })
            .map_err(|error| error.to_string())
            .and_then(|mut postcopy| {
                let completed = postcopy.complete(&mut registry, &mut sink);
                completed.map_err(|error| error.to_string())
            });
        (result, sink.bytes)
    };
    let (whole, bytes) = run(usize::MAX);
    whole.expect("all is well");
    let mut puts = 0;
    loop {
        let (result, sent) = run(puts);
        assert!(bytes.starts_with(&sent));
        match result {
            Ok(()) => break,
            Err(error) => assert!(error.ends_with("broken pipe"), "{error}"),
        }
        puts += 1;
    }
    assert!(puts > 12, "{puts}");
}

/// The guest runs at the destination: the end is sent again on the next connection.
#[test]
fn an_interrupted_end_is_completed_on_a_new_connection() {
    let log = Log::default();
    let mut registry = source(&log, 1);
    let mut sink = Bytes::default();
    let stopped = GuestStopped::assert_drained();
    let iterating = begin(&advised(Some(PAGES)), &mut registry, &mut sink).expect("begun");
    let packing = switch(iterating, &mut registry, &mut sink).expect("advised");
    let running = packing
        .pack(&stopped, &mut registry, None)
        .and_then(|packed| packed.send(&mut sink));
    sink.puts_left = Some(1);
    let mut postcopy = running.expect("sent");
    let broken = postcopy.complete(&mut registry, &mut sink);
    assert_eq!(
        broken.expect_err("broken").to_string(),
        "section 'block' instance 0: broken pipe"
    );

    let to = [state(b""), state(b"")];
    let mut target = target(&log, &to);
    let mut machine = accepting(Incoming::Ram(PAGES));
    let error = load(&mut machine, &mut target, &sink.bytes).expect_err("truncated");
    assert!(
        error
            .to_string()
            .contains("truncated inside section 'block'"),
        "{error}"
    );
    assert_eq!(machine.postcopy(), PostcopyState::Running);

    let mut second = Bytes::default();
    for command in [
        Command::ReceivedBitmap(name("pc.ram")),
        Command::PostcopyResume,
    ] {
        postcopy.command(command, &mut second).expect("sent");
    }
    postcopy
        .complete(&mut registry, &mut second)
        .expect("completed");
    let mut machine = machine.resumed();
    let loaded = load(&mut machine, &mut target, &second.bytes).expect("resumed");
    assert_eq!(loaded.commands.len(), 2);
    assert_eq!(machine.postcopy(), PostcopyState::Ended);
    assert_eq!(machine.notices(), []);
}

/// As at a destination whose pages come while its devices are loaded.
#[test]
fn live_sections_can_be_split_off() {
    let log = Log::default();
    let mut registry = source(&log, 1);
    let names = |registry: &Registry<'_>| {
        let entries = registry.entries().map(|entry| entry.idstr().to_string());
        entries.collect::<Vec<_>>()
    };
    let all = names(&registry);
    let live = registry.split_live();
    assert!(live.entries().all(vmferry_savevm::Entry::is_live));
    assert!(!registry.entries().any(vmferry_savevm::Entry::is_live));
    let (devices, live) = (names(&registry), names(&live));
    assert!(
        !devices.is_empty() && live.len() > 1,
        "{devices:?} {live:?}"
    );
    assert!(devices.iter().chain(&live).all(|name| all.contains(name)));
    assert_eq!(devices.len() + live.len(), all.len());
}

#[test]
fn who_cannot_discard_is_named() {
    let log = Log::default();
    let mut registry = Registry::new();
    let mut ram = going_on("ram", &log, 1);
    ram.fails_at = "discard";
    let saving = Registration::saving("block", 1, Box::new(ram));
    registry.register(saving).expect("free");
    let mut sink = Bytes::default();
    let iterating = begin(&advised(Some(PAGES)), &mut registry, &mut sink).expect("begun");
    let error = switch(iterating, &mut registry, &mut sink).expect_err("it fails");
    assert_eq!(error.to_string(), "section 'block' instance 0: out of luck");
}

fn command(number: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("short");
    let mut bytes = vec![8];
    bytes.extend(number.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn open() -> Vec<u8> {
    command(1, b"")
}
fn ping() -> Vec<u8> {
    command(2, &[0, 0, 0, 9])
}
fn advise(all: u64, target: u64) -> Vec<u8> {
    command(3, &[all.to_be_bytes(), target.to_be_bytes()].concat())
}
fn discard() -> Vec<u8> {
    command(6, &[&b"\0\x06pc.ram\0"[..], &[0; 16]].concat())
}
fn packaged(content: &[&[u8]]) -> Vec<u8> {
    let content = content.concat();
    let length = u32::try_from(content.len()).expect("short");
    [command(7, &length.to_be_bytes()), content].concat()
}
fn listen() -> Vec<u8> {
    command(4, b"")
}
fn run() -> Vec<u8> {
    command(5, b"")
}
const EOF: &[u8] = b"\0";

/// Load a stream of these pieces, behind a header.
fn fed(postcopy: Incoming, pieces: &[&[u8]]) -> (Result<Loaded, LoadError>, LoadMachine) {
    let mut machine = accepting(postcopy);
    let bytes = [&b"QEVM\0\0\0\x03"[..], &pieces.concat()].concat();
    let loaded = load(&mut machine, &mut Registry::new(), &bytes);
    (loaded, machine)
}

#[test]
fn every_command_in_every_state() {
    let good = advise(0x1000, 0x1000);
    let go = packaged(&[&listen(), &run()]);
    let to = |states: &[&[u8]]| states.concat();
    let none = Vec::new();
    let advised = to(&[&good]);
    let discarding = to(&[&good, &discard()]);
    let running = to(&[&good, &discard(), &go]);
    use PostcopyState::{Advised, Discarding, None as Nothing, Running};
    for (before, state, pieces, words) in [
        (&none, Nothing, &good, ""),
        (
            &none,
            Nothing,
            &discard(),
            "POSTCOPY_RAM_DISCARD: it must not come without POSTCOPY_ADVISE",
        ),
        (
            &none,
            Nothing,
            &go,
            "PACKAGED: it must not come without POSTCOPY_ADVISE",
        ),
        (
            &none,
            Nothing,
            &listen(),
            "POSTCOPY_LISTEN: it must come in a package",
        ),
        (
            &none,
            Nothing,
            &run(),
            "POSTCOPY_RUN: it must come in a package",
        ),
        (&none, Nothing, &ping(), "PING: no return path was opened"),
        (
            &none,
            Nothing,
            &command(8, b""),
            "ENABLE_COLO: COLO is not supported here",
        ),
        (
            &advised,
            Advised,
            &good,
            "POSTCOPY_ADVISE: it must not come after POSTCOPY_ADVISE",
        ),
        (&advised, Advised, &discard(), ""),
        (&advised, Advised, &go, ""),
        (
            &advised,
            Advised,
            &packaged(&[&run()]),
            "POSTCOPY_RUN: it must not come after POSTCOPY_ADVISE",
        ),
        (&discarding, Discarding, &discard(), ""),
        (&discarding, Discarding, &go, ""),
        (
            &discarding,
            Discarding,
            &good,
            "POSTCOPY_ADVISE: it must not come after POSTCOPY_RAM_DISCARD",
        ),
        (
            &discarding,
            Discarding,
            &packaged(&[&listen(), &listen()]),
            "POSTCOPY_LISTEN: it must not come after POSTCOPY_LISTEN",
        ),
        (
            &discarding,
            Discarding,
            &packaged(&[&listen(), &discard()]),
            "POSTCOPY_RAM_DISCARD: it must not come after POSTCOPY_LISTEN",
        ),
        (
            &discarding,
            Discarding,
            &packaged(&[&listen(), &packaged(&[&run()])]),
            "PACKAGED: it came in a package",
        ),
        (
            &discarding,
            Discarding,
            &packaged(&[]),
            "PACKAGED: it is empty",
        ),
        (
            &running,
            Running,
            &good,
            "POSTCOPY_ADVISE: it must not come after POSTCOPY_RUN",
        ),
        (
            &running,
            Running,
            &discard(),
            "POSTCOPY_RAM_DISCARD: it must not come after POSTCOPY_RUN",
        ),
        (
            &running,
            Running,
            &go,
            "PACKAGED: it must not come after POSTCOPY_RUN",
        ),
        (
            &running,
            Running,
            &listen(),
            "POSTCOPY_LISTEN: it must come in a package",
        ),
        (&running, Running, &command(11, b""), ""),
    ] {
        let (loaded, machine) = fed(Incoming::Ram(PAGES), &[before]);
        let error = loaded.expect_err("it does not end there").to_string();
        assert!(error.contains("truncated"), "{error}");
        assert_eq!(machine.postcopy(), state);
        let (loaded, _) = fed(Incoming::Ram(PAGES), &[before, pieces, EOF]);
        match loaded {
            Ok(_) => assert_eq!(words, ""),
            Err(error) => {
                assert!(
                    error.to_string().contains(&format!("command {words}")),
                    "{error}"
                );
                assert!(!words.is_empty(), "{error}");
                assert_eq!(error.blame(), Blame::Peer);
            }
        }
    }
}

#[test]
fn page_sizes_are_equal() {
    let (good, none) = (advise(0x1000, 0x1000), command(3, b""));
    let other = |all, target| advise(all, target);
    for (accepted, advise, words) in [
        (Incoming::Ram(PAGES), good.clone(), ""),
        (Incoming::Bitmaps, none.clone(), ""),
        (
            Incoming::Ram(PAGES),
            none.clone(),
            "it has no page sizes, but postcopy-ram is on here",
        ),
        (
            Incoming::Bitmaps,
            good.clone(),
            "it has page sizes, but postcopy-ram is off here",
        ),
        (
            Incoming::Ram(PAGES),
            other(0x201000, 0x1000),
            "page sizes 0x201000, here 0x1000",
        ),
        (
            Incoming::Ram(PAGES),
            other(0x1000, 0x4000),
            "guest page size 0x4000, here 0x1000",
        ),
        (Incoming::Refused("not today"), good, "not today"),
        (Incoming::Refused("not today"), none, "not today"),
    ] {
        let (loaded, _) = fed(accepted, &[&advise, EOF]);
        match loaded {
            Ok(_) => assert_eq!(words, ""),
            Err(error) => {
                let words = format!("command POSTCOPY_ADVISE: {words}");
                assert!(error.to_string().ends_with(&words), "{error}");
            }
        }
    }
}

/// RUN ends the package, whatever follows it there.
#[test]
fn what_follows_run_in_a_package_is_ignored() {
    let go = packaged(&[&listen(), &run(), b"\xff\xff garbage"]);
    let (loaded, machine) = fed(
        Incoming::Ram(PAGES),
        &[&advise(0x1000, 0x1000), &discard(), &go, EOF],
    );
    loaded.expect("loaded");
    assert_eq!(machine.postcopy(), PostcopyState::Ended);
}

#[test]
fn a_package_must_run_the_guest_and_says_where_it_is_wrong() {
    for (content, words) in [
        (
            packaged(&[&listen()]),
            "the package ends without POSTCOPY_RUN",
        ),
        (
            packaged(&[&listen(), EOF, &run()]),
            "the package ends without POSTCOPY_RUN",
        ),
        (
            packaged(&[&listen(), b"\xff"]),
            "unknown section type 0xff (byte 5, section type)",
        ),
        (
            packaged(&[&listen()[..3]]),
            "stream truncated inside the list of sections (byte 3, ",
        ),
        (
            packaged(&[&listen(), &section(4, 1, "rtc", 2, b""), &run()]),
            "byte 22: unknown section 'rtc' instance 0: unknown",
        ),
        (
            packaged(&[&ping()]),
            "byte 9: command PING: no return path was opened",
        ),
    ] {
        let begin = advise(0x1000, 0x1000);
        let (loaded, _) = fed(Incoming::Ram(PAGES), &[&begin, &content, EOF]);
        let error = loaded.expect_err(words);
        let words = format!(
            "in the package that begins at byte {}: {words}",
            8 + begin.len() + 9
        );
        assert!(error.to_string().starts_with(&words), "{error}");
        assert_eq!(error.blame(), Blame::Peer);
    }
}

/// Section ids are those of the stream: a live section may go on in the package.
#[test]
fn a_package_knows_the_sections_of_its_stream() {
    let log = Log::default();
    let to = [state(b""), state(b"")];
    let mut registry = target(&log, &to);
    let pieces = [
        b"QEVM\0\0\0\x03".to_vec(),
        advise(0x1000, 0x1000),
        section(1, 5, "block", 1, &EOS),
        packaged(&[&listen(), &section(2, 5, "", 0, &EOS), &run()]),
        section(3, 5, "", 0, &EOS),
        EOF.to_vec(),
    ];
    let mut machine = accepting(Incoming::Ram(PAGES));
    load(&mut machine, &mut registry, &pieces.concat()).expect("loaded");
    assert_eq!(taken(&log), ["start", "record", "record", "record", "end"]);
}

#[test]
fn a_driver_may_refuse_what_it_hears_in_a_package() {
    let content = [listen(), ping(), run()].concat();
    let begin = [
        b"QEVM\0\0\0\x03".to_vec(),
        open(),
        advise(0x1000, 0x1000),
        packaged(&[&content]),
    ]
    .concat();
    let registry = &mut Registry::new();
    let mut machine = accepting(Incoming::Ram(PAGES));
    let mut at = 0;
    loop {
        match machine.step(&begin[at..], registry).expect("right") {
            LoadStep::Record { used, .. } => at += used,
            LoadStep::Payload { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    let mut heard = Vec::new();
    let error = machine
        .package()
        .load_heard(&content, registry, |record| match record {
            Record::Command(Command::Ping(_)) => Err("cannot answer".into()),
            record => {
                heard.push(record.clone());
                Ok(())
            }
        })
        .expect_err("refused");
    let words = "byte 14: command PING: cannot answer";
    assert_eq!(error.to_string(), words);
    assert_eq!(heard, [Record::Command(Command::PostcopyListen)]);
    assert_eq!(machine.postcopy(), PostcopyState::Advised);
}

/// What a QEMU only writes into its log.
#[test]
fn harmless_mistakes_are_noticed_once() {
    let bitmap = command(10, b"\x06pc.ram");
    let resume = command(9, b"");
    let (loaded, machine) = fed(
        Incoming::Bitmaps,
        &[&open(), &open(), &open(), &bitmap, &resume, &ping(), EOF],
    );
    assert_eq!(loaded.expect("loaded").commands.len(), 6);
    let expected = [Notice::ReturnPathOpenedTwice, Notice::NothingToRecover];
    assert_eq!(machine.notices(), expected);
    assert!(machine.is_return_path_open());
    let (loaded, _) = fed(Incoming::Bitmaps, &[&command(12, b"")]);
    let error = loaded.expect_err("unknown").to_string();
    assert!(error.contains("unknown command 12"), "{error}");
    let (loaded, _) = fed(Incoming::Bitmaps, &[&command(2, b"abc")]);
    let error = loaded.expect_err("too short").to_string();
    assert!(error.contains("PING has length 3 instead of 4"), "{error}");
}
