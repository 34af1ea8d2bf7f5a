//! What is known about a migration, for those who watch.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// QEMU's names for where a migration stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// There was none.
    #[default]
    None,
    /// It prepares, or waits for a connection.
    Setup,
    /// Disks are moving while guests write.
    Active,
    /// The guest is held and waits for `migrate-continue`.
    PreSwitchover,
    /// The guest is held; the last chunks and the hand-over.
    Device,
    /// The guest runs at the destination, or is about to; its memory follows.
    PostcopyActive,
    /// The connection broke after that. Nothing is lost: it goes on with the next one.
    PostcopyPaused,
    /// The next one is there; both sides find out what is still to be sent.
    PostcopyRecover,
    /// Whole; over.
    Completed,
    /// Over, without success.
    Failed,
    /// A cancel is being carried out.
    Cancelling,
    /// Over, by request.
    Cancelled,
}

impl State {
    /// As QEMU's `MigrationStatus` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused => "postcopy-paused",
            Self::PostcopyRecover => "postcopy-recover",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Will it not change any more by itself?
    #[must_use]
    pub fn is_over(self) -> bool {
        matches!(
            self,
            Self::None | Self::Completed | Self::Failed | Self::Cancelled
        )
    }
}

/// Everything that is published.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Where it stands.
    pub state: State,
    /// The other side.
    pub peer: String,
    /// Why it failed, or why it is undecided.
    pub error: Option<String>,
    /// Nobody knows which side has the disks: they are held until somebody decides.
    pub undecided: bool,
    /// After completion: does the destination say that the disks are on stable storage?
    pub durable: Option<bool>,
    /// Sum of the disks' lengths in bytes.
    pub total_bytes: u64,
    /// Bytes of disk that the first pass has moved.
    pub bulk_bytes: u64,
    /// Is the first pass over?
    pub bulk_over: bool,
    /// Bytes of disk moved, counted every time.
    pub moved_bytes: u64,
    /// Bytes of disk moved as zero blocks.
    pub zero_bytes: u64,
    /// The memory of the machine, if one moves.
    pub ram: Option<RamStatus>,
    /// Bytes given to the channel.
    pub wire_bytes: u64,
    /// Bytes that still must move.
    pub remaining_bytes: u64,
    /// Number of the pass: 1 is the bulk phase.
    pub pass: u64,
    /// Bytes per second on the channel.
    pub bandwidth: u64,
    /// Bytes per second that guests dirty, in whole chunks.
    pub dirty_rate: u64,
    /// What the downtime would be now.
    pub expected_downtime: Option<Duration>,
    /// What it was: from holding the writes until the destination had taken over.
    pub downtime: Option<Duration>,
    /// Why it does not converge, and what can be done.
    pub stall: Option<String>,
    /// When it began.
    pub begun: Option<Instant>,
    /// How long setting up took.
    pub setup_time: Option<Duration>,
    /// How long it took, once it is over.
    pub total_time: Option<Duration>,
}

/// What is published about memory. At a destination, what has come of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamStatus {
    /// Sum of the blocks' lengths in bytes.
    pub total_bytes: u64,
    /// Bytes of memory that still must move.
    pub remaining_bytes: u64,
    /// Pages that went as they are.
    pub normal_pages: u64,
    /// Pages of zeroes.
    pub zero_pages: u64,
    /// Pages that went as what changed in them.
    pub xbzrle_pages: u64,
    /// Bytes per second that the guest dirties.
    pub dirty_rate: u64,
    /// Passes over the memory.
    pub passes: u64,
    /// By how much its vCPUs are slowed down.
    pub throttle_percent: u8,
    /// Pages that the destination asked for.
    pub postcopy_requests: u64,
    /// At a destination, how long the guest waited for a page: in the median, and 99 of 100 times.
    pub fault_latency: Option<[Duration; 2]>,
}

type Observer = Box<dyn Fn(&Status) + Send + Sync>;

/// A status that one thread writes and others read.
#[derive(Clone, Default)]
pub struct Published(Arc<Inner>);

#[derive(Default)]
struct Inner {
    status: Mutex<Status>,
    changed: Condvar,
    observer: Option<Observer>,
}

impl Published {
    /// `observer` is called, without locks held, whenever state or pass has changed.
    #[must_use]
    pub fn new(observer: impl Fn(&Status) + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner {
            observer: Some(Box::new(observer)),
            ..Inner::default()
        }))
    }

    /// What is known now.
    #[must_use]
    pub fn get(&self) -> Status {
        self.lock().clone()
    }

    /// Change it.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        let (status, worth_telling) = {
            let mut status = self.lock();
            let before = (status.state, status.pass, status.undecided);
            change(&mut status);
            let after = (status.state, status.pass, status.undecided);
            (status.clone(), before != after)
        };
        self.0.changed.notify_all();
        if worth_telling && let Some(observer) = &self.0.observer {
            observer(&status);
        }
    }

    /// Wait until `done` says so, at most `patience`. Returns the status that was last seen.
    pub fn wait_until(&self, patience: Duration, done: impl Fn(&Status) -> bool) -> Status {
        let guard = self.lock();
        let (guard, _) = self
            .0
            .changed
            .wait_timeout_while(guard, patience, |status| !done(status))
            .unwrap_or_else(PoisonError::into_inner);
        guard.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Status> {
        self.0.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Published {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Published").field(&self.get()).finish()
    }
}
