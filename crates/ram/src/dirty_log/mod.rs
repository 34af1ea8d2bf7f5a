//! Which pages the guest has written.

use std::ops::Range;

use crate::block::BlockIndex;
use crate::guest::GuestRam;

/// A dirty log failed; says what and why.
#[derive(Debug, thiserror::Error)]
#[error("dirty log: {what}: {source}")]
pub struct DirtyLogError {
    /// What was done.
    pub what: String,
    /// What the host said.
    #[source]
    pub source: std::io::Error,
}

/// Finds out which pages were written.
///
/// A write to a page that happens after [`DirtyLog::collect`] has reported it must be reported by a
/// later one: reporting a page and forgetting it is one atomic step, and only pages whose report was
/// asked for are forgotten. Pages may be reported that were not written. All writes count, those of
/// vCPUs and those that the VMM does for its devices.
pub trait DirtyLog: Send {
    /// Begin: every page that is written from now on will be reported. May be called again after
    /// [`DirtyLog::stop`].
    ///
    /// # Errors
    /// The host cannot do it.
    fn start(&mut self, ram: &dyn GuestRam) -> Result<(), DirtyLogError>;

    /// Report the guest pages that were written since they were reported last, as runs, and forget
    /// them.
    ///
    /// # Errors
    /// The host failed: what was written is not known, the migration cannot go on.
    fn collect(
        &mut self,
        ram: &dyn GuestRam,
        dirty: &mut dyn FnMut(BlockIndex, Range<u64>),
    ) -> Result<(), DirtyLogError>;

    /// End: writes cost nothing any more.
    fn stop(&mut self, ram: &dyn GuestRam);
}
