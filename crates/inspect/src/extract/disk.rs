//! A disk that travelled in `block` sections.
//!
//! Chunks of 1 MiB come in any order and any number of times; the last one counts. The length of a
//! disk is not in the stream: the last chunk of a disk may reach past its end.

use std::collections::BTreeSet;
use std::fs::File;

use vmferry_stream::{BLOCK_BYTES, BlockChunk, Name, Record, Sector};

use super::canvas::{Canvas, is_zero};
use super::error::ExtractError;
use super::pages::{Page, Pages};
use crate::walk::{Event, VisitError, Visitor};

/// Names that are remembered for a list of choices.
const MAX_NAMES: usize = 64;
/// Unit in which is remembered what came: chunks need not be aligned, although QEMU's are.
const SLOT_BITS: u32 = 20;
/// Zeroes of this length in a chunk become a hole.
const HOLE_BYTES: usize = 64 << 10;

/// What became of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskReport {
    /// Its name; empty if it was given to QEMU with `-blockdev`: all such disks have that name, and
    /// they cannot be told apart.
    pub name: Name,
    /// Length of the image.
    pub length_bytes: u64,
    /// The length was given, not taken from the end of the last chunk.
    pub length_is_given: bool,
    /// Bytes of chunks that hold data.
    pub data_bytes: u64,
    /// Bytes of chunks that came as zeroes.
    pub zero_bytes: u64,
    /// Bytes that the stream did not carry; they are zero in the file.
    pub absent_bytes: u64,
}

/// Paints a disk into a file, in bounded memory.
#[derive(Debug)]
pub struct DiskImage {
    canvas: Canvas,
    wanted: Option<String>,
    given_bytes: Option<u64>,
    /// The disk that is painted.
    name: Option<Name>,
    names: BTreeSet<Name>,
    slots: Pages,
    regions: usize,
    /// End of the last chunk.
    end: u64,
    /// Where the chunk goes whose payload is on its way.
    incoming: Option<u64>,
    chunk: Vec<u8>,
}

impl DiskImage {
    /// Paint the disk of that name, or the only one, into `file`, which is empty. With a length of
    /// `given_bytes` nothing is painted past it.
    #[must_use]
    pub fn new(file: File, wanted: Option<String>, given_bytes: Option<u64>) -> Self {
        Self {
            canvas: Canvas::new(file),
            wanted,
            given_bytes,
            name: None,
            names: BTreeSet::new(),
            slots: Pages::default(),
            regions: 0,
            end: 0,
            incoming: None,
            chunk: Vec::new(),
        }
    }

    /// The stream is over, or as much of it as there is: the file with its final length, and what
    /// is in it. A chunk that was cut short is not.
    ///
    /// # Errors
    /// The wanted disk is not there, or the file cannot be written.
    pub fn finish(self) -> Result<(File, DiskReport), ExtractError> {
        let choices = || self.names.iter().map(|name| format!("'{name}'")).collect();
        let what = "disk";
        if self.wanted.is_none() && self.names.len() > 1 {
            let choices = choices();
            return Err(ExtractError::Ambiguous { what, choices });
        }
        let Some(name) = self.name else {
            return Err(match self.wanted {
                Some(name) if !self.names.is_empty() => ExtractError::NotFound {
                    what,
                    name,
                    choices: choices(),
                },
                _ => ExtractError::Absent("disk ('block' section)"),
            });
        };
        let length_bytes = self.given_bytes.unwrap_or(self.end);
        let file = self.canvas.finish(length_bytes)?;
        let (zero, data) = self.slots.counts();
        let bytes = |slots: u64| slots.saturating_mul(1 << SLOT_BITS).min(length_bytes);
        let zero_bytes = bytes(zero);
        let mut data_bytes = bytes(data).min(length_bytes.saturating_sub(zero_bytes));
        let mut absent_bytes = length_bytes.saturating_sub(zero_bytes.saturating_add(data_bytes));
        if self.slots.forgetful {
            data_bytes = data_bytes.saturating_add(std::mem::take(&mut absent_bytes));
        }
        let report = DiskReport {
            name,
            length_bytes,
            length_is_given: self.given_bytes.is_some(),
            data_bytes,
            zero_bytes,
            absent_bytes,
        };
        Ok((file, report))
    }

    /// A chunk of this disk starts at this sector: where it goes, if it is wanted.
    fn place(&mut self, device: &Name, sector: Sector) -> Result<Option<u64>, ExtractError> {
        if !self.names.contains(device) && self.names.len() < MAX_NAMES {
            self.names.insert(device.clone());
        }
        let is_wanted = match (&self.wanted, &self.name) {
            (Some(wanted), _) => *device == **wanted,
            (None, Some(name)) => name == device,
            (None, None) => true,
        };
        if !is_wanted {
            return Ok(None);
        }
        self.name = Some(device.clone());
        let start = sector.start_byte();
        let past = match self.given_bytes {
            Some(length) => start >= length,
            None => start
                .checked_add(BLOCK_BYTES.into())
                .is_none_or(|end| end > i64::MAX as u64),
        };
        if past {
            return Err(ExtractError::OutsideDisk {
                disk: device.clone(),
                offset: start,
                length: self.given_bytes.unwrap_or(i64::MAX as u64),
            });
        }
        self.end = self.end.max(start.saturating_add(BLOCK_BYTES.into()));
        Ok(Some(start))
    }

    /// The part of the chunk at `start` that is inside the disk.
    fn inside(&self, start: u64) -> u64 {
        let length = self.given_bytes.unwrap_or(u64::MAX);
        length.saturating_sub(start).min(BLOCK_BYTES.into())
    }

    fn zero(&mut self, start: u64) -> Result<(), ExtractError> {
        let bytes = self.inside(start);
        let (first, last) = slots(start, bytes);
        if (first..=last).any(|slot| self.slots.get(slot) == Page::Data) {
            self.canvas.zero(start, bytes)?;
        }
        for slot in first..=last {
            // What an unaligned chunk leaves of a slot may still hold data.
            let whole = slot << SLOT_BITS == start;
            let data = !whole && self.slots.get(slot) == Page::Data;
            self.slots.set(slot, data, &mut self.regions);
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), ExtractError> {
        let Some(start) = self.incoming else {
            return Ok(());
        };
        let whole = usize::try_from(BLOCK_BYTES).unwrap_or(usize::MAX);
        self.chunk.extend_from_slice(bytes);
        if self.chunk.len() < whole {
            return Ok(());
        }
        self.incoming = None;
        let inside = usize::try_from(self.inside(start)).unwrap_or(whole);
        let chunk = self.chunk.get(..inside).unwrap_or(&self.chunk);
        if is_zero(chunk) {
            return self.zero(start);
        }
        let (first, last) = slots(start, self.inside(start));
        let is_over_data = (first..=last).any(|slot| self.slots.get(slot) == Page::Data);
        let mut at = start;
        for part in chunk.chunks(HOLE_BYTES) {
            if is_over_data || !is_zero(part) {
                self.canvas.write(at, part)?;
            }
            at = at.saturating_add(u64::try_from(part.len()).unwrap_or(u64::MAX));
        }
        for slot in first..=last {
            self.slots.set(slot, true, &mut self.regions);
        }
        Ok(())
    }
}

impl DiskImage {
    fn record(&mut self, record: &Record) -> Result<(), ExtractError> {
        self.incoming = None;
        self.chunk.clear();
        match record {
            Record::Block(BlockChunk::Data { sector, device }) => {
                self.incoming = self.place(device, *sector)?;
            }
            Record::Block(BlockChunk::Zero { sector, device }) => {
                if let Some(start) = self.place(device, *sector)? {
                    self.zero(start)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// The first and the last slot of a range that is not empty.
fn slots(start: u64, bytes: u64) -> (u64, u64) {
    let last = start.saturating_add(bytes.saturating_sub(1));
    (start >> SLOT_BITS, last >> SLOT_BITS)
}

impl Visitor for DiskImage {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Record(_, record) => Ok(self.record(record)?),
            Event::Payload(_, bytes) => Ok(self.take(bytes)?),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    const MIB: u64 = 1 << 20;

    struct Painter(DiskImage);

    impl Painter {
        fn new(wanted: Option<&str>, size: Option<u64>) -> Self {
            let file = tempfile::tempfile().unwrap();
            Self(DiskImage::new(file, wanted.map(Into::into), size))
        }

        fn chunk(&mut self, chunk: BlockChunk) -> Result<(), String> {
            let told = self.0.event(Event::Record(0, &Record::Block(chunk)));
            told.map_err(|error| error.to_string())
        }

        fn data(&mut self, device: &str, start: u64, byte: u8) -> Result<(), String> {
            self.chunk(BlockChunk::Data {
                sector: Sector::at_byte(start).unwrap(),
                device: Name::new(device).unwrap(),
            })?;
            for piece in vec![byte; 1 << 20].chunks(300_000) {
                self.0.event(Event::Payload(0, piece)).unwrap();
            }
            Ok(())
        }

        fn zero(&mut self, device: &str, start: u64) -> Result<(), String> {
            self.chunk(BlockChunk::Zero {
                sector: Sector::at_byte(start).unwrap(),
                device: Name::new(device).unwrap(),
            })
        }

        fn finish(self) -> (Vec<u8>, File, DiskReport) {
            let (file, report) = self.0.finish().unwrap();
            let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
            file.read_exact_at(&mut bytes, 0).unwrap();
            (bytes, file, report)
        }
    }

    fn mebibytes(bytes: &[u8]) -> Vec<u8> {
        let chunks = bytes.chunks(1 << 20);
        chunks
            .map(|chunk| {
                assert!(chunk.iter().all(|byte| *byte == chunk[0]));
                chunk[0]
            })
            .collect()
    }

    #[test]
    fn the_last_of_a_chunks_contents_counts() {
        let mut disk = Painter::new(None, None);
        disk.data("d", 2 * MIB, 1).unwrap();
        disk.data("d", 0, 2).unwrap();
        disk.data("d", 0, 3).unwrap();
        disk.zero("d", 2 * MIB).unwrap();
        disk.zero("d", 3 * MIB).unwrap();
        disk.data("d", 3 * MIB, 4).unwrap();
        disk.chunk(BlockChunk::Progress { percent: 100 }).unwrap();
        disk.zero("d", 5 * MIB).unwrap();
        let (bytes, _, report) = disk.finish();
        assert_eq!(mebibytes(&bytes), [3, 0, 0, 4, 0, 0]);
        let found = (report.data_bytes, report.zero_bytes, report.absent_bytes);
        assert_eq!(found, (2 * MIB, 2 * MIB, 2 * MIB));
        assert!(!report.length_is_given);
    }

    #[test]
    fn nothing_is_painted_past_a_length_that_is_given() {
        let mut disk = Painter::new(None, Some(MIB + 512));
        disk.data("d", MIB, 1).unwrap();
        assert_eq!(
            disk.data("d", 2 * MIB, 1).unwrap_err(),
            "a chunk at byte 2097152 of disk 'd' is past its end: it has 1049088 bytes"
        );
        let (bytes, _, report) = disk.finish();
        assert_eq!(bytes.len(), (1 << 20) + 512);
        assert_eq!(bytes[1 << 20..], [1; 512]);
        assert_eq!(report.length_bytes, MIB + 512);
        assert!(report.length_is_given);
    }

    #[test]
    fn chunks_that_are_not_aligned_overlap_as_they_come() {
        let mut disk = Painter::new(None, None);
        disk.data("d", 0, 1).unwrap();
        disk.data("d", MIB, 2).unwrap();
        disk.zero("d", 512).unwrap();
        disk.zero("d", MIB).unwrap();
        let (bytes, ..) = disk.finish();
        assert_eq!(bytes, [vec![1; 512], vec![0; (2 << 20) - 512]].concat());
    }

    #[test]
    fn one_disk_of_several_has_to_be_named() {
        let mut disk = Painter::new(None, None);
        disk.zero("a", 0).unwrap();
        disk.zero("b", 0).unwrap();
        let error = disk.0.finish().map(|_| ()).unwrap_err();
        assert!(
            matches!(&error, ExtractError::Ambiguous { choices, .. } if choices == &["'a'", "'b'"]),
            "{error:?}"
        );
        let mut disk = Painter::new(Some("b"), None);
        disk.data("a", 4 * MIB, 1).unwrap();
        disk.data("b", 0, 2).unwrap();
        assert_eq!(mebibytes(&disk.finish().0), [2]);
        let mut disk = Painter::new(Some("c"), None);
        disk.zero("a", 0).unwrap();
        assert!(matches!(
            disk.0.finish(),
            Err(ExtractError::NotFound { .. })
        ));
        let none = Painter::new(None, None);
        assert!(matches!(none.0.finish(), Err(ExtractError::Absent(_))));
    }

    #[test]
    fn zero_chunks_are_holes_and_half_a_chunk_is_none() {
        let mut disk = Painter::new(None, None);
        disk.zero("d", 1 << 40).unwrap();
        let half = BlockChunk::Data {
            sector: Sector::at_byte(0).unwrap(),
            device: Name::new("d").unwrap(),
        };
        disk.chunk(half).unwrap();
        disk.0.event(Event::Payload(0, &[1; 1 << 19])).unwrap();
        let (file, report) = disk.0.finish().unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), (1 << 40) + MIB);
        assert!(metadata.blocks() < 64);
        assert_eq!(report.zero_bytes, MIB);
    }

    #[test]
    fn zeroes_that_came_as_data_are_holes_unless_data_was_there() {
        let mut disk = Painter::new(None, None);
        for start in (0..64).map(|chunk| chunk * MIB) {
            disk.data("d", start, 0).unwrap();
        }
        disk.data("d", 5 * MIB, 1).unwrap();
        disk.data("d", 6 * MIB, 1).unwrap();
        disk.data("d", 6 * MIB, 0).unwrap();
        let (bytes, file, report) = disk.finish();
        assert!(bytes[5 << 20..6 << 20].iter().all(|byte| *byte == 1));
        assert!(bytes[6 << 20..].iter().all(|byte| *byte == 0));
        assert!(file.metadata().unwrap().blocks() * 512 <= 3 * MIB);
        assert_eq!((report.data_bytes, report.zero_bytes), (MIB, 63 * MIB));
    }

    #[test]
    fn a_chunk_past_the_longest_file_is_refused() {
        let mut disk = Painter::new(None, None);
        let last = i64::MAX as u64 - 511 - 512;
        assert!(disk.zero("d", last).is_err());
        assert!(disk.zero("d", last - MIB).is_ok());
    }
}
