//! A parked machine in another form: a plain stream, or a mapped-ram file.
//!
//! ```text
//! plain       header, configuration │ early devices │ START ram, other STARTs │ PART: all pages once
//!             │ END ram, other PARTs and ENDs │ devices │ EOF, description
//!
//! mapped-ram  the same, but pages are in START: after each block of the list its bitmap, a gap to the
//!             next MiB, and its pages in their places; zero pages are holes
//! ```
//!
//! Both are canonical: what an image holds decides every byte, not the way it came. SWITCHOVER_START is
//! left out, for QEMU 10.0 does not need it and QEMU 7.2 refuses it. There is always a description, if
//! need be an empty one. Bodies of devices and the description are as they were.

mod mapped;
mod stream;

use std::io::{self, Write};

use vmferry_image::{Head, Image, ImageError, ImageSection, Progress};
use vmferry_ram::{BlockIndex, PAGE_BYTES, STORED_PAGES_MAX};
use vmferry_stream::{
    Configuration, Encoder, InstanceId, Name, RamRecord, Record, Section, SectionId, SectionKind,
};

pub use mapped::to_mapped_ram;
pub use stream::to_stream;

/// Version of the `ram` section.
const RAM_VERSION: u32 = 4;
/// The description of a machine whose source sent none.
const EMPTY_DESCRIPTION: &[u8] = b"{}";

/// A parked machine could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// It cannot be read, or is damaged.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The other form cannot be written.
    #[error("the converted image cannot be written (byte {offset}): {source}")]
    Write {
        /// Where in it.
        offset: u64,
        /// What the host said.
        source: io::Error,
    },
    /// The machine has something that no mapped-ram file can hold.
    #[error("{image}: a mapped-ram file cannot hold {what}")]
    NotMappable {
        /// The image.
        image: String,
        /// What it is, and why.
        what: &'static str,
    },
}

/// Writes all of a parked machine but its pages.
struct Writing<'a, W> {
    image: &'a Image,
    head: &'a Head,
    encoder: Encoder,
    /// An id that nobody else has.
    ram: SectionId,
    out: W,
    /// Bytes written.
    offset: u64,
    progress: &'a mut dyn FnMut(Progress),
    done: Progress,
    scratch: Vec<u8>,
}

impl<'a, W: Write> Writing<'a, W> {
    fn new(image: &'a Image, out: W, progress: &'a mut dyn FnMut(Progress)) -> Self {
        let head = image.head();
        let used = |id: u32| {
            let live = head.live.iter().flat_map(|live| &live.bodies);
            let mut sections = live.chain(&head.devices);
            sections.any(|it| it.section.id == SectionId(id))
        };
        Self {
            image,
            head,
            encoder: Encoder::new(head.footers),
            ram: SectionId((1..u32::MAX).find(|id| !used(*id)).unwrap_or(u32::MAX)),
            out,
            offset: 0,
            progress,
            done: Progress {
                done_bytes: 0,
                total_bytes: head.blocks.iter().map(|block| block.used_bytes).sum(),
            },
            scratch: Vec::new(),
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ConvertError> {
        let offset = self.offset;
        self.out
            .write_all(bytes)
            .map_err(|source| ConvertError::Write { offset, source })?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn record(&mut self, record: &Record) -> Result<(), ConvertError> {
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        self.encoder.record(record, &mut bytes);
        let put = self.put(&bytes);
        self.scratch = bytes;
        put
    }

    /// Up to the first START.
    fn begin(&mut self, configuration: Option<Configuration>) -> Result<(), ConvertError> {
        self.record(&Record::Header { version: 3 })?;
        if let Some(configuration) = configuration {
            self.record(&Record::Configuration(configuration))?;
        }
        self.devices(0..self.head.early_devices)
    }

    fn ram_section(&mut self, kind: SectionKind) -> Result<(), ConvertError> {
        self.record(&Record::Section(Section {
            kind,
            id: self.ram,
            name: Name::new("ram").unwrap_or_default(),
            instance: InstanceId(0),
            version: RAM_VERSION,
        }))
    }

    fn block_list(&mut self) -> Result<(), ConvertError> {
        self.ram_section(SectionKind::Start)?;
        let total_bytes = self.done.total_bytes;
        self.record(&Record::Ram(RamRecord::BlockList { total_bytes }))
    }

    fn end_of_ram_section(&mut self) -> Result<(), ConvertError> {
        self.record(&Record::Ram(RamRecord::EndOfSection))?;
        self.record(&Record::SectionEnd { id: self.ram })
    }

    /// STARTs of the other live sections.
    fn starts(&mut self) -> Result<(), ConvertError> {
        let head = self.head;
        let mut starts = head.live.iter().filter_map(|live| live.bodies.first());
        starts.try_for_each(|start| self.section(start))
    }

    /// All behind the last page.
    fn end(&mut self) -> Result<(), ConvertError> {
        self.ram_section(SectionKind::End)?;
        self.end_of_ram_section()?;
        let head = self.head;
        let mut others = head.live.iter().flat_map(|live| live.bodies.iter().skip(1));
        others.try_for_each(|section| self.section(section))?;
        self.devices(head.early_devices..head.devices.len())?;
        self.record(&Record::Eof)?;
        let text = self.image.description()?;
        let text = text.as_deref().unwrap_or(EMPTY_DESCRIPTION);
        let bytes = u32::try_from(text.len()).unwrap_or(u32::MAX);
        self.record(&Record::Description { bytes })?;
        self.put(text)?;
        let offset = self.offset;
        let flushed = self.out.flush();
        flushed.map_err(|source| ConvertError::Write { offset, source })
    }

    fn devices(&mut self, which: std::ops::Range<usize>) -> Result<(), ConvertError> {
        let devices = self.head.devices.get(which).unwrap_or_default();
        devices.iter().try_for_each(|device| self.section(device))
    }

    /// A section as it was.
    fn section(&mut self, section: &ImageSection) -> Result<(), ConvertError> {
        let body = self.image.section_body(section)?;
        self.record(&Record::Section(section.section.clone()))?;
        self.put(&body)?;
        self.record(&Record::SectionEnd {
            id: section.section.id,
        })
    }

    fn moved(&mut self, bytes: u64) {
        self.done.done_bytes += bytes;
        (self.progress)(self.done);
    }
}

/// A run of pages of a block, as they are read.
struct Pages {
    block: BlockIndex,
    first: u64,
    count: u64,
}

/// All pages of a block, as many at a time as are read at once.
fn pages(block: usize, total: u64) -> impl Iterator<Item = Pages> {
    let firsts = (0..total).step_by(usize::try_from(STORED_PAGES_MAX).unwrap_or(1));
    firsts.map(move |first| Pages {
        block: BlockIndex(block),
        first,
        count: STORED_PAGES_MAX.min(total - first),
    })
}

impl Pages {
    fn bytes(&self) -> u64 {
        self.count * PAGE_BYTES
    }
}

/// Room for the pages that are read at once.
fn page_buffer() -> Vec<u8> {
    vec![0; usize::try_from(STORED_PAGES_MAX * PAGE_BYTES).unwrap_or(0)]
}

/// As many bytes of the buffer as the pages have.
fn room<'b>(buffer: &'b mut [u8], pages: &Pages) -> &'b mut [u8] {
    let length = usize::try_from(pages.bytes()).unwrap_or(0);
    buffer.get_mut(..length).unwrap_or_default()
}
