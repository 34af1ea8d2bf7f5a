//! Pages that came as changes of what came before (XBZRLE).
//!
//! Records of changes go by before all of the image can be read. So they are put down, in a file of
//! their own, and applied in their order when the image is whole; the last content of each such page
//! ends up in the index.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use vmferry_stream::xbzrle;

use super::file::NewFile;
use super::layout::{SLOT_BYTES, decode_slot, encode_slot, slot_offset};
use crate::error::ImageError;
use crate::page::{PAGE, fetch_zlib};
use crate::storage::Storage;

const DELTA_BYTES: usize = 32;

/// What a change starts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Base {
    /// What the changes before it have made.
    Slot,
    /// A page of equal bytes.
    Fill(u8),
    /// Payload in the image.
    Plain(u64),
    /// Payload in the image, as a zlib stream.
    Zlib(u64),
}

/// The changes of a stream.
#[derive(Debug)]
pub(crate) struct Deltas {
    log: BufWriter<File>,
    count: u64,
}

/// Where content goes.
pub(crate) struct Slots<'a> {
    pub(crate) file: &'a File,
    pub(crate) nonce: u64,
    pub(crate) chunks: u64,
}

/// Why changes cannot be applied.
pub(crate) enum Failed {
    Index(io::Error),
    Image(ImageError),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Index(error)
    }
}

impl Deltas {
    pub(crate) fn new(path: Option<&Path>) -> io::Result<Self> {
        Ok(Self {
            log: BufWriter::new(NewFile::companion(path)?),
            count: 0,
        })
    }

    /// Content of `slot` changes by so many bytes of payload at `offset`.
    pub(crate) fn push(
        &mut self,
        slot: u64,
        base: Base,
        offset: u64,
        bytes: usize,
    ) -> io::Result<()> {
        let (kind, value) = match base {
            Base::Slot => (0_u16, 0),
            Base::Fill(fill) => (1, u64::from(fill)),
            Base::Plain(offset) => (2, offset),
            Base::Zlib(offset) => (3, offset),
        };
        self.count = self.count.saturating_add(1);
        let bytes = u16::try_from(bytes).unwrap_or(u16::MAX);
        self.log.write_all(&slot.to_le_bytes())?;
        self.log.write_all(&value.to_le_bytes())?;
        self.log.write_all(&offset.to_le_bytes())?;
        self.log.write_all(&kind.to_le_bytes())?;
        self.log.write_all(&bytes.to_le_bytes())?;
        self.log.write_all(&[0; 4])
    }

    /// Apply all changes, in their order.
    pub(crate) fn apply(self, storage: &dyn Storage, slots: &Slots<'_>) -> Result<(), Failed> {
        let mut log = self.log.into_inner().map_err(io::Error::from)?;
        log.rewind()?;
        let mut log = BufReader::new(log);
        let mut page = [0; PAGE];
        for _ in 0..self.count {
            let mut record = [0; DELTA_BYTES];
            log.read_exact(&mut record)?;
            let u64_at = |at: usize| {
                let bytes = record.get(at..).and_then(<[u8]>::first_chunk);
                u64::from_le_bytes(bytes.copied().unwrap_or_default())
            };
            let (slot, value, offset, rest) = (u64_at(0), u64_at(8), u64_at(16), u64_at(24));
            match rest & 0xffff {
                0 => slots.read(slot, &mut page)?,
                1 => page.fill(u8::try_from(value).unwrap_or(0)),
                2 => read(storage, value, &mut page)?,
                _ => fetch_zlib(storage, value, &mut page).map_err(Failed::Image)?,
            }
            let mut encoded = [0; PAGE];
            let length = usize::try_from(rest >> 16 & 0xffff).unwrap_or(0);
            let encoded = encoded.get_mut(..length).unwrap_or_default();
            read(storage, offset, encoded)?;
            xbzrle::apply(&mut page, encoded).map_err(|error| {
                Failed::Image(ImageError::BrokenRam {
                    image: storage.name(),
                    offset,
                    problem: format!("an XBZRLE encoding is wrong: {error}"),
                })
            })?;
            slots.write(slot, &page)?;
        }
        Ok(())
    }
}

fn read(storage: &dyn Storage, offset: u64, into: &mut [u8]) -> Result<(), Failed> {
    storage.read_at(offset, into).map_err(|source| {
        Failed::Image(ImageError::Read {
            image: storage.name(),
            offset,
            source,
        })
    })
}

impl Slots<'_> {
    fn read(&self, slot: u64, page: &mut [u8]) -> io::Result<()> {
        let mut bytes = [0; SLOT_BYTES];
        self.file
            .read_exact_at(&mut bytes, slot_offset(self.chunks, slot))?;
        let content = decode_slot(self.nonce, slot, &bytes);
        page.copy_from_slice(content.ok_or(io::ErrorKind::InvalidData)?);
        Ok(())
    }

    fn write(&self, slot: u64, page: &[u8]) -> io::Result<()> {
        let bytes = encode_slot(self.nonce, slot, page);
        self.file
            .write_all_at(&bytes, slot_offset(self.chunks, slot))
    }
}
