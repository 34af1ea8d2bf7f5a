//! What these tests need of what the program's tests stand on.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[path = "../../../vmferry/tests/peers/qemu.rs"]
pub(crate) mod qemu;
#[path = "../../../vmferry/tests/peers/qmp.rs"]
pub(crate) mod qmp;

/// How disks are named; these machines have none.
pub(crate) mod image {
    #[derive(Debug, Clone, Copy)]
    pub(crate) enum Format {
        Raw,
    }

    impl Format {
        pub(crate) fn name(self) -> &'static str {
            "raw"
        }
    }
}

/// How long one thing may take on a loaded machine.
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
pub(crate) fn find(variable: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    let found = path.filter(|path| path.exists());
    if found.is_none() {
        let required = std::env::var_os("VMFERRY_REQUIRE_PEERS") == Some(OsString::from("1"));
        assert!(
            !required,
            "{variable} names nothing, and VMFERRY_REQUIRE_PEERS is set"
        );
        println!("left out: needs {what} (scripts/peers)");
    }
    found
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
