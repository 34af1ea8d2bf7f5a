//! Histories of a guest that never stays where it is: two processes, and everything that can happen
//! between them. The guest checks itself all the time.
//!
//! `VMFERRY_RUN=SEED` repeats one history, `VMFERRY_LONG=1` makes ten times as many moves.

mod history;
mod host;
mod link;
mod operator;

use history::{Ends, History};
use vmferry_ram::Userfault;

/// Moves of all histories together.
const MOVES: u64 = 100;
const MOVES_LONG: u64 = 1000;
const MOVES_PER_HISTORY: u64 = 10;

#[test]
fn a_guest_survives_everything() {
    let number = |name| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse().expect("a number"))
    };
    if let Some(seed) = number("VMFERRY_RUN") {
        println!("{:#?}", History::new(seed).run(MOVES_PER_HISTORY));
        return;
    }
    if let Err(error) = Userfault::open_missing() {
        println!("left out, all postcopies: {error}");
    }
    let seed: u64 = number("VMFERRY_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    let mut seeds = fastrand::Rng::with_seed(seed);
    let moves = if std::env::var_os("VMFERRY_LONG").is_some() {
        MOVES_LONG
    } else {
        MOVES
    };
    let mut ends = Ends::new();
    for _ in 0..moves / MOVES_PER_HISTORY {
        let seed = seeds.u64(..);
        println!("VMFERRY_RUN={seed}");
        for (end, count) in History::new(seed).run(MOVES_PER_HISTORY) {
            *ends.entry(end).or_default() += count;
        }
    }
    println!("{ends:#?}");
}
