//! Snapshots of disks in use, as jobs.
//!
//! ```text
//!   command ── leases on all disks ──▶ job: created
//!                                      guests' turn after the last job
//!                                      running    flush
//!                                                 hold all ─▶ drain all ─▶ one disk after the other
//!                                                 lift all
//!                                      waiting, pending, or aborting
//!                                      concluded
//! ```
//!
//! What a command can see at once it refuses: unknown disks, raw ones, disks that somebody else uses.
//! What goes wrong later is the error of its job.
//!
//! | | `snapshot-save` | `snapshot-load` | `snapshot-delete` |
//! |-|-|-|-|
//! | held | writes | everything | nothing |
//! | after an error | what was made is deleted | disks may differ: guests stay stopped until `cont` | some disks have lost it |
//!
//! Disks that `stop` holds are used as they are, and stay held. No disk here holds the state of a
//! machine: `vmstate` must be one of the disks, as for a QEMU, and means nothing more; what a QEMU has
//! stored is kept and not looked at.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use vmferry_disk::{Hold, InUse, Lease, Node};
use vmferry_migration::Start;
use vmferry_qcow2::{Qcow2Disk, Snapshot};
use vmferry_qmp::Event;
use vmferry_qmp::types::{Empty, JobStatus, JobStatusChangeEvent, JobType, RunState, SnapshotInfo};
use vmferry_snapshot::{Moment, NamedDisk, SnapshotError};

use crate::config::Disk;
use crate::error::DaemonError;
use crate::hub::{Hub, State};
use crate::incoming::IncomingState;
use crate::jobs::Progress;

/// How long all disks together may take to finish the writes in flight.
const DRAIN_PATIENCE: Duration = Duration::from_secs(10);
/// Guests run between two jobs for as long as they waited, and for this long at most.
const TURN_MAX: Duration = Duration::from_secs(1);

/// What is done with a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deed {
    Save,
    Load,
    Delete,
}

impl Deed {
    fn job_type(self) -> JobType {
        match self {
            Self::Save => JobType::SnapshotSave,
            Self::Load => JobType::SnapshotLoad,
            Self::Delete => JobType::SnapshotDelete,
        }
    }

    /// What guests wait for. A snapshot that goes is no business of theirs.
    fn hold(self) -> Option<Hold> {
        match self {
            Self::Save => Some(Hold::Writes),
            Self::Load => Some(Hold::Everything),
            Self::Delete => None,
        }
    }
}

/// A command.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) deed: Deed,
    pub(crate) job: String,
    pub(crate) tag: String,
    /// Where a QEMU would have its machine's state.
    pub(crate) vm_state: Option<String>,
    pub(crate) disks: Vec<String>,
}

/// The job at work: one at a time.
#[derive(Debug)]
pub(crate) struct AtWork {
    job: String,
    deed: Deed,
    /// Guests wait.
    holding: bool,
}

impl AtWork {
    /// Why nothing else can be done with the disks now.
    pub(crate) fn why_busy(&self) -> String {
        format!("snapshot job '{}' is at work", self.job)
    }

    /// What a QEMU calls this.
    pub(crate) fn run_state(&self) -> Option<RunState> {
        match self.deed {
            _ if !self.holding => None,
            Deed::Save => Some(RunState::SaveVm),
            Deed::Load => Some(RunState::RestoreVm),
            Deed::Delete => None,
        }
    }
}

/// A disk that the job has for itself.
struct Target {
    image: Arc<Qcow2Disk>,
    lease: Lease,
    /// `stop` held it before.
    was_stopped: bool,
}

impl Target {
    fn node(&self) -> &Arc<Node> {
        self.lease.node()
    }

    fn name(&self) -> &str {
        self.node().name()
    }

    fn unsuitable(&self, reason: impl Into<String>) -> DaemonError {
        DaemonError::UnsuitableDisk {
            disk: self.name().to_owned(),
            reason: reason.into(),
        }
    }
}

/// Whatever becomes of it, the content of these disks is another one.
struct Replaced<'a>(&'a [Target]);

impl Drop for Replaced<'_> {
    fn drop(&mut self) {
        for target in self.0 {
            let node = target.node();
            node.dirty().mark(0, node.limits().length);
        }
    }
}

/// A job, in its thread.
struct Job {
    order: Order,
    progress: Progress,
}

impl Hub {
    /// `snapshot-save`, `snapshot-load`, `snapshot-delete`.
    pub(crate) fn snapshot(self: &Arc<Self>, order: Order) -> Result<(), DaemonError> {
        check_job_id(&order.job)?;
        let mut state = self.state();
        if state.jobs.has(&order.job) {
            let message = format!("Job ID '{}' already in use", order.job);
            return Err(DaemonError::Argument(message));
        }
        if state.ending {
            return Err(DaemonError::NotNow("the daemon is ending".to_owned()));
        }
        if let Some(at_work) = &state.snapshot {
            return Err(DaemonError::NotNow(at_work.why_busy()));
        }
        check_names(&order)?;
        let chosen = self.chosen(&state, &order.disks)?;
        // First the thread, which may not be had: leases of `stop` are not given away for nothing.
        let (hand_over, receiver) = mpsc::channel();
        let hub = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("snapshot".to_owned())
            .spawn(move || {
                if let Ok((job, targets)) = receiver.recv() {
                    hub.run_snapshot_job(&job, targets);
                }
            })?;
        state
            .snapshot_threads
            .retain(|thread| !thread.is_finished());
        state.snapshot_threads.push(thread);
        let progress = Progress::new(order.deed.job_type());
        state.jobs.add_snapshot(order.job.clone(), progress.clone());
        state.snapshot = Some(AtWork {
            job: order.job.clone(),
            deed: order.deed,
            holding: false,
        });
        let targets = chosen.into_iter().filter_map(|one| one.target(&mut state));
        let targets: Vec<Target> = targets.collect();
        let job = Job { order, progress };
        self.tell(&job, JobStatus::Created);
        // It waits for this, and nothing else.
        let _ = hand_over.send((job, targets));
        Ok(())
    }

    /// The disks of these names, if they are all here, can have snapshots, and are not in use.
    fn chosen(&self, state: &State, names: &[String]) -> Result<Vec<Chosen>, DaemonError> {
        let expecting = state.incoming.as_ref().and_then(IncomingState::why_busy);
        let one = |name: &String| {
            let mut disks = self.disks.iter();
            let disk = disks.find(|disk| disk.node.name() == name);
            let disk = disk.ok_or_else(|| DaemonError::NoSuchDisk(name.clone()))?;
            let unsuitable = |reason: String| DaemonError::UnsuitableDisk {
                disk: name.clone(),
                reason,
            };
            if !disk.is_here() {
                return Err(unsuitable("has moved away".to_owned()));
            }
            let Some(image) = disk.image.clone() else {
                let reason = format!(
                    "is {}, and only qcow2 images can have snapshots",
                    disk.format
                );
                return Err(unsuitable(reason));
            };
            if disk.node.limits().read_only {
                return Err(unsuitable("is read-only".to_owned()));
            }
            if disk.start == Start::Waiting && expecting.is_some() {
                return Err(unsuitable("waits for a migration".to_owned()));
            }
            let lease = match is_stopped(state, name) {
                true => None,
                false => Some(lease(disk)?),
            };
            let name = name.clone();
            Ok(Chosen { name, image, lease })
        };
        names.iter().map(one).collect()
    }

    fn run_snapshot_job(&self, job: &Job, targets: Vec<Target>) {
        let carried_out = catch_unwind(AssertUnwindSafe(|| self.carry_out(job, &targets)));
        let outcome = carried_out.unwrap_or_else(|_| {
            let message = "internal error: the snapshot job panicked".to_owned();
            Err(DaemonError::NotNow(message))
        });
        let torn = matches!(
            outcome,
            Err(DaemonError::Snapshot(SnapshotError::Torn { .. }))
        );
        self.let_go(targets, torn);
        let (id, tag) = (&job.order.job, &job.order.tag);
        match &outcome {
            Ok(()) => {
                tracing::info!(
                    job = id,
                    snapshot = tag,
                    "{}: done",
                    job.order.deed.job_type()
                );
                self.tell(job, JobStatus::Waiting);
                self.tell(job, JobStatus::Pending);
            }
            Err(error) => {
                tracing::error!(job = id, snapshot = tag, %error, "{}", job.order.deed.job_type());
                job.progress.fail(error.to_string());
                self.tell(job, JobStatus::Aborting);
            }
        }
        // Who learns that it is over may give the next command.
        self.state().snapshot = None;
        self.tell(job, JobStatus::Concluded);
    }

    fn carry_out(&self, job: &Job, targets: &[Target]) -> Result<(), DaemonError> {
        self.wait_for_turn()?;
        self.tell(job, JobStatus::Running);
        // While guests still write: what is left to be written when they wait is little.
        for target in targets {
            target.node().flush().map_err(|source| DaemonError::Disk {
                disk: target.name().to_owned(),
                source,
            })?;
        }
        if job.order.deed == Deed::Load {
            check_lengths(targets, &job.order.tag)?;
        }
        let began = Instant::now();
        let outcome = self
            .hold(job.order.deed, targets)
            .and_then(|()| Ok(do_it(&job.order, targets)?));
        // Guests wait for the image even where nothing is held.
        self.state().guests_turn = Some(Instant::now() + began.elapsed().min(TURN_MAX));
        outcome
    }

    /// However fast jobs follow one another, guests get to run between them.
    fn wait_for_turn(&self) -> Result<(), DaemonError> {
        let turn = self.state().guests_turn;
        let ending = match turn {
            Some(end) => self.ending.wait_until(end),
            None => self.ending.is_asked(),
        };
        match ending {
            true => Err(DaemonError::NotNow("the daemon is ending".to_owned())),
            false => Ok(()),
        }
    }

    /// Hold all disks, then wait until nothing is written to any.
    fn hold(&self, deed: Deed, targets: &[Target]) -> Result<(), DaemonError> {
        let Some(level) = deed.hold() else {
            return Ok(());
        };
        if let Some(at_work) = &mut self.state().snapshot {
            at_work.holding = true;
        }
        if targets.iter().any(|target| !target.was_stopped) {
            self.announcer.publish(&Event::Stop(Empty {}));
        }
        for target in targets {
            target.lease.hold(level);
        }
        let end = Instant::now() + DRAIN_PATIENCE;
        for target in targets {
            let left = end.saturating_duration_since(Instant::now());
            if !target.lease.drain(left) {
                return Err(target.unsuitable("has writes in flight that do not end"));
            }
        }
        Ok(())
    }

    /// Guests go on, unless they were stopped before, or their disks do not fit together any more.
    fn let_go(&self, targets: Vec<Target>, torn: bool) {
        let mut state = self.state();
        let held = state.snapshot.as_mut();
        let held = held.is_some_and(|at_work| std::mem::replace(&mut at_work.holding, false));
        let resumes = held && !torn && targets.iter().any(|target| !target.was_stopped);
        for target in targets {
            if target.was_stopped || torn {
                target.lease.hold(Hold::Writes);
                state.stopped.get_or_insert_default().push(target.lease);
            }
        }
        drop(state);
        if resumes {
            self.announcer.publish(&Event::Resume(Empty {}));
        }
    }

    fn tell(&self, job: &Job, status: JobStatus) {
        job.progress.set(status);
        self.announce_job(job.order.job.clone(), status);
    }

    fn announce_job(&self, id: String, status: JobStatus) {
        let event = Event::JobStatusChange(JobStatusChangeEvent { id, status });
        self.announcer.publish(&event);
    }

    /// `job-dismiss`.
    pub(crate) fn dismiss_job(&self, id: &str) -> Result<(), DaemonError> {
        self.state().jobs.dismiss(id)?;
        self.announce_job(id.to_owned(), JobStatus::Null);
        Ok(())
    }

    /// The end of the daemon: what is at work is finished, and nothing else begins.
    pub(crate) fn end_snapshots(&self) {
        let threads = {
            let mut state = self.state();
            state.ending = true;
            std::mem::take(&mut state.snapshot_threads)
        };
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// A disk that can be used, and the lease on it, unless `stop` has that.
struct Chosen {
    name: String,
    image: Arc<Qcow2Disk>,
    lease: Option<Lease>,
}

impl Chosen {
    fn target(self, state: &mut State) -> Option<Target> {
        let was_stopped = self.lease.is_none();
        let lease = self.lease.or_else(|| {
            let stopped = state.stopped.as_mut()?;
            let mut leases = stopped.iter();
            let index = leases.position(|lease| lease.node().name() == self.name)?;
            Some(stopped.swap_remove(index))
        })?;
        Some(Target {
            image: self.image,
            lease,
            was_stopped,
        })
    }
}

fn is_stopped(state: &State, name: &str) -> bool {
    let mut leases = state.stopped.iter().flatten();
    leases.any(|lease| lease.node().name() == name)
}

fn lease(disk: &Disk) -> Result<Lease, DaemonError> {
    let in_use = |source: InUse| {
        let disk = disk.node.name().to_owned();
        DaemonError::InUse { disk, source }
    };
    disk.node.lease("a snapshot job").map_err(in_use)
}

/// What QEMU takes as the name of a job: a letter, then letters, digits and `-._`.
fn check_job_id(id: &str) -> Result<(), DaemonError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    match id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(fits) {
        true => Ok(()),
        false => Err(DaemonError::Argument(format!("Invalid job ID '{id}'"))),
    }
}

fn check_names(order: &Order) -> Result<(), DaemonError> {
    let names = &order.disks;
    if names.is_empty() {
        let message = "At least one device is required for snapshot";
        return Err(DaemonError::Argument(message.to_owned()));
    }
    let mut seen = std::collections::HashSet::new();
    if let Some(twice) = names.iter().find(|name| !seen.insert(*name)) {
        return Err(DaemonError::UnsuitableDisk {
            disk: twice.clone(),
            reason: "is named twice".to_owned(),
        });
    }
    match &order.vm_state {
        Some(name) if !names.contains(name) => Err(DaemonError::Argument(format!(
            "'vmstate' names '{name}', which is none of 'devices'"
        ))),
        _ => Ok(()),
    }
}

/// Guests of a disk know its length.
fn check_lengths(targets: &[Target], tag: &str) -> Result<(), DaemonError> {
    for target in targets {
        let snapshots = target.image.snapshots().into_iter();
        let mut of_name = snapshots.filter(|snapshot| snapshot.name == tag);
        let then = of_name.next().and_then(|snapshot| snapshot.disk_bytes);
        let now = target.node().limits().length;
        if let Some(then) = then.filter(|then| *then != now) {
            return Err(target.unsuitable(format!(
                "had {then} bytes when snapshot '{tag}' was taken and has {now}; that cannot change \
                 while it is in use"
            )));
        }
    }
    Ok(())
}

fn do_it(order: &Order, targets: &[Target]) -> Result<(), SnapshotError> {
    let disks = targets.iter().map(|target| NamedDisk {
        name: target.name(),
        disk: &target.image,
    });
    let disks: Vec<NamedDisk<'_>> = disks.collect();
    match order.deed {
        // How long the guest has run nobody here knows.
        Deed::Save => vmferry_snapshot::create(&disks, &order.tag, Moment::now(0)),
        Deed::Load => {
            let _replaced = Replaced(targets);
            vmferry_snapshot::apply(&disks, &order.tag)
        }
        Deed::Delete => match vmferry_snapshot::delete(&disks, &order.tag) {
            // To a QEMU that is none of its errors.
            Err(SnapshotError::Nowhere(_)) => Ok(()),
            outcome => outcome,
        },
    }
}

/// The snapshots of an image, as QMP tells them; `None` if there are none.
pub(crate) fn listed(image: &Qcow2Disk) -> Option<Vec<SnapshotInfo>> {
    const NANOSECONDS: u64 = 1_000_000_000;
    let info = |snapshot: Snapshot| SnapshotInfo {
        id: snapshot.id,
        name: snapshot.name,
        vm_state_size: snapshot.vm_state_bytes,
        date_sec: snapshot.date.0.into(),
        date_nsec: snapshot.date.1.into(),
        vm_clock_sec: snapshot.guest_nanoseconds / NANOSECONDS,
        vm_clock_nsec: snapshot.guest_nanoseconds % NANOSECONDS,
        icount: snapshot.icount,
        x_disk_size: snapshot.disk_bytes,
    };
    let all: Vec<SnapshotInfo> = image.snapshots().into_iter().map(info).collect();
    (!all.is_empty()).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_jobs_are_those_of_qemu() {
        for id in ["a", "save-1", "Z_.9"] {
            check_job_id(id).unwrap();
        }
        for id in ["", "1a", "-a", "a b", "a/b", "ä"] {
            let refused = check_job_id(id).unwrap_err().to_string();
            assert_eq!(refused, format!("Invalid job ID '{id}'"));
        }
    }
}
