//! The connection between two hosts, and what happens to it: at one certain byte it is cut, or a process dies.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_linger;
use rustix::process::{Pid, Signal, kill_process};

use crate::peers::PATIENCE;

/// The PING behind the last chunk, and its PONG. The wire format is QEMU's, the value ours.
const BARRIER_PING: [u8; 9] = [8, 0, 2, 0, 4, 0xff, 0xff, 0xff, 0xff];
const BARRIER_PONG: [u8; 8] = [0, 2, 0, 4, 0xff, 0xff, 0xff, 0xff];

/// Bytes of EOF and an empty description, the end of a stream.
pub(crate) const TAIL_BYTES: u64 = 8;
/// Bytes of a PONG, and of a SHUT.
pub(crate) const ANSWER_BYTES: u64 = 8;

/// The byte at which it happens: this many were passed on before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Counted from the start of the stream.
    Forth(u64),
    /// So many bytes before the end of the barrier's PING (or as near to that as what was passed on allows).
    BeforeBarrier(u64),
    /// Counted from the first byte that follows the barrier's PONG: EOF and description.
    Tail(u64),
    /// Counted from the start of the answers.
    Back(u64),
    /// Counted from the start of the barrier's PONG: that, and SHUT.
    Answer(u64),
    /// Nothing happens.
    Never,
}

impl Moment {
    /// Anywhere in a stream of about `bytes` bytes, mostly where it matters.
    pub(crate) fn random(bytes: u64, rng: &mut fastrand::Rng) -> Self {
        match rng.u32(0..100) {
            0..25 => Self::Forth(rng.u64(0..bytes)),
            25..35 => Self::Forth(rng.u64(0..300)),
            35..50 => Self::BeforeBarrier(rng.u64(0..200)),
            50..60 => Self::BeforeBarrier(rng.u64(0..=9)),
            60..75 => Self::Tail(rng.u64(0..=TAIL_BYTES)),
            75..83 => Self::Back(rng.u64(0..=4 * ANSWER_BYTES)),
            83..92 => Self::Answer(rng.u64(0..=2 * ANSWER_BYTES)),
            _ => Self::Answer(2 * ANSWER_BYTES),
        }
    }

    /// For the histogram.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::Forth(0..300) => "first 300 bytes",
            Self::Forth(_) => "stream",
            Self::BeforeBarrier(_) => "before barrier",
            Self::Tail(_) => "EOF, description",
            Self::Back(_) => "answers",
            Self::Answer(_) => "PONG, SHUT",
            Self::Never => "never",
        }
    }
}

/// What happens.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// Both directions end, with FIN.
    Close,
    /// Both directions end, with RST.
    Reset,
    /// kill -9, a while after that byte; what the dead have written still arrives.
    Kill(Vec<Pid>, Duration),
}

/// What went through.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Passed {
    pub(crate) forth: u64,
    pub(crate) back: u64,
    /// The source has had the whole PONG of the barrier.
    pub(crate) pong: bool,
    /// The barrier's PING was seen.
    pub(crate) ping: bool,
    /// It happened.
    pub(crate) struck: bool,
}

/// A link that carries one connection.
pub(crate) struct Link {
    address: SocketAddr,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Passed>>,
}

impl Link {
    /// To `tcp:HOST:PORT`.
    pub(crate) fn new(target: &str, moment: Moment, event: Event) -> Self {
        let target = target.strip_prefix("tcp:").expect("a TCP address");
        let target: SocketAddr = target.parse().expect("a numeric address");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let Some(source) = accept(&listener, &ends) else {
                return Passed::default();
            };
            // It may be dead already.
            let Ok(destination) = TcpStream::connect(target) else {
                return Passed::default();
            };
            Carrier::new(source, destination, moment, event).carry()
        });
        Self {
            address,
            over,
            thread: Some(thread),
        }
    }

    pub(crate) fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// Waits for the end of its connection, which a source that is over has made or never will.
    pub(crate) fn end(mut self) -> Passed {
        self.over.store(true, Ordering::SeqCst);
        let thread = self.thread.take().expect("it ends once");
        thread.join().expect("a link does not panic")
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

/// How often a link looks whether it is over.
const LOOK: Duration = Duration::from_millis(20);

/// Waits a little; which of these can be read?
fn readable<'a>(fds: impl Iterator<Item = BorrowedFd<'a>>) -> Vec<bool> {
    let mut fds: Vec<PollFd<'_>> = fds
        .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
        .collect();
    let look = Timespec::try_from(LOOK).expect("a short time");
    // An interrupted wait has found nothing.
    let _ = poll(&mut fds, Some(&look));
    fds.iter().map(|fd| !fd.revents().is_empty()).collect()
}

fn accept(listener: &TcpListener, over: &AtomicBool) -> Option<TcpStream> {
    while readable([listener.as_fd()].into_iter()) == [false] {
        if over.load(Ordering::SeqCst) {
            return None;
        }
    }
    listener.accept().ok().map(|(stream, _)| stream)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Forth,
    Back,
}

struct Carrier {
    source: TcpStream,
    destination: TcpStream,
    moment: Moment,
    event: Event,
    passed: Passed,
    /// Bytes of the stream up to the end of the barrier's PING.
    tail_begins: Option<u64>,
    /// Bytes of the answers before the barrier's PONG.
    answer_begins: Option<u64>,
    /// The last bytes of each way, in which a pattern may begin.
    ends: [Vec<u8>; 2],
}

impl Carrier {
    fn new(source: TcpStream, destination: TcpStream, moment: Moment, event: Event) -> Self {
        Self {
            source,
            destination,
            moment,
            event,
            passed: Passed::default(),
            tail_begins: None,
            answer_begins: None,
            ends: [Vec::new(), Vec::new()],
        }
    }

    /// Until both directions have ended.
    fn carry(mut self) -> Passed {
        let mut open = vec![Way::Forth, Way::Back];
        let mut buffer = vec![0; 64 << 10];
        // It may happen before the first byte.
        if matches!(self.moment, Moment::Forth(0) | Moment::Back(0)) && !self.strike() {
            return self.passed;
        }
        let deadline = Instant::now() + PATIENCE;
        while !open.is_empty() {
            assert!(Instant::now() < deadline, "a migration that does not end");
            let ready = readable(open.iter().map(|way| self.ends_of(*way).0.as_fd()));
            for way in std::mem::take(&mut open).into_iter().zip(ready) {
                let (way, ready) = way;
                if !ready {
                    open.push(way);
                    continue;
                }
                let (mut from, to) = self.ends_of(way);
                match from.read(&mut buffer) {
                    Ok(0) if way == Way::Forth => {
                        // The other end may have gone, too.
                        let _ = to.shutdown(Shutdown::Write);
                    }
                    // A destination that says nothing more hears nothing more either.
                    Ok(0) => return self.passed,
                    Ok(length) if self.pass(way, &buffer[..length]) => open.push(way),
                    // A reset is passed on as the end of everything.
                    Ok(_) | Err(_) => return self.passed,
                }
            }
        }
        self.passed
    }

    fn ends_of(&self, way: Way) -> (&TcpStream, &TcpStream) {
        match way {
            Way::Forth => (&self.source, &self.destination),
            Way::Back => (&self.destination, &self.source),
        }
    }

    /// Pass bytes on, up to the moment and, if anything is left then, beyond. False if nothing is left.
    fn pass(&mut self, way: Way, bytes: &[u8]) -> bool {
        self.look_for_barrier(way, bytes);
        let due = self.due(way).filter(|_| !self.passed.struck);
        let before = match due {
            Some(due) if due <= bytes.len() as u64 => usize::try_from(due).unwrap_or(0),
            _ => return self.write(way, bytes) && self.strike_before_tail(),
        };
        let (before, after) = bytes.split_at(before);
        if !self.write(way, before) || !self.strike() {
            return false;
        }
        self.write(way, after)
    }

    /// The tail begins when the PONG has gone the other way.
    fn strike_before_tail(&mut self) -> bool {
        let due = self.moment == Moment::Tail(0) && self.passed.pong && !self.passed.struck;
        !due || self.strike()
    }

    /// How many bytes more go this way until it happens, if it is this way that counts.
    fn due(&self, way: Way) -> Option<u64> {
        let Passed { forth, back, .. } = self.passed;
        match (way, self.moment) {
            (Way::Forth, Moment::Forth(at)) => Some(at.saturating_sub(forth)),
            (Way::Forth, Moment::Tail(at @ 1..)) => {
                Some((self.tail_begins? + at).saturating_sub(forth))
            }
            (Way::Forth, Moment::BeforeBarrier(bytes)) => {
                let barrier_ends = self.tail_begins?;
                Some(barrier_ends.saturating_sub(bytes).saturating_sub(forth))
            }
            (Way::Back, Moment::Back(at)) => Some(at.saturating_sub(back)),
            (Way::Back, Moment::Answer(at)) => {
                Some((self.answer_begins? + at).saturating_sub(back))
            }
            _ => None,
        }
    }

    /// Note where the barrier is.
    fn look_for_barrier(&mut self, way: Way, bytes: &[u8]) {
        let (index, pattern, passed): (_, &[u8], _) = match way {
            Way::Forth => (0, &BARRIER_PING, self.passed.forth),
            Way::Back => (1, &BARRIER_PONG, self.passed.back),
        };
        let end = &mut self.ends[index];
        let begins = passed - end.len() as u64;
        end.extend_from_slice(bytes);
        let found = end.windows(pattern.len()).position(|part| part == pattern);
        if let Some(position) = found {
            let at = begins + position as u64;
            match way {
                Way::Forth => {
                    self.tail_begins = Some(at + pattern.len() as u64);
                    self.passed.ping = true;
                }
                Way::Back => self.answer_begins = Some(at),
            }
        }
        let keep = end.len().saturating_sub(pattern.len() - 1);
        end.drain(..keep);
    }

    /// False if the way has ended.
    fn write(&mut self, way: Way, bytes: &[u8]) -> bool {
        let (_, mut to) = self.ends_of(way);
        let written = to.write_all(bytes).is_ok();
        let length = bytes.len() as u64;
        match way {
            Way::Forth => self.passed.forth += length,
            Way::Back => self.passed.back += length,
        }
        self.passed.pong = self
            .answer_begins
            .is_some_and(|begins| self.passed.back >= begins + ANSWER_BYTES);
        // The dead do not read, but what they have written is on its way.
        written || matches!(self.event, Event::Kill(..))
    }

    /// Let it happen. False if nothing is left of the connection.
    fn strike(&mut self) -> bool {
        self.passed.struck = true;
        match &self.event {
            Event::Kill(pids, after) => {
                std::thread::sleep(*after);
                for pid in pids {
                    kill_process(*pid, Signal::KILL).expect("a child that is not waited for yet");
                }
                true
            }
            Event::Close => false,
            Event::Reset => {
                for end in [&self.source, &self.destination] {
                    // An end that has gone cannot be reset.
                    let _ = set_socket_linger(end, Some(Duration::ZERO));
                }
                false
            }
        }
    }
}
