//! Both machines with scripted handlers: order, rounds, who may complete, what is owned and what
//! is passed on.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use vmferry_savevm::{
    DirtyTotal, GuestStopped, HandlerError, LoadError, LoadHandler, LoadMachine, LoadOptions,
    LoadRegistry, LoadStep, Opening, Owner, Pending, Priority, Progress, Ready, RegisterError,
    SaveError, SaveHandler, SaveRegistry, Sink, TotalPending, begin, cleanup,
};
use vmferry_stream::{
    Blame, Command, Decoder, Ending, InstanceId, Name, Options, Record, SectionKind, Step,
};

/// The word that ends a `block` section's body.
const EOS: [u8; 8] = [0, 0, 0, 0, 0, 0, 0, 2];

type Log = Rc<RefCell<Vec<String>>>;

/// Says what it is told to, and notes what it is asked.
struct Scripted {
    name: &'static str,
    log: Log,
    progress: Progress,
    pending: Pending,
    fails_at: &'static str,
}

impl Scripted {
    fn note(&self, what: &'static str) -> Result<(), HandlerError> {
        self.log.borrow_mut().push(format!("{} {what}", self.name));
        match self.fails_at == what {
            true => Err("out of luck".into()),
            false => Ok(()),
        }
    }
}

impl SaveHandler for Scripted {
    fn setup(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.note("setup")?;
        sink.put(&[&EOS])
    }
    fn iterate(&mut self, sink: &mut dyn Sink) -> Result<Progress, HandlerError> {
        self.note("iterate")?;
        sink.put(&[&EOS])?;
        Ok(self.progress)
    }
    fn pending(&mut self) -> Pending {
        self.pending
    }
    fn complete(&mut self, _: &GuestStopped, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.note("complete")?;
        sink.put(&[&EOS])
    }
    fn cleanup(&mut self) {
        let _ = self.note("cleanup");
    }
}

/// Keeps what it gets; may be full, and may be out of allowance.
#[derive(Default)]
struct Bytes {
    bytes: Vec<u8>,
    puts_left: Option<usize>,
    exhausted: bool,
}

impl Sink for Bytes {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        match &mut self.puts_left {
            Some(0) => return Err("broken pipe".into()),
            Some(left) => *left -= 1,
            None => {}
        }
        parts
            .iter()
            .for_each(|part| self.bytes.extend_from_slice(part));
        Ok(())
    }
    fn allowance(&self) -> u64 {
        u64::from(!self.exhausted)
    }
    fn check(&self) -> Result<(), HandlerError> {
        Ok(())
    }
}

const NOTHING_LEFT: Pending = Pending::Dirty {
    bytes: 0,
    read_time: Duration::ZERO,
};

fn name(name: &str) -> Name {
    Name::new(name).expect("short")
}

/// `block` sections 0, 1, …, one for each script.
fn registry(scripts: Vec<Scripted>) -> SaveRegistry<'static> {
    let mut registry = SaveRegistry::new();
    for script in scripts {
        let priority = Priority(0);
        registry
            .register(name("block"), None, 1, 1, priority, Box::new(script))
            .expect("free");
    }
    registry
}

fn scripted(name: &'static str, log: &Log) -> Scripted {
    Scripted {
        name,
        log: Rc::clone(log),
        progress: Progress::Finished,
        pending: NOTHING_LEFT,
        fails_at: "",
    }
}

fn taken(log: &Log) -> Vec<String> {
    std::mem::take(&mut log.borrow_mut())
}

fn records(bytes: &[u8]) -> Vec<Record> {
    let mut decoder = Decoder::new(Options::default());
    let mut records = Vec::new();
    let mut window = bytes;
    loop {
        match decoder.step(window).expect("our own stream") {
            Step::Record { record, used } => {
                records.push(record);
                window = &window[used..];
            }
            Step::Payload(bytes) => window = &window[bytes as usize..],
            Step::NeedMore(_) | Step::End => return records,
        }
    }
}

#[test]
fn higher_priorities_first_then_as_registered() {
    let log = Log::default();
    let mut registry = SaveRegistry::new();
    for (index, priority) in [0, 5, 0, 5, 9].into_iter().enumerate() {
        let script = Box::new(scripted("x", &log));
        let idstr = name(&format!("s{index}"));
        registry
            .register(idstr, None, 1, 1, Priority(priority), script)
            .expect("free");
    }
    let order: Vec<_> = registry
        .entries()
        .map(|e| (e.idstr.to_string(), e.section_id.0))
        .collect();
    let expected = [("s4", 5), ("s1", 2), ("s3", 4), ("s0", 1), ("s2", 3)];
    assert_eq!(order, expected.map(|(name, id)| (name.to_owned(), id)));
}

#[test]
fn instances_are_counted_and_never_taken_twice() {
    let log = Log::default();
    let mut registry = SaveRegistry::new();
    let mut register = |instance| {
        let script = Box::new(scripted("x", &log));
        registry.register(name("dma"), instance, 1, 1, Priority(0), script)
    };
    register(None).expect("0");
    register(Some(InstanceId(7))).expect("7");
    register(None).expect("8");
    for taken in [0, 7, 8] {
        let error = register(Some(InstanceId(taken))).expect_err("taken");
        assert_eq!(
            error,
            RegisterError::Taken {
                idstr: name("dma"),
                instance: InstanceId(taken)
            }
        );
        assert!(
            error
                .to_string()
                .contains(&format!("'dma' instance {taken}"))
        );
    }
}

#[test]
fn a_whole_save() {
    let log = Log::default();
    let mut registry = registry(vec![scripted("a", &log), scripted("b", &log)]);
    let mut sink = Bytes::default();
    let opening = Opening {
        machine: name("none"),
        commands: vec![Command::OpenReturnPath, Command::Ping(1)],
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
        .expect("ended");
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
fn a_round_ends_after_the_first_that_is_not_finished() {
    let log = Log::default();
    for (first, asked) in [
        (Progress::Unfinished, &["a iterate"][..]),
        (Progress::Waiting, &["a iterate"]),
        (Progress::Finished, &["a iterate", "b iterate"]),
    ] {
        let mut a = scripted("a", &log);
        a.progress = first;
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
        read_time: Duration::from_millis(1),
    };
    b.pending = Pending::Dirty {
        bytes: 20,
        read_time: Duration::from_millis(2),
    };
    let total = DirtyTotal {
        bytes: 30,
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
        let error = save(&mut registry, &mut sink).expect_err(step);
        assert_eq!(error.to_string(), "section 'block': out of luck");
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
        (save(&mut registry, &mut sink), sink.bytes)
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

fn save(registry: &mut SaveRegistry<'_>, sink: &mut Bytes) -> Result<(), SaveError> {
    let mut iterating = begin(&Opening::default(), registry, sink)?;
    iterating.iterate(registry, sink)?;
    let Ready::Go(completing) = iterating.try_complete(registry, |_| true) else {
        panic!("nothing is left");
    };
    let stopped = GuestStopped::assert_drained();
    completing
        .end_live(&stopped, registry, None, sink)?
        .finish(sink)
}

/// Notes what it is told.
struct Loader {
    log: Log,
    room: Vec<u8>,
    fails_at: &'static str,
}

impl Loader {
    fn note(&self, what: &'static str) -> Result<(), HandlerError> {
        self.log.borrow_mut().push(what.to_owned());
        match self.fails_at == what {
            true => Err("out of luck".into()),
            false => Ok(()),
        }
    }
}

impl LoadHandler for Loader {
    fn start(&mut self, _version: u32) -> Result<(), HandlerError> {
        self.note("start")
    }
    fn record(&mut self, _record: &Record) -> Result<(), HandlerError> {
        self.note("record")
    }
    fn payload(&mut self, length: usize) -> Result<&mut [u8], HandlerError> {
        self.note("payload")?;
        self.room.resize(length, 0);
        Ok(&mut self.room)
    }
    fn payload_filled(&mut self) -> Result<(), HandlerError> {
        self.note("filled")
    }
    fn end(&mut self) -> Result<(), HandlerError> {
        self.note("end")
    }
}

fn loaders(log: &Log, fails_at: &'static str) -> LoadRegistry<'static> {
    let mut registry = LoadRegistry::new();
    let loader: Box<dyn LoadHandler> = Box::new(Loader {
        log: Rc::clone(log),
        room: Vec::new(),
        fails_at,
    });
    let instance = Some(InstanceId(0));
    registry
        .register(name("block"), instance, 1, 1, Priority(0), loader)
        .expect("free");
    registry
}

/// Load everything; returns the bytes of the rest.
fn load(
    bytes: &[u8],
    options: LoadOptions,
    registry: &mut LoadRegistry<'_>,
) -> Result<(Vec<u8>, Ending), LoadError> {
    let mut machine = LoadMachine::new(options);
    let mut rest = Vec::new();
    let mut window = bytes;
    loop {
        match machine.step(window, registry)? {
            LoadStep::NeedMore(_) | LoadStep::End => {
                return Ok((rest, machine.finish_at(bytes.len() as u64)?));
            }
            LoadStep::Record { used, owner, .. } => {
                if owner == Owner::Rest {
                    rest.extend_from_slice(&window[..used]);
                }
                window = &window[used..];
            }
            LoadStep::Payload { bytes, owner } => {
                let (payload, after) = window.split_at(bytes as usize);
                window = after;
                if owner == Owner::Rest {
                    rest.extend_from_slice(payload);
                    continue;
                }
                machine
                    .payload(registry, payload.len())?
                    .copy_from_slice(payload);
                machine.payload_filled(registry)?;
            }
        }
    }
}

fn head(machine: &str) -> Vec<u8> {
    let mut bytes = b"QEVM\0\0\0\x03\x07\0\0\0".to_vec();
    bytes.push(u8::try_from(machine.len()).expect("short"));
    bytes.extend(machine.as_bytes());
    bytes
}

fn section(kind: u8, id: u8, idstr: &str, version: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0, id];
    if matches!(kind, 1 | 4) {
        bytes.push(u8::try_from(idstr.len()).expect("short"));
        bytes.extend(idstr.as_bytes());
        bytes.extend([0, 0, 0, 0, 0, 0, 0, version]);
    }
    bytes.extend(body);
    bytes.extend([0x7e, 0, 0, 0, id]);
    bytes
}

const TAIL: &[u8] = b"\0\x06\0\0\0\x02{}";

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
        assert_eq!(error.to_string(), "section 'block': out of luck");
        assert_eq!(error.blame(), Blame::Host);
        assert_eq!(taken(&log).last().map(String::as_str), Some(step));
    }
}

#[test]
fn foreign_machines_and_sections_are_refused() {
    let log = Log::default();
    let local = |machine: &str| LoadOptions {
        machine: Some(name(machine)),
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
