//! A running daemon, as the commands that control it see it.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use vmferry_channel::{Stop, Uri};
use vmferry_qmp::types::{
    JobInfo, MigrateSetCapabilities, MigrationCapability, MigrationCapabilityStatus, MigrationInfo,
    MigrationParameters, MigrationStatus,
};
use vmferry_qmp::{Client, ClientError, ServerEvent};

use crate::exit::{Exit, Failure};
use crate::flags::LimitFlags;
use crate::flags::rate::Rate;

/// How long to wait for the end of what a daemon had to say.
const LAST_PATIENCE: Duration = Duration::from_secs(1);

/// A control connection.
pub(crate) struct Daemon {
    client: Client,
}

impl Daemon {
    pub(crate) fn connect(address: &Uri) -> Result<Self, Failure> {
        let stop = Stop::new()?;
        let client = Client::connect(address, &stop).map_err(|error| {
            Failure::new(Exit::Failed, format!("cannot reach the daemon: {error}"))
                .hint("is it running, with --qmp and this address?")
        })?;
        Ok(Self { client })
    }

    /// How the migration stands.
    pub(crate) fn migration(&mut self) -> Result<MigrationInfo, Failure> {
        parsed(self.migration_object()?)
    }

    /// The same, as it was said.
    pub(crate) fn migration_object(&mut self) -> Result<Value, Failure> {
        self.execute("query-migrate", &json!({}))
            .map_err(Into::into)
    }

    /// The status that was announced last before the connection was lost.
    pub(crate) fn last_announced(&mut self) -> Option<MigrationStatus> {
        let mut last = None;
        // What was sent before the end can still be read.
        while let Ok(Some(event)) = self.client.wait_event(Some(Instant::now() + LAST_PATIENCE)) {
            if event.name == "MIGRATION" {
                last = event.data.get("status").cloned();
            }
        }
        serde_json::from_value(last?).ok()
    }

    /// Set what was given.
    pub(crate) fn set_limits(&mut self, limits: &LimitFlags) -> Result<(), Failure> {
        let parameters = MigrationParameters {
            max_bandwidth: limits.bandwidth.map(Rate::max_bandwidth),
            downtime_limit: limits.downtime.map(|downtime| downtime.0),
            ..MigrationParameters::default()
        };
        if parameters == MigrationParameters::default() {
            return Ok(());
        }
        self.execute("migrate-set-parameters", &parameters)?;
        Ok(())
    }

    /// Switch one feature.
    pub(crate) fn set_capability(
        &mut self,
        capability: MigrationCapability,
        state: bool,
    ) -> Result<(), Failure> {
        let arguments = MigrateSetCapabilities {
            capabilities: vec![MigrationCapabilityStatus { capability, state }],
        };
        self.execute("migrate-set-capabilities", &arguments)?;
        Ok(())
    }

    /// Hand a descriptor over under a name.
    pub(crate) fn getfd(
        &mut self,
        name: &str,
        fd: std::os::fd::BorrowedFd<'_>,
    ) -> Result<(), Refusal> {
        self.client.getfd(name, fd).map_err(Refusal::from)
    }

    /// Run a job to its end, and have it forgotten; why it failed, if it did.
    pub(crate) fn run_job(
        &mut self,
        command: &str,
        id: &str,
        arguments: &impl Serialize,
    ) -> Result<Option<String>, Failure> {
        self.execute(command, arguments)?;
        let is_over = |event: &ServerEvent| {
            let data = &event.data;
            event.name == "JOB_STATUS_CHANGE"
                && data.get("id").is_some_and(|it| it == id)
                && data.get("status").is_some_and(|it| it == "concluded")
        };
        // Without a deadline there is an event, or the connection is lost.
        while let Some(event) = self.client.wait_event(None).map_err(Refusal::from)? {
            if is_over(&event) {
                break;
            }
        }
        let jobs: Vec<JobInfo> = parsed(self.execute("query-jobs", &json!({}))?)?;
        let Some(job) = jobs.into_iter().find(|job| job.id == id) else {
            let message = format!("the daemon has forgotten job '{id}': nobody knows how it ended");
            return Err(Failure::new(Exit::Failed, message));
        };
        self.execute("job-dismiss", &json!({ "id": id }))?;
        Ok(job.error)
    }

    pub(crate) fn execute(
        &mut self,
        command: &str,
        arguments: &impl Serialize,
    ) -> Result<Value, Refusal> {
        let arguments = serde_json::to_value(arguments)
            .map_err(|error| Refusal::Lost(format!("{command}: {error}")))?;
        self.client
            .execute(command, arguments)
            .map_err(Refusal::from)
    }
}

/// Why a command was not carried out.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The daemon said no, and why.
    Refused(String),
    /// The connection is gone: nobody knows.
    Lost(String),
}

impl From<ClientError> for Refusal {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused { description, .. } => Self::Refused(description),
            lost => Self::Lost(lost.to_string()),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Refused(why) => Self::refused(why),
            Refusal::Lost(why) => Self::new(Exit::Failed, format!("lost the daemon: {why}")),
        }
    }
}

pub(crate) fn parsed<T: DeserializeOwned>(value: Value) -> Result<T, Failure> {
    serde_json::from_value(value).map_err(|error| {
        Failure::new(
            Exit::Failed,
            format!("the daemon's answer is not understood: {error}"),
        )
    })
}
