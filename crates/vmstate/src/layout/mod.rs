//! The description that travels behind a stream (VMDESCRIPTION), read and written.
//!
//! ```text
//! {"configuration": {…}, "page_size": 4096, "devices": [
//!   {"name": "fw_cfg", "instance_id": 0, "vmsd_name": "fw_cfg", "version": 2,
//!    "fields": [{"name": "cur_entry", "type": "uint16", "size": 2}, …],
//!    "subsections": [{"vmsd_name": "fw_cfg/dma", "version": 0, "fields": […]}, …]}, …]}
//! ```
//!
//! It says how each device's body is laid out in this very stream: [`VmDescription::parse`] reads
//! it, [`DeviceLayout::decode`] takes a body apart with it, [`DescriptionWriter`] writes it again.
//! QEMU 7.2 and 10.0 write it a little differently ([`Dialect`]); both are read.

mod decode;
mod read;
mod write;

use std::sync::Arc;

use crate::saved::{FieldType, SUBSECTION_HEADER_BYTES, Shape};

pub use decode::{BodyError, BodyFault};
pub use read::DescriptionError;
pub use write::{DescriptionWriter, Dialect};

/// The description of a stream's devices, in stream order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDescription {
    /// How the configuration section is laid out; only QEMU since 8.1 says it.
    pub configuration: Option<StateLayout>,
    /// Guest page size.
    pub page_bytes: u32,
    /// The devices; live sections are not among them.
    pub devices: Vec<DeviceLayout>,
}

/// How the body of one device's section is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceLayout {
    /// The section's name.
    pub name: Arc<str>,
    /// The section's instance.
    pub instance: u32,
    /// What is in it.
    pub body: BodyLayout,
}

/// What is known of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BodyLayout {
    /// Its fields.
    Described(StateLayout),
    /// Its length.
    OldStyle {
        /// Bytes.
        bytes: u64,
    },
}

/// Layout of a device, a struct or a subsection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateLayout {
    /// `vmsd_name`.
    pub name: Arc<str>,
    /// Version of that description.
    pub version: u32,
    /// In wire order.
    pub fields: Vec<FieldLayout>,
    /// In wire order.
    pub subsections: Vec<StateLayout>,
}

/// Layout of a field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldLayout {
    /// Its name.
    pub name: Arc<str>,
    /// Its type.
    pub kind: FieldType,
    /// A single value, an array, or an element of one.
    pub shape: Shape,
    /// Number of elements: 1 unless the shape is an array.
    pub count: u32,
    /// Bytes of one element, inner structs and subsections included; of the first, if they say their
    /// own lengths ([`FieldType::CAPABILITY`]).
    pub element_bytes: u64,
    /// Layouts inside: one for a struct, one for each element of a list, for each value of a tree,
    /// or for each key and each value of it in turn.
    pub inner: Vec<StateLayout>,
}

impl VmDescription {
    /// The layout of a section.
    #[must_use]
    pub fn device(&self, name: &str, instance: u32) -> Option<&DeviceLayout> {
        let mut devices = self.devices.iter();
        devices.find(|device| &*device.name == name && device.instance == instance)
    }
}

impl DeviceLayout {
    /// Bytes of the body.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        match &self.body {
            BodyLayout::Described(state) => state.wire_bytes(),
            BodyLayout::OldStyle { bytes } => *bytes,
        }
    }
}

impl StateLayout {
    /// Bytes of all fields and subsections. An array whose elements say their own lengths is counted
    /// as if all had that of the first: nothing else is described.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        let fields = self
            .fields
            .iter()
            .map(|field| field.element_bytes.saturating_mul(u64::from(field.count)));
        let subsections = self.subsections.iter().map(|state| {
            let header = state.name.len().saturating_add(SUBSECTION_HEADER_BYTES);
            let header = u64::try_from(header).unwrap_or(u64::MAX);
            header.saturating_add(state.wire_bytes())
        });
        fields.chain(subsections).fold(0, u64::saturating_add)
    }
}
