//! QMP commands, each handed to the part that knows.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use vmferry_qmp::types::{Empty, KvmInfo, NameInfo, Resolution, ShutdownCause};
use vmferry_qmp::{ClientContext, Command, CommandError, Event, Handler};

use crate::error::DaemonError;
use crate::hub::Hub;
use crate::incoming::IncomingState;
use crate::snapshots::{Deed, Order};

/// Carries out the commands of all clients.
pub(crate) struct Commands {
    hub: Arc<Hub>,
}

impl Commands {
    pub(crate) fn new(hub: Arc<Hub>) -> Self {
        Self { hub }
    }
}

impl Handler for Commands {
    fn execute(&self, client: &ClientContext, command: Command) -> Result<Value, CommandError> {
        let answer = match command {
            Command::Getfd(name) => done(client.getfd(&name.fdname).map_err(Into::into)),
            Command::Closefd(name) => {
                done(client.take_fd(&name.fdname).map(drop).map_err(Into::into))
            }
            Command::Migrate(arguments) => done(self.hub.migrate(client, &arguments)),
            Command::MigrateCancel(_) => done(self.hub.migrate_cancel()),
            Command::MigrateIncoming(arguments) => done(self.hub.migrate_incoming(&arguments.uri)),
            Command::MigrateContinue(arguments) => done(self.hub.migrate_continue(arguments.state)),
            Command::MigrateSetParameters(new) => done(self.hub.set_parameters(&new)),
            Command::MigrateSetCapabilities(new) => {
                done(self.hub.set_capabilities(&new.capabilities))
            }
            Command::AnnounceSelf(arguments) => done(self.hub.announce_self(arguments)),
            Command::Resolve(arguments) => done(self.hub.x_resolve(arguments.decision)),
            Command::Stop(_) => done(self.hub.stop()),
            Command::Cont(_) => done(self.hub.cont()),
            Command::SnapshotSave(arguments) => done(self.hub.snapshot(Order {
                deed: Deed::Save,
                job: arguments.job_id,
                tag: arguments.tag,
                vm_state: Some(arguments.vmstate),
                disks: arguments.devices,
            })),
            Command::SnapshotLoad(arguments) => done(self.hub.snapshot(Order {
                deed: Deed::Load,
                job: arguments.job_id,
                tag: arguments.tag,
                vm_state: Some(arguments.vmstate),
                disks: arguments.devices,
            })),
            Command::SnapshotDelete(arguments) => done(self.hub.snapshot(Order {
                deed: Deed::Delete,
                job: arguments.job_id,
                tag: arguments.tag,
                vm_state: None,
                disks: arguments.devices,
            })),
            Command::JobDismiss(job) => done(self.hub.dismiss_job(&job.id)),
            Command::Quit(_) => {
                self.hub.ending.ask(ShutdownCause::HostQmpQuit);
                done(Ok(()))
            }
            Command::QueryMigrate(_) => answer(self.hub.migration_info()),
            Command::QueryMigrateParameters(_) => answer(self.hub.parameters()),
            Command::QueryMigrateCapabilities(_) => answer(self.hub.capabilities()),
            Command::QueryStatus(_) => answer(self.hub.status_info()),
            Command::QueryBlock(_) => answer(self.hub.block_info()),
            // There are no backing images, so the list is flat anyway.
            Command::QueryNamedBlockNodes(_) => answer(self.hub.node_info()),
            Command::QueryBlockExports(_) => answer(self.hub.export_info()),
            Command::QueryJobs(_) => answer(self.hub.state().jobs.list()),
            Command::QueryName(_) => answer(NameInfo {
                name: self.hub.name.clone(),
            }),
            Command::QueryKvm(_) => answer(KvmInfo::default()),
        };
        answer.map_err(CommandError::from)
    }
}

fn done(outcome: Result<(), DaemonError>) -> Result<Value, DaemonError> {
    outcome.map(|()| json!({}))
}

fn answer(value: impl Serialize) -> Result<Value, DaemonError> {
    Ok(serde_json::to_value(value)?)
}

impl Hub {
    fn stop(&self) -> Result<(), DaemonError> {
        if self.stop_guests()? {
            self.announcer.publish(&Event::Stop(Empty {}));
        }
        Ok(())
    }

    /// Guests run again: after `stop`, or because somebody knows that the disks live here.
    fn cont(&self) -> Result<(), DaemonError> {
        let stopped = {
            let mut state = self.state();
            match &state.snapshot {
                // It has some of what `stop` holds.
                Some(at_work) if state.stopped.is_some() => {
                    return Err(DaemonError::NotNow(at_work.why_busy()));
                }
                _ => state.stopped.take(),
            }
        };
        if stopped.is_some() {
            drop(stopped);
            self.announcer.publish(&Event::Resume(Empty {}));
            return Ok(());
        }
        if self.resolve(Resolution::Serve)? {
            return Ok(());
        }
        let expecting = {
            let state = self.state();
            state.incoming.as_ref().and_then(IncomingState::why_busy)
        };
        match expecting {
            Some(reason) => Err(DaemonError::NotNow(reason)),
            None if !self.disks.iter().any(crate::config::Disk::is_here) => {
                Err(DaemonError::NotNow("the disks have moved away".to_owned()))
            }
            None => Ok(()),
        }
    }

    fn x_resolve(&self, decision: Resolution) -> Result<(), DaemonError> {
        match self.resolve(decision)? {
            true => Ok(()),
            false => Err(vmferry_migration::RequestError::NotUndecided.into()),
        }
    }
}
