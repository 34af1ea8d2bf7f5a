//! What becomes live at the end: disks, and the guest of a machine.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmferry_block_migration::{DestinationStats, Syncer};
use vmferry_disk::Lease;

use super::answers::Answers;
use super::{DestinationDisk, DestinationFailure};
use crate::guest::Guest;
use crate::record::{RecordError, RecordFile, Residence};

/// Disks that are being filled, and who uses them then.
pub(super) struct Landing {
    leases: Vec<(Lease, Option<RecordFile>)>,
    syncer: Syncer,
    pub(super) stats: Arc<DestinationStats>,
    guest: Option<Box<dyn Guest>>,
    /// The records stay, for a daemon that is restarted.
    keep_records: bool,
    /// Tells the records of this attempt from those of others.
    attempt: u64,
    peer: String,
    landed: bool,
}

/// The disks, which nobody else uses.
pub(super) type Leases = Vec<(Lease, Option<RecordFile>)>;

pub(super) fn take_leases(disks: &[DestinationDisk]) -> Result<Leases, DestinationFailure> {
    let take = |disk: &DestinationDisk| match disk.node.lease("an incoming migration") {
        Ok(lease) => Ok((lease, disk.record.clone())),
        Err(source) => {
            let disk = disk.node.name().to_owned();
            Err(DestinationFailure::InUse { disk, source })
        }
    };
    disks.iter().map(take).collect()
}

impl Landing {
    pub(super) fn new(
        leases: Leases,
        syncer: Syncer,
        stats: Arc<DestinationStats>,
        guest: Option<Box<dyn Guest>>,
        keep_records: bool,
        peer: String,
    ) -> Self {
        Self {
            leases,
            syncer,
            stats,
            guest,
            keep_records,
            attempt: RandomState::new().build_hasher().finish(),
            peer,
            landed: false,
        }
    }

    /// Everything that has come is on stable storage when this returns.
    pub(super) fn sync(&self) -> Result<(), DestinationFailure> {
        Ok(self.syncer.sync()?)
    }

    /// The disks change from now on.
    pub(super) fn write_incoming(&self) -> Result<(), RecordError> {
        self.write_records(Residence::Incoming)
    }

    fn write_records(&self, residence: Residence) -> Result<(), RecordError> {
        let mut records = self.leases.iter().filter_map(|(_, record)| record.as_ref());
        records
            .try_for_each(|record| record.write_attempt(residence, &self.peer, Some(self.attempt)))
    }

    /// Have all disks come?
    pub(super) fn has_all(&self) -> bool {
        self.leases.is_empty() || self.stats.ended.load(Ordering::Acquire)
    }

    /// All disks are whole: from here on they live here. Nothing happens the second time.
    pub(super) fn land(&mut self, answers: &Answers) -> Result<(), DestinationFailure> {
        if self.landed {
            return Ok(());
        }
        if !self.has_all() {
            let quoted = |(lease, _): &(Lease, _)| format!("'{}'", lease.node().name());
            return Err(DestinationFailure::NoDisks {
                names: self.leases.iter().map(quoted).collect(),
            });
        }
        self.syncer.sync()?;
        if let Err(error) = self.write_records(Residence::Arrived) {
            // A record that says more than is true must not be contradicted by SHUT 1.
            if self.write_incoming().is_err() {
                answers.close();
            }
            return Err(error.into());
        }
        self.landed = true;
        Ok(())
    }

    /// They do not live here after all. If that cannot be written down nobody must be told so.
    pub(super) fn take_off(&mut self, answers: &Answers) {
        if std::mem::take(&mut self.landed) && self.write_incoming().is_err() {
            answers.close();
        }
    }

    /// Let guests in, and the machine's own run.
    pub(super) fn let_in(&mut self) {
        if !self.keep_records {
            self.clear_records();
        }
        self.leases.drain(..).for_each(|(lease, _)| lease.arrive());
        if let Some(mut guest) = self.guest.take() {
            guest.run();
        }
    }

    /// Nobody will ask: the files are whole, and that is all.
    fn clear_records(&self) {
        for record in self.leases.iter().filter_map(|(_, record)| record.as_ref()) {
            if let Err(error) = record.clear() {
                tracing::warn!(%error, "the disk has arrived, but its record could not be removed");
            }
        }
    }
}
