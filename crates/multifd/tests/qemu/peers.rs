//! Real QEMUs, as the tests of the program have them.

use std::path::PathBuf;
use std::time::{Duration, Instant};

#[path = "../../../vmferry/tests/peers/qemu.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
pub(crate) mod qemu;
#[path = "../../../vmferry/tests/peers/qmp.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
pub(crate) mod qmp;

/// Disks, of which there are none here.
pub(crate) mod image {
    #[derive(Clone, Copy)]
    pub(crate) enum Format {
        Raw,
    }

    impl Format {
        pub(crate) fn name(self) -> &'static str {
            match self {
                Self::Raw => "raw",
            }
        }
    }
}

/// How long one thing may take that takes milliseconds, on a loaded machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

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

/// The program that `scripts/peers` names by `variable`.
pub(crate) fn find(variable: &str, what: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    let is_required = std::env::var_os("VMFERRY_REQUIRE_PEERS").is_some_and(|one| one == "1");
    match path {
        Some(path) if path.exists() => return Some(path),
        _ => assert!(!is_required, "{variable} names no program"),
    }
    println!("left out: needs {what} (scripts/peers)");
    None
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
