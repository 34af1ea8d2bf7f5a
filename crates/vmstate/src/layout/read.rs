//! JSON text to layouts, with the keys that repeat.

use std::fmt;
use std::sync::Arc;

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use crate::layout::{BodyLayout, DeviceLayout, FieldLayout, StateLayout, VmDescription};
use crate::saved::{FieldType, Shape};

/// Text that is no description.
#[derive(Debug, thiserror::Error)]
#[error("the description of the devices is not readable: {0}")]
pub struct DescriptionError(#[from] serde_json::Error);

impl VmDescription {
    /// Read the text, in either dialect. Unknown keys are passed over. Memory is a small multiple of
    /// the text's length.
    ///
    /// # Errors
    /// It is not such a text; says line and column.
    pub fn parse(text: &[u8]) -> Result<Self, DescriptionError> {
        let raw: RawDescription = serde_json::from_slice(text)?;
        Ok(Self {
            configuration: raw.configuration,
            page_bytes: raw.page_size,
            devices: raw.devices,
        })
    }
}

#[derive(Deserialize)]
struct RawDescription {
    #[serde(default)]
    configuration: Option<StateLayout>,
    #[serde(default)]
    page_size: u32,
    #[serde(default)]
    devices: Vec<DeviceLayout>,
}

impl<'de> Deserialize<'de> for StateLayout {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            vmsd_name: Arc<str>,
            version: u32,
            #[serde(default)]
            fields: Fields,
            #[serde(default)]
            subsections: Vec<StateLayout>,
        }
        let raw = Raw::deserialize(input)?;
        Ok(Self {
            name: raw.vmsd_name,
            version: raw.version,
            fields: raw.fields.0,
            subsections: raw.subsections,
        })
    }
}

impl<'de> Deserialize<'de> for DeviceLayout {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            name: Arc<str>,
            instance_id: u32,
            vmsd_name: Option<Arc<str>>,
            version: Option<u32>,
            size: Option<u64>,
            #[serde(default)]
            fields: Fields,
            #[serde(default)]
            subsections: Vec<StateLayout>,
        }
        let raw = Raw::deserialize(input)?;
        let body = match (raw.vmsd_name, raw.version, raw.size) {
            (Some(name), Some(version), _) => BodyLayout::Described(StateLayout {
                name,
                version,
                fields: raw.fields.0,
                subsections: raw.subsections,
            }),
            (None, _, Some(bytes)) => BodyLayout::OldStyle { bytes },
            (None, _, None) => return Err(D::Error::missing_field("vmsd_name")),
            (Some(_), None, _) => return Err(D::Error::missing_field("version")),
        };
        Ok(Self {
            name: raw.name,
            instance: raw.instance_id,
            body,
        })
    }
}

/// The fields of one object, with their places in arrays.
#[derive(Default)]
struct Fields(Vec<FieldLayout>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        let mut fields = Vec::<FieldLayout>::deserialize(input)?;
        place_last_elements(&mut fields);
        fields.shrink_to_fit();
        Ok(Self(fields))
    }
}

/// QEMU 10.0 leaves the index out on the last element of an array: a field that repeats name and type
/// of an element before it is the next one. Where no other field of that name follows, not even a
/// null, the array ends.
fn place_last_elements(fields: &mut [FieldLayout]) {
    let mut before: Option<(Arc<str>, FieldType, u32)> = None;
    for field in fields.iter_mut() {
        if let Some((name, kind, index)) = &before
            && *name == field.name
            && *kind == field.kind
            && field.shape == Shape::One
        {
            field.shape = Shape::Element {
                index: index.saturating_add(1),
                last: true,
            };
        }
        before = match field.shape {
            Shape::Element { index, last: false } => {
                Some((field.name.clone(), field.kind.clone(), index))
            }
            _ => None,
        };
    }
    let mut after: Option<(Arc<str>, Option<u32>)> = None;
    for field in fields.iter_mut().rev() {
        let mut own = None;
        if let Shape::Element { index, last } = &mut field.shape {
            let next = index.saturating_add(1);
            let goes_on = after.as_ref().is_some_and(|(name, index)| {
                *name == field.name && index.is_none_or(|index| index == next)
            });
            *last = !goes_on;
            own = Some(*index);
        }
        after = Some((field.name.clone(), own));
    }
}

impl<'de> Deserialize<'de> for FieldLayout {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        input.deserialize_map(FieldVisitor)
    }
}

struct FieldVisitor;

impl<'de> Visitor<'de> for FieldVisitor {
    type Value = FieldLayout;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<FieldLayout, A::Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum Key {
            Name,
            Type,
            Size,
            ArrayLen,
            Index,
            Struct,
            VmsdName,
            Version,
            Fields,
            Subsections,
            #[serde(other)]
            Other,
        }
        let (mut name, mut kind, mut size) = (None, None, None);
        let (mut count, mut index) = (None, None);
        let mut inner: Vec<StateLayout> = Vec::new();
        while let Some(key) = map.next_key()? {
            match key {
                Key::Name => name = Some(map.next_value()?),
                Key::Type => kind = Some(map.next_value()?),
                Key::Size => size = Some(map.next_value()?),
                Key::ArrayLen => count = Some(map.next_value()?),
                Key::Index => index = Some(map.next_value()?),
                Key::Struct => inner.push(map.next_value()?),
                Key::VmsdName => inner.push(StateLayout {
                    name: map.next_value()?,
                    version: 0,
                    fields: Vec::new(),
                    subsections: Vec::new(),
                }),
                Key::Version => last_of(&mut inner)?.version = map.next_value()?,
                Key::Fields => last_of(&mut inner)?.fields = map.next_value::<Fields>()?.0,
                Key::Subsections => last_of(&mut inner)?.subsections = map.next_value()?,
                Key::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let shape = match (count, index) {
            (Some(_), _) => Shape::Array,
            (None, Some(index)) => Shape::Element { index, last: false },
            (None, None) => Shape::One,
        };
        inner.shrink_to_fit();
        let kind: String = kind.ok_or_else(|| A::Error::missing_field("type"))?;
        let kind = match (kind.as_str(), size) {
            // A null, as older versions name it.
            ("uint64", Some(1)) => FieldType::NULLPTR,
            _ => FieldType::new(kind),
        };
        Ok(FieldLayout {
            name: name.ok_or_else(|| A::Error::missing_field("name"))?,
            kind,
            shape,
            count: count.unwrap_or(1),
            element_bytes: size.ok_or_else(|| A::Error::missing_field("size"))?,
            inner,
        })
    }
}

/// Lists put the keys of their elements into the field itself, once for each element.
fn last_of<E: Error>(inner: &mut [StateLayout]) -> Result<&mut StateLayout, E> {
    inner
        .last_mut()
        .ok_or_else(|| E::custom("a list element without vmsd_name"))
}
