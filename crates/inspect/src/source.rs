//! Input that can be looked at before it is consumed.

use std::io::{self, Read};

use crate::limits::HELD_BYTES_MAX;
use crate::walk::WalkError;

/// Bytes that are read at once: they fit into a core's own cache.
const CHUNK_BYTES: usize = 256 << 10;
/// The window does not grow beyond this without need: one byte more than is held shows that it is
/// too much.
const WINDOW_BYTES_MAX: usize = HELD_BYTES_MAX + 1;

/// Steps over bytes of an input.
pub(crate) type Skip<R> = fn(&mut R, u64) -> io::Result<()>;

/// A reader and a window on what comes next.
#[derive(Debug)]
pub(crate) struct Source<R> {
    input: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Place in the input of the window's first byte.
    offset: u64,
    is_over: bool,
}

impl<R: Read> Source<R> {
    /// The input's first byte is byte `offset`.
    pub(crate) fn new(input: R, offset: u64) -> Self {
        Self {
            input,
            buffer: vec![0; CHUNK_BYTES],
            start: 0,
            end: 0,
            offset,
            is_over: false,
        }
    }

    /// Place in the input of the window's first byte.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Place in the input behind the window's last byte.
    pub(crate) fn offset_of_end(&self) -> u64 {
        let length = u64::try_from(self.window().len()).unwrap_or(u64::MAX);
        self.offset.saturating_add(length)
    }

    pub(crate) fn window(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    pub(crate) fn consume(&mut self, bytes: usize) {
        let bytes = bytes.min(self.end.saturating_sub(self.start));
        self.start = self.start.saturating_add(bytes);
        let moved = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.offset = self.offset.saturating_add(moved);
    }

    /// Step over bytes, most of which the input does not read; `false` if it ends before.
    pub(crate) fn skip(&mut self, bytes: u64, seek: Skip<R>) -> Result<bool, WalkError> {
        let have = u64::try_from(self.window().len()).unwrap_or(u64::MAX);
        let rest = bytes.saturating_sub(have);
        self.consume(usize::try_from(bytes).unwrap_or(usize::MAX));
        if rest == 0 {
            return Ok(true);
        }
        match seek(&mut self.input, rest) {
            Ok(()) => {
                self.offset = self.offset.saturating_add(rest);
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(source) => Err(WalkError::Read {
                offset: self.offset,
                source,
            }),
        }
    }

    /// Wait until the window has so many bytes; `false` if the input ends before.
    pub(crate) fn wait_for(&mut self, bytes: usize) -> Result<bool, WalkError> {
        while self.window().len() < bytes {
            if self.is_over {
                return Ok(false);
            }
            self.read(bytes)?;
        }
        Ok(true)
    }

    fn read(&mut self, wanted: usize) -> Result<(), WalkError> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        if wanted > self.buffer.len() {
            let doubled = self.buffer.len().saturating_mul(2);
            let length = wanted.max(doubled.min(WINDOW_BYTES_MAX));
            self.buffer.resize(length, 0);
        }
        let room = self.buffer.get_mut(self.end..).unwrap_or_default();
        match self.input.read(room) {
            Ok(0) => self.is_over = true,
            Ok(bytes) => self.end = self.end.saturating_add(bytes),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => {
                return Err(WalkError::Read {
                    offset: self.offset_of_end(),
                    source,
                });
            }
        }
        Ok(())
    }
}
