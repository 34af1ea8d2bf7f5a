//! What `query-migrate` answers, for people.

use std::io::{self, Write};

use vmferry_qmp::types::{MigrationInfo, MigrationStatus};

use super::outcome::Outcome;
use super::track::{Phase, Sample, Track};
use super::units;

/// Number of the pass that sends everything for the first time.
const BULK_PASS: u64 = 1;

impl From<&MigrationInfo> for Sample {
    fn from(info: &MigrationInfo) -> Self {
        let disk = info.disk.clone().unwrap_or_default();
        let pass = info.x_pass.unwrap_or(0);
        let millis = info
            .total_time
            .unwrap_or(0)
            .saturating_sub(info.setup_time.unwrap_or(0));
        // Before the daemon has measured anything.
        let average = disk.transferred.saturating_mul(1000) / millis.max(1);
        Self {
            phase: phase(info, pass),
            total_bytes: disk.total,
            remaining_bytes: disk.remaining,
            bytes_per_second: info.x_bandwidth.filter(|rate| *rate > 0).unwrap_or(average),
            dirty_bytes_per_second: info.x_dirty_rate.unwrap_or(0),
            pass,
            expected_downtime_ms: info.expected_downtime,
            stall: info.x_stall.clone(),
        }
    }
}

fn phase(info: &MigrationInfo, pass: u64) -> Phase {
    use MigrationStatus as S;
    match info.status.as_ref().unwrap_or(&S::None) {
        S::Setup | S::WaitUnplug => Phase::Setup,
        S::Active if pass <= BULK_PASS => Phase::Bulk,
        S::Active | S::Colo => Phase::Dirty,
        S::PreSwitchover | S::Device => Phase::SwitchOver,
        S::PostcopyActive | S::PostcopyPaused | S::PostcopyRecoverSetup | S::PostcopyRecover => {
            Phase::SwitchOver
        }
        S::Cancelling => Phase::Cancelling,
        S::None | S::Cancelled | S::Completed | S::Failed => Phase::Over,
    }
}

/// A few lines: how it stands, and each disk.
pub(crate) fn status(info: &MigrationInfo, out: &mut impl Write) -> io::Result<()> {
    match Outcome::of(info) {
        Some(Outcome::Completed(summary)) => writeln!(out, "completed: {}", summary.line())?,
        Some(Outcome::Cancelled) => writeln!(out, "cancelled")?,
        Some(Outcome::Failed(why)) => writeln!(out, "failed: {why}")?,
        Some(Outcome::Undecided(why)) => writeln!(out, "undecided, disks are held: {why}")?,
        None if matches!(info.status, None | Some(MigrationStatus::None)) => {
            writeln!(out, "there was no migration")?;
        }
        None => {
            let view = Track::default().view(&Sample::from(info));
            writeln!(
                out,
                "{}: {} % ({})",
                view.phase.name(),
                view.permille / 10,
                view.details()
            )?;
        }
    }
    for disk in info.x_disks.iter().flatten() {
        writeln!(
            out,
            "disk {}: {}, {} sent, {} to do",
            disk.name,
            units::bytes(disk.total),
            units::bytes(disk.transferred),
            units::bytes(disk.remaining)
        )?;
    }
    for reason in info.blocked_reasons.iter().flatten() {
        writeln!(out, "cannot migrate now: {reason}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vmferry_qmp::types::{DiskProgress, MigrationStats};

    use super::*;

    fn told(info: &MigrationInfo) -> String {
        let mut out = Vec::new();
        status(info, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_status_is_a_line_and_one_for_each_disk() {
        let info = MigrationInfo {
            status: Some(MigrationStatus::Active),
            disk: Some(MigrationStats {
                total: 4 << 30,
                remaining: 1 << 30,
                ..MigrationStats::default()
            }),
            x_pass: Some(1),
            x_bandwidth: Some(512 << 20),
            x_disks: Some(vec![DiskProgress {
                name: "root".into(),
                total: 4 << 30,
                transferred: 3 << 30,
                remaining: 1 << 30,
            }]),
            ..MigrationInfo::default()
        };
        assert_eq!(
            told(&info),
            "copying: 74 % (3.00 GiB of 4.00 GiB, 512 MiB/s, ETA 2.0 s)\n\
             disk root: 4.00 GiB, 3.00 GiB sent, 1.00 GiB to do\n"
        );
        let info = MigrationInfo {
            x_pass: Some(2),
            ..info
        };
        assert!(told(&info).starts_with("catching up: "));
        assert_eq!(told(&MigrationInfo::default()), "there was no migration\n");
    }
}
