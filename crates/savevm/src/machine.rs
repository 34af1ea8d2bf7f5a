//! What both sides of a migration must agree on before anything else: the configuration section.
//!
//! ```text
//!   source                             destination
//!   name            any prefix of      its name
//!   page bits       equal; absent is   the smallest of the architecture
//!   capabilities    equal              x-ignore-shared, mapped-ram; unknown names are refused
//!   uuid            equal              if it has one
//! ```
//!
//! Rules: `vmstate.md` §1 of the wire format notes.

use std::fmt;

use vmferry_stream::{Configuration, Name, PageBits};
use vmferry_vmstate::{Content, FieldType, SavedField, SavedState, Shape};

/// Capabilities that change the stream so much that both sides must have them, or neither.
const CHECKED: [&str; 2] = ["x-ignore-shared", "mapped-ram"];
const VALIDATE_UUID: &str = "validate-uuid";

/// Every capability that QEMU had up to version 10.0.
const KNOWN: [&str; 24] = [
    "auto-converge",
    "background-snapshot",
    "block",
    "compress",
    "dirty-bitmaps",
    "dirty-limit",
    "events",
    "late-block-activate",
    "mapped-ram",
    "multifd",
    "pause-before-switchover",
    "postcopy-blocktime",
    "postcopy-preempt",
    "postcopy-ram",
    "rdma-pin-all",
    "release-ram",
    "return-path",
    "switchover-ack",
    "validate-uuid",
    "x-colo",
    "x-ignore-shared",
    "xbzrle",
    "zero-blocks",
    "zero-copy-send",
];

/// A machine as the configuration section shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its type with its version, such as `pc-i440fx-7.2`. Every QEMU accepts an empty name.
    pub name: Name,
    /// Guest page size.
    pub page_bits: PageBits,
    /// The smallest guest page size of the architecture, which is not sent.
    pub smallest_page_bits: PageBits,
    /// Capabilities that are on, by QEMU's names. `None` does not compare them: for whoever has none
    /// of them, and looks at the stream's [`Configuration`] itself.
    pub capabilities: Option<Vec<Name>>,
    /// UUID of the guest, in text order. Sent when the capability `validate-uuid` is on.
    pub uuid: Option<[u8; 16]>,
}

impl Default for Machine {
    /// A machine without a name, with pages of 4 KiB.
    fn default() -> Self {
        Self::named(Name::default())
    }
}

/// Source and destination are different machines.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Another type.
    #[error("received machine '{received}', here is '{local}'")]
    Name {
        /// In the stream.
        received: Name,
        /// Here.
        local: Name,
    },
    /// Another page size.
    #[error("received guest pages of 2^{received} bytes, here they have 2^{local}")]
    PageBits {
        /// In the stream, or the smallest if the stream does not say.
        received: u32,
        /// Here.
        local: u32,
    },
    /// On at one side only.
    #[error("capability '{name}' is {} here, but {} at the source", on(!received), on(*received))]
    Capability {
        /// Its name.
        name: &'static str,
        /// It is on at the source.
        received: bool,
    },
    /// A capability that did not exist when this was written.
    #[error("the source has the unknown capability '{name}' on")]
    UnknownCapability {
        /// Its name.
        name: Name,
    },
    /// Another guest.
    #[error(
        "received the guest with UUID {}, here is {}",
        Uuid(received),
        Uuid(local)
    )]
    Uuid {
        /// In the stream.
        received: [u8; 16],
        /// Here.
        local: [u8; 16],
    },
}

impl Machine {
    /// A machine of that type, with pages of 4 KiB.
    #[must_use]
    pub fn named(name: Name) -> Self {
        Self {
            name,
            page_bits: PageBits::X86,
            smallest_page_bits: PageBits::X86,
            capabilities: Some(Vec::new()),
            uuid: None,
        }
    }

    /// The configuration section of a stream from here.
    #[must_use]
    pub fn configuration(&self) -> Configuration {
        // In QEMU's order, whatever theirs.
        let checked = CHECKED.iter().filter_map(|checked| {
            let mut on = self.capabilities.iter().flatten();
            on.find(|name| *name == checked).cloned()
        });
        let capabilities: Vec<_> = checked.collect();
        Configuration {
            machine: self.name.clone(),
            page_bits: (self.page_bits != self.smallest_page_bits).then_some(self.page_bits),
            capabilities: (!capabilities.is_empty()).then_some(capabilities),
            uuid: self.uuid.filter(|_| self.has(VALIDATE_UUID)),
        }
    }

    /// Can a stream with this configuration be loaded here?
    ///
    /// # Errors
    /// What differs.
    pub fn check(&self, received: &Configuration) -> Result<(), Mismatch> {
        if !self.name.starts_with(received.machine.as_str()) {
            return Err(Mismatch::Name {
                received: received.machine.clone(),
                local: self.name.clone(),
            });
        }
        let page_bits = received.page_bits.unwrap_or(self.smallest_page_bits);
        if page_bits != self.page_bits {
            return Err(Mismatch::PageBits {
                received: page_bits.bits(),
                local: self.page_bits.bits(),
            });
        }
        self.check_capabilities(received)?;
        match (received.uuid, self.uuid) {
            (Some(received), Some(local)) if received != local => {
                Err(Mismatch::Uuid { received, local })
            }
            _ => Ok(()),
        }
    }

    fn check_capabilities(&self, received: &Configuration) -> Result<(), Mismatch> {
        if self.capabilities.is_none() {
            return Ok(());
        }
        let mut names = received.capabilities.iter().flatten();
        if let Some(name) = names.find(|name| !KNOWN.contains(&name.as_str())) {
            return Err(Mismatch::UnknownCapability { name: name.clone() });
        }
        for name in CHECKED {
            let received = received.has_capability(name);
            if received != self.has(name) {
                return Err(Mismatch::Capability { name, received });
            }
        }
        Ok(())
    }

    fn has(&self, capability: &str) -> bool {
        let mut on = self.capabilities.iter().flatten();
        on.any(|name| *name == capability)
    }
}

/// The configuration section as state: what the description of a stream says about it.
pub(crate) fn saved(configuration: &Configuration) -> SavedState {
    let name = configuration.machine.as_bytes();
    let fields = vec![
        field("len", "uint32", length(name.len())),
        field("name", "buffer", name.to_vec()),
    ];
    let page_bits = configuration.page_bits.map(|bits| {
        let bits = bits.bits().to_be_bytes().to_vec();
        let bits = field("target_page_bits", "uint32", bits);
        state("configuration/target-page-bits", vec![bits])
    });
    let capabilities = configuration.capabilities.as_deref().map(capabilities);
    let uuid = configuration.uuid.map(|uuid| {
        let data = field("uuid.data", "uint8", uuid.to_vec());
        state("configuration/uuid", vec![array(data, uuid.len())])
    });
    SavedState {
        subsections: [page_bits, capabilities, uuid]
            .into_iter()
            .flatten()
            .collect(),
        ..state("configuration", fields)
    }
}

fn capabilities(names: &[Name]) -> SavedState {
    let mut bytes = Vec::new();
    for name in names {
        bytes.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        bytes.extend(name.bytes());
    }
    let count = field("caps_count", "uint32", length(names.len()));
    let all = field("capabilities", "capability", bytes);
    state(
        "configuration/capabilities",
        vec![count, array(all, names.len())],
    )
}

fn state(name: &str, fields: Vec<SavedField>) -> SavedState {
    SavedState {
        name: name.into(),
        version: 1,
        fields,
        subsections: Vec::new(),
    }
}

fn field(name: &str, kind: &'static str, bytes: Vec<u8>) -> SavedField {
    SavedField {
        name: name.into(),
        kind: FieldType::named(kind),
        shape: Shape::One,
        content: Content::plain(bytes),
    }
}

/// The same bytes as so many elements; one alone is described as a single value.
fn array(mut field: SavedField, elements: usize) -> SavedField {
    if let (Content::Plain { count, .. }, 0 | 2..) = (&mut field.content, elements) {
        *count = u32::try_from(elements).unwrap_or(u32::MAX);
        field.shape = Shape::Array;
    }
    field
}

fn length(count: usize) -> Vec<u8> {
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    count.to_be_bytes().to_vec()
}

fn on(is_on: bool) -> &'static str {
    if is_on { "on" } else { "off" }
}

/// A UUID as text.
struct Uuid<'a>(&'a [u8; 16]);

impl fmt::Display for Uuid<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let dash = if matches!(index, 4 | 6 | 8 | 10) {
                "-"
            } else {
                ""
            };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}
