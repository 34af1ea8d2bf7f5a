//! What the tests of this crate share.

use std::env;

/// A generator with the seed of `VMFERRY_SEED`, or a random one; it is printed.
pub(crate) fn rng() -> fastrand::Rng {
    let seed = env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// `rounds`, or many more if `VMFERRY_LONG` is 1.
pub(crate) fn rounds(rounds: usize) -> usize {
    match env::var("VMFERRY_LONG").as_deref() {
        Ok("1") => rounds * 50,
        _ => rounds,
    }
}
