//! The receiving owner of the `ram` section.
//!
//! ```text
//!   START ─▶ block list, compared with what is here ─▶ pages ──▶ … ──▶ END
//!                                                       │
//!             precopy   ZERO, PAGE, XBZRLE, zlib ───────┼─▶ written into guest memory
//!            postcopy   ZERO, PAGE ─▶ whole host page ──┴─▶ placed at once, who waits for it goes on
//!
//!   touched, and missing ─▶ fault thread ─▶ queue ─▶ next_request ─▶ the source
//! ```
//!
//! The handler is fed by whoever reads the connection. Everything else that the engine has to do goes
//! through [`IncomingRam`], from any thread.
//!
//! Memory is bounded: a page of payload and its copy, one host page, one bit for each guest page, and
//! an entry for each thread that waits for a page.
//!
//! Rules: `ram.md` and `postcopy.md` of the wire format notes.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::cast_possible_truncation,
        clippy::unwrap_used,
        clippy::arithmetic_side_effects
    )
)]

mod assembly;
mod encoded;
mod error;
mod faults;
mod incoming;
mod list;
mod memory;
mod requests;
#[cfg(test)]
mod simulated;
mod stats;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use vmferry_savevm::{HandlerError, LoadHandler};
use vmferry_stream::{Name, RamPage, RamRecord, Record};

use self::assembly::Assembly;
use self::encoded::{COMPRESSED_BYTES_MAX, Inflate};
use self::faults::Faults;
use self::incoming::{Phase, Shared};
use self::list::{BlockList, Listed, Terms};
use self::memory::Memory;
use self::requests::HostPage;
use self::stats::count;
use crate::block::PAGE_BYTES;
use crate::guest::GuestRam;
use crate::userfault::Placed;

#[cfg(test)]
pub(crate) use self::faults::Kernel;

pub use self::error::{CompressedFault, MissingPages, PageFault, RamDestinationError};
pub use self::incoming::{IncomingRam, PageRequest};
pub use self::stats::{Histogram, RamDestinationStats};

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
    shared: Arc<Shared>,
    list: BlockList,
    /// The block of the record before, and its index.
    last: Option<(Name, Option<usize>)>,
    incoming: Option<Incoming>,
    /// Payload that is being read.
    payload: Vec<u8>,
    /// A page that is being changed or unpacked.
    page: Box<[u8; PAGE]>,
    inflate: Inflate,
    assembly: Assembly,
    /// Those of [`Shared::breaks`] that the assembly knows of.
    breaks: u64,
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
            shared: Arc::new(Shared::new(Memory::new(ram, options)?, options)),
            list: BlockList::default(),
            last: None,
            incoming: None,
            payload: Vec::with_capacity(PAGE),
            page: Box::new([0; PAGE]),
            inflate: Inflate::new(),
            assembly: Assembly::default(),
            breaks: 0,
        })
    }

    /// A handle for the engine.
    #[must_use]
    pub fn incoming(&self) -> IncomingRam {
        IncomingRam::new(Arc::clone(&self.shared))
    }

    fn memory(&self) -> &Memory {
        &self.shared.memory
    }

    fn take(&mut self, record: &RamRecord) -> Result<(), RamDestinationError> {
        self.incoming = None;
        let breaks = self.shared.breaks();
        if std::mem::replace(&mut self.breaks, breaks) != breaks {
            self.assembly.clear();
        }
        match record {
            RamRecord::Page { page, bytes } => self.expect(page, Encoding::Plain, *bytes),
            RamRecord::Zero { page, fill } => self.fill(page, *fill),
            RamRecord::Xbzrle { page, bytes } => {
                self.expect(page, Encoding::Xbzrle, u32::from(*bytes))
            }
            RamRecord::Compressed { page, bytes } => self.expect(page, Encoding::Zlib, *bytes),
            RamRecord::BlockList { total_bytes } => {
                self.list.open(*total_bytes, &self.shared.memory)
            }
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
                    ignore_shared: self.shared.options.ignore_shared,
                    is_advised: self.shared.phase() == Phase::Advised,
                };
                self.list.entry(&entry, &self.shared.memory, terms)
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
                let index = self.memory().index(&page.block);
                self.last = Some((page.block.clone(), index));
                index
            }
        };
        match self.memory().locate(index, page) {
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
        let filled = match self.shared.faults() {
            Some(faults) => {
                self.check_missing(faults, index, offset)?;
                self.place_zero(index, offset, fill)
            }
            None => self.write_fill(index, offset, fill),
        };
        filled.map_err(|fault| self.wrong(index, offset, fault))?;
        count(&self.shared.stats.zero_pages);
        count(&self.shared.stats.pages);
        Ok(())
    }

    fn write_fill(&self, index: usize, offset: u64, fill: u8) -> Result<(), PageFault> {
        let block = self.memory().block(index);
        // Memory that is zero already is not written: it need not exist. Reading it once is enough to
        // be there in a postcopy.
        block
            .ok_or(PageFault::UnknownBlock)?
            .fill(offset, PAGE, fill)?;
        self.memory().mark(index, offset, PAGE_BYTES);
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
        let postcopy = self.shared.faults();
        if let (Some(faults), Encoding::Plain) = (postcopy, encoding) {
            self.check_missing(faults, block, offset)?;
        }
        let is_postcopy = postcopy.is_some();
        let fault = match encoding {
            Encoding::Plain if u64::from(bytes) != PAGE_BYTES => {
                Some(PageFault::PageSize { bytes })
            }
            Encoding::Xbzrle if is_postcopy => Some(PageFault::NotInPostcopy {
                what: "changed (XBZRLE)",
            }),
            Encoding::Zlib if is_postcopy => Some(PageFault::NotInPostcopy { what: "compressed" }),
            Encoding::Xbzrle if !self.memory().has(block, offset) => {
                Some(PageFault::NothingToChange)
            }
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
        let stats = &self.shared.stats;
        count(&stats.pages);
        let applied = match incoming.encoding {
            Encoding::Plain if self.shared.faults().is_some() => self.place(incoming),
            Encoding::Plain => self.write(incoming, false),
            Encoding::Xbzrle => {
                count(&stats.xbzrle_pages);
                self.change(incoming)
                    .and_then(|()| self.write(incoming, true))
            }
            Encoding::Zlib => {
                count(&stats.compressed_pages);
                self.inflate
                    .page(&self.payload, &mut *self.page)
                    .map_err(PageFault::Compressed)
                    .and_then(|()| self.write(incoming, true))
            }
        };
        applied.map_err(|fault| self.wrong(incoming.block, incoming.offset, fault))
    }

    /// Apply a change to a copy of the page: memory stays as it is if it is wrong.
    fn change(&mut self, incoming: &Incoming) -> Result<(), PageFault> {
        let block = self.shared.memory.block(incoming.block);
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
        let memory = self.memory().block(block).ok_or(PageFault::UnknownBlock)?;
        memory.write(offset, bytes)?;
        self.memory().mark(block, offset, PAGE_BYTES);
        Ok(())
    }

    /// May this page come now, in postcopy?
    fn check_missing(
        &self,
        faults: &Faults,
        index: usize,
        offset: u64,
    ) -> Result<(), RamDestinationError> {
        if let Some(reason) = faults.failure() {
            let reason = reason.to_owned();
            return Err(RamDestinationError::FaultThread { reason });
        }
        let checked = match self.memory().block(index) {
            None => Err(PageFault::UnknownBlock),
            Some(_) if self.memory().has(index, offset) => Err(PageFault::SentTwice),
            Some(block) => self.assembly.check(index, block, offset),
        };
        checked.map_err(|fault| self.wrong(index, offset, fault))
    }

    /// Take a page of zeroes in postcopy.
    fn place_zero(&mut self, index: usize, offset: u64, fill: u8) -> Result<(), PageFault> {
        if fill != 0 {
            return Err(PageFault::Fill { fill });
        }
        self.assemble(index, offset, false)
    }

    /// Take a page in postcopy.
    fn place(&mut self, incoming: &Incoming) -> Result<(), PageFault> {
        self.assemble(incoming.block, incoming.offset, true)
    }

    /// Add the payload, or zeroes, to a host page, and place that if it is whole.
    fn assemble(&mut self, index: usize, offset: u64, is_payload: bool) -> Result<(), PageFault> {
        let (Some(faults), Some(block)) = (self.shared.faults(), self.shared.memory.block(index))
        else {
            return Err(PageFault::UnknownBlock);
        };
        let bytes = is_payload.then_some(&self.payload[..]);
        let placed = if block.page_bytes() == PAGE_BYTES {
            let page = HostPage {
                block: index,
                offset,
            };
            faults.place(page, bytes)?
        } else {
            match self.assembly.add(index, block, offset, bytes) {
                Some((page, bytes)) => faults.place(page, Some(bytes))?,
                None => return Ok(()),
            }
        };
        match placed {
            Placed::Now => Ok(()),
            Placed::AlreadyThere => Err(PageFault::InUse),
        }
    }

    fn wrong(&self, index: usize, offset: u64, fault: PageFault) -> RamDestinationError {
        let block = self.memory().block(index);
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

    /// A postcopy whose pages have not all come stays as it is: see [`IncomingRam`].
    fn cleanup(&mut self) {
        self.incoming = None;
        self.shared.cleanup();
    }
}
