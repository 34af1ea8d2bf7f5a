//! Outgoing migrations as jobs: what `query-jobs` and `job-dismiss` are about.

use std::collections::VecDeque;

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
    published: Published,
}

impl Jobs {
    /// A name for the next job.
    pub(crate) fn next_id(&mut self) -> String {
        self.count += 1;
        format!("migrate-{}", self.count)
    }

    /// A job has been started. It is the only one that is not over.
    pub(crate) fn add(&mut self, id: String, published: Published) {
        if self.jobs.len() == JOBS_MAX {
            self.jobs.pop_front();
        }
        self.jobs.push_back(Job { id, published });
    }

    pub(crate) fn list(&self) -> Vec<JobInfo> {
        self.jobs.iter().map(Job::info).collect()
    }

    /// Forget a job that is over.
    pub(crate) fn dismiss(&mut self, id: &str) -> Result<(), DaemonError> {
        let Some(index) = self.jobs.iter().position(|job| job.id == id) else {
            return Err(DaemonError::Argument("Job not found".to_owned()));
        };
        let status = job_status(self.jobs[index].published.get().state);
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
    fn info(&self) -> JobInfo {
        let status = self.published.get();
        JobInfo {
            id: self.id.clone(),
            kind: JobType::Migrate,
            status: job_status(status.state),
            current_progress: status.total_bytes.saturating_sub(status.remaining_bytes),
            total_progress: status.total_bytes,
            error: job_error(&status),
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
        State::Active | State::Device => JobStatus::Running,
        State::PreSwitchover => JobStatus::Paused,
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
    fn the_oldest_jobs_are_forgotten() {
        let mut jobs = Jobs::default();
        for _ in 0..=JOBS_MAX {
            let id = jobs.next_id();
            jobs.add(id, published(State::Failed));
        }
        let list = jobs.list();
        assert_eq!(list.len(), JOBS_MAX);
        assert_eq!(list[0].id, "migrate-2");
    }
}
