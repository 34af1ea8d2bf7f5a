//! What a program's device types look like: the JSON that QEMU writes with `-dump-vmstate`.
//!
//! ```text
//! {
//!   "vmschkmachine": {"Name": "pc-i440fx-7.2"},
//!   "hpet": {
//!     "Name": "hpet", "version_id": 2, "minimum_version_id": 1,
//!     "Description": {
//!       "name": "hpet", "version_id": 2, "minimum_version_id": 1,
//!       "Fields": [{"field": "config", "version_id": 0, "field_exists": false, "size": 8}, …],
//!       "Subsections": [{"name": "hpet/rtc_irq_level", "version_id": 1, …}, …]}},
//!   …
//! }
//! ```
//!
//! [`Schema::parse`] reads it, its `Display` writes it as QEMU does, [`dump`] makes one of our own
//! descriptions, [`Schema::of_stream`] one of what a stream says about itself, and [`compare`] tells
//! whether one program loads what the other sends.
//!
//! What such a text does not tell: the types of fields, under which conditions fields and subsections
//! are sent, how long a variable array is, and whatever is not registered by a device type (CPUs,
//! timers, buses). A field that says `size` 0 has a length that is known when it is saved.

mod compare;
mod dump;
mod read;
mod stream;
mod write;

pub use compare::{
    Cause, Comparison, DeviceComparison, Direction, Extent, MAX_REASONS, Names, Presence, Reason,
    Verdict, compare,
};
pub use dump::dump;
pub use read::{MAX_SCHEMA_BYTES, SchemaError};

/// All device types that a program knows, for one machine type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schema {
    /// The machine type.
    pub machine: String,
    /// In the order of the text.
    pub devices: Vec<SchemaDevice>,
    /// Where it comes from, which decides what an absent number means.
    pub source: Source,
}

/// Where a [`Schema`] comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A program that counts the elements of arrays (QEMU 10.0, and this crate): a field without
    /// a count is a single value, or as many as another field says.
    Counting,
    /// A program that does not (QEMU 7.2): any field may be an array.
    NotCounting,
    /// A stream: what is there was sent, with these very sizes and counts.
    Stream,
}

/// A device type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaDevice {
    /// The type's name (QOM), which is not in a stream.
    pub name: String,
    /// Version that is sent, and the highest that is loaded.
    pub version: u32,
    /// Lowest version that is loaded.
    pub minimum_version: u32,
    /// Its state.
    pub state: SchemaState,
}

/// State of a device, a struct or a subsection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaState {
    /// Name of its description, which is what a stream carries.
    pub name: String,
    /// Version that is sent, and the highest that is loaded.
    pub version: u32,
    /// Lowest version that is loaded.
    pub minimum_version: u32,
    /// In wire order; `None` if the state cannot be migrated.
    pub fields: Option<Vec<SchemaField>>,
    /// In the order in which they are sent.
    pub subsections: Vec<SchemaState>,
}

/// A field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaField {
    /// Its name; several fields of a state may share one.
    pub name: String,
    /// The first version that has it.
    pub since: u32,
    /// It is sent, and read, only under a condition.
    pub conditional: bool,
    /// Number of elements; see [`Source`] for what its absence means.
    pub count: Option<u32>,
    /// Bytes of one element in the program's memory: for a plain value that is what goes over the
    /// wire, for a struct it says nothing. 0 if it is only known when saving.
    pub element_bytes: u64,
    /// What an element is made of.
    pub inner: Option<SchemaState>,
}
