//! The sending owner of the `block` section.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use vmferry_buffer::{Buffer, Pool, is_zero};
use vmferry_disk::{CHUNK_BYTES, Chunk, Claim, Claimer, DiskError, ExtentKind};
use vmferry_savevm::{
    GuestStopped, HandlerError, Pending, PostcopyHandler, Progress, SaveHandler, Sink,
};
use vmferry_stream::{BlockChunk, Encoder, Name, Record, SECTOR_BYTES, Sector};

use crate::reads::{Finished, Reads};
use crate::schedule::{
    Content, DirtyView, DiskIndex, Frame, Left, RunKind, Schedule, Ticket, Work, chunk_runs,
};

/// Memory for chunks that were read and not sent, by default.
const BUFFER_BUDGET_BYTES: usize = 64 << 20;

/// A PART is ended after this many bytes, so that commands are heard.
const PART_BYTES_MAX: u64 = 16 << 20;

/// A PART is also ended after this many frames: zero blocks are short, and a guest can make them
/// faster than they are sent.
const PART_FRAMES_MAX: u32 = 4096;

/// A PART is also ended after this many allocation queries: what lies below makes no frames.
const PART_QUERIES_MAX: u32 = 64;

/// Extents that one allocation query looks at; a fragmented disk is asked again.
const EXTENTS_MAX: usize = 512;

/// How long an iteration waits for a read before it gives the turn back.
const PATIENCE: Duration = Duration::from_millis(20);

/// How to migrate.
#[derive(Clone, Copy, Debug)]
pub struct SourceOptions {
    /// Send chunks that are all zero as zero blocks (QEMU's capability `zero-blocks`).
    pub zero_blocks: bool,
    /// Send only chunks of which any part is allocated in the disks' top layers, for a destination
    /// whose disks lie over the same bases (QEMU's `block-incremental`).
    pub incremental: bool,
    /// Memory for chunks in bytes.
    pub buffer_budget_bytes: usize,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            zero_blocks: true,
            incremental: false,
            buffer_budget_bytes: BUFFER_BUDGET_BYTES,
        }
    }
}

/// A disk cannot be migrated.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Nothing to do for a disk without content.
    #[error("disk '{disk}' has length 0")]
    Empty {
        /// Its name.
        disk: String,
    },
    /// The name does not fit the wire.
    #[error("disk name '{disk}' is {} bytes long: at most 255 are allowed", disk.len())]
    Name {
        /// The name.
        disk: String,
    },
    /// The wire has 54 bits for a sector number.
    #[error("disk '{disk}' is longer than a stream can say")]
    TooLong {
        /// Its name.
        disk: String,
    },
    /// A read failed.
    #[error("disk '{disk}': {source}")]
    Read {
        /// Its name.
        disk: String,
        /// What the disk said.
        source: DiskError,
    },
}

/// Figures that others watch while the source runs.
#[derive(Debug, Default)]
pub struct SourceStats {
    /// Sum of the disks' lengths in bytes.
    pub total_bytes: AtomicU64,
    /// Bytes of disk that the bulk phase has sent or passed over, holes included.
    pub bulk_bytes: AtomicU64,
    /// Bytes of disk that lie below the top layers, which the bulk phase has passed over.
    pub below_bytes: AtomicU64,
    /// Bytes of disk sent, every time a chunk was sent.
    pub sent_bytes: AtomicU64,
    /// Bytes of disk sent as zero blocks.
    pub zero_bytes: AtomicU64,
    /// Is the bulk phase over?
    pub bulk_over: AtomicBool,
    /// Passes over the dirty chunks.
    pub passes: AtomicU64,
}

/// Sends disks as the `block` section.
pub struct Source<R> {
    disks: Vec<Disk>,
    schedule: Schedule<Buffer>,
    pool: Pool,
    reads: R,
    options: SourceOptions,
    stats: Arc<SourceStats>,
    header: Vec<u8>,
}

struct Disk {
    name: Name,
    claimer: Claimer,
    bytes: u64,
}

struct Dirty<'a>(&'a [Disk]);

impl DirtyView for Dirty<'_> {
    fn next_dirty(&self, disk: DiskIndex, from: Chunk) -> Option<Chunk> {
        self.0.get(disk.0)?.claimer.node().dirty().next_dirty(from)
    }

    fn dirty_chunks(&self, disk: DiskIndex) -> u64 {
        self.0
            .get(disk.0)
            .map_or(0, |disk| disk.claimer.node().dirty().count())
    }
}

impl<R: Reads> Source<R> {
    /// Send these disks under their nodes' names.
    ///
    /// # Errors
    /// A disk of length 0, or a name that is longer than 255 bytes.
    pub fn new(
        claimers: Vec<Claimer>,
        reads: R,
        options: SourceOptions,
    ) -> Result<Self, SourceError> {
        let disks = claimers
            .into_iter()
            .map(Disk::new)
            .collect::<Result<Vec<_>, _>>()?;
        let lengths: Vec<u64> = disks.iter().map(|disk| disk.bytes).collect();
        let chunk_bytes = usize::try_from(CHUNK_BYTES).unwrap_or(usize::MAX);
        let stats = Arc::new(SourceStats::default());
        stats
            .total_bytes
            .store(lengths.iter().sum(), Ordering::Relaxed);
        Ok(Self {
            disks,
            schedule: Schedule::new(&lengths, options.buffer_budget_bytes / chunk_bytes),
            pool: Pool::new(chunk_bytes, options.buffer_budget_bytes.max(chunk_bytes)),
            reads,
            options,
            stats,
            header: Vec::with_capacity(600),
        })
    }

    /// Figures to watch.
    #[must_use]
    pub fn stats(&self) -> Arc<SourceStats> {
        Arc::clone(&self.stats)
    }

    /// Start whatever the schedule asks for, up to the first read that was done on the spot: its
    /// frame leaves while it is warm.
    fn start_work(&mut self, queries_left: &mut u32) -> Result<(), SourceError> {
        while let Some(work) = self.schedule.next_work(&Dirty(&self.disks)) {
            match work {
                Work::Query { disk, chunks } => {
                    let disk = &self.disks[disk.0];
                    let claim = disk.claimer.claim(chunks);
                    let runs = query(claim, disk.bytes, self.options.incremental);
                    self.stats.pass_over(&runs, disk.bytes);
                    self.schedule.queried(runs);
                    *queries_left = queries_left.saturating_sub(1);
                    if *queries_left == 0 {
                        return Ok(());
                    }
                }
                Work::Read {
                    disk,
                    chunk,
                    ticket,
                } => {
                    if self.read(disk, chunk, ticket)? {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Read at once what is in memory (true), else have it read.
    fn read(&mut self, disk: DiskIndex, chunk: Chunk, ticket: Ticket) -> Result<bool, SourceError> {
        let claim = self.disks[disk.0].claim(chunk);
        // The schedule never asks for more chunks than the pool has buffers.
        let Some(mut buffer) = self.pool.take() else {
            return Ok(false);
        };
        match self.reads.read_now(&claim, &mut buffer) {
            Some(Ok(())) => {
                self.read_done(ticket, buffer);
                Ok(true)
            }
            Some(Err(source)) => Err(self.read_error(disk, source)),
            None => {
                self.reads.submit(ticket, claim, buffer);
                Ok(false)
            }
        }
    }

    fn read_done(&mut self, ticket: Ticket, buffer: Buffer) {
        let content = if self.options.zero_blocks && is_zero(&buffer) {
            Content::Zero
        } else {
            Content::Data(buffer)
        };
        self.schedule.read_done(ticket, content);
    }

    fn collect(&mut self, patience: Duration) -> Result<(), SourceError> {
        let mut patience = patience;
        while let Some(Finished { ticket, result }) = self.reads.finished(patience) {
            match result {
                Ok(buffer) => self.read_done(ticket, buffer),
                Err(source) => {
                    let disk = self.schedule.disk_of(ticket).unwrap_or(DiskIndex(0));
                    return Err(self.read_error(disk, source));
                }
            }
            patience = Duration::ZERO;
        }
        Ok(())
    }

    fn read_error(&self, disk: DiskIndex, source: DiskError) -> SourceError {
        let disk = self.disks[disk.0].claimer.node().name().to_owned();
        SourceError::Read { disk, source }
    }

    fn send(&mut self, frame: &Frame<Buffer>, sink: &mut dyn Sink) -> Result<u64, HandlerError> {
        let disk = &self.disks[frame.disk.0];
        let device = disk.name.clone();
        let chunk_bytes = frame.chunk.length_bytes(disk.bytes) as u64;
        let start = match frame.content {
            Content::Data(_) => frame.chunk.start_bytes() - disk.lead_bytes(frame.chunk),
            Content::Zero => frame.chunk.start_bytes(),
        };
        let sector = Sector::at_byte(start).ok_or_else(|| SourceError::TooLong {
            disk: device.to_string(),
        })?;
        self.header.clear();
        if let Some(percent) = frame.progress {
            self.encode(BlockChunk::Progress { percent });
        }
        let wire_bytes = match &frame.content {
            Content::Data(buffer) => {
                self.encode(BlockChunk::Data { sector, device });
                sink.put(&[&self.header, buffer])?;
                self.header.len() + buffer.len()
            }
            Content::Zero => {
                self.encode(BlockChunk::Zero { sector, device });
                sink.put(&[&self.header])?;
                self.stats
                    .zero_bytes
                    .fetch_add(chunk_bytes, Ordering::Relaxed);
                self.header.len()
            }
        };
        self.stats
            .sent_bytes
            .fetch_add(chunk_bytes, Ordering::Relaxed);
        if frame.bulk {
            self.stats
                .bulk_bytes
                .fetch_add(chunk_bytes, Ordering::Relaxed);
        }
        Ok(wire_bytes as u64)
    }

    fn encode(&mut self, chunk: BlockChunk) {
        // Only RAM records depend on what was sent before.
        Encoder::new(true).record(&Record::Block(chunk), &mut self.header);
    }

    fn publish(&self) {
        self.stats
            .bulk_over
            .store(self.schedule.bulk_over().is_some(), Ordering::Relaxed);
        self.stats
            .passes
            .store(self.schedule.dirty_passes(), Ordering::Relaxed);
    }

    fn end_of_section(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.header.clear();
        self.encode(BlockChunk::EndOfSection);
        sink.put(&[&self.header])
    }
}

impl<R: Reads> SaveHandler for Source<R> {
    fn is_active(&self) -> bool {
        true
    }

    fn setup(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError> {
        self.end_of_section(sink)
    }

    fn iterate(&mut self, sink: &mut dyn Sink) -> Result<Progress, HandlerError> {
        // Under a rate limit no more than this time slice allows, so that commands are heard.
        let part_bytes = PART_BYTES_MAX.min(sink.allowance().max(1));
        let is_full = |sent, frames| sent >= part_bytes || frames >= PART_FRAMES_MAX;
        let (mut sent, mut frames, mut queries_left) = (0, 0, PART_QUERIES_MAX);
        let progress = loop {
            self.collect(Duration::ZERO)?;
            self.start_work(&mut queries_left)?;
            while let Some(frame) = self.schedule.next_frame() {
                sent += self.send(&frame, sink)?;
                frames += 1;
                if is_full(sent, frames) {
                    break;
                }
            }
            if is_full(sent, frames) || queries_left == 0 {
                break Progress::Unfinished;
            }
            if self.schedule.is_idle(&Dirty(&self.disks)) {
                break Progress::Finished;
            }
            if self.schedule.waits_for_reads() {
                if sent > 0 {
                    break Progress::Unfinished;
                }
                self.collect(PATIENCE)?;
                if self.schedule.waits_for_reads() {
                    break Progress::Waiting;
                }
            }
        };
        self.publish();
        self.end_of_section(sink)?;
        Ok(progress)
    }

    fn pending(&mut self) -> Pending {
        match self.schedule.left(&Dirty(&self.disks)) {
            Left::Bulk { chunks } => Pending::Bulk {
                bytes: chunks * CHUNK_BYTES,
            },
            Left::Dirty { chunks } => {
                let bytes = chunks * CHUNK_BYTES;
                let read_time = match self.reads.bytes_per_second() {
                    Some(rate) => Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64),
                    None => Duration::ZERO,
                };
                Pending::Dirty {
                    bytes,
                    later_bytes: 0,
                    read_time,
                }
            }
        }
    }

    fn complete(
        &mut self,
        _stopped: &GuestStopped,
        sink: &mut dyn Sink,
    ) -> Result<(), HandlerError> {
        while !self.schedule.is_idle(&Dirty(&self.disks)) {
            sink.check()?;
            self.collect(if self.schedule.waits_for_reads() {
                PATIENCE
            } else {
                Duration::ZERO
            })?;
            // The bulk phase is over: nothing is queried.
            self.start_work(&mut 0)?;
            while let Some(frame) = self.schedule.next_frame() {
                self.send(&frame, sink)?;
            }
        }
        self.publish();
        self.header.clear();
        self.encode(BlockChunk::Progress { percent: 100 });
        self.encode(BlockChunk::EndOfSection);
        sink.put(&[&self.header])
    }

    /// A guest's disk must be whole before the guest runs.
    fn postcopy(&mut self) -> Option<&mut dyn PostcopyHandler> {
        None
    }

    fn cleanup(&mut self) {
        while self.schedule.reads_in_flight() > 0 {
            match self.reads.finished(Duration::from_secs(1)) {
                Some(Finished { ticket, .. }) => self.schedule.read_done(ticket, Content::Zero),
                None => break,
            }
        }
    }
}

impl Disk {
    fn new(claimer: Claimer) -> Result<Self, SourceError> {
        let node = claimer.node();
        let disk = node.name().to_owned();
        let bytes = node.limits().length;
        if bytes == 0 {
            return Err(SourceError::Empty { disk });
        }
        let name = Name::new(&disk).map_err(|_| SourceError::Name { disk })?;
        Ok(Self {
            name,
            bytes,
            claimer,
        })
    }

    fn claim(&self, chunk: Chunk) -> Claim {
        self.claimer
            .claim_with_lead(chunk.0..chunk.0 + 1, self.lead_bytes(chunk))
    }

    /// Bytes before the chunk that its block begins with.
    ///
    /// The last block of a disk whose length is no multiple of 1 MiB ends with the disk: a QEMU 7.2
    /// destination fails on data that reaches past the end (it writes the padding too). A disk of
    /// less than 1 MiB has no such room, and its padding stays at the end.
    fn lead_bytes(&self, chunk: Chunk) -> u64 {
        let on_disk = chunk.length_bytes(self.bytes) as u64;
        let sectors_bytes = on_disk.next_multiple_of(SECTOR_BYTES);
        match chunk.0 {
            0 => 0,
            _ => CHUNK_BYTES - sectors_bytes,
        }
    }
}

impl SourceStats {
    /// Count what of these runs is not sent.
    fn pass_over(&self, runs: &[(Range<u64>, RunKind)], disk_bytes: u64) {
        let below = runs.iter().filter(|(_, kind)| *kind == RunKind::Below);
        let bytes = |chunk: u64| Chunk(chunk).start_bytes().min(disk_bytes);
        let bytes: u64 = below
            .map(|(run, _)| bytes(run.end) - bytes(run.start))
            .sum();
        self.below_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.bulk_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Ask what of the claim is allocated, and in the top layer if that matters.
fn query(mut claim: Claim, disk_bytes: u64, incremental: bool) -> Vec<(Range<u64>, RunKind)> {
    let chunks = claim.chunks();
    let bytes = claim.bytes();
    let mut offset = bytes.start;
    let mut extents = Vec::new();
    while offset < bytes.end && extents.len() < EXTENTS_MAX {
        let (length, kind) = look_at(&claim, offset, incremental);
        extents.push((length, kind));
        offset = offset.saturating_add(length);
    }
    let mut runs = chunk_runs(chunks.clone(), disk_bytes, extents);
    if runs.is_empty() {
        // A chunk of more extents than we look at is not worth the trouble: read it.
        runs.push((chunks.start..chunks.start + 1, RunKind::Data));
    }
    let covered = runs.last().map_or(0, |(run, _)| run.end - chunks.start);
    let _looked_at = claim.split_front(covered);
    claim.put_back();
    runs
}

/// The run of bytes at `offset`. A query that fails counts as allocated: the read will tell.
fn look_at(claim: &Claim, offset: u64, incremental: bool) -> (u64, RunKind) {
    let mut left = claim.bytes().end - offset;
    if incremental && let Ok(allocation) = claim.allocation(offset) {
        if !allocation.is_own {
            return (allocation.length, RunKind::Below);
        }
        left = allocation.length;
    }
    match claim.extent(offset) {
        Ok(extent) if extent.kind == ExtentKind::Data => (extent.length.min(left), RunKind::Data),
        Ok(extent) => (extent.length.min(left), RunKind::Zero),
        Err(_) => (left, RunKind::Data),
    }
}
