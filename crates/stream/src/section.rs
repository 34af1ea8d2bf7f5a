//! Section headers.
//!
//! ```text
//! START 01, FULL 04   u32 id, str8 name, u32 instance, u32 version
//! PART  02, END  03   u32 id
//! footer          7e  u32 id
//! ```

use crate::names::{InstanceId, Name, SectionId};
use crate::reader::{Parse, Reader};

/// First byte of a footer.
pub(crate) const FOOTER: u8 = 0x7e;

/// Where a section stands in the life of what it saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// First section of a live handler.
    Start,
    /// Any number of these.
    Part,
    /// Last section of a live handler.
    End,
    /// The only section of a device.
    Full,
}

/// The header of a section. PART and END carry only their id; the rest is that of their START.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// START, PART, END or FULL.
    pub kind: SectionKind,
    /// Its number.
    pub id: SectionId,
    /// What it saves (QEMU's idstr). May be empty, although no sender does that.
    pub name: Name,
    /// Which of several of that name.
    pub instance: InstanceId,
    /// Version of the body's layout.
    pub version: u32,
}

/// What the body of a section is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// [`crate::BlockChunk`]s.
    Block,
    /// [`crate::RamRecord`]s.
    Ram,
    /// [`crate::BitmapRecord`]s.
    DirtyBitmap,
    /// Something of a length that is not in the stream.
    Device,
}

impl Section {
    /// What the body is made of, by the section's name.
    #[must_use]
    pub fn content(&self) -> Content {
        match self.name.as_str() {
            "block" => Content::Block,
            "ram" => Content::Ram,
            "dirty-bitmap" => Content::DirtyBitmap,
            _ => Content::Device,
        }
    }

    /// The same section, as another kind.
    #[must_use]
    pub fn with_kind(&self, kind: SectionKind) -> Self {
        Self {
            kind,
            ..self.clone()
        }
    }

    /// Read the rest of a START or FULL header, after its type byte.
    pub(crate) fn read(reader: &mut Reader<'_>, kind: SectionKind) -> Parse<Self> {
        Ok(Self {
            kind,
            id: SectionId(reader.u32("section id")?),
            name: reader.name("section name")?,
            instance: InstanceId(reader.u32("section instance")?),
            version: reader.u32("section version")?,
        })
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let (kind, named) = match self.kind {
            SectionKind::Start => (1, true),
            SectionKind::Part => (2, false),
            SectionKind::End => (3, false),
            SectionKind::Full => (4, true),
        };
        out.push(kind);
        out.extend(self.id.0.to_be_bytes());
        if named {
            self.name.encode(out);
            out.extend(self.instance.0.to_be_bytes());
            out.extend(self.version.to_be_bytes());
        }
    }
}

impl Content {
    /// The only version of the layout that exists, where it is known here.
    pub(crate) fn version(self) -> Option<u32> {
        match self {
            Self::Block | Self::DirtyBitmap => Some(1),
            Self::Ram => Some(4),
            Self::Device => None,
        }
    }
}
