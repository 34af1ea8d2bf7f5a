//! A source against destinations that are silent, lie, talk nonsense or go away.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use vmferry_disk::Hold;
use vmferry_migration::{
    Capabilities, Decision, Parameters, RequestError, Residence, RunningSource, State,
};
use vmferry_stream::return_path::ReturnMessage;
use vmferry_stream::{Command, Decoder, Options, Record, Step};

use crate::ends::{Host, migrate_undisturbed, rng, start_source, wait, wait_for};

/// The PING behind the last chunk.
const BARRIER: u32 = u32::MAX;

/// Decodes what the source says; the test answers.
struct Liar {
    socket: UnixStream,
    said: Receiver<Said>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Ping(u32),
    Eof,
}

impl Liar {
    fn new() -> (UnixStream, Self) {
        let (here, there) = UnixStream::pair().expect("a pair");
        let (tell, said) = channel();
        let ear = there.try_clone().expect("a descriptor");
        thread::spawn(move || listen(ear, &tell));
        (
            here,
            Self {
                socket: there,
                said,
            },
        )
    }

    fn say(&mut self, message: &ReturnMessage) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.say_bytes(&bytes);
    }

    /// The source may have gone.
    fn say_bytes(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes);
    }

    /// Answer PINGs until the source says this.
    fn answer_until(&mut self, wanted: Said) {
        loop {
            let said = self.said.recv().expect("the source goes on");
            if said == wanted {
                return;
            }
            if let Said::Ping(value) = said {
                self.say(&ReturnMessage::Pong(value));
            }
        }
    }

    fn close(&self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

fn listen(mut socket: UnixStream, tell: &Sender<Said>) {
    let mut decoder = Decoder::new(Options::default());
    let mut window = Vec::new();
    let mut skip = 0;
    let mut piece = vec![0; 256 << 10];
    loop {
        let length = socket.read(&mut piece).unwrap_or(0);
        if length == 0 {
            return;
        }
        let skipped = length.min(skip);
        skip -= skipped;
        window.extend_from_slice(&piece[skipped..length]);
        while skip == 0 {
            match decoder.step(&window).expect("our own stream") {
                Step::NeedMore(_) | Step::End => break,
                Step::Payload(bytes) => {
                    let now = window.len().min(bytes as usize);
                    window.drain(..now);
                    skip = bytes as usize - now;
                }
                Step::Record { record, used } => {
                    window.drain(..used);
                    let said = match record {
                        Record::Command(Command::Ping(value)) => Said::Ping(value),
                        Record::Eof => Said::Eof,
                        _ => continue,
                    };
                    let _ = tell.send(said);
                }
            }
        }
    }
}

fn begin() -> (Host, RunningSource, Liar) {
    let mut rng = rng();
    let host = Host::source(&[(1 << 20) + 700, 5000], &mut rng);
    let (socket, liar) = Liar::new();
    let parameters = Parameters::default();
    let running = start_source(&host, socket, parameters, Capabilities::default());
    (host, running, liar)
}

/// Guests are served and nothing remembers the attempt: another one succeeds.
fn is_as_before(host: &Host, running: RunningSource) {
    drop(running);
    assert!(host.all_held(Some(Hold::Nothing)));
    assert!(host.nodes.iter().all(|node| node.user().is_none()));
    assert_eq!(host.says(), [None; 2]);
    for node in &host.nodes {
        let permit = node.begin_write(0, 1).expect("guests are served");
        permit.write(b"x").expect("written");
    }
    let target = Host::target(&[(1 << 20) + 700, 5000]);
    migrate_undisturbed(host, &target);
    for (here, there) in host.memories.iter().zip(&target.memories) {
        assert!(here.snapshot() == there.durable_snapshot());
    }
}

fn fails_with(host: &Host, running: RunningSource, words: &str) {
    let status = wait(&running);
    let error = status.error.clone().unwrap_or_default();
    assert_eq!(
        (status.state, status.undecided),
        (State::Failed, false),
        "{status:?}"
    );
    assert!(error.contains(words) && !error.contains('\n'), "{error:?}");
    is_as_before(host, running);
}

#[test]
fn silence_can_be_cancelled() {
    let (host, running, liar) = begin();
    wait_for(&running, |status| status.bulk_over);
    assert_eq!(running.go_on(), Err(RequestError::NotPaused));
    assert_eq!(
        running.decide(Decision::GiveUp),
        Err(RequestError::NotUndecided)
    );
    running.cancel().expect("in time");
    assert_eq!(wait(&running).state, State::Cancelled);
    drop(liar);
    is_as_before(&host, running);
}

#[test]
fn silence_at_the_barrier_can_be_cancelled() {
    let (host, running, mut liar) = begin();
    liar.answer_until(Said::Ping(BARRIER));
    assert!(host.all_held(Some(Hold::Writes)));
    assert_eq!(running.published().get().state, State::Device);
    running.cancel().expect("in time");
    assert_eq!(wait(&running).state, State::Cancelled);
    is_as_before(&host, running);
}

#[test]
fn shut_before_eof_is_a_failure() {
    for value in [1, 7, 0] {
        let (host, running, mut liar) = begin();
        liar.say(&ReturnMessage::Shut(value));
        fails_with(&host, running, &format!("SHUT {value}"));
    }
    let (host, running, mut liar) = begin();
    liar.answer_until(Said::Ping(BARRIER));
    liar.say(&ReturnMessage::Shut(1));
    fails_with(&host, running, "SHUT 1");
}

/// A PONG that was not asked for is none.
#[test]
fn a_foreign_pong_does_not_open_the_barrier() {
    let (host, running, mut liar) = begin();
    liar.answer_until(Said::Ping(BARRIER));
    liar.say(&ReturnMessage::Pong(BARRIER - 1));
    liar.say(&ReturnMessage::Shut(1));
    fails_with(&host, running, "SHUT 1");
    assert!(liar.said.try_iter().all(|said| said != Said::Eof));
}

#[test]
fn shut_1_after_eof_is_a_refusal() {
    let (host, running, mut liar) = begin();
    liar.answer_until(Said::Eof);
    assert!(host.all_held(Some(Hold::Everything)));
    assert_eq!(host.says(), [Some(Residence::Leaving); 2]);
    assert_eq!(running.cancel(), Err(RequestError::TooLate));
    liar.say(&ReturnMessage::Shut(1));
    fails_with(&host, running, "SHUT 1");
}

/// A QEMU has loaded the disks, and not synced them.
#[test]
fn shut_0_of_a_stranger_is_not_durable() {
    let (host, running, mut liar) = begin();
    liar.answer_until(Said::Eof);
    liar.say(&ReturnMessage::Shut(0));
    let status = wait(&running);
    assert_eq!(
        (status.state, status.durable),
        (State::Completed, Some(false))
    );
    assert!(host.all_held(None));
    assert_eq!(host.says(), [Some(Residence::Moved); 2]);
}

#[test]
fn nonsense_before_eof_is_a_failure() {
    for (bytes, words) in [
        (
            &b"HTTP/1.1 400 Bad Request\r\n\r\n"[..],
            "the return path is broken",
        ),
        (&[0, 1, 0, 9, 0, 0, 0, 0, 0], "the return path is broken"),
        (&[0, 2, 0xff, 0xff], "the return path is broken"),
        (
            &[0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0],
            "asks for pages, but no memory is sent",
        ),
    ] {
        let (host, running, mut liar) = begin();
        liar.say_bytes(bytes);
        fails_with(&host, running, words);
    }
}

#[test]
fn a_closed_connection_before_eof_is_a_failure() {
    let (host, running, liar) = begin();
    liar.close();
    drop(liar);
    fails_with(&host, running, "clos");
    let (host, running, mut liar) = begin();
    liar.answer_until(Said::Ping(BARRIER));
    liar.close();
    fails_with(&host, running, "clos");
}

/// The EOF may find the connection closed, or a kernel that takes it all the same.
#[test]
fn a_connection_that_closes_behind_the_barrier_leaves_nothing_in_doubt_or_all_held() {
    for _ in 0..20 {
        let (host, running, mut liar) = begin();
        liar.answer_until(Said::Ping(BARRIER));
        liar.say(&ReturnMessage::Pong(BARRIER));
        liar.close();
        let status = wait(&running);
        if status.undecided {
            assert!(host.all_held(Some(Hold::Everything)));
            assert_eq!(host.says(), [Some(Residence::Leaving); 2]);
            running.decide(Decision::Serve).expect("undecided");
            wait_for(&running, |status| status.state.is_over());
        }
        assert_eq!(running.published().get().state, State::Failed);
        is_as_before(&host, running);
    }
}

/// After EOF nobody but a person knows.
#[test]
fn what_is_no_answer_is_undecided() {
    let goes_away: fn(&mut Liar) = |liar| liar.close();
    let nonsense: fn(&mut Liar) = |liar| liar.say_bytes(b"nonsense");
    let truncated: fn(&mut Liar) = |liar| {
        liar.say_bytes(&[0, 1, 0, 4, 0]);
        liar.close();
    };
    for answer in [goes_away, nonsense, truncated] {
        for decision in [Decision::Serve, Decision::GiveUp] {
            let (host, running, mut liar) = begin();
            liar.answer_until(Said::Eof);
            answer(&mut liar);
            let status = wait(&running);
            assert!(status.undecided, "{status:?}");
            let error = status.error.expect("a reason");
            assert!(
                error.contains("undecided") && !error.contains('\n'),
                "{error}"
            );
            assert!(host.all_held(Some(Hold::Everything)));
            assert_eq!(running.cancel(), Err(RequestError::TooLate));
            assert!(!host.would_be_live(false));
            running.decide(decision).expect("undecided");
            let status = wait_for(&running, |status| status.state.is_over());
            assert!(!status.undecided);
            match decision {
                Decision::Serve => is_as_before(&host, running),
                Decision::GiveUp => {
                    assert_eq!(
                        (status.state, status.durable),
                        (State::Completed, Some(false))
                    );
                    assert!(host.all_held(None));
                }
            }
        }
    }
}

/// The daemon ends while nobody has decided: the disks stay held, and after a restart too.
#[test]
fn an_undecided_migration_survives_its_daemon() {
    let (host, mut running, mut liar) = begin();
    liar.answer_until(Said::Eof);
    liar.close();
    assert!(wait(&running).undecided);
    running.shut_down();
    drop(running);
    assert!(host.all_held(Some(Hold::Everything)));
    assert_eq!(host.says(), [Some(Residence::Leaving); 2]);
    assert!(!host.would_be_live(false));
}
