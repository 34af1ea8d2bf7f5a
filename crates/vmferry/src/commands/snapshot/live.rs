//! Snapshots of disks that a running daemon serves, through its control socket.

use serde_json::{Value, json};
use vmferry_channel::Uri;
use vmferry_qcow2::Snapshot;
use vmferry_qmp::types::{BlockDeviceInfo, BlockInfo, SnapshotInfo};
use vmferry_snapshot::Listing;

use crate::commands::daemon::{Daemon, parsed};
use crate::exit::{Exit, Failure};
use crate::flags::snapshot::{DisksFlags, WhichFlags};

/// What is done to all disks together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deed {
    Save,
    Load,
    Delete,
}

/// A daemon, and those of its disks that are meant.
pub(super) struct Live {
    daemon: Daemon,
    disks: Vec<(String, BlockDeviceInfo)>,
}

impl Live {
    pub(super) fn connect(address: &Uri, which: &WhichFlags) -> Result<Self, Failure> {
        let mut daemon = Daemon::connect(address)?;
        let blocks: Vec<BlockInfo> = parsed(daemon.execute("query-block", &json!({}))?)?;
        let mut all: Vec<(String, BlockDeviceInfo)> = blocks
            .into_iter()
            .filter_map(|block| Some((block.device, block.inserted?)))
            .collect();
        let mut disks = Vec::new();
        for name in &which.disks {
            let index = all
                .iter()
                .position(|(known, _)| name.as_os_str() == known.as_str());
            let Some(index) = index else {
                return Err(unknown(&name.display().to_string(), &all, &disks));
            };
            disks.push(all.swap_remove(index));
        }
        if which.disks.is_empty() {
            all.retain(|(_, disk)| disk.active && !disk.ro);
            disks = all;
        }
        if disks.is_empty() {
            let message = "the daemon has no disk that can be written to";
            return Err(Failure::refused(message));
        }
        Ok(Self { daemon, disks })
    }

    pub(super) fn is_single(&self) -> bool {
        self.disks.len() == 1
    }

    pub(super) fn list(&self) -> Listing {
        let of_disk = |(name, disk): &(String, BlockDeviceInfo)| {
            let snapshots = disk.image.snapshots.iter().flatten();
            (name.clone(), snapshots.map(snapshot).collect())
        };
        let disks: Vec<_> = self.disks.iter().map(of_disk).collect();
        Listing::of(&disks)
    }

    /// Have it done by a job, and wait for that.
    pub(super) fn run(mut self, deed: Deed, flags: &DisksFlags) -> Result<Exit, Failure> {
        let has_it = |(_, disk): &(String, BlockDeviceInfo)| {
            let mut snapshots = disk.image.snapshots.iter().flatten();
            snapshots.any(|snapshot| snapshot.name == flags.name)
        };
        if deed == Deed::Delete && !self.disks.iter().any(has_it) {
            // To the daemon, as to a QEMU, that is no error.
            let error = vmferry_snapshot::SnapshotError::Nowhere(flags.name.clone());
            return Err(Failure::new(Exit::Failed, error));
        }
        let names: Vec<&str> = self.disks.iter().map(|(name, _)| name.as_str()).collect();
        let job = format!("vmferry-{:016x}", fastrand::u64(..));
        let mut arguments = json!({"job-id": job, "tag": flags.name, "devices": names});
        let command = match deed {
            Deed::Save => "snapshot-save",
            Deed::Load => "snapshot-load",
            Deed::Delete => "snapshot-delete",
        };
        if deed != Deed::Delete {
            arguments["vmstate"] = Value::from(names[0]);
        }
        match self.daemon.run_job(command, &job, &arguments)? {
            None => Ok(Exit::Whole),
            Some(error) => Err(Failure::new(Exit::Failed, error)),
        }
    }
}

fn unknown(
    name: &str,
    others: &[(String, BlockDeviceInfo)],
    chosen: &[(String, BlockDeviceInfo)],
) -> Failure {
    let is_chosen = chosen.iter().any(|(known, _)| known == name);
    if is_chosen {
        return Failure::usage(format!("disk '{name}' is named twice"));
    }
    let known = others.iter().chain(chosen).map(|(known, _)| known.as_str());
    let mut known: Vec<&str> = known.collect();
    known.sort_unstable();
    let message = format!("the daemon has no disk '{name}'");
    Failure::refused(message).hint(format!("it has: {}", known.join(", ")))
}

fn snapshot(info: &SnapshotInfo) -> Snapshot {
    let small = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    let seconds = info.vm_clock_sec.saturating_mul(1_000_000_000);
    Snapshot {
        id: info.id.clone(),
        name: info.name.clone(),
        date: (small(info.date_sec), small(info.date_nsec)),
        guest_nanoseconds: seconds.saturating_add(info.vm_clock_nsec),
        vm_state_bytes: info.vm_state_size,
        disk_bytes: info.x_disk_size,
        icount: info.icount,
    }
}
