//! Broken streams: never a panic, never a state that did not arrive whole.

use vmferry_savevm::{
    GuestStopped, Incoming, LoadError, LoadMachine, LoadOptions, Machine, Opening, Ready,
    Registration, Registry, begin,
};
use vmferry_stream::{Command, PageSizes};

use crate::parts::{
    Bytes, Log, Scripted, ToyState, load_in, loader, lock, name, old_toy, saved, scripted, seed,
    state, toy,
};

const PAGES: PageSizes = PageSizes {
    all_bytes: 0x1000,
    target_bytes: 0x1000,
};

fn opening() -> Opening {
    Opening {
        machine: Machine {
            capabilities: Some(vec![name("x-ignore-shared"), name("validate-uuid")]),
            uuid: Some([3; 16]),
            ..Machine::named(name("pc"))
        },
        commands: vec![
            Command::OpenReturnPath,
            Command::Ping(1),
            Command::PostcopyAdvise(Some(PAGES)),
        ],
        ..Opening::default()
    }
}

fn source() -> Registry<'static> {
    let log = Log::default();
    let mut registry = Registry::new();
    let ram = Scripted {
        discards: Some(2),
        ..scripted("ram", &log)
    };
    for registration in [
        Registration::saving("block", 1, Box::new(ram)),
        Registration::device("dma", toy(&state(b"first"))),
        Registration::device("dma", toy(&state(&[9; 40]))),
        Registration::old_style("slirp", old_toy(&state(b""))),
    ] {
        registry.register(registration).expect("free");
    }
    registry
}

fn precopy() -> Vec<u8> {
    saved(&opening(), &mut source())
}

fn postcopy() -> Vec<u8> {
    let (registry, sink) = (&mut source(), &mut Bytes::default());
    let stopped = GuestStopped::assert_drained();
    let iterating = begin(&opening(), registry, sink).expect("begun");
    let Ok(Ready::Go(switching)) = iterating.try_postcopy(registry, |_| true) else {
        panic!("nothing is left");
    };
    let packing = switching.end_live(&stopped, registry, sink).expect("ended");
    let running = packing
        .pack(&stopped, registry, Some(3))
        .and_then(|packed| packed.send(sink));
    running
        .expect("sent")
        .complete(registry, sink)
        .expect("completed");
    std::mem::take(&mut sink.bytes)
}

/// Load it, in random windows; gives the devices as they are then.
fn outcome(bytes: &[u8], rng: &mut fastrand::Rng) -> (Result<(), LoadError>, Vec<Vec<u8>>) {
    let log = Log::default();
    let states: Vec<ToyState> = (0..3).map(|_| state(b"before")).collect();
    let mut registry = Registry::new();
    for registration in [
        Registration::loading("block", 1..=1, loader(&log, "")),
        Registration::device("dma", toy(&states[0])),
        Registration::device("dma", toy(&states[1])),
        Registration::old_style("slirp", old_toy(&states[2])),
    ] {
        registry.register(registration).expect("free");
    }
    let mut machine = LoadMachine::new(LoadOptions {
        machine: Some(opening().machine),
        refuse_rest: Some("unknown"),
        postcopy: Incoming::Ram(PAGES),
        ..LoadOptions::default()
    });
    let mut read = || rng.usize(..200);
    let loaded = load_in(&mut machine, &mut registry, bytes, &mut read).map(|_| ());
    let states = states.iter().map(|state| lock(state).0.clone());
    (loaded, states.collect())
}

#[test]
fn truncated_at_every_byte() {
    let mut rng = fastrand::Rng::with_seed(seed());
    for bytes in [precopy(), postcopy()] {
        let (whole, after) = outcome(&bytes, &mut rng);
        whole.expect("whole");
        assert_eq!(after, [b"first".to_vec(), vec![9; 40], b"".to_vec()]);
        for end in 0..bytes.len() {
            let (loaded, states) = outcome(&bytes[..end], &mut rng);
            match loaded {
                Ok(()) => assert_eq!(bytes[end..end + 2], [6, 0], "EOF, {end}"),
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains("truncated"), "{end}: {text}");
                }
            }
            for (state, after) in states.iter().zip(&after) {
                assert!(state == b"before" || state == after);
            }
        }
    }
}

#[test]
fn flipped_bits_are_no_danger() {
    let mut rng = fastrand::Rng::with_seed(seed());
    let rounds = match std::env::var_os("VMFERRY_LONG") {
        Some(_) => 1_000_000,
        None => 10_000,
    };
    let streams = [precopy(), postcopy()];
    let mut refused = 0;
    for _ in 0..rounds {
        let mut bytes = streams[rng.usize(..2)].clone();
        for _ in 0..rng.usize(1..3) {
            let place = rng.usize(..bytes.len());
            bytes[place] ^= 1 << rng.u8(..8);
        }
        let (loaded, _) = outcome(&bytes, &mut rng);
        if let Err(error) = loaded {
            assert!(!error.to_string().is_empty());
            let _ = error.blame();
            refused += 1;
        }
    }
    assert!(refused > rounds / 4, "{refused}");
}
