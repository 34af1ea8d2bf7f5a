//! What all parts of the daemon share.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_channel::Stop;
use vmferry_disk::{Hold, Lease};
use vmferry_migration::{
    Capabilities, Committed, Coverage, Parameters, Residence, SourceDisk, Start,
};
use vmferry_qmp::types::ShutdownCause;
use vmferry_relay::announce::{self, Announcements};

use crate::announcer::Announcer;
use crate::config::Disk;
use crate::error::DaemonError;
use crate::incoming::IncomingState;
use crate::jobs::Jobs;
use crate::outgoing::Outgoing;
use crate::snapshots::AtWork;

/// Shared by commands, migrations and the daemon itself.
pub(crate) struct Hub {
    pub(crate) name: Option<String>,
    pub(crate) disks: Arc<[Disk]>,
    /// What an incoming migration must bring at least.
    pub(crate) coverage: Coverage,
    pub(crate) announcer: Announcer,
    pub(crate) announcements: Announcements,
    pub(crate) ending: Arc<Ending>,
    state: Mutex<State>,
}

/// The wish that the daemon ends.
#[derive(Debug)]
pub(crate) struct Ending {
    stop: Stop,
    cause: Mutex<ShutdownCause>,
}

impl Ending {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            stop: Stop::new()?,
            cause: Mutex::default(),
        })
    }

    /// Ask for the end; the first who asks is named as the cause.
    pub(crate) fn ask(&self, cause: ShutdownCause) {
        let mut first = self.cause.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.stop.is_triggered() {
            *first = cause;
            self.stop.trigger();
        }
    }

    pub(crate) fn is_asked(&self) -> bool {
        self.stop.is_triggered()
    }

    /// Wait until then, or until somebody asks; true if somebody has.
    pub(crate) fn wait_until(&self, end: Instant) -> bool {
        self.stop.wait_until(Some(end))
    }

    /// Wait until somebody asks.
    pub(crate) fn wait(&self) {
        while !self.stop.wait_until(None) {}
    }

    /// Who has asked first.
    pub(crate) fn cause(&self) -> ShutdownCause {
        *self.cause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What changes. The lock is held for no longer than a command needs; observers of migrations
/// must not take it.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) parameters: Parameters,
    /// How a guest that has arrived is announced.
    pub(crate) announce: announce::Parameters,
    pub(crate) capabilities: Capabilities,
    pub(crate) outgoing: Option<Outgoing>,
    pub(crate) incoming: Option<IncomingState>,
    /// Disks whose hand-over was undecided when the daemon started.
    pub(crate) recovered: Option<Committed>,
    /// Disks that `stop` holds, or that a snapshot was applied to in part.
    pub(crate) stopped: Option<Vec<Lease>>,
    pub(crate) jobs: Jobs,
    /// The job that works on a snapshot.
    pub(crate) snapshot: Option<AtWork>,
    /// Before then no other one keeps guests waiting.
    pub(crate) guests_turn: Option<Instant>,
    /// Of jobs on snapshots; those that are over may be here, too.
    pub(crate) snapshot_threads: Vec<JoinHandle<()>>,
    /// No migration is started any more.
    pub(crate) ending: bool,
}

impl Hub {
    pub(crate) fn new(
        name: Option<String>,
        disks: Arc<[Disk]>,
        coverage: Coverage,
        announcer: Announcer,
        announcements: Announcements,
        ending: Arc<Ending>,
    ) -> Self {
        Self {
            name,
            disks,
            coverage,
            announcer,
            announcements,
            ending,
            state: Mutex::default(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before anybody is let in: put the records right and hold what may live elsewhere.
    pub(crate) fn settle_disks(&self) -> Result<(), DaemonError> {
        for disk in self.disks.iter().filter(|disk| disk.start == Start::Live) {
            disk.settle_record()?;
        }
        let mut undecided = self
            .disks
            .iter()
            .filter(|disk| disk.start == Start::Undecided);
        let Some(first) = undecided.next() else {
            return Ok(());
        };
        let disks: Vec<SourceDisk> = std::iter::once(first)
            .chain(undecided)
            .map(Disk::as_source)
            .collect();
        let name = first.node.name().to_owned();
        let recovered = Committed::recover(disks, &first.peer)
            .map_err(|source| DaemonError::InUse { disk: name, source })?;
        tracing::warn!(
            disks = recovered.names().collect::<Vec<_>>().join(", "),
            peer = recovered.peer(),
            "undecided: disks may live at the other side; they are held until it is resolved"
        );
        self.state().recovered = Some(recovered);
        Ok(())
    }

    /// `stop`: hold the guests' writes, once those in flight are through. False if they are held
    /// already.
    pub(crate) fn stop_guests(&self) -> Result<bool, DaemonError> {
        let missing: Vec<&Disk> = {
            let state = self.state();
            if let Some(reason) = state.why_disks_are_busy() {
                return Err(DaemonError::NotNow(reason));
            }
            let mut here = self.disks.iter().filter(|disk| disk.is_here());
            match &state.stopped {
                None => here.collect(),
                Some(stopped) => {
                    let is_stopped = |disk: &Disk| {
                        let mut nodes = stopped.iter().map(Lease::node);
                        nodes.any(|node| Arc::ptr_eq(node, &disk.node))
                    };
                    let missing: Vec<&Disk> =
                        here.by_ref().filter(|disk| !is_stopped(disk)).collect();
                    if missing.is_empty() {
                        return Ok(false);
                    }
                    missing
                }
            }
        };
        // From here on the leases keep others off, not the lock: draining may take its time.
        let leases: Vec<Lease> = missing
            .into_iter()
            .map(|disk| {
                disk.node.lease("stop").map_err(|source| {
                    let disk = disk.node.name().to_owned();
                    DaemonError::InUse { disk, source }
                })
            })
            .collect::<Result<_, _>>()?;
        for lease in &leases {
            lease.hold(Hold::Writes);
        }
        for lease in &leases {
            if !lease.drain(DRAIN_PATIENCE) {
                let disk = lease.node().name().to_owned();
                let reason = "has writes in flight that do not end".to_owned();
                return Err(DaemonError::UnsuitableDisk { disk, reason });
            }
        }
        let mut state = self.state();
        state.stopped.get_or_insert_default().extend(leases);
        Ok(true)
    }
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub")
            .field("name", &self.name)
            .field("disks", &self.disks)
            .finish_non_exhaustive()
    }
}

/// How long `stop` waits for writes in flight.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);

impl State {
    /// Why the disks are not at anybody's disposal, if they are not.
    pub(crate) fn why_disks_are_busy(&self) -> Option<String> {
        if self.ending {
            return Some("the daemon is ending".to_owned());
        }
        if let Some(recovered) = &self.recovered {
            return Some(format!(
                "disks are held, because they may have moved to {}; `x-resolve` decides",
                recovered.peer()
            ));
        }
        if let Some(outgoing) = &self.outgoing
            && let Some(reason) = outgoing.why_busy()
        {
            return Some(reason);
        }
        if let Some(at_work) = &self.snapshot {
            return Some(at_work.why_busy());
        }
        self.incoming.as_ref().and_then(IncomingState::why_busy)
    }
}

impl Disk {
    /// Was not given up.
    pub(crate) fn is_here(&self) -> bool {
        self.node.held().is_some()
    }

    pub(crate) fn as_source(&self) -> SourceDisk {
        SourceDisk {
            node: Arc::clone(&self.node),
            record: self.record.clone(),
        }
    }

    /// A disk that lives here although its record says otherwise was taken back: that is written
    /// down before the first guest comes.
    fn settle_record(&self) -> Result<(), DaemonError> {
        let Some(file) = &self.record else {
            return Ok(());
        };
        let Some(record) = file.read()? else {
            return Ok(());
        };
        if record.residence == Residence::Arrived {
            return Ok(());
        }
        let disk = self.node.name();
        if !self.taken_back {
            return Err(DaemonError::UnsuitableDisk {
                disk: disk.to_owned(),
                reason: format!(
                    "is {} by its record '{}', so it is not served",
                    record.residence,
                    file.path().display()
                ),
            });
        }
        tracing::warn!(disk, record = %record.residence, "taken back, against its record");
        Ok(file.take_back(&record.peer)?)
    }
}
