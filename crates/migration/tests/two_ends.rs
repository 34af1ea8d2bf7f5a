//! Both engines in one process, over a socket pair, with simulated disks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmferry_channel::{Channel, Stop};
use vmferry_disk::simulated::{MemoryDisk, Operation};
use vmferry_disk::{Hold, Node};
use vmferry_migration::{
    Arrived, Capabilities, Coverage, DestinationDisk, DestinationFailure, DestinationJob,
    Parameters, Published, RunningSource, SourceDisk, SourceJob, State, Status, Target, receive,
};

/// Long enough for the slowest machine; a hang fails.
const PATIENCE: Duration = Duration::from_secs(120);

struct End {
    memory: MemoryDisk,
    node: Arc<Node>,
}

fn source_end(name: &str, bytes: &[u8]) -> End {
    let memory = MemoryDisk::from_bytes(bytes);
    let node = Node::new(name, Box::new(memory.clone()), Hold::Nothing);
    End { memory, node }
}

fn target_end(name: &str, length: u64) -> End {
    let memory = MemoryDisk::new(length);
    let node = Node::new(name, Box::new(memory.clone()), Hold::Writes);
    End { memory, node }
}

fn random_bytes(rng: &mut fastrand::Rng, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for chunk in bytes.chunks_mut(1 << 20) {
        if rng.u8(..4) > 0 {
            rng.fill(chunk);
        }
    }
    bytes
}

fn rng() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

fn migrate(sources: &[&End], targets: &[&End]) -> (Status, Result<Arrived, DestinationFailure>) {
    let stop = Stop::new().expect("an event");
    let (here, there) = Channel::pair(&stop, &Stop::new().expect("an event")).expect("a pair");
    let job = SourceJob {
        disks: sources
            .iter()
            .map(|end| SourceDisk {
                node: Arc::clone(&end.node),
                record: None,
            })
            .collect(),
        target: Target::Channel(here),
        parameters: Parameters::default(),
        capabilities: Capabilities::default(),
        stop,
    };
    let disks = targets
        .iter()
        .map(|end| DestinationDisk {
            node: Arc::clone(&end.node),
            record: None,
        })
        .collect();
    let destination = thread::spawn(move || {
        let job = DestinationJob {
            disks,
            coverage: Coverage::Whole,
            rest: None,
            any_machine: false,
            keep_records: false,
        };
        receive(there, job, &Published::default())
    });
    let source = RunningSource::start(job, Published::default()).expect("a migration");
    let status = source
        .published()
        .wait_until(PATIENCE, |s| s.state.is_over() || s.undecided);
    (status, destination.join().expect("no panic"))
}

#[test]
fn idle_disks_arrive_whole_and_durable() {
    let mut rng = rng();
    let lengths = [5 << 20, (3 << 20) + 1536, 1];
    let sources: Vec<End> = (0..3)
        .map(|i| source_end(&format!("disk{i}"), &random_bytes(&mut rng, lengths[i])))
        .collect();
    let targets: Vec<End> = (0..3)
        .map(|i| target_end(&format!("disk{i}"), lengths[i] as u64))
        .collect();
    let (status, arrived) = migrate(
        &sources.iter().collect::<Vec<_>>(),
        &targets.iter().collect::<Vec<_>>(),
    );
    assert_eq!(status.state, State::Completed, "{status:?} {arrived:?}");
    assert_eq!(status.durable, Some(true));
    assert!(arrived.expect("arrived").source_told);
    for (source, target) in sources.iter().zip(&targets) {
        assert!(source.memory.snapshot() == target.memory.snapshot());
        assert!(source.memory.snapshot() == target.memory.durable_snapshot());
        assert_eq!(source.node.held(), None, "given up");
        assert_eq!(target.node.held(), Some(Hold::Nothing), "live");
    }
}

#[test]
fn every_acknowledged_write_arrives() {
    let mut rng = rng();
    let length = 24 << 20;
    let source = source_end("disk0", &random_bytes(&mut rng, length));
    let target = target_end("disk0", length as u64);
    let over = Arc::new(AtomicBool::new(false));
    let guest = {
        let (node, over) = (Arc::clone(&source.node), Arc::clone(&over));
        let mut rng = rng.fork();
        thread::spawn(move || {
            let mut acknowledged = Vec::new();
            while !over.load(Ordering::Relaxed) {
                let block = rng.u64(..length as u64 / 4096);
                let Ok(permit) = node.begin_write(block * 4096, 4096) else {
                    continue;
                };
                let byte = rng.u8(..);
                permit.write(&[byte; 4096]).expect("written");
                acknowledged.push((block, byte));
                thread::sleep(Duration::from_micros(100));
            }
            acknowledged
        })
    };
    let (status, arrived) = migrate(&[&source], &[&target]);
    over.store(true, Ordering::Relaxed);
    let acknowledged = guest.join().expect("no panic");
    assert_eq!(status.state, State::Completed, "{status:?} {arrived:?}");
    let disk = target.memory.durable_snapshot();
    let last: std::collections::HashMap<u64, u8> = acknowledged.into_iter().collect();
    for (block, byte) in last {
        let start = usize::try_from(block).expect("small") * 4096;
        assert!(
            disk[start..start + 4096].iter().all(|b| *b == byte),
            "block {block}"
        );
    }
}

/// The first sync takes longer than the downtime limit, for it is that of the whole bulk phase.
#[test]
fn a_slow_first_sync_does_not_keep_an_idle_disk_here() {
    // Zero blocks are short enough for the channel to take all of them and the PING behind them,
    // while the destination still syncs.
    let source = source_end("disk0", &[0; 2 << 20]);
    let target = target_end("disk0", 2 << 20);
    let gate = target.memory.gate(Operation::Flush);
    let opener = thread::spawn(move || {
        gate.wait_reached(1);
        let limit = Parameters::default().downtime_limit;
        let begun = Instant::now();
        while begun.elapsed() <= 2 * limit {
            thread::yield_now();
        }
        gate.open();
    });
    let (status, arrived) = migrate(&[&source], &[&target]);
    opener.join().expect("no panic");
    assert_eq!(status.state, State::Completed, "{status:?} {arrived:?}");
    assert!(source.memory.snapshot() == target.memory.durable_snapshot());
}
