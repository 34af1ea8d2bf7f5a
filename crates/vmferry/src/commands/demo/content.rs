//! What the demo's disk must hold: the content of each block derives from the seed, the block's
//! number and how often it was written, so that the log of all writes is one number for a block.

use std::sync::atomic::{AtomicU32, Ordering};

/// Size of a write, in bytes.
pub(super) const BLOCK_BYTES: usize = 4096;

/// The log: how often each block was written, as far as it was acknowledged.
#[derive(Debug)]
pub(super) struct Log {
    seed: u64,
    versions: Box<[AtomicU32]>,
}

/// A block is not what was last acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("block {block} (byte {}) does not hold its write number {expected}: {found}", block * BLOCK_BYTES as u64)]
pub(super) struct Lost {
    pub(super) block: u64,
    pub(super) expected: u32,
    pub(super) found: String,
}

impl Log {
    /// The log of a disk of `blocks` blocks that were all written once, as version 0.
    pub(super) fn new(seed: u64, blocks: u64) -> Self {
        let versions = (0..blocks).map(|_| AtomicU32::new(0)).collect();
        Self { seed, versions }
    }

    pub(super) fn blocks(&self) -> u64 {
        self.versions.len() as u64
    }

    /// The content that the next write of this block has. Nobody else writes the block meanwhile.
    pub(super) fn next(&self, block: u64, buf: &mut [u8]) -> u32 {
        let version = self.version(block).wrapping_add(1);
        fill(self.seed, block, version, buf);
        version
    }

    /// This version of the block was acknowledged.
    pub(super) fn acknowledged(&self, block: u64, version: u32) {
        if let Some(slot) = self.slot(block) {
            slot.store(version, Ordering::SeqCst);
        }
    }

    /// Number of writes that were acknowledged, all in all.
    pub(super) fn writes(&self) -> u64 {
        self.versions
            .iter()
            .map(|version| u64::from(version.load(Ordering::SeqCst)))
            .sum()
    }

    /// The first content of the blocks from `first` on; `buf` holds whole blocks.
    pub(super) fn first_content(&self, first: u64, buf: &mut [u8]) {
        for (block, content) in (first..).zip(buf.chunks_mut(BLOCK_BYTES)) {
            fill(self.seed, block, 0, content);
        }
    }

    /// Is `data` what the blocks from `first` on must hold?
    pub(super) fn check(&self, first: u64, data: &[u8]) -> Result<(), Lost> {
        let mut wanted = [0; BLOCK_BYTES];
        for (block, found) in (first..).zip(data.chunks(BLOCK_BYTES)) {
            let expected = self.version(block);
            fill(self.seed, block, expected, &mut wanted);
            if found != wanted {
                let found = self.explain(block, found);
                return Err(Lost {
                    block,
                    expected,
                    found,
                });
            }
        }
        Ok(())
    }

    /// What a wrong block holds, for the message.
    fn explain(&self, block: u64, found: &[u8]) -> String {
        if found.iter().all(|byte| *byte == 0) {
            return "it is all zero".to_owned();
        }
        let mut content = [0; BLOCK_BYTES];
        for version in 0..=self.version(block).saturating_add(1) {
            fill(self.seed, block, version, &mut content);
            if found == content {
                return format!("it holds write number {version}");
            }
        }
        "it holds something else".to_owned()
    }

    fn version(&self, block: u64) -> u32 {
        self.slot(block)
            .map_or(0, |slot| slot.load(Ordering::SeqCst))
    }

    fn slot(&self, block: u64) -> Option<&AtomicU32> {
        usize::try_from(block)
            .ok()
            .and_then(|block| self.versions.get(block))
    }
}

fn fill(seed: u64, block: u64, version: u32, buf: &mut [u8]) {
    let stream = seed ^ block.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(version) << 40;
    fastrand::Rng::with_seed(stream).fill(buf);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_write_is_found_and_told_apart_from_damage() {
        let log = Log::new(7, 4);
        let mut disk = vec![0; 4 * BLOCK_BYTES];
        log.first_content(0, &mut disk);
        assert_eq!(log.check(0, &disk), Ok(()));

        let mut write = vec![0; BLOCK_BYTES];
        let version = log.next(2, &mut write);
        log.acknowledged(2, version);
        let lost = log.check(0, &disk).unwrap_err();
        assert_eq!((lost.block, lost.expected), (2, 1));
        assert_eq!(lost.found, "it holds write number 0");

        disk[2 * BLOCK_BYTES..3 * BLOCK_BYTES].copy_from_slice(&write);
        assert_eq!(log.check(0, &disk), Ok(()));
        assert_eq!(log.check(2, &disk[2 * BLOCK_BYTES..]), Ok(()));
        assert_eq!(log.writes(), 1);

        disk[3 * BLOCK_BYTES] ^= 1;
        assert_eq!(
            log.check(0, &disk).unwrap_err().found,
            "it holds something else"
        );
        disk[3 * BLOCK_BYTES..].fill(0);
        assert_eq!(log.check(0, &disk).unwrap_err().found, "it is all zero");
    }

    #[test]
    fn blocks_and_versions_differ() {
        let log = Log::new(7, 2);
        let mut disk = vec![0; 2 * BLOCK_BYTES];
        log.first_content(0, &mut disk);
        assert_ne!(disk[..BLOCK_BYTES], disk[BLOCK_BYTES..]);
        disk.rotate_left(BLOCK_BYTES);
        assert!(log.check(0, &disk).is_err());
    }
}
