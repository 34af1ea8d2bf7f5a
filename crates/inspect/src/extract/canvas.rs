//! A sparse file that is painted in any order.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::error::ExtractError;

/// Neighbours are written together up to this.
const COMBINED_BYTES: usize = 256 << 10;
/// Zeroes are written from a buffer of this length.
const ZERO_BYTES: usize = 64 << 10;

/// A file; what was not written is a hole, which reads as zeroes. Pieces that follow one another
/// are written together.
#[derive(Debug)]
pub(crate) struct Canvas {
    file: File,
    pending: Vec<u8>,
    /// Where in the file `pending` goes.
    at: u64,
}

impl Canvas {
    pub(crate) fn new(file: File) -> Self {
        Self {
            file,
            pending: Vec::new(),
            at: 0,
        }
    }

    /// Write `bytes` at byte `at`.
    pub(crate) fn write(&mut self, at: u64, bytes: &[u8]) -> Result<(), ExtractError> {
        let end = self.at.saturating_add(length(&self.pending));
        let full = self.pending.len().saturating_add(bytes.len()) > COMBINED_BYTES;
        if at != end || full {
            self.flush()?;
            self.at = at;
        }
        if bytes.len() >= COMBINED_BYTES {
            self.at = at.saturating_add(length(bytes));
            return self
                .file
                .write_all_at(bytes, at)
                .map_err(ExtractError::write);
        }
        self.pending.extend_from_slice(bytes);
        Ok(())
    }

    /// Write zeroes over what may be there.
    pub(crate) fn zero(&mut self, at: u64, bytes: u64) -> Result<(), ExtractError> {
        let zeroes = [0; ZERO_BYTES];
        let (mut at, mut left) = (at, bytes);
        while left > 0 {
            let part = usize::try_from(left).unwrap_or(ZERO_BYTES).min(ZERO_BYTES);
            let zeroes = zeroes.get(..part).unwrap_or_default();
            self.write(at, zeroes)?;
            at = at.saturating_add(length(zeroes));
            left = left.saturating_sub(length(zeroes));
        }
        Ok(())
    }

    /// Read what is there; zeroes past the end.
    pub(crate) fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), ExtractError> {
        self.flush()?;
        read_sparse(&self.file, at, bytes).map_err(ExtractError::read)
    }

    /// Write what waits.
    pub(crate) fn flush(&mut self) -> Result<(), ExtractError> {
        if !self.pending.is_empty() {
            let written = self.file.write_all_at(&self.pending, self.at);
            written.map_err(ExtractError::write)?;
            self.at = self.at.saturating_add(length(&self.pending));
            self.pending.clear();
        }
        Ok(())
    }

    /// Write what waits, and make the file `bytes` long.
    pub(crate) fn finish(mut self, bytes: u64) -> Result<File, ExtractError> {
        self.flush()?;
        self.file.set_len(bytes).map_err(ExtractError::write)?;
        Ok(self.file)
    }
}

/// Read from a file in which everything past the end is zero.
pub(crate) fn read_sparse(file: &File, at: u64, bytes: &mut [u8]) -> std::io::Result<()> {
    let (mut at, mut rest) = (at, bytes);
    while !rest.is_empty() {
        match file.read_at(rest, at) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(n) => {
                at = at.saturating_add(u64::try_from(n).unwrap_or(u64::MAX));
                rest = rest.get_mut(n..).unwrap_or_default();
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Only zeroes? Asked of what may become a hole.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
