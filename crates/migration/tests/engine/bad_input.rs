//! Streams that are wrong, and disks that fail, against `receive`: one clear line, nothing on a disk
//! before header and machine are accepted, SHUT 1 where somebody listens, guests held.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use vmferry_channel::{Direction, Stop};
use vmferry_disk::simulated::{MemoryDisk, Operation};
use vmferry_disk::{Hold, Limits, Node};
use vmferry_migration::{
    Arrived, Capabilities, Coverage, DestinationDisk, DestinationJob, Parameters, Published,
    Residence, Rest, State, receive,
};
use vmferry_stream::Step;
use vmferry_stream::return_path::{ReturnDecoder, ReturnMessage};

use crate::ends::{
    Host, Received, channel, destination_disks, rng, start_destination_with, start_source, wait,
};

const MIB: usize = 1 << 20;
const OPEN_RETURN_PATH: &[u8] = &[8, 0, 1, 0, 0];
const EOS: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 2];
const EOF: &[u8] = &[0];
const DESCRIPTION: &[u8] = b"\x06\0\0\0\x02{}";

fn header(machine: &str) -> Vec<u8> {
    let length = u32::try_from(machine.len()).expect("short");
    let mut bytes = b"QEVM\0\0\0\x03\x07".to_vec();
    bytes.extend(length.to_be_bytes());
    bytes.extend(machine.as_bytes());
    bytes
}

fn named(kind: u8, id: u32, name: &str, version: u32) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(id.to_be_bytes());
    bytes.push(u8::try_from(name.len()).expect("short"));
    bytes.extend(name.as_bytes());
    bytes.extend(0u32.to_be_bytes());
    bytes.extend(version.to_be_bytes());
    bytes
}

fn footer(id: u32) -> Vec<u8> {
    [&[0x7e], &id.to_be_bytes()[..]].concat()
}

fn start() -> Vec<u8> {
    [named(1, 1, "block", 1), EOS.to_vec(), footer(1)].concat()
}

fn section(kind: u8, body: &[Vec<u8>]) -> Vec<u8> {
    [&[kind, 0, 0, 0, 1], &body.concat()[..], EOS, &footer(1)].concat()
}

fn part(body: &[Vec<u8>]) -> Vec<u8> {
    section(2, body)
}

fn end(body: &[Vec<u8>]) -> Vec<u8> {
    section(3, body)
}

fn word(sector: u64, flags: u64) -> Vec<u8> {
    (sector << 9 | flags).to_be_bytes().to_vec()
}

fn block(sector: u64, flags: u64, name: &str) -> Vec<u8> {
    let mut bytes = word(sector, flags);
    bytes.push(u8::try_from(name.len()).expect("short"));
    bytes.extend(name.as_bytes());
    bytes
}

fn zero(sector: u64, name: &str) -> Vec<u8> {
    block(sector, 9, name)
}

fn data(sector: u64, name: &str, fill: u8) -> Vec<u8> {
    [block(sector, 1, name), vec![fill; MIB]].concat()
}

/// Header, return path, START, these pieces, EOF, description.
fn stream(pieces: &[Vec<u8>]) -> Vec<u8> {
    let head = [header(""), OPEN_RETURN_PATH.to_vec(), start()].concat();
    [&head[..], &pieces.concat(), EOF, DESCRIPTION].concat()
}

/// A whole stream for a disk of two MiB.
fn good_pieces() -> Vec<Vec<u8>> {
    vec![
        part(&[zero(0, "disk0"), data(2048, "disk0", 7)]),
        end(&[word(100, 4)]),
    ]
}

struct Answer {
    received: Received,
    /// What came back.
    messages: Vec<ReturnMessage>,
}

/// Feed `bytes` to a destination, then half-close.
fn feed(host: &Host, bytes: &[u8]) -> Answer {
    let (mut here, there) = UnixStream::pair().expect("a pair");
    let destination = start_destination_with(host, there, Stop::new().expect("an event"));
    let mut back = here.try_clone().expect("a descriptor");
    let answers = thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = back.read_to_end(&mut bytes);
        bytes
    });
    // A destination that gives up closes while this writes.
    let _ = here.write_all(bytes);
    let _ = here.shutdown(Shutdown::Write);
    let received = destination.join().expect("no panic");
    let bytes = answers.join().expect("no panic");
    Answer {
        received,
        messages: messages(&bytes),
    }
}

fn messages(mut bytes: &[u8]) -> Vec<ReturnMessage> {
    let mut decoder = ReturnDecoder::new();
    let mut messages = Vec::new();
    while let Step::Record { record, used } = decoder.step(bytes).expect("our own answers") {
        bytes = &bytes[used..];
        messages.push(record);
    }
    messages
}

fn target() -> Host {
    Host::target(&[2 * MIB])
}

/// The destination refuses: one line that says `words`, guests held, free for another attempt.
fn refused(host: &Host, answer: &Answer, words: &str) {
    let error = answer.received.as_ref().expect_err(words).to_string();
    assert!(error.contains(words), "{error:?} does not say {words:?}");
    assert!(!error.contains(char::is_control), "{error:?}");
    assert!(host.all_held(Some(Hold::Writes)), "{words}");
    assert!(host.nodes.iter().all(|node| node.user().is_none()));
}

fn changes(disk: &MemoryDisk) -> usize {
    let kinds = [Operation::Write, Operation::WriteZeroes, Operation::Discard];
    kinds.into_iter().map(|kind| disk.count(kind)).sum()
}

#[test]
fn the_good_stream_arrives() {
    let host = target();
    let answer = feed(&host, &stream(&good_pieces()));
    let arrived = answer.received.expect("arrived");
    assert!(arrived.source_told);
    assert_eq!(answer.messages, [ReturnMessage::Shut(0)]);
    let expected = [vec![0; MIB], vec![7; MIB]].concat();
    assert!(host.memories[0].durable_snapshot() == expected);
    assert!(host.all_held(Some(Hold::Nothing)));
    assert_eq!(host.says(), [Some(Residence::Arrived)]);
}

/// Nothing is touched before header and machine are accepted, and nobody is answered: no return
/// path was opened.
#[test]
fn a_bad_beginning_touches_nothing() {
    let rest = stream(&good_pieces());
    let (_, rest) = rest.split_at(header("").len());
    let with = |beginning: &[u8]| [beginning, rest].concat();
    for (bytes, words) in [
        (
            with(b"QEVN\0\0\0\x03\x07\0\0\0\0"),
            "not a migration stream",
        ),
        (with(b"QEVM\0\0\0\x02\x07\0\0\0\0"), "version 2 is obsolete"),
        (with(b"QEVM\0\0\0\x04\x07\0\0\0\0"), "version 4"),
        (
            with(&header("pc-i440fx-7.2")),
            "received machine 'pc-i440fx-7.2'",
        ),
        (
            with(b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff"),
            "over the maximum",
        ),
        (with(b"QEVM\0\0\0\x03\x07\0\0\0\x02\xff\xff"), "not UTF-8"),
        (
            with(
                b"QEVM\0\0\0\x03\x07\0\0\0\0\x05\x1aconfiguration/capabilities\0\0\0\x01\
                  \0\0\0\x01\x0amapped-ram",
            ),
            "byte 60: the stream has its memory at fixed file offsets (capability mapped-ram)",
        ),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "not a migration stream"),
        (Vec::new(), "truncated"),
    ] {
        let host = target();
        let answer = feed(&host, &bytes);
        refused(&host, &answer, words);
        assert_eq!(answer.messages, [], "{words}");
        assert_eq!(changes(&host.memories[0]), 0, "{words}");
        assert_eq!(host.says(), [None], "{words}");
    }
}

#[test]
fn a_stream_of_any_machine_is_taken_if_it_may() {
    let bytes = [
        header("pc-i440fx-7.2"),
        start(),
        good_pieces().concat(),
        EOF.to_vec(),
        DESCRIPTION.to_vec(),
    ]
    .concat();
    let host = target();
    let (mut here, there) = UnixStream::pair().expect("a pair");
    let writer = thread::spawn(move || here.write_all(&bytes).map(|()| here));
    let job = DestinationJob {
        disks: destination_disks(&host),
        coverage: Coverage::Whole,
        rest: None,
        any_machine: true,
        keep_records: false,
    };
    let stop = Stop::new().expect("an event");
    let there = channel(there, Direction::Incoming, &stop);
    let arrived = receive(there, job, &Published::default()).expect("arrived");
    assert!(!arrived.source_told, "nobody listens");
    assert_eq!(host.says(), [None]);
    drop(writer.join().expect("no panic"));
}

/// Each after the return path was opened: the source is told.
#[test]
fn a_bad_middle_is_refused_and_the_source_is_told() {
    let long = "n".repeat(255);
    let other = named(4, 7, "timer", 2);
    let mut beyond_all = word(0, 1);
    beyond_all[0] = 0xff;
    for (pieces, words) in [
        (
            vec![part(&[zero(0, "disk9")])],
            "disk 'disk9', which is not here (disks here: 'disk0')",
        ),
        (vec![part(&[zero(0, "")])], "-blockdev"),
        (
            vec![part(&[zero(0, "a\nb\u{1b}[2J\u{9b}")])],
            "'a\\nb\\u{1b}[2J\\u{9b}'",
        ),
        (vec![named(4, 7, "a\r\nb", 2)], "'a\\r\\nb'"),
        (vec![part(&[zero(0, &long)])], &format!("disk '{long}'")),
        (
            vec![part(&[zero(4096, "disk0")])],
            "disk 'disk0': the block at byte 2097152 lies beyond",
        ),
        (
            vec![part(&[data(1 << 40, "disk0", 1)])],
            "lies beyond the end",
        ),
        (vec![part(&[block(0, 0x10, "disk0")])], "unknown flags 0x10"),
        (vec![part(&[word(0, 0)])], "unknown flags 0x0"),
        (vec![part(&[word(0, 8)])], "unknown flags 0x8"),
        (
            vec![part(&[word(101, 4)])],
            "101 is over the maximum of 100",
        ),
        (
            vec![b"\x02\0\0\0\x01".to_vec(), EOS.to_vec(), footer(2)],
            "footer of section 'block'",
        ),
        (
            vec![
                b"\x02\0\0\0\x01".to_vec(),
                EOS.to_vec(),
                b"\0\0\0\0\0".to_vec(),
            ],
            "footer",
        ),
        (
            vec![b"\x02\0\0\0\x09".to_vec()],
            "section id 0x9 was never started",
        ),
        (vec![named(1, 1, "block", 1)], "started before"),
        (vec![named(1, 2, "block", 2)], "version 2 of 'block'"),
        (vec![named(1, 2, "block", 0)], "version 0 of 'block'"),
        (vec![other], "unknown section 'timer' instance 0"),
        (vec![vec![0x42]], "unknown section type 0x42"),
        (vec![b"\x06\xff\xff\xff\xff".to_vec()], "before the end"),
        (vec![b"\x08\0\x03\0\0".to_vec()], "postcopy"),
        (vec![b"\x08\0\x63\0\0".to_vec()], "unknown command 99"),
        (vec![], "without disks"),
        (
            vec![end(&[])],
            "2 of 2 blocks never arrived, first at byte 0",
        ),
        (
            vec![end(&[zero(2048, "disk0")])],
            "1 of 2 blocks never arrived, first at byte 0",
        ),
        (
            vec![end(&[zero(0, "disk0")])],
            "1 of 2 blocks never arrived, first at byte 1048576",
        ),
    ] {
        let host = target();
        let answer = feed(&host, &stream(&pieces));
        refused(&host, &answer, words);
        assert_eq!(answer.messages, [ReturnMessage::Shut(1)], "{words}");
        assert_eq!(host.says(), [Some(Residence::Incoming)], "{words}");
        // The next attempt is welcome.
        let answer = feed(&host, &stream(&good_pieces()));
        assert!(
            answer.received.is_ok(),
            "after {words}: {:?}",
            answer.received
        );
    }
}

#[test]
fn a_description_of_4_gib_is_refused() {
    let mut bytes = stream(&good_pieces());
    bytes.truncate(bytes.len() - DESCRIPTION.len());
    bytes.extend(b"\x06\xff\xff\xff\xff");
    let host = target();
    let answer = feed(&host, &bytes);
    refused(&host, &answer, "over the maximum");
    assert_eq!(answer.messages, [ReturnMessage::Shut(1)]);
}

#[test]
fn a_ping_without_a_return_path_is_refused() {
    let bytes = [header(""), b"\x08\0\x02\0\x04\0\0\0\x01".to_vec()].concat();
    let host = target();
    let answer = feed(&host, &bytes);
    refused(&host, &answer, "no return path was opened");
    assert_eq!(answer.messages, []);
}

/// A stream of zero blocks cut at every byte: only the last cuts leave it whole.
#[test]
fn truncated_at_every_byte() {
    let pieces = [
        part(&[zero(0, "disk0"), zero(2048, "disk0")]),
        end(&[word(100, 4)]),
    ];
    let whole = stream(&pieces);
    let eof = whole.len() - DESCRIPTION.len();
    for length in 0..=whole.len() {
        let host = target();
        let answer = feed(&host, &whole[..length]);
        // Nothing but the description may be missing, and not a part of it.
        if length == eof || length == whole.len() {
            assert!(answer.received.is_ok(), "{length}: {:?}", answer.received);
            assert_eq!(answer.messages, [ReturnMessage::Shut(0)]);
            continue;
        }
        refused(&host, &answer, "truncated");
        let opened = length >= header("").len() + OPEN_RETURN_PATH.len();
        let expected: &[_] = if opened {
            &[ReturnMessage::Shut(1)]
        } else {
            &[]
        };
        assert_eq!(answer.messages, expected, "{length}");
    }
}

#[test]
fn truncated_inside_a_block() {
    let whole = stream(&good_pieces());
    let payload = header("").len() + 5 + start().len() + 5 + 14 + 14;
    let mut rng = rng();
    let cuts = [0, 1, MIB / 2, MIB - 1]
        .into_iter()
        .chain((0..10).map(|_| rng.usize(..MIB)));
    for cut in cuts {
        let host = target();
        let answer = feed(&host, &whole[..payload + cut]);
        refused(&host, &answer, "truncated");
        assert_eq!(answer.messages, [ReturnMessage::Shut(1)], "{cut}");
        assert!(
            host.memories[0].snapshot()[MIB..]
                .iter()
                .all(|byte| *byte == 0)
        );
    }
}

/// What our own source has sent, cut at seeded bytes.
#[test]
fn our_own_stream_truncated() {
    let mut rng = rng();
    let source = Host::source(&[2 * MIB], &mut rng);
    let (here, mut there) = UnixStream::pair().expect("a pair");
    let capture = thread::spawn(move || {
        let mut bytes = Vec::new();
        there.read_to_end(&mut bytes).map(|_| bytes)
    });
    let capabilities = Capabilities {
        return_path: false,
        ..Capabilities::default()
    };
    let running = start_source(&source, here, Parameters::default(), capabilities);
    let status = wait(&running);
    assert_eq!(
        (status.state, status.durable),
        (State::Completed, Some(false))
    );
    drop(running);
    let whole = capture.join().expect("no panic").expect("readable");
    let answer = feed(&target(), &whole);
    assert!(answer.received.is_ok(), "{:?}", answer.received);
    let last = whole.len() - 1;
    for round in 0..60 {
        let length = match round % 2 {
            0 => rng.usize(..last),
            _ => last - rng.usize(..150),
        };
        let host = target();
        let answer = feed(&host, &whole[..length]);
        if answer.received.is_ok() {
            assert_eq!(length, whole.len() - DESCRIPTION.len());
            assert!(host.memories[0].snapshot() == source.memories[0].snapshot());
        } else {
            refused(&host, &answer, "truncated");
        }
    }
}

/// Seeded damage to a good stream: an error or a whole disk, never a panic, never a hang, and never
/// guests on a disk that is not whole.
#[test]
fn a_damaged_stream_is_refused_or_harmless() {
    let mut rng = rng();
    let pieces = [
        part(&[zero(0, "disk0"), zero(2048, "disk0")]),
        end(&[word(100, 4)]),
    ];
    let whole = stream(&pieces);
    let rounds = match std::env::var_os("VMFERRY_LONG") {
        Some(_) => 20_000,
        None => 1000,
    };
    let mut refused = 0;
    for _ in 0..rounds {
        let mut bytes = whole.clone();
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(..bytes.len());
            match rng.u8(..5) {
                0 => bytes[at] = rng.u8(..),
                1 => bytes[at] ^= 1 << rng.u8(..8),
                2 => bytes.insert(at, rng.u8(..)),
                3 => drop(bytes.remove(at)),
                _ => bytes.rotate_left(at),
            }
        }
        let host = target();
        let answer = feed(&host, &bytes);
        let shut = answer.messages.last();
        match &answer.received {
            Ok(_) => {
                assert!(
                    host.memories[0]
                        .durable_snapshot()
                        .iter()
                        .all(|byte| *byte == 0)
                );
                assert_ne!(shut, Some(&ReturnMessage::Shut(1)));
            }
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().contains(char::is_control), "{error:?}");
                assert!(host.all_held(Some(Hold::Writes)));
                assert_ne!(shut, Some(&ReturnMessage::Shut(0)));
            }
        }
    }
    assert!(refused > rounds / 2);
}

#[test]
fn a_target_that_cannot_be_filled_is_refused() {
    let read_only = MemoryDisk::with_limits(Limits {
        length: 2 << 20,
        preferred_bytes: 4096,
        cluster_bytes: None,
        read_only: true,
    });
    for (disk, words) in [
        (read_only, "read-only"),
        (MemoryDisk::new(0), "has length 0"),
    ] {
        let host = Host::new(vec![disk], Hold::Writes);
        let answer = feed(&host, &stream(&good_pieces()));
        refused(&host, &answer, words);
        assert_eq!(host.says(), [None]);
    }
    let host = target();
    let lease = host.nodes[0].lease("a backup").expect("free");
    let answer = feed(&host, &stream(&good_pieces()));
    let error = answer.received.expect_err("in use").to_string();
    assert!(
        error.contains("disk 'disk0' is in use by a backup"),
        "{error}"
    );
    drop(lease);
    assert!(feed(&host, &stream(&good_pieces())).received.is_ok());
}

/// The n-th change or sync of the disk fails: no space, or a broken medium.
#[test]
fn a_failing_disk_is_never_called_whole() {
    const ENOSPC: i32 = 28;
    const EIO: i32 = 5;
    let pieces = [
        part(&[
            zero(0, "disk0"),
            data(2048, "disk0", 7),
            data(0, "disk0", 8),
        ]),
        b"\x08\0\x02\0\x04\0\0\0\x01".to_vec(),
        part(&[zero(2048, "disk0"), data(2048, "disk0", 9)]),
        end(&[word(100, 4)]),
    ];
    let count = |operation| {
        let host = target();
        assert!(feed(&host, &stream(&pieces)).received.is_ok());
        host.memories[0].count(operation)
    };
    for (operation, errno, words) in [
        (Operation::Write, ENOSPC, "No space left"),
        (Operation::WriteZeroes, EIO, "Input/output error"),
        (Operation::Flush, EIO, "Input/output error"),
        (Operation::Flush, ENOSPC, "No space left"),
    ] {
        let operations = count(operation);
        assert!(operations > 0);
        for nth in 1..=operations as u64 {
            let host = target();
            host.memories[0].fail(operation, nth, errno);
            let answer = feed(&host, &stream(&pieces));
            refused(&host, &answer, words);
            refused(&host, &answer, "disk 'disk0'");
            assert_eq!(answer.messages.last(), Some(&ReturnMessage::Shut(1)));
            assert_eq!(host.says(), [Some(Residence::Incoming)]);
            host.memories[0].heal();
            assert!(feed(&host, &stream(&pieces)).received.is_ok());
        }
    }
}

#[test]
fn a_stop_ends_it() {
    let host = target();
    let (mut here, there) = UnixStream::pair().expect("a pair");
    let stop = Stop::new().expect("an event");
    let destination = start_destination_with(&host, there, stop.clone());
    // With the PONG, everything before it has been taken.
    let bytes = [header(""), OPEN_RETURN_PATH.to_vec(), start()].concat();
    here.write_all(&bytes).expect("taken");
    here.write_all(b"\x08\0\x02\0\x04\0\0\0\x01")
        .expect("taken");
    let mut pong = [0; 8];
    here.read_exact(&mut pong).expect("a PONG");
    stop.trigger();
    let received = destination.join().expect("no panic");
    assert_eq!(received.expect_err("stopped").to_string(), "stopped");
    assert!(host.all_held(Some(Hold::Writes)));
    assert_eq!(host.says(), [Some(Residence::Incoming)]);
}

/// Without a `--save`, a virtual machine would be lost: refused before its disks are called whole.
/// With one, the stream without its disks is kept, and nothing passes before the disks have ended.
#[test]
fn the_rest_is_kept_or_refused() {
    let device = [named(4, 7, "timer", 2), vec![1; 24], footer(7)].concat();
    let tail = [&device[..], EOF, DESCRIPTION].concat();
    let head = [header("none"), start()].concat();
    let whole = [head.clone(), good_pieces().concat(), tail.clone()].concat();
    let early = [head, good_pieces()[0].clone(), tail.clone()].concat();

    let (received, kept) = feed_with_rest(&whole, None);
    received.expect("arrived");
    assert_eq!(kept.bytes, [header("none"), tail.clone()].concat());
    assert!(kept.finished);

    let (received, kept) = feed_with_rest(&early, None);
    let error = received.expect_err("the disks have not ended").to_string();
    assert!(error.contains("its disks have not ended"), "{error}");
    assert!(!kept.finished);

    for full_at in 0..3 {
        let (received, _) = feed_with_rest(&whole, Some(full_at));
        let error = received.expect_err("the file is full").to_string();
        assert!(
            error.contains("the rest of the stream could not be saved"),
            "{error}"
        );
    }
}

#[derive(Default)]
struct Kept {
    bytes: Vec<u8>,
    finished: bool,
    /// So many writes work.
    writes_left: Option<usize>,
}

impl Rest for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match &mut self.writes_left {
            Some(0) => return Err(std::io::ErrorKind::StorageFull.into()),
            Some(left) => *left -= 1,
            None => {}
        }
        self.bytes.extend(bytes);
        Ok(())
    }

    fn finish(&mut self) -> std::io::Result<()> {
        self.finished = true;
        Ok(())
    }
}

fn feed_with_rest(bytes: &[u8], writes_left: Option<usize>) -> (Received, Kept) {
    let host = target();
    let (mut here, there) = UnixStream::pair().expect("a pair");
    let bytes = bytes.to_vec();
    let writer = thread::spawn(move || {
        let _ = here.write_all(&bytes);
    });
    let mut kept = Kept {
        writes_left,
        ..Kept::default()
    };
    let job = DestinationJob {
        disks: destination_disks(&host),
        coverage: Coverage::Whole,
        rest: Some(&mut kept),
        any_machine: true,
        keep_records: true,
    };
    let stop = Stop::new().expect("an event");
    let there = channel(there, Direction::Incoming, &stop);
    let received: Result<Arrived, _> = receive(there, job, &Published::default());
    let held = match &received {
        Ok(_) => Hold::Nothing,
        Err(_) => Hold::Writes,
    };
    assert!(host.all_held(Some(held)));
    writer.join().expect("no panic");
    (received, kept)
}

#[test]
fn two_disks_of_one_name_are_refused() {
    let memory = MemoryDisk::new(1 << 20);
    let disk = || DestinationDisk {
        node: Node::new("disk0", Box::new(memory.clone()), Hold::Writes),
        record: None,
    };
    let (_here, there) = UnixStream::pair().expect("a pair");
    let stop = Stop::new().expect("an event");
    let job = DestinationJob {
        disks: vec![disk(), disk()],
        coverage: Coverage::Whole,
        rest: None,
        any_machine: false,
        keep_records: false,
    };
    let there = channel(there, Direction::Incoming, &stop);
    let error = receive(there, job, &Published::default()).expect_err("refused");
    assert_eq!(error.to_string(), "two disks are named 'disk0'");
}
