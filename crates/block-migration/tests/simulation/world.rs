//! What goes on while a migration runs: guests write, reads take their time. One call of
//! [`World::tick`] is one step of the virtual clock; everything happens in the thread of the test.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use vmferry_block_migration::{Finished, READS_MAX, Reads, Ticket};
use vmferry_buffer::Buffer;
use vmferry_disk::{
    CHUNK_BYTES, Cached, Chunk, Claim, DiskError, Node, Refusal, Unmap, WritePermit,
};

use crate::checks;
use crate::disk::{Handle, SimDisk, failed};

pub(crate) fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A disk at the source, and what is known about its migration.
pub(crate) struct Side {
    pub(crate) disk: Arc<SimDisk>,
    pub(crate) node: Arc<Node>,
    /// What the frames so far amount to, in their order on the wire.
    pub(crate) shadow: Vec<u8>,
    /// Frames of each chunk so far.
    pub(crate) frames: Vec<u32>,
    /// Chunks that an allocation query has looked at.
    pub(crate) looked_at: Vec<bool>,
    /// Changes that guests have made through the device.
    pub(crate) changes: u64,
}

/// A read whose frame has not left, in the order of the asking.
pub(crate) struct OpenRead {
    pub(crate) disk: usize,
    pub(crate) chunk: u64,
    /// First byte of the block.
    pub(crate) start: u64,
    /// What it read, once it has ended.
    pub(crate) content: Option<Vec<(usize, u8)>>,
    number: u64,
    /// Its buffer was given back: the content is zero.
    zero: bool,
}

/// A read under way.
struct Reading {
    ticket: Ticket,
    number: u64,
    claim: Claim,
    buffer: Buffer,
    done: usize,
}

/// A guest that does one thing at a time.
enum Guest {
    Idle,
    Writing(Write),
}

pub(crate) struct Write {
    pub(crate) disk: usize,
    pub(crate) bytes: Range<u64>,
    permit: WritePermit,
    cells: Range<usize>,
    value: u8,
    /// It ends before this cell.
    stop_at: usize,
}

#[derive(Default)]
pub(crate) struct Figures {
    pub(crate) ticks: u64,
    pub(crate) writes: u64,
    pub(crate) refused: u64,
    pub(crate) frames: u64,
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) sides: Vec<Side>,
    pub(crate) open: VecDeque<OpenRead>,
    pub(crate) writes_left: u32,
    pub(crate) buffers_max: usize,
    pub(crate) zero_blocks: bool,
    /// The disks lie over bases that both ends have, and only what lies in them is sent.
    pub(crate) incremental: bool,
    pub(crate) figures: Figures,
    /// So many reads from now on, one fails.
    pub(crate) read_fails_in: Option<u32>,
    guests: Vec<Guest>,
    reading: Vec<Reading>,
    finished: Vec<Finished>,
    reads: u64,
    /// Where in a buffer cells may lie.
    offsets: BTreeSet<usize>,
}

impl World {
    pub(crate) fn new(mut rng: Rng) -> Arc<Mutex<Self>> {
        let incremental = rng.u8(..3) == 0;
        let sides: Vec<Side> = (0..rng.usize(1..=3))
            .map(|index| {
                let length = match rng.u8(..6) {
                    0 => rng.u64(1..2000),
                    1 => CHUNK_BYTES * rng.u64(1..5),
                    2 => CHUNK_BYTES * rng.u64(0..4) + 512 * rng.u64(1..2048),
                    _ => rng.u64(1..4 * CHUNK_BYTES),
                };
                let base = incremental.then(|| base(length, &mut rng));
                let disk = SimDisk::over(length, base);
                Side::new(&format!("disk{index}"), disk, &mut rng)
            })
            .collect();
        let guests = (0..rng.usize(0..4)).map(|_| Guest::Idle).collect();
        let world = Self {
            sides,
            open: VecDeque::new(),
            writes_left: rng.u32(0..40),
            buffers_max: 1,
            zero_blocks: true,
            incremental,
            figures: Figures::default(),
            read_fails_in: None,
            guests,
            reading: Vec::new(),
            finished: Vec::new(),
            reads: 0,
            offsets: BTreeSet::new(),
            rng,
        };
        let world = Arc::new(Mutex::new(world));
        for side in &lock(&world).sides {
            side.disk.attach(&world);
        }
        world
    }

    /// Forget what is known about a migration: another one begins.
    pub(crate) fn new_migration(&mut self) {
        self.open.clear();
        for side in &mut self.sides {
            match &side.disk.base {
                Some(base) => side.shadow = base.0.image(),
                None => side.shadow.fill(0),
            }
            side.frames.fill(0);
            side.looked_at.fill(false);
        }
    }

    /// Let a few steps of the clock go by.
    pub(crate) fn pass_time(world: &Mutex<Self>) {
        let mut world = lock(world);
        for _ in 0..world.rng.u8(..3) {
            world.tick();
        }
    }

    pub(crate) fn tick(&mut self) {
        self.figures.ticks += 1;
        for guest in 0..self.guests.len() {
            if self.rng.bool() {
                self.guests[guest] = match std::mem::replace(&mut self.guests[guest], Guest::Idle) {
                    Guest::Idle => self.begin_write(),
                    Guest::Writing(write) => self.go_on_writing(write),
                };
            }
        }
        if !self.reading.is_empty() && self.rng.bool() {
            let index = self.rng.usize(..self.reading.len());
            self.go_on_reading(index);
        }
        checks::after_every_step(self);
    }

    /// Writes that have begun and not ended.
    pub(crate) fn writes(&self) -> impl Iterator<Item = &Write> {
        self.guests.iter().filter_map(|guest| match guest {
            Guest::Idle => None,
            Guest::Writing(write) => Some(write),
        })
    }

    fn begin_write(&mut self) -> Guest {
        if self.writes_left == 0 || self.rng.u8(..4) == 0 {
            return Guest::Idle;
        }
        let disk = self.rng.usize(..self.sides.len());
        let side = &mut self.sides[disk];
        let first = self.rng.usize(..side.disk.cells.len());
        let last = (first + self.rng.usize(..4)).min(side.disk.cells.len() - 1);
        let bytes = side.disk.cells[first]..side.disk.cells[last] + 1;
        let permit = match side.node.begin_write(bytes.start, bytes.end - bytes.start) {
            Ok(permit) => permit,
            Err(refusal) => {
                assert!(matches!(refusal, Refusal::Held | Refusal::Departed));
                self.figures.refused += 1;
                return Guest::Idle;
            }
        };
        self.writes_left -= 1;
        self.figures.writes += 1;
        let cells = first..last + 1;
        let stop_at = match self.rng.u8(..6) {
            0 => self.rng.usize(cells.start..=cells.end),
            _ => cells.end,
        };
        match self.rng.u8(..8) {
            // In one piece, through the device, which may refuse.
            kind @ 0..3 => {
                side.changes += 1;
                if self.rng.u8(..8) == 0 {
                    side.disk.fail(1);
                }
                let _ = match kind {
                    0 => permit.discard(),
                    1 => permit.write_zeroes(Unmap::May, false),
                    _ if cells.len() == 1 => permit.write(&[self.rng.u8(1..)]),
                    _ => permit.write_zeroes(Unmap::Never, true),
                };
                side.disk.heal();
                Guest::Idle
            }
            _ => Guest::Writing(Write {
                disk,
                bytes,
                permit,
                cells,
                value: self.rng.u8(..),
                stop_at,
            }),
        }
    }

    /// Cell by cell; the last step tells the guest.
    fn go_on_writing(&mut self, mut write: Write) -> Guest {
        if write.cells.start == write.stop_at {
            drop(write.permit);
            return Guest::Idle;
        }
        let disk = &self.sides[write.disk].disk;
        disk.place(write.cells.start, write.value);
        write.cells.start += 1;
        Guest::Writing(write)
    }

    /// A piece of the block; the last step ends the read.
    fn go_on_reading(&mut self, index: usize) {
        let reading = &mut self.reading[index];
        let bytes = reading.claim.bytes();
        let length = usize::try_from(bytes.end - bytes.start).expect("small");
        if reading.done < length {
            let piece = self.rng.usize(1..=CHUNK_BYTES as usize);
            let end = (reading.done + piece).min(length);
            let cached = reading
                .claim
                .read_cached(reading.done as u64, &mut reading.buffer[reading.done..end]);
            assert!(matches!(cached, Ok(Cached::Hit(n)) if n == end - reading.done));
            reading.done = end;
            return;
        }
        let reading = self.reading.swap_remove(index);
        self.end_reading(reading, length);
    }

    fn end_reading(&mut self, reading: Reading, length: usize) {
        if self.read_fault_is_due() {
            let bytes = reading.claim.bytes();
            self.finished.push(Finished {
                ticket: reading.ticket,
                result: Err(failed("read", bytes.start, bytes.end - bytes.start)),
            });
            return;
        }
        self.note_content(reading.number, &reading.buffer, length);
        self.finished.push(Finished {
            ticket: reading.ticket,
            result: Ok(reading.buffer),
        });
    }

    fn read_fault_is_due(&mut self) -> bool {
        self.read_fails_in = self.read_fails_in.map(|left| left.saturating_sub(1));
        self.read_fails_in == Some(0)
    }

    /// A claim was made; whoever made it asks for its content.
    fn open_read(&mut self, claim: &Claim) -> u64 {
        let disk = self
            .sides
            .iter()
            .position(|side| Arc::ptr_eq(&side.node, claim.node()))
            .expect("a disk of this world");
        let chunks = claim.chunks();
        assert_eq!(chunks.end - chunks.start, 1);
        self.reads += 1;
        let read = OpenRead {
            disk,
            chunk: chunks.start,
            start: claim.bytes().start,
            content: None,
            number: self.reads,
            zero: false,
        };
        checks::one_read_of_a_chunk(self, &read);
        let cells = &self.sides[disk].disk.cells;
        let offset = |cell: &u64| usize::try_from(cell.checked_sub(read.start)?).ok();
        let in_buffer = |offset: &usize| *offset < CHUNK_BYTES as usize;
        self.offsets
            .extend(cells.iter().filter_map(offset).filter(in_buffer));
        self.open.push_back(read);
        checks::limits(self);
        self.reads
    }

    /// Disks fill in the cells only: take out what an earlier read has left.
    fn wipe(&self, buffer: &mut Buffer) {
        for offset in &self.offsets {
            buffer[*offset] = 0;
        }
    }

    fn note_content(&mut self, number: u64, buffer: &Buffer, length: usize) {
        let open = self.open.iter_mut().find(|read| read.number == number);
        let open = open.expect("an open read");
        let disk = &self.sides[open.disk].disk;
        let content = disk.gather(open.start, &buffer[..length]);
        open.zero = self.zero_blocks && content.iter().all(|(_, byte)| *byte == 0);
        open.content = Some(content);
    }

    /// Chunks in memory: being read, or read and not sent.
    pub(crate) fn buffers(&self) -> usize {
        self.open.iter().filter(|read| !read.zero).count()
    }

    pub(crate) fn reads_in_flight(&self) -> usize {
        self.reading.len() + self.finished.len()
    }

    /// A query has looked at these bytes.
    pub(crate) fn looked_at(&mut self, disk: &Arc<SimDisk>, bytes: Range<u64>) {
        let side = self.sides.iter_mut().find(|s| Arc::ptr_eq(&s.disk, disk));
        let side = side.expect("a disk of this world");
        for chunk in Chunk::containing(bytes.start).0..Chunk::count(bytes.end) {
            side.looked_at[usize::try_from(chunk).expect("small")] = true;
        }
    }
}

impl Side {
    fn new(name: &str, disk: Arc<SimDisk>, rng: &mut Rng) -> Self {
        let node = Node::new(
            name,
            Box::new(Handle(Arc::clone(&disk))),
            vmferry_disk::Hold::Nothing,
        );
        let density = rng.u8(..4);
        let of = if disk.base.is_some() { 16 } else { 4 };
        for cell in 0..disk.cells.len() {
            if rng.u8(..of) < density {
                disk.place(cell, rng.u8(..));
            }
        }
        let chunks = usize::try_from(Chunk::count(disk.length)).expect("small");
        Self {
            shadow: vec![0; disk.cells.len()],
            frames: vec![0; chunks],
            looked_at: vec![false; chunks],
            changes: 0,
            disk,
            node,
        }
    }

    /// Cells of one chunk.
    pub(crate) fn chunk_cells(&self, chunk: u64) -> Range<usize> {
        let start = Chunk(chunk).start_bytes();
        self.disk.cells_in(&(start..start + CHUNK_BYTES))
    }

    pub(crate) fn is_dirty(&self, chunk: u64) -> bool {
        self.node.dirty().next_dirty(Chunk(chunk)) == Some(Chunk(chunk))
    }
}

/// A base: a half is zero, most of that together.
fn base(length: u64, rng: &mut Rng) -> Handle {
    let base = SimDisk::over(length, None);
    for cell in 0..rng.usize(..=base.cells.len()) {
        base.place(cell, rng.u8(..));
    }
    Handle(base)
}

/// Reads that take virtual time and end in any order.
pub(crate) struct SimReads(pub(crate) Arc<Mutex<World>>);

impl Reads for SimReads {
    fn read_now(&mut self, claim: &Claim, buffer: &mut Buffer) -> Option<Result<(), DiskError>> {
        let number = {
            let mut world = lock(&self.0);
            if world.rng.u8(..4) > 0 {
                return None;
            }
            world.wipe(buffer);
            world.open_read(claim)
        };
        let bytes = claim.bytes();
        let length = usize::try_from(bytes.end - bytes.start).expect("small");
        let middle = lock(&self.0).rng.usize(..=length);
        for piece in [0..middle, middle..length] {
            World::pass_time(&self.0);
            let read = claim.read_cached(piece.start as u64, &mut buffer[piece]);
            assert!(read.is_ok());
        }
        let mut world = lock(&self.0);
        if world.read_fault_is_due() {
            return Some(Err(failed("read", bytes.start, bytes.end - bytes.start)));
        }
        world.note_content(number, buffer, length);
        Some(Ok(()))
    }

    fn submit(&mut self, ticket: Ticket, claim: Claim, mut buffer: Buffer) {
        let mut world = lock(&self.0);
        world.wipe(&mut buffer);
        let number = world.open_read(&claim);
        world.reading.push(Reading {
            ticket,
            number,
            claim,
            buffer,
            done: 0,
        });
        assert!(world.reads_in_flight() <= READS_MAX);
    }

    /// Patience is measured in steps of the clock.
    fn finished(&mut self, patience: Duration) -> Option<Finished> {
        let mut world = lock(&self.0);
        let mut steps = match patience {
            Duration::ZERO => 0,
            _ if world.reading.is_empty() && world.finished.is_empty() => return None,
            patience if patience >= Duration::from_secs(1) => u32::MAX,
            _ => world.rng.u32(..20),
        };
        while world.finished.is_empty() && steps > 0 {
            world.tick();
            steps -= 1;
        }
        match world.finished.len() {
            0 => None,
            count => {
                let index = world.rng.usize(..count);
                Some(world.finished.swap_remove(index))
            }
        }
    }

    fn bytes_per_second(&self) -> Option<u64> {
        None
    }
}
