//! A QEMU that a parked machine is sent to, and its monitor.

use std::time::{Duration, Instant};

use vmferry_channel::{Stop, Uri};
use vmferry_image::Head;
use vmferry_multifd::Flush;
use vmferry_qmp::types::{MigrationStatus, RunState};
use vmferry_relay::qemu::{Before, Qemu, QemuError, Settings};

use super::target::{Peculiar, Way};
use crate::exit::{Exit, Failure};
use crate::flags::SendFlags;

/// How long a QEMU may take to say what became of a machine that has arrived.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to say why it failed.
const REASON_PATIENCE: Duration = Duration::from_secs(2);
/// The first version that knows the command SWITCHOVER_START.
const KNOWS_SWITCHOVER_START: u64 = 10;

/// A QEMU that a parked machine is sent to.
pub(super) struct Vm {
    qemu: Qemu,
    /// Its own settings, to be put back.
    before: Option<Before>,
    runs_since: Option<Instant>,
    /// Why its monitor does not answer any more.
    lost: Option<String>,
}

/// What a QEMU says of a migration into it.
pub(super) enum Said {
    /// The machine is there. Does its guest run?
    Arrived { runs: bool },
    /// It is not.
    Failed(String),
    /// Nothing that helps.
    Nothing,
}

impl Vm {
    /// Reach its monitor; it must be waiting for a machine.
    pub(super) fn connect(address: &Uri, flags: &SendFlags) -> Result<Self, Failure> {
        let qemu = Qemu::connect(address, &Stop::new()?);
        let mut qemu = qemu.map_err(|error| Failure::new(Exit::Failed, error))?;
        if !flags.resume {
            qemu.check_waits().map_err(not_waiting)?;
        }
        Ok(Self {
            qemu,
            before: None,
            runs_since: None,
            lost: None,
        })
    }

    /// Others end when they get it.
    pub(super) fn knows_switchover_start(&self) -> bool {
        self.qemu.version().major >= KNOWS_SWITCHOVER_START
    }

    /// Let it listen, and connect to it.
    pub(super) fn open_way(
        &mut self,
        flags: &SendFlags,
        head: &Head,
        stop: &Stop,
    ) -> Result<Way, Failure> {
        let mut folder = self.qemu.private_folder()?;
        let at = folder.socket();
        if flags.resume {
            self.qemu.recover(&at).map_err(not_interrupted)?;
        } else {
            let before = self.qemu.change(&settings(flags, head)).map_err(refused)?;
            self.before = Some(before);
            self.qemu.listen(&at).map_err(not_waiting)?;
        }
        // The newer way came with QEMU 8.1, whatever the machine type.
        let version = self.qemu.version();
        let is_old = (version.major, version.minor) <= (8, 0);
        let flush = is_old.then_some(Flush::EachSection);
        let uuid = match flags.multifd.multifd_channels {
            Some(_) => Some(self.qemu.uuid().map_err(refused)?),
            None => None,
        };
        Way::within(folder, &at, flags, Peculiar { flush, uuid }, stop)
    }

    /// Wait for what it has to say, and see whether its guest runs.
    pub(super) fn look(&mut self, patience: Duration) {
        match self.qemu.wait_event(patience) {
            Ok(Some(event)) if event.name == "RESUME" => {
                self.runs_since.get_or_insert_with(Instant::now);
            }
            Ok(_) => {}
            Err(error) => self.lost = Some(error.to_string()),
        }
    }

    pub(super) fn runs_since(&self) -> Option<Instant> {
        self.runs_since
    }

    /// Is there something to be heard that matters now?
    pub(super) fn is_awaited(&self) -> bool {
        self.lost.is_none() && self.runs_since.is_none()
    }

    /// Is it gone?
    pub(super) fn is_gone(&mut self) -> bool {
        let deadline = Instant::now() + REASON_PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.lost.is_some() || left.is_zero() {
                return self.lost.is_some();
            }
            self.look(left);
        }
    }

    /// The machine should be there.
    pub(super) fn arrived(&mut self) -> Said {
        let is_over = |status| {
            matches!(
                status,
                Some(MigrationStatus::Completed | MigrationStatus::Failed)
            )
        };
        let Ok(info) = self.qemu.wait_migration(END_PATIENCE, is_over) else {
            return Said::Nothing;
        };
        match info.status {
            Some(MigrationStatus::Completed) => {
                let state = self.qemu.run_state();
                self.put_back();
                Said::Arrived {
                    runs: state.is_ok_and(|state| state == RunState::Running),
                }
            }
            Some(MigrationStatus::Failed) => Said::Failed(reason(info.error_desc)),
            _ => Said::Nothing,
        }
    }

    /// The machine is not there: why?
    pub(super) fn failed(&mut self) -> Said {
        if self.lost.is_some() {
            let reason = "the destination has ended; its standard error says why";
            return Said::Failed(reason.to_owned());
        }
        let is_over = |status| status == Some(MigrationStatus::Failed);
        match self.qemu.wait_migration(REASON_PATIENCE, is_over) {
            Ok(info) if is_over(info.status) => {
                self.put_back();
                Said::Failed(reason(info.error_desc))
            }
            Ok(_) => Said::Nothing,
            Err(error) => {
                self.lost = Some(error.to_string());
                self.failed()
            }
        }
    }

    /// Its settings as they were.
    fn put_back(&mut self) {
        if let Some(before) = self.before.take() {
            self.qemu.put_back(&before);
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // While a guest waits in it for its memory it would not answer, and needs what was set.
        if self.lost.is_none() && self.runs_since.is_none() {
            self.put_back();
        }
    }
}

/// What the destination of this machine must have on, and what would be in the way.
fn settings(flags: &SendFlags, head: &Head) -> Settings {
    let configuration = head.configuration.as_ref();
    let mut settings = Settings::default()
        .capability("postcopy-ram", flags.postcopy)
        .without("postcopy-preempt")
        .without("mapped-ram")
        .without("x-colo");
    settings = match configuration.is_some_and(|it| it.has_capability("x-ignore-shared")) {
        true => settings.capability("x-ignore-shared", true),
        false => settings.without("x-ignore-shared"),
    };
    match flags.multifd.multifd_channels {
        None => settings.without("multifd"),
        Some(channels) => settings
            .capability("multifd", true)
            .parameter("multifd-channels", channels)
            .parameter("multifd-compression", flags.multifd.compression().name()),
    }
}

fn reason(description: Option<String>) -> String {
    match description {
        Some(text) => format!("the destination says: {text}"),
        None => "the destination does not say why; its standard error may".to_owned(),
    }
}

fn refused(error: QemuError) -> Failure {
    match error.is_refusal() {
        true => Failure::refused(error),
        false => Failure::new(Exit::Failed, error),
    }
}

fn not_waiting(error: QemuError) -> Failure {
    refused(error).hint("--vm takes a QEMU that was started with -incoming defer, and not used yet")
}

fn not_interrupted(error: QemuError) -> Failure {
    refused(error)
        .hint("--resume goes on with a postcopy whose connection broke; see QMP query-migrate")
}
