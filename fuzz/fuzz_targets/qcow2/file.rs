//! A sparse file in memory that counts what is done to it.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vmferry_disk::Cached;
use vmferry_qcow2::Storage;

const PAGE_BYTES: u64 = 4096;
/// Longer files find no space.
pub const FILE_BYTES_MAX: u64 = 128 << 20;
/// One input does no more than this; whoever does hangs.
const CALLS_MAX: u64 = 4_000_000;
const BYTES_MAX: u64 = 8 << 30;

#[derive(Clone, Default)]
struct Content {
    pages: BTreeMap<u64, Arc<[u8; PAGE_BYTES as usize]>>,
    length: u64,
    calls: u64,
    bytes: u64,
}

/// Every clone is the same file.
#[derive(Clone, Default)]
pub struct MemoryFile(Arc<Mutex<Content>>);

/// The parts of a range that lie in one page each: page, start in it, start in the range, length.
fn parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let skip = (at % PAGE_BYTES) as usize;
        let part = (PAGE_BYTES as usize - skip).min(length - done);
        let found = (at / PAGE_BYTES, skip, done, part);
        done += part;
        (part > 0).then_some(found)
    })
}

impl MemoryFile {
    pub fn new(bytes: &[u8]) -> Self {
        let file = Self::default();
        file.write_at(bytes, 0).expect("images are short");
        file
    }

    /// Another file with the same content and what was counted so far.
    pub fn copy(&self) -> Self {
        let content = self.with(|content| content.clone());
        Self(Arc::new(Mutex::new(content)))
    }

    fn with<T>(&self, act: impl FnOnce(&mut Content) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn counted<T>(&self, bytes: usize, act: impl FnOnce(&mut Content) -> T) -> T {
        self.with(|content| {
            content.calls += 1;
            content.bytes += bytes as u64;
            assert!(
                content.calls <= CALLS_MAX,
                "so many reads and writes end never"
            );
            assert!(content.bytes <= BYTES_MAX, "so many bytes end never");
            act(content)
        })
    }
}

impl Content {
    fn read(&self, buf: &mut [u8], offset: u64) {
        for (page, skip, start, length) in parts(offset, buf.len()) {
            let part = &mut buf[start..start + length];
            match self.pages.get(&page) {
                Some(bytes) => part.copy_from_slice(&bytes[skip..skip + length]),
                None => part.fill(0),
            }
        }
    }

    fn write(&mut self, buf: &[u8], offset: u64) {
        for (page, skip, start, length) in parts(offset, buf.len()) {
            let part = &buf[start..start + length];
            // Long tables of zeroes take no memory.
            if !self.pages.contains_key(&page) && part.iter().all(|byte| *byte == 0) {
                continue;
            }
            let bytes = self.pages.entry(page);
            let bytes = bytes.or_insert_with(|| Arc::new([0; PAGE_BYTES as usize]));
            Arc::make_mut(bytes)[skip..skip + length].copy_from_slice(part);
        }
        self.length = self.length.max(offset + buf.len() as u64);
    }

    fn cut(&mut self, length: u64) {
        let mut gone = self.pages.split_off(&(length / PAGE_BYTES));
        let skip = (length % PAGE_BYTES) as usize;
        if let (Some(mut last), true) = (gone.remove(&(length / PAGE_BYTES)), skip > 0) {
            Arc::make_mut(&mut last)[skip..].fill(0);
            self.pages.insert(length / PAGE_BYTES, last);
        }
    }
}

impl Storage for MemoryFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.with(|content| content.length))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        assert!(
            offset
                .checked_add(buf.len() as u64)
                .is_some_and(|end| end < 1 << 63)
        );
        self.counted(buf.len(), |content| content.read(buf, offset));
        Ok(())
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> io::Result<Cached> {
        self.read_at(buf, offset)?;
        Ok(Cached::Hit(buf.len()))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if offset.saturating_add(buf.len() as u64) > FILE_BYTES_MAX {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.counted(buf.len(), |content| content.write(buf, offset));
        Ok(())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        if length > FILE_BYTES_MAX {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.counted(0, |content| {
            content.cut(length.min(content.length));
            content.length = length;
        });
        Ok(())
    }

    fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        // Nobody may rely on what a hole reads as.
        let (first, end) = (offset.div_ceil(PAGE_BYTES), (offset + length) / PAGE_BYTES);
        self.counted(0, |content| {
            for (_, page) in content.pages.range_mut(first..end.max(first)) {
                *page = Arc::new([0xdb; PAGE_BYTES as usize]);
            }
        });
        Ok(())
    }

    fn start_writeback(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.counted(0, |_| ());
        Ok(())
    }
}
