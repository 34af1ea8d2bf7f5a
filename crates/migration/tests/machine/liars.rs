//! Destinations that say what is not so, or too early, or not at all.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel as queue};
use std::thread;

use vmferry_channel::Direction;
use vmferry_migration::{
    Capabilities, Decision, Parameters, Published, RunningSource, SourceJob, State, Status, Target,
};
use vmferry_ram::GuestRam;
use vmferry_savevm::Name;
use vmferry_stream::return_path::ReturnMessage;
use vmferry_stream::{Command, Decoder, Options, Record, Step};

use crate::vm::{PATIENCE, Vm, channel, rng};

/// The PING before the package, and the one in it.
const BARRIER: u32 = u32::MAX;
const LOADED: u32 = u32::MAX - 1;

#[derive(Debug, PartialEq)]
enum Heard {
    Ping(u32),
    Package,
    Eof,
}

/// A destination that a test speaks for.
struct Liar {
    socket: UnixStream,
    heard: Receiver<Heard>,
}

impl Liar {
    fn new() -> (UnixStream, Self) {
        let (here, socket) = UnixStream::pair().expect("a pair");
        let (tell, heard) = queue();
        let ear = socket.try_clone().expect("a descriptor");
        thread::spawn(move || listen(ear, &tell));
        (here, Self { socket, heard })
    }

    fn say(&mut self, message: &ReturnMessage) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        // Who has hung up does not hear it.
        let _ = self.socket.write_all(&bytes);
    }

    /// Answer PINGs until something is heard; that is not answered.
    fn answer_until(&mut self, wanted: &Heard) {
        loop {
            let heard = self
                .heard
                .recv_timeout(PATIENCE)
                .expect("it says something");
            if heard == *wanted {
                return;
            }
            if let Heard::Ping(value) = heard {
                self.say(&ReturnMessage::Pong(value));
            }
        }
    }

    fn close(&self) {
        self.socket.shutdown(Shutdown::Both).expect("open");
    }
}

fn listen(mut socket: UnixStream, tell: &Sender<Heard>) {
    let mut decoder = Decoder::new(Options::default());
    let (mut window, mut skip) = (Vec::new(), 0);
    let (mut is_package, mut was_package) = (false, false);
    let mut piece = vec![0; 1 << 16];
    while let Ok(length @ 1..) = socket.read(&mut piece) {
        window.extend_from_slice(&piece[..length]);
        loop {
            let skipped = skip.min(window.len());
            window.drain(..skipped);
            skip -= skipped;
            if skip > 0 {
                break;
            }
            if std::mem::take(&mut was_package) {
                let _ = tell.send(Heard::Package);
            }
            match decoder.step(&window) {
                Ok(Step::Payload(bytes)) => (skip, was_package) = (bytes as usize, is_package),
                Ok(Step::Record { record, used }) => {
                    window.drain(..used);
                    is_package = matches!(record, Record::Command(Command::Packaged { .. }));
                    let _ = match record {
                        Record::Command(Command::Ping(value)) => tell.send(Heard::Ping(value)),
                        Record::Eof => tell.send(Heard::Eof),
                        _ => Ok(()),
                    };
                }
                _ => break,
            }
        }
    }
}

fn start(from: &Vm, socket: UnixStream) -> RunningSource {
    let (channel, stop) = channel(socket, Direction::Outgoing);
    let job = SourceJob {
        disks: Vec::new(),
        target: Target::Channel(channel),
        parameters: Parameters {
            downtime_limit: PATIENCE,
            max_bandwidth: Some(4 << 20),
        },
        capabilities: Capabilities::default(),
        stop,
    };
    let source = RunningSource::start_machine(job, from.source(true), Published::default());
    source.expect("a migration")
}

fn settled(source: &RunningSource) -> Status {
    let done = |status: &Status| status.state.is_over() || status.state == State::PostcopyPaused;
    let status = source.published().wait_until(PATIENCE, done);
    assert!(done(&status), "never happened: {status:?}");
    status
}

/// A source that has sent its package to a liar.
fn switched(from: &Vm) -> (RunningSource, Liar) {
    let (socket, mut liar) = Liar::new();
    let source = start(from, socket);
    source.start_postcopy().expect("it can");
    liar.answer_until(&Heard::Ping(BARRIER));
    liar.say(&ReturnMessage::Pong(BARRIER));
    liar.answer_until(&Heard::Package);
    (source, liar)
}

/// Before the switch it is a refusal, whatever its number.
#[test]
fn it_has_not_everything_before_the_switch() {
    let from = Vm::running(&mut rng());
    let (socket, mut liar) = Liar::new();
    let source = start(&from, socket);
    source.start_postcopy().expect("it can");
    liar.answer_until(&Heard::Ping(BARRIER));
    // The end of what it says is heard before the end of what is sent.
    for message in [
        ReturnMessage::Shut(0),
        ReturnMessage::Pong(BARRIER),
        ReturnMessage::Pong(LOADED),
    ] {
        liar.say(&message);
    }
    let status = settled(&source);
    assert_ne!(status.state, State::Completed, "{status:?}");
}

/// What a QEMU would take for a success.
#[test]
fn it_has_not_everything_before_all_was_sent() {
    let from = Vm::running(&mut rng());
    let (source, mut liar) = switched(&from);
    // It answers no PING: most of the memory is held back.
    liar.say(&ReturnMessage::Pong(LOADED));
    liar.say(&ReturnMessage::Shut(0));
    let status = settled(&source);
    assert_eq!(status.state, State::PostcopyPaused, "{status:?}");
    let error = status.error.expect("a reason");
    assert!(error.contains("not all was sent"), "{error}");
    assert!(status.ram.expect("memory").remaining_bytes > 0);
}

/// It can only have been loaded after it was sent.
#[test]
fn an_answer_before_the_question_decides_nothing() {
    let from = Vm::running(&mut rng());
    let (socket, mut liar) = Liar::new();
    let source = start(&from, socket);
    liar.say(&ReturnMessage::Pong(LOADED));
    source.start_postcopy().expect("it can");
    liar.answer_until(&Heard::Ping(BARRIER));
    liar.say(&ReturnMessage::Pong(BARRIER));
    liar.answer_until(&Heard::Package);
    liar.say(&ReturnMessage::Shut(1));
    assert_eq!(settled(&source).state, State::Failed);
    from.goes_on(1000);
    from.stop();
}

/// Nobody is there any more who could tell, or resume.
#[test]
fn a_postcopy_whose_last_word_was_lost_can_be_ended() {
    let from = Vm::running(&mut rng());
    let (source, mut liar) = switched(&from);
    liar.say(&ReturnMessage::Pong(LOADED));
    liar.answer_until(&Heard::Eof);
    liar.close();
    let status = settled(&source);
    assert_eq!(
        (status.state, status.undecided),
        (State::PostcopyPaused, false)
    );
    source.decide(Decision::Serve).expect_err("it runs there");
    source.decide(Decision::GiveUp).expect("it can");
    let over = source
        .published()
        .wait_until(PATIENCE, |status| status.state.is_over());
    assert_eq!(over.state, State::Completed);
    assert!(!from.is_running());
}

/// The guest runs there: that was heard, whatever came behind it.
#[test]
fn what_was_heard_before_the_end_counts() {
    let from = Vm::running(&mut rng());
    let (source, liar) = switched(&from);
    liar.close();
    let status = settled(&source);
    assert!(status.undecided, "{status:?}");
    let (here, mut there) = UnixStream::pair().expect("a pair");
    let (target, stop) = channel(here, Direction::Outgoing);
    let resumed = source.resume(Target::Channel(target), stop);
    resumed.expect("it is paused");
    let mut bytes = Vec::new();
    for block in from.ram.blocks() {
        let bitmap = vec![0; usize::try_from(block.pages().div_ceil(64) * 8).expect("small")];
        let told = ReturnMessage::ReceivedBitmap {
            block: block.idstr().clone(),
            bytes: u32::try_from(bitmap.len()).expect("small"),
        };
        told.encode(&mut bytes);
        bytes.extend(bitmap);
        ReturnMessage::ReceivedBitmapEnd.encode(&mut bytes);
    }
    there.write_all(&bytes).expect("sent");
    // Everything up to the order to go on.
    let mut window = Vec::new();
    let resume = b"\x08\0\x09\0\0";
    while !window.ends_with(resume) {
        let mut byte = [0];
        there.read_exact(&mut byte).expect("it goes on");
        window.push(byte[0]);
    }
    bytes.clear();
    ReturnMessage::ResumeAck(1).encode(&mut bytes);
    ReturnMessage::Pong(LOADED).encode(&mut bytes);
    there.write_all(&bytes).expect("sent");
    there.shutdown(Shutdown::Both).expect("open");
    let paused = |status: &Status| status.state == State::PostcopyPaused;
    let status = source.published().wait_until(PATIENCE, paused);
    assert!(paused(&status) && !status.undecided, "{status:?}");
    source.decide(Decision::Serve).expect_err("it runs there");
    assert!(!from.is_running());
}

#[test]
fn bitmaps_that_nobody_asked_for_are_refused() {
    let from = Vm::running(&mut rng());
    let (socket, mut liar) = Liar::new();
    let source = start(&from, socket);
    liar.say(&ReturnMessage::ReceivedBitmap {
        block: Name::new("pc.ram").expect("short"),
        bytes: 512 << 20,
    });
    let status = settled(&source);
    assert_eq!(status.state, State::Failed);
    let error = status.error.expect("a reason");
    let words = "tells what it has of RAM block 'pc.ram', which nobody asked";
    assert!(error.contains(words), "{error}");
    from.goes_on(1000);
    from.stop();
}

#[test]
fn answers_to_nothing_do_not_fill_the_memory() {
    let from = Vm::running(&mut rng());
    let (source, mut liar) = switched(&from);
    let mut pongs = Vec::new();
    (0..100_000).for_each(|value| ReturnMessage::Pong(value).encode(&mut pongs));
    // All are heard, or the connection is given up: they do not pile up.
    let _ = liar.socket.write_all(&pongs);
    liar.close();
    assert_eq!(settled(&source).state, State::PostcopyPaused);
}
