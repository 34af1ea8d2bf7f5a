//! What a source is told while its machine is parked.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use vmferry_channel::{Channel, Reader, Stop, Writer};
use vmferry_migration::{Published, State};
use vmferry_relay::park::{ParkError, ParkOptions, Parked, Parker, receive};
use vmferry_stream::return_path::{ReturnDecoder, ReturnMessage};
use vmferry_stream::{Record, Step};

use crate::contents::{bytes_of, capture, park, read, records};
use crate::recovery::{NextConnection, package_end};

const PATIENCE: Duration = Duration::from_secs(60);

/// The source's side of a connection.
struct Source {
    reader: Reader,
    writer: Writer,
    decoder: ReturnDecoder,
    window: Vec<u8>,
}

fn pair() -> (Source, Channel) {
    let (here, there) = (Stop::new().unwrap(), Stop::new().unwrap());
    let (source, destination) = Channel::pair(&here, &there).unwrap();
    let (Some(reader), Some(writer)) = source.split() else {
        panic!("a pair goes both ways");
    };
    let source = Source {
        reader,
        writer,
        decoder: ReturnDecoder::new(),
        window: Vec::new(),
    };
    (source, destination)
}

impl Source {
    fn send(&mut self, bytes: &[u8]) {
        self.writer.write_all(bytes).unwrap();
    }

    /// The next message, with the bitmap that belongs to it; `None` at the end.
    fn hear(&mut self) -> Option<(ReturnMessage, Vec<u8>)> {
        let mut heard: Option<(ReturnMessage, Vec<u8>)> = None;
        loop {
            match self.decoder.step(&self.window).unwrap() {
                Step::Record {
                    record: record @ ReturnMessage::ReceivedBitmap { .. },
                    used,
                } => {
                    self.window.drain(..used);
                    heard = Some((record, Vec::new()));
                }
                Step::Record {
                    record: ReturnMessage::ReceivedBitmapEnd,
                    used,
                } => {
                    self.window.drain(..used);
                    return heard;
                }
                Step::Record { record, used } => {
                    self.window.drain(..used);
                    return Some((record, Vec::new()));
                }
                Step::Payload(bytes) => {
                    while self.window.len() < bytes as usize {
                        assert!(self.read());
                    }
                    let bits = self.window.drain(..bytes as usize).collect();
                    heard.as_mut().unwrap().1 = bits;
                }
                Step::NeedMore(_) | Step::End => {
                    if !self.read() {
                        assert!(self.window.is_empty());
                        return None;
                    }
                }
            }
        }
    }

    fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        let deadline = Instant::now() + PATIENCE;
        let length = self.reader.read_until(&mut bytes, Some(deadline)).unwrap();
        self.window.extend_from_slice(&bytes[..length]);
        length > 0
    }

    fn hear_all(mut self) -> Vec<ReturnMessage> {
        std::iter::from_fn(|| self.hear().map(|(message, _)| message)).collect()
    }
}

fn receiving(
    channel: Channel,
    published: &Published,
    stop: &Stop,
    mut reconnect: impl FnMut(&ParkError) -> Option<Channel>,
) -> Result<Parked, ParkError> {
    let file = tempfile::tempfile().unwrap();
    let parker = Parker::new(file, ParkOptions::default()).unwrap();
    receive(channel, parker, &mut reconnect, stop, published)
}

fn no_other(error: &ParkError) -> Option<Channel> {
    panic!("no other connection can help: {error}")
}

#[test]
fn sources_hear_what_they_wait_for() {
    for (name, pongs) in [
        ("return-path-72.fwd", &[1][..]),
        ("return-path-100.fwd", &[1]),
        ("switchover-ack-100.fwd", &[1]),
        ("postcopy-advised-only-100.fwd", &[1]),
        ("postcopy-72.fwd", &[1, 2, 3, 4]),
        ("postcopy-100.fwd", &[1, 2, 3, 4]),
    ] {
        let stream = capture(name);
        let (mut source, destination) = pair();
        let published = Published::default();
        let stop = Stop::new().unwrap();
        let (parked, heard) = thread::scope(|scope| {
            let receiver = scope.spawn(|| receiving(destination, &published, &stop, no_other));
            // The connection stays open, as that of a QEMU does.
            source.send(&stream);
            let parked = receiver
                .join()
                .unwrap()
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            (parked, source.hear_all())
        });
        let mut expected: Vec<_> = pongs
            .iter()
            .map(|value| ReturnMessage::Pong(*value))
            .collect();
        expected.push(ReturnMessage::Shut(0));
        assert_eq!(heard, expected, "{name}");
        assert_eq!(parked.source_told, Some(true), "{name}");
        assert!(bytes_of(&parked.file) == park(&stream).unwrap(), "{name}");
        let status = published.get();
        assert_eq!(
            (status.state, status.durable),
            (State::Completed, Some(true)),
            "{name}"
        );
        assert_eq!(
            status.ram.unwrap().total_bytes,
            parked.memory_bytes,
            "{name}"
        );
    }
}

#[test]
fn a_source_that_does_not_listen_hears_nothing() {
    for name in ["pc-72", "pc-100", "none-100"] {
        let stream = capture(name);
        let (mut source, destination) = pair();
        let (published, stop) = (Published::default(), Stop::new().unwrap());
        thread::scope(|scope| {
            let receiver = scope.spawn(|| receiving(destination, &published, &stop, no_other));
            source.send(&stream);
            source.writer.shutdown().unwrap();
            let parked = receiver.join().unwrap().unwrap();
            assert_eq!(parked.source_told, None);
        });
        assert_eq!(source.hear_all(), []);
    }
}

#[test]
fn a_source_without_a_description_ends_by_closing() {
    let stream = capture("no-vmdesc-100");
    let (mut source, destination) = pair();
    let (published, stop) = (Published::default(), Stop::new().unwrap());
    thread::scope(|scope| {
        let receiver = scope.spawn(|| receiving(destination, &published, &stop, no_other));
        source.send(&stream);
        source.writer.shutdown().unwrap();
        receiver.join().unwrap().unwrap();
    });
}

/// A file that takes nothing: the guest stays where it is.
#[test]
fn a_full_disk_is_told() {
    let stream = capture("return-path-100.fwd");
    let (mut source, destination) = pair();
    let (published, stop) = (Published::default(), Stop::new().unwrap());
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let parker = Parker::new(file, ParkOptions::default()).unwrap();
    let error = thread::scope(|scope| {
        let receiver =
            scope.spawn(|| receive(destination, parker, &mut no_other, &stop, &published));
        // It may be gone before all of it was taken.
        let _ = source.writer.write_all(&stream);
        receiver.join().unwrap().unwrap_err()
    });
    assert!(matches!(error, ParkError::File { .. }), "{error}");
    assert!(error.to_string().contains("byte "), "{error}");
    let last = std::iter::from_fn(|| source.hear().map(|(message, _)| message))
        .find(|message| matches!(message, ReturnMessage::Shut(_)));
    assert_eq!(last, Some(ReturnMessage::Shut(1)));
}

/// Before the package the guest is at the source, which hears that it stays there.
#[test]
fn a_failure_before_the_package_is_told() {
    let stream = capture("postcopy-100.fwd");
    let cut = package_end(&stream) - 100;
    for what in ["close", "stop", "garbage"] {
        let (mut source, destination) = pair();
        let (published, stop) = (Published::default(), Stop::new().unwrap());
        let error = thread::scope(|scope| {
            let receiver = scope.spawn(|| receiving(destination, &published, &stop, no_other));
            match what {
                "close" => {
                    source.send(&stream[..cut]);
                    source.writer.shutdown().unwrap();
                }
                "stop" => {
                    source.send(&stream[..cut]);
                    stop.trigger();
                }
                _ => source.send(&[&stream[..package_start(&stream)], &[0x55; 50]].concat()),
            }
            receiver.join().unwrap().unwrap_err()
        });
        assert!(
            !matches!(error, ParkError::HalfHere { .. }),
            "{what}: {error}"
        );
        // Unread bytes on a socket that closes may take what was said with them.
        if what != "stop" {
            let heard = source.hear_all();
            assert_eq!(
                heard.last(),
                Some(&ReturnMessage::Shut(1)),
                "{what}: {heard:?}"
            );
        }
        assert_eq!(published.get().state, State::Failed, "{what}");
    }
}

fn package_start(stream: &[u8]) -> usize {
    let is_package =
        |record: &Record| matches!(record, Record::Command(it) if it.name() == "PACKAGED");
    let mut records = records(stream).into_iter();
    let (start, ..) = records
        .find(|(_, record, _)| is_package(record))
        .expect("a package");
    start
}

/// Behind the package half of the guest is here: that is said, and so is SHUT 1, with which QEMU 10 takes
/// its guest back.
#[test]
fn a_stop_behind_the_package_says_what_it_means() {
    let stream = capture("postcopy-100.fwd");
    let (mut source, destination) = pair();
    let (published, stop) = (Published::default(), Stop::new().unwrap());
    let error = thread::scope(|scope| {
        let receiver = scope.spawn(|| receiving(destination, &published, &stop, no_other));
        source.send(&stream[..package_end(&stream)]);
        let postcopy =
            published.wait_until(PATIENCE, |status| status.state == State::PostcopyActive);
        assert!(postcopy.remaining_bytes > 0);
        stop.trigger();
        let last = std::iter::from_fn(|| source.hear())
            .find(|(message, _)| matches!(message, ReturnMessage::Shut(_)));
        assert_eq!(last, Some((ReturnMessage::Shut(1), Vec::new())));
        // A source that has to send everything before it can go on.
        source.send(&stream[package_end(&stream)..]);
        source.writer.shutdown().unwrap();
        receiver.join().unwrap().unwrap_err()
    });
    let told = matches!(
        &error,
        ParkError::HalfHere {
            missing_pages: 1..,
            source_told: true,
            ..
        }
    );
    assert!(told, "{error:?}");
}

/// A package that is of no use: the source is in its postcopy already, and must be let send the rest.
#[test]
fn a_package_of_no_use_is_told_and_the_rest_is_thrown_away() {
    let stream = capture("postcopy-100.fwd");
    let start = package_start(&stream);
    let too_long = [0x01, 0, 0, 1];
    for spoilt in [
        [&stream[start + 5..][..4], &[9]].concat(),
        too_long.to_vec(),
    ] {
        let mut stream = stream.clone();
        // Its length, or its first byte.
        stream[start + 5..][..spoilt.len()].copy_from_slice(&spoilt);
        let (mut source, destination) = pair();
        let (published, stop) = (Published::default(), Stop::new().unwrap());
        let error = thread::scope(|scope| {
            let receiver = scope.spawn(|| receiving(destination, &published, &stop, no_other));
            source.send(&stream);
            let last = std::iter::from_fn(|| source.hear())
                .find(|(message, _)| matches!(message, ReturnMessage::Shut(_)));
            assert_eq!(last, Some((ReturnMessage::Shut(1), Vec::new())));
            source.send(&[0x55; 1 << 20]);
            source.writer.shutdown().unwrap();
            receiver.join().unwrap().unwrap_err()
        });
        let told = matches!(
            error,
            ParkError::HalfHere {
                source_told: true,
                ..
            }
        );
        assert!(told, "{error}");
    }
}

/// Nobody has to wait for ever for who says nothing.
#[test]
fn patience_has_an_end() {
    if std::env::var_os("VMFERRY_LONG").is_none_or(|value| value != "1") {
        println!("left out: takes 20 s (VMFERRY_LONG=1)");
        return;
    }
    for (stream, is_whole) in [(capture("no-vmdesc-100"), true), (b"QEVM".to_vec(), false)] {
        let (mut source, destination) = pair();
        let (published, stop) = (Published::default(), Stop::new().unwrap());
        thread::scope(|scope| {
            let receiver = scope.spawn(|| receiving(destination, &published, &stop, no_other));
            source.send(&stream);
            assert_eq!(receiver.join().unwrap().is_ok(), is_whole);
        });
    }
}

#[test]
fn a_broken_postcopy_waits_for_the_next_connection() {
    let stream = capture("postcopy-100.fwd");
    let (mut expected, _, _) = read(&stream).unwrap();
    expected.description = Some(b"{}".to_vec());
    let next = NextConnection::new(&stream, &expected);
    let package = package_end(&stream);
    for cut in [package, package + 20, package + 9000, stream.len() - 1] {
        let (mut source, destination) = pair();
        let (mut other, second) = pair();
        let (mut third, last) = pair();
        let (published, stop) = (Published::default(), Stop::new().unwrap());
        let mut connections = vec![last, second];
        let parked = thread::scope(|scope| {
            let again = published.clone();
            let reconnect = move |_: &ParkError| {
                let status = again.get();
                assert_eq!(status.state, State::PostcopyPaused);
                assert!(status.error.is_some());
                connections.pop()
            };
            let receiver = scope.spawn(|| receiving(destination, &published, &stop, reconnect));
            source.send(&stream[..cut]);
            source.writer.shutdown().unwrap();
            // Somebody else comes first.
            other.send(b"GET / HTTP/1.1\r\n\r\n");
            third.send(&next.questions);
            let mut received = BTreeMap::new();
            loop {
                match third.hear().expect("an answer") {
                    (ReturnMessage::ReceivedBitmap { block, .. }, bits) => {
                        received.insert(block.to_string(), bits);
                    }
                    (ReturnMessage::ResumeAck(1), _) => break,
                    (other, _) => panic!("{other:?}"),
                }
            }
            third.send(&next.rest(&received));
            receiver.join().unwrap().unwrap()
        });
        assert!(parked.source_told == Some(true) && parked.was_postcopy);
        // The PING of the package is answered again: the answer may have been lost.
        assert_eq!(
            third.hear_all(),
            [ReturnMessage::Pong(3), ReturnMessage::Shut(0)]
        );
        assert_eq!(other.hear_all(), []);
        let (found, ..) = read(&bytes_of(&parked.file)).unwrap();
        assert!(found == expected, "{cut}");
    }
}

/// Nobody can say when the rest comes: whoever waits may give up.
#[test]
fn a_broken_postcopy_can_be_given_up() {
    let stream = capture("postcopy-72.fwd");
    let (mut source, destination) = pair();
    let (published, stop) = (Published::default(), Stop::new().unwrap());
    let error = thread::scope(|scope| {
        let receiver = scope.spawn(|| receiving(destination, &published, &stop, |_| None));
        source.send(&stream[..package_end(&stream) + 5000]);
        source.writer.shutdown().unwrap();
        receiver.join().unwrap().unwrap_err()
    });
    let text = error.to_string();
    assert!(
        matches!(
            error,
            ParkError::HalfHere {
                source_told: false,
                ..
            }
        ),
        "{text}"
    );
    assert!(
        text.contains("not parked") && text.contains("postcopy-paused"),
        "{text}"
    );
    assert_eq!(published.get().state, State::Failed);
}

/// A connection that breaks may have lost the last word: then the source lets its guest go on.
#[test]
fn a_source_that_broke_off_was_not_told() {
    let stream = capture("return-path-100.fwd");
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    let (last, published, stop) = (
        Stop::new().unwrap(),
        Published::default(),
        Stop::new().unwrap(),
    );
    let there = std::os::fd::OwnedFd::from(there);
    let direction = vmferry_channel::Direction::Incoming;
    let channel = Channel::from_fd(there, direction, "the test", &last).unwrap();
    let parked = thread::scope(|scope| {
        let receiver = scope.spawn(|| receiving(channel, &published, &stop, no_other));
        let mut here = here;
        std::io::Write::write_all(&mut here, &stream).unwrap();
        // The pong is not read: closing resets the connection.
        while published.get().wire_bytes < stream.len() as u64 && !receiver.is_finished() {
            thread::yield_now();
        }
        drop(here);
        receiver.join().unwrap()
    });
    assert_eq!(parked.unwrap().source_told, Some(false));
}
