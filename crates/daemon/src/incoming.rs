//! Migrations into here.
//!
//! ```text
//!   listening ── connection ──▶ receive ── success ──▶ arrived: the listener goes
//!       ▲                          │
//!       └──────── failure ─────────┘      (a channel that was opened once: the end)
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use vmferry_channel::{Channel, ChannelError, Listener, Stop, Uri, open_incoming};
use vmferry_migration::{
    Coverage, DestinationDisk, DestinationJob, Published, Start, State as MigrationState, receive,
};

use crate::announcer::Course;
use crate::config::Incoming;
use crate::error::DaemonError;
use crate::hub::Hub;

/// An expected migration.
#[derive(Debug)]
pub(crate) struct IncomingState {
    phase: Phase,
    /// Ends the waiting and the receiving.
    stop: Stop,
    /// Ends the attempt that runs.
    attempt: Option<Stop>,
    /// Of the newest attempt.
    published: Published,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// `migrate-incoming` will say where.
    Deferred,
    /// Waiting there, or receiving.
    Expecting,
    /// The disks live here.
    Arrived,
    /// It can come no more.
    Lost(String),
}

impl IncomingState {
    fn new(phase: Phase) -> Result<Self, DaemonError> {
        Ok(Self {
            phase,
            stop: Stop::new()?,
            attempt: None,
            published: Published::default(),
            thread: None,
        })
    }

    pub(crate) fn published(&self) -> &Published {
        &self.published
    }

    /// Why nothing else can be done with the disks now.
    pub(crate) fn why_busy(&self) -> Option<String> {
        match &self.phase {
            Phase::Arrived => None,
            Phase::Lost(why) => Some(format!("no migration can arrive any more: {why}")),
            Phase::Deferred | Phase::Expecting => {
                Some("Guest is waiting for an incoming migration".to_owned())
            }
        }
    }

    /// Break off the attempt that runs; the next one is waited for.
    pub(crate) fn cancel(&self) {
        if let Some(attempt) = &self.attempt {
            attempt.trigger();
        }
    }
}

/// Where connections, or the one channel, come from.
enum Door {
    Listener(Listener),
    Once(Option<Uri>),
}

impl Door {
    /// The next channel; `None` when there is none any more.
    fn open(&mut self, waiting: &Stop, attempt: &Stop) -> Result<Option<Channel>, ChannelError> {
        match self {
            Self::Listener(listener) => {
                let socket = listener.accept(waiting)?;
                Ok(Some(socket.into_channel(attempt)))
            }
            Self::Once(uri) => match uri.take() {
                Some(uri) => open_incoming(&uri, attempt).map(Some),
                None => Ok(None),
            },
        }
    }
}

impl Hub {
    /// Begin to expect a migration, if the daemon was told to.
    pub(crate) fn expect(self: &Arc<Self>, incoming: Incoming) -> Result<(), DaemonError> {
        if !self.disks.iter().any(|disk| disk.start == Start::Waiting) {
            // What was expected has arrived before a restart.
            tracing::info!("no disk waits for a migration: all live here");
            return Ok(());
        }
        self.state().incoming = Some(IncomingState::new(Phase::Deferred)?);
        match incoming {
            Incoming::Deferred => Ok(()),
            Incoming::Listener(listener) => self.receive_through(Door::Listener(listener)),
            Incoming::Once(uri) => self.receive_through(Door::Once(Some(uri))),
        }
    }

    /// `migrate-incoming`.
    pub(crate) fn migrate_incoming(self: &Arc<Self>, uri: &str) -> Result<(), DaemonError> {
        match self
            .state()
            .incoming
            .as_ref()
            .map(|incoming| &incoming.phase)
        {
            Some(Phase::Deferred) => {}
            Some(_) => {
                return Err(DaemonError::NotNow(
                    "The incoming migration has already been started".to_owned(),
                ));
            }
            None => {
                return Err(DaemonError::NotNow(
                    "no disk here waits for an incoming migration".to_owned(),
                ));
            }
        }
        let listener = Listener::bind(&uri.parse()?)?;
        self.receive_through(Door::Listener(listener))
    }

    fn receive_through(self: &Arc<Self>, mut door: Door) -> Result<(), DaemonError> {
        let place = match &door {
            Door::Listener(listener) => listener.local().to_string(),
            Door::Once(uri) => uri.as_ref().map(Uri::to_string).unwrap_or_default(),
        };
        let mut state = self.state();
        if state.ending {
            return Err(DaemonError::NotNow("the daemon is ending".to_owned()));
        }
        let Some(incoming) = &mut state.incoming else {
            return Ok(());
        };
        // Two commands may have come at the same time.
        if incoming.phase != Phase::Deferred {
            return Err(DaemonError::NotNow(
                "The incoming migration has already been started".to_owned(),
            ));
        }
        tracing::info!(at = place, "waiting for a migration");
        let hub = Arc::downgrade(self);
        let stop = incoming.stop.clone();
        let thread = std::thread::Builder::new()
            .name("migrate-incoming".to_owned())
            .spawn(move || receive_until_arrived(&hub, &mut door, &stop))?;
        incoming.phase = Phase::Expecting;
        incoming.thread = Some(thread);
        Ok(())
    }

    /// One attempt with an open channel: true when the disks live here.
    fn attempt(&self, channel: Channel, published: &Published) -> bool {
        let disks = self.disks.iter();
        let disks = disks.filter(|disk| disk.start == Start::Waiting);
        let disks = disks.map(|disk| DestinationDisk {
            node: Arc::clone(&disk.node),
            record: disk.record.clone(),
        });
        let coverage = match self.state().capabilities.incremental {
            true => Coverage::Incremental,
            false => self.coverage,
        };
        let job = DestinationJob {
            disks: disks.collect(),
            coverage,
            rest: None,
            any_machine: false,
            keep_records: true,
        };
        let peer = channel.peer().to_owned();
        // What the attempt had is gone with its stack; leases put their disks back as they were.
        match catch_unwind(AssertUnwindSafe(|| receive(channel, job, published))) {
            Ok(Ok(arrived)) => {
                tracing::info!(%peer, bytes = arrived.wire_bytes, "the migration has arrived");
                published.update(|status| status.wire_bytes = arrived.wire_bytes);
                if !arrived.source_told {
                    tracing::warn!(%peer, "the source could not be told; it may hold its disks");
                }
                true
            }
            Ok(Err(error)) => {
                tracing::error!(%peer, %error, "the migration did not arrive");
                false
            }
            Err(_) => {
                tracing::error!(%peer, "the migration's thread panicked");
                published.update(|status| {
                    status.state = MigrationState::Failed;
                    status.error = Some("internal error: the migration panicked".to_owned());
                });
                false
            }
        }
    }

    fn begin_attempt(&self) -> Result<(Stop, Published), DaemonError> {
        let stop = Stop::new()?;
        let published = self.announcer.watch(Course::Incoming);
        Ok((stop, published))
    }

    /// What `migrate_cancel` breaks off.
    fn set_attempt(&self, attempt: Option<Stop>) {
        if let Some(incoming) = &mut self.state().incoming {
            incoming.attempt = attempt;
        }
    }

    /// What `query-migrate` tells of from now on.
    fn set_published(&self, published: &Published) {
        if let Some(incoming) = &mut self.state().incoming {
            incoming.published = published.clone();
        }
    }

    fn end_expecting(&self, phase: Phase) {
        if let Some(incoming) = &mut self.state().incoming {
            incoming.attempt = None;
            incoming.phase = phase;
        }
    }

    /// The end of the daemon: break off what arrives.
    pub(crate) fn end_incoming(&self) {
        let thread = {
            let mut state = self.state();
            let Some(incoming) = &mut state.incoming else {
                return;
            };
            incoming.stop.trigger();
            incoming.cancel();
            incoming.thread.take()
        };
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

/// The thread that waits and receives.
fn receive_until_arrived(hub: &Weak<Hub>, door: &mut Door, stop: &Stop) {
    let phase = loop {
        let Some(hub) = hub.upgrade() else { return };
        let (attempt, published) = match hub.begin_attempt() {
            Ok(begun) => begun,
            Err(error) => break Phase::Lost(error.to_string()),
        };
        // Opening a command or a pipe may take its time, too. A cancel while nobody has connected
        // must not hit who comes next.
        if matches!(door, Door::Once(_)) {
            hub.set_attempt(Some(attempt.clone()));
        }
        let channel = match door.open(stop, &attempt) {
            Ok(Some(channel)) => channel,
            Ok(None) => break Phase::Lost("its channel could be opened only once".to_owned()),
            Err(ChannelError::Stopped) if stop.is_triggered() => return,
            Err(error) => {
                tracing::error!(%error, "no migration can arrive");
                break Phase::Lost(error.to_string());
            }
        };
        hub.set_attempt(Some(attempt));
        hub.set_published(&published);
        // The daemon may have ended between the last look and now.
        if stop.is_triggered() {
            return;
        }
        let arrived = hub.attempt(channel, &published);
        hub.set_attempt(None);
        if arrived {
            hub.announce_arrival();
            break Phase::Arrived;
        }
    };
    if let Some(hub) = hub.upgrade() {
        hub.end_expecting(phase);
    }
}
