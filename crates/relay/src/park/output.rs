//! The file, in few large writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::error::ParkError;

/// Smaller pieces are collected up to this many bytes.
const COLLECT_BYTES: usize = 256 << 10;
/// Larger ones are written as they are, instead of being copied first.
const DIRECT_BYTES: usize = 64 << 10;

/// A file that is written from its first byte on, wherever its position is.
#[derive(Debug)]
pub(super) struct Output {
    file: File,
    collected: Vec<u8>,
    /// Bytes that the file has.
    written: u64,
}

impl Output {
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            collected: Vec::with_capacity(COLLECT_BYTES),
            written: 0,
        }
    }

    /// Where the next byte goes.
    pub(super) fn offset(&self) -> u64 {
        self.written + self.collected.len() as u64
    }

    pub(super) fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.collected.len() + bytes.len() > COLLECT_BYTES {
            self.flush()?;
        }
        if bytes.len() >= DIRECT_BYTES {
            // Keeps what was collected before in front.
            self.flush()?;
            self.file.write_all_at(bytes, self.written)?;
            self.written += bytes.len() as u64;
        } else {
            self.collected.extend_from_slice(bytes);
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.collected, self.written)?;
        self.written += self.collected.len() as u64;
        self.collected.clear();
        Ok(())
    }

    /// What is behind `offset` does not count.
    pub(super) fn cut(&mut self, offset: u64) -> io::Result<()> {
        self.flush()?;
        if offset < self.written {
            self.file.set_len(offset)?;
            self.written = offset;
        }
        Ok(())
    }

    /// The file with all that was put, and nothing behind it.
    pub(super) fn finish(&mut self) -> io::Result<&File> {
        self.flush()?;
        self.file.set_len(self.written)?;
        Ok(&self.file)
    }

    pub(super) fn into_file(self) -> File {
        self.file
    }
}

/// A piece of input, of which the bytes in `run..at` go into the file as they are.
pub(super) struct Window<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) run: usize,
    pub(super) at: usize,
}

impl<'a> Window<'a> {
    pub(super) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    /// Give what was collected to the file; what follows is not part of it.
    pub(super) fn write(&mut self, output: &mut Output) -> Result<(), ParkError> {
        put(output, &self.bytes[self.run..self.at])?;
        self.run = self.at;
        Ok(())
    }

    pub(super) fn drop(&mut self, bytes: usize) {
        debug_assert_eq!(self.run, self.at);
        self.at += bytes;
        self.run = self.at;
    }

    /// Offset in the file of the next byte.
    pub(super) fn offset(&self, output: &Output) -> u64 {
        output.offset() + (self.at - self.run) as u64
    }
}

/// Give bytes to the file.
pub(super) fn put(output: &mut Output, bytes: &[u8]) -> Result<(), ParkError> {
    let offset = output.offset();
    output
        .put(bytes)
        .map_err(|source| ParkError::File { offset, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_order_whatever_the_pieces_are() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[0xff; 100], 0).unwrap();
        let mut output = Output::new(file);
        let mut expected = Vec::new();
        for _ in 0..200 {
            let piece: Vec<u8> = (0..rng.usize(0..100_000)).map(|_| rng.u8(..)).collect();
            output.put(&piece).unwrap();
            expected.extend(piece);
            assert_eq!(output.offset(), expected.len() as u64);
            if rng.u8(..) < 10 {
                expected.truncate(rng.usize(0..=expected.len()));
                output.cut(expected.len() as u64).unwrap();
            }
        }
        output.finish().unwrap();
        let file = output.into_file();
        let mut found = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert_eq!(found, expected);
    }
}
