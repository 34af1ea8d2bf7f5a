//! What an operator may set.

use std::time::Duration;

/// Numbers that may change while a migration runs. Names and defaults are QEMU's, except for the
/// bandwidth, which is unlimited unless set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Bytes per second at most; `None` is unlimited.
    pub max_bandwidth: Option<u64>,
    /// How long the guest's writes may be held at the switch-over.
    pub downtime_limit: Duration,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            max_bandwidth: None,
            downtime_limit: Duration::from_millis(300),
        }
    }
}

/// Longest downtime limit that can be set, as in QEMU.
pub const DOWNTIME_LIMIT_MAX: Duration = Duration::from_secs(2000);

/// What a migration may do; fixed when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Send all-zero blocks as such. On by default, unlike QEMU's.
    pub zero_blocks: bool,
    /// Send only what is allocated in the disks' top layers; the destination's disks lie over the
    /// same bases. Off by default.
    pub incremental: bool,
    /// Expect an answer. Without it nobody tells whether the disks arrived.
    pub return_path: bool,
    /// Stop in `pre-switchover`, with the guest held, until told to go on.
    pub pause_before_switchover: bool,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self {
            zero_blocks: true,
            incremental: false,
            return_path: true,
            pause_before_switchover: false,
        }
    }
}
