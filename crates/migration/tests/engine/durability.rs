//! `completed` means whole and durable.

use std::sync::{Arc, Mutex};

use vmferry_disk::simulated::MemoryDisk;
use vmferry_migration::{Capabilities, Parameters, RecordFile, Residence, State};
use vmferry_stream::return_path::ReturnMessage;

use crate::ends::{Host, rng, start_destination, start_source, wait};
use crate::link::{Cut, relay};

/// The destination loses power at the moment SHUT 0 leaves it.
#[test]
fn shut_0_means_durable() {
    let mut rng = rng();
    for _ in 0..10 {
        let lengths = [3 << 20, (1 << 20) + 1536, 700];
        let source = Host::source(&lengths, &mut rng);
        let target = Host::target(&lengths);
        let crashed = Arc::new(Mutex::new(None));
        let (memories, seen) = (target.memories.clone(), Arc::clone(&crashed));
        let records = target.records.clone();
        let (here, there, threads) = relay(Cut::Never, move |message| {
            if *message == ReturnMessage::Shut(0) {
                // Whoever restarts it now serves the disks: the source gives them up.
                let says = |record: &RecordFile| record.read().expect("readable");
                let arrived =
                    |record| says(record).map(|r| r.residence) == Some(Residence::Arrived);
                assert!(records.iter().all(arrived), "written down");
                let left = memories.iter().map(|disk| {
                    disk.crash();
                    disk.snapshot()
                });
                *seen.lock().expect("no panic") = Some(left.collect::<Vec<_>>());
            }
        });
        let destination = start_destination(&target, there);
        let running = start_source(
            &source,
            here,
            Parameters::default(),
            Capabilities::default(),
        );
        let status = wait(&running);
        let received = destination.join().expect("no panic");
        assert_eq!(status.state, State::Completed, "{status:?} {received:?}");
        assert_eq!(status.durable, Some(true));
        drop(running);
        threads
            .into_iter()
            .for_each(|thread| thread.join().expect("no panic"));
        let crashed = crashed.lock().expect("no panic").take().expect("SHUT 0");
        for (memory, left) in source.memories.iter().zip(&crashed) {
            assert!(memory.snapshot() == *left, "lost with the power");
        }
    }
}

/// Every PONG says the same of what came before its PING.
#[test]
fn the_barriers_pong_means_durable() {
    let mut rng = rng();
    let lengths = [2 << 20, 5000];
    let source = Host::source(&lengths, &mut rng);
    let target = Host::target(&lengths);
    let left = Arc::new(Mutex::new(None));
    let (memories, seen) = (target.memories.clone(), Arc::clone(&left));
    let (here, there, _threads) = relay(Cut::Never, move |message| {
        if *message == ReturnMessage::Pong(u32::MAX) {
            let durable = memories.iter().map(MemoryDisk::durable_snapshot);
            *seen.lock().expect("no panic") = Some(durable.collect::<Vec<_>>());
        }
    });
    let destination = start_destination(&target, there);
    let running = start_source(
        &source,
        here,
        Parameters::default(),
        Capabilities::default(),
    );
    assert_eq!(wait(&running).state, State::Completed);
    assert!(destination.join().expect("no panic").is_ok());
    let left = left.lock().expect("no panic").take().expect("the PONG");
    for (memory, left) in source.memories.iter().zip(&left) {
        assert!(memory.snapshot() == *left);
    }
}
