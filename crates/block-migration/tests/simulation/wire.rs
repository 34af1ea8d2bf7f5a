//! The link between the two ends, and an ear on it.
//!
//! Payload goes over the link as its cells, so that a block costs a few bytes, but it counts as its
//! whole length: a cut can come at any byte.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::{Arc, Mutex};

use fastrand::Rng;
use vmferry_disk::{CHUNK_BYTES, Chunk};
use vmferry_savevm::{HandlerError, Sink};
use vmferry_stream::{BLOCK_BYTES, BlockChunk, Decoder, Options, Record, Sector, Step};

use crate::checks;
use crate::world::{World, lock};

/// A piece of the stream on its way.
pub(crate) enum Piece {
    Bytes(VecDeque<u8>),
    /// A block's payload: so many of its bytes have gone over, and its bytes that are not zero.
    Block(u32, Vec<(u32, u8)>),
}

#[derive(Default)]
pub(crate) struct Link {
    pub(crate) pieces: VecDeque<Piece>,
    pub(crate) accepted_bytes: u64,
    /// The connection breaks when so many bytes were accepted.
    pub(crate) cut_at: Option<u64>,
    pub(crate) is_cut: bool,
    /// PONGs on their way back.
    pub(crate) pongs: VecDeque<u32>,
}

impl Link {
    /// Take what fits before the cut.
    fn accept(&mut self, part: Piece, length: usize) {
        let left = self
            .cut_at
            .map_or(u64::MAX, |cut| cut - self.accepted_bytes);
        let fits = left >= length as u64;
        self.is_cut |= !fits;
        self.accepted_bytes += left.min(length as u64);
        match part {
            Piece::Bytes(mut bytes) => {
                bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                self.pieces.push_back(Piece::Bytes(bytes));
            }
            // A block of which a part is missing never becomes whole.
            Piece::Block(..) if !fits => {}
            block @ Piece::Block(..) => self.pieces.push_back(block),
        }
    }
}

/// The source's sink: lets time pass, listens, puts on the link.
pub(crate) struct SimSink {
    pub(crate) world: Arc<Mutex<World>>,
    pub(crate) link: Rc<RefCell<Link>>,
    pub(crate) rng: Rng,
    pub(crate) ear: Ear,
}

impl Sink for SimSink {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        World::pass_time(&self.world);
        for part in parts {
            if self.link.borrow().is_cut {
                return Err("cut".into());
            }
            let piece = if part.len() == BLOCK_BYTES as usize {
                self.ear.hear_payload(&self.world, part)
            } else {
                self.ear.hear(&self.world, part);
                Piece::Bytes(part.iter().copied().collect())
            };
            self.link.borrow_mut().accept(piece, part.len());
        }
        match self.link.borrow().is_cut {
            true => Err("cut".into()),
            false => Ok(()),
        }
    }

    fn allowance(&self) -> u64 {
        match self.rng.clone().u8(..4) {
            0 => 0,
            1 => 1,
            _ => u64::MAX,
        }
    }

    fn check(&self) -> Result<(), HandlerError> {
        match self.link.borrow().is_cut {
            true => Err("cut".into()),
            false => Ok(()),
        }
    }
}

/// Decodes what goes by, and tells the world.
pub(crate) struct Ear {
    decoder: Decoder,
    window: Vec<u8>,
    /// The block whose payload comes next.
    awaited: Option<(usize, Sector)>,
    percent: Option<u8>,
    /// Look at every byte of every block.
    thorough: bool,
}

impl Ear {
    pub(crate) fn new(thorough: bool) -> Self {
        Self {
            decoder: Decoder::new(Options::default()),
            window: Vec::new(),
            awaited: None,
            percent: None,
            thorough,
        }
    }

    fn hear(&mut self, world: &Mutex<World>, bytes: &[u8]) {
        self.window.extend_from_slice(bytes);
        loop {
            match self.decoder.step(&self.window).expect("our own stream") {
                Step::Record { record, used } => {
                    self.window.drain(..used);
                    self.record(world, &record);
                }
                Step::NeedMore(_) | Step::End => return,
                Step::Payload(bytes) if self.awaited.is_some() => {
                    assert_eq!((bytes, self.window.len()), (BLOCK_BYTES, 0));
                    return;
                }
                Step::Payload(bytes) => {
                    self.window.drain(..bytes as usize);
                }
            }
        }
    }

    fn record(&mut self, world: &Mutex<World>, record: &Record) {
        let Record::Block(chunk) = record else { return };
        match chunk {
            BlockChunk::Progress { percent } => {
                let again = self.percent == Some(100) && *percent == 100;
                assert!(self.percent < Some(*percent) || again, "progress goes back");
                self.percent = Some(*percent);
            }
            BlockChunk::Data { sector, device } => {
                self.awaited = Some((disk_index(&lock(world), device), *sector));
            }
            BlockChunk::Zero { sector, device } => {
                let mut world = lock(world);
                let index = disk_index(&world, device);
                let start = sector.start_byte();
                let end = (start + CHUNK_BYTES).min(world.sides[index].disk.length);
                let cells = world.sides[index].disk.cells_in(&(start..end));
                let content = cells.map(|cell| (cell, 0)).collect();
                frame(&mut world, index, start, content);
            }
            BlockChunk::EndOfSection => {}
        }
    }

    fn hear_payload(&mut self, world: &Mutex<World>, block: &[u8]) -> Piece {
        let (index, sector) = self.awaited.take().expect("a block before its payload");
        let mut world = lock(world);
        let start = sector.start_byte();
        let content = world.sides[index].disk.gather(start, block);
        let offset = |cell: usize| {
            u32::try_from(world.sides[index].disk.cells[cell] - start).expect("in a block")
        };
        let sparse: Vec<(u32, u8)> = content
            .iter()
            .filter(|(_, byte)| *byte != 0)
            .map(|(cell, byte)| (offset(*cell), *byte))
            .collect();
        if self.thorough {
            let others = block.iter().filter(|byte| **byte != 0).count();
            assert_eq!(others, sparse.len(), "padding, or another block's bytes");
        }
        frame(&mut world, index, start, content);
        Piece::Block(0, sparse)
    }
}

fn disk_index(world: &World, name: &str) -> usize {
    let index = world.sides.iter().position(|side| side.node.name() == name);
    index.expect("a disk of this world")
}

/// A frame is on the wire.
fn frame(world: &mut World, disk: usize, start: u64, content: Vec<(usize, u8)>) {
    let chunk = match start % CHUNK_BYTES {
        0 => start / CHUNK_BYTES,
        // The last block of a disk may end with the disk.
        _ => Chunk::count(world.sides[disk].disk.length) - 1,
    };
    checks::frame_is_that_of_the_oldest_read(world, disk, chunk, &content);
    world.figures.frames += 1;
    let side = &mut world.sides[disk];
    side.frames[usize::try_from(chunk).expect("small")] += 1;
    for (cell, byte) in content {
        side.shadow[cell] = byte;
    }
}
