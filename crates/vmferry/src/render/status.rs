//! What `query-migrate` answers, for people.

use std::io::{self, Write};

use vmferry_migration::{State, Status};
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

impl Sample {
    /// Of a QEMU, whose memory leaves.
    pub(crate) fn of_memory(info: &MigrationInfo) -> Self {
        let ram = info.ram.clone().unwrap_or_default();
        Self {
            phase: phase(info, ram.dirty_sync_count),
            total_bytes: ram.total,
            remaining_bytes: ram.remaining,
            // Megabits; a number that makes no sense becomes none.
            bytes_per_second: (ram.mbps * 125_000.0) as u64,
            dirty_bytes_per_second: ram.dirty_pages_rate.saturating_mul(ram.page_size),
            pass: ram.dirty_sync_count,
            // Its guest will not run on anywhere for now.
            expected_downtime_ms: None,
            stall: None,
        }
    }
}

/// Of a migration out of this process. Nothing in it becomes dirty: its guest is parked.
impl From<&Status> for Sample {
    fn from(status: &Status) -> Self {
        let ram = status.ram.unwrap_or_default();
        let disks_left = status.total_bytes.saturating_sub(status.bulk_bytes);
        let elapsed = status
            .begun
            .map(|begun| begun.elapsed())
            .unwrap_or_default();
        let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let average = status.wire_bytes.saturating_mul(1000) / millis.max(1);
        Self {
            phase: phase_of(status),
            total_bytes: status.total_bytes.saturating_add(ram.total_bytes),
            remaining_bytes: disks_left.saturating_add(ram.remaining_bytes),
            bytes_per_second: Some(status.bandwidth)
                .filter(|rate| *rate > 0)
                .unwrap_or(average),
            ..Self::default()
        }
    }
}

fn phase_of(status: &Status) -> Phase {
    match status.state {
        State::None | State::Setup => Phase::Setup,
        State::Active => Phase::Bulk,
        State::PreSwitchover | State::Device => Phase::SwitchOver,
        State::PostcopyActive => Phase::Postcopy,
        State::PostcopyPaused => Phase::Interrupted,
        State::PostcopyRecover => Phase::Recovering,
        State::Cancelling => Phase::Cancelling,
        State::Completed | State::Failed | State::Cancelled => Phase::Over,
    }
}

fn phase(info: &MigrationInfo, pass: u64) -> Phase {
    use MigrationStatus as S;
    match info.status.as_ref().unwrap_or(&S::None) {
        S::Setup | S::WaitUnplug => Phase::Setup,
        S::Active if pass <= BULK_PASS => Phase::Bulk,
        S::Active | S::Colo => Phase::Dirty,
        S::PreSwitchover | S::Device => Phase::SwitchOver,
        S::PostcopyActive => Phase::Postcopy,
        S::PostcopyPaused => Phase::Interrupted,
        S::PostcopyRecoverSetup | S::PostcopyRecover => Phase::Recovering,
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
    fn the_memory_of_a_qemu_is_what_moves() {
        let info = MigrationInfo {
            status: Some(MigrationStatus::Active),
            ram: Some(MigrationStats {
                total: 4 << 20,
                remaining: 1 << 20,
                mbps: 80.0,
                dirty_pages_rate: 3,
                dirty_sync_count: 2,
                page_size: 4096,
                ..MigrationStats::default()
            }),
            ..MigrationInfo::default()
        };
        let sample = Sample::of_memory(&info);
        assert_eq!(sample.phase, Phase::Dirty);
        assert_eq!(
            (sample.total_bytes, sample.remaining_bytes),
            (4 << 20, 1 << 20)
        );
        assert_eq!(sample.bytes_per_second, 10_000_000);
        assert_eq!(sample.dirty_bytes_per_second, 3 * 4096);
        // Before QEMU has measured anything.
        let odd = MigrationInfo {
            ram: Some(MigrationStats {
                mbps: f64::NAN,
                ..MigrationStats::default()
            }),
            ..info
        };
        assert_eq!(Sample::of_memory(&odd).bytes_per_second, 0);
    }

    #[test]
    fn a_parked_machine_moves_with_its_disks() {
        let status = Status {
            state: State::PostcopyActive,
            total_bytes: 100,
            bulk_bytes: 40,
            bandwidth: 5,
            ram: Some(vmferry_migration::RamStatus {
                total_bytes: 1000,
                remaining_bytes: 7,
                ..Default::default()
            }),
            ..Status::default()
        };
        let sample = Sample::from(&status);
        assert_eq!(sample.phase, Phase::Postcopy);
        assert_eq!((sample.total_bytes, sample.remaining_bytes), (1100, 67));
        assert_eq!(sample.bytes_per_second, 5);
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
