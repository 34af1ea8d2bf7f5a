//! The invariants of `block-migration.md` §5 of the wire format notes, one function for each.

use vmferry_block_migration::READS_MAX;
use vmferry_disk::{CHUNK_BYTES, Hold, Refusal};

use crate::disk::SimDisk;
use crate::world::{OpenRead, Side, World};

pub(crate) fn after_every_step(world: &World) {
    for index in 0..world.sides.len() {
        no_write_is_forgotten(world, index);
    }
    limits(world);
}

/// Invariants 1, 2, 7 and 8. A chunk that was sent and is not marked, not being read and not being
/// written is at the destination, as it is here, once what is on its way has arrived.
fn no_write_is_forgotten(world: &World, index: usize) {
    let side = &world.sides[index];
    let image = side.disk.image();
    for chunk in 0..side.frames.len() as u64 {
        let bytes = chunk * CHUNK_BYTES..(chunk + 1) * CHUNK_BYTES;
        let being_read = |read: &OpenRead| read.disk == index && read.chunk == chunk;
        let touched = |write: &crate::world::Write| {
            write.disk == index && write.bytes.start < bytes.end && bytes.start < write.bytes.end
        };
        if side.frames[usize::try_from(chunk).expect("small")] == 0
            || side.is_dirty(chunk)
            || world.open.iter().any(being_read)
            || world.writes().any(touched)
        {
            continue;
        }
        let cells = side.chunk_cells(chunk);
        // What leads into the last block of a disk is read with it and may be older, but only until
        // the chunk's own frame follows: then one of the conditions above holds.
        assert_eq!(
            side.shadow[cells.clone()],
            image[cells],
            "chunk {chunk} of disk {index} is clean, but the frames so far say something else"
        );
    }
}

/// Invariant 3, first half.
pub(crate) fn one_read_of_a_chunk(world: &World, new: &OpenRead) {
    let same = |read: &OpenRead| read.disk == new.disk && read.chunk == new.chunk;
    assert!(
        !world.open.iter().any(same),
        "chunk {} of disk {} is read while its last frame waits",
        new.chunk,
        new.disk
    );
}

/// Invariant 3, second half: the frame that leaves is that of the oldest read, as it was read.
pub(crate) fn frame_is_that_of_the_oldest_read(
    world: &mut World,
    disk: usize,
    chunk: u64,
    content: &[(usize, u8)],
) {
    let is_read = |read: &OpenRead| read.disk == disk && read.chunk == chunk;
    if !world.open.iter().any(is_read) {
        let frames = world.sides[disk].frames[usize::try_from(chunk).expect("small")];
        assert_eq!(frames, 0, "a dirty chunk was sent without being read");
        assert!(content.iter().all(|(_, byte)| *byte == 0));
        return;
    }
    let oldest = world.open.pop_front().expect("an open read");
    assert!(is_read(&oldest), "frames have changed their order");
    let read = oldest.content.expect("a read that has ended");
    let in_content = |cell: &(usize, u8)| content.iter().all(|c| c.0 != cell.0 || c == cell);
    assert!(
        read.iter().all(in_content),
        "the frame is not what was read"
    );
}

/// Invariant 4: ready to complete means that every cursor has reached its end.
pub(crate) fn bulk_is_over(world: &World) {
    for (index, side) in world.sides.iter().enumerate() {
        for chunk in 0..side.frames.len() {
            let being_read = |read: &OpenRead| read.disk == index && read.chunk == chunk as u64;
            assert!(
                side.frames[chunk] > 0
                    || side.looked_at[chunk]
                    || world.open.iter().any(being_read),
                "ready to complete, but chunk {chunk} of disk {index} was never looked at"
            );
        }
    }
}

/// Invariant 4: the END of the section leaves nothing behind.
pub(crate) fn nothing_is_left(world: &World) {
    assert!(world.open.is_empty(), "a read is in flight");
    assert_eq!(world.writes().count(), 0, "a guest writes");
    for side in &world.sides {
        for (frames, looked_at) in side.frames.iter().zip(&side.looked_at) {
            let passed_over = world.incremental && *looked_at;
            assert!(*frames > 0 || passed_over, "a chunk was never sent");
        }
        assert_eq!(side.node.dirty().count(), 0, "a chunk is dirty");
        assert_eq!(side.shadow, side.disk.image());
    }
}

/// Invariants 1 and 5: what the destination has called whole survives a crash, right now.
pub(crate) fn is_durable(source: &Side, target: &SimDisk) {
    target.crash();
    assert_eq!(source.disk.image(), target.image(), "durable content");
}

/// Invariant 6.
pub(crate) fn is_as_before(world: &mut World) {
    for side in &mut world.sides {
        assert_eq!(side.node.held(), Some(Hold::Nothing));
        assert_eq!(side.node.user(), None);
        assert_eq!(side.disk.changes(), side.changes, "only guests write here");
        let permit = side.node.begin_write(0, 1).expect("guests are served");
        side.disk.place(0, side.disk.image()[0].wrapping_add(1));
        drop(permit);
        assert!(side.is_dirty(0));
    }
}

/// A disk that may be live elsewhere serves nobody.
pub(crate) fn is_held(world: &World) {
    for side in &world.sides {
        assert_eq!(side.node.begin_read(0, 1).err(), Some(Refusal::Held));
        assert_eq!(side.node.begin_write(0, 1).err(), Some(Refusal::Held));
    }
}

/// Invariant 1, second half.
pub(crate) fn has_departed(world: &World) {
    for side in &world.sides {
        assert_eq!(side.node.begin_read(0, 1).err(), Some(Refusal::Departed));
        assert_eq!(side.node.begin_write(0, 1).err(), Some(Refusal::Departed));
    }
}

/// Invariant 9.
pub(crate) fn limits(world: &World) {
    assert!(world.reads_in_flight() <= READS_MAX);
    assert!(
        world.buffers() <= world.buffers_max,
        "{} chunks in memory, {} are allowed",
        world.buffers(),
        world.buffers_max
    );
}
