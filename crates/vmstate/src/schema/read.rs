//! JSON text to a schema.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, Visitor};

use super::{Schema, SchemaDevice, SchemaField, SchemaState, Source};

/// Longest text that is read. QEMU 10.0 writes 0.8 MB for x86.
pub const MAX_SCHEMA_BYTES: usize = 16 << 20;
/// Longest name of a machine, a device, a state or a field; a stream cannot carry longer ones.
const MAX_NAME_BYTES: usize = 255;
/// The key of the machine's name among those of the devices.
pub(super) const MACHINE_KEY: &str = "vmschkmachine";

/// Text that is no schema.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// There is too much of it.
    #[error("the schema has {bytes} bytes, more than {MAX_SCHEMA_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// It is not JSON, or not of this form. Says line and column.
    #[error("not a schema as -dump-vmstate writes it: {0}")]
    Form(#[from] serde_json::Error),
}

impl Schema {
    /// Read what QEMU's `-dump-vmstate` writes. Unknown keys are passed over. Memory is a small
    /// multiple of the text's length, and the depth is limited.
    ///
    /// # Errors
    /// It is not such a text, or longer than [`MAX_SCHEMA_BYTES`].
    pub fn parse(text: &[u8]) -> Result<Self, SchemaError> {
        if text.len() > MAX_SCHEMA_BYTES {
            return Err(SchemaError::TooLong { bytes: text.len() });
        }
        // Refuses a depth of more than 127 arrays and objects: 42 states inside each other.
        Ok(serde_json::from_slice(text)?)
    }
}

impl<'de> Deserialize<'de> for Schema {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_map(SchemaVisitor)
    }
}

/// The devices are keys of one object, whose order counts.
struct SchemaVisitor;

impl<'de> Visitor<'de> for SchemaVisitor {
    type Value = Schema;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a key for each device type")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Schema, M::Error> {
        #[derive(Deserialize)]
        struct Machine {
            #[serde(rename = "Name", deserialize_with = "name")]
            name: String,
        }
        let mut machine = None;
        let mut devices = Vec::<SchemaDevice>::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == MACHINE_KEY {
                machine = Some(map.next_value::<Machine>()?.name);
            } else {
                devices.push(map.next_value()?);
            }
        }
        let source = if devices.iter().any(|device| counts(&device.state)) {
            Source::Counting
        } else {
            Source::NotCounting
        };
        Ok(Schema {
            machine: machine.ok_or_else(|| M::Error::missing_field(MACHINE_KEY))?,
            devices,
            source,
        })
    }
}

fn counts(state: &SchemaState) -> bool {
    let mut fields = state.fields.iter().flatten();
    fields.any(|field| field.count.is_some() || field.inner.as_ref().is_some_and(counts))
        || state.subsections.iter().any(counts)
}

impl<'de> Deserialize<'de> for SchemaDevice {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(rename = "Name", deserialize_with = "name")]
            name: String,
            version_id: u32,
            minimum_version_id: u32,
            #[serde(rename = "Description")]
            state: SchemaState,
        }
        let raw = Raw::deserialize(input)?;
        Ok(Self {
            name: raw.name,
            version: raw.version_id,
            minimum_version: raw.minimum_version_id,
            state: raw.state,
        })
    }
}

impl<'de> Deserialize<'de> for SchemaState {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(deserialize_with = "name")]
            name: String,
            version_id: u32,
            minimum_version_id: u32,
            #[serde(rename = "Fields")]
            fields: Option<Vec<SchemaField>>,
            #[serde(rename = "Subsections", default)]
            subsections: Vec<SchemaState>,
        }
        let raw = Raw::deserialize(input)?;
        Ok(Self {
            name: raw.name,
            version: raw.version_id,
            minimum_version: raw.minimum_version_id,
            fields: raw.fields,
            subsections: raw.subsections,
        })
    }
}

impl<'de> Deserialize<'de> for SchemaField {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(rename = "field", deserialize_with = "name")]
            name: String,
            version_id: u32,
            field_exists: bool,
            num: Option<u32>,
            size: u64,
            #[serde(rename = "Description")]
            inner: Option<SchemaState>,
        }
        let raw = Raw::deserialize(input)?;
        Ok(Self {
            name: raw.name,
            since: raw.version_id,
            conditional: raw.field_exists,
            count: raw.num,
            element_bytes: raw.size,
            inner: raw.inner,
        })
    }
}

fn name<'de, D: Deserializer<'de>>(input: D) -> Result<String, D::Error> {
    let name = String::deserialize(input)?;
    if name.len() > MAX_NAME_BYTES {
        return Err(D::Error::custom(format_args!(
            "a name of {} bytes is longer than {MAX_NAME_BYTES}",
            name.len()
        )));
    }
    Ok(name)
}
