//! Memory for the data of requests and replies.

use vmferry_buffer::{Buffer, Pool};

/// Buffer sizes that are kept for reuse, and how many of each at most: fresh memory costs a page
/// fault for every 4 KiB, which is more than copying them.
const CLASSES: [(usize, usize); 3] = [(64 << 10, 64), (256 << 10, 64), (1 << 20, 32)];

/// Data below this size lives in ordinary memory.
const POOLED_BYTES_MIN: usize = 16 << 10;

/// Where payload memory comes from; one for each server.
///
/// The pools only make memory cheap: when they are empty, plain memory is used. How much there can
/// be in all is the business of the connections' budgets.
#[derive(Debug)]
pub(crate) struct Payloads {
    pools: Vec<Pool>,
}

impl Payloads {
    pub(crate) fn new() -> Self {
        Self {
            pools: CLASSES
                .iter()
                .map(|&(bytes, count)| Pool::new(bytes, bytes.saturating_mul(count)))
                .collect(),
        }
    }

    /// `length` initialised bytes of unspecified content.
    pub(crate) fn take(&self, length: usize) -> Payload {
        if length >= POOLED_BYTES_MIN {
            let fitting = self.pools.iter().find(|pool| pool.buffer_bytes() >= length);
            if let Some(buffer) = fitting.and_then(Pool::try_take) {
                return Payload::Pooled(buffer, length);
            }
        }
        Payload::Owned(vec![0; length])
    }

    /// Free what is kept for reuse.
    pub(crate) fn shrink(&self) {
        for pool in &self.pools {
            pool.shrink();
        }
    }
}

/// Data of one request or reply.
#[derive(Debug)]
pub(crate) enum Payload {
    /// A pool's buffer, of which the first bytes count.
    Pooled(Buffer, usize),
    Owned(Vec<u8>),
}

impl Payload {
    pub(crate) const EMPTY: Self = Self::Owned(Vec::new());

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Pooled(buffer, length) => buffer.get(..*length).unwrap_or(&[]),
            Self::Owned(bytes) => bytes,
        }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Pooled(buffer, length) => buffer.get_mut(..*length).unwrap_or(&mut []),
            Self::Owned(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_exactly_the_asked_length_from_whatever_memory() {
        let payloads = Payloads::new();
        for length in [0, 1, 4096, 16 << 10, (64 << 10) + 1, 1 << 20, (1 << 20) + 1] {
            let mut payload = payloads.take(length);
            assert_eq!(payload.bytes().len(), length);
            assert_eq!(payload.bytes_mut().len(), length);
        }
    }

    #[test]
    fn an_empty_pool_does_not_stop_anybody() {
        let payloads = Payloads::new();
        let taken: Vec<Payload> = (0..100).map(|_| payloads.take(64 << 10)).collect();
        assert!(matches!(taken[0], Payload::Pooled(..)));
        assert!(matches!(taken[99], Payload::Owned(_)));
        assert_eq!(taken[99].bytes().len(), 64 << 10);
    }
}
