//! From the moment a disk may live elsewhere until somebody knows where it lives.
//!
//! ```text
//!   leases, writes held ── commit ──▶ Committed ── EOF sent ──▶ SHUT 0: give_up
//!        │ failure, cancel               │                      SHUT 1: serve_on
//!        ▼                               │                      else:   undecided, held
//!   holds lifted                         ▼
//!                              a crash leaves the record `leaving`: recover
//! ```
//!
//! [`Committed`] has no way back but a decision: dropping it leaves the disks held, and the guest
//! stopped.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vmferry_disk::{InUse, Lease, Leaving, Node};

use crate::guest::{Guest, Vcpus};
use crate::record::{Record, RecordError, RecordFile, Residence};

/// A disk that can leave.
#[derive(Clone, Debug)]
pub struct SourceDisk {
    /// The disk.
    pub node: Arc<Node>,
    /// Where it is written down that it leaves; `None` for disks that nothing restarts.
    pub record: Option<RecordFile>,
}

/// Where disks shall live, as decided by a person or by the destination's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Here.
    Serve,
    /// There.
    GiveUp,
}

/// Disks, and perhaps the machine that uses them, which may live elsewhere.
#[must_use = "dropping it leaves the disks held"]
pub struct Committed {
    disks: Vec<Departing>,
    guest: Option<Box<dyn Guest>>,
    peer: String,
}

impl fmt::Debug for Committed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Committed")
            .field("disks", &self.disks)
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Departing {
    leaving: Leaving,
    record: Option<RecordFile>,
    before: Before,
}

/// What a record said before it said `leaving`.
#[derive(Clone, Debug)]
enum Before {
    /// There was none.
    Nothing,
    /// This.
    Record(Record),
    /// That is not known any more, after a restart.
    Forgotten,
}

impl Committed {
    /// Write down that the disks leave, then hold everything. On failure they stay, and the guest
    /// goes on.
    pub(crate) fn commit(
        disks: Vec<(Lease, Option<RecordFile>)>,
        vcpus: Vcpus,
        peer: &str,
        gate: &CancelGate,
    ) -> Result<Self, CommitError> {
        let befores: Vec<Before> = disks
            .iter()
            .map(|(_, record)| Before::read(record.as_ref()))
            .collect::<Result<_, _>>()
            .map_err(CommitError::Record)?;
        let mut records = disks.iter().filter_map(|(_, record)| record.as_ref());
        let written = records.try_for_each(|record| record.write(Residence::Leaving, peer));
        // A lease leaves only once it is certain that all do.
        let committed = match written {
            Err(error) => Err(CommitError::Record(error)),
            Ok(()) if !gate.commit() => Err(CommitError::Cancelled),
            Ok(()) => Ok(()),
        };
        if let Err(error) = committed {
            for ((_, record), before) in disks.iter().zip(&befores) {
                before.restore(record.as_ref(), peer);
            }
            // Its disks first: a guest that runs waits for what it holds.
            drop(disks);
            drop(vcpus);
            return Err(error);
        }
        let depart = |((lease, record), before): ((Lease, _), _)| Departing {
            leaving: lease.leave(),
            record,
            before,
        };
        let disks = disks.into_iter().zip(befores).map(depart).collect();
        Ok(Self {
            disks,
            guest: vcpus.leave(),
            peer: peer.to_owned(),
        })
    }

    /// After a restart: hold disks whose records say `leaving`.
    ///
    /// # Errors
    /// A disk that is in use already.
    pub fn recover(disks: Vec<SourceDisk>, peer: &str) -> Result<Self, InUse> {
        let leases: Vec<_> = disks
            .into_iter()
            .map(|disk| Ok((disk.node.lease("an undecided hand-over")?, disk.record)))
            .collect::<Result<_, _>>()?;
        let disks = leases.into_iter().map(|(lease, record)| Departing {
            leaving: lease.leave(),
            record,
            before: Before::Forgotten,
        });
        Ok(Self {
            disks: disks.collect(),
            guest: None,
            peer: peer.to_owned(),
        })
    }

    /// The other side.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Names of the disks.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.disks.iter().map(|disk| disk.leaving.node().name())
    }

    /// Carry out a decision.
    pub fn decide(self, decision: Decision) {
        for Departing {
            leaving,
            record,
            before,
        } in self.disks
        {
            match decision {
                Decision::Serve => {
                    before.restore(record.as_ref(), &self.peer);
                    leaving.serve_on();
                }
                Decision::GiveUp => {
                    // A disk whose record still says `leaving` is held after a restart: safe.
                    if let Some(record) = &record
                        && let Err(error) = record.write(Residence::Moved, &self.peer)
                    {
                        tracing::warn!(%error, "the disk has moved, but it could not be written down");
                    }
                    leaving.give_up();
                }
            }
        }
        if let Some(mut guest) = self.guest.filter(|_| decision == Decision::Serve) {
            guest.run();
        }
    }
}

/// The disks did not leave.
#[derive(Debug)]
pub(crate) enum CommitError {
    Record(RecordError),
    Cancelled,
}

impl Before {
    fn read(record: Option<&RecordFile>) -> Result<Self, RecordError> {
        let before = record.map(RecordFile::read).transpose()?.flatten();
        Ok(before.map_or(Self::Nothing, Self::Record))
    }

    /// A record that cannot be put back makes a restarted daemon hold its disk: safe, and worth a
    /// word.
    fn restore(&self, record: Option<&RecordFile>, peer: &str) {
        let Some(record) = record else { return };
        let restored = match self {
            Self::Nothing => record.clear(),
            Self::Record(before) => record.put(before),
            // It lives here, also where it is told to wait for a migration.
            Self::Forgotten => record.write(Residence::Arrived, peer),
        };
        if let Err(error) = restored {
            tracing::warn!(%error, "the disk stays here, but its record still says that it leaves");
        }
    }
}

/// Decides between a cancel and the point of no return: the first wins.
#[derive(Debug, Default)]
pub(crate) struct CancelGate(AtomicU8);

const OPEN: u8 = 0;
const CANCELLED: u8 = 1;
const COMMITTED: u8 = 2;

impl CancelGate {
    /// False if it is too late.
    pub(crate) fn cancel(&self) -> bool {
        self.swap(CANCELLED)
    }

    /// False if it was cancelled.
    pub(crate) fn commit(&self) -> bool {
        self.swap(COMMITTED)
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == CANCELLED
    }

    pub(crate) fn is_committed(&self) -> bool {
        self.0.load(Ordering::SeqCst) == COMMITTED
    }

    fn swap(&self, to: u8) -> bool {
        match self
            .0
            .compare_exchange(OPEN, to, Ordering::SeqCst, Ordering::SeqCst)
        {
            Ok(_) => true,
            Err(now) => now == to,
        }
    }
}
