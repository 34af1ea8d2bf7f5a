//! Persistent dirty bitmaps: kept, never updated.
//!
//! ```text
//! extension   0 number 4 │ 4 zero 4 │ 8 directory bytes 8 │ 16 directory offset 8
//! directory   0 table offset 8 │ 8 table entries 4 │ 12 flags 4 (0 in use, 1 auto) │ 16 type 1
//!             17 granularity bits 1 │ 18 name length 2 │ 20 extra length 4 │ extra │ name │ padding to 8
//! table       8-byte entries: 55..9 offset of a cluster of bits, 0 all bits are 1
//! ```
//!
//! The extension means something only while autoclear bit 0 is set. Before the first change of the
//! disk every bitmap that ought to record it (flag `auto`) is marked *in use*: whoever opens the
//! image next knows that it is not up to date. Bitmaps that record nothing stay valid. A directory
//! that is broken is dropped by clearing the bit, and unknown autoclear bits are cleared. The
//! directory and the tables are guarded like all tables, whatever refcounts say; the clusters of bits
//! are not.
#![deny(clippy::arithmetic_side_effects, clippy::cast_possible_truncation)]

use std::ops::Range;

use crate::bytes::{be16, be32, be64};
use crate::error::Error;
use crate::header::{BITMAPS, EXTENSION_BITMAPS, Header};
use crate::limits::{
    BITMAP_DIRECTORY_BYTES_MAX, BITMAP_NAME_BYTES_MAX, BITMAP_TABLE_BYTES_MAX, BITMAPS_MAX,
};
use crate::state::State;
use crate::storage::Storage;
use crate::types::Geometry;

const IN_USE: u32 = 1;
const AUTO: u32 = 1 << 1;
const ENTRY_BYTES: usize = 24;

/// A bitmap, as the directory describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Bytes of disk for each bit, as a power of two.
    pub granularity_bits: u8,
    /// It is not up to date.
    pub in_use: bool,
    /// It records changes.
    pub auto: bool,
    /// Where its table is.
    pub table_offset: u64,
    /// Entries of its table.
    pub table_entries: u32,
    /// Where its flags are.
    flags_offset: u64,
}

/// The bitmaps of an image, if it has any that mean something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapDirectory {
    /// Where it is.
    pub bytes: Range<u64>,
    /// Its entries.
    pub bitmaps: Vec<Bitmap>,
}

impl BitmapDirectory {
    /// Read the directory. What it says of tables is checked, the tables are not read.
    pub fn read(
        storage: &dyn Storage,
        header: &Header,
        file_end: u64,
    ) -> Result<Option<Self>, Error> {
        let Some(extension) = header.extension(EXTENSION_BITMAPS) else {
            return Ok(None);
        };
        if header.autoclear & BITMAPS == 0 {
            return Ok(None);
        }
        let broken = |problem| {
            Err(Error::corrupt(
                "bitmaps extension",
                extension.offset,
                problem,
            ))
        };
        let count = be32(&extension.data, 0);
        let length = be64(&extension.data, 8);
        let offset = be64(&extension.data, 16);
        if extension.data.len() < 24 {
            return broken(format!("it has {} bytes, not 24", extension.data.len()));
        }
        if count == 0 || count > BITMAPS_MAX {
            return broken(format!("{count} bitmaps, must be 1 to {BITMAPS_MAX}"));
        }
        if length > BITMAP_DIRECTORY_BYTES_MAX {
            return broken(format!("a directory of {length} bytes is too long"));
        }
        let end = offset.saturating_add(length);
        if !header.geometry.is_aligned(offset) || offset == 0 || end > file_end {
            return broken(format!("its directory can't be at byte {offset}"));
        }
        let mut directory = vec![0; usize::try_from(length).unwrap_or_default()];
        storage
            .read_at(&mut directory, offset)
            .map_err(Error::storage("read", "bitmap directory", offset))?;
        let mut bitmaps = Vec::new();
        let mut at = 0;
        for _ in 0..count {
            let (bitmap, next) = parse_entry(header, &directory, at, offset, file_end)?;
            bitmaps.push(bitmap);
            at = next;
        }
        Ok(Some(Self {
            bytes: offset..end,
            bitmaps,
        }))
    }

    /// Where it and its tables lie: clusters in runs, in order, apart from one another.
    fn clusters(&self, geometry: Geometry) -> Vec<Range<u64>> {
        let run = |offset, bytes| {
            let first = geometry.cluster_of(offset);
            first..first.saturating_add(geometry.clusters(bytes))
        };
        let length = self.bytes.end.saturating_sub(self.bytes.start);
        let mut runs = vec![run(self.bytes.start, length)];
        let tables = self.bitmaps.iter();
        runs.extend(tables.map(|bitmap| {
            run(
                bitmap.table_offset,
                u64::from(bitmap.table_entries).saturating_mul(8),
            )
        }));
        runs.retain(|run| !run.is_empty());
        runs.sort_unstable_by_key(|run| run.start);
        let mut apart: Vec<Range<u64>> = Vec::new();
        for run in runs {
            match apart.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => apart.push(run),
            }
        }
        apart
    }
}

fn parse_entry(
    header: &Header,
    directory: &[u8],
    at: usize,
    directory_offset: u64,
    file_end: u64,
) -> Result<(Bitmap, usize), Error> {
    let host = directory_offset.saturating_add(at as u64);
    let broken = |problem| Err(Error::corrupt("bitmap directory entry", host, problem));
    let entry = directory.get(at..).unwrap_or_default();
    let extra = be32(entry, 20);
    let name_length = be16(entry, 18);
    if extra > 0 {
        return broken(format!("{extra} bytes of unknown extra data"));
    }
    if name_length == 0 || name_length > BITMAP_NAME_BYTES_MAX {
        return broken(format!("a name of {name_length} bytes"));
    }
    let name_end = ENTRY_BYTES.saturating_add(usize::from(name_length));
    let Some(name) = entry.get(ENTRY_BYTES..name_end) else {
        return broken("it reaches past the end of the directory".to_owned());
    };
    let flags = be32(entry, 12);
    let bitmap = Bitmap {
        name: String::from_utf8_lossy(name).into_owned(),
        granularity_bits: entry.get(17).copied().unwrap_or_default(),
        in_use: flags & IN_USE != 0,
        auto: flags & AUTO != 0,
        table_offset: be64(entry, 0),
        table_entries: be32(entry, 8),
        flags_offset: host.saturating_add(12),
    };
    let table_bytes = u64::from(bitmap.table_entries).saturating_mul(8);
    let table_end = bitmap.table_offset.saturating_add(table_bytes);
    if table_bytes > BITMAP_TABLE_BYTES_MAX {
        return broken(format!("a table of {table_bytes} bytes is too long"));
    }
    if !header.geometry.is_aligned(bitmap.table_offset) || table_end > file_end {
        return broken(format!(
            "its table can't be at byte {}",
            bitmap.table_offset
        ));
    }
    if !(9..=31).contains(&bitmap.granularity_bits) {
        return broken(format!("granularity 2^{}", bitmap.granularity_bits));
    }
    Ok((bitmap, at.saturating_add(name_end.next_multiple_of(8))))
}

/// Mark what will not be right any more, durably. `all` is for a disk that changes its length.
pub(crate) fn mark_in_use(
    storage: &dyn Storage,
    header: &Header,
    file_end: u64,
    all: bool,
) -> Result<bool, Error> {
    let Some(directory) = BitmapDirectory::read(storage, header, file_end)? else {
        return Ok(false);
    };
    let mut marked = false;
    for bitmap in &directory.bitmaps {
        if bitmap.in_use || !(bitmap.auto || all) {
            continue;
        }
        let flags = IN_USE | if bitmap.auto { AUTO } else { 0 };
        storage
            .write_at(&flags.to_be_bytes(), bitmap.flags_offset)
            .map_err(Error::storage(
                "write",
                "bitmap directory",
                bitmap.flags_offset,
            ))?;
        marked = true;
    }
    Ok(marked)
}

/// Called once, before the first change.
pub(crate) fn before_first_change(storage: &dyn Storage, state: &mut State) -> Result<(), Error> {
    if state.header.autoclear == 0 {
        return Ok(());
    }
    let mut header = state.header.clone();
    header.autoclear &= BITMAPS;
    let marked = match mark_in_use(storage, &header, state.file_end, false) {
        Ok(marked) => {
            let directory = BitmapDirectory::read(storage, &header, state.file_end)?;
            state.bitmaps =
                directory.map_or_else(Vec::new, |directory| directory.clusters(state.geometry));
            marked
        }
        Err(error @ Error::Corrupt { .. }) => {
            tracing::warn!(%error, "the bitmaps of the image are dropped");
            header.autoclear = 0;
            false
        }
        Err(error) => return Err(error),
    };
    if header != state.header {
        header.write(storage)?;
    } else if !marked {
        return Ok(());
    }
    storage
        .flush()
        .map_err(Error::storage("flush", "header", 0))?;
    state.header = header;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Arc;

    use vmferry_disk::BlockDevice;

    use super::*;
    use crate::header::CORRUPT;
    use crate::{FileStorage, OpenOptions, Qcow2Disk};

    #[test]
    fn where_bitmaps_lie_is_said_once() {
        let bitmap = |table_offset, table_entries| Bitmap {
            name: "bitmap".into(),
            granularity_bits: 16,
            in_use: false,
            auto: true,
            table_offset,
            table_entries,
            flags_offset: 0,
        };
        let directory = BitmapDirectory {
            bytes: 9 << 16..(9 << 16) + 100,
            // One that touches another, one inside of it, one of no length at all.
            bitmaps: vec![
                bitmap(7 << 16, 8193),
                bitmap(3 << 16, 1),
                bitmap(8 << 16, 1),
                bitmap(20 << 16, 0),
            ],
        };
        let geometry = Geometry {
            version: 3,
            cluster_bits: 16,
            refcount_order: 4,
        };
        assert_eq!(directory.clusters(geometry), [3..4, 7..10]);
    }

    #[test]
    fn nothing_is_written_over_a_directory_that_has_no_refcount() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let qemu_img = |before: &[&str], after| {
            let mut command = Command::new("qemu-img");
            let status = command.args(before).arg(&path).arg(after).status();
            assert!(status.unwrap().success());
        };
        qemu_img(&["create", "-q", "-f", "qcow2"], "1M");
        qemu_img(&["bitmap", "--add"], "changes");
        let storage = FileStorage::open(&path, false, true).unwrap();
        let header = Header::read(&storage).unwrap();
        let file_end = storage.length().unwrap().next_multiple_of(1 << 16);
        let directory = BitmapDirectory::read(&storage, &header, file_end).unwrap();
        let place = directory.unwrap().bytes.start;
        let mut block = [0; 8];
        storage
            .read_at(&mut block, header.refcount_table_offset)
            .unwrap();
        let count = u64::from_be_bytes(block) + 2 * (place >> 16);
        storage.write_at(&[0; 2], count).unwrap();
        let mut before = [0; 64];
        storage.read_at(&mut before, place).unwrap();

        let storage: Arc<dyn Storage> = Arc::new(storage);
        let disk = Qcow2Disk::open(Arc::clone(&storage), OpenOptions::default(), None).unwrap();
        let error = disk.write_at(&[7; 1 << 16], 0).unwrap_err().to_string();
        assert!(error.contains("a table lies where"), "{error}");
        drop(disk);
        let header = Header::read(&*storage).unwrap();
        assert_ne!(header.incompatible & CORRUPT, 0);
        let mut after = [0; 64];
        storage.read_at(&mut after, place).unwrap();
        // The flags say that the bitmap is in use now; all else is as it was.
        after[12..16].copy_from_slice(&before[12..16]);
        assert_eq!(before, after);
    }
}
