//! Work that goes on after its command has returned: what `query-jobs` and `job-dismiss` are about.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use vmferry_migration::{Published, State, Status};
use vmferry_qmp::types::{JobInfo, JobStatus, JobType};

use crate::error::DaemonError;

/// Jobs that are remembered after their end. Further ones push out the oldest.
pub(crate) const JOBS_MAX: usize = 16;

#[derive(Debug, Default)]
pub(crate) struct Jobs {
    jobs: VecDeque<Job>,
    count: u64,
}

#[derive(Debug)]
struct Job {
    id: String,
    work: Work,
}

#[derive(Debug)]
enum Work {
    Migration(Published),
    Snapshot(Progress),
}

/// How far the work on a snapshot is, for those who ask. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Progress {
    kind: JobType,
    stage: Arc<Mutex<Stage>>,
}

#[derive(Debug)]
struct Stage {
    status: JobStatus,
    error: Option<String>,
}

impl Progress {
    /// Of work that has not begun.
    pub(crate) fn new(kind: JobType) -> Self {
        let (status, error) = (JobStatus::Created, None);
        Self {
            kind,
            stage: Arc::new(Mutex::new(Stage { status, error })),
        }
    }

    pub(crate) fn set(&self, status: JobStatus) {
        self.lock().status = status;
    }

    /// It was for nothing.
    pub(crate) fn fail(&self, error: String) {
        self.lock().error = Some(error);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Jobs {
    /// A name for the next migration.
    pub(crate) fn next_id(&mut self) -> String {
        loop {
            self.count += 1;
            let id = format!("migrate-{}", self.count);
            if !self.has(&id) {
                return id;
            }
        }
    }

    pub(crate) fn has(&self, id: &str) -> bool {
        self.jobs.iter().any(|job| job.id == id)
    }

    /// A migration has been started.
    pub(crate) fn add(&mut self, id: String, published: Published) {
        self.push(id, Work::Migration(published));
    }

    /// Work on a snapshot has been started.
    pub(crate) fn add_snapshot(&mut self, id: String, progress: Progress) {
        self.push(id, Work::Snapshot(progress));
    }

    /// At most two are not over: a migration, and work on a snapshot.
    fn push(&mut self, id: String, work: Work) {
        if self.jobs.len() >= JOBS_MAX
            && let Some(oldest) = self.jobs.iter().position(Job::is_over)
        {
            self.jobs.remove(oldest);
        }
        self.jobs.push_back(Job { id, work });
    }

    pub(crate) fn list(&self) -> Vec<JobInfo> {
        self.jobs.iter().map(Job::info).collect()
    }

    /// Forget a job that is over.
    pub(crate) fn dismiss(&mut self, id: &str) -> Result<(), DaemonError> {
        let Some(index) = self.jobs.iter().position(|job| job.id == id) else {
            return Err(DaemonError::Argument("Job not found".to_owned()));
        };
        let status = self.jobs[index].info().status;
        if status != JobStatus::Concluded {
            return Err(DaemonError::NotNow(format!(
                "Job '{id}' in state '{status}' cannot accept command verb 'dismiss'"
            )));
        }
        self.jobs.remove(index);
        Ok(())
    }
}

impl Job {
    fn is_over(&self) -> bool {
        self.info().status == JobStatus::Concluded
    }

    fn info(&self) -> JobInfo {
        let id = self.id.clone();
        match &self.work {
            Work::Migration(published) => {
                let status = published.get();
                JobInfo {
                    id,
                    kind: JobType::Migrate,
                    status: job_status(status.state),
                    current_progress: status.total_bytes.saturating_sub(status.remaining_bytes),
                    total_progress: status.total_bytes,
                    error: job_error(&status),
                }
            }
            Work::Snapshot(progress) => {
                let stage = progress.lock();
                let begun = !matches!(stage.status, JobStatus::Created | JobStatus::Running);
                JobInfo {
                    id,
                    kind: progress.kind,
                    status: stage.status,
                    // One step, as in QEMU.
                    current_progress: u64::from(begun),
                    total_progress: 1,
                    error: stage.error.clone(),
                }
            }
        }
    }
}

fn job_error(status: &Status) -> Option<String> {
    match status.state {
        State::Cancelled => Some("cancelled".to_owned()),
        _ => status.error.clone(),
    }
}

/// How far a job is whose migration is here.
pub(crate) fn job_status(state: State) -> JobStatus {
    match state {
        State::None | State::Setup => JobStatus::Created,
        State::Active | State::Device | State::PostcopyActive | State::PostcopyRecover => {
            JobStatus::Running
        }
        State::PreSwitchover | State::PostcopyPaused => JobStatus::Paused,
        State::Cancelling => JobStatus::Aborting,
        State::Completed | State::Failed | State::Cancelled => JobStatus::Concluded,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn published(state: State) -> Published {
        let published = Published::default();
        published.update(|status| status.state = state);
        published
    }

    #[test]
    fn only_jobs_that_are_over_can_be_dismissed() {
        let mut jobs = Jobs::default();
        let running = jobs.next_id();
        jobs.add(running.clone(), published(State::Active));
        let over = jobs.next_id();
        jobs.add(over.clone(), published(State::Cancelled));
        let error = jobs.dismiss(&running).unwrap_err().to_string();
        assert!(error.contains("state 'running'"), "{error}");
        assert_eq!(jobs.list()[1].error.as_deref(), Some("cancelled"));
        jobs.dismiss(&over).unwrap();
        assert_eq!(
            jobs.dismiss(&over).unwrap_err().to_string(),
            "Job not found"
        );
        assert_eq!(jobs.list().len(), 1);
    }

    #[test]
    fn the_oldest_jobs_that_are_over_are_forgotten() {
        let mut jobs = Jobs::default();
        let at_work = Progress::new(JobType::SnapshotSave);
        jobs.add_snapshot("at-work".to_owned(), at_work.clone());
        for _ in 0..=JOBS_MAX {
            let id = jobs.next_id();
            jobs.add(id, published(State::Failed));
        }
        let list = jobs.list();
        assert_eq!(list.len(), JOBS_MAX);
        assert_eq!(list[0].id, "at-work");
        assert_eq!(list[1].id, "migrate-3");
        at_work.set(JobStatus::Concluded);
        jobs.add("last".to_owned(), published(State::Failed));
        assert_eq!(jobs.list()[0].id, "migrate-3");
    }

    #[test]
    fn a_migration_is_not_called_like_somebody_elses_job() {
        let mut jobs = Jobs::default();
        jobs.add_snapshot(
            "migrate-1".to_owned(),
            Progress::new(JobType::SnapshotDelete),
        );
        assert_eq!(jobs.next_id(), "migrate-2");
    }
}
