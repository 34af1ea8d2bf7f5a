//! The disk controller, and the driver in the guest.
//!
//! ```text
//!   Driver (guest) ── descriptors, available ─▶ ┌ page of guest memory ┐ ─▶ Controller ─▶ disk::Node
//!                  ◀──────────────────── used ─ └──────────────────────┘ ◀─
//! ```
//!
//! The queue lies in the guest's memory, so requests in flight migrate with it: the controller's own
//! state is how far it has got. While the disk is held (its migration ends, or has not come in yet)
//! requests wait in the queue, and whoever has the guest by then carries them out.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vmferry_disk::{Node, Refusal, Subscription, Unmap, WritePermit};
use vmferry_vmstate::VmState;

use crate::gate::{Broken, Next, Station, Work, die, lock};
use crate::memory::{Block, Memory, PAGE, mix};

/// Bytes of a request.
const REQUEST: usize = 4 * PAGE;
/// Requests that are in flight at once.
const BATCH: u64 = 4;
/// Descriptors of a queue: a batch, and a flush.
const SLOTS: u64 = 8;
/// Pages of guest memory for each disk: its queue and its buffers.
pub(crate) const QUEUE_PAGES: u64 = 1 + BATCH * (REQUEST / PAGE) as u64;
/// Offsets in the page of a queue.
const AVAILABLE: u64 = 0;
const USED: u64 = 8;
const DESCRIPTORS: u64 = 64;
const DESCRIPTOR_WORDS: usize = 4;

const READ: u64 = 0;
const WRITE: u64 = 1;
const ZERO: u64 = 2;
const FLUSH: u64 = 3;

/// Where the queue of a disk lies.
#[derive(Clone)]
pub(crate) struct Queue {
    pub(crate) memory: Memory,
    pub(crate) first_page: u64,
}

impl Queue {
    fn at(&self, offset: u64, bytes: usize) -> Result<&[AtomicU64], Broken> {
        self.memory
            .words(Block::Ram, self.first_page * PAGE as u64 + offset, bytes)
    }

    fn number(&self, offset: u64) -> Result<u64, Broken> {
        Ok(self.at(offset, 8)?[0].load(Ordering::Acquire))
    }

    /// The page was looked at, so it is here.
    fn set_number(&self, offset: u64, value: u64) {
        let words = self.at(offset, 8).expect("it was looked at");
        words[0].store(value, Ordering::Release);
    }

    fn descriptor(&self, request: u64) -> Result<&[AtomicU64], Broken> {
        let bytes = DESCRIPTOR_WORDS * 8;
        self.at(DESCRIPTORS + request % SLOTS * bytes as u64, bytes)
    }

    fn buffer(request: u64) -> u64 {
        PAGE as u64 + request % BATCH * REQUEST as u64
    }
}

/// What migrates of a controller.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "virtqueue", version = 1)]
pub(crate) struct ControllerState {
    /// The request that comes next.
    #[vmstate(uint64)]
    next: u64,
}

pub(crate) struct Controller {
    queue: Queue,
    node: Arc<Node>,
    state: Arc<Mutex<ControllerState>>,
    /// The interrupt.
    driver: Arc<Station>,
    /// Tells the controller that requests are not held any more.
    _notice: Subscription,
}

impl Controller {
    pub(crate) fn new(
        queue: Queue,
        node: Arc<Node>,
        state: Arc<Mutex<ControllerState>>,
        driver: Arc<Station>,
        own: Arc<Station>,
    ) -> Self {
        let notice = node.subscribe(move || own.notify());
        Self {
            queue,
            node,
            state,
            driver,
            _notice: notice,
        }
    }
}

pub(crate) enum Request {
    /// Bytes that were read, and where they belong.
    Read {
        data: Vec<u8>,
        buffer: u64,
    },
    Write(WritePermit, Vec<u8>),
    Zero(WritePermit),
    Flush,
}

impl Work for Controller {
    type Deed = Request;

    /// Guest memory first, the disk last: a request that is in flight must not wait for a page.
    fn look(&mut self) -> Result<Next<Request>, Broken> {
        let next = lock(&self.state).next;
        let (available, used) = (self.queue.number(AVAILABLE)?, self.queue.number(USED)?);
        if used != next || !(next..=next + SLOTS).contains(&available) {
            return Err(Broken(format!(
                "request {next}: used {used}, available {available}"
            )));
        }
        if next == available {
            return Ok(Next::Wait(None));
        }
        let descriptor = self.queue.descriptor(next)?;
        let [kind, offset, length, buffer] =
            [0, 1, 2, 3].map(|n| descriptor[n].load(Ordering::Relaxed));
        if length != REQUEST as u64 {
            return Err(Broken(format!("request {next} has {length} bytes")));
        }
        let mut data = vec![0; REQUEST];
        // Also for a read: its pages must be here before the disk is asked.
        if kind == READ || kind == WRITE {
            let words = self.queue.at(buffer, REQUEST)?;
            for (bytes, word) in data.chunks_exact_mut(8).zip(words) {
                bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_le_bytes());
            }
        }
        let asked = match kind {
            READ => self.node.begin_read(offset, length).map(|permit| {
                let done = permit.read(&mut data);
                done.unwrap_or_else(|error| die(self.node.name(), &error.to_string()));
                Request::Read { data, buffer }
            }),
            WRITE => self
                .node
                .begin_write(offset, length)
                .map(|permit| Request::Write(permit, data)),
            ZERO => self.node.begin_write(offset, length).map(Request::Zero),
            FLUSH => Ok(Request::Flush),
            _ => return Err(Broken(format!("request {next} is of kind {kind}"))),
        };
        match asked {
            Ok(request) => Ok(Next::Do(request)),
            // The notice comes, or the guest lives elsewhere and this one will not run again.
            Err(Refusal::Held | Refusal::Departed) => Ok(Next::Wait(None)),
            Err(refusal) => Err(Broken(format!("request {next}: {refusal}"))),
        }
    }

    fn act(&mut self, request: Request) {
        let done = match request {
            Request::Read { data, buffer } => {
                let words = self.queue.at(buffer, REQUEST).expect("it was looked at");
                for (word, bytes) in words.iter().zip(data.chunks_exact(8)) {
                    let value = bytes.try_into().expect("eight bytes");
                    word.store(u64::from_le_bytes(value), Ordering::Relaxed);
                }
                Ok(())
            }
            Request::Write(permit, data) => permit.write(&data),
            Request::Zero(permit) => permit.write_zeroes(Unmap::May, false),
            Request::Flush => self.node.flush(),
        };
        done.unwrap_or_else(|error| die(self.node.name(), &error.to_string()));
        let mut state = lock(&self.state);
        state.next += 1;
        self.queue.set_number(USED, state.next);
        self.driver.notify();
    }
}

/// What migrates of the driver, a thread in the guest.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "driver", version = 1)]
pub(crate) struct DriverState {
    #[vmstate(uint64)]
    seed: u64,
    /// Passes over the disk that are over.
    #[vmstate(uint64)]
    pass: u64,
    /// First of the requests' places on the disk that are being worked on.
    #[vmstate(uint64)]
    place: u64,
    /// They are being written; else read.
    #[vmstate(bool)]
    writing: bool,
    /// Requests that were made available, ever.
    #[vmstate(uint64)]
    submitted: u64,
}

impl DriverState {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            seed,
            ..Self::default()
        }
    }

    /// What lies in a place after so many passes. Disks begin as zeroes.
    fn word(&self, place: u64, index: u64, pass: u64) -> u64 {
        match self.is_zero(place, pass) {
            true => 0,
            false => mix(&[self.seed, place, index, pass]),
        }
    }

    fn is_zero(&self, place: u64, pass: u64) -> bool {
        pass == 0 || mix(&[self.seed, place, pass]).is_multiple_of(4)
    }
}

/// Reads a few places of the disk, checks them, writes them anew, flushes now and then.
pub(crate) struct Driver {
    pub(crate) queue: Queue,
    pub(crate) state: Arc<Mutex<DriverState>>,
    pub(crate) disk_bytes: u64,
    pub(crate) controller: Arc<Station>,
}

impl Driver {
    fn places(&self) -> u64 {
        self.disk_bytes / REQUEST as u64
    }

    fn batch(&self, state: &DriverState) -> std::ops::Range<u64> {
        state.place..(state.place + BATCH).min(self.places())
    }

    fn check(&self, state: &DriverState) -> Result<(), Broken> {
        for (request, place) in self.batch(state).enumerate() {
            let buffer = Queue::buffer(request as u64);
            for (index, word) in self.queue.at(buffer, REQUEST)?.iter().enumerate() {
                let expected = state.word(place, index as u64, state.pass);
                let found = word.load(Ordering::Relaxed);
                if found != expected {
                    let at = place * REQUEST as u64 + index as u64 * 8;
                    return Err(Broken(format!(
                        "offset {at:#x} of the disk: expected {expected:#x} (pass {}), found {found:#x}",
                        state.pass
                    )));
                }
            }
        }
        Ok(())
    }

    fn submit(&self, state: &mut DriverState, kind: u64, place: u64, buffer: u64) {
        let descriptor = self
            .queue
            .descriptor(state.submitted)
            .expect("it was looked at");
        let words = [kind, place * REQUEST as u64, REQUEST as u64, buffer];
        for (word, value) in descriptor.iter().zip(words) {
            word.store(value, Ordering::Relaxed);
        }
        state.submitted += 1;
    }

    fn submit_reads(&self, state: &mut DriverState) {
        state.writing = false;
        for (request, place) in self.batch(state).enumerate() {
            self.submit(state, READ, place, Queue::buffer(request as u64));
        }
    }

    fn submit_writes(&self, state: &mut DriverState) {
        state.writing = true;
        let pass = state.pass + 1;
        for (request, place) in self.batch(state).enumerate() {
            let buffer = Queue::buffer(request as u64);
            let words = self.queue.at(buffer, REQUEST).expect("it was looked at");
            for (index, word) in words.iter().enumerate() {
                word.store(state.word(place, index as u64, pass), Ordering::Relaxed);
            }
            let kind = if state.is_zero(place, pass) {
                ZERO
            } else {
                WRITE
            };
            self.submit(state, kind, place, buffer);
        }
        if mix(&[state.seed, state.submitted]).is_multiple_of(16) {
            self.submit(state, FLUSH, 0, 0);
        }
    }

    /// The batch is done; on to the next.
    fn advance(&self, state: &mut DriverState) {
        state.place += BATCH;
        if state.place >= self.places() {
            state.place = 0;
            state.pass += 1;
        }
    }
}

impl Work for Driver {
    type Deed = DriverState;

    fn look(&mut self) -> Result<Next<DriverState>, Broken> {
        let state = lock(&self.state).clone();
        let (available, used) = (self.queue.number(AVAILABLE)?, self.queue.number(USED)?);
        if available != state.submitted {
            let submitted = state.submitted;
            return Err(Broken(format!(
                "{submitted} requests submitted, {available} available"
            )));
        }
        if used < state.submitted {
            return Ok(Next::Wait(None));
        }
        if !state.writing && state.submitted != 0 {
            self.check(&state)?;
        }
        Ok(Next::Do(state))
    }

    fn act(&mut self, mut state: DriverState) {
        if state.submitted == 0 {
            self.submit_reads(&mut state);
        } else if !state.writing {
            self.submit_writes(&mut state);
        } else {
            self.advance(&mut state);
            self.submit_reads(&mut state);
        }
        self.queue.set_number(AVAILABLE, state.submitted);
        *lock(&self.state) = state;
        self.controller.notify();
    }
}
