//! Streams that were changed on the way: parked whole, or not at all, and never with a panic.

use crate::contents::{capture, park_in_pieces, read, seeded};

fn long() -> bool {
    std::env::var_os("VMFERRY_LONG").is_some_and(|value| value == "1")
}

/// Change a stream somewhere: mostly where its structure is.
fn change(stream: &mut Vec<u8>, rng: &mut fastrand::Rng) {
    let at = match rng.u8(..3) {
        0 => rng.usize(..stream.len().min(600)),
        1 => stream.len() - 1 - rng.usize(..stream.len().min(30_000)),
        _ => rng.usize(..stream.len()),
    };
    let end = (at + rng.usize(1..40)).min(stream.len());
    match rng.u8(..5) {
        0 => stream[at] ^= 1 << rng.u8(..8),
        1 => stream[at] = [0, 1, 2, 3, 4, 6, 8, 0x7e, 0xff][rng.usize(..9)],
        2 => drop(stream.drain(at..end)),
        3 => {
            let piece = stream[at..end].to_vec();
            stream.splice(at..at, piece);
        }
        _ => stream[at..end]
            .iter_mut()
            .for_each(|byte| *byte = rng.u8(..)),
    }
}

#[test]
fn what_was_changed_on_the_way_does_no_harm() {
    let mut rng = seeded();
    let (mut whole, mut refused) = (0, 0);
    for name in [
        "none-100",
        "pc-2.3-72",
        "pc-100",
        "bgsnap-72",
        "dirty-bitmap-100",
        "postcopy-72.fwd",
        "postcopy-100.fwd",
        "postcopy-hugepages-100.fwd",
    ] {
        let stream = capture(name);
        for _ in 0..if long() { 3000 } else { 40 } {
            let mut changed = stream.clone();
            for _ in 0..rng.u8(1..4) {
                change(&mut changed, &mut rng);
            }
            let max = [changed.len(), 4096, 300][rng.usize(..3)];
            match park_in_pieces(&changed, || rng.usize(1..=max)) {
                Err(error) => {
                    refused += 1;
                    assert!(!error.to_string().is_empty());
                }
                Ok((bytes, _)) => {
                    whole += 1;
                    let (_, commands, finish) =
                        read(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
                    assert_eq!(finish.bytes, bytes.len() as u64, "{name}");
                    assert!(commands.iter().all(|it| it == "SWITCHOVER_START"), "{name}");
                }
            }
        }
    }
    println!("{whole} whole, {refused} refused");
    assert!(whole > 0 && refused > 0);
}
