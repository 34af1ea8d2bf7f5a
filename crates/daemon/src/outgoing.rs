//! Migrations out of here: the commands that start and steer one.

use std::fs::File;
use std::time::Duration;

use vmferry_channel::{Channel, Direction, Stop, Uri};
use vmferry_migration::{
    Capabilities, DOWNTIME_LIMIT_MAX, Decision, Parameters, Published, RecordFile, RunningSource,
    SourceDisk, SourceJob, Target,
};
use vmferry_qmp::types::{
    Empty, Migrate, MigrationCapability, MigrationCapabilityStatus, MigrationParameters,
    MigrationStatus, Resolution,
};
use vmferry_qmp::{ClientContext, Event};

use crate::announce;
use crate::announcer::{Course, migration_status};
use crate::config::Disk;
use crate::error::DaemonError;
use crate::hub::Hub;

/// How long a decision may take to be carried out.
const DECISION_PATIENCE: Duration = Duration::from_secs(10);
/// How long a cancel may take before its thread is waited for without looking at anything else.
const CANCEL_PATIENCE: Duration = Duration::from_secs(30);

/// The newest migration out of here.
#[derive(Debug)]
pub(crate) struct Outgoing {
    /// Gone once the daemon ends.
    running: Option<RunningSource>,
    published: Published,
    /// Names and lengths of its disks, in the order in which they are sent.
    pub(crate) disks: Vec<String>,
    /// Nobody tells whether the disks arrived.
    pub(crate) one_way: bool,
}

impl Outgoing {
    pub(crate) fn published(&self) -> &Published {
        &self.published
    }

    fn running(&self) -> Result<&RunningSource, DaemonError> {
        self.running
            .as_ref()
            .ok_or_else(|| DaemonError::NotNow("the daemon is ending".to_owned()))
    }

    /// Why nothing else can be done with the disks now.
    pub(crate) fn why_busy(&self) -> Option<String> {
        let status = self.published().get();
        if status.undecided {
            return Some(format!(
                "disks are held, because they may have moved to {}; `x-resolve` decides",
                status.peer
            ));
        }
        let running = !status.state.is_over();
        running.then(|| "There's a migration process in progress".to_owned())
    }
}

impl Hub {
    /// `migrate`.
    pub(crate) fn migrate(
        &self,
        client: &ClientContext,
        arguments: &Migrate,
    ) -> Result<(), DaemonError> {
        if arguments.blk == Some(false) {
            return Err(DaemonError::Argument(
                "'blk' cannot be off: this daemon has nothing but disks to migrate".to_owned(),
            ));
        }
        let uri = arguments.address()?;
        let mut state = self.state();
        if let Some(reason) = state.why_disks_are_busy() {
            return Err(DaemonError::NotNow(reason));
        }
        if state.stopped.is_some() {
            return Err(DaemonError::NotNow(
                "the disks are stopped; `cont` before migrating".to_owned(),
            ));
        }
        let disks = self.disks_to_migrate(arguments.x_disks.as_deref())?;
        let one_way = arguments.x_one_way == Some(true) || !state.capabilities.return_path;
        if arguments.x_check == Some(true) {
            return check(&uri, &disks, one_way);
        }
        let stop = Stop::new()?;
        let target = open_target(client, &uri, &stop)?;
        let id = state.jobs.next_id();
        let published = self.announcer.watch(Course::Outgoing { job: id.clone() });
        let names = disks.iter().map(|disk| disk.node.name().to_owned());
        let names = names.collect();
        let job = SourceJob {
            disks,
            target,
            parameters: state.parameters,
            capabilities: Capabilities {
                return_path: !one_way,
                incremental: arguments.inc.unwrap_or(state.capabilities.incremental),
                ..state.capabilities
            },
            stop,
        };
        let running = RunningSource::start(job, published.clone())?;
        state.jobs.add(id, published);
        // The old one is over; its thread has nothing left to do.
        state.outgoing = Some(Outgoing {
            published: running.published().clone(),
            running: Some(running),
            disks: names,
            one_way,
        });
        Ok(())
    }

    /// Those that are named, or all that can be written to and are here.
    fn disks_to_migrate(&self, names: Option<&[String]>) -> Result<Vec<SourceDisk>, DaemonError> {
        let Some(names) = names else {
            let disks = self.disks.iter();
            let disks = disks.filter(|disk| disk.is_here() && !disk.node.limits().read_only);
            return Ok(disks.map(Disk::as_source).collect());
        };
        let mut chosen: Vec<SourceDisk> = Vec::new();
        for name in names {
            let mut disks = self.disks.iter();
            let Some(disk) = disks.find(|disk| disk.node.name() == name) else {
                return Err(DaemonError::NoSuchDisk(name.clone()));
            };
            let unsuitable = |reason: &str| {
                let (disk, reason) = (name.clone(), reason.to_owned());
                Err(DaemonError::UnsuitableDisk { disk, reason })
            };
            if chosen.iter().any(|disk| disk.node.name() == name) {
                return unsuitable("is named twice");
            }
            if !disk.is_here() {
                return unsuitable("has moved away already");
            }
            if disk.node.limits().read_only {
                return unsuitable("is read-only, and a migration moves only what changes");
            }
            chosen.push(disk.as_source());
        }
        Ok(chosen)
    }

    /// `migrate_cancel`: nothing to cancel is no error, as in QEMU.
    pub(crate) fn migrate_cancel(&self) -> Result<(), DaemonError> {
        let state = self.state();
        if let Some(outgoing) = &state.outgoing {
            outgoing.running()?.cancel()?;
        }
        if let Some(incoming) = &state.incoming {
            incoming.cancel();
        }
        Ok(())
    }

    /// `migrate-continue`.
    pub(crate) fn migrate_continue(&self, expected: MigrationStatus) -> Result<(), DaemonError> {
        let state = self.state();
        let now = state
            .outgoing
            .as_ref()
            .map(|outgoing| outgoing.published().get().state);
        let now = migration_status(now.unwrap_or_default());
        if now != expected {
            return Err(DaemonError::NotNow(format!(
                "Migration not in expected state: {now}"
            )));
        }
        match &state.outgoing {
            Some(outgoing) => Ok(outgoing.running()?.go_on()?),
            None => Ok(()),
        }
    }

    /// `x-resolve`, and `cont` in an undecided state. False if there is nothing to decide.
    pub(crate) fn resolve(&self, resolution: Resolution) -> Result<bool, DaemonError> {
        let decision = match resolution {
            Resolution::Serve => Decision::Serve,
            Resolution::GiveUp => Decision::GiveUp,
        };
        let mut state = self.state();
        if let Some(recovered) = state.recovered.take() {
            recovered.decide(decision);
            if decision == Decision::Serve {
                self.announcer.publish(&Event::Resume(Empty {}));
            }
            return Ok(true);
        }
        let Some(outgoing) = &state.outgoing else {
            return Ok(false);
        };
        if !outgoing.published().get().undecided {
            return Ok(false);
        }
        outgoing.running()?.decide(decision)?;
        let published = outgoing.published().clone();
        drop(state);
        let status = published.wait_until(DECISION_PATIENCE, |status| !status.undecided);
        if status.undecided {
            return Err(DaemonError::NotNow(
                "the migration has ended without carrying out a decision; start the daemon anew"
                    .to_owned(),
            ));
        }
        Ok(true)
    }

    /// `migrate-set-parameters`.
    pub(crate) fn set_parameters(&self, new: &MigrationParameters) -> Result<(), DaemonError> {
        let mut state = self.state();
        let mut parameters = state.parameters;
        if let Some(rate) = new.max_bandwidth {
            parameters.max_bandwidth = (rate > 0).then_some(rate);
        }
        if let Some(limit_ms) = new.downtime_limit {
            let limit = Duration::from_millis(limit_ms);
            if limit > DOWNTIME_LIMIT_MAX {
                return Err(DaemonError::Argument(format!(
                    "Parameter 'downtime-limit' expects an integer in the range of 0 to {} \
                     milliseconds",
                    DOWNTIME_LIMIT_MAX.as_millis()
                )));
            }
            parameters.downtime_limit = limit;
        }
        state.announce = announce::changed(state.announce, new)?;
        if let Some(incremental) = new.block_incremental {
            // For the next migration: the one that runs has begun.
            state.capabilities.incremental = incremental;
        }
        state.parameters = parameters;
        if let Some(running) = state.outgoing.as_ref().and_then(|it| it.running.as_ref()) {
            running.set(parameters);
        }
        Ok(())
    }

    /// `query-migrate-parameters`.
    pub(crate) fn parameters(&self) -> MigrationParameters {
        let state = self.state();
        let Parameters {
            max_bandwidth,
            downtime_limit,
        } = state.parameters;
        MigrationParameters {
            max_bandwidth: Some(max_bandwidth.unwrap_or(0)),
            downtime_limit: Some(milliseconds(downtime_limit)),
            block_incremental: Some(state.capabilities.incremental),
            announce_initial: Some(state.announce.initial_ms()),
            announce_max: Some(state.announce.max_ms()),
            announce_rounds: Some(state.announce.rounds()),
            announce_step: Some(state.announce.step_ms()),
        }
    }

    /// `migrate-set-capabilities`.
    pub(crate) fn set_capabilities(
        &self,
        changes: &[MigrationCapabilityStatus],
    ) -> Result<(), DaemonError> {
        let mut state = self.state();
        let status = state
            .outgoing
            .as_ref()
            .map(|outgoing| outgoing.published().get().state);
        if status.is_some_and(|status| !status.is_over()) {
            return Err(DaemonError::NotNow(
                "There's a migration process in progress".to_owned(),
            ));
        }
        let off = |change: &MigrationCapabilityStatus| {
            change.capability == MigrationCapability::Block && !change.state
        };
        if changes.iter().any(off) {
            return Err(DaemonError::Argument(
                "'block' cannot be off: this daemon has nothing but disks to migrate".to_owned(),
            ));
        }
        for change in changes {
            let capabilities = &mut state.capabilities;
            match change.capability {
                // It is on.
                MigrationCapability::Block => {}
                MigrationCapability::ZeroBlocks => capabilities.zero_blocks = change.state,
                MigrationCapability::ReturnPath => capabilities.return_path = change.state,
                MigrationCapability::PauseBeforeSwitchover => {
                    capabilities.pause_before_switchover = change.state;
                }
                MigrationCapability::Events => self.announcer.set_migration_events(change.state),
            }
        }
        Ok(())
    }

    /// `query-migrate-capabilities`.
    pub(crate) fn capabilities(&self) -> Vec<MigrationCapabilityStatus> {
        let Capabilities {
            zero_blocks,
            return_path,
            pause_before_switchover,
            incremental: _,
        } = self.state().capabilities;
        let one = |capability: &MigrationCapability| MigrationCapabilityStatus {
            capability: *capability,
            state: match capability {
                MigrationCapability::Block => true,
                MigrationCapability::ZeroBlocks => zero_blocks,
                MigrationCapability::ReturnPath => return_path,
                MigrationCapability::PauseBeforeSwitchover => pause_before_switchover,
                MigrationCapability::Events => self.announcer.migration_events(),
            },
        };
        MigrationCapability::ALL.iter().map(one).collect()
    }

    /// The end of the daemon: cancel if that is possible, else leave the disks held. Clients can
    /// see how it went.
    pub(crate) fn end_outgoing(&self) {
        let published = {
            let mut state = self.state();
            state.ending = true;
            state.outgoing.as_ref().and_then(|outgoing| {
                let cancelled = outgoing.running().ok()?.cancel().is_ok();
                cancelled.then(|| outgoing.published().clone())
            })
        };
        if let Some(published) = published {
            published.wait_until(CANCEL_PATIENCE, |status| status.state.is_over());
        }
        let running = {
            let mut state = self.state();
            state.outgoing.as_mut().and_then(|it| it.running.take())
        };
        // Waits for its thread, without the lock: queries are answered meanwhile.
        drop(running);
    }
}

/// What would go wrong. The destination is not contacted: a QEMU that waits for its migration
/// takes any connection for it, and ends when nothing comes.
fn check(uri: &str, disks: &[SourceDisk], one_way: bool) -> Result<(), DaemonError> {
    if disks.is_empty() {
        return Err(vmferry_migration::SourceFailure::NoDisks.into());
    }
    for disk in disks {
        if let Some(user) = disk.node.user() {
            let source = vmferry_disk::InUse { user };
            let disk = disk.node.name().to_owned();
            return Err(DaemonError::InUse { disk, source });
        }
        if let Some(record) = &disk.record {
            record.read()?;
            check_writable(disk.node.name(), record)?;
        }
    }
    if uri.starts_with("fd:") {
        return Ok(());
    }
    match uri.parse()? {
        Uri::File { .. } if !one_way => Err(DaemonError::Argument(format!(
            "{uri}: a file cannot answer, so nobody can tell whether the disks arrive; one-way \
             must be asked for"
        ))),
        _ => Ok(()),
    }
}

/// The record of a disk could be written now: a file can be made beside it.
fn check_writable(disk: &str, record: &RecordFile) -> Result<(), DaemonError> {
    let mut trial = record.path().as_os_str().to_owned();
    trial.push(".trial");
    let tried = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&trial)
        .and_then(|_| std::fs::remove_file(&trial));
    tried.map_err(|error| DaemonError::UnsuitableDisk {
        disk: disk.to_owned(),
        reason: format!(
            "has a record '{}' that cannot be written: {error}",
            record.path().display()
        ),
    })
}

/// Where to: an address, or a descriptor that this client has handed in.
fn open_target(client: &ClientContext, uri: &str, stop: &Stop) -> Result<Target, DaemonError> {
    if let Some(name) = uri.strip_prefix("fd:") {
        let fd = client.take_fd(name)?;
        let channel = Channel::from_fd(fd, Direction::Outgoing, uri, stop)?;
        return Ok(Target::Channel(channel));
    }
    match uri.parse()? {
        uri @ (Uri::Tcp { .. } | Uri::Unix(_)) => Ok(Target::Uri(uri)),
        Uri::Exec(_) | Uri::File { .. } | Uri::Fd(_) | Uri::Stdio => {
            Err(DaemonError::Argument(format!(
                "{uri}: the daemon opens nothing but tcp: and unix:; open it yourself and hand \
                 it over with `getfd`, as `vmferry migrate` does"
            )))
        }
    }
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
