//! The channel as a sink of the save machine.

use std::io::IoSlice;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmferry_channel::{ChannelError, RateLimit, Writer};
use vmferry_savevm::{HandlerError, Sink};

/// The rate limit that an operator may change at any time, until it is lifted for the switch-over.
#[derive(Clone, Debug)]
pub(crate) struct Throttle {
    limit: RateLimit,
    lifted: Arc<Mutex<bool>>,
}

impl Throttle {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            limit: RateLimit::new(bytes_per_second.unwrap_or(0)),
            lifted: Arc::default(),
        }
    }

    /// Counts for the block that is being written, too.
    pub(crate) fn set(&self, bytes_per_second: Option<u64>) {
        let lifted = self.lifted.lock().unwrap_or_else(PoisonError::into_inner);
        if !*lifted {
            self.limit.set(bytes_per_second.unwrap_or(0));
        }
    }

    /// Guests wait from now on: no limit any more, whatever is set.
    pub(crate) fn lift(&self) {
        let mut lifted = self.lifted.lock().unwrap_or_else(PoisonError::into_inner);
        *lifted = true;
        self.limit.set(0);
    }

    pub(crate) fn limit(&self) -> &RateLimit {
        &self.limit
    }
}

/// Reads of the disk, most likely: the channel would have said so itself.
const TOO_SLOW: &str = "the last chunks could not be read in time";

/// Small pieces are collected up to this many bytes.
const COLLECT_BYTES: usize = 64 << 10;

/// Collects small pieces and writes them with the next large one.
pub(crate) struct ChannelSink {
    writer: Writer,
    small: Vec<u8>,
    limit: RateLimit,
    deadline: Option<Instant>,
}

impl ChannelSink {
    pub(crate) fn new(mut writer: Writer, limit: RateLimit) -> Self {
        writer.set_rate_limit(limit.clone());
        Self {
            writer,
            small: Vec::with_capacity(2 * COLLECT_BYTES),
            limit,
            deadline: None,
        }
    }

    /// Guests wait from now on: the channel must have taken everything by then.
    pub(crate) fn set_deadline(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }

    /// Nobody waits any more.
    pub(crate) fn clear_deadline(&mut self) {
        self.deadline = None;
    }

    /// Bytes that the channel has taken.
    pub(crate) fn taken_bytes(&self) -> u64 {
        self.writer.counter().bytes()
    }

    pub(crate) fn flush(&mut self) -> Result<(), ChannelError> {
        if !self.small.is_empty() {
            self.writer.write_all_until(&self.small, self.deadline)?;
            self.small.clear();
        }
        Ok(())
    }

    /// How long to wait for the next time slice.
    pub(crate) fn until_next_slice(&self) -> Duration {
        let now = Instant::now();
        self.limit.next_slice(now).saturating_duration_since(now)
    }

    pub(crate) fn into_writer(self) -> Writer {
        self.writer
    }

    fn put_now(&mut self, parts: &[&[u8]]) -> Result<(), ChannelError> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        if length <= COLLECT_BYTES {
            parts
                .iter()
                .for_each(|part| self.small.extend_from_slice(part));
            return if self.small.len() < COLLECT_BYTES {
                Ok(())
            } else {
                self.flush()
            };
        }
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&self.small));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        self.writer
            .write_vectored_all_until(&slices, self.deadline)?;
        self.small.clear();
        Ok(())
    }
}

impl Sink for ChannelSink {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        Ok(self.put_now(parts)?)
    }

    fn allowance(&self) -> u64 {
        self.limit.allowance(Instant::now())
    }

    fn check(&self) -> Result<(), HandlerError> {
        if self.writer.stop().is_triggered() {
            return Err(ChannelError::Stopped.into());
        }
        match self.deadline {
            Some(deadline) if Instant::now() >= deadline => Err(TOO_SLOW.into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_was_lifted_does_not_come_back() {
        let throttle = Throttle::new(Some(1000));
        assert_eq!(throttle.limit().bytes_per_second(), Some(1000));
        throttle.set(Some(2000));
        assert_eq!(throttle.limit().bytes_per_second(), Some(2000));
        throttle.set(None);
        assert_eq!(throttle.limit().bytes_per_second(), None);
        throttle.set(Some(1));
        throttle.lift();
        throttle.clone().set(Some(1));
        assert_eq!(throttle.limit().bytes_per_second(), None);
    }
}
