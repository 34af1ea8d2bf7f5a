//! Start, life and orderly end of a daemon.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use vmferry_channel::{Listener, Stop};
use vmferry_disk::DiskError;
use vmferry_nbd::Settings;
use vmferry_qmp::types::{ShutdownCause, ShutdownEvent};
use vmferry_qmp::{Broadcast, Event};
use vmferry_relay::announce::Announcements;

use crate::announcer::Announcer;
use crate::commands::Commands;
use crate::config::{Config, version};
use crate::error::DaemonError;
use crate::exports::DiskExports;
use crate::hub::{Ending, Hub};

/// How long QMP clients may take to read their last replies and the farewell.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(2);

/// A daemon did not start. Nothing was served and no disk was changed.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A disk cannot be held, or its record not be put right; or no migration can be expected.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The host has no thread or descriptor left.
    #[error("cannot start the servers: {0}")]
    Resources(#[from] io::Error),
    /// Two disks have the same name.
    #[error("there are two disks named '{0}'")]
    TwoOfAName(String),
}

/// A daemon has ended, but not everything is on stable storage.
#[derive(Debug, thiserror::Error)]
#[error("disk '{disk}': what was written last may be lost: {source}")]
pub struct RunError {
    /// The first disk that could not be synced.
    pub disk: String,
    /// What the host said.
    pub source: DiskError,
}

/// A running daemon. Dropping it ends it, in order but without a word about disks that could not
/// be synced.
#[derive(Debug)]
pub struct Daemon {
    hub: Arc<Hub>,
    /// The last to start and the last to end.
    qmp: Option<vmferry_qmp::Server>,
    nbd_stop: Stop,
    nbd_threads: Vec<JoinHandle<()>>,
    ended: bool,
}

/// Asks a daemon to end, from any thread.
#[derive(Clone, Debug)]
pub struct Ender(Arc<Ending>);

impl Ender {
    /// Ask for the end. The first cause is the one that QMP clients are told.
    pub fn end(&self, cause: ShutdownCause) {
        self.0.ask(cause);
    }
}

impl Daemon {
    /// Serve everything. Listeners are served from here on; a daemon that fails to start closes
    /// them.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(config: Config) -> Result<Self, StartError> {
        let disks: Arc<[_]> = config.disks.into();
        for (index, disk) in disks.iter().enumerate() {
            let name = disk.node.name();
            if disks[..index].iter().any(|other| other.node.name() == name) {
                return Err(StartError::TwoOfAName(name.to_owned()));
            }
        }
        let broadcast = Broadcast::default();
        let announcer = Announcer::new(broadcast.clone());
        let hub = Hub::new(
            config.name,
            Arc::clone(&disks),
            config.coverage,
            announcer,
            Announcements::start(config.nics)?,
            Arc::new(Ending::new()?),
        );
        let hub = Arc::new(hub);
        hub.settle_disks()?;
        let mut daemon = Self {
            hub: Arc::clone(&hub),
            qmp: None,
            nbd_stop: Stop::new()?,
            nbd_threads: Vec::new(),
            ended: false,
        };
        // Before the first command can come: disks that wait for a migration cannot migrate away.
        if let Some(incoming) = config.incoming {
            hub.expect(incoming)?;
        }
        let exports = Arc::new(DiskExports::new(disks));
        let nbd = vmferry_nbd::Server::new(exports, Settings::default())?;
        for listener in config.nbd {
            daemon.serve_nbd(&nbd, listener)?;
        }
        let commands = Arc::new(Commands::new(hub));
        let qmp = vmferry_qmp::Server::start(config.qmp, version(), commands, broadcast)?;
        daemon.qmp = Some(qmp);
        Ok(daemon)
    }

    /// Can ask for the end while [`Daemon::run`] waits for it.
    #[must_use]
    pub fn ender(&self) -> Ender {
        Ender(Arc::clone(&self.hub.ending))
    }

    /// Wait until somebody asks for the end, then end in order: migrations are cancelled (or their
    /// disks stay held, where it is too late for that), requests in flight are answered, disks are
    /// synced. Nothing holds a disk any more when this returns.
    ///
    /// # Errors
    /// A disk could not be synced.
    pub fn run(mut self) -> Result<(), RunError> {
        self.hub.ending.wait();
        self.shut_down()
    }

    fn serve_nbd(
        &mut self,
        server: &Arc<vmferry_nbd::Server>,
        listener: Listener,
    ) -> Result<(), StartError> {
        let (server, stop) = (Arc::clone(server), self.nbd_stop.clone());
        let thread = std::thread::Builder::new()
            .name("nbd-listener".to_owned())
            .spawn(move || {
                if let Err(error) = server.serve(&listener, &stop) {
                    tracing::error!(%error, at = %listener.local(), "NBD listener failed");
                }
            })?;
        self.nbd_threads.push(thread);
        Ok(())
    }

    fn shut_down(&mut self) -> Result<(), RunError> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        let cause = self.hub.ending.cause();
        tracing::info!(%cause, "ending");
        let result = self.end_service();
        let farewell = Event::Shutdown(ShutdownEvent {
            guest: false,
            reason: cause,
        });
        if let Some(qmp) = self.qmp.take() {
            qmp.shutdown(&farewell, FAREWELL_PATIENCE);
        }
        result
    }

    /// Everything but QMP, whose clients see how it goes.
    fn end_service(&mut self) -> Result<(), RunError> {
        self.hub.end_snapshots();
        self.hub.end_outgoing();
        self.hub.end_incoming();
        self.nbd_stop.trigger();
        for thread in self.nbd_threads.drain(..) {
            let _ = thread.join();
        }
        let mut result = Ok(());
        for disk in &*self.hub.disks {
            if let Err(source) = disk.node.flush() {
                let disk = disk.node.name().to_owned();
                tracing::error!(disk, error = %source, "cannot be synced");
                result = result.and(Err(RunError { disk, source }));
            }
        }
        result
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.hub.ending.ask(ShutdownCause::HostError);
        // It has been logged.
        let _ = self.shut_down();
    }
}
