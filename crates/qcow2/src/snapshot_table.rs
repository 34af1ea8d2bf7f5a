//! The table of internal snapshots, as it is in the file.
//!
//! ```text
//! 0 L1 offset 8 │ 8 L1 entries 4 │ 12 id length 2 │ 14 name length 2 │ 16 seconds 4 │ 20 ns 4
//! 24 guest ns 8 │ 32 VM state size, low 4 │ 36 extra length 4
//! 40 extra: VM state size 8, disk size 8, icount 8, … │ id │ name │ padding to 8
//! ```

use crate::bytes::{be16, be32, be64, put, put32, put64};
use crate::error::Error;
use crate::header::Header;
use crate::limits::{
    HOST_BYTES_MAX, L1_BYTES_MAX, SNAPSHOT_EXTRA_BYTES_MAX, SNAPSHOT_L1_BYTES_MAX,
    SNAPSHOT_TABLE_BYTES_MAX, SNAPSHOTS_MAX,
};
use crate::snapshot::{NewSnapshot, no_such};
use crate::storage::Storage;

/// Bytes of an entry before its extra data.
pub(crate) const ENTRY_BYTES: usize = 40;
/// The extra data says that instructions were not counted.
const NO_ICOUNT: u64 = u64::MAX;
/// Extra data that version 3 demands.
const EXTRA_BYTES_V3: u32 = 16;

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Where its L1 table is.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// When it was taken: seconds since 1970.
    pub date_seconds: u32,
    /// And nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had run, in nanoseconds.
    pub guest_nanoseconds: u64,
    /// Bytes of VM state: the low form, or the extra data's.
    pub vm_state_bytes: u64,
    /// Length of the disk then, if the entry says it.
    pub disk_bytes: Option<u64>,
    /// All extra data, as found.
    pub extra: Vec<u8>,
    /// Its id, as found.
    pub id: Vec<u8>,
    /// Its name, as found.
    pub name: Vec<u8>,
    /// Tells it from others that were there before and looked the same; 0 if it was read.
    pub(crate) serial: u64,
}

/// All internal snapshots of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotTable {
    /// The entries, in their order.
    pub entries: Vec<SnapshotEntry>,
    bytes: u64,
}

impl SnapshotTable {
    /// Bytes that the table has in the file.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Read the table; what it says of L1 tables is checked, the tables are not read.
    pub fn read(storage: &dyn Storage, header: &Header, file_end: u64) -> Result<Self, Error> {
        let mut table = Self::default();
        let mut l1_bytes = 0_u64;
        for _ in 0..header.snapshots {
            let at = header.snapshots_offset.saturating_add(table.bytes);
            let broken = |problem: String| Error::corrupt("snapshot table entry", at, problem);
            let mut fixed = [0; ENTRY_BYTES];
            let fixed_end = at.saturating_add(ENTRY_BYTES as u64);
            if fixed_end > file_end {
                return Err(broken("it reaches past the end of the file".into()));
            }
            let failed = |source| Error::storage("read", "snapshot table", at)(source);
            storage.read_at(&mut fixed, at).map_err(failed)?;
            let extra = be32(&fixed, 36);
            if extra > SNAPSHOT_EXTRA_BYTES_MAX {
                let max = SNAPSHOT_EXTRA_BYTES_MAX;
                return Err(broken(format!(
                    "extra data of {extra} bytes, more than {max}"
                )));
            }
            if header.geometry.version >= 3 && extra < EXTRA_BYTES_V3 {
                let least = EXTRA_BYTES_V3;
                return Err(broken(format!(
                    "extra data of {extra} bytes, less than {least}"
                )));
            }
            let id = u32::from(be16(&fixed, 12));
            let name = u32::from(be16(&fixed, 14));
            let rest_length = extra.saturating_add(id).saturating_add(name);
            let end = fixed_end.saturating_add(u64::from(rest_length));
            if end > file_end {
                return Err(broken("it reaches past the end of the file".into()));
            }
            let mut rest = vec![0; rest_length as usize];
            storage.read_at(&mut rest, fixed_end).map_err(failed)?;
            let names = rest.split_off(extra as usize);
            let (id, name) = names.split_at_checked(id as usize).unwrap_or_default();
            let entry = SnapshotEntry::parse(&fixed, rest, id.to_vec(), name.to_vec());
            entry.check(header, at, file_end)?;
            l1_bytes = l1_bytes.saturating_add(u64::from(entry.l1_entries).saturating_mul(8));
            if l1_bytes > SNAPSHOT_L1_BYTES_MAX {
                return Err(Error::TooLarge {
                    structure: "L1 tables of all snapshots",
                    wanted: l1_bytes,
                    max: SNAPSHOT_L1_BYTES_MAX,
                });
            }
            table.entries.push(entry);
            table.bytes = end
                .saturating_sub(header.snapshots_offset)
                .next_multiple_of(8);
            if table.bytes > SNAPSHOT_TABLE_BYTES_MAX {
                return Err(Error::TooLarge {
                    structure: "snapshot table",
                    wanted: table.bytes,
                    max: SNAPSHOT_TABLE_BYTES_MAX,
                });
            }
        }
        Ok(table)
    }
}

impl SnapshotTable {
    /// A table of these entries, if it is one that can be read again.
    pub(crate) fn of(entries: Vec<SnapshotEntry>) -> Result<Self, Error> {
        let bytes = entries.iter().map(SnapshotEntry::padded_bytes).sum();
        let l1_entries = entries.iter().map(|entry| u64::from(entry.l1_entries));
        let l1_bytes = l1_entries.sum::<u64>().saturating_mul(8);
        let count = entries.len() as u64;
        for (structure, wanted, max) in [
            ("snapshot table", bytes, SNAPSHOT_TABLE_BYTES_MAX),
            (
                "snapshot table (in entries)",
                count,
                u64::from(SNAPSHOTS_MAX),
            ),
            (
                "L1 tables of all snapshots",
                l1_bytes,
                SNAPSHOT_L1_BYTES_MAX,
            ),
        ] {
            if wanted > max {
                return Err(Error::TooLarge {
                    structure,
                    wanted,
                    max,
                });
            }
        }
        Ok(Self { entries, bytes })
    }

    /// The table as it is in the file.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in &self.entries {
            entry.encode(&mut bytes);
        }
        bytes
    }

    /// The entry that has this id, or else the first one that has this name.
    pub(crate) fn find(&self, name: &str) -> Result<usize, Error> {
        let bytes = name.as_bytes();
        let by_id = self.entries.iter().position(|entry| entry.id == bytes);
        by_id
            .or_else(|| self.entries.iter().position(|entry| entry.name == bytes))
            .ok_or_else(|| no_such(bytes))
    }

    /// The highest number that is an id, plus 1; if there is no such number, one that is no id.
    pub(crate) fn next_id(&self) -> u64 {
        let id = |entry: &SnapshotEntry| std::str::from_utf8(&entry.id).ok()?.parse::<u64>().ok();
        let used = || self.entries.iter().filter_map(id);
        used()
            .max()
            .unwrap_or_default()
            .checked_add(1)
            .or_else(|| (1..).find(|number| used().all(|id| id != *number)))
            .unwrap_or_default()
    }
}

impl SnapshotEntry {
    /// An entry with all the extra data that is known.
    pub(crate) fn new(
        new: &NewSnapshot<'_>,
        (id, serial): (u64, u64),
        l1_offset: u64,
        l1_entries: u32,
        disk_bytes: u64,
    ) -> Self {
        let icount = new.icount.unwrap_or(NO_ICOUNT);
        let extra = [new.vm_state_bytes, disk_bytes, icount];
        Self {
            l1_offset,
            l1_entries,
            date_seconds: new.date.0,
            date_nanoseconds: new.date.1,
            guest_nanoseconds: new.guest_nanoseconds,
            vm_state_bytes: new.vm_state_bytes,
            disk_bytes: Some(disk_bytes),
            extra: crate::bytes::table(&extra),
            id: id.to_string().into_bytes(),
            name: new.name.as_bytes().to_vec(),
            serial,
        }
    }

    /// How many instructions the guest had run, if they were counted.
    #[must_use]
    pub fn icount(&self) -> Option<u64> {
        let known = (self.extra.len() >= 24).then(|| be64(&self.extra, 16));
        known.filter(|icount| *icount != NO_ICOUNT)
    }

    fn padded_bytes(&self) -> u64 {
        let bytes = ENTRY_BYTES + self.extra.len() + self.id.len() + self.name.len();
        bytes.next_multiple_of(8) as u64
    }

    fn encode(&self, bytes: &mut Vec<u8>) {
        let length = |part: &[u8]| u16::try_from(part.len()).unwrap_or(u16::MAX).to_be_bytes();
        let mut fixed = [0; ENTRY_BYTES];
        put64(&mut fixed, 0, self.l1_offset);
        put32(&mut fixed, 8, self.l1_entries);
        put(&mut fixed, 12, &length(&self.id));
        put(&mut fixed, 14, &length(&self.name));
        put32(&mut fixed, 16, self.date_seconds);
        put32(&mut fixed, 20, self.date_nanoseconds);
        put64(&mut fixed, 24, self.guest_nanoseconds);
        let low = u32::try_from(self.vm_state_bytes).unwrap_or_default();
        put32(&mut fixed, 32, low);
        let extra = u32::try_from(self.extra.len()).unwrap_or(u32::MAX);
        put32(&mut fixed, 36, extra);
        for part in [&fixed, self.extra.as_slice(), &self.id, &self.name] {
            bytes.extend_from_slice(part);
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }

    fn parse(fixed: &[u8], extra: Vec<u8>, id: Vec<u8>, name: Vec<u8>) -> Self {
        Self {
            l1_offset: be64(fixed, 0),
            l1_entries: be32(fixed, 8),
            date_seconds: be32(fixed, 16),
            date_nanoseconds: be32(fixed, 20),
            guest_nanoseconds: be64(fixed, 24),
            vm_state_bytes: match extra.len() >= 8 {
                true => be64(&extra, 0),
                false => u64::from(be32(fixed, 32)),
            },
            disk_bytes: (extra.len() >= 16).then(|| be64(&extra, 8)),
            extra,
            id,
            name,
            serial: 0,
        }
    }

    fn check(&self, header: &Header, at: u64, file_end: u64) -> Result<(), Error> {
        let bytes = u64::from(self.l1_entries).saturating_mul(8);
        let problem = if bytes > L1_BYTES_MAX {
            format!(
                "its L1 table has {} entries, more than 2^22",
                self.l1_entries
            )
        } else if self.l1_offset >= HOST_BYTES_MAX || !header.geometry.is_aligned(self.l1_offset) {
            format!(
                "its L1 table is at byte {}, where no cluster starts",
                self.l1_offset
            )
        } else if self.l1_offset.saturating_add(bytes) > file_end {
            format!(
                "its L1 table at byte {} reaches past the end of the file",
                self.l1_offset
            )
        } else {
            return Ok(());
        };
        Err(Error::corrupt("snapshot table entry", at, problem))
    }
}
