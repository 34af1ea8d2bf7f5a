//! Internal snapshots across the disks of a machine.
//!
//! A snapshot of a machine is a snapshot of the same name on each of its disks. One of them may hold
//! the machine's state too. Taking one that fails takes back what was made; one that is missing on a
//! disk is not applied to any.
//!
//! Nobody writes to the disks meanwhile: whoever serves them holds and drains all of them first.

#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::io::{self, Read, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use vmferry_qcow2::{Error, NewSnapshot, Qcow2Disk, Snapshot};

/// A disk, and what it is called in messages.
#[derive(Clone, Copy, Debug)]
pub struct NamedDisk<'a> {
    /// Its name, or the path of its image.
    pub name: &'a str,
    /// The image.
    pub disk: &'a Qcow2Disk,
}

/// When a snapshot is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Seconds since 1970, and nanoseconds.
    pub date: (u32, u32),
    /// How long the guest has run, in nanoseconds.
    pub guest_nanoseconds: u64,
}

impl Moment {
    /// Now, by the host's clock.
    #[must_use]
    pub fn now(guest_nanoseconds: u64) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default();
        Self {
            date: (
                u32::try_from(now.as_secs()).unwrap_or(u32::MAX),
                now.subsec_nanos(),
            ),
            guest_nanoseconds,
        }
    }
}

/// Snapshots of several disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Those that all disks have, as they are on the disk with the VM state, or else on the first.
    /// Ids differ between disks and mean nothing here.
    pub whole: Vec<Snapshot>,
    /// For each disk, those that not all disks have. They cannot be applied together.
    pub partial: Vec<Partial>,
}

/// Snapshots of one disk that another one lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partial {
    /// The disk.
    pub disk: String,
    /// Its snapshots, in the order of their table; not empty.
    pub snapshots: Vec<Snapshot>,
}

/// A snapshot could not be listed, taken, applied or deleted.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There is one of this name.
    #[error("disk '{disk}' has a snapshot '{snapshot}' already")]
    Exists {
        /// The disk.
        disk: String,
        /// The name.
        snapshot: String,
    },
    /// A disk lacks it.
    #[error("disk '{disk}' has no snapshot '{snapshot}'")]
    Missing {
        /// The disk.
        disk: String,
        /// The name.
        snapshot: String,
    },
    /// No disk has it.
    #[error("no disk has a snapshot '{0}'")]
    Nowhere(String),
    /// A snapshot without VM state.
    #[error("snapshot '{snapshot}' of disk '{disk}' holds no VM state")]
    NoVmState {
        /// The disk.
        disk: String,
        /// The name.
        snapshot: String,
    },
    /// A disk failed.
    #[error("disk '{disk}': {source}")]
    Disk {
        /// The disk.
        disk: String,
        /// What it said.
        source: Box<Error>,
    },
    /// A disk failed, and what was made before could not be taken back.
    #[error("disk '{disk}': {source}; and snapshot '{snapshot}' stays on disk '{left}': {why}")]
    Left {
        /// The disk that failed.
        disk: String,
        /// What it said.
        source: Box<Error>,
        /// The snapshot.
        snapshot: String,
        /// A disk that still has it.
        left: String,
        /// Why it could not be deleted there.
        why: Box<Error>,
    },
    /// A disk failed, and those before it were brought back already: together they are no machine.
    #[error(
        "disk '{disk}': {source}; and snapshot '{snapshot}' was applied before to {}",
        names(.others)
    )]
    Torn {
        /// The disk that failed.
        disk: String,
        /// What it said.
        source: Box<Error>,
        /// The snapshot.
        snapshot: String,
        /// The disks that are back at it; not empty.
        others: Vec<String>,
    },
    /// A disk failed, and those before it have lost the snapshot.
    #[error(
        "disk '{disk}': {source}; and snapshot '{snapshot}' was deleted before from {}",
        names(.others)
    )]
    DeletedPartly {
        /// The disk that failed.
        disk: String,
        /// What it said.
        source: Box<Error>,
        /// The snapshot.
        snapshot: String,
        /// The disks that have lost it; not empty.
        others: Vec<String>,
    },
    /// The VM state cannot be read or written.
    #[error("VM state: {0}")]
    VmState(#[from] io::Error),
}

fn failed(disk: &NamedDisk<'_>) -> impl Fn(Error) -> SnapshotError + use<> {
    let disk = disk.name.to_owned();
    move |source| SnapshotError::Disk {
        disk: disk.clone(),
        source: Box::new(source),
    }
}

fn names(disks: &[String]) -> String {
    let quoted: Vec<String> = disks.iter().map(|disk| format!("'{disk}'")).collect();
    quoted.join(", ")
}

/// The snapshot of that name, which is not its id.
fn find(disk: &NamedDisk<'_>, name: &str) -> Option<Snapshot> {
    let mut snapshots = disk.disk.snapshots().into_iter();
    snapshots.find(|snapshot| snapshot.name == name)
}

fn missing(disk: &NamedDisk<'_>, name: &str) -> SnapshotError {
    SnapshotError::Missing {
        disk: disk.name.to_owned(),
        snapshot: name.to_owned(),
    }
}

/// Snapshots that all disks have, and the others.
#[must_use]
pub fn list(disks: &[NamedDisk<'_>]) -> Listing {
    let of_disk = |disk: &NamedDisk<'_>| (disk.name.to_owned(), disk.disk.snapshots());
    let disks: Vec<_> = disks.iter().map(of_disk).collect();
    Listing::of(&disks)
}

impl Listing {
    /// The same from the name and the snapshots of each disk, in the order of its table.
    #[must_use]
    pub fn of(disks: &[(String, Vec<Snapshot>)]) -> Self {
        // For each name: how many disks have it, and the copy that is shown.
        let mut known: HashMap<String, (usize, Snapshot)> = HashMap::new();
        for (_, snapshots) in disks {
            let mut seen = HashSet::new();
            let first_of_name = |snapshot: &&Snapshot| seen.insert(snapshot.name.clone());
            for snapshot in snapshots.iter().filter(first_of_name) {
                let entry = known.entry(snapshot.name.clone());
                let (count, shown) = entry.or_insert_with(|| (0, snapshot.clone()));
                *count += 1;
                if shown.vm_state_bytes == 0 && snapshot.vm_state_bytes > 0 {
                    *shown = snapshot.clone();
                }
            }
        }
        let shown = |name: &str| {
            let (count, shown) = known.get(name)?;
            (*count == disks.len()).then_some(shown)
        };
        let first = disks.first().map(|(_, snapshots)| snapshots.as_slice());
        let whole = first.unwrap_or_default().iter();
        let whole = whole.filter_map(|snapshot| shown(&snapshot.name).cloned());
        let partial = disks.iter().filter_map(|(disk, snapshots)| {
            let snapshots = snapshots.iter();
            let snapshots = snapshots.filter(|snapshot| shown(&snapshot.name).is_none());
            let snapshots: Vec<Snapshot> = snapshots.cloned().collect();
            let disk = disk.clone();
            (!snapshots.is_empty()).then_some(Partial { disk, snapshots })
        });
        Self {
            whole: whole.collect(),
            partial: partial.collect(),
        }
    }
}

/// Take a snapshot of each disk, without VM state.
///
/// # Errors
/// A disk has one of that name, and nothing was done; or a disk failed, and what was made before is
/// taken back.
pub fn create(disks: &[NamedDisk<'_>], name: &str, moment: Moment) -> Result<(), SnapshotError> {
    refuse_existing(disks, name)?;
    create_on_each(disks, name, moment, 0)
}

fn refuse_existing(disks: &[NamedDisk<'_>], name: &str) -> Result<(), SnapshotError> {
    match disks.iter().find(|disk| find(disk, name).is_some()) {
        None => Ok(()),
        Some(disk) => Err(SnapshotError::Exists {
            disk: disk.name.to_owned(),
            snapshot: name.to_owned(),
        }),
    }
}

/// `vm_state_bytes` were written to the first disk.
fn create_on_each(
    disks: &[NamedDisk<'_>],
    name: &str,
    moment: Moment,
    vm_state_bytes: u64,
) -> Result<(), SnapshotError> {
    for (k, disk) in disks.iter().enumerate() {
        let made = disk.disk.create_snapshot(&NewSnapshot {
            name,
            date: moment.date,
            guest_nanoseconds: moment.guest_nanoseconds,
            vm_state_bytes: if k == 0 { vm_state_bytes } else { 0 },
            icount: None,
        });
        if let Err(source) = made {
            return Err(take_back(&disks[..k], name, disk, source));
        }
    }
    Ok(())
}

/// Delete what was made before `disk` failed.
fn take_back(
    made: &[NamedDisk<'_>],
    name: &str,
    disk: &NamedDisk<'_>,
    source: Error,
) -> SnapshotError {
    let mut left = None;
    for made in made.iter().rev() {
        // By its id: its name could be the id of another.
        let id = find(made, name).map_or_else(|| name.to_owned(), |snapshot| snapshot.id);
        if let Err(why) = made.disk.delete_snapshot(&id) {
            left = left.or(Some((made.name.to_owned(), why)));
        }
    }
    match left {
        None => failed(disk)(source),
        Some((left, why)) => SnapshotError::Left {
            disk: disk.name.to_owned(),
            source: Box::new(source),
            snapshot: name.to_owned(),
            left,
            why: Box::new(why),
        },
    }
}

/// Bring each disk back to what it held then.
///
/// # Errors
/// A disk lacks the snapshot, or the first one failed, and nothing was done; or another one failed:
/// those before it are back at the snapshot, it and those behind it are not
/// ([`SnapshotError::Torn`]).
pub fn apply(disks: &[NamedDisk<'_>], name: &str) -> Result<(), SnapshotError> {
    let mut ids = Vec::new();
    for disk in disks {
        // A name may be the id of another snapshot, which would come first.
        ids.push(find(disk, name).ok_or_else(|| missing(disk, name))?.id);
    }
    for (k, (disk, id)) in disks.iter().zip(&ids).enumerate() {
        disk.disk.apply_snapshot(id).map_err(|source| {
            let others = owned_names(&disks[..k]);
            if others.is_empty() {
                return failed(disk)(source);
            }
            SnapshotError::Torn {
                disk: disk.name.to_owned(),
                source: Box::new(source),
                snapshot: name.to_owned(),
                others,
            }
        })?;
    }
    Ok(())
}

fn owned_names(disks: &[NamedDisk<'_>]) -> Vec<String> {
    disks.iter().map(|disk| disk.name.to_owned()).collect()
}

/// Delete the snapshot on each disk that has it.
///
/// # Errors
/// No disk has it; or a disk failed: those before it have lost it
/// ([`SnapshotError::DeletedPartly`]).
pub fn delete(disks: &[NamedDisk<'_>], name: &str) -> Result<(), SnapshotError> {
    let mut others = Vec::new();
    for disk in disks {
        let Some(snapshot) = find(disk, name) else {
            continue;
        };
        let deleted = disk.disk.delete_snapshot(&snapshot.id);
        match deleted {
            Ok(()) => others.push(disk.name.to_owned()),
            Err(source) if others.is_empty() => return Err(failed(disk)(source)),
            Err(source) => {
                return Err(SnapshotError::DeletedPartly {
                    disk: disk.name.to_owned(),
                    source: Box::new(source),
                    snapshot: name.to_owned(),
                    others,
                });
            }
        }
    }
    match others.is_empty() {
        true => Err(SnapshotError::Nowhere(name.to_owned())),
        false => Ok(()),
    }
}

/// Copy the VM state of a snapshot, an ordinary stream; how many bytes it has.
///
/// # Errors
/// The disk lacks the snapshot, it holds no VM state, or a read or write failed.
pub fn export(
    disk: &NamedDisk<'_>,
    name: &str,
    out: &mut impl Write,
) -> Result<u64, SnapshotError> {
    let snapshot = find(disk, name).ok_or_else(|| missing(disk, name))?;
    if snapshot.vm_state_bytes == 0 {
        return Err(SnapshotError::NoVmState {
            disk: disk.name.to_owned(),
            snapshot: name.to_owned(),
        });
    }
    let state = disk.disk.vm_state_reader(&snapshot.id);
    let mut state = state.map_err(failed(disk))?;
    Ok(io::copy(&mut state, out)?)
}

/// Take a snapshot of each disk, with a stream as the VM state, which the first disk holds. QEMU's
/// `-loadvm` starts from it. How many bytes the stream has.
///
/// # Errors
/// As [`create`]; or the stream cannot be read, and nothing was made.
pub fn import(
    disks: &[NamedDisk<'_>],
    name: &str,
    moment: Moment,
    stream: &mut impl Read,
) -> Result<u64, SnapshotError> {
    refuse_existing(disks, name)?;
    let Some(first) = disks.first() else {
        return Ok(0);
    };
    let mut state = first.disk.vm_state_writer().map_err(failed(first))?;
    io::copy(stream, &mut state)?;
    let bytes = state.finish().map_err(failed(first))?;
    create_on_each(disks, name, moment, bytes)?;
    Ok(bytes)
}
