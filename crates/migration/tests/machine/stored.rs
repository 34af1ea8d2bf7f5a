//! A machine that stands still, sent from where it is stored: by precopy, by postcopy, by one process after another.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vmferry_channel::Direction;
use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{Hold, Node};
use vmferry_migration::{
    Capabilities, Guest, Parameters, Published, RunningSource, SourceDisk, SourceFailure,
    SourceJob, SourceMachine, SourceMemory, State, Target,
};
use vmferry_ram::{
    BlockIndex, BlockLayout, GuestRam, RamBlock, RamSourceOptions, StoredPages, StoredRam,
    StoredRange,
};
use vmferry_savevm::HandlerError;

use crate::recovery::breaking_after;
use crate::vm::{Pair, Vm, channel, rng, same_memory};

/// The memory of a guest that was stopped.
struct Parked {
    layouts: Vec<BlockLayout>,
    memory: Vec<Vec<u8>>,
    working_set: Vec<StoredRange>,
    /// The first page that cannot be read.
    damaged: Mutex<Option<u64>>,
}

impl StoredRam for Parked {
    fn blocks(&self) -> &[BlockLayout] {
        &self.layouts
    }

    fn read(
        &self,
        block: BlockIndex,
        first_page: u64,
        into: &mut [u8],
    ) -> Result<StoredPages, HandlerError> {
        let mut kinds = StoredPages::default();
        let start = usize::try_from(first_page * 4096).expect("small");
        let content = &self.memory[block.0][start..start + into.len()];
        for (number, (page, into)) in content.chunks(4096).zip(into.chunks_mut(4096)).enumerate() {
            let damaged = *self.damaged.lock().expect("no panic");
            if damaged.is_some_and(|damaged| first_page + number as u64 >= damaged) {
                return Err("the page is damaged".into());
            }
            match page.iter().all(|byte| *byte == 0) {
                true => kinds.zero |= 1 << number,
                false => into.copy_from_slice(page),
            }
        }
        Ok(kinds)
    }

    fn working_set(&self) -> Vec<StoredRange> {
        self.working_set.clone()
    }
}

/// It runs nowhere but at the destination.
struct Nobody;

impl Guest for Nobody {
    fn stop(&mut self) -> Result<(), HandlerError> {
        Ok(())
    }

    fn run(&mut self) {}
}

fn park(vm: &Vm) -> Arc<Parked> {
    vm.stop();
    Arc::new(Parked {
        layouts: vm.ram.blocks().iter().map(RamBlock::layout).collect(),
        memory: vm.memory(),
        working_set: vec![StoredRange {
            block: BlockIndex(0),
            first_page: 7,
            pages: 3,
        }],
        damaged: Mutex::default(),
    })
}

fn machine(vm: &Vm, parked: &Arc<Parked>, postcopy: bool) -> SourceMachine {
    SourceMachine {
        memory: SourceMemory::Stored(Arc::<Parked>::clone(parked)),
        guest: Box::new(Nobody),
        ram_options: RamSourceOptions {
            postcopy,
            ..RamSourceOptions::default()
        },
        ..vm.source(postcopy)
    }
}

fn job(socket: UnixStream) -> SourceJob {
    let (channel, stop) = channel(socket, Direction::Outgoing);
    SourceJob {
        disks: Vec::new(),
        target: Target::Channel(channel),
        parameters: Parameters::default(),
        capabilities: Capabilities::default(),
        stop,
    }
}

#[test]
fn it_is_restored_as_often_as_one_likes() {
    let rng = &mut rng();
    let from = Vm::running(rng);
    from.goes_on(1000);
    let parked = park(&from);
    for postcopy in [false, true, true, false] {
        let to = Vm::empty();
        let ends = UnixStream::pair().expect("a pair");
        let source = machine(&from, &parked, postcopy);
        let mut pair = Pair::between(source, to.destination(postcopy), ends, (None, None));
        let status = pair.wait();
        assert_eq!(status.state, State::Completed, "{status:?}");
        pair.received().expect("arrived");
        assert!(to.steps() >= from.steps());
        to.goes_on(10_000);
        to.stop();
        same_memory(&from, &to);
        assert_eq!((from.runs(), to.runs()), (1, 1));
    }
}

/// Whichever byte is the last that a process sends: the next one goes on.
#[test]
fn another_process_goes_on() {
    let rng = &mut rng();
    let rounds = match std::env::var_os("VMFERRY_LONG") {
        Some(_) => 1000,
        None => 30,
    };
    let (mut not_begun, mut taken_up) = (0, 0);
    for round in 0..rounds {
        let from = Vm::running(rng);
        from.goes_on(500);
        let parked = park(&from);
        let to = Vm::empty();
        // All of it has about four million bytes.
        let cut = rng.u64(..4_300_000);
        println!("round {round}: cut after {cut}");
        let source = machine(&from, &parked, true);
        let ends = breaking_after(cut);
        let mut pair = Pair::between(source, to.destination(true), ends, (None, None));
        let settled = |state: State| state.is_over() || state == State::PostcopyPaused;
        let mut state = pair.wait_for(|status| settled(status.state)).state;
        let mut there = pair.wait_there(|status| settled(status.state)).state;
        while there == State::PostcopyPaused {
            // The process is gone.
            pair.source.shut_down();
            taken_up += 1;
            let (here, far) = match rng.bool() {
                true => breaking_after(rng.u64(..4_300_000)),
                false => UnixStream::pair().expect("a pair"),
            };
            let (far, _) = channel(far, Direction::Incoming);
            pair.reconnections.offer(far).expect("it waits");
            let next = machine(&from, &parked, true);
            let source = RunningSource::take_up(job(here), next, Published::default());
            pair.source = source.expect("it is taken up");
            state = pair.wait_for(|status| settled(status.state)).state;
            there = pair.wait_there(|status| settled(status.state)).state;
        }
        if there == State::Failed {
            not_begun += 1;
            pair.received().expect_err("broken");
            assert_eq!(to.runs(), 0);
            continue;
        }
        // Its last word may have been lost.
        assert!(settled(state), "{state:?}");
        pair.received().expect("arrived");
        to.goes_on(5000);
        to.stop();
        assert_eq!((from.runs(), to.runs()), (1, 1));
        same_memory(&from, &to);
    }
    println!("{not_begun} did not begin, {taken_up} were taken up");
}

/// The guest waits for a page that cannot be read; it gets it when that is mended.
#[test]
fn a_page_that_cannot_be_read_pauses() {
    let rng = &mut rng();
    let from = Vm::running(rng);
    let parked = park(&from);
    *parked.damaged.lock().expect("no panic") = Some(20);
    let to = Vm::empty();
    let ends = UnixStream::pair().expect("a pair");
    let source = machine(&from, &parked, true);
    let mut pair = Pair::between(source, to.destination(true), ends, (None, None));
    let paused = pair.wait_for(|status| status.state == State::PostcopyPaused);
    let error = paused.error.expect("a reason");
    assert!(error.contains("the page is damaged"), "{error}");
    *parked.damaged.lock().expect("no panic") = None;
    pair.reconnect(UnixStream::pair().expect("a pair"));
    assert_eq!(pair.wait().state, State::Completed);
    pair.received().expect("arrived");
    to.goes_on(5000);
    to.stop();
    same_memory(&from, &to);
}

#[test]
fn a_damaged_page_starts_no_precopy() {
    let rng = &mut rng();
    let from = Vm::running(rng);
    let parked = park(&from);
    *parked.damaged.lock().expect("no panic") = Some(20);
    let to = Vm::empty();
    let ends = UnixStream::pair().expect("a pair");
    let source = machine(&from, &parked, false);
    let mut pair = Pair::between(source, to.destination(false), ends, (None, None));
    let status = pair.wait();
    assert_eq!(status.state, State::Failed, "{status:?}");
    let error = status.error.expect("a reason");
    assert!(error.contains("the page is damaged"), "{error}");
    pair.received().expect_err("broken");
    assert_eq!(to.runs(), 0);
}

#[test]
fn what_could_have_changed_is_not_taken_up() {
    let rng = &mut rng();
    let from = Vm::running(rng);
    let (socket, _there) = UnixStream::pair().expect("a pair");
    let live = from.source(true);
    let refused = RunningSource::take_up(job(socket), live, Published::default());
    assert!(matches!(refused, Err(SourceFailure::NotTakenUp)));
    let parked = park(&from);
    let (socket, _there) = UnixStream::pair().expect("a pair");
    let precopy = machine(&from, &parked, false);
    let refused = RunningSource::take_up(job(socket), precopy, Published::default());
    assert!(matches!(refused, Err(SourceFailure::NotTakenUp)));
    let (socket, _there) = UnixStream::pair().expect("a pair");
    let with_disk = SourceJob {
        disks: vec![SourceDisk {
            node: Node::new("d", Box::new(MemoryDisk::new(1 << 20)), Hold::Nothing),
            record: None,
        }],
        ..job(socket)
    };
    let refused = RunningSource::take_up(
        with_disk,
        machine(&from, &parked, true),
        Published::default(),
    );
    assert!(matches!(refused, Err(SourceFailure::NotTakenUp)));
}
