//! The index of an image: where each of its pages is, with its checksum.
//!
//! It is a file beside the image, or anywhere else; see [`layout`] for what is in it. Opening it reads
//! the header and the table of contents. The page table is read where it is needed, in chunks of
//! 2 MiB of guest memory.
//!
//! An index is believed only as far as its checksums and the image's identity go. Anything else in
//! it may be anything: it leads to errors, at worst to the wrong pages of a made-up index, never to a
//! panic.

mod builder;
mod cache;
pub(crate) mod chunk;
mod contents;
mod deltas;
pub(crate) mod file;
mod layout;
pub(crate) mod table;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

pub use builder::IndexBuilder;

use crate::head::{Contents, ImageBlock};
use crate::limits::CONTENTS_BYTES_MAX;
use crate::page::PAGE;
use crate::storage::{Identity, Storage};
use cache::Cache;
use chunk::{CHUNK_BYTES, Chunk, Place, seeded};
use layout::{HEADER_BYTES, Header, SLOT_BYTES, chunk_offset, decode_slot, sample, slot_offset};
use table::{BlockChunks, Presence};

/// The index of an image, open.
#[derive(Debug)]
pub(crate) struct Index {
    file: File,
    header: Header,
    pub(crate) contents: Contents,
    blocks: Vec<BlockChunks>,
    /// A byte for each chunk.
    presence: Vec<u8>,
    cache: Cache,
}

/// An index cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    /// It cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is not one, or it is damaged.
    #[error("{0} is damaged")]
    Damaged(&'static str),
    /// It is that of another image, or of what this image was.
    #[error("it is not the index of this image as it is now")]
    Stale,
}

/// Entries of pages that follow one another.
pub(crate) enum Entries {
    /// All the same.
    Uniform(Place),
    /// From this place of a chunk on.
    Chunk(Arc<Chunk>, usize),
}

impl Entries {
    /// The entry of the page `step` behind the first.
    pub(crate) fn get(&self, step: usize) -> Option<(Place, u32)> {
        match self {
            Self::Uniform(place) => Some((*place, 0)),
            Self::Chunk(chunk, first) => chunk.entry(first.saturating_add(step)),
        }
    }
}

impl Index {
    /// Open the index at `path`, if it is that of the image as it is now.
    pub(crate) fn open(path: &Path, storage: &dyn Storage) -> Result<Self, Unusable> {
        let metadata = std::fs::metadata(path)?;
        if !metadata.is_file() {
            return Err(Unusable::Damaged("its file"));
        }
        Self::read(File::open(path)?, storage)
    }

    /// As [`Index::open`], of an open file.
    pub(crate) fn read(file: File, storage: &dyn Storage) -> Result<Self, Unusable> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let header = Header::decode(&header).ok_or(Unusable::Damaged("its header"))?;
        if header.identity != storage.identity()
            || sample(storage, &header.samples)? != header.samples_crc
        {
            return Err(Unusable::Stale);
        }
        let damaged = Unusable::Damaged("its table of contents");
        if header.contents_bytes > CONTENTS_BYTES_MAX {
            return Err(Unusable::Damaged("the length of its table of contents"));
        }
        let end = header.contents_offset.checked_add(header.contents_bytes);
        if end.is_none_or(|end| file.metadata().is_ok_and(|file| file.len() < end)) {
            return Err(damaged);
        }
        let length = usize::try_from(header.contents_bytes).unwrap_or(usize::MAX);
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, header.contents_offset)?;
        if seeded(header.nonce, &bytes) != header.contents_crc {
            return Err(damaged);
        }
        let mut rest = bytes.as_slice();
        let contents = contents::decode(&mut rest).ok_or(Unusable::Damaged("its contents"))?;
        if !contents.head.blocks.iter().all(ImageBlock::is_possible) {
            return Err(damaged);
        }
        let pages = contents.head.blocks.iter().map(ImageBlock::pages);
        let (blocks, chunks) = BlockChunks::of(pages);
        let is_right = u64::try_from(rest.len()).is_ok_and(|length| length == chunks);
        if chunks != header.chunks || !is_right {
            return Err(damaged);
        }
        Ok(Self {
            presence: rest.to_vec(),
            file,
            header,
            contents,
            blocks,
            cache: Cache::default(),
        })
    }

    pub(crate) fn identity(&self) -> Identity {
        self.header.identity
    }

    /// Entries of the pages of a block from `page` on, and how many there are at least, at most 512.
    pub(crate) fn entries(&self, block: usize, page: u64) -> Result<(Entries, u64), Unusable> {
        let found = self.blocks.get(block).filter(|found| page < found.pages);
        let found = found.ok_or(Unusable::Damaged("its list of blocks"))?;
        let (number, within) = found.locate(page);
        let in_chunk = chunk::CHUNK_PAGES.saturating_sub(within);
        let in_chunk = u64::try_from(in_chunk).unwrap_or(0);
        let count = in_chunk.min(found.pages.saturating_sub(page));
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        let presence = self.presence.get(index).copied();
        let presence = presence.and_then(Presence::from_byte);
        let presence = presence.ok_or(Unusable::Damaged("its list of chunks"))?;
        let entries = match presence.uniform() {
            Some(place) => Entries::Uniform(place),
            None => Entries::Chunk(self.chunk(number)?, within),
        };
        Ok((entries, count))
    }

    fn chunk(&self, number: u64) -> Result<Arc<Chunk>, Unusable> {
        if let Some(chunk) = self.cache.get(number) {
            return Ok(chunk);
        }
        let chunk = Arc::new(read_chunk(&self.file, self.header.nonce, number).map_err(damage)?);
        self.cache.put(number, Arc::clone(&chunk));
        Ok(chunk)
    }

    /// Read a page that is kept here.
    pub(crate) fn kept(&self, slot: u64, page: &mut [u8]) -> Result<(), Unusable> {
        let damaged = Unusable::Damaged("a page that is kept in it");
        if slot >= self.header.kept_pages || page.len() != PAGE {
            return Err(damaged);
        }
        let mut bytes = [0; SLOT_BYTES];
        let offset = slot_offset(self.header.chunks, slot);
        self.file.read_exact_at(&mut bytes, offset)?;
        let content = decode_slot(self.header.nonce, slot, &bytes).ok_or(damaged)?;
        page.copy_from_slice(content);
        Ok(())
    }

    /// CRC-32 of a page that is kept here.
    pub(crate) fn kept_sum(&self, slot: u64) -> Result<u32, Unusable> {
        let mut page = [0; PAGE];
        self.kept(slot, &mut page)?;
        Ok(crc32fast::hash(&page))
    }
}

fn damage(error: io::Error) -> Unusable {
    match error.kind() {
        io::ErrorKind::InvalidData => Unusable::Damaged("its page table"),
        _ => Unusable::Io(error),
    }
}

/// Read a chunk that was written.
fn read_chunk(file: &File, nonce: u64, number: u64) -> io::Result<Chunk> {
    let mut bytes = [0; CHUNK_BYTES];
    file.read_exact_at(&mut bytes, chunk_offset(number))?;
    Chunk::decode(&bytes, nonce, number).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{FileStorage, IndexPlace};

    /// Before anything of that length is allocated.
    #[test]
    fn a_table_of_contents_has_a_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, b"").unwrap();
        let storage = FileStorage::open(&path, 0).unwrap();
        let mut builder = IndexBuilder::new(&IndexPlace::Beside, &storage).unwrap();
        let eof = vmferry_stream::Record::Eof;
        builder.record(0, 1, &eof).unwrap();
        builder.publish(&storage).unwrap();
        let path = folder.path().join("image.index");
        let good = Index::open(&path, &storage).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(1 << 30).unwrap();
        for (contents_bytes, expected) in [
            (CONTENTS_BYTES_MAX, "its table of contents is damaged"),
            (
                CONTENTS_BYTES_MAX + 1,
                "the length of its table of contents is damaged",
            ),
            (u64::MAX, "the length of its table of contents is damaged"),
        ] {
            let header = Header {
                contents_bytes,
                ..good.header.clone()
            };
            file.write_all_at(&header.encode(), 0).unwrap();
            let error = Index::open(&path, &storage).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}
