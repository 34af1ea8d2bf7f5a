//! Figures to watch while RAM is sent.

use std::sync::atomic::{AtomicU8, AtomicU64};

/// Figures that others watch while RAM is sent. Pages have [`PAGE_BYTES`](crate::PAGE_BYTES).
#[derive(Debug, Default)]
pub struct RamSourceStats {
    /// Sum of the lengths of all blocks that are sent.
    pub total_bytes: AtomicU64,
    /// Bytes known to be left to send, as of the last record.
    pub remaining_bytes: AtomicU64,
    /// Pages sent, every time one was sent, in whatever form.
    pub sent_pages: AtomicU64,
    /// Bytes of all records.
    pub wire_bytes: AtomicU64,
    /// Pages sent whole.
    pub normal_pages: AtomicU64,
    /// Pages sent as zeroes.
    pub zero_pages: AtomicU64,
    /// Pages sent as what changed in them.
    pub xbzrle_pages: AtomicU64,
    /// Bytes of what changed.
    pub xbzrle_bytes: AtomicU64,
    /// Pages that were written but held what was sent already: not sent.
    pub xbzrle_unchanged_pages: AtomicU64,
    /// Pages sent whole since their last version was not known any more.
    pub xbzrle_cache_misses: AtomicU64,
    /// Pages sent whole since too much had changed.
    pub xbzrle_overflows: AtomicU64,
    /// Passes that have begun (QEMU's `dirty-sync-count`).
    pub passes: AtomicU64,
    /// Pages that the guest dirties in a second, as of the last look at its dirty log.
    pub dirty_pages_per_second: AtomicU64,
    /// Time of the last look at the dirty log, in microseconds.
    pub dirty_log_us: AtomicU64,
    /// Percent of the time that the guest's vCPUs stand still.
    pub throttle_percent: AtomicU8,
    /// Requests of the destination in a postcopy.
    pub postcopy_requests: AtomicU64,
}
