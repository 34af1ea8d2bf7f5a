//! The configuration section.
//!
//! ```text
//! 07, u32 length, machine type name, subsections: 05, str8 name, u32 version 1, body
//!     configuration/target-page-bits   u32 bits
//!     configuration/capabilities       u32 count, count × str8
//!     configuration/uuid               16 bytes
//! ```
//!
//! The section has no end mark: it is over when the next byte is not 05. It fits into one window of
//! [`crate::limits::MAX_HEADER_BYTES`], together with that byte.

use crate::error::Fault;
use crate::limits::{MAX_CAPABILITIES, MAX_MACHINE_NAME_BYTES};
use crate::names::{Name, PageBits};
use crate::reader::{Parse, Reader};

pub(crate) const CONFIGURATION: u8 = 0x07;
const SUBSECTION: u8 = 0x05;
const VERSION: u32 = 1;
const PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";
const UUID: &str = "configuration/uuid";

/// What the sender says about its machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// Machine type, such as `pc-i440fx-7.2`. QEMU accepts any prefix of its own, even an empty one.
    pub machine: Name,
    /// Guest page size, when it is not the architecture's smallest.
    pub page_bits: Option<PageBits>,
    /// Capabilities that both sides must agree on. `None` when the subsection is absent.
    pub capabilities: Option<Vec<Name>>,
    /// UUID of the guest, in text order.
    pub uuid: Option<[u8; 16]>,
}

impl Configuration {
    /// A configuration that holds only the machine type.
    #[must_use]
    pub fn of_machine(machine: Name) -> Self {
        Self {
            machine,
            ..Self::default()
        }
    }

    /// Is this capability among those that the sender names?
    #[must_use]
    pub fn has_capability(&self, name: &str) -> bool {
        let mut names = self.capabilities.iter().flatten();
        names.any(|capability| capability == name)
    }

    /// Read the section after its type byte.
    pub(crate) fn read(reader: &mut Reader<'_>) -> Parse<Self> {
        let length = reader.u32("machine name length")?;
        reader.at_most(u64::from(length), u64::from(MAX_MACHINE_NAME_BYTES))?;
        let mut configuration = Self::of_machine(reader.name_of(length, "machine name")?);
        while reader.peek_u8("end of the configuration")? == SUBSECTION {
            configuration.read_subsection(reader)?;
        }
        Ok(configuration)
    }

    fn read_subsection(&mut self, reader: &mut Reader<'_>) -> Parse<()> {
        reader.u8("configuration subsection")?;
        let name = reader.name("configuration subsection name")?;
        if ![PAGE_BITS, CAPABILITIES, UUID].contains(&name.as_str()) {
            return Err(reader.wrong(Fault::UnknownSubsection(name)));
        }
        let version = reader.u32("configuration subsection version")?;
        if version != VERSION {
            return Err(reader.wrong(Fault::UnsupportedSectionVersion {
                name,
                version,
                supported: VERSION,
            }));
        }
        match name.as_str() {
            PAGE_BITS => {
                let bits = reader.u32("target page bits")?;
                let known = PageBits::new(bits);
                self.page_bits =
                    Some(known.ok_or_else(|| reader.wrong(Fault::UnsupportedPageBits(bits)))?);
            }
            CAPABILITIES => {
                let count = reader.u32("number of capabilities")?;
                reader.at_most(u64::from(count), u64::from(MAX_CAPABILITIES))?;
                let names = (0..count).map(|_| reader.name("capability"));
                self.capabilities = Some(names.collect::<Parse<_>>()?);
            }
            _ => self.uuid = Some(reader.array("uuid")?),
        }
        Ok(())
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.push(CONFIGURATION);
        out.extend(u32::from(self.machine.length()).to_be_bytes());
        out.extend(self.machine.bytes());
        if let Some(bits) = self.page_bits {
            encode_subsection(PAGE_BITS, out);
            out.extend(bits.bits().to_be_bytes());
        }
        if let Some(names) = &self.capabilities {
            encode_subsection(CAPABILITIES, out);
            let count = u32::try_from(names.len()).unwrap_or(u32::MAX);
            out.extend(count.to_be_bytes());
            for name in names {
                name.encode(out);
            }
        }
        if let Some(uuid) = &self.uuid {
            encode_subsection(UUID, out);
            out.extend(uuid);
        }
    }
}

fn encode_subsection(name: &str, out: &mut Vec<u8>) {
    out.push(SUBSECTION);
    crate::names::encode_str8(name, out);
    out.extend(VERSION.to_be_bytes());
}
