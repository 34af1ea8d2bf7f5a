//! The guest of the demo: writers that update a part of the disk as fast as they can.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use vmferry_channel::Stop;
use vmferry_nbd::client::Operation;
use vmferry_nbd::{Client, ClientSettings, NbdError, NbdUri};

use super::content::{BLOCK_BYTES, Log};
use super::gaps::Gaps;

/// Writers, each with a connection of its own.
pub(super) const WRITERS: u64 = 4;
/// Writes that a writer has under way.
const DEPTH: usize = 8;

/// What the writers and those who watch them share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) log: Log,
    pub(super) gaps: Gaps,
    /// Writes that were acknowledged.
    pub(super) acknowledged: AtomicU64,
    /// Writes that were sent again, for their connection ended before they were acknowledged.
    pub(super) replayed: AtomicU64,
    finishing: AtomicBool,
}

/// Where and what to write.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// Where the disk is, and where it is going to be.
    pub(super) sides: [NbdUri; 2],
    /// The blocks that are written to.
    pub(super) blocks: std::ops::Range<u64>,
}

/// Running writers.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) shared: Arc<Shared>,
    stop: Stop,
    writers: Vec<JoinHandle<Result<(), NbdError>>>,
}

impl Load {
    pub(super) fn start(plan: &Plan, log: Log) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            log,
            gaps: Gaps::default(),
            acknowledged: AtomicU64::new(0),
            replayed: AtomicU64::new(0),
            finishing: AtomicBool::new(false),
        });
        let stop = Stop::new()?;
        let mut load = Self {
            shared,
            stop,
            writers: Vec::new(),
        };
        for number in 0..WRITERS {
            let writer = Writer {
                number,
                plan: plan.clone(),
                shared: Arc::clone(&load.shared),
                stop: load.stop.clone(),
                rng: fastrand::Rng::with_seed(plan.seed.wrapping_add(number)),
                under_way: BTreeMap::new(),
                to_replay: Vec::new(),
            };
            let thread = thread::Builder::new()
                .name(format!("writer-{number}"))
                .spawn(move || writer.run())?;
            load.writers.push(thread);
        }
        Ok(load)
    }

    /// Let the writers finish what they have begun, and flush.
    pub(super) fn finish(mut self) -> Result<Arc<Shared>, NbdError> {
        self.shared.finishing.store(true, Ordering::SeqCst);
        let mut outcome = Ok(());
        for writer in self.writers.drain(..) {
            let ended = writer.join().unwrap_or(Err(NbdError::Stopped));
            outcome = outcome.and(ended);
        }
        outcome.map(|()| Arc::clone(&self.shared))
    }
}

/// Writers that nobody let finish are called off.
impl Drop for Load {
    fn drop(&mut self) {
        self.stop.trigger();
        for writer in self.writers.drain(..) {
            // Whatever it has to say, nobody waits for it any more.
            let _ = writer.join();
        }
    }
}

struct Writer {
    number: u64,
    plan: Plan,
    shared: Arc<Shared>,
    stop: Stop,
    rng: fastrand::Rng,
    /// Blocks with a write that is not acknowledged, by the cookie of the request.
    under_way: BTreeMap<u64, (u64, u32)>,
    /// Blocks whose write has to be sent again.
    to_replay: Vec<u64>,
}

impl Writer {
    /// Write until told to finish. When the first connection ends, the disk has moved: what was
    /// not acknowledged is written again at the other side.
    fn run(mut self) -> Result<(), NbdError> {
        let [source, destination] = self.plan.sides.clone();
        let mut client = self.connect(&source)?;
        match self.write_until_told(&mut client) {
            Ok(()) => return client.disconnect(),
            Err(NbdError::Stopped) => return Err(NbdError::Stopped),
            Err(error) => tracing::debug!("writer {}: {error}", self.number),
        }
        let unsure = std::mem::take(&mut self.under_way);
        self.to_replay
            .extend(unsure.into_values().map(|(block, _)| block));
        self.shared
            .replayed
            .fetch_add(self.to_replay.len() as u64, Ordering::Relaxed);
        let mut client = self.connect(&destination)?;
        self.write_until_told(&mut client)?;
        client.disconnect()
    }

    fn connect(&self, side: &NbdUri) -> Result<Client, NbdError> {
        // Writes are held while the disk is handed over, however long that takes.
        let settings = ClientSettings {
            silence_timeout: None,
            ..ClientSettings::default()
        };
        Client::connect(side, &settings, &self.stop)
    }

    fn write_until_told(&mut self, client: &mut Client) -> Result<(), NbdError> {
        while let Some(block) = self.to_replay.pop() {
            self.submit(client, block)?;
        }
        loop {
            let finishing = self.shared.finishing.load(Ordering::SeqCst);
            while !finishing && client.in_flight() < DEPTH {
                let block = self.next_block();
                self.submit(client, block)?;
            }
            let Some(completion) = client.wait()? else {
                return client.flush();
            };
            if let Err(failure) = completion.result {
                let server = format!("writer {}", self.number);
                return Err(NbdError::Failed { server, failure });
            }
            if let Some((block, version)) = self.under_way.remove(&completion.cookie) {
                self.shared.log.acknowledged(block, version);
                self.shared.acknowledged.fetch_add(1, Ordering::Relaxed);
                self.shared.gaps.completed(Instant::now());
            }
        }
    }

    fn submit(&mut self, client: &mut Client, block: u64) -> Result<(), NbdError> {
        let mut data = vec![0; BLOCK_BYTES];
        let version = self.shared.log.next(block, &mut data);
        let offset = block * BLOCK_BYTES as u64;
        match client.submit(Operation::Write {
            offset,
            data,
            fua: false,
        }) {
            Ok(cookie) => {
                self.under_way.insert(cookie, (block, version));
                Ok(())
            }
            Err(error) => {
                // It may have been carried out all the same.
                self.to_replay.push(block);
                Err(error)
            }
        }
    }

    /// A block of this writer's share that has no write under way, for two writes of one block
    /// may be carried out in any order.
    fn next_block(&mut self) -> u64 {
        let share = (self.plan.blocks.end - self.plan.blocks.start) / WRITERS;
        loop {
            let block = self.plan.blocks.start + self.rng.u64(0..share) * WRITERS + self.number;
            if self.under_way.values().all(|(other, _)| *other != block) {
                return block;
            }
        }
    }
}
