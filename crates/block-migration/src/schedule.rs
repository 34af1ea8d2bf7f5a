//! What to read and what to send next: the source's state machine, without I/O.
//!
//! ```text
//!            next_work                        queried / read
//!   cursor ────────────▶ Query, Read ─ I/O ─────────────────▶ queue ── next_frame ──▶ wire
//! ```
//!
//! Every disk is walked once by its bulk cursor, disk after disk. Holes become runs of zero chunks
//! without being read; what a shared base holds is passed over, zeroes included. When every cursor has reached its end, dirty chunks are read, from the
//! first disk that has one. Frames leave in the order in which their reads were asked for, so a
//! chunk's older content can never follow a newer one; and a chunk is not read again before its
//! frame has left.
//!
//! The bulk phase and the dirty phase are different types: [`Bulk`] has no way to say "what is
//! left fits into the downtime", and [`BulkOver`] is made in one place, when the last cursor
//! arrives.
//!
//! Rules: `block-migration.md` §2 and §5 of the wire format notes.

use std::collections::VecDeque;
use std::ops::Range;

use vmferry_disk::{CHUNK_BYTES, Chunk};

/// Reads in flight at most.
pub const READS_MAX: usize = 16;

/// How far one allocation query looks, in chunks (4 GiB).
pub const QUERY_CHUNKS: u64 = 4096;

/// Position of a disk in the migration's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskIndex(pub usize);

/// Names one read; they are numbered in the order in which frames leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// I/O that the schedule asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Claim these chunks, ask what is allocated, answer with [`Schedule::queried`].
    Query {
        /// Which disk.
        disk: DiskIndex,
        /// Which chunks.
        chunks: Range<u64>,
    },
    /// Claim this chunk, read it, answer with [`Schedule::read_done`].
    Read {
        /// Which disk.
        disk: DiskIndex,
        /// Which chunk.
        chunk: Chunk,
        /// To be given back with the answer.
        ticket: Ticket,
    },
}

/// What a run of chunks holds, as far as an allocation query can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunKind {
    /// To be read.
    Data,
    /// Reads as zeroes.
    Zero,
    /// Shows through from below, where the destination has the same: not sent.
    Below,
}

/// Content of a chunk on its way to the wire.
#[derive(Debug, PartialEq, Eq)]
pub enum Content<B> {
    /// Data.
    Data(B),
    /// All zero.
    Zero,
}

/// A chunk that is to be sent now.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<B> {
    /// Which disk.
    pub disk: DiskIndex,
    /// Which chunk.
    pub chunk: Chunk,
    /// Its content.
    pub content: Content<B>,
    /// Is it the chunk's first frame?
    pub bulk: bool,
    /// The percentage of the bulk phase that this frame reaches, if it is a new one.
    pub progress: Option<u8>,
}

/// Looks at dirty bitmaps on the schedule's behalf.
pub trait DirtyView {
    /// First dirty chunk of the disk at or after `from`.
    fn next_dirty(&self, disk: DiskIndex, from: Chunk) -> Option<Chunk>;
    /// Number of dirty chunks of the disk.
    fn dirty_chunks(&self, disk: DiskIndex) -> u64;
}

/// What is left to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The bulk phase runs.
    Bulk {
        /// Chunks neither sent nor passed over, holes included.
        chunks: u64,
    },
    /// Every chunk was sent, is queued, or was passed over, once.
    Dirty {
        /// Chunks that still must go.
        chunks: u64,
    },
}

/// The state machine. `B` is a buffer that holds a chunk.
#[derive(Debug)]
pub struct Schedule<B> {
    disks: Vec<Disk>,
    phase: Phase,
    queue: VecDeque<Slot<B>>,
    next_ticket: u64,
    reads_in_flight: usize,
    /// Chunks in `queue` that have, or will have, a buffer.
    buffers: usize,
    buffers_max: usize,
    bulk_sent: u64,
    bulk_total: u64,
    percent: Option<u8>,
    /// Where the dirty phase looks next.
    cursor: (usize, Chunk),
    passes: u64,
}

#[derive(Debug)]
struct Disk {
    chunks: u64,
    /// One bit for each chunk whose read was asked for and whose frame has not left.
    in_flight: Vec<u64>,
}

#[derive(Debug)]
enum Phase {
    Bulk(Bulk),
    Dirty(BulkOver),
}

/// The cursor of the bulk phase.
#[derive(Debug)]
struct Bulk {
    disk: usize,
    next: u64,
    /// Runs that a query has found ahead of `next`, in order.
    known: VecDeque<(Range<u64>, RunKind)>,
    query_out: bool,
}

/// The cursors have reached the end of every disk.
#[derive(Debug)]
pub struct BulkOver(());

#[derive(Debug)]
enum Slot<B> {
    Reading {
        ticket: Ticket,
        disk: DiskIndex,
        chunk: Chunk,
        bulk: bool,
    },
    Ready {
        disk: DiskIndex,
        chunk: Chunk,
        content: Content<B>,
        bulk: bool,
    },
    ZeroRun {
        disk: DiskIndex,
        chunks: Range<u64>,
    },
}

impl<B> Schedule<B> {
    /// Migrate disks of these lengths in bytes, with at most `buffers_max` chunks in memory.
    #[must_use]
    pub fn new(disk_bytes: &[u64], buffers_max: usize) -> Self {
        let disks: Vec<Disk> = disk_bytes.iter().map(|&bytes| Disk::new(bytes)).collect();
        let bulk_total = disks.iter().map(|disk| disk.chunks).sum();
        let mut schedule = Self {
            disks,
            phase: Phase::Bulk(Bulk::at_disk(0)),
            queue: VecDeque::new(),
            next_ticket: 0,
            reads_in_flight: 0,
            buffers: 0,
            buffers_max: buffers_max.max(1),
            bulk_sent: 0,
            bulk_total,
            percent: None,
            cursor: (0, Chunk(0)),
            passes: 0,
        };
        schedule.advance_bulk();
        schedule
    }

    /// The next I/O to start, if there is room for it.
    pub fn next_work(&mut self, dirty: &dyn DirtyView) -> Option<Work> {
        match self.phase {
            Phase::Bulk(_) => self.next_bulk_work(),
            Phase::Dirty(_) => self.next_dirty_work(dirty),
        }
    }

    /// Answer to [`Work::Query`]: runs that follow one another from the query's first chunk on.
    /// They may end early; the rest is asked again.
    pub fn queried(&mut self, runs: impl IntoIterator<Item = (Range<u64>, RunKind)>) {
        if let Phase::Bulk(bulk) = &mut self.phase {
            bulk.query_out = false;
            bulk.known
                .extend(runs.into_iter().filter(|(chunks, _)| !chunks.is_empty()));
        }
    }

    /// Answer to [`Work::Read`].
    pub fn read_done(&mut self, ticket: Ticket, content: Content<B>) {
        let slot = self
            .queue
            .iter_mut()
            .find(|slot| matches!(slot, Slot::Reading { ticket: t, .. } if *t == ticket));
        if let Some(slot) = slot
            && let Slot::Reading {
                disk, chunk, bulk, ..
            } = *slot
        {
            self.reads_in_flight -= 1;
            if matches!(content, Content::Zero) {
                self.buffers -= 1;
            }
            *slot = Slot::Ready {
                disk,
                chunk,
                content,
                bulk,
            };
        }
    }

    /// The next chunk to send, if its data is there.
    pub fn next_frame(&mut self) -> Option<Frame<B>> {
        let (disk, chunk, content, bulk) = match self.queue.front_mut()? {
            Slot::Reading { .. } => return None,
            Slot::ZeroRun { disk, chunks } => {
                let (disk, chunk) = (*disk, Chunk(chunks.start));
                chunks.start += 1;
                if chunks.is_empty() {
                    self.queue.pop_front();
                }
                (disk, chunk, Content::Zero, true)
            }
            Slot::Ready { .. } => match self.queue.pop_front()? {
                Slot::Ready {
                    disk,
                    chunk,
                    content,
                    bulk,
                } => {
                    if matches!(content, Content::Data(_)) {
                        self.buffers -= 1;
                    }
                    (disk, chunk, content, bulk)
                }
                Slot::Reading { .. } | Slot::ZeroRun { .. } => return None,
            },
        };
        self.disks[disk.0].clear_in_flight(chunk);
        let progress = if bulk { self.count_bulk() } else { None };
        Some(Frame {
            disk,
            chunk,
            content,
            bulk,
            progress,
        })
    }

    /// Nothing is queued, nothing is dirty, and the bulk phase is over.
    pub fn is_idle(&self, dirty: &dyn DirtyView) -> bool {
        matches!(self.left(dirty), Left::Dirty { chunks: 0 })
    }

    /// The next frame is still being read.
    #[must_use]
    pub fn waits_for_reads(&self) -> bool {
        matches!(self.queue.front(), Some(Slot::Reading { .. }))
    }

    /// The disk of a read that is in flight.
    #[must_use]
    pub fn disk_of(&self, ticket: Ticket) -> Option<DiskIndex> {
        self.queue.iter().find_map(|slot| match slot {
            Slot::Reading {
                ticket: t, disk, ..
            } if *t == ticket => Some(*disk),
            _ => None,
        })
    }

    /// Reads that were asked for and not answered.
    #[must_use]
    pub fn reads_in_flight(&self) -> usize {
        self.reads_in_flight
    }

    /// Proof that the bulk phase of every disk is over.
    #[must_use]
    pub fn bulk_over(&self) -> Option<&BulkOver> {
        match &self.phase {
            Phase::Bulk(_) => None,
            Phase::Dirty(over) => Some(over),
        }
    }

    /// Chunks that the bulk phase has sent or passed over, and how many there are.
    #[must_use]
    pub fn bulk_chunks(&self) -> (u64, u64) {
        (self.bulk_sent, self.bulk_total)
    }

    /// How often the dirty phase has begun again from the first chunk.
    #[must_use]
    pub fn dirty_passes(&self) -> u64 {
        self.passes
    }

    /// What is left.
    pub fn left(&self, dirty: &dyn DirtyView) -> Left {
        match &self.phase {
            Phase::Bulk(_) => Left::Bulk {
                chunks: self.bulk_total - self.bulk_sent,
            },
            Phase::Dirty(_) => {
                let dirty: u64 = (0..self.disks.len())
                    .map(|disk| dirty.dirty_chunks(DiskIndex(disk)))
                    .sum();
                Left::Dirty {
                    chunks: dirty + self.queued_chunks(),
                }
            }
        }
    }

    fn queued_chunks(&self) -> u64 {
        let chunks = |slot: &Slot<B>| match slot {
            Slot::ZeroRun { chunks, .. } => chunks.end - chunks.start,
            Slot::Reading { .. } | Slot::Ready { .. } => 1,
        };
        self.queue.iter().map(chunks).sum()
    }

    fn room_to_read(&self) -> bool {
        self.reads_in_flight < READS_MAX && self.buffers < self.buffers_max
    }

    fn next_bulk_work(&mut self) -> Option<Work> {
        loop {
            let Phase::Bulk(bulk) = &mut self.phase else {
                return None;
            };
            let disk = DiskIndex(bulk.disk);
            let Some((run, kind)) = bulk.known.front_mut() else {
                return bulk.query(self.disks.get(bulk.disk)?.chunks);
            };
            match kind {
                RunKind::Below => {
                    self.bulk_sent += run.end - run.start;
                    bulk.next = run.end;
                    bulk.known.pop_front();
                    self.advance_bulk();
                    if matches!(self.phase, Phase::Dirty(_)) {
                        return None;
                    }
                }
                RunKind::Zero => {
                    let chunks = run.clone();
                    bulk.next = chunks.end;
                    bulk.known.pop_front();
                    self.disks[disk.0].set_in_flight(chunks.clone());
                    self.queue.push_back(Slot::ZeroRun { disk, chunks });
                    self.advance_bulk();
                    // The run is a frame already: the caller may send before it asks again.
                    if matches!(self.phase, Phase::Dirty(_)) {
                        return None;
                    }
                }
                RunKind::Data => {
                    let chunk = Chunk(run.start);
                    if !self.room_to_read() {
                        return None;
                    }
                    let Phase::Bulk(bulk) = &mut self.phase else {
                        return None;
                    };
                    bulk.take_data_chunk();
                    let work = self.read(disk, chunk, true);
                    self.advance_bulk();
                    return Some(work);
                }
            }
        }
    }

    /// The dirty chunk after the cursor. A chunk that is written all the time is sent once in a
    /// pass, so that the others get their turn.
    fn next_dirty_work(&mut self, dirty: &dyn DirtyView) -> Option<Work> {
        if !self.room_to_read() {
            return None;
        }
        let found = self.find_dirty(dirty).or_else(|| {
            let started = self.cursor != (0, Chunk(0));
            self.cursor = (0, Chunk(0));
            let found = self.find_dirty(dirty);
            self.passes += u64::from(started && found.is_some());
            found
        });
        let (disk, chunk) = found?;
        self.cursor = (disk.0, Chunk(chunk.0 + 1));
        Some(self.read(disk, chunk, false))
    }

    fn find_dirty(&mut self, dirty: &dyn DirtyView) -> Option<(DiskIndex, Chunk)> {
        let (first_disk, mut from) = self.cursor;
        for index in first_disk..self.disks.len() {
            while let Some(chunk) = dirty.next_dirty(DiskIndex(index), from) {
                if !self.disks[index].is_in_flight(chunk) {
                    return Some((DiskIndex(index), chunk));
                }
                from = Chunk(chunk.0 + 1);
            }
            from = Chunk(0);
        }
        None
    }

    fn read(&mut self, disk: DiskIndex, chunk: Chunk, bulk: bool) -> Work {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.reads_in_flight += 1;
        self.buffers += 1;
        self.disks[disk.0].set_in_flight(chunk.0..chunk.0 + 1);
        self.queue.push_back(Slot::Reading {
            ticket,
            disk,
            chunk,
            bulk,
        });
        Work::Read {
            disk,
            chunk,
            ticket,
        }
    }

    /// Go to the next disk where one is done; the only place that ends the bulk phase.
    fn advance_bulk(&mut self) {
        while let Phase::Bulk(bulk) = &mut self.phase {
            match self.disks.get(bulk.disk) {
                None => self.phase = Phase::Dirty(BulkOver(())),
                Some(disk) if bulk.next >= disk.chunks => *bulk = Bulk::at_disk(bulk.disk + 1),
                Some(_) => break,
            }
        }
    }

    fn count_bulk(&mut self) -> Option<u8> {
        self.bulk_sent += 1;
        let percent = u8::try_from(self.bulk_sent * 100 / self.bulk_total.max(1)).unwrap_or(100);
        if self.percent == Some(percent) {
            return None;
        }
        self.percent = Some(percent);
        self.percent
    }
}

impl Disk {
    fn new(bytes: u64) -> Self {
        let chunks = Chunk::count(bytes);
        let words = usize::try_from(chunks.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            chunks,
            in_flight: vec![0; words],
        }
    }

    fn set_in_flight(&mut self, chunks: Range<u64>) {
        for chunk in chunks {
            if let Some((word, bit)) = self.locate(Chunk(chunk)) {
                *word |= bit;
            }
        }
    }

    fn clear_in_flight(&mut self, chunk: Chunk) {
        if let Some((word, bit)) = self.locate(chunk) {
            *word &= !bit;
        }
    }

    fn is_in_flight(&mut self, chunk: Chunk) -> bool {
        self.locate(chunk)
            .is_some_and(|(word, bit)| *word & bit != 0)
    }

    fn locate(&mut self, chunk: Chunk) -> Option<(&mut u64, u64)> {
        let word = self
            .in_flight
            .get_mut(usize::try_from(chunk.0 / 64).ok()?)?;
        Some((word, 1 << (chunk.0 % 64)))
    }
}

impl Bulk {
    fn at_disk(disk: usize) -> Self {
        Self {
            disk,
            next: 0,
            known: VecDeque::new(),
            query_out: false,
        }
    }

    /// Ask about the chunks after the cursor, once.
    fn query(&mut self, chunks: u64) -> Option<Work> {
        if self.query_out {
            return None;
        }
        self.query_out = true;
        let end = self.next.saturating_add(QUERY_CHUNKS).min(chunks);
        Some(Work::Query {
            disk: DiskIndex(self.disk),
            chunks: self.next..end,
        })
    }

    fn take_data_chunk(&mut self) {
        if let Some((run, _)) = self.known.front_mut() {
            run.start += 1;
            self.next = run.start;
            if run.is_empty() {
                self.known.pop_front();
            }
        }
    }
}

/// Turn the extents of a claim into runs of whole chunks: a chunk of several kinds is data.
///
/// `extents` are (length in bytes, kind) from the first byte of `chunks` on. The answer ends with
/// the last chunk that the extents cover whole, or with the last chunk of the disk.
pub fn chunk_runs(
    chunks: Range<u64>,
    disk_bytes: u64,
    extents: impl IntoIterator<Item = (u64, RunKind)>,
) -> Vec<(Range<u64>, RunKind)> {
    let mut runs: Vec<(Range<u64>, RunKind)> = Vec::new();
    let mut position = Chunk(chunks.start).start_bytes();
    let mut chunk = chunks.start;
    let mut so_far = None;
    for (length, kind) in extents {
        let end = position.saturating_add(length).min(disk_bytes);
        while chunk < chunks.end {
            let chunk_end = (chunk + 1).saturating_mul(CHUNK_BYTES).min(disk_bytes);
            let mixed = so_far.is_some_and(|so_far| so_far != kind);
            let chunk_kind = if mixed { RunKind::Data } else { kind };
            if end < chunk_end {
                so_far = Some(chunk_kind);
                break;
            }
            push_run(&mut runs, chunk, chunk_kind);
            chunk += 1;
            so_far = None;
            if end == chunk_end {
                break;
            }
        }
        position = end;
    }
    runs
}

fn push_run(runs: &mut Vec<(Range<u64>, RunKind)>, chunk: u64, kind: RunKind) {
    match runs.last_mut() {
        Some((last, last_kind)) if *last_kind == kind && last.end == chunk => last.end = chunk + 1,
        _ => runs.push((chunk..chunk + 1, kind)),
    }
}

#[cfg(test)]
mod tests;
