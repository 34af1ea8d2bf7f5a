//! Guests: one on each side, writing to blocks of its own whenever its side lets it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use vmferry_channel::Stop;
use vmferry_nbd::client::Operation;
use vmferry_nbd::{Client, ClientSettings, NbdError, NbdUri};

use crate::log::{BLOCK, Log, Version};
use crate::peers::until;

/// Writes that a guest has under way.
const DEPTH: usize = 4;
/// A guest rests so often, that the daemons get on with their work on a small machine.
const WRITES_BETWEEN_RESTS: u64 = 32;
const REST: Duration = Duration::from_millis(1);
/// Pause before the next try to connect.
const AWAY: Duration = Duration::from_millis(5);

/// Guests of both sides; stopped when dropped.
pub(crate) struct Load {
    stop: Stop,
    guests: Vec<JoinHandle<()>>,
    /// Writes that were acknowledged by each side.
    acknowledged: Arc<[AtomicU64; 2]>,
}

impl Load {
    pub(crate) fn start(log: &Arc<Log>, sides: [NbdUri; 2], rng: &mut fastrand::Rng) -> Self {
        let mut load = Self {
            stop: Stop::new().expect("an event can be made"),
            guests: Vec::new(),
            acknowledged: Arc::default(),
        };
        for (number, side) in sides.into_iter().enumerate() {
            let guest = Guest {
                number,
                side,
                log: Arc::clone(log),
                stop: load.stop.clone(),
                acknowledged: Arc::clone(&load.acknowledged),
                rng: rng.fork(),
            };
            load.guests.push(std::thread::spawn(move || guest.live()));
        }
        load
    }

    /// Waits for writes on the first (0) or second (1) side beyond those that there were.
    pub(crate) fn wait_for_writes(&self, side: usize) {
        let count = || self.acknowledged[side].load(Ordering::SeqCst);
        let wanted = count() + 8;
        until("a guest's writes", || (count() >= wanted).then_some(()));
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.trigger();
        for guest in self.guests.drain(..) {
            // A panic has been printed; the run fails by itself then.
            let _ = guest.join();
        }
    }
}

struct Guest {
    number: usize,
    side: NbdUri,
    log: Arc<Log>,
    stop: Stop,
    acknowledged: Arc<[AtomicU64; 2]>,
    rng: fastrand::Rng,
}

impl Guest {
    fn live(mut self) {
        // Writes may be held for as long as it takes.
        let settings = ClientSettings {
            silence_timeout: None,
            ..ClientSettings::default()
        };
        while !self.stop.is_triggered() {
            if let Ok(mut client) = Client::connect(&self.side, &settings, &self.stop) {
                // The daemon was killed, or the disk has moved away.
                let _ = self.write(&mut client);
            }
            let _ = self.stop.wait(AWAY);
        }
    }

    /// Until the connection ends.
    fn write(&mut self, client: &mut Client) -> Result<(), NbdError> {
        let mut under_way: BTreeMap<u64, Version> = BTreeMap::new();
        loop {
            while under_way.len() < DEPTH {
                let block = self.rng.usize(0..self.log.blocks() / 2) * 2 + self.number;
                // The order of two writes of one block is anybody's guess.
                if under_way.values().any(|version| version.block == block) {
                    continue;
                }
                let version = self.log.submit(block);
                let operation = match version.is_zero() {
                    true => Operation::WriteZeroes {
                        offset: version.offset(),
                        length: BLOCK as u32,
                        no_hole: self.rng.bool(),
                        fast_only: false,
                        fua: false,
                    },
                    false => Operation::Write {
                        offset: version.offset(),
                        data: self.log.content(version),
                        fua: false,
                    },
                };
                under_way.insert(client.submit(operation)?, version);
            }
            let Some(completion) = client.wait()? else {
                continue;
            };
            let version = under_way.remove(&completion.cookie);
            if let (Ok(_), Some(version)) = (completion.result, version) {
                self.log.acknowledge(version);
                let count = self.acknowledged[self.number].fetch_add(1, Ordering::SeqCst);
                if count.is_multiple_of(WRITES_BETWEEN_RESTS) {
                    let _ = self.stop.wait(REST);
                }
            }
        }
    }
}
