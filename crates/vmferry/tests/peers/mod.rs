//! What the interop tests stand on: real QEMUs, a Linux guest, disks with known content, the `vmferry` program.
//!
//! `scripts/peers` gets the programs and prints the environment in which they are found. A test that needs one that is
//! not there says so and passes, unless `VMFERRY_REQUIRE_PEERS=1` (set where everything could be had) makes that a
//! failure. Everything that waits has a deadline and fails with what it was waiting for and what the peer last said.

pub(crate) mod disk;
pub(crate) mod guest;
pub(crate) mod image;
pub(crate) mod nbd;
pub(crate) mod patterns;
pub(crate) mod qemu;
pub(crate) mod qmp;
pub(crate) mod serve;
pub(crate) mod vmferry;
pub(crate) mod writer;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long one thing may take that takes milliseconds, or seconds for a guest that boots, on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(240);

/// Leaves the test, which passes, if a peer is missing.
#[macro_export]
macro_rules! need {
    ($peer:expr) => {
        match $peer {
            Some(peer) => peer,
            None => return,
        }
    };
}

/// The program or file that `scripts/peers` names by `variable`.
///
/// # Panics
/// If it is not there although `VMFERRY_REQUIRE_PEERS` says that all peers are.
pub(crate) fn find(variable: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    match path {
        Some(path) if path.exists() => return Some(path),
        Some(path) => {
            assert!(
                !required(),
                "{variable} names {}, which does not exist",
                path.display()
            );
        }
        None => assert!(
            !required(),
            "{variable} is not set, and VMFERRY_REQUIRE_PEERS is"
        ),
    }
    println!("left out: needs {what} (scripts/peers)");
    None
}

/// Whether everything that tests need is said to be there.
pub(crate) fn required() -> bool {
    std::env::var_os("VMFERRY_REQUIRE_PEERS") == Some(OsString::from("1"))
}

/// Whether the long variants run.
pub(crate) fn long() -> bool {
    std::env::var_os("VMFERRY_LONG") == Some(OsString::from("1"))
}

/// A source of test data, whose seed is printed: `VMFERRY_SEED` repeats a run.
pub(crate) fn seeded() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// Asks `probe` again and again until it has an answer.
///
/// # Panics
/// If it has none within [`PATIENCE`].
pub(crate) fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(Instant::now() < deadline, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
