//! The next bytes of a connection that a decoder looks at.

use vmferry_channel::{ChannelError, Reader};
use vmferry_stream::{Section, SectionId};

/// Read at once.
const PIECE_BYTES: usize = 256 << 10;

/// Bytes of a device in front of the pages, whose end is looked for. Real ones have 44.
pub(crate) const EARLY_DEVICE_BYTES_MAX: usize = 1 << 20;

/// Bytes that were read and not used yet.
#[derive(Debug, Default)]
pub(crate) struct Window {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl Window {
    /// A window that starts with these bytes.
    pub(crate) fn starting_with(bytes: Vec<u8>) -> Self {
        Self {
            start: 0,
            end: bytes.len(),
            buffer: bytes,
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// The next `bytes` bytes, or all that there are.
    pub(crate) fn first(&self, bytes: usize) -> &[u8] {
        let window = self.bytes();
        window.get(..bytes).unwrap_or(window)
    }

    pub(crate) fn consume(&mut self, bytes: usize) {
        self.start = self.start.saturating_add(bytes).min(self.end);
    }

    /// Have at least `bytes` bytes; false if the input ends before.
    pub(crate) fn fill(&mut self, reader: &mut Reader, bytes: usize) -> Result<bool, ChannelError> {
        while self.bytes().len() < bytes {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
            let room = bytes.max(self.end.saturating_add(PIECE_BYTES));
            if self.buffer.len() < room {
                self.buffer.resize(room, 0);
            }
            let target = self.buffer.get_mut(self.end..).unwrap_or_default();
            match reader.read(target)? {
                0 => return Ok(false),
                more => self.end = self.end.saturating_add(more),
            }
        }
        Ok(true)
    }

    /// Bytes of the device's body that starts here, if its end is in the window: its footer, and
    /// behind it something that may follow a section.
    pub(crate) fn device_bytes(&self, section: &Section) -> Option<usize> {
        let SectionId(id) = section.id;
        let [a, b, c, d] = id.to_be_bytes();
        let is_end = |bytes: &[u8]| matches!(bytes, [0x7e, e, f, g, h, 0x01..=0x04 | 0x08] if [*e, *f, *g, *h] == [a, b, c, d]);
        self.bytes().windows(6).position(is_end)
    }
}
