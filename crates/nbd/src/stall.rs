//! Telling a slow client from one that has stopped in the middle of something.

use std::time::{Duration, Instant};

/// So many more bytes are progress; single ones now and then are not.
const PROGRESS_BYTES_MIN: usize = 64 << 10;

/// Watches data arrive.
#[derive(Debug)]
pub(crate) struct Stall {
    timeout: Duration,
    deadline: Option<Instant>,
    seen: usize,
}

impl Stall {
    pub(crate) fn new(timeout: Duration) -> Self {
        Self {
            timeout,
            deadline: Instant::now().checked_add(timeout),
            seen: 0,
        }
    }

    /// This much is here.
    pub(crate) fn note(&mut self, bytes: usize) {
        if bytes.saturating_sub(self.seen) >= PROGRESS_BYTES_MIN {
            self.seen = bytes;
            self.deadline = Instant::now().checked_add(self.timeout);
        }
    }

    /// When the client has stopped, if nothing more comes. None is never.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_real_progress_moves_the_deadline() {
        let mut stall = Stall::new(Duration::from_secs(1));
        let first = stall.deadline();
        stall.note(1);
        stall.note(PROGRESS_BYTES_MIN - 1);
        assert_eq!(stall.deadline(), first);
        std::thread::sleep(Duration::from_millis(1));
        stall.note(PROGRESS_BYTES_MIN);
        assert!(stall.deadline() > first);
    }
}
