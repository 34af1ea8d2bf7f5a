//! A disk of which only a few bytes matter.
//!
//! The wire moves whole MiB, whatever a disk holds. To make ten thousand migrations a matter of
//! seconds, a [`SimDisk`] remembers only the bytes at its *cells*: the first and last bytes of
//! chunks, of the disk, and some between. All others are zero, and nobody ever writes them.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use vmferry_disk::{
    Allocation, BlockDevice, CHUNK_BYTES, Cached, Chunk, DiskError, Extent, ExtentKind, Limits,
    Unmap,
};

use crate::world::World;

/// Allocation is told in pieces of this length.
const PIECE_BYTES: u64 = CHUNK_BYTES / 2;

pub(crate) struct SimDisk {
    pub(crate) length: u64,
    /// Offsets of the cells, ascending.
    pub(crate) cells: Vec<u64>,
    /// What shows through, for a disk that lies over another.
    pub(crate) base: Option<Handle>,
    state: Mutex<State>,
    /// Lets time pass around allocation queries.
    world: OnceLock<Weak<Mutex<World>>>,
}

struct State {
    volatile: Vec<u8>,
    durable: Vec<u8>,
    /// Cells that a flush has to save.
    unflushed: Vec<bool>,
    /// Pieces that are not known to be zero.
    allocated: Vec<bool>,
    /// Pieces that do not show what lies below.
    own: Vec<bool>,
    /// So many changes and flushes from now on, one fails.
    fails_in: Option<u32>,
    changes: u64,
}

impl SimDisk {
    /// A disk of zeroes, or an empty one over another of its length.
    pub(crate) fn over(length: u64, base: Option<Handle>) -> Arc<Self> {
        let cells = Self::cells_of(length);
        let pieces = usize::try_from(length.div_ceil(PIECE_BYTES)).expect("small");
        let content = base.as_ref().map(|base| base.0.image());
        let content = content.unwrap_or_else(|| vec![0; cells.len()]);
        let mut allocated = vec![false; pieces];
        for (cell, byte) in cells.iter().zip(&content) {
            allocated[usize::try_from(cell / PIECE_BYTES).expect("small")] |= *byte != 0;
        }
        Arc::new(Self {
            length,
            state: Mutex::new(State {
                durable: content.clone(),
                volatile: content,
                unflushed: vec![false; cells.len()],
                allocated,
                own: vec![base.is_none(); pieces],
                fails_in: None,
                changes: 0,
            }),
            base,
            cells,
            world: OnceLock::new(),
        })
    }

    /// Where a disk of this length has cells.
    fn cells_of(length: u64) -> Vec<u64> {
        let mut cells = Vec::new();
        for chunk in 0..Chunk::count(length) {
            let start = chunk * CHUNK_BYTES;
            for offset in [
                0,
                1,
                300_000,
                PIECE_BYTES,
                CHUNK_BYTES - 600,
                CHUNK_BYTES - 1,
            ] {
                cells.push(start + offset);
            }
        }
        cells.push(length - 1);
        cells.retain(|cell| *cell < length);
        cells.sort_unstable();
        cells.dedup();
        cells
    }

    pub(crate) fn attach(&self, world: &Arc<Mutex<World>>) {
        let _ = self.world.set(Arc::downgrade(world));
    }

    pub(crate) fn image(&self) -> Vec<u8> {
        self.state().volatile.clone()
    }

    /// Lose what was not flushed.
    pub(crate) fn crash(&self) {
        let mut state = self.state();
        state.volatile = state.durable.clone();
    }

    /// Writes, zero-writes and discards so far.
    pub(crate) fn changes(&self) -> u64 {
        self.state().changes
    }

    /// The `nth` change or flush from now on fails.
    pub(crate) fn fail(&self, nth: u32) {
        self.state().fails_in = Some(nth);
    }

    pub(crate) fn heal(&self) {
        self.state().fails_in = None;
    }

    /// Indexes of the cells in a range of bytes.
    pub(crate) fn cells_in(&self, bytes: &Range<u64>) -> Range<usize> {
        let index = |byte| self.cells.partition_point(|cell| *cell < byte);
        index(bytes.start)..index(bytes.end)
    }

    /// Put a byte in place, as a part of a write.
    pub(crate) fn place(&self, cell: usize, value: u8) {
        let mut state = self.state();
        state.put(cell, value);
        let piece = usize::try_from(self.cells[cell] / PIECE_BYTES).expect("small");
        state.allocated[piece] = true;
        state.own[piece] = true;
    }

    /// Bytes at the cells of a block that begins at `start`.
    pub(crate) fn gather(&self, start: u64, block: &[u8]) -> Vec<(usize, u8)> {
        let end = self.length.min(start + block.len() as u64);
        let byte = |cell: usize| block[usize::try_from(self.cells[cell] - start).expect("small")];
        let cells = self.cells_in(&(start..end));
        cells.map(|cell| (cell, byte(cell))).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(
        &self,
        operation: &'static str,
        offset: u64,
        length: u64,
        work: impl FnOnce(&mut State),
    ) -> Result<(), DiskError> {
        assert!(offset + length <= self.length, "{operation} past the end");
        let mut state = self.state();
        state.changes += 1;
        if state.fault_is_due() {
            return Err(failed(operation, offset, length));
        }
        work(&mut state);
        Ok(())
    }

    fn set_zero(&self, state: &mut State, bytes: &Range<u64>) {
        for cell in self.cells_in(bytes) {
            state.put(cell, 0);
        }
        let whole = |piece: usize| {
            let start = piece as u64 * PIECE_BYTES;
            bytes.start <= start && (start + PIECE_BYTES).min(self.length) <= bytes.end
        };
        for piece in 0..state.allocated.len() {
            let start = piece as u64 * PIECE_BYTES;
            state.allocated[piece] &= !whole(piece);
            state.own[piece] |= start < bytes.end && bytes.start < start + PIECE_BYTES;
        }
    }
}

impl State {
    fn put(&mut self, cell: usize, value: u8) {
        self.volatile[cell] = value;
        self.unflushed[cell] = true;
    }

    fn fault_is_due(&mut self) -> bool {
        self.fails_in = self.fails_in.map(|left| left.saturating_sub(1));
        self.fails_in == Some(0)
    }
}

pub(crate) fn failed(operation: &'static str, offset: u64, length: u64) -> DiskError {
    DiskError {
        operation,
        offset,
        length,
        source: io::Error::from_raw_os_error(5),
    }
}

/// What goes into a node; the test keeps the disk.
#[derive(Clone)]
pub(crate) struct Handle(pub(crate) Arc<SimDisk>);

impl BlockDevice for Handle {
    fn limits(&self) -> Limits {
        Limits {
            length: self.0.length,
            preferred_bytes: 4096,
            cluster_bytes: None,
            read_only: false,
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        self.read_cached_at(buf, offset).map(|_| ())
    }

    /// Leaves bytes between cells alone: readers begin with zeroes.
    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError> {
        assert!(
            offset + buf.len() as u64 <= self.0.length,
            "read past the end"
        );
        let state = self.0.state();
        for cell in self.0.cells_in(&(offset..offset + buf.len() as u64)) {
            buf[usize::try_from(self.0.cells[cell] - offset).expect("small")] =
                state.volatile[cell];
        }
        Ok(Cached::Hit(buf.len()))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        let disk = &self.0;
        disk.change("write", offset, buf.len() as u64, |state| {
            for cell in disk.cells_in(&(offset..offset + buf.len() as u64)) {
                let at = disk.cells[cell] - offset;
                state.put(cell, buf[usize::try_from(at).expect("small")]);
                let piece = usize::try_from(disk.cells[cell] / PIECE_BYTES).expect("small");
                state.allocated[piece] = true;
                state.own[piece] = true;
            }
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        _unmap: Unmap,
        _fast_only: bool,
    ) -> Result<(), DiskError> {
        self.0.change("write zeroes", offset, length, |state| {
            self.0.set_zero(state, &(offset..offset + length));
        })
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.0.change("discard", offset, length, |state| {
            self.0.set_zero(state, &(offset..offset + length));
        })
    }

    /// Guests go on before and after the disk has looked.
    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        let world = self.0.world.get().and_then(Weak::upgrade);
        let Some(world) = world else {
            return Err(failed("status", offset, length));
        };
        World::pass_time(&world);
        let first = usize::try_from(offset / PIECE_BYTES).expect("small");
        let (extent, fails) = {
            let mut world = crate::world::lock(&world);
            let state = self.0.state();
            let kind = |piece: usize| match state.allocated[piece] {
                true => ExtentKind::Data,
                false if piece.is_multiple_of(2) => ExtentKind::Hole,
                false => ExtentKind::Zero,
            };
            let same = (first..state.allocated.len())
                .take_while(|piece| kind(*piece) == kind(first))
                .take(if world.rng.bool() { usize::MAX } else { 1 })
                .count() as u64;
            let end = ((first as u64 + same) * PIECE_BYTES).min(offset + length);
            let extent = Extent {
                length: end - offset,
                kind: kind(first),
            };
            let fails = world.rng.u8(..50) == 0;
            world.looked_at(&self.0, offset..offset + length);
            (extent, fails)
        };
        World::pass_time(&world);
        if fails {
            return Err(failed("status", offset, length));
        }
        Ok(extent)
    }

    /// As guests go on around a look at the status. The destination's disks belong to no world.
    fn allocation(&self, offset: u64, length: u64) -> Result<Allocation, DiskError> {
        let first = usize::try_from(offset / PIECE_BYTES).expect("small");
        let look = |state: &State, pieces_max: usize| {
            let is_own = state.own[first];
            let same = state.own[first..].iter().take_while(|own| **own == is_own);
            let same = same.take(pieces_max).count() as u64;
            let end = ((first as u64 + same) * PIECE_BYTES).min(offset + length);
            let length = end - offset;
            Allocation { length, is_own }
        };
        let Some(world) = self.0.world.get().and_then(Weak::upgrade) else {
            return Ok(look(&self.0.state(), usize::MAX));
        };
        World::pass_time(&world);
        let (allocation, fails) = {
            let mut world = crate::world::lock(&world);
            let pieces_max = if world.rng.bool() { usize::MAX } else { 1 };
            let allocation = look(&self.0.state(), pieces_max);
            world.looked_at(&self.0, offset..offset + allocation.length);
            (allocation, world.rng.u8(..50) == 0)
        };
        World::pass_time(&world);
        match fails {
            true => Err(failed("allocation", offset, length)),
            false => Ok(allocation),
        }
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        let below: &dyn BlockDevice = self.0.base.as_ref()?;
        Some(below)
    }

    fn start_writeback(&self, _offset: u64, _length: u64) -> Result<(), DiskError> {
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        let mut state = self.0.state();
        let state = &mut *state;
        let lost = state.fault_is_due();
        for cell in 0..state.unflushed.len() {
            if std::mem::take(&mut state.unflushed[cell]) && !lost {
                state.durable[cell] = state.volatile[cell];
            }
        }
        if lost {
            return Err(failed("flush", 0, 0));
        }
        Ok(())
    }
}
