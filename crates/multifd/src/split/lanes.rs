//! What the main thread gives to the channels.
//!
//! Each channel has a queue of its own: what was given before a SYNC leaves before it. The main thread
//! never waits here while it keeps bytes of the main connection back, because a destination that has
//! taken a SYNC takes no pages of that channel before it has read these bytes.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::Shutdown;
use vmferry_channel::Counter;
use vmferry_stream::Name;

use crate::error::MultifdError;

/// Jobs that wait for one channel: packets of pages, or SYNCs.
const JOBS_MAX: usize = 1;
const SYNCS_MAX: usize = 64;

/// Progress is looked at so often.
const DRAIN_SLICE: Duration = Duration::from_millis(200);

/// Pages of one block, for one packet.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) block: Name,
    pub(crate) offsets: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

pub(crate) enum Job {
    Pages(Batch),
    Sync,
}

struct State {
    queues: Vec<VecDeque<Job>>,
    /// Batches that were sent; their memory is used again.
    spare: Vec<Batch>,
    /// Nothing more will be given.
    is_closed: bool,
    is_through: bool,
    failure: Option<MultifdError>,
    counters: Vec<Counter>,
    /// The main connection, the channels, our end of the plain stream.
    sockets: Vec<OwnedFd>,
}

pub(crate) struct Lanes {
    state: Mutex<State>,
    changed: Condvar,
}

impl Lanes {
    pub(crate) fn new(channels: u8, sockets: Vec<OwnedFd>) -> Self {
        Self {
            state: Mutex::new(State {
                queues: (0..channels).map(|_| VecDeque::new()).collect(),
                spare: Vec::new(),
                is_closed: false,
                is_through: false,
                failure: None,
                counters: Vec::new(),
                sockets,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait until `ready` has an answer. Fails if somebody has failed.
    fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> Result<T, MultifdError> {
        let mut state = self.lock();
        loop {
            if state.failure.is_some() {
                // Why is known already.
                return Err(MultifdError::Abandoned);
            }
            if let Some(answer) = ready(&mut state) {
                drop(state);
                self.changed.notify_all();
                return Ok(answer);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A socket that has to be shut down if something fails.
    pub(crate) fn add_socket(&self, socket: OwnedFd) -> Result<(), MultifdError> {
        let mut socket = Some(socket);
        self.wait(|state| {
            state.sockets.extend(socket.take());
            Some(())
        })
    }

    /// Nothing more comes of it: everybody stops. The first reason counts.
    pub(crate) fn fail(&self, error: MultifdError) {
        let mut state = self.lock();
        if state.failure.is_none() {
            tracing::debug!(%error, "multifd failed");
            state.failure = Some(error);
        }
        for socket in &state.sockets {
            // Fails if the other side was faster.
            let _ = rustix::net::shutdown(socket, Shutdown::Both);
        }
        drop(state);
        self.changed.notify_all();
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.lock().failure.is_some()
    }

    /// What went wrong, once no thread is left. That nobody writes the rest is nothing wrong here.
    pub(crate) fn outcome(&self) -> Result<(), MultifdError> {
        match self.lock().failure.take() {
            Some(error) if !error.is_given_up() => Err(error),
            _ => Ok(()),
        }
    }

    /// Bytes that the destination was given.
    fn sent_bytes(state: &State) -> u64 {
        let counters = state.counters.iter().map(Counter::bytes);
        counters.fold(0, u64::saturating_add)
    }

    /// Wait until everything was sent, as long as something still is.
    pub(crate) fn drain(&self, patience: Duration) {
        let mut state = self.lock();
        let mut progress = (Self::sent_bytes(&state), Instant::now());
        while !state.is_through && state.failure.is_none() {
            let sent = Self::sent_bytes(&state);
            if sent != progress.0 {
                progress = (sent, Instant::now());
            }
            let left = patience.saturating_sub(progress.1.elapsed());
            if left.is_zero() {
                drop(state);
                return self.fail(MultifdError::Stalled { patience });
            }
            let waited = self.changed.wait_timeout(state, left.min(DRAIN_SLICE));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The main thread has ended, and all channels.
    pub(crate) fn through(&self) {
        self.lock().is_through = true;
        self.changed.notify_all();
    }

    /// Bytes that were sent count as progress.
    pub(crate) fn count(&self, counter: &Counter) {
        self.lock().counters.push(counter.clone());
    }

    /// An empty batch.
    pub(crate) fn batch(&self, block: Name) -> Batch {
        let mut batch = self.lock().spare.pop().unwrap_or_default();
        batch.block = block;
        batch.offsets.clear();
        batch.bytes.clear();
        batch
    }

    /// Give pages to the channel that has least to do, as soon as one has room.
    pub(crate) fn give(&self, batch: Batch) -> Result<(), MultifdError> {
        let mut batch = Some(batch);
        self.wait(|state| {
            let idlest = state.queues.iter_mut().min_by_key(|queue| queue.len())?;
            if idlest.len() >= JOBS_MAX {
                return None;
            }
            idlest.extend(batch.take().map(Job::Pages));
            Some(())
        })
    }

    /// A SYNC for every channel.
    pub(crate) fn synchronise(&self) -> Result<(), MultifdError> {
        self.wait(|state| {
            if state.queues.iter().any(|queue| queue.len() >= SYNCS_MAX) {
                return None;
            }
            for queue in &mut state.queues {
                queue.push_back(Job::Sync);
            }
            Some(())
        })
    }

    /// For channels: what to do next; `None` when nothing will come.
    pub(crate) fn next(&self, channel: u8) -> Result<Option<Job>, MultifdError> {
        self.wait(|state| {
            let queue = state.queues.get_mut(usize::from(channel));
            match queue.and_then(VecDeque::pop_front) {
                Some(job) => Some(Some(job)),
                None => state.is_closed.then_some(None),
            }
        })
    }

    /// For channels: this was sent.
    pub(crate) fn give_back(&self, batch: Batch) {
        self.lock().spare.push(batch);
    }

    /// Nothing more will be given.
    pub(crate) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }
}
