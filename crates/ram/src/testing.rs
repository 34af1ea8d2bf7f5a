//! What the tests of this crate share.

/// A generator with the seed of `VMFERRY_SEED`, or a random one; it is printed.
pub(crate) fn rng() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// How many rounds: so few, or with `VMFERRY_LONG=1` so many.
pub(crate) fn long(few: u32, many: u32) -> u32 {
    match std::env::var_os("VMFERRY_LONG") {
        Some(_) => many,
        None => few,
    }
}
