//! Migrations: what `vmferry_migration` is given, and how it stops the guest and lets it go on.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vmferry_channel::{Listener, Stop, Uri, open_incoming};
use vmferry_migration::{
    Capabilities, Coverage, Decision, DestinationDisk, DestinationJob, DestinationMachine, Guest,
    Parameters, Published, Reconnections, RunningSource, SourceDisk, SourceJob, SourceMachine,
    SourceMemory, State, Status, Target, receive_machine,
};
use vmferry_ram::{
    RamDestinationOptions, RamSourceOptions, Throttle, UserfaultLog, check_postcopy,
};
use vmferry_savevm::{Describe, HandlerError, Opening};
use vmferry_vmstate::Dialect;

use crate::gate::lock;
use crate::machine::Machine;
use crate::vm::{Place, Vm};

/// What the operator has set, for migrations in both directions.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// With the disks; without, both sides use the same ones.
    block: bool,
    postcopy: bool,
    xbzrle: bool,
    auto_converge: bool,
    capabilities: Capabilities,
    parameters: Parameters,
}

const XBZRLE_CACHE_BYTES: u64 = 64 << 20;

impl Default for Settings {
    fn default() -> Self {
        Self {
            block: true,
            postcopy: false,
            xbzrle: false,
            auto_converge: false,
            capabilities: Capabilities::default(),
            parameters: Parameters::default(),
        }
    }
}

impl Settings {
    pub(crate) fn set_capabilities(&mut self, arguments: &Value) -> Result<()> {
        for change in arguments["capabilities"]
            .as_array()
            .context("no list of capabilities")?
        {
            let name = change["capability"].as_str().unwrap_or_default();
            let place = match name {
                "block" => &mut self.block,
                "postcopy-ram" => &mut self.postcopy,
                "xbzrle" => &mut self.xbzrle,
                "auto-converge" => &mut self.auto_converge,
                "return-path" => &mut self.capabilities.return_path,
                "zero-blocks" => &mut self.capabilities.zero_blocks,
                "pause-before-switchover" => &mut self.capabilities.pause_before_switchover,
                _ => bail!("there is no capability '{name}' here"),
            };
            *place = change["state"] == true;
        }
        Ok(())
    }
}

/// The migration out of here, if there is or was one.
#[derive(Default)]
pub(crate) struct Outgoing(Mutex<Option<RunningSource>>);

impl Outgoing {
    pub(crate) fn with<T>(&self, work: impl FnOnce(&RunningSource) -> Result<T>) -> Result<T> {
        work(lock(&self.0).as_ref().context("there is no migration")?)
    }

    pub(crate) fn is_over(&self) -> bool {
        let state = self.with(|it| Ok(it.published().get().state));
        state.is_ok_and(State::is_over)
    }
}

/// The migration into here, if there is or was one.
#[derive(Default)]
pub(crate) struct Incoming {
    attempt: Mutex<Option<Attempt>>,
    reconnections: Reconnections,
}

#[derive(Clone)]
struct Attempt {
    published: Published,
    stop: Stop,
}

impl Incoming {
    pub(crate) fn is_over(&self) -> bool {
        self.status().is_none_or(|status| status.state.is_over())
    }

    fn status(&self) -> Option<Status> {
        lock(&self.attempt)
            .as_ref()
            .map(|attempt| attempt.published.get())
    }
}

/// How a migration out of here stops the guest, and lets it go on if it comes to nothing.
struct Leaving {
    vm: Arc<Vm>,
    ran: bool,
}

impl Guest for Leaving {
    fn stop(&mut self) -> Result<(), HandlerError> {
        *lock(&self.vm.place) = Place::Leaving;
        self.ran = self.vm.machine.is_running();
        self.vm.stop();
        Ok(())
    }

    fn run(&mut self) {
        *lock(&self.vm.place) = Place::Here;
        if self.ran {
            self.vm.run();
        }
    }
}

/// How a migration into here lets the guest run.
struct Arriving(Arc<Vm>);

impl Guest for Arriving {
    fn stop(&mut self) -> Result<(), HandlerError> {
        self.0.stop();
        Ok(())
    }

    fn run(&mut self) {
        *lock(&self.0.place) = Place::Here;
        if let Err(error) = self.0.machine.announce() {
            tracing::warn!(%error, "the guest cannot be announced");
        }
        if self.0.autostart {
            self.0.run();
        }
    }
}

struct CpuThrottle(Arc<Vm>);

impl Throttle for CpuThrottle {
    fn set(&mut self, percent: u8) {
        self.0.machine.throttle(percent);
    }
}

impl Vm {
    pub(crate) fn migrate(self: &Arc<Self>, uri: &str, resume: bool) -> Result<()> {
        let target = Target::Uri(uri.parse()?);
        let stop = Stop::new()?;
        if resume {
            return self.outgoing.with(|it| Ok(it.resume(target, stop)?));
        }
        self.must_be_here()?;
        let mut outgoing = lock(&self.outgoing.0);
        if outgoing
            .as_ref()
            .is_some_and(|it| !it.published().get().state.is_over())
        {
            bail!("There's a migration process in progress");
        }
        let settings = lock(&self.settings).clone();
        let disks = self.machine.drives.iter().filter(|_| settings.block);
        let job = SourceJob {
            disks: disks
                .map(|drive| SourceDisk {
                    node: Arc::clone(&drive.node),
                    record: None,
                })
                .collect(),
            target,
            parameters: settings.parameters,
            capabilities: settings.capabilities,
            stop,
        };
        let machine = self.source_machine(&settings)?;
        *outgoing = Some(RunningSource::start_machine(
            job,
            machine,
            self.published(),
        )?);
        Ok(())
    }

    fn source_machine(self: &Arc<Self>, settings: &Settings) -> Result<SourceMachine> {
        let throttle = || Box::new(CpuThrottle(Arc::clone(self))) as Box<dyn Throttle>;
        Ok(SourceMachine {
            opening: Opening {
                machine: Machine::machine_type(),
                describe: Describe::As(Dialect::Qemu10),
                ..Opening::default()
            },
            memory: SourceMemory::Live {
                ram: self.machine.memory.ram(),
                dirty_log: Box::new(UserfaultLog::new()?),
                cpu_throttle: settings.auto_converge.then(throttle),
            },
            ram_options: RamSourceOptions {
                postcopy: settings.postcopy,
                xbzrle_cache_bytes: settings.xbzrle.then_some(XBZRLE_CACHE_BYTES),
                ..RamSourceOptions::default()
            },
            devices: self.machine.devices(),
            guest: Box::new(Leaving {
                vm: Arc::clone(self),
                ran: false,
            }),
        })
    }

    /// Tells clients of each step.
    fn published(&self) -> Published {
        let events = self.events.clone();
        Published::new(move |status| {
            events.publish("MIGRATION", &json!({"status": status.state.name()}));
        })
    }

    pub(crate) fn set_parameters(&self, arguments: &Value) -> Result<()> {
        let number = |name: &str| arguments[name].as_u64();
        let mut settings = lock(&self.settings);
        if let Some(bytes) = number("max-bandwidth") {
            settings.parameters.max_bandwidth = (bytes != 0).then_some(bytes);
        }
        if let Some(milliseconds) = number("downtime-limit") {
            settings.parameters.downtime_limit = Duration::from_millis(milliseconds);
        }
        if let Some(running) = &*lock(&self.outgoing.0) {
            running.set(settings.parameters);
        }
        Ok(())
    }

    /// Break a postcopy off, so that it can go on over another connection.
    pub(crate) fn pause_migration(&self) -> Result<()> {
        match lock(&self.incoming.attempt).as_ref() {
            Some(attempt) if attempt.published.get().state == State::PostcopyActive => {
                attempt.stop.trigger();
                Ok(())
            }
            _ => self.outgoing.with(|it| Ok(it.pause()?)),
        }
    }

    /// Somebody knows that the guest does not run elsewhere, or that it does.
    pub(crate) fn resolve(&self, decision: Decision) -> Result<()> {
        self.outgoing.with(|it| Ok(it.decide(decision)?))
    }

    /// Wait for a migration, again if one comes to nothing.
    pub(crate) fn expect(self: &Arc<Self>, uri: &str) -> Result<()> {
        if *lock(&self.place) != Place::Coming || self.incoming.status().is_some() {
            bail!("no guest is awaited, or one is already");
        }
        let settings = lock(&self.settings).clone();
        if settings.postcopy {
            check_postcopy(&*self.machine.memory.ram())?;
        }
        let vm = Arc::clone(self);
        let uri: Uri = uri.parse()?;
        let listener = uri
            .is_socket_address()
            .then(|| Listener::bind(&uri))
            .transpose()?;
        thread::Builder::new()
            .name("incoming".into())
            .spawn(move || {
                while let Err(error) = vm.receive(&uri, listener.as_ref(), &settings) {
                    tracing::error!("incoming migration: {error:#}");
                    if listener.is_none() || !vm.incoming.is_over() {
                        break;
                    }
                }
            })?;
        Ok(())
    }

    fn receive(
        self: &Arc<Self>,
        uri: &Uri,
        listener: Option<&Listener>,
        settings: &Settings,
    ) -> Result<()> {
        let attempt = Attempt {
            published: self.published(),
            stop: Stop::new()?,
        };
        let channel = match listener {
            Some(listener) => listener.accept(&attempt.stop)?.into_channel(&attempt.stop),
            None => open_incoming(uri, &attempt.stop)?,
        };
        *lock(&self.incoming.attempt) = Some(attempt.clone());
        let disks = self.machine.drives.iter().filter(|_| settings.block);
        let job = DestinationJob {
            disks: disks
                .map(|drive| DestinationDisk {
                    node: Arc::clone(&drive.node),
                    record: None,
                })
                .collect(),
            coverage: Coverage::Whole,
            rest: None,
            any_machine: false,
            keep_records: false,
        };
        let machine = DestinationMachine {
            machine: Machine::machine_type(),
            ram: self.machine.memory.ram(),
            ram_options: RamDestinationOptions {
                postcopy: settings.postcopy,
                ..RamDestinationOptions::default()
            },
            devices: self.machine.devices(),
            guest: Box::new(Arriving(Arc::clone(self))),
        };
        receive_machine(
            channel,
            job,
            machine,
            &self.incoming.reconnections,
            &attempt.published,
        )?;
        Ok(())
    }

    /// Another connection for a postcopy that was interrupted.
    pub(crate) fn recover(self: &Arc<Self>, uri: &str) -> Result<()> {
        let listener = Listener::bind(&uri.parse()?)?;
        let vm = Arc::clone(self);
        thread::Builder::new()
            .name("recover".into())
            .spawn(move || {
                if let Err(error) = vm.reconnect(&listener) {
                    tracing::error!("recovery: {error:#}");
                }
            })?;
        Ok(())
    }

    fn reconnect(&self, listener: &Listener) -> Result<()> {
        let stop = Stop::new()?;
        let channel = listener.accept(&stop)?.into_channel(&stop);
        self.incoming.reconnections.offer(channel)?;
        if let Some(attempt) = &mut *lock(&self.incoming.attempt) {
            attempt.stop = stop;
        }
        Ok(())
    }

    /// What is known of the migration, into here or out of here.
    pub(crate) fn migration(&self) -> Value {
        let outgoing = self.outgoing.with(|it| Ok(it.published().get())).ok();
        let Some(status) = outgoing.or_else(|| self.incoming.status()) else {
            return json!({});
        };
        let mut shown = json!({"status": status.state.name(), "x-undecided": status.undecided});
        if let Some(error) = status.error {
            shown["error-desc"] = json!(error);
        }
        if let Some(downtime) = status.downtime {
            shown["downtime"] = json!(downtime.as_millis() as u64);
        }
        if let Some(total) = status.total_time {
            shown["total-time"] = json!(total.as_millis() as u64);
        }
        if let Some(ram) = status.ram {
            if ram.throttle_percent > 0 {
                shown["cpu-throttle-percentage"] = json!(ram.throttle_percent);
            }
            shown["ram"] = json!({
                "total": ram.total_bytes,
                "remaining": ram.remaining_bytes,
                "normal": ram.normal_pages,
                "duplicate": ram.zero_pages,
                "dirty-sync-count": ram.passes,
                "postcopy-requests": ram.postcopy_requests,
            });
            if let Some([median, most]) = ram.fault_latency {
                let (median, most) = (median.as_micros() as u64, most.as_micros() as u64);
                shown["x-fault-latency"] = json!({"median-us": median, "99-percent-us": most});
            }
        }
        shown
    }
}
