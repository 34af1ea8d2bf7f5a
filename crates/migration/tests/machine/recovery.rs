//! Connections that break while a guest runs before its memory is there.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use vmferry_migration::State;

use crate::vm::{Pair, Vm, rng, same_memory};

/// Two ends with a link between them that breaks, both ways, after so many bytes of the stream.
pub(crate) fn breaking_after(bytes: u64) -> (UnixStream, UnixStream) {
    let (source, here) = UnixStream::pair().expect("a pair");
    let (there, target) = UnixStream::pair().expect("a pair");
    let ends = Arc::new((here, there));
    let pump = |ends: Arc<(UnixStream, UnixStream)>, back: bool, mut left: u64| {
        thread::spawn(move || {
            let (mut from, mut to) = match back {
                false => (&ends.0, &ends.1),
                true => (&ends.1, &ends.0),
            };
            let mut piece = [0; 4096];
            while left > 0 {
                let room = left.min(4096) as usize;
                let Ok(length @ 1..) = from.read(&mut piece[..room]) else {
                    break;
                };
                if to.write_all(&piece[..length]).is_err() {
                    break;
                }
                left -= length as u64;
            }
            for end in [&ends.0, &ends.1] {
                let _ = end.shutdown(Shutdown::Both);
            }
        })
    };
    pump(Arc::clone(&ends), false, bytes);
    pump(ends, true, u64::MAX);
    (source, target)
}

/// Wherever it breaks: before the switch the guest is at home, after it nothing is lost.
#[test]
fn a_break_never_loses_the_guest() {
    let rng = &mut rng();
    let rounds = match std::env::var_os("VMFERRY_LONG") {
        Some(_) => 1000,
        None => 30,
    };
    let (mut at_home, mut recovered) = (0, 0);
    for round in 0..rounds {
        let (from, to) = (Vm::running(rng), Vm::empty());
        // All of it has about four million bytes.
        let cut = rng.u64(..4_300_000);
        println!("round {round}: cut after {cut}");
        let mut pair = Pair::begin(&from, &to, true, breaking_after(cut));
        let _ = pair.source.start_postcopy();
        loop {
            let settled = |state: State| state.is_over() || state == State::PostcopyPaused;
            let status = pair.wait_for(|status| settled(status.state));
            if status.state != State::PostcopyPaused {
                break;
            }
            recovered += 1;
            let there = pair.wait_there(|status| settled(status.state));
            if there.state != State::PostcopyPaused {
                break;
            }
            pair.reconnect(breaking_after(rng.u64(..4_300_000)));
        }
        let status = pair.source.published().get();
        match status.state {
            State::Completed => {
                pair.received().expect("arrived");
                to.goes_on(5000);
                to.stop();
                assert_eq!((from.runs(), to.runs()), (1, 1));
                same_memory(&from, &to);
            }
            State::Failed => {
                at_home += 1;
                pair.received().expect_err("broken");
                assert_eq!(to.runs(), 0);
                from.goes_on(5000);
                from.stop();
            }
            // The last word of the destination was lost, or its package never came.
            State::PostcopyPaused => {
                let received = pair.received();
                assert_eq!(received.is_ok(), to.is_running(), "{received:?}");
                let decision = match received {
                    Ok(_) => vmferry_migration::Decision::GiveUp,
                    Err(_) => vmferry_migration::Decision::Serve,
                };
                if pair.source.decide(decision).is_ok() {
                    pair.wait_for(|status| !status.undecided);
                }
                let runs = [from.is_running(), to.is_running()];
                assert_eq!(runs.iter().filter(|runs| **runs).count(), 1, "{status:?}");
                match to.is_running() {
                    true => to.stop(),
                    false => from.stop(),
                }
            }
            other => panic!("{other:?}"),
        }
    }
    println!("{rounds} rounds: {at_home} stayed at home, {recovered} pauses");
}
