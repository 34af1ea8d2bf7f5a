//! Saved state to the JSON text that describes it, as QEMU writes it.

use std::io;

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::ser::Formatter;

use crate::saved::{Content, FieldType, SavedBody, SavedField, SavedState, Shape};

/// Whose habits the text follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// QEMU up to 8.0: every element of an array that is described one by one has its index; no
    /// configuration; a null in an array of pointers is a `uint64` of one byte.
    Qemu7,
    /// Later ones: the last element has none; the configuration comes first; a null is a `nullptr`.
    Qemu10,
}

/// Writes the description of a stream, device by device.
#[derive(Debug)]
pub struct DescriptionWriter {
    dialect: Dialect,
    text: Vec<u8>,
    devices: u32,
}

impl DescriptionWriter {
    /// The beginning of a description. The configuration is written in the dialect that has it.
    #[must_use]
    pub fn new(dialect: Dialect, page_bytes: u32, configuration: Option<&SavedState>) -> Self {
        let mut writer = Self {
            dialect,
            text: b"{".to_vec(),
            devices: 0,
        };
        if let (Dialect::Qemu10, Some(state)) = (dialect, configuration) {
            writer.text.extend(b"\"configuration\": ");
            writer.put(&Written { dialect, it: state });
            writer.text.extend(b", ");
        }
        let page_size = format!("\"page_size\": {page_bytes}, \"devices\": [");
        writer.text.extend(page_size.bytes());
        writer
    }

    /// Add a device's section, as it was saved.
    pub fn device(&mut self, idstr: &str, instance: u32, body: &SavedBody) {
        if self.devices > 0 {
            self.text.extend(b", ");
        }
        self.devices = self.devices.saturating_add(1);
        self.put(&WrittenDevice {
            dialect: self.dialect,
            idstr,
            instance,
            body,
        });
    }

    /// The whole text, on one line.
    #[must_use]
    pub fn finish(mut self) -> String {
        self.text.extend(b"]}");
        String::from_utf8(self.text).unwrap_or_default()
    }

    fn put(&mut self, value: &impl Serialize) {
        let mut out = serde_json::Serializer::with_formatter(&mut self.text, OneLine);
        // Memory takes everything, and every key is a string.
        let written = value.serialize(&mut out);
        debug_assert!(written.is_ok());
    }
}

struct Written<'a, T> {
    dialect: Dialect,
    it: &'a T,
}

struct WrittenDevice<'a> {
    dialect: Dialect,
    idstr: &'a str,
    instance: u32,
    body: &'a SavedBody,
}

impl<'a, T> Written<'a, T> {
    fn also<U>(&self, it: &'a U) -> Written<'a, U> {
        Written {
            dialect: self.dialect,
            it,
        }
    }
}

impl Serialize for WrittenDevice<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(None)?;
        map.serialize_entry("name", self.idstr)?;
        map.serialize_entry("instance_id", &self.instance)?;
        match self.body {
            SavedBody::Described(state) => {
                let dialect = self.dialect;
                state_entries(&Written { dialect, it: state }, &mut map)?;
            }
            SavedBody::OldStyle(bytes) => {
                map.serialize_entry("size", &bytes.len())?;
                map.serialize_entry("fields", &[OldStyleData(bytes.len())])?;
            }
        }
        map.end()
    }
}

struct OldStyleData(usize);

impl Serialize for OldStyleData {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(None)?;
        map.serialize_entry("name", "data")?;
        map.serialize_entry("size", &self.0)?;
        map.serialize_entry("type", FieldType::BUFFER.as_str())?;
        map.end()
    }
}

impl Serialize for Written<'_, SavedState> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(None)?;
        state_entries(self, &mut map)?;
        map.end()
    }
}

fn state_entries<M: SerializeMap>(
    state: &Written<'_, SavedState>,
    map: &mut M,
) -> Result<(), M::Error> {
    map.serialize_entry("vmsd_name", &*state.it.name)?;
    map.serialize_entry("version", &state.it.version)?;
    map.serialize_entry("fields", &state.also(&state.it.fields))?;
    if !state.it.subsections.is_empty() {
        map.serialize_entry("subsections", &state.also(&state.it.subsections))?;
    }
    Ok(())
}

impl<T> Serialize for Written<'_, Vec<T>>
where
    for<'a> Written<'a, T>: Serialize,
{
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_seq(self.it.iter().map(|it| self.also(it)))
    }
}

impl Serialize for Written<'_, SavedField> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let field = self.it;
        let mut map = out.serialize_map(None)?;
        map.serialize_entry("name", &*field.name)?;
        let count = field.content.count();
        match field.shape {
            Shape::Array => map.serialize_entry("array_len", &count)?,
            Shape::Element { last: true, .. } if self.dialect == Dialect::Qemu10 => {}
            Shape::Element { index, .. } => map.serialize_entry("index", &index)?,
            Shape::One => {}
        }
        let kind = match self.dialect {
            Dialect::Qemu7 if field.kind == FieldType::NULLPTR => "uint64",
            _ => field.kind.as_str(),
        };
        map.serialize_entry("type", kind)?;
        match &field.content {
            Content::Plain { .. } => {}
            Content::Structs(states) if field.kind == FieldType::STRUCT => {
                if let Some(first) = states.first() {
                    map.serialize_entry("struct", &self.also(first))?;
                }
            }
            Content::Structs(states) => {
                if let Some(first) = states.first() {
                    state_entries(&self.also(first), &mut map)?;
                }
            }
            Content::List(states) => {
                for state in states {
                    state_entries(&self.also(state), &mut map)?;
                }
            }
            Content::Tree(nodes) => {
                for (key, value) in nodes {
                    if let Content::Structs(keys) = key {
                        for key in keys {
                            state_entries(&self.also(key), &mut map)?;
                        }
                    }
                    state_entries(&self.also(value), &mut map)?;
                }
            }
        }
        map.serialize_entry("size", &field.element_bytes())?;
        map.end()
    }
}

/// One line, with a space behind each comma and colon.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}
