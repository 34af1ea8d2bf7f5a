//! Counts of what `block` and `dirty-bitmap` sections hold.

use vmferry_stream::{BLOCK_BYTES, BitmapFlags, BitmapRecord, BlockChunk, Name, Sector};

use crate::limits::REPORT_NAMES_MAX;

/// A disk in `block` sections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSummary {
    /// Its name.
    pub name: Name,
    /// Chunks of 1 MiB with data.
    pub data_chunks: u64,
    /// Chunks of 1 MiB that are zero.
    pub zero_chunks: u64,
    /// Where the last chunk ends: at least the disk's length, rounded up to a chunk.
    pub end_bytes: u64,
}

/// A bitmap in `dirty-bitmap` sections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapSummary {
    /// Node or device name.
    pub node: Name,
    /// Its name.
    pub name: Name,
    /// Bytes of disk for one bit; `None` if it was never started.
    pub granularity_bytes: Option<u32>,
    /// Its flags.
    pub flags: BitmapFlags,
    /// Chunks with bits.
    pub chunks: u64,
    /// Chunks of nothing but zeroes.
    pub zero_chunks: u64,
    /// Bits that are set.
    pub bits_set: u64,
    /// It came to its end.
    pub is_complete: bool,
}

/// Counts of all disks.
#[derive(Debug, Default)]
pub(crate) struct Disks(pub(crate) Vec<DiskSummary>);

impl Disks {
    /// Count a chunk; `false` if it is of one disk too many.
    pub(crate) fn count(&mut self, chunk: &BlockChunk) -> bool {
        match chunk {
            BlockChunk::Data { sector, device } => {
                let Some(disk) = self.disk(device) else {
                    return false;
                };
                disk.data_chunks = disk.data_chunks.saturating_add(1);
                disk.reach(*sector);
            }
            BlockChunk::Zero { sector, device } => {
                let Some(disk) = self.disk(device) else {
                    return false;
                };
                disk.zero_chunks = disk.zero_chunks.saturating_add(1);
                disk.reach(*sector);
            }
            BlockChunk::Progress { .. } | BlockChunk::EndOfSection => {}
        }
        true
    }

    fn disk(&mut self, name: &Name) -> Option<&mut DiskSummary> {
        let place = self.0.iter().position(|disk| disk.name == *name);
        if place.is_none() && self.0.len() < REPORT_NAMES_MAX {
            self.0.push(DiskSummary {
                name: name.clone(),
                data_chunks: 0,
                zero_chunks: 0,
                end_bytes: 0,
            });
            return self.0.last_mut();
        }
        self.0.get_mut(place?)
    }
}

impl DiskSummary {
    fn reach(&mut self, sector: Sector) {
        let end = sector.start_byte().saturating_add(u64::from(BLOCK_BYTES));
        self.end_bytes = self.end_bytes.max(end);
    }
}

/// Counts of all bitmaps.
#[derive(Debug, Default)]
pub(crate) struct Bitmaps {
    pub(crate) all: Vec<BitmapSummary>,
    /// The one that payload is about.
    open: Option<usize>,
}

impl Bitmaps {
    /// Count a chunk; `false` if it is of one bitmap too many.
    pub(crate) fn count(&mut self, record: &BitmapRecord) -> bool {
        self.open = None;
        let (node, name) = match record {
            BitmapRecord::EndOfSection => return true,
            BitmapRecord::Start { node, bitmap, .. }
            | BitmapRecord::Bits { node, bitmap, .. }
            | BitmapRecord::ZeroBits { node, bitmap, .. }
            | BitmapRecord::Complete { node, bitmap } => (node, bitmap),
        };
        let mut places = self.all.iter();
        let place = places.position(|known| known.node == *node && known.name == *name);
        let place = place.unwrap_or(self.all.len());
        if place >= REPORT_NAMES_MAX {
            return false;
        }
        if place == self.all.len() {
            self.all.push(BitmapSummary {
                node: node.clone(),
                name: name.clone(),
                granularity_bytes: None,
                flags: BitmapFlags(0),
                chunks: 0,
                zero_chunks: 0,
                bits_set: 0,
                is_complete: false,
            });
        }
        let Some(bitmap) = self.all.get_mut(place) else {
            return false;
        };
        match record {
            BitmapRecord::Start {
                granularity_bytes,
                flags,
                ..
            } => {
                bitmap.granularity_bytes = Some(*granularity_bytes);
                bitmap.flags = *flags;
            }
            BitmapRecord::Bits { .. } => {
                bitmap.chunks = bitmap.chunks.saturating_add(1);
                self.open = Some(place);
            }
            BitmapRecord::ZeroBits { .. } => {
                bitmap.zero_chunks = bitmap.zero_chunks.saturating_add(1);
            }
            BitmapRecord::Complete { .. } => bitmap.is_complete = true,
            BitmapRecord::EndOfSection => {}
        }
        true
    }

    pub(crate) fn payload(&mut self, bytes: &[u8]) {
        if let Some(bitmap) = self.open.and_then(|place| self.all.get_mut(place)) {
            let set: u64 = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
            bitmap.bits_set = bitmap.bits_set.saturating_add(set);
        }
    }
}
