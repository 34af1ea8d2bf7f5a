//! Parked machines that our own source sends, and that are parked again.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use vmferry_channel::{Channel, Direction, Stop};
use vmferry_image::{FileStorage, Image, IndexPlace};
use vmferry_migration::{
    Capabilities, Parameters, Published, RunningSource, SourceJob, State, Target,
};
use vmferry_relay::park::{ParkError, ParkOptions, Parked, Parker, receive};
use vmferry_relay::restore::{self, RestoreOptions};
use vmferry_stream::{Section, SectionId};

use crate::contents::{Contents, bytes_of, capture, captures, read, seeded};

/// Only ever waited out by a test that fails.
const PATIENCE: Duration = Duration::from_secs(60);

fn image_of(stream: &[u8]) -> (tempfile::TempDir, Arc<Image>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, stream).unwrap();
    let storage = FileStorage::open(&path, 0).unwrap();
    let image = Image::open(Arc::new(storage), &IndexPlace::Beside, &mut |_| ()).unwrap();
    (folder, Arc::new(image))
}

fn channel(socket: UnixStream, direction: Direction) -> Channel {
    let stop = Stop::new().unwrap();
    Channel::from_fd(OwnedFd::from(socket), direction, "the test", &stop).unwrap()
}

/// A connection: the source's end and the destination's. It ends after so many bytes, if that is said.
fn connection(cut: Option<u64>) -> (Target, Channel) {
    let (source, mut near) = UnixStream::pair().unwrap();
    let (mut far, destination) = UnixStream::pair().unwrap();
    let (mut near_back, mut far_back) = (near.try_clone().unwrap(), far.try_clone().unwrap());
    thread::spawn(move || {
        let limit = cut.unwrap_or(u64::MAX);
        let _ = std::io::copy(&mut Read::by_ref(&mut near).take(limit), &mut far);
        match cut {
            Some(_) => drop((near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both))),
            None => drop(far.shutdown(Shutdown::Write)),
        }
    });
    thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(length @ 1..) = far_back.read(&mut piece) {
            if near_back.write_all(&piece[..length]).is_err() {
                return;
            }
        }
        // It may be gone already.
        let _ = near_back.shutdown(Shutdown::Write);
    });
    let target = Target::Channel(channel(source, Direction::Outgoing));
    (target, channel(destination, Direction::Incoming))
}

fn start(image: &Arc<Image>, target: Target, postcopy: bool, two_way: bool) -> RunningSource {
    let machine = restore::machine(image, RestoreOptions { postcopy }).unwrap();
    let job = SourceJob {
        disks: Vec::new(),
        target,
        parameters: Parameters::default(),
        capabilities: Capabilities {
            return_path: two_way,
            ..Capabilities::default()
        },
        stop: Stop::new().unwrap(),
    };
    RunningSource::start_machine(job, machine, Published::default()).unwrap()
}

/// Send an image and park it. After the first connection come others, as many as `cuts` has.
fn travel(image: &Arc<Image>, postcopy: bool, two_way: bool, cuts: &[u64]) -> Parked {
    let mut cuts = cuts
        .iter()
        .copied()
        .map(Some)
        .collect::<Vec<_>>()
        .into_iter();
    let (target, first) = connection(cuts.next().flatten());
    let (published, stop) = (Published::default(), Stop::new().unwrap());
    let file = tempfile::tempfile().unwrap();
    let parker = Parker::new(file, ParkOptions::default()).unwrap();
    let (wants, wanted) = mpsc::channel();
    let (gives, given) = mpsc::channel();
    let source = start(image, target, postcopy, two_way);
    let parked = thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut reconnect = |error: &ParkError| {
                wants.send(error.to_string()).unwrap();
                given.recv().ok()
            };
            receive(first, parker, &mut reconnect, &stop, &published)
        });
        for error in wanted {
            let paused = source.published().wait_until(PATIENCE, |status| {
                status.state == State::PostcopyPaused || status.state.is_over()
            });
            assert_eq!(paused.state, State::PostcopyPaused, "{error}: {paused:?}");
            let (target, next) = connection(cuts.next().flatten());
            gives.send(next).unwrap();
            source.resume(target, Stop::new().unwrap()).unwrap();
        }
        receiver.join().unwrap()
    });
    let parked = parked.unwrap_or_else(|error| panic!("{error}; {:?}", source.published()));
    let status = source
        .published()
        .wait_until(PATIENCE, |status| status.state.is_over());
    assert_eq!(status.state, State::Completed, "{status:?}");
    assert_eq!(parked.source_told, two_way.then_some(true));
    parked
}

/// Section ids are the sender's own, and postcopy has no description.
fn alike(contents: Contents, postcopy: bool) -> Contents {
    let zero = |(section, body): (Section, Vec<u8>)| {
        let id = SectionId(0);
        (Section { id, ..section }, body)
    };
    Contents {
        devices: contents.devices.into_iter().map(zero).collect(),
        description: contents.description.filter(|_| !postcopy),
        live: Vec::new(),
        ..contents
    }
}

fn names() -> impl Iterator<Item = String> {
    // A footerless stream does not say where devices end, unless it describes them.
    let others = [
        "multifd",
        "preempt",
        "blk",
        "none",
        "pc-2.",
        "ignore-shared",
    ];
    captures()
        .into_iter()
        .filter(move |name| !others.iter().any(|other| name.starts_with(other)))
}

#[test]
fn what_is_sent_from_a_file_is_parked_again() {
    for name in names() {
        let stream = capture(&name);
        let (_folder, image) = image_of(&stream);
        let (expected, ..) = read(&stream).unwrap();
        for (postcopy, two_way) in [(false, false), (false, true), (true, true)] {
            let parked = travel(&image, postcopy, two_way, &[]);
            assert_eq!(parked.was_postcopy, postcopy, "{name}");
            let (found, ..) = read(&bytes_of(&parked.file)).unwrap();
            let (found, expected) = (
                alike(found, postcopy || expected.description.is_none()),
                alike(read(&stream).unwrap().0, postcopy),
            );
            assert!(found == expected, "{name}, postcopy {postcopy}");
        }
    }
}

#[test]
fn what_is_sent_from_a_file_goes_on_over_other_connections() {
    let mut rng = seeded();
    let stream = capture("pc-100");
    let (_folder, image) = image_of(&stream);
    let expected = alike(read(&stream).unwrap().0, true);
    let whole = stream.len() as u64;
    for _ in 0..5 {
        // Behind the package, which is some 20 KiB and comes first.
        let mut cuts = vec![rng.u64(whole / 4..whole / 2)];
        cuts.extend((0..rng.u8(..3)).map(|_| rng.u64(5_000..whole / 8)));
        println!("{cuts:?} of {whole}");
        let parked = travel(&image, true, true, &cuts);
        let (found, ..) = read(&bytes_of(&parked.file)).unwrap();
        assert!(alike(found, true) == expected);
    }
}
