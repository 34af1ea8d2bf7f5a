//! What the `query-…` commands answer.

use std::os::unix::fs::MetadataExt;

use vmferry_disk::{CHUNK_BYTES, Hold};
use vmferry_migration::{State, Status};
use vmferry_qmp::types::{
    BlockDeviceInfo, BlockExportInfo, BlockExportType, BlockInfo, BlockdevCacheInfo, DiskProgress,
    HandOver, HoldLevel, ImageInfo, MigrationInfo, MigrationStats, MigrationStatus, RunState,
    StatusInfo,
};

use crate::announcer::migration_status;
use crate::config::Disk;
use crate::hub::Hub;
use crate::incoming::IncomingState;
use crate::outgoing::{Outgoing, milliseconds};
use crate::snapshots::{AtWork, listed};

/// Pages of a guest, for readers that divide by it. There is no memory here.
const PAGE_BYTES: u64 = 4096;

impl Hub {
    /// `query-migrate`.
    pub(crate) fn migration_info(&self) -> MigrationInfo {
        let state = self.state();
        let blocked = state.why_disks_are_busy();
        let mut info = if let Some(recovered) = &state.recovered {
            MigrationInfo {
                status: Some(MigrationStatus::Device),
                x_hand_over: Some(HandOver::Undecided),
                error_desc: Some(format!(
                    "undecided since before a restart: the disks may have moved to {}",
                    recovered.peer()
                )),
                ..MigrationInfo::default()
            }
        } else if let Some(outgoing) = &state.outgoing {
            let status = outgoing.published().get();
            MigrationInfo {
                x_hand_over: Some(hand_over(&status)),
                x_durable: status.durable.filter(|_| !outgoing.one_way),
                x_disks: Some(self.disk_progress(outgoing, &status)),
                ..common_info(&status)
            }
        } else if let Some(incoming) = &state.incoming {
            let status = incoming.published().get();
            MigrationInfo {
                x_durable: status.durable,
                ..common_info(&status)
            }
        } else {
            common_info(&Status::default())
        };
        info.blocked_reasons = blocked.map(|reason| vec![reason]);
        info
    }

    /// The bulk phase sends disk after disk; afterwards the dirty bits say what is left.
    fn disk_progress(&self, outgoing: &Outgoing, status: &Status) -> Vec<DiskProgress> {
        let mut bulk_bytes = status.bulk_bytes;
        let find = |name: &String| {
            let mut disks = self.disks.iter();
            disks.find(|disk| disk.node.name() == name)
        };
        let one = |disk: &Disk| {
            let total = disk.node.limits().length;
            let bulk = bulk_bytes.min(total);
            bulk_bytes -= bulk;
            let remaining = match (status.state, status.bulk_over) {
                (State::Completed, _) => 0,
                (_, false) => total - bulk,
                (_, true) => (disk.node.dirty().count() * CHUNK_BYTES).min(total),
            };
            DiskProgress {
                name: disk.node.name().to_owned(),
                total,
                transferred: total - remaining,
                remaining,
            }
        };
        outgoing.disks.iter().filter_map(find).map(one).collect()
    }

    /// `query-status`.
    pub(crate) fn status_info(&self) -> StatusInfo {
        let state = self.state();
        let status = if let Some(outgoing) = &state.outgoing {
            let status = outgoing.published().get();
            match status.state {
                _ if status.undecided => RunState::Postmigrate,
                State::Completed if !self.disks.iter().any(Disk::is_here) => RunState::Postmigrate,
                State::PreSwitchover | State::Device => RunState::FinishMigrate,
                _ => RunState::Running,
            }
        } else {
            RunState::Running
        };
        let expecting = state.incoming.as_ref().and_then(IncomingState::why_busy);
        let status = match status {
            _ if self.ending.is_asked() => RunState::Shutdown,
            _ if state.recovered.is_some() => RunState::Postmigrate,
            _ if expecting.is_some() => RunState::Inmigrate,
            status => match state.snapshot.as_ref().and_then(AtWork::run_state) {
                Some(at_work) => at_work,
                None if state.stopped.is_some() => RunState::Paused,
                None => status,
            },
        };
        StatusInfo {
            running: status == RunState::Running,
            status,
        }
    }

    /// `query-block`.
    pub(crate) fn block_info(&self) -> Vec<BlockInfo> {
        let one = |disk: &Disk| BlockInfo {
            device: disk.node.name().to_owned(),
            qdev: None,
            kind: "unknown".to_owned(),
            removable: false,
            locked: false,
            inserted: Some(device_info(disk)),
        };
        self.disks.iter().map(one).collect()
    }

    /// `query-named-block-nodes`.
    pub(crate) fn node_info(&self) -> Vec<BlockDeviceInfo> {
        self.disks.iter().map(device_info).collect()
    }

    /// `query-block-exports`.
    pub(crate) fn export_info(&self) -> Vec<BlockExportInfo> {
        let one = |disk: &Disk| BlockExportInfo {
            id: disk.node.name().to_owned(),
            kind: BlockExportType::Nbd,
            node_name: disk.node.name().to_owned(),
            shutting_down: false,
        };
        let here = self.disks.iter().filter(|disk| disk.is_here());
        here.map(one).collect()
    }
}

fn device_info(disk: &Disk) -> BlockDeviceInfo {
    let limits = disk.node.limits();
    let file = disk.path.display().to_string();
    let held = disk.node.held();
    BlockDeviceInfo {
        file: file.clone(),
        node_name: Some(disk.node.name().to_owned()),
        ro: limits.read_only,
        drv: disk.format.to_owned(),
        active: held.is_some(),
        image: ImageInfo {
            filename: file,
            format: disk.format.to_owned(),
            virtual_size: limits.length,
            actual_size: allocated_bytes(disk),
            cluster_size: limits.cluster_bytes.map(u64::from),
            snapshots: disk.image.as_deref().and_then(listed),
        },
        cache: BlockdevCacheInfo {
            writeback: true,
            direct: false,
            no_flush: false,
        },
        x_hold: Some(match held {
            Some(Hold::Nothing) => HoldLevel::Nothing,
            Some(Hold::Writes) => HoldLevel::Writes,
            Some(Hold::Everything) => HoldLevel::Everything,
            None => HoldLevel::Departed,
        }),
        x_blocked_by: disk.node.user().map(str::to_owned),
        x_dirty_bytes: Some((disk.node.dirty().count() * CHUNK_BYTES).min(limits.length)),
        ..BlockDeviceInfo::default()
    }
}

/// Space that a regular file takes.
fn allocated_bytes(disk: &Disk) -> Option<u64> {
    /// Unit of `st_blocks`, whatever the file system's blocks are.
    const STAT_BLOCK_BYTES: u64 = 512;
    let metadata = std::fs::metadata(&disk.path).ok()?;
    metadata
        .is_file()
        .then(|| metadata.blocks() * STAT_BLOCK_BYTES)
}

/// What both directions have in common.
fn common_info(status: &Status) -> MigrationInfo {
    let began = status.state != State::None;
    let elapsed = status
        .total_time
        .or(status.begun.map(|begun| begun.elapsed()));
    MigrationInfo {
        status: Some(migration_status(status.state)),
        ram: began.then(|| MigrationStats {
            page_size: PAGE_BYTES,
            ..MigrationStats::default()
        }),
        disk: began.then(|| disk_stats(status)),
        total_time: elapsed.filter(|_| began).map(milliseconds),
        expected_downtime: status.expected_downtime.map(milliseconds),
        downtime: status.downtime.map(milliseconds),
        setup_time: status.setup_time.map(milliseconds),
        error_desc: status.error.clone(),
        x_phase: began.then(|| phase(status).to_owned()),
        x_pass: began.then_some(status.pass),
        x_dirty_rate: began.then_some(status.dirty_rate),
        x_bandwidth: began.then_some(status.bandwidth),
        x_forecast: forecast_ms(status),
        x_stall: status.stall.clone(),
        ..MigrationInfo::default()
    }
}

fn disk_stats(status: &Status) -> MigrationStats {
    let normal_bytes = status.moved_bytes.saturating_sub(status.zero_bytes);
    MigrationStats {
        transferred: status.moved_bytes,
        remaining: status.remaining_bytes,
        total: status.total_bytes,
        duplicate: status.zero_bytes.div_ceil(CHUNK_BYTES),
        normal: normal_bytes.div_ceil(CHUNK_BYTES),
        normal_bytes,
        dirty_pages_rate: status.dirty_rate / CHUNK_BYTES,
        mbps: megabits(status.bandwidth),
        dirty_sync_count: status.pass,
        page_size: CHUNK_BYTES,
        pages_per_second: status.bandwidth / CHUNK_BYTES,
        precopy_bytes: status.wire_bytes,
        ..MigrationStats::default()
    }
}

/// Megabits per second, to two digits.
fn megabits(bytes_per_second: u64) -> f64 {
    // Exact up to 2⁵³: no channel is that fast.
    (bytes_per_second as f64 * 8.0 / 1e4).round() / 1e2
}

fn hand_over(status: &Status) -> HandOver {
    match status.state {
        _ if status.undecided => HandOver::Undecided,
        State::Completed => HandOver::GivenUp,
        State::Failed | State::Cancelled => HandOver::Kept,
        _ => HandOver::NotYet,
    }
}

fn phase(status: &Status) -> &'static str {
    match status.state {
        _ if status.undecided => "undecided",
        State::None => "none",
        State::Setup => "setting up",
        State::Active if status.pass <= 1 => "copying",
        State::Active => "catching up",
        State::PreSwitchover => "waiting for migrate-continue",
        State::Device => "switching over",
        State::PostcopyActive => "sending memory to a running guest",
        State::PostcopyPaused => "interrupted",
        State::PostcopyRecover => "recovering",
        State::Cancelling => "cancelling",
        State::Completed | State::Failed | State::Cancelled => "over",
    }
}

/// How long what remains takes while guests go on writing.
fn forecast_ms(status: &Status) -> Option<u64> {
    let gain = status.bandwidth.checked_sub(status.dirty_rate)?;
    let runs = status.state == State::Active && status.stall.is_none();
    let milliseconds = u128::from(status.remaining_bytes) * 1000 / u128::from(gain.max(1));
    (runs && gain > 0).then(|| u64::try_from(milliseconds).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_needs_more_bandwidth_than_guests_use_up() {
        let mut status = Status {
            state: State::Active,
            remaining_bytes: 10_000,
            bandwidth: 3_000,
            dirty_rate: 1_000,
            ..Status::default()
        };
        assert_eq!(forecast_ms(&status), Some(5_000));
        status.dirty_rate = 3_000;
        assert_eq!(forecast_ms(&status), None);
        status.dirty_rate = 4_000;
        assert_eq!(forecast_ms(&status), None);
    }

    #[test]
    fn megabits_have_two_digits() {
        assert_eq!(megabits(1_250_000).to_string(), "10");
        assert_eq!(megabits(1_234_567).to_string(), "9.88");
    }
}
