//! The channel's bytes, as windows.

use std::time::{Duration, Instant};

use vmferry_channel::{ChannelError, Reader, Stop};

/// How long a source may take to send header and configuration.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes read ahead of a record.
const WINDOW_BYTES: usize = 256 << 10;
/// Read ahead before large payload, that of a disk: little, for it would have to be copied.
const WINDOW_BEFORE_PAYLOAD_BYTES: usize = 4 << 10;
/// Payload that is large: pages are not, one read for each would take longer than copying them.
const LARGE_PAYLOAD_BYTES: usize = 64 << 10;
/// Figures are published whenever this much has come.
const PUBLISH_BYTES: u64 = 4 << 20;

/// The channel's bytes, as windows.
pub(super) struct Input {
    reader: Reader,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    read_ahead: usize,
    received: u64,
    published: u64,
    pub(super) greeting_deadline: Instant,
}

impl Input {
    pub(super) fn new(reader: Reader) -> Self {
        Self {
            reader,
            buffer: vec![0; WINDOW_BYTES],
            start: 0,
            end: 0,
            read_ahead: WINDOW_BYTES,
            received: 0,
            published: 0,
            greeting_deadline: Instant::now() + GREETING_PATIENCE,
        }
    }

    /// Breaks the channel off.
    pub(super) fn stop(&self) -> Stop {
        self.reader.stop().clone()
    }

    pub(super) fn window(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub(super) fn consume(&mut self, bytes: usize) {
        self.start += bytes;
    }

    /// Bytes that were received in all.
    pub(super) fn end(&self) -> u64 {
        self.received
    }

    /// Read until the window has `bytes` bytes; false if the input ends before.
    pub(super) fn fill(
        &mut self,
        bytes: usize,
        deadline: Option<Instant>,
    ) -> Result<bool, ChannelError> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if bytes > self.buffer.len() {
            // The state of a device may be long: what is longer than it may be is not asked for.
            self.buffer.resize(bytes.saturating_mul(2), 0);
            self.read_ahead = self.buffer.len();
        }
        while self.end < bytes {
            let room = self.read_ahead.max(bytes).min(self.buffer.len());
            let length = self
                .reader
                .read_until(&mut self.buffer[self.end..room], deadline)?;
            if length == 0 {
                return Ok(false);
            }
            self.end += length;
            self.received += length as u64;
        }
        Ok(true)
    }

    /// Fill `room` from the window and then straight from the channel; false if the input ends.
    pub(super) fn read_payload(&mut self, room: &mut [u8]) -> Result<bool, ChannelError> {
        self.read_ahead = match room.len() {
            LARGE_PAYLOAD_BYTES.. => WINDOW_BEFORE_PAYLOAD_BYTES,
            _ => WINDOW_BYTES,
        };
        let mut filled = room.len().min(self.end - self.start);
        room[..filled].copy_from_slice(&self.buffer[self.start..self.start + filled]);
        self.start += filled;
        while filled < room.len() {
            let length = self.reader.read(&mut room[filled..])?;
            if length == 0 {
                return Ok(false);
            }
            filled += length;
            self.received += length as u64;
        }
        Ok(true)
    }

    pub(super) fn worth_publishing(&mut self) -> bool {
        let due = self.received - self.published >= PUBLISH_BYTES;
        if due {
            self.published = self.received;
        }
        due
    }
}
