//! Disks that move with the machine that uses them.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{Hold, Node};
use vmferry_migration::State;

use crate::vm::{Pair, Vm, rng, same_memory};

const DISK_BYTES: usize = 3 << 20;

fn disks(rng: &mut fastrand::Rng) -> (MemoryDisk, MemoryDisk) {
    let (from, to) = (
        MemoryDisk::new(DISK_BYTES as u64),
        MemoryDisk::new(DISK_BYTES as u64),
    );
    let mut bytes = vec![0; DISK_BYTES - 12_345];
    rng.fill(&mut bytes);
    from.fill(0, &bytes);
    (from, to)
}

#[test]
fn a_disk_is_there_before_the_guest_runs() {
    let rng = &mut rng();
    for postcopy in [false, true] {
        let (from, to) = (Vm::running(rng), Vm::empty());
        let (here, there) = disks(rng);
        let left = Node::new("disk", Box::new(here.clone()), Hold::Nothing);
        let right = Node::new("disk", Box::new(there.clone()), Hold::Writes);
        let ends = UnixStream::pair().expect("a pair");
        let nodes = (Some(Arc::clone(&left)), Some(Arc::clone(&right)));
        let mut pair = Pair::with_disks(&from, &to, postcopy, ends, nodes);
        if postcopy {
            pair.source.start_postcopy().expect("it can");
        }
        let status = pair.wait();
        assert_eq!(status.state, State::Completed, "{status:?}");
        pair.received().expect("arrived");
        assert_eq!((left.held(), right.held()), (None, Some(Hold::Nothing)));
        assert!(here.snapshot() == there.snapshot(), "the disks differ");
        to.goes_on(5000);
        to.stop();
        same_memory(&from, &to);
    }
}
