//! The receiving owner of the `block` section.
//!
//! Chunks are written by one thread in the order of the stream, so that of several frames of one
//! chunk the last one wins. Write-back starts while more arrives, so that the sync at the end is
//! short. Neighbouring zero blocks are applied as one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmferry_buffer::{Buffer, Pool, is_zero};
use vmferry_disk::{CHUNK_BYTES, Chunk, DiskError, Filler, Limits};
use vmferry_savevm::{HandlerError, LoadHandler};
use vmferry_stream::{BLOCK_BYTES, BlockChunk, Name, Record, SECTOR_BYTES, Sector};

use crate::apply::{Applier, ApplyError, Operation, Syncer};

/// Figures that others watch while the destination works.
#[derive(Debug, Default)]
pub struct DestinationStats {
    /// Bytes of disk that have arrived, counted every time.
    pub arrived_bytes: AtomicU64,
    /// Bytes of disk that arrived as zero blocks.
    pub zero_bytes: AtomicU64,
    /// What the source says of its bulk phase.
    pub percent: AtomicU64,
    /// The section has ended; nothing more will come.
    pub ended: AtomicBool,
    /// Set by whoever knows that the source is one of ours. It pads the end of a disk with zeroes, so
    /// anything else there is data of a disk that is longer than the one here; and it does not end
    /// before its first pass has.
    pub source_is_ours: AtomicBool,
}

/// Memory for chunks that arrived and are not written, by default.
const BUFFER_BUDGET_BYTES: usize = 32 << 20;

/// Which blocks must come before a section may end.
///
/// The stream does not say it, so the person who receives has to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Coverage {
    /// All of them.
    #[default]
    Whole,
    /// Those that would not read as the bases do. The source sends only what is allocated in its
    /// disks' top layers (QEMU's `migrate -i`), and the disks here lie over the same bases: what
    /// does not come shows through. A fresh overlay owns nothing; whatever an earlier attempt has
    /// left in it must be overwritten, unless it says what the base says.
    Incremental,
}

/// A `block` section cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum DestinationError {
    /// The stream names a disk that is not here.
    #[error("the stream has a block of disk '{name}', which is not here (disks here: {here})")]
    UnknownDisk {
        /// The name in the stream.
        name: Name,
        /// The names here.
        here: String,
    },
    /// QEMU 7.2 sends every disk of a `-blockdev` under the empty name.
    #[error(
        "the stream has a block of a disk without a name: its source attached the disk with \
         -blockdev, where names do not travel (give it as -drive with an id)"
    )]
    Nameless,
    /// The same disk was given twice.
    #[error("two disks are named '{name}'")]
    Twice {
        /// The name.
        name: String,
    },
    /// The target cannot take anything.
    #[error("disk '{name}' has length 0")]
    Empty {
        /// The name.
        name: String,
    },
    /// The target must not be written.
    #[error("disk '{name}' is read-only")]
    ReadOnly {
        /// The name.
        name: String,
    },
    /// The source's disk is longer than the target.
    #[error(
        "disk '{name}': the block at byte {offset} lies beyond the end, the disk here is {length} \
         bytes long"
    )]
    BeyondEnd {
        /// The name.
        name: String,
        /// Where the block starts.
        offset: u64,
        /// How long the target is.
        length: u64,
    },
    /// The disks have different lengths.
    #[error(
        "disk '{name}': the block at byte {offset} {what}: the disk here is {length} bytes long, \
         the source's is not"
    )]
    OtherLength {
        /// The name.
        name: String,
        /// Where the block starts.
        offset: u64,
        /// What shows it.
        what: &'static str,
        /// How long the target is.
        length: u64,
    },
    /// Guests may use the disks by now.
    #[error("it goes on after its END")]
    Ended,
    /// The section ended early.
    #[error(
        "disk '{name}': {missing} of {total} blocks never arrived, first at byte {offset}; the \
         source ended its migration too early (QEMU's `migrate -b` does so unless its \
         downtime-limit is 0), or the disk here is longer than the source's, or the source sends \
         only top layers (incremental) and this side was not told"
    )]
    Incomplete {
        /// The name.
        name: String,
        /// Blocks that never came.
        missing: u64,
        /// Blocks of the disk.
        total: u64,
        /// Where the first missing one starts.
        offset: u64,
    },
    /// The target of an incremental migration has content of its own.
    #[error(
        "disk '{name}': {count} blocks never arrived that are not those of its base, first at byte \
         {offset}: an incremental migration fills an empty image over the source's base"
    )]
    NotBelow {
        /// The name.
        name: String,
        /// Blocks of the disk's own that never came.
        count: u64,
        /// Where the first one starts.
        offset: u64,
    },
    /// A QEMU has ended an incremental migration in the middle.
    #[error(
        "the source has ended its migration at {percent} % of its first pass, and what is missing \
         cannot be told from what shows through from the base (QEMU's `migrate -i` does so unless \
         its downtime-limit is 0)"
    )]
    EndedEarly {
        /// What it said last.
        percent: u8,
    },
    /// A disk could not be written.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// A record of another section.
    #[error("a record that does not belong into a block section: {0}")]
    Foreign(String),
}

/// Receives disks as the `block` section.
pub struct Destination {
    disks: Vec<Disk>,
    by_name: BTreeMap<String, usize>,
    pool: Pool,
    applier: Applier,
    /// Where the payload that is being read belongs.
    incoming: Option<Incoming>,
    zeroes: Option<Zeroes>,
    coverage: Coverage,
    /// What the source said last of its first pass, before it said that all is over.
    first_pass_percent: u8,
    last_percent: u8,
    stats: Arc<DestinationStats>,
}

struct Disk {
    name: String,
    filler: Filler,
    limits: Limits,
    arrived: Vec<u64>,
}

struct Incoming {
    disk: usize,
    offset: u64,
    buffer: Buffer,
}

struct Zeroes {
    disk: usize,
    offset: u64,
    end: u64,
}

impl Destination {
    /// Fill these disks, found by their nodes' names.
    ///
    /// # Errors
    /// Two disks of one name, one that is read-only or empty, or no thread to be had.
    pub fn new(fillers: Vec<Filler>, coverage: Coverage) -> Result<Self, DestinationError> {
        Self::with_applier(fillers, coverage, Applier::start)
    }

    /// Like [`Destination::new`], but without a thread: everything is written before the call
    /// returns that brought it. For whoever has to know when.
    ///
    /// # Errors
    /// As [`Destination::new`].
    pub fn without_thread(
        fillers: Vec<Filler>,
        coverage: Coverage,
    ) -> Result<Self, DestinationError> {
        let start = |fillers| Ok(Applier::without_thread(fillers));
        Self::with_applier(fillers, coverage, start)
    }

    fn with_applier(
        fillers: Vec<Filler>,
        coverage: Coverage,
        start: impl FnOnce(Vec<Filler>) -> Result<Applier, ApplyError>,
    ) -> Result<Self, DestinationError> {
        let mut by_name = BTreeMap::new();
        let mut disks = Vec::with_capacity(fillers.len());
        for (index, filler) in fillers.iter().enumerate() {
            let mut disk = Disk::new(filler)?;
            if coverage == Coverage::Incremental {
                disk.await_own();
            }
            if by_name.insert(disk.name.clone(), index).is_some() {
                return Err(DestinationError::Twice { name: disk.name });
            }
            disks.push(disk);
        }
        Ok(Self {
            disks,
            by_name,
            pool: Pool::new(BLOCK_BYTES as usize, BUFFER_BUDGET_BYTES),
            applier: start(fillers)?,
            incoming: None,
            zeroes: None,
            coverage,
            first_pass_percent: 0,
            last_percent: 0,
            stats: Arc::default(),
        })
    }

    /// Waits for what has arrived, and makes it durable. Works on while the handler is busy.
    #[must_use]
    pub fn syncer(&self) -> Syncer {
        self.applier.syncer()
    }

    /// Figures to watch.
    #[must_use]
    pub fn stats(&self) -> Arc<DestinationStats> {
        Arc::clone(&self.stats)
    }

    fn locate(&self, name: &Name, sector: Sector) -> Result<(usize, u64, u64), DestinationError> {
        if name.is_empty() && !self.by_name.contains_key("") {
            return Err(DestinationError::Nameless);
        }
        let Some(&index) = self.by_name.get(name.as_str()) else {
            let here = self
                .by_name
                .keys()
                .map(|n| format!("'{n}'"))
                .collect::<Vec<_>>();
            let here = if here.is_empty() {
                "none".to_owned()
            } else {
                here.join(", ")
            };
            return Err(DestinationError::UnknownDisk {
                name: name.clone(),
                here,
            });
        };
        let length = self.disks[index].limits.length;
        let offset = sector.start_byte();
        if offset >= length {
            let name = name.as_str().to_owned();
            return Err(DestinationError::BeyondEnd {
                name,
                offset,
                length,
            });
        }
        Ok((
            index,
            offset,
            offset.saturating_add(CHUNK_BYTES).min(length),
        ))
    }

    fn zero(&mut self, name: &Name, sector: Sector) -> Result<(), DestinationError> {
        let (disk, offset, end) = self.locate(name, sector)?;
        self.disks[disk].mark_arrived(offset..end);
        self.stats
            .arrived_bytes
            .fetch_add(end - offset, Ordering::Relaxed);
        self.stats
            .zero_bytes
            .fetch_add(end - offset, Ordering::Relaxed);
        match &mut self.zeroes {
            Some(zeroes) if zeroes.disk == disk && zeroes.end == offset => zeroes.end = end,
            _ => {
                self.apply_zeroes()?;
                self.zeroes = Some(Zeroes { disk, offset, end });
            }
        }
        Ok(())
    }

    fn apply_zeroes(&mut self) -> Result<(), DestinationError> {
        if let Some(Zeroes { disk, offset, end }) = self.zeroes.take() {
            self.applier.apply(Operation::Zero {
                disk,
                offset,
                length: end - offset,
            })?;
        }
        Ok(())
    }

    fn data(&mut self, name: &Name, sector: Sector) -> Result<(), DestinationError> {
        let (disk, offset, _) = self.locate(name, sector)?;
        self.apply_zeroes()?;
        let buffer = loop {
            // The applier gives buffers back even after it has failed.
            match self.pool.take() {
                Some(buffer) => break buffer,
                None => self.applier.check()?,
            }
        };
        self.incoming = Some(Incoming {
            disk,
            offset,
            buffer,
        });
        Ok(())
    }

    fn written(&mut self) -> Result<(), DestinationError> {
        if let Some(Incoming {
            disk,
            offset,
            buffer,
        }) = self.incoming.take()
        {
            let on_disk = self.disks[disk].limits.length - offset;
            let length = usize::try_from(on_disk)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            self.check_length(disk, offset, &buffer[length..])?;
            self.disks[disk].mark_arrived(offset..offset + length as u64);
            self.stats
                .arrived_bytes
                .fetch_add(length as u64, Ordering::Relaxed);
            self.applier.apply(Operation::Write {
                disk,
                offset,
                length,
                buffer,
            })?;
        }
        Ok(())
    }

    /// The wire carries no lengths, but a block that does not fit here tells that they differ.
    fn check_length(
        &self,
        disk: usize,
        offset: u64,
        past_end: &[u8],
    ) -> Result<(), DestinationError> {
        let disk = &self.disks[disk];
        let length = disk.limits.length;
        let ends_with_disk = offset + CHUNK_BYTES == length.next_multiple_of(SECTOR_BYTES);
        let what = if !offset.is_multiple_of(CHUNK_BYTES) && !ends_with_disk {
            "is the last one of its disk"
        } else if self.stats.source_is_ours.load(Ordering::Relaxed) && !is_zero(past_end) {
            "has data past the end"
        } else {
            return Ok(());
        };
        let name = disk.name.clone();
        Err(DestinationError::OtherLength {
            name,
            offset,
            what,
            length,
        })
    }

    fn take(&mut self, record: &Record) -> Result<(), DestinationError> {
        match record {
            Record::Block(BlockChunk::Data { sector, device }) => self.data(device, *sector),
            Record::Block(BlockChunk::Zero { sector, device }) => self.zero(device, *sector),
            Record::Block(BlockChunk::Progress { percent }) => {
                self.first_pass_percent = std::mem::replace(&mut self.last_percent, *percent);
                self.stats
                    .percent
                    .store(u64::from(*percent), Ordering::Relaxed);
                Ok(())
            }
            Record::Block(BlockChunk::EndOfSection) => self.apply_zeroes(),
            other => Err(DestinationError::Foreign(format!("{other:?}"))),
        }
    }

    fn check_complete(&mut self) -> Result<(), DestinationError> {
        if self.coverage == Coverage::Incremental {
            self.look_at_what_is_left()?;
        }
        for disk in &self.disks {
            let Some(Missing {
                count,
                total,
                offset,
            }) = disk.missing()
            else {
                continue;
            };
            let name = disk.name.clone();
            return Err(match self.coverage {
                Coverage::Whole => DestinationError::Incomplete {
                    name,
                    missing: count,
                    total,
                    offset,
                },
                Coverage::Incremental => DestinationError::NotBelow {
                    name,
                    count,
                    offset,
                },
            });
        }
        match self.coverage {
            Coverage::Whole => Ok(()),
            Coverage::Incremental => self.check_first_pass(),
        }
    }

    /// An earlier attempt may have written what this one has no need to send: it claims a chunk
    /// where it cannot ask whose it is, and the last block of an odd disk begins in the one before.
    fn look_at_what_is_left(&mut self) -> Result<(), DestinationError> {
        if self.disks.iter().all(|disk| disk.missing().is_none()) {
            return Ok(());
        }
        self.syncer().sync()?;
        for disk in &mut self.disks {
            let failed = |source| ApplyError::Disk {
                disk: disk.name.clone(),
                source: Arc::new(source),
            };
            let same = disk.same_as_below().map_err(failed)?;
            same.into_iter().for_each(|bytes| disk.mark_arrived(bytes));
        }
        Ok(())
    }

    /// A QEMU may end its migration while its first pass runs, and here nobody can count what is
    /// missing. It says how far its cursor is, up to the start of each disk's last block, and at the
    /// very end 100 %. Ours cannot end too early, and need not say how far it is.
    fn check_first_pass(&self) -> Result<(), DestinationError> {
        let ours = self.stats.source_is_ours.load(Ordering::Relaxed);
        let lengths = || self.disks.iter().map(|disk| disk.limits.length);
        let total: u128 = lengths().map(u128::from).sum();
        let last_blocks: u128 = lengths()
            .map(|length| u128::from(length.min(CHUNK_BYTES)))
            .sum();
        let percent = self.first_pass_percent;
        if ours || u128::from(percent) >= (total - last_blocks) * 100 / total.max(1) {
            return Ok(());
        }
        Err(DestinationError::EndedEarly { percent })
    }
}

impl LoadHandler for Destination {
    fn start(&mut self, _version: u32) -> Result<(), HandlerError> {
        Ok(())
    }

    fn record(&mut self, record: &Record) -> Result<(), HandlerError> {
        if self.stats.ended.load(Ordering::Acquire) {
            return Err(DestinationError::Ended.into());
        }
        self.applier.check()?;
        Ok(self.take(record)?)
    }

    fn payload(&mut self, length: usize) -> Result<&mut [u8], HandlerError> {
        let incoming = self
            .incoming
            .as_mut()
            .filter(|incoming| incoming.buffer.len() == length);
        match incoming {
            Some(incoming) => Ok(&mut incoming.buffer),
            None => Err(DestinationError::Foreign(format!("{length} bytes of payload")).into()),
        }
    }

    fn payload_filled(&mut self) -> Result<(), HandlerError> {
        Ok(self.written()?)
    }

    fn end(&mut self) -> Result<(), HandlerError> {
        self.apply_zeroes()?;
        self.check_complete()?;
        self.stats.ended.store(true, Ordering::Release);
        Ok(())
    }

    /// What runs for it ends when it is dropped.
    fn cleanup(&mut self) {}
}

impl Disk {
    fn new(filler: &Filler) -> Result<Self, DestinationError> {
        let node = filler.node();
        let (name, limits) = (node.name().to_owned(), node.limits());
        if limits.length == 0 {
            return Err(DestinationError::Empty { name });
        }
        if limits.read_only {
            return Err(DestinationError::ReadOnly { name });
        }
        let words = Chunk::count(limits.length).div_ceil(64);
        let arrived = vec![0; usize::try_from(words).unwrap_or(usize::MAX)];
        Ok(Self {
            name,
            filler: filler.clone(),
            limits,
            arrived,
        })
    }

    /// Mark the chunks that the range covers whole, up to the end of the disk.
    fn mark_arrived(&mut self, bytes: Range<u64>) {
        let first = bytes.start.div_ceil(CHUNK_BYTES);
        let end = match bytes.end >= self.limits.length {
            true => Chunk::count(self.limits.length),
            false => bytes.end / CHUNK_BYTES,
        };
        for chunk in first..end {
            if let Ok(word) = usize::try_from(chunk / 64)
                && let Some(word) = self.arrived.get_mut(word)
            {
                *word |= 1 << (chunk % 64);
            }
        }
    }

    /// Let everything count as arrived that shows through from below.
    fn await_own(&mut self) {
        let filler = self.filler.clone();
        let device = filler.device();
        let length = self.limits.length;
        let mut below = 0..0;
        while below.end < length {
            let offset = below.end;
            // A query that fails counts as its own: it must arrive.
            let (run, is_own) = match device.allocation(offset, length - offset) {
                Ok(allocation) => (allocation.length.max(1), allocation.is_own),
                Err(_) => (1, true),
            };
            let end = offset.saturating_add(run).min(length);
            below.end = end;
            if is_own {
                self.mark_arrived(below.start..offset);
                // The rest of the last chunk need not be looked at any more.
                let next = end.next_multiple_of(CHUNK_BYTES).min(length);
                below = next..next;
            }
        }
        self.mark_arrived(below);
    }

    fn is_missing(&self, chunk: u64) -> bool {
        let word = usize::try_from(chunk / 64)
            .ok()
            .and_then(|word| self.arrived.get(word));
        word.is_none_or(|word| word & 1 << (chunk % 64) == 0)
    }

    /// The missing blocks that read as what lies below does, up to the first that does not.
    fn same_as_below(&self) -> Result<Vec<Range<u64>>, DiskError> {
        let device = self.filler.device();
        let Some(below) = device.below() else {
            return Ok(Vec::new());
        };
        let length = self.limits.length;
        let below_length = below.limits().length;
        let (mut here, mut there) = (Vec::new(), Vec::new());
        let mut same = Vec::new();
        for chunk in (0..Chunk::count(length)).filter(|chunk| self.is_missing(*chunk)) {
            let start = Chunk(chunk).start_bytes();
            let on_disk = Chunk(chunk).length_bytes(length);
            here.resize(on_disk, 0);
            there.clear();
            there.resize(on_disk, 0);
            device.read_at(&mut here, start)?;
            let has = usize::try_from(below_length.saturating_sub(start)).unwrap_or(usize::MAX);
            let part = &mut there[..has.min(on_disk)];
            if !part.is_empty() {
                below.read_at(part, start)?;
            }
            if here != there {
                break;
            }
            same.push(start..start + on_disk as u64);
        }
        Ok(same)
    }

    /// What has not arrived.
    fn missing(&self) -> Option<Missing> {
        let total = Chunk::count(self.limits.length);
        let arrived: u64 = self
            .arrived
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
        if arrived >= total {
            return None;
        }
        let first = (0..total)
            .find(|chunk| self.is_missing(*chunk))
            .unwrap_or(0);
        Some(Missing {
            count: total - arrived,
            total,
            offset: Chunk(first).start_bytes(),
        })
    }
}

/// Blocks that never came.
struct Missing {
    count: u64,
    total: u64,
    /// Where the first one starts.
    offset: u64,
}

#[cfg(test)]
mod tests;
