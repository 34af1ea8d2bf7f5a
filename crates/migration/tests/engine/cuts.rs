//! The connection breaks at any byte, in either direction: no disk is ever live on two sides, no
//! acknowledged write is lost, and a person (or a restart) can always tell what to do.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use vmferry_disk::simulated::MemoryDisk;
use vmferry_disk::{Hold, Node};
use vmferry_migration::{
    Capabilities, Decision, Parameters, RecordFile, RequestError, Residence, State,
};

use crate::ends::{
    Host, Received, migrate_undisturbed, rng, start_destination, start_source, wait, wait_for,
};
use crate::link::{Cut, relay};

const ROUNDS: usize = 200;
const BLOCK_BYTES: u64 = 512;
/// Guests write this block at the destination only, and all others at the source only.
const BLOCK_THERE: u64 = 0;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Completed,
    Failed,
    UndecidedArrived,
    UndecidedNotArrived,
}

#[test]
fn cut_anywhere() {
    let mut rng = rng();
    let rounds = match std::env::var_os("VMFERRY_LONG") {
        Some(_) => 10 * ROUNDS,
        None => ROUNDS,
    };
    let mut outcomes = BTreeMap::<Outcome, usize>::new();
    for _ in 0..rounds {
        let cut = match rng.u8(..8) {
            0 => Cut::Never,
            1 => Cut::Forth(rng.u64(..200)),
            2 => Cut::Forth(rng.u64(..3 << 20)),
            3 | 4 => Cut::Back(rng.u64(..50)),
            _ => Cut::AfterDisks(rng.u64(..20)),
        };
        let outcome = cut_at(cut, &mut rng);
        *outcomes.entry(outcome).or_default() += 1;
    }
    println!("{rounds} migrations: {outcomes:?}");
    for outcome in [
        Outcome::Completed,
        Outcome::Failed,
        Outcome::UndecidedNotArrived,
    ] {
        assert!(
            outcomes.contains_key(&outcome),
            "{outcome:?} never happened"
        );
    }
}

fn cut_at(cut: Cut, rng: &mut fastrand::Rng) -> Outcome {
    let lengths = [(1 << 20) + 1536, 70_000];
    let source = Host::source(&lengths, rng);
    let target = Host::target(&lengths);
    let guest = Guest::start(&source, &target, rng.fork());
    let (here, there, relay) = relay(cut, |_| {});
    let destination = start_destination(&target, there);
    let running = start_source(
        &source,
        here,
        Parameters::default(),
        Capabilities::default(),
    );
    let status = wait(&running);
    let outcome = match (status.undecided, status.state) {
        (true, _) => {
            assert!(source.all_held(Some(Hold::Everything)), "{cut:?}");
            assert_eq!(running.cancel(), Err(RequestError::TooLate));
            assert_eq!(source.says(), [Some(Residence::Leaving); 2]);
            let received = destination.join().expect("no panic");
            check_restart(&source, &target);
            let (decision, outcome) = match received.is_ok() {
                true => (Decision::GiveUp, Outcome::UndecidedArrived),
                false => (Decision::Serve, Outcome::UndecidedNotArrived),
            };
            check_destination(&received, &target);
            running.decide(decision).expect("undecided");
            let status = wait_for(&running, |s| s.state.is_over());
            match decision {
                Decision::GiveUp => {
                    assert_eq!(
                        (status.state, status.durable),
                        (State::Completed, Some(false))
                    );
                    check_gone(&source);
                }
                Decision::Serve => {
                    assert_eq!(status.state, State::Failed);
                    check_here(&source);
                }
            }
            outcome
        }
        (false, State::Completed) => {
            let received = destination.join().expect("no panic");
            assert!(received.is_ok(), "{cut:?} {received:?}");
            check_destination(&received, &target);
            check_gone(&source);
            Outcome::Completed
        }
        (false, State::Failed) => {
            let received = destination.join().expect("no panic");
            assert!(received.is_err(), "{cut:?}: {status:?}");
            let error = status.error.expect("a reason");
            assert!(!error.is_empty() && !error.contains('\n'), "{error:?}");
            check_destination(&received, &target);
            check_here(&source);
            Outcome::Failed
        }
        other => panic!("{cut:?}: {other:?}"),
    };
    check_restart(&source, &target);
    drop(running);
    relay
        .into_iter()
        .for_each(|thread| thread.join().expect("no panic"));
    let arrived = matches!(outcome, Outcome::Completed | Outcome::UndecidedArrived);
    if !arrived {
        migrate_undisturbed(&source, &target);
    }
    guest.stop_and_check(&target);
    outcome
}

fn check_gone(source: &Host) {
    assert!(source.all_held(None));
    assert_eq!(source.says(), [Some(Residence::Moved); 2]);
}

fn check_here(source: &Host) {
    assert!(source.all_held(Some(Hold::Nothing)));
    assert!(source.nodes.iter().all(|node| node.user().is_none()));
    assert_eq!(source.says(), [None; 2]);
}

fn check_destination(received: &Received, target: &Host) {
    if received.is_ok() {
        assert!(target.all_held(Some(Hold::Nothing)));
        assert_eq!(target.says(), [Some(Residence::Arrived); 2]);
    } else {
        assert!(target.all_held(Some(Hold::Writes)));
        let says = target.says();
        assert!(
            says == [None; 2] || says == [Some(Residence::Incoming); 2],
            "{says:?}"
        );
    }
    assert!(target.nodes.iter().all(|node| node.user().is_none()));
}

/// Both daemons die and are started again with the same command lines.
fn check_restart(source: &Host, target: &Host) {
    // In this order: a destination is live only after its source has written that it leaves.
    let there = target.would_be_live(true);
    let here = source.would_be_live(false);
    assert!(
        !(here && there),
        "live on both sides: {:?} {:?}",
        source.says(),
        target.says()
    );
}

/// Writes wherever it is let, and looks at the records all the time.
struct Guest {
    over: Arc<AtomicBool>,
    thread: JoinHandle<BTreeMap<(usize, u64), u8>>,
}

impl Guest {
    fn start(source: &Host, target: &Host, mut rng: fastrand::Rng) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&over);
        let sides = [&source.nodes, &target.nodes].map(Clone::clone);
        let records = [&source.records, &target.records].map(Clone::clone);
        let thread = thread::spawn(move || {
            let mut acknowledged = BTreeMap::new();
            while !done.load(Ordering::Relaxed) {
                let disk = rng.usize(..sides[0].len());
                let blocks = sides[0][disk].limits().length / BLOCK_BYTES;
                let block = rng.u64(BLOCK_THERE + 1..blocks);
                let value = rng.u8(1..);
                if write_somewhere(&sides.each_ref().map(|nodes| &nodes[disk]), block, value) {
                    acknowledged.insert((disk, block), value);
                }
                check_records(&records);
                thread::yield_now();
            }
            acknowledged
        });
        Self { over, thread }
    }

    /// Every write that was acknowledged at the source is on the live side, durably.
    fn stop_and_check(self, live: &Host) {
        self.over.store(true, Ordering::Relaxed);
        let acknowledged = self.thread.join().expect("never live on both sides");
        let disks: Vec<Vec<u8>> = live
            .memories
            .iter()
            .map(MemoryDisk::durable_snapshot)
            .collect();
        for ((disk, block), value) in acknowledged {
            let start = usize::try_from(block * BLOCK_BYTES).expect("small");
            let stored = &disks[disk][start..start + BLOCK_BYTES as usize];
            assert!(
                stored.iter().all(|byte| *byte == value),
                "block {block} of disk {disk} is lost"
            );
        }
    }
}

/// True if the source took it.
fn write_somewhere(nodes: &[&Arc<Node>; 2], block: u64, value: u8) -> bool {
    let here = nodes[0].begin_write(block * BLOCK_BYTES, BLOCK_BYTES);
    let there = nodes[1].begin_write(BLOCK_THERE * BLOCK_BYTES, BLOCK_BYTES);
    match (here, there) {
        (Ok(_), Ok(_)) => panic!("live on both sides"),
        (Ok(here), Err(_)) => here.write(&[value; BLOCK_BYTES as usize]).is_ok(),
        (Err(_), Ok(there)) => {
            let _ = there.write(&[value; BLOCK_BYTES as usize]);
            false
        }
        (Err(_), Err(_)) => false,
    }
}

/// As [`check_restart`], at any moment.
fn check_records([source, target]: &[Vec<RecordFile>; 2]) {
    let says = |record: &RecordFile| record.read().expect("readable").map(|r| r.residence);
    let arrived = target
        .iter()
        .all(|record| says(record) == Some(Residence::Arrived));
    let here = source.iter().any(|record| says(record).is_none());
    assert!(!(arrived && here), "both would be live after a restart");
}
