//! What a device's state looks like, before any device exists.

use std::borrow::Cow;

/// Fields and subsections of a device, a struct or a subsection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// QEMU's `vmsd_name`. A subsection's name begins with its owner's name and a slash.
    pub name: Cow<'static, str>,
    /// Version that is written, and the highest that is read.
    pub version: u32,
    /// Lowest version that is read.
    pub minimum_version: u32,
    /// The state cannot be migrated: such a device blocks saving and loading.
    pub unmigratable: bool,
    /// In wire order.
    pub fields: Vec<Field>,
    /// In the order in which they are written.
    pub subsections: Vec<Description>,
}

/// One field of a [`Description`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: Cow<'static, str>,
    /// QEMU's name of its type, such as `uint32` or `timer`.
    pub type_name: Cow<'static, str>,
    /// The first version that has it.
    pub since: u32,
    /// It is present only under a condition.
    pub conditional: bool,
    /// How many elements.
    pub count: Count,
    /// Bytes of one element on the wire; `None` where that depends on the state.
    pub element_bytes: Option<u64>,
    /// What an element is made of, when it has fields of its own.
    pub inner: Option<Description>,
}

/// How many elements a field has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// A single value.
    One,
    /// An array of fixed length.
    Fixed(u32),
    /// An array whose length is another field, or a list that ends itself.
    Variable,
}
