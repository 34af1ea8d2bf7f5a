//! From what a migration publishes to the events that QMP clients get.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmferry_migration::{Published, State, Status};
use vmferry_qmp::types::{
    Empty, JobStatus, JobStatusChangeEvent, MigrationEvent, MigrationPassEvent, MigrationStatus,
};
use vmferry_qmp::{Broadcast, Event};

use crate::jobs::job_status;

/// Tells all QMP clients what happens. Clones are the same announcer.
#[derive(Clone, Debug)]
pub(crate) struct Announcer {
    broadcast: Broadcast,
    /// The capability `events`.
    migration_events: Arc<AtomicBool>,
}

/// Which way a migration goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Course {
    /// Out of here, as this job.
    Outgoing { job: String },
    /// Into here.
    Incoming,
}

/// What was announced of a migration.
#[derive(Default)]
struct Told {
    state: State,
    pass: u64,
    job: Option<JobStatus>,
    held: bool,
}

impl Announcer {
    pub(crate) fn new(broadcast: Broadcast) -> Self {
        Self {
            broadcast,
            migration_events: Arc::new(AtomicBool::new(true)),
        }
    }

    pub(crate) fn migration_events(&self) -> bool {
        self.migration_events.load(Ordering::Relaxed)
    }

    pub(crate) fn set_migration_events(&self, on: bool) {
        self.migration_events.store(on, Ordering::Relaxed);
    }

    pub(crate) fn publish(&self, event: &Event) {
        self.broadcast.publish(event);
    }

    /// A status whose changes are announced.
    pub(crate) fn watch(&self, course: Course) -> Published {
        let announcer = self.clone();
        let told = Mutex::new(Told::default());
        Published::new(move |status| {
            let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
            for event in told.events(&course, status, announcer.migration_events()) {
                announcer.publish(&event);
            }
        })
    }
}

impl Told {
    /// What is new. Two threads may tell of changes, so an older one can come later: what is over
    /// stays over.
    fn events(&mut self, course: &Course, status: &Status, migration_events: bool) -> Vec<Event> {
        let mut events = Vec::new();
        let was_over = self.state != State::None && self.state.is_over();
        if was_over {
            return events;
        }
        if status.state != self.state {
            self.state = status.state;
            self.guests(course, &mut events);
            if migration_events {
                let status = migration_status(status.state);
                events.push(Event::Migration(MigrationEvent { status }));
            }
        }
        if let Course::Outgoing { job } = course {
            let status = job_status(self.state);
            if self.job != Some(status) {
                self.job = Some(status);
                let id = job.clone();
                events.push(Event::JobStatusChange(JobStatusChangeEvent { id, status }));
            }
        }
        if status.pass > self.pass {
            self.pass = status.pass;
            if migration_events {
                let pass = status.pass;
                events.push(Event::MigrationPass(MigrationPassEvent { pass }));
            }
        }
        events
    }

    /// Guests are held from the switch-over on; they run again where the disks live.
    fn guests(&mut self, course: &Course, events: &mut Vec<Event>) {
        let outgoing = *course != Course::Incoming;
        match self.state {
            State::PreSwitchover | State::Device if outgoing && !self.held => {
                self.held = true;
                events.push(Event::Stop(Empty {}));
            }
            State::Failed | State::Cancelled if self.held => {
                self.held = false;
                events.push(Event::Resume(Empty {}));
            }
            State::Completed if !outgoing => events.push(Event::Resume(Empty {})),
            _ => {}
        }
    }
}

/// The name of a state in QEMU's schema.
pub(crate) fn migration_status(state: State) -> MigrationStatus {
    match state {
        State::None => MigrationStatus::None,
        State::Setup => MigrationStatus::Setup,
        State::Active => MigrationStatus::Active,
        State::PreSwitchover => MigrationStatus::PreSwitchover,
        State::Device => MigrationStatus::Device,
        State::PostcopyActive => MigrationStatus::PostcopyActive,
        State::PostcopyPaused => MigrationStatus::PostcopyPaused,
        State::PostcopyRecover => MigrationStatus::PostcopyRecover,
        State::Completed => MigrationStatus::Completed,
        State::Failed => MigrationStatus::Failed,
        State::Cancelling => MigrationStatus::Cancelling,
        State::Cancelled => MigrationStatus::Cancelled,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(course: &Course, states: &[State], migration_events: bool) -> Vec<String> {
        let mut told = Told::default();
        let mut names = Vec::new();
        for state in states {
            let status = Status {
                state: *state,
                ..Status::default()
            };
            for event in told.events(course, &status, migration_events) {
                names.push(match event {
                    Event::Migration(data) => data.status.to_string(),
                    Event::JobStatusChange(data) => format!("job {}", data.status),
                    other => other.name().to_owned(),
                });
            }
        }
        names
    }

    #[test]
    fn states_have_the_names_of_the_schema() {
        for state in [
            State::None,
            State::Setup,
            State::Active,
            State::PreSwitchover,
            State::Device,
            State::Completed,
            State::Failed,
            State::Cancelling,
            State::Cancelled,
        ] {
            assert_eq!(migration_status(state).as_str(), state.name());
        }
    }

    #[test]
    fn a_source_tells_its_course() {
        let course = Course::Outgoing {
            job: "j".to_owned(),
        };
        let states = [
            State::Setup,
            State::Active,
            State::Active,
            State::PreSwitchover,
            State::Device,
            State::Completed,
        ];
        assert_eq!(
            names(&course, &states, true),
            [
                "setup",
                "job created",
                "active",
                "job running",
                "STOP",
                "pre-switchover",
                "job paused",
                "device",
                "job running",
                "completed",
                "job concluded",
            ]
        );
        let quiet = names(&course, &states, false);
        assert!(!quiet.contains(&"active".to_owned()));
        assert!(
            quiet.contains(&"STOP".to_owned()),
            "guests are no migration"
        );
    }

    #[test]
    fn guests_run_again_after_a_failure_and_at_the_destination() {
        let course = Course::Outgoing {
            job: "j".to_owned(),
        };
        let failed = names(
            &course,
            &[State::Active, State::Device, State::Failed],
            true,
        );
        assert!(failed.contains(&"RESUME".to_owned()));
        let early = names(&course, &[State::Active, State::Cancelled], true);
        assert!(!early.contains(&"RESUME".to_owned()), "never held");
        let arrived = names(&Course::Incoming, &[State::Active, State::Completed], true);
        assert_eq!(arrived, ["active", "RESUME", "completed"]);
    }

    #[test]
    fn what_comes_after_the_end_is_old_news() {
        let course = Course::Incoming;
        let states = [State::Cancelled, State::Cancelling];
        assert_eq!(names(&course, &states, true), ["cancelled"]);
    }
}
