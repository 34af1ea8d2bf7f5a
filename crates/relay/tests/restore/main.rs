//! Images of real machines, sent as precopy and as postcopy: what arrives is what was parked.

#[expect(dead_code, reason = "shared with the tests of parking")]
#[path = "../park/contents.rs"]
mod contents;
mod destination;

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vmferry_channel::{Channel, Direction, Stop};
use vmferry_image::{FileStorage, Image, IndexPlace};
use vmferry_migration::{
    Capabilities, Parameters, Published, RunningSource, SourceJob, State, Status, Target,
};
use vmferry_relay::restore::{self, RestoreError, RestoreOptions};
use vmferry_stream::{Encoder, InstanceId, Name, Record, Section, SectionId, SectionKind};

use contents::{Contents, capture, captures, read};
use destination::{Arrived, Destination};

/// Only ever waited out by a test that fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// Not the stream of a whole machine, or of one with disks.
fn is_other(name: &str) -> bool {
    ["multifd", "preempt", "blk"]
        .iter()
        .any(|other| name.starts_with(other))
}

/// An image, and the folder that it is in.
fn image_of(stream: &[u8]) -> (tempfile::TempDir, Arc<Image>) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    std::fs::write(&path, stream).expect("written");
    let storage = FileStorage::open(&path, 0).expect("a file");
    let image = Image::open(Arc::new(storage), &IndexPlace::Beside, &mut |_| {});
    (folder, Arc::new(image.expect("an image")))
}

fn job(socket: UnixStream, return_path: bool) -> SourceJob {
    let stop = Stop::new().expect("an event");
    let socket = OwnedFd::from(socket);
    let channel = Channel::from_fd(socket, Direction::Outgoing, "the test", &stop);
    SourceJob {
        disks: Vec::new(),
        target: Target::Channel(channel.expect("a socket")),
        parameters: Parameters::default(),
        capabilities: Capabilities {
            return_path,
            ..Capabilities::default()
        },
        stop,
    }
}

fn start(image: &Arc<Image>, postcopy: bool, socket: UnixStream) -> RunningSource {
    let machine = restore::machine(image, RestoreOptions { postcopy }).expect("a machine");
    let source = RunningSource::start_machine(job(socket, postcopy), machine, Published::default());
    source.expect("it starts")
}

fn end_of(source: &RunningSource) -> Status {
    let status = source
        .published()
        .wait_until(PATIENCE, |status| status.state.is_over());
    assert!(status.state.is_over(), "{status:?}");
    status
}

/// What a destination would get by a precopy.
fn precopy(image: &Arc<Image>) -> Vec<u8> {
    let (here, mut there) = UnixStream::pair().expect("a pair");
    let reader = thread::spawn(move || {
        let mut stream = Vec::new();
        there.read_to_end(&mut stream).map(|_| stream)
    });
    let source = start(image, false, here);
    let status = end_of(&source);
    assert_eq!(status.state, State::Completed, "{status:?}");
    drop(source);
    reader.join().expect("no panic").expect("a stream")
}

/// Section ids are the sender's own.
fn without_ids(contents: Contents) -> Contents {
    let zero = |(section, body): (Section, Vec<u8>)| {
        let id = SectionId(0);
        (Section { id, ..section }, body)
    };
    Contents {
        devices: contents.devices.into_iter().map(zero).collect(),
        ..contents
    }
}

fn assert_same(name: &str, sent: &Contents, parked: &Contents) {
    let blocks = |contents: &Contents| Vec::from_iter(contents.memory.keys().cloned());
    assert_eq!(blocks(sent), blocks(parked), "{name}");
    for (block, (bytes, _)) in &parked.memory {
        let page = (bytes.chunks(4096).zip(sent.memory[block].0.chunks(4096)))
            .position(|(left, right)| left != right);
        assert_eq!(page, None, "{name}: page of {block}");
    }
    let sections =
        |contents: &Contents| Vec::from_iter(contents.devices.iter().map(|it| it.0.clone()));
    assert_eq!(sections(sent), sections(parked), "{name}");
    assert!(sent.devices == parked.devices, "{name}: state of devices");
}

#[test]
fn every_machine_by_precopy() {
    for name in captures().iter().filter(|name| !is_other(name)) {
        let stream = capture(name);
        let (parked, _, _) = read(&stream).expect("a stream");
        let (_folder, image) = image_of(&stream);
        let (sent, commands, _) = read(&precopy(&image)).expect("a stream");
        let (sent, parked) = (without_ids(sent), without_ids(parked));
        assert_same(name, &sent, &parked);
        // What was not there does not go.
        for (block, (_, absent)) in &parked.memory {
            assert_eq!(sent.memory[block].1, *absent, "{name}: {block}");
        }
        assert_eq!(sent.live.first(), parked.live.first(), "{name}");
        let expected = parked.description.or_else(|| {
            let has_footers = image.head().footers;
            has_footers.then(|| b"{}".to_vec())
        });
        assert_eq!(sent.description, expected, "{name}");
        let switchover_start = image.head().switchover_start;
        let expected: &[&str] = if switchover_start {
            &["SWITCHOVER_START"]
        } else {
            &[]
        };
        assert_eq!(commands, expected, "{name}");
    }
}

#[test]
fn every_machine_by_postcopy() {
    let rng = &mut contents::seeded();
    for name in captures().iter().filter(|name| !is_other(name)) {
        let stream = capture(name);
        let (parked, _, _) = read(&stream).expect("a stream");
        let (_folder, image) = image_of(&stream);
        if image.head().blocks.is_empty() {
            continue;
        }
        let (here, there) = UnixStream::pair().expect("a pair");
        let destination = Destination::begin(there, rng.fork());
        let source = start(&image, true, here);
        let status = end_of(&source);
        assert_eq!(status.state, State::Completed, "{name}: {status:?}");
        let asked = source.requested();
        drop(source);
        let arrived = destination.end();
        let (sent, commands, _) = read(&arrived.stream).expect("a stream");
        let (mut sent, mut parked) = (without_ids(sent), without_ids(parked));
        if !image.head().footers {
            // Nothing says where one ends, without a description.
            for (section, body) in &parked.devices {
                let is_there = arrived
                    .stream
                    .windows(body.len().max(1))
                    .any(|it| it == body);
                assert!(is_there, "{name}: {section:?}");
            }
            sent.devices.clear();
            parked.devices.clear();
        }
        assert_same(name, &sent, &parked);
        assert!(
            commands.iter().any(|name| name == "PACKAGED"),
            "{commands:?}"
        );
        if name.starts_with("ignore-shared") {
            // This guest asks for memory that is shared, too, which is not sent.
            continue;
        }
        assert_eq!(asked.len(), arrived.requests, "{name}");

        // What was asked for goes first, the next time, and in that order; unless something else has to
        // go before the guest can run.
        if !image.head().live.is_empty() {
            continue;
        }
        let order = restore::learnt(&image, &asked);
        image.keep_working_set(&order).expect("kept");
        let (here, there) = UnixStream::pair().expect("a pair");
        let destination = Destination::begin_silent(there);
        let source = start(&image, true, here);
        assert_eq!(end_of(&source).state, State::Completed);
        drop(source);
        let Arrived {
            pages: first,
            early,
            ..
        } = destination.end();
        let blocks = &image.head().blocks;
        let wanted = order.iter().flat_map(|range| {
            let name = &blocks[range.block.0].name;
            let pages = range.first_page..range.first_page + range.pages;
            pages.map(|page| (name.to_string(), page * 4096))
        });
        let wanted: Vec<_> = wanted.collect();
        assert!(first.starts_with(&wanted), "{name}");
        // Nobody has to wait for what there was time for.
        assert!(
            arrived.early == 0 && early > 0 && early <= wanted.len(),
            "{name}: {early}"
        );
    }
}

#[test]
fn a_live_section_that_nobody_knows_is_refused() {
    let mut stream = Vec::new();
    let mut encoder = Encoder::new(true);
    let mut put = |record: &Record| {
        let mut bytes = Vec::new();
        encoder.record(record, &mut bytes);
        stream.extend(bytes);
    };
    put(&Record::Header { version: 3 });
    for kind in [SectionKind::Start, SectionKind::End] {
        put(&Record::Section(Section {
            kind,
            id: SectionId(5),
            name: Name::new("vfio").expect("short"),
            instance: InstanceId(0),
            version: 1,
        }));
        put(&Record::SectionEnd { id: SectionId(5) });
    }
    put(&Record::Eof);
    put(&Record::Description { bytes: 2 });
    stream.extend(b"{}");
    let (_folder, image) = image_of(&stream);
    let refused = restore::machine(&image, RestoreOptions::default());
    let error = refused.map(|_| ()).expect_err("refused");
    assert!(matches!(error, RestoreError::Live(_)), "{error}");
    assert_eq!(
        error.to_string(),
        "the live section 'vfio' of a parked machine cannot be sent"
    );
}
