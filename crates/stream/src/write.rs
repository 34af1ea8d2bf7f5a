//! The way back: records to bytes.

use crate::decoder::{DESCRIPTION, MAGIC, Record, VERSION};
use crate::names::{PageBits, SectionId};
use crate::ram::RamState;
use crate::section::FOOTER;

/// Appends records to a buffer. Payload is the caller's: it follows the record that announces it.
///
/// Writes what it is told, in the order in which it is told; a decoder on the other side will say
/// what is wrong with it. RAM pages name their block only when it is another than before.
#[derive(Clone, Debug)]
pub struct Encoder {
    footers: bool,
    ram: RamState,
}

impl Encoder {
    /// An encoder at the beginning of a stream, with or without section footers (every machine type
    /// since 2.4 has them).
    #[must_use]
    pub fn new(footers: bool) -> Self {
        Self {
            footers,
            ram: RamState::new(PageBits::X86, 0),
        }
    }

    /// Name the RAM block again with the next page. A sender does so when it switches to postcopy
    /// and when it resumes.
    pub fn forget_ram_block(&mut self) {
        self.ram.forget_block();
    }

    /// Append a record to `out`.
    pub fn record(&mut self, record: &Record, out: &mut Vec<u8>) {
        match record {
            Record::Header { version } => {
                debug_assert_eq!(*version, VERSION);
                out.extend(MAGIC.to_be_bytes());
                out.extend(version.to_be_bytes());
            }
            Record::Configuration(configuration) => configuration.encode(out),
            Record::Section(section) => section.encode(out),
            Record::Block(chunk) => chunk.encode(out),
            Record::Ram(record) => self.ram.encode(record, out),
            Record::Bitmap(record) => record.encode(out),
            Record::SectionEnd { id } => self.footer(*id, out),
            Record::Command(command) => command.encode(out),
            Record::DiscardRange(range) => range.encode(out),
            Record::Eof => out.push(0),
            Record::Description { bytes } => {
                out.push(DESCRIPTION);
                out.extend(bytes.to_be_bytes());
            }
        }
    }

    fn footer(&self, id: SectionId, out: &mut Vec<u8>) {
        if self.footers {
            out.push(FOOTER);
            out.extend(id.0.to_be_bytes());
        }
    }
}
