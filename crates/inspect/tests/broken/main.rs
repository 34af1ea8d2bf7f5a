//! Streams that are cut short or damaged: there is always a report, it always ends, it is small, and
//! it says where the trouble is.

mod captures;
mod flips;
mod hostile;
mod memory;
mod truncations;

/// What a report may hold at once, whatever it is about.
const MEMORY_MAX: usize = 64 << 20;

/// Whether the long variants run.
fn long() -> bool {
    std::env::var_os("VMFERRY_LONG").is_some_and(|value| value == "1")
}

/// A source of test data, whose seed is printed: `VMFERRY_SEED` repeats a run.
fn seeded() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}
