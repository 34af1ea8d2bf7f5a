//! What a disk must hold: each block's content derives from the seed, the block and how often it was written.

use std::io::Write;
use std::sync::atomic::{AtomicU32, Ordering};

/// Size of a write, in bytes.
pub(crate) const BLOCK: usize = 4096;

/// Every so often a block is made zero instead.
const ZERO_EVERY: u32 = 7;

/// The log of all writes.
pub(crate) struct Log {
    seed: u64,
    blocks: Box<[Writes]>,
}

/// Writes of one block. Version 0 is what the disk had at first.
#[derive(Default)]
struct Writes {
    submitted: AtomicU32,
    acknowledged: AtomicU32,
}

/// One write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Version {
    pub(crate) block: usize,
    number: u32,
}

impl Version {
    pub(crate) fn is_zero(self) -> bool {
        self.number % ZERO_EVERY == ZERO_EVERY - 1
    }

    pub(crate) fn offset(self) -> u64 {
        (self.block * BLOCK) as u64
    }
}

impl Log {
    pub(crate) fn new(seed: u64, blocks: usize) -> Self {
        let blocks = (0..blocks).map(|_| Writes::default()).collect();
        Self { seed, blocks }
    }

    pub(crate) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// The next write of a block, which is going to be sent. Nobody else writes the block.
    pub(crate) fn submit(&self, block: usize) -> Version {
        let number = 1 + self.blocks[block].submitted.fetch_add(1, Ordering::SeqCst);
        Version { block, number }
    }

    pub(crate) fn acknowledge(&self, version: Version) {
        let acknowledged = &self.blocks[version.block].acknowledged;
        acknowledged.fetch_max(version.number, Ordering::SeqCst);
    }

    pub(crate) fn content(&self, version: Version) -> Vec<u8> {
        let mut content = vec![0; BLOCK];
        if !version.is_zero() {
            let key = (version.block as u64) << 32 | u64::from(version.number);
            fastrand::Rng::with_seed(self.seed ^ key.wrapping_mul(0x9e37_79b9_7f4a_7c15))
                .fill(&mut content);
        }
        content
    }

    /// What the disk has at first.
    pub(crate) fn write_first_content(&self, mut disk: impl Write) {
        for block in 0..self.blocks() {
            let content = self.content(Version { block, number: 0 });
            disk.write_all(&content).expect("a disk can be written");
        }
    }

    /// The newest write of a block that was acknowledged.
    pub(crate) fn newest(&self, block: usize) -> Version {
        let number = self.blocks[block].acknowledged.load(Ordering::SeqCst);
        Version { block, number }
    }

    /// Is `found`, which was read from the block, `newest`, which was the newest write before the read, or a later one?
    /// `None` means to read again, for a write was under way.
    pub(crate) fn check(&self, newest: Version, found: &[u8]) -> Option<Result<(), String>> {
        let Version {
            block,
            number: acknowledged,
        } = newest;
        let submitted = self.blocks[block].submitted.load(Ordering::SeqCst);
        let is = |number| self.content(Version { block, number }) == found;
        if (acknowledged..=submitted).any(is) {
            return Some(Ok(()));
        }
        let holds = match (0..acknowledged).rev().find(|number| is(*number)) {
            Some(number) => format!("write {number}"),
            // Nobody promises that a read sees all of a write or nothing of it.
            None if acknowledged < submitted => return None,
            None => "something else".to_owned(),
        };
        Some(Err(format!(
            "block {block}: write {acknowledged} was acknowledged (of {submitted} submitted), but it holds {holds}"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_holds_what_was_acknowledged_or_a_later_write() {
        let log = Log::new(1, 2);
        let versions: Vec<_> = (0..3).map(|_| log.submit(1)).collect();
        log.acknowledge(versions[1]);
        let check = |content: &[u8]| log.check(log.newest(1), content);
        assert!(check(&log.content(versions[0])).is_some_and(|found| found.is_err()));
        assert_eq!(check(&log.content(versions[1])), Some(Ok(())));
        assert_eq!(check(&log.content(versions[2])), Some(Ok(())));
        assert_eq!(check(&[1; BLOCK]), None);
        log.acknowledge(versions[2]);
        assert!(check(&[1; BLOCK]).is_some_and(|found| found.is_err()));
    }
}
