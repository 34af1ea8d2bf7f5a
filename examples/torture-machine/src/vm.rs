//! The machine and what its operator wants of it: run states, jobs, and a command for each wish.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::process;
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vmferry_migration::Decision;
use vmferry_savevm::{Footers, LoadMachine, save_device_state};

use crate::control::Events;
use crate::gate::lock;
use crate::machine::Machine;
use crate::migrate::{Incoming, Outgoing, Settings};

/// Longest device state that is loaded from a file.
const DEVICE_STATE_BYTES_MAX: u64 = 64 << 20;

pub(crate) struct Vm {
    pub(crate) machine: Machine,
    pub(crate) events: Events,
    /// Does a guest that comes in run at once?
    pub(crate) autostart: bool,
    pub(crate) place: Mutex<Place>,
    pub(crate) settings: Mutex<Settings>,
    pub(crate) outgoing: Outgoing,
    pub(crate) incoming: Incoming,
    jobs: Mutex<Vec<Job>>,
}

/// Where the guest is. Only one that is here may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Here,
    /// It is expected, or coming.
    Coming,
    /// A migration has stopped it: it may live elsewhere.
    Leaving,
}

struct Job {
    id: String,
    kind: &'static str,
    /// `None` while it runs.
    outcome: Option<Result<()>>,
}

impl Vm {
    pub(crate) fn new(machine: Machine, place: Place, autostart: bool) -> Arc<Self> {
        Arc::new(Self {
            machine,
            events: Events::default(),
            autostart,
            place: Mutex::new(place),
            settings: Mutex::default(),
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            jobs: Mutex::default(),
        })
    }

    pub(crate) fn execute(self: &Arc<Self>, command: &str, arguments: &Value) -> Result<Value> {
        let text = |name: &str| {
            arguments[name]
                .as_str()
                .with_context(|| format!("Parameter '{name}' is missing"))
        };
        match command {
            "query-status" => return Ok(self.status()),
            "query-jobs" => return Ok(self.jobs()),
            "query-migrate" => return Ok(self.migration()),
            "query-snapshots" => return self.snapshots(),
            "x-check" => return self.check(),
            "stop" => self.stop(),
            "cont" => self.cont()?,
            "migrate" => self.migrate(text("uri")?, arguments["resume"] == true)?,
            "migrate_cancel" => self.outgoing.with(|it| Ok(it.cancel()?))?,
            "migrate-continue" => self.outgoing.with(|it| Ok(it.go_on()?))?,
            "migrate-start-postcopy" => self.outgoing.with(|it| Ok(it.start_postcopy()?))?,
            "migrate-pause" => self.pause_migration()?,
            "x-resolve" => self.resolve(match text("decision")? {
                "serve" => Decision::Serve,
                "give-up" => Decision::GiveUp,
                other => bail!("'{other}' is no decision"),
            })?,
            "migrate-incoming" => self.expect(text("uri")?)?,
            "migrate-recover" => self.recover(text("uri")?)?,
            "migrate-set-capabilities" => lock(&self.settings).set_capabilities(arguments)?,
            "migrate-set-parameters" => self.set_parameters(arguments)?,
            "snapshot-save" => self.snapshot("snapshot-save", arguments, Machine::snapshot_save)?,
            "snapshot-load" => self.snapshot("snapshot-load", arguments, Machine::snapshot_load)?,
            "snapshot-delete" => {
                self.snapshot("snapshot-delete", arguments, Machine::snapshot_delete)?;
            }
            "job-dismiss" => self.dismiss(text("id")?)?,
            "xen-save-devices-state" => self.save_devices(text("filename")?)?,
            "xen-load-devices-state" => self.load_devices(text("filename")?)?,
            "quit" => process::exit(0),
            _ => bail!("The command {command} has not been found"),
        }
        Ok(json!({}))
    }

    fn status(&self) -> Value {
        let running = self.machine.is_running();
        let status = match *lock(&self.place) {
            Place::Coming => "inmigrate",
            _ if running => "running",
            Place::Here => "paused",
            Place::Leaving if self.outgoing.is_over() => "postmigrate",
            Place::Leaving => "finish-migrate",
        };
        json!({"running": running, "status": status, "x-steps": self.machine.steps()})
    }

    pub(crate) fn stop(&self) {
        if self.machine.is_running() {
            self.machine.stop();
            self.events.publish("STOP", &json!({}));
        }
    }

    pub(crate) fn run(&self) {
        if self.machine.run() {
            self.events.publish("RESUME", &json!({}));
        }
    }

    fn cont(&self) -> Result<()> {
        match *lock(&self.place) {
            Place::Here => self.run(),
            Place::Coming => bail!("the guest has not come yet"),
            Place::Leaving => bail!("the guest may run elsewhere"),
        }
        Ok(())
    }

    /// Only a guest that is here, and of which nothing is missing, may be saved or changed.
    pub(crate) fn must_be_here(&self) -> Result<()> {
        if *lock(&self.place) != Place::Here || !self.incoming.is_over() {
            bail!("the guest is not here, or not all of it");
        }
        Ok(())
    }

    /// For tests: what the machine holds.
    fn check(&self) -> Result<Value> {
        if self.machine.is_running() {
            bail!("the guest runs");
        }
        let digests = self.machine.digests()?.into_iter();
        Ok(digests
            .map(|(name, digest)| (name, json!(format!("{digest:016x}"))))
            .collect())
    }

    fn snapshot(
        self: &Arc<Self>,
        kind: &'static str,
        arguments: &Value,
        work: fn(&Machine, &str) -> Result<()>,
    ) -> Result<()> {
        let id = arguments["job-id"]
            .as_str()
            .context("Parameter 'job-id' is missing")?
            .to_owned();
        let tag = arguments["tag"]
            .as_str()
            .context("Parameter 'tag' is missing")?
            .to_owned();
        self.must_be_here()?;
        let mut jobs = lock(&self.jobs);
        if jobs.iter().any(|job| job.id == id) {
            bail!("Job ID '{id}' already in use");
        }
        jobs.push(Job {
            id: id.clone(),
            kind,
            outcome: None,
        });
        drop(jobs);
        self.tell_of_job(&id, "running");
        let vm = Arc::clone(self);
        thread::Builder::new().name(kind.into()).spawn(move || {
            let outcome = work(&vm.machine, &tag);
            if let Some(job) = lock(&vm.jobs).iter_mut().find(|job| job.id == id) {
                job.outcome = Some(outcome);
            }
            vm.tell_of_job(&id, "concluded");
        })?;
        Ok(())
    }

    fn tell_of_job(&self, id: &str, status: &str) {
        self.events
            .publish("JOB_STATUS_CHANGE", &json!({"id": id, "status": status}));
    }

    fn jobs(&self) -> Value {
        let show = |job: &Job| {
            let mut shown = json!({"id": job.id, "type": job.kind, "status": "running"});
            if let Some(outcome) = &job.outcome {
                shown["status"] = json!("concluded");
                if let Err(error) = outcome {
                    shown["error"] = json!(format!("{error:#}"));
                }
            }
            shown
        };
        lock(&self.jobs).iter().map(show).collect()
    }

    fn dismiss(&self, id: &str) -> Result<()> {
        let mut jobs = lock(&self.jobs);
        let found = jobs
            .iter()
            .position(|job| job.id == id && job.outcome.is_some());
        jobs.remove(found.context("there is no such job, or it runs")?);
        Ok(())
    }

    fn snapshots(&self) -> Result<Value> {
        let whole = self.machine.snapshots()?.whole.into_iter();
        Ok(whole
            .map(|it| json!({"name": it.name, "vm-state-size": it.vm_state_bytes}))
            .collect())
    }

    /// The devices alone, for those who move memory in another way. The guest goes on afterwards.
    fn save_devices(&self, path: &str) -> Result<()> {
        self.must_be_here()?;
        let ran = self.machine.is_running();
        let stopped = self.machine.stop();
        let mut state = Vec::new();
        let saved = save_device_state(true, &stopped, &mut self.machine.registry()?, &mut state);
        if ran {
            self.machine.run();
        }
        saved?;
        let mut options = fs::File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o660)
            .open(path)?;
        Ok(std::io::Write::write_all(&mut { file }, &state)?)
    }

    fn load_devices(&self, path: &str) -> Result<()> {
        if self.machine.is_running() {
            bail!("the guest runs");
        }
        if fs::metadata(path)?.len() > DEVICE_STATE_BYTES_MAX {
            bail!("{path} has more than {DEVICE_STATE_BYTES_MAX} bytes");
        }
        let stopped = self.machine.stop();
        let mut loading = LoadMachine::of_device_state(Footers::Present, &stopped);
        loading.load_slice(&fs::read(path)?, &mut self.machine.registry()?)?;
        Ok(())
    }
}
