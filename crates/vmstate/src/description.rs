//! What a device's state looks like, before any device exists.

use std::borrow::Cow;

/// Fields and subsections of a device, a struct or a subsection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// QEMU's `vmsd_name`. A subsection's begins with its owner's, and is longer.
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

impl Description {
    /// Bytes of fields and subsections in a version; `None` if they depend on the state.
    pub(crate) fn fixed_bytes(&self, version: u32) -> Option<u64> {
        if !self.subsections.is_empty() {
            return None;
        }
        let present = self.fields.iter().filter(|field| field.since <= version);
        present
            .map(Field::fixed_bytes)
            .try_fold(0, |sum: u64, bytes| sum.checked_add(bytes?))
    }

    /// Bytes that there are at least in the current version, whatever the state.
    pub(crate) fn least_bytes(&self) -> u64 {
        let present = self
            .fields
            .iter()
            .filter(|field| field.since <= self.version);
        present.map(Field::least_bytes).fold(0, u64::saturating_add)
    }

    /// Elements of an array of this may have different fields, so each is described by itself.
    pub(crate) fn varies_by_element(&self) -> bool {
        let varies = |field: &Field| {
            let inner = field.inner.as_ref();
            let inner = inner.filter(|_| field.type_name == "struct");
            field.conditional || inner.is_some_and(Self::varies_by_element)
        };
        !self.subsections.is_empty() || self.fields.iter().any(varies)
    }
}

impl Field {
    fn least_bytes(&self) -> u64 {
        let count = match self.count {
            Count::One => 1,
            Count::Fixed(count) => u64::from(count),
            Count::Variable => return 0,
        };
        let inner = self.inner.as_ref();
        let inner = inner.filter(|_| self.type_name == "struct");
        let each = match self.element_bytes {
            _ if self.conditional => 0,
            Some(bytes) => bytes,
            None => inner.map_or(0, Description::least_bytes),
        };
        each.saturating_mul(count)
    }

    fn fixed_bytes(&self) -> Option<u64> {
        let count = match self.count {
            Count::One => 1,
            Count::Fixed(count) => u64::from(count),
            Count::Variable => return None,
        };
        let bytes = self.element_bytes.filter(|_| !self.conditional)?;
        bytes.checked_mul(count)
    }
}
