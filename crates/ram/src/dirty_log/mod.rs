//! Which pages the guest has written.
//!
//! | log | sees writes of | needs |
//! |---|---|---|
//! | [`UserfaultLog`] | vCPUs (KVM or threads), the VMM, system calls that it makes | Linux 6.7 |
//! | [`KvmLog`] | vCPUs of KVM | a KVM VM |
//! | [`MarkedLog`] | whoever says so | |
//! | `VmMemoryLog` (feature `vm-memory`) | who writes through `vm-memory` | its bitmaps |
//!
//! A pair of logs is a log of what either sees: that of KVM and the VMM's own.
//!
//! None sees what devices write that the host gave to the guest (VFIO), nor what another process
//! writes to memory that it shares (vhost-user): their VMM says so to a [`MarkedLog`]. Memory that is
//! given back (balloon) reads as zeroes afterwards without having been written. The page may then
//! arrive as it was before. A guest that hands out pages to a balloon must expect that; a VMM that
//! promises it zeroes marks them.

mod kvm;
mod marked;
mod userfault;

pub use kvm::{KvmLog, KvmSlot};
pub use marked::{MarkedLog, Marker};
pub use userfault::UserfaultLog;

use std::ops::Range;

use crate::block::{BlockIndex, PAGE_BYTES, RamBlock};
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

impl DirtyLogError {
    fn new(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self {
            what: what.into(),
            source: source.into(),
        }
    }
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

/// What one of two sees, such as KVM and the VMM. A page that both saw is reported twice.
impl<A: DirtyLog, B: DirtyLog> DirtyLog for (A, B) {
    fn start(&mut self, ram: &dyn GuestRam) -> Result<(), DirtyLogError> {
        self.0.start(ram)?;
        self.1.start(ram).inspect_err(|_| self.0.stop(ram))
    }

    fn collect(
        &mut self,
        ram: &dyn GuestRam,
        dirty: &mut dyn FnMut(BlockIndex, Range<u64>),
    ) -> Result<(), DirtyLogError> {
        self.0.collect(ram, dirty)?;
        self.1.collect(ram, dirty)
    }

    fn stop(&mut self, ram: &dyn GuestRam) {
        self.0.stop(ram);
        self.1.stop(ram);
    }
}

impl<L: DirtyLog + ?Sized> DirtyLog for Box<L> {
    fn start(&mut self, ram: &dyn GuestRam) -> Result<(), DirtyLogError> {
        (**self).start(ram)
    }

    fn collect(
        &mut self,
        ram: &dyn GuestRam,
        dirty: &mut dyn FnMut(BlockIndex, Range<u64>),
    ) -> Result<(), DirtyLogError> {
        (**self).collect(ram, dirty)
    }

    fn stop(&mut self, ram: &dyn GuestRam) {
        (**self).stop(ram);
    }
}

/// For logs that are made from bitmaps: report the pages of a block's part, given one bit for each
/// `bit_bytes` from byte `first_byte` of the block on. Pages are reported that have one written byte;
/// what is not in use is left out.
pub fn report_bits(
    block: &RamBlock,
    first_byte: u64,
    bit_bytes: u64,
    words: &[u64],
    report: &mut dyn FnMut(Range<u64>),
) {
    let mut run: Range<u64> = 0..0;
    let mut add = |pages: Range<u64>| {
        if pages.start <= run.end && pages.end > run.start {
            run.end = run.end.max(pages.end);
            return;
        }
        let before = std::mem::replace(&mut run, pages);
        if !before.is_empty() {
            report(before);
        }
    };
    let bits = words.iter().zip((0u64..).step_by(64));
    for (word, first_bit) in bits.filter(|(word, _)| **word != 0) {
        let mut rest = *word;
        while rest != 0 {
            let bit = first_bit + u64::from(rest.trailing_zeros());
            rest &= rest - 1;
            let start = first_byte.saturating_add(bit.saturating_mul(bit_bytes));
            let end = start.saturating_add(bit_bytes).min(block.used_bytes());
            if start < end {
                add(start / PAGE_BYTES..end.div_ceil(PAGE_BYTES));
            }
        }
    }
    // An empty one behind everything gives the last.
    add(u64::MAX..u64::MAX);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::AnonymousRam;

    #[test]
    fn bits_are_reported_as_runs_of_pages() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        for _ in 0..500 {
            let pages = rng.u64(1..300);
            let ram = AnonymousRam::new(&[("a", pages * PAGE_BYTES)]).unwrap();
            let bit_bytes = 1 << rng.u64(9..18);
            let first_byte = rng.u64(0..pages) * PAGE_BYTES;
            let dense = rng.bool();
            let words: Vec<_> = (0..rng.usize(0..5))
                .map(|_| match dense {
                    true => rng.u64(..) | rng.u64(..),
                    false => rng.u64(..) & rng.u64(..) & rng.u64(..),
                })
                .collect();
            let bits = (0u64..).zip(
                words
                    .iter()
                    .flat_map(|word| (0..64).map(move |bit| word >> bit & 1)),
            );
            let expected: BTreeSet<_> = bits
                .filter(|(_, is_set)| *is_set == 1)
                .flat_map(|(bit, _)| {
                    let start = first_byte + bit * bit_bytes;
                    start / PAGE_BYTES..(start + bit_bytes).div_ceil(PAGE_BYTES)
                })
                .filter(|page| *page < pages)
                .collect();
            let mut reported = BTreeSet::new();
            let mut before = None;
            report_bits(
                &ram.blocks()[0],
                first_byte,
                bit_bytes,
                &words,
                &mut |run| {
                    assert!(
                        before.is_none_or(|end| end < run.start),
                        "{run:?} touches the run before"
                    );
                    assert!(!run.is_empty());
                    before = Some(run.end);
                    reported.extend(run);
                },
            );
            assert_eq!(reported, expected);
        }
    }

    #[test]
    fn bits_that_lie_nowhere_are_left_out() {
        let ram = AnonymousRam::new(&[("a", PAGE_BYTES)]).unwrap();
        let nothing = &mut |run| panic!("{run:?}");
        report_bits(&ram.blocks()[0], u64::MAX, u64::MAX, &[!0; 2], nothing);
        report_bits(&ram.blocks()[0], 0, 0, &[!0; 2], nothing);
        report_bits(&ram.blocks()[0], PAGE_BYTES, PAGE_BYTES, &[!0; 2], nothing);
    }
}
