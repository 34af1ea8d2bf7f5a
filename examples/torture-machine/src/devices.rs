//! Small devices: clock, timer, serial port, NIC. (The disk controller has a module of its own.)
//!
//! What of a device migrates is a struct that derives `VmState`: each field is sent or says why not.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmferry_relay::announce::{Announcer, Frame, MacAddress};
use vmferry_vmstate::VmState;

use crate::gate::{Broken, Next, Station, Work, lock};

/// The guest's time, which stands still while the guest does.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "clock", version = 1)]
pub(crate) struct Clock {
    /// When it ran last.
    #[vmstate(uint64)]
    nanoseconds: u64,
    #[vmstate(skip = "saved and loaded while the guest stands still")]
    running_since: Option<Instant>,
}

impl Clock {
    pub(crate) fn now(&self) -> u64 {
        let since = self
            .running_since
            .map_or(Duration::ZERO, |since| since.elapsed());
        self.nanoseconds + since.as_nanos() as u64
    }

    pub(crate) fn start(&mut self) {
        self.running_since = Some(Instant::now());
    }

    pub(crate) fn stop(&mut self) {
        self.nanoseconds = self.now();
        self.running_since = None;
    }
}

/// Ticks in equal intervals of the guest's time.
#[derive(Clone, Debug, PartialEq, VmState)]
#[vmstate(name = "timer", version = 1, post_load = Self::check)]
pub(crate) struct Timer {
    #[vmstate(timer)]
    expiry: Option<u64>,
    #[vmstate(uint64)]
    ticks: u64,
}

const TICK_NANOSECONDS: u64 = 10_000_000;

impl Default for Timer {
    fn default() -> Self {
        Self {
            expiry: Some(TICK_NANOSECONDS),
            ticks: 0,
        }
    }
}

impl Timer {
    /// A stream comes from outside: what cannot be must not get into the machine.
    fn check(&mut self, _version: u32) -> Result<(), String> {
        let due = self
            .ticks
            .checked_add(1)
            .and_then(|ticks| ticks.checked_mul(TICK_NANOSECONDS));
        match due.is_some() && self.expiry == due {
            true => Ok(()),
            false => Err(format!(
                "after {} ticks it cannot expire at {:?}",
                self.ticks, self.expiry
            )),
        }
    }
}

pub(crate) struct TimerThread {
    pub(crate) clock: Arc<Mutex<Clock>>,
    pub(crate) timer: Arc<Mutex<Timer>>,
}

impl Work for TimerThread {
    type Deed = ();

    fn look(&mut self) -> Result<Next<()>, Broken> {
        let now = lock(&self.clock).now();
        let Timer { expiry, ticks } = *lock(&self.timer);
        let expiry = expiry.ok_or_else(|| Broken("the timer is not armed".into()))?;
        match expiry.checked_sub(now) {
            None | Some(0) => Ok(Next::Do(())),
            Some(1..=TICK_NANOSECONDS) => Ok(Next::Wait(Some(Duration::from_nanos(expiry - now)))),
            Some(_) => Err(Broken(format!(
                "time went back to {now} after {ticks} ticks"
            ))),
        }
    }

    fn act(&mut self, (): ()) {
        let mut timer = lock(&self.timer);
        timer.ticks += 1;
        timer.expiry = Some((timer.ticks + 1) * TICK_NANOSECONDS);
    }
}

/// A serial port with a queue. What the guest writes on it goes out once, in order, wherever the guest
/// is by then.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "serial", version = 2, minimum_version = 1, pre_load = Self::empty)]
pub(crate) struct Serial {
    /// Characters that went out. Version 2 brought it.
    #[vmstate(uint64, since = 2)]
    sent: u64,
    #[vmstate(subsection)]
    queue: Queue,
}

/// Sent only when there is something in it.
#[derive(Clone, Debug, Default, PartialEq, VmState)]
#[vmstate(name = "serial/queue", version = 1, needed = Self::is_filled)]
struct Queue {
    #[vmstate(uint32)]
    length: u32,
    #[vmstate(buffer, length = length, max = 16)]
    bytes: Vec<u8>,
}

const QUEUE_BYTES: usize = 16;

impl Queue {
    fn is_filled(&self) -> bool {
        self.length != 0
    }
}

impl Serial {
    /// What is not in the stream keeps its value, and an empty queue is not in it.
    fn empty(&mut self) -> Result<(), String> {
        self.queue = Queue::default();
        Ok(())
    }

    /// The guest writes its character of that number; false if there is no room.
    pub(crate) fn put(&mut self, number: u64) -> bool {
        let has_room = self.queue.bytes.len() < QUEUE_BYTES;
        if has_room {
            self.queue.bytes.push(character(number));
            self.queue.length += 1;
        }
        has_room
    }
}

/// Counts lines, so that a lost or doubled character is seen.
fn character(number: u64) -> u8 {
    let line = format!("{:015}\n", number / 16);
    line.as_bytes()[(number % 16) as usize]
}

pub(crate) struct SerialThread {
    pub(crate) serial: Arc<Mutex<Serial>>,
    pub(crate) output: Option<File>,
}

impl Work for SerialThread {
    type Deed = ();

    fn look(&mut self) -> Result<Next<()>, Broken> {
        let Serial { sent, queue } = lock(&self.serial).clone();
        let expected: Vec<u8> = (sent..).map(character).take(queue.bytes.len()).collect();
        match queue.bytes {
            empty if empty.is_empty() => Ok(Next::Wait(None)),
            bytes if bytes == expected => Ok(Next::Do(())),
            bytes => Err(Broken(format!(
                "character {sent}: expected {expected:x?}, found {bytes:x?}"
            ))),
        }
    }

    fn act(&mut self, (): ()) {
        let mut serial = lock(&self.serial);
        let bytes = std::mem::take(&mut serial.queue).bytes;
        serial.sent += bytes.len() as u64;
        if let Some(output) = &mut self.output
            && let Err(error) = output.write_all(&bytes)
        {
            tracing::warn!(%error, "the serial port's output is lost");
        }
    }
}

/// A NIC that sends nothing but who it is.
#[derive(Clone, Debug, PartialEq, VmState)]
#[vmstate(name = "nic", version = 1, committed = Self::raise)]
pub(crate) struct Nic {
    #[vmstate(buffer)]
    mac: [u8; 6],
    #[vmstate(bool)]
    link: bool,
    #[vmstate(skip = "the host's end of the cable: an effect of `link` on the world")]
    carrier: bool,
}

impl Nic {
    pub(crate) fn new(seed: u64) -> Self {
        let [a, b, c, d, ..] = seed.to_be_bytes();
        Self {
            mac: [0x02, 0, a, b, c, d],
            link: true,
            carrier: true,
        }
    }

    /// Runs once, when the state that came is in place.
    fn raise(&mut self) -> Result<(), String> {
        self.carrier = self.link;
        Ok(())
    }
}

/// The NIC as it is when the guest has arrived: it tells the network where it is now.
#[derive(Debug)]
pub(crate) struct Arrived {
    mac: MacAddress,
    /// The network: a file, for the tests.
    network: File,
}

impl Arrived {
    pub(crate) fn new(nic: &Nic, network: File) -> anyhow::Result<Self> {
        Ok(Self {
            mac: MacAddress::new(nic.mac)?,
            network,
        })
    }
}

impl Announcer for Arrived {
    fn name(&self) -> &str {
        "nic"
    }

    fn mac(&self) -> MacAddress {
        self.mac
    }

    fn send(&self, frame: &Frame) -> io::Result<()> {
        (&self.network).write_all(frame)
    }
}

/// The thread of a device, and where it waits.
pub(crate) fn station() -> Arc<Station> {
    Arc::new(Station::default())
}
