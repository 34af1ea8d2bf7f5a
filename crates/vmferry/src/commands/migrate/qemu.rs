//! A QEMU whose machine leaves.

use std::io;
use std::time::{Duration, Instant};

use vmferry_channel::{Stop, Uri};
use vmferry_qmp::types::{MigrationInfo, MigrationStatus, RunState};
use vmferry_relay::qemu::{Before, PrivateFolder, Qemu, QemuError, Settings};

use crate::exit::{Exit, Failure};
use crate::flags::MigrateFlags;
use crate::flags::rate::Rate;
use crate::render::{Progress, Sample};
use crate::signals::{Signal, Signals};

/// How often QEMU is asked, in the long run.
const INTERVAL: Duration = Duration::from_millis(250);
/// How soon at first.
const FIRST_INTERVAL: Duration = Duration::from_millis(5);
/// How long QEMU may take to cancel.
const CANCEL_PATIENCE: Duration = Duration::from_secs(30);
/// How long a guest may take to run again.
const RUN_PATIENCE: Duration = Duration::from_secs(10);

/// A QEMU whose machine leaves.
pub(super) struct Source {
    qemu: Qemu,
    ran: bool,
    /// Its own settings, to be put back.
    before: Option<Before>,
}

/// How its migration ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    Completed,
    Cancelled,
    /// It may say why.
    Failed(Option<String>),
    /// It cannot be asked any more.
    Lost(String),
}

impl Source {
    pub(super) fn connect(address: &Uri) -> Result<Self, Failure> {
        let qemu = Qemu::connect(address, &Stop::new()?);
        let mut qemu = qemu.map_err(|error| Failure::new(Exit::Failed, error))?;
        let state = qemu.run_state().map_err(refused)?;
        Ok(Self {
            qemu,
            ran: state == RunState::Running,
            before: None,
        })
    }

    /// For the socket that its machine goes to.
    pub(super) fn private_folder(&self) -> io::Result<PrivateFolder> {
        self.qemu.private_folder()
    }

    /// Begin. Refused, nothing has changed.
    pub(super) fn leave(&mut self, flags: &MigrateFlags, to: &Uri) -> Result<(), Failure> {
        let before = self.qemu.change(&settings(flags)).map_err(refused)?;
        self.before = Some(before);
        self.qemu.migrate(to).map_err(refused)
    }

    /// Until it is over. Ctrl-C cancels it.
    pub(super) fn watch(&mut self, signals: &Signals, progress: &mut Progress) -> Left {
        match self.watch_closely(signals, progress) {
            Ok(left) => left,
            // Nobody would know how it ends.
            Err(error) => {
                let cancelled = self.qemu.cancel().and_then(|()| {
                    let is_over = |status: Option<MigrationStatus>| {
                        let info = MigrationInfo {
                            status,
                            ..MigrationInfo::default()
                        };
                        left(&info, true).is_some()
                    };
                    self.qemu.wait_migration(CANCEL_PATIENCE, is_over)
                });
                match cancelled.map(|info| left(&info, true)) {
                    Ok(Some(Left::Completed)) => Left::Completed,
                    Ok(_) => Left::Failed(Some(error.to_string())),
                    Err(lost) => Left::Lost(lost.to_string()),
                }
            }
        }
    }

    fn watch_closely(&mut self, signals: &Signals, progress: &mut Progress) -> io::Result<Left> {
        let start = Instant::now();
        let mut cancelled: Option<Instant> = None;
        loop {
            let info = match self.qemu.migration() {
                Ok(info) => info,
                Err(error) => return Ok(Left::Lost(error.to_string())),
            };
            let sample = Sample::of_memory(&info);
            let left = left(&info, cancelled.is_some());
            match left {
                Some(Left::Completed) => progress.completed(&sample, start.elapsed())?,
                _ => progress.show(&sample, start.elapsed())?,
            }
            if let Some(left) = left {
                return Ok(left);
            }
            if cancelled.is_some_and(|at| at.elapsed() > CANCEL_PATIENCE) {
                return Ok(Left::Failed(Some("it does not cancel".to_owned())));
            }
            let interval = (start.elapsed() / 16).clamp(FIRST_INTERVAL, INTERVAL);
            match signals.wait(Some(interval))? {
                Some(Signal::Stop) if cancelled.is_none() => {
                    cancelled = Some(Instant::now());
                    progress.note("cancelling");
                    if let Err(error) = self.qemu.cancel() {
                        return Ok(Left::Lost(error.to_string()));
                    }
                }
                _ => {}
            }
        }
    }

    /// The machine stays: see to it that its guest is as it was before. What became of it.
    pub(super) fn back(&mut self) -> &'static str {
        if !self.ran {
            return "the guest stands still where it was";
        }
        // It may need a moment, or somebody who says so.
        let is_back = |state| state == RunState::Running;
        for patience in [RUN_PATIENCE, RUN_PATIENCE] {
            match self.qemu.wait_run_state(patience, is_back) {
                Ok(RunState::Running) => return "the guest runs on where it was",
                Ok(_) => {}
                Err(_) => return "its QEMU cannot be asked whether the guest runs on",
            }
            if let Err(error) = self.qemu.cont() {
                tracing::warn!(%error, "the guest does not run");
            }
        }
        "the guest does not run: say QMP cont"
    }

    /// Its settings as they were.
    pub(super) fn end(&mut self) {
        if let Some(before) = self.before.take() {
            self.qemu.put_back(&before);
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.end();
    }
}

fn left(info: &MigrationInfo, cancelled: bool) -> Option<Left> {
    match info.status? {
        MigrationStatus::Completed => Some(Left::Completed),
        MigrationStatus::Cancelled => Some(Left::Cancelled),
        // A cancel may come when the channel has just broken.
        MigrationStatus::Failed if cancelled => Some(Left::Cancelled),
        MigrationStatus::Failed => Some(Left::Failed(info.error_desc.clone())),
        _ => None,
    }
}

/// QEMU completes when the file is whole, and all of its memory goes into it.
fn settings(flags: &MigrateFlags) -> Settings {
    let mut settings = Settings::default()
        .capability("return-path", true)
        .capability("postcopy-ram", false)
        .without("postcopy-preempt")
        .without("pause-before-switchover")
        .without("switchover-ack")
        .without("background-snapshot")
        .without("mapped-ram")
        .without("x-ignore-shared")
        .without("zero-copy-send")
        .without("x-colo")
        .without("block");
    if let Some(downtime) = flags.limits.downtime {
        settings = settings.parameter("downtime-limit", downtime.0);
    }
    if let Some(bandwidth) = flags.limits.bandwidth {
        settings = settings.parameter("max-bandwidth", Rate::max_bandwidth(bandwidth));
    }
    match flags.multifd.multifd_channels {
        None => settings.without("multifd"),
        Some(channels) => settings
            .capability("multifd", true)
            .parameter("multifd-channels", channels)
            .parameter("multifd-compression", flags.multifd.compression().name()),
    }
}

fn refused(error: QemuError) -> Failure {
    match error.is_refusal() {
        true => Failure::refused(error),
        false => Failure::new(Exit::Failed, error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_of_a_qemu_ends_as_it_says() {
        use MigrationStatus as S;
        let of = |status, cancelled| {
            let info = MigrationInfo {
                status: Some(status),
                error_desc: Some("no room".to_owned()),
                ..MigrationInfo::default()
            };
            left(&info, cancelled)
        };
        let failed = Left::Failed(Some("no room".to_owned()));
        for (status, cancelled, end) in [
            (S::Setup, false, None),
            (S::Active, false, None),
            (S::Device, false, None),
            (S::Cancelling, true, None),
            (S::Completed, false, Some(Left::Completed)),
            // The cancel came too late.
            (S::Completed, true, Some(Left::Completed)),
            (S::Cancelled, false, Some(Left::Cancelled)),
            (S::Failed, false, Some(failed)),
            (S::Failed, true, Some(Left::Cancelled)),
        ] {
            assert_eq!(of(status, cancelled), end, "{status} {cancelled}");
        }
        assert_eq!(left(&MigrationInfo::default(), false), None);
    }
}
