//! The receiving owner of the `ram` section.
//!
//! ```text
//!   START ─▶ block list, compared with what is here ─▶ pages ──▶ … ──▶ END
//!                                                       │
//!             precopy   ZERO, PAGE, XBZRLE, zlib ───────┴─▶ written into guest memory
//! ```
//!
//! Memory is bounded: a page of payload and its copy.
//!
//! Rules: `ram.md` of the wire format notes.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

mod encoded;
mod error;
mod list;
mod memory;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use vmferry_savevm::{HandlerError, LoadHandler};
use vmferry_stream::{Name, RamPage, RamRecord, Record};

use self::encoded::{COMPRESSED_BYTES_MAX, Inflate};
use self::list::{BlockList, Listed, Terms};
use self::memory::Memory;
use crate::block::PAGE_BYTES;
use crate::guest::GuestRam;

pub use self::error::{CompressedFault, PageFault, RamDestinationError};

/// [`PAGE_BYTES`], as the length of a buffer.
const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_BYTES);

/// What a destination takes part in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamDestinationOptions {
    /// Postcopy may be asked for (capability `postcopy-ram`).
    pub postcopy: bool,
    /// Shared blocks stay where they are (capability `x-ignore-shared`); must be the same at the
    /// source.
    pub ignore_shared: bool,
}

/// Receives guest memory as the `ram` section, version [`SECTION_VERSION`](crate::SECTION_VERSION).
pub struct RamDestination {
    memory: Arc<Memory>,
    options: RamDestinationOptions,
    list: BlockList,
    /// The block of the record before, and its index.
    last: Option<(Name, Option<usize>)>,
    incoming: Option<Incoming>,
    /// Payload that is being read.
    payload: Vec<u8>,
    /// A page that is being changed or unpacked.
    page: Box<[u8; PAGE]>,
    inflate: Inflate,
}

/// The page whose payload follows.
struct Incoming {
    block: usize,
    offset: u64,
    encoding: Encoding,
    bytes: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    Plain,
    Xbzrle,
    Zlib,
}

impl RamDestination {
    /// Receive into this memory, of a guest that does not run.
    ///
    /// # Errors
    /// Two blocks of one name.
    pub fn new(
        ram: Arc<dyn GuestRam>,
        options: RamDestinationOptions,
    ) -> Result<Self, RamDestinationError> {
        Ok(Self {
            memory: Arc::new(Memory::new(ram, options)?),
            options,
            list: BlockList::default(),
            last: None,
            incoming: None,
            payload: Vec::with_capacity(PAGE),
            page: Box::new([0; PAGE]),
            inflate: Inflate::new(),
        })
    }

    fn take(&mut self, record: &RamRecord) -> Result<(), RamDestinationError> {
        self.incoming = None;
        match record {
            RamRecord::Page { page, bytes } => self.expect(page, Encoding::Plain, *bytes),
            RamRecord::Zero { page, fill } => self.fill(page, *fill),
            RamRecord::Xbzrle { page, bytes } => {
                self.expect(page, Encoding::Xbzrle, u32::from(*bytes))
            }
            RamRecord::Compressed { page, bytes } => self.expect(page, Encoding::Zlib, *bytes),
            RamRecord::BlockList { total_bytes } => self.list.open(*total_bytes, &self.memory),
            RamRecord::Block {
                name,
                used_bytes,
                page_bytes,
                guest_address,
                mapped: None,
            } => {
                let entry = Listed {
                    name,
                    used_bytes: *used_bytes,
                    page_bytes: *page_bytes,
                    guest_address: *guest_address,
                };
                let terms = Terms {
                    ignore_shared: self.options.ignore_shared,
                    is_advised: false,
                };
                self.list.entry(&entry, &self.memory, terms)
            }
            RamRecord::Block {
                mapped: Some(_), ..
            }
            | RamRecord::MappedBitmap { .. }
            | RamRecord::MappedGap { .. }
            | RamRecord::MappedPages { .. } => Err(unsupported("mapped-ram")),
            RamRecord::MultifdFlush => Err(unsupported("multifd")),
            RamRecord::EndOfSection => Ok(()),
        }
    }

    /// Where a page belongs.
    fn locate(&mut self, page: &RamPage) -> Result<usize, RamDestinationError> {
        if !self.list.is_complete() {
            return Err(RamDestinationError::NoList { what: "a page" });
        }
        let index = match &self.last {
            Some((name, index)) if *name == page.block => *index,
            _ => {
                let index = self.memory.index(&page.block);
                self.last = Some((page.block.clone(), index));
                index
            }
        };
        match self.memory.locate(index, page) {
            Ok(index) => Ok(index),
            Err(fault) => Err(RamDestinationError::Page {
                block: page.block.clone(),
                offset: page.offset_bytes,
                fault,
            }),
        }
    }

    fn fill(&mut self, page: &RamPage, fill: u8) -> Result<(), RamDestinationError> {
        let index = self.locate(page)?;
        let offset = page.offset_bytes;
        let filled = match self.memory.block(index) {
            // Memory that is zero already is not touched: it need not exist.
            Some(block) => block.fill(offset, PAGE, fill).map_err(PageFault::from),
            None => Err(PageFault::UnknownBlock),
        };
        filled.map_err(|fault| self.wrong(index, offset, fault))?;
        self.memory.mark(index, offset, PAGE_BYTES);
        Ok(())
    }

    /// Payload of `bytes` follows.
    fn expect(
        &mut self,
        page: &RamPage,
        encoding: Encoding,
        bytes: u32,
    ) -> Result<(), RamDestinationError> {
        let block = self.locate(page)?;
        let offset = page.offset_bytes;
        let fault = match encoding {
            Encoding::Plain if u64::from(bytes) != PAGE_BYTES => {
                Some(PageFault::PageSize { bytes })
            }
            Encoding::Xbzrle if !self.memory.has(block, offset) => Some(PageFault::NothingToChange),
            Encoding::Zlib if bytes > COMPRESSED_BYTES_MAX => {
                Some(PageFault::Compressed(CompressedFault::TooLong { bytes }))
            }
            _ => None,
        };
        if let Some(fault) = fault {
            return Err(self.wrong(block, offset, fault));
        }
        let incoming = Incoming {
            block,
            offset,
            encoding,
            // Checked to be about a page.
            bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
        };
        if bytes == 0 {
            // No payload will be announced.
            self.payload.clear();
            return self.apply(&incoming);
        }
        self.incoming = Some(incoming);
        Ok(())
    }

    /// The payload of a page is here.
    fn apply(&mut self, incoming: &Incoming) -> Result<(), RamDestinationError> {
        let applied = match incoming.encoding {
            Encoding::Plain => self.write(incoming, false),
            Encoding::Xbzrle => self
                .change(incoming)
                .and_then(|()| self.write(incoming, true)),
            Encoding::Zlib => self
                .inflate
                .page(&self.payload, &mut *self.page)
                .map_err(PageFault::Compressed)
                .and_then(|()| self.write(incoming, true)),
        };
        applied.map_err(|fault| self.wrong(incoming.block, incoming.offset, fault))
    }

    /// Apply a change to a copy of the page: memory stays as it is if it is wrong.
    fn change(&mut self, incoming: &Incoming) -> Result<(), PageFault> {
        let block = self.memory.block(incoming.block);
        let block = block.ok_or(PageFault::UnknownBlock)?;
        block.read(incoming.offset, &mut *self.page)?;
        vmferry_stream::xbzrle::apply(&mut *self.page, &self.payload)?;
        Ok(())
    }

    /// Put a page into guest memory: the payload itself, or what was made of it.
    fn write(&self, incoming: &Incoming, is_made: bool) -> Result<(), PageFault> {
        let Incoming { block, offset, .. } = *incoming;
        let bytes = if is_made {
            &self.page[..]
        } else {
            &self.payload
        };
        let memory = self.memory.block(block).ok_or(PageFault::UnknownBlock)?;
        memory.write(offset, bytes)?;
        self.memory.mark(block, offset, PAGE_BYTES);
        Ok(())
    }

    fn wrong(&self, index: usize, offset: u64, fault: PageFault) -> RamDestinationError {
        let block = self.memory.block(index);
        RamDestinationError::Page {
            block: block.map(|block| block.idstr().clone()).unwrap_or_default(),
            offset,
            fault,
        }
    }

    fn room(&mut self, length: usize) -> Result<&mut [u8], RamDestinationError> {
        let expected = self.incoming.as_ref().map_or(0, |incoming| incoming.bytes);
        if length != expected || length == 0 {
            return Err(RamDestinationError::Payload {
                bytes: length,
                expected,
            });
        }
        self.payload.resize(length, 0);
        Ok(&mut self.payload)
    }
}

fn unsupported(capability: &'static str) -> RamDestinationError {
    RamDestinationError::Capability { capability }
}

impl LoadHandler for RamDestination {
    fn start(&mut self, _version: u32) -> Result<(), HandlerError> {
        Ok(())
    }

    fn record(&mut self, record: &Record) -> Result<(), HandlerError> {
        match record {
            Record::Ram(record) => Ok(self.take(record)?),
            other => Err(RamDestinationError::Foreign(format!("{other:?}")).into()),
        }
    }

    fn payload(&mut self, length: usize) -> Result<&mut [u8], HandlerError> {
        Ok(self.room(length)?)
    }

    fn payload_filled(&mut self) -> Result<(), HandlerError> {
        match self.incoming.take() {
            Some(incoming) => Ok(self.apply(&incoming)?),
            None => Err(RamDestinationError::Payload {
                bytes: self.payload.len(),
                expected: 0,
            }
            .into()),
        }
    }

    fn end(&mut self) -> Result<(), HandlerError> {
        Ok(())
    }

    fn cleanup(&mut self) {
        self.incoming = None;
    }
}
