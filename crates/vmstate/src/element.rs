//! One element of a field: a plain value, a struct, or another type converted to one of them.

use std::marker::PhantomData;

use crate::description::Description;
use crate::device::{BoxError, DeviceError, Origin};
use crate::loader::Loader;
use crate::saved::{Content, FieldType, SavedState};
use crate::state::VmState;
use crate::wire::Codec;

/// How one element of a field is saved and loaded.
///
/// [`Plain`], [`Struct`], [`VStruct`], [`Converted`] and [`Boxed`] are all there are; state with a
/// format of its own is a [`Codec`].
pub trait Element<T>: Send + Sync + 'static {
    /// What it looks like.
    fn describe(&self) -> ElementDescription;

    /// Append the value to `out`.
    ///
    /// # Errors
    /// A hook failed, or the value has no form on the wire.
    fn save(&self, value: &mut T, out: &mut Elements) -> Result<(), DeviceError>;

    /// Read the value; before, it is what this side has.
    ///
    /// # Errors
    /// The window is too short, the bytes are wrong, or a hook refused them.
    fn load(&self, value: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError>;

    /// A value to begin loading with that is not of this side; `None` if loading looks at what this
    /// side has.
    fn blank(&self) -> Option<T>;

    /// Tell a struct that it is in place.
    ///
    /// # Errors
    /// Its hook failed.
    fn committed(&self, value: &mut T) -> Result<(), DeviceError>;
}

/// What an [`Element`] looks like.
#[derive(Debug)]
pub struct ElementDescription {
    /// Name of its type.
    pub(crate) kind: FieldType,
    /// Bytes on the wire; `None` if that depends on the value.
    pub(crate) bytes: Option<u64>,
    /// Its fields.
    pub(crate) inner: Option<Description>,
}

/// Elements of one field that were saved.
#[derive(Debug, Default)]
pub struct Elements {
    count: u32,
    bytes: Vec<u8>,
    structs: Vec<SavedState>,
}

/// A plain value, by its [`Codec`].
#[derive(Clone, Copy, Debug)]
pub struct Plain<C>(pub C);

/// A struct in its current version.
#[derive(Clone, Copy, Debug)]
pub struct Struct;

/// A struct in a version that its owner fixes.
#[derive(Clone, Copy, Debug)]
pub struct VStruct(pub u32);

/// A value that is `T` in the device and `W` on the wire.
#[derive(Debug)]
pub struct Converted<E, T, W> {
    element: E,
    to_wire: fn(&T) -> Result<W, BoxError>,
    from_wire: fn(W) -> Result<T, BoxError>,
}

/// A value in a box of its own.
#[derive(Clone, Copy, Debug)]
pub struct Boxed<E>(pub E);

impl ElementDescription {
    /// Bytes that one takes at least.
    pub(crate) fn least_bytes(&self) -> u64 {
        let inner = self.inner.as_ref();
        let inner = inner.filter(|_| self.kind == FieldType::STRUCT);
        self.bytes
            .unwrap_or_else(|| inner.map_or(0, Description::least_bytes))
    }
}

impl Elements {
    /// What was saved, as the content of a field.
    pub(crate) fn into_content(self) -> Content {
        if self.structs.is_empty() {
            Content::Plain {
                count: self.count,
                bytes: self.bytes,
            }
        } else {
            Content::Structs(self.structs)
        }
    }

    /// All elements are laid out alike, so that one of them describes them all.
    pub(crate) fn are_alike(&self) -> bool {
        match self.structs.split_first() {
            Some((first, rest)) => rest.iter().all(|state| same_layout(first, state)),
            None => true,
        }
    }
}

/// Do two states have the same fields of the same sizes?
fn same_layout(a: &SavedState, b: &SavedState) -> bool {
    let all_same = |a: &[SavedState], b: &[SavedState]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_layout(a, b))
    };
    a.name == b.name
        && a.version == b.version
        && a.fields.len() == b.fields.len()
        && a.fields.iter().zip(&b.fields).all(|(a, b)| {
            a.name == b.name
                && a.kind == b.kind
                && a.shape == b.shape
                && match (&a.content, &b.content) {
                    (Content::Structs(a), Content::Structs(b))
                    | (Content::List(a), Content::List(b)) => all_same(a, b),
                    (a, b) => a.count() == b.count() && a.wire_bytes() == b.wire_bytes(),
                }
        })
        && all_same(&a.subsections, &b.subsections)
}

impl<T, C: Codec<T>> Element<T> for Plain<C> {
    fn describe(&self) -> ElementDescription {
        ElementDescription {
            kind: FieldType::named(self.0.type_name()),
            bytes: self.0.bytes(),
            inner: None,
        }
    }

    fn save(&self, value: &mut T, out: &mut Elements) -> Result<(), DeviceError> {
        out.count = out.count.saturating_add(1);
        self.0.save(value, &mut out.bytes)
    }

    fn blank(&self) -> Option<T> {
        self.0.blank()
    }

    fn load(&self, value: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        self.0.load(value, loader)
    }

    fn committed(&self, _: &mut T) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl<T: VmState> Element<T> for Struct {
    fn describe(&self) -> ElementDescription {
        let description = T::description();
        ElementDescription {
            kind: FieldType::STRUCT,
            bytes: description.fixed_bytes(T::VERSION),
            inner: Some(description.clone()),
        }
    }

    fn save(&self, value: &mut T, out: &mut Elements) -> Result<(), DeviceError> {
        out.structs.push(value.save()?);
        Ok(())
    }

    fn blank(&self) -> Option<T> {
        None
    }

    fn load(&self, value: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        value.load(loader, T::VERSION)
    }

    fn committed(&self, value: &mut T) -> Result<(), DeviceError> {
        value.committed()
    }
}

impl<T: VmState> Element<T> for VStruct {
    fn describe(&self) -> ElementDescription {
        let description = T::description();
        ElementDescription {
            kind: FieldType::VSTRUCT,
            bytes: description.fixed_bytes(self.0),
            inner: Some(description.clone()),
        }
    }

    fn save(&self, value: &mut T, out: &mut Elements) -> Result<(), DeviceError> {
        out.structs.push(value.save_as(self.0)?);
        Ok(())
    }

    fn blank(&self) -> Option<T> {
        None
    }

    fn load(&self, value: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        value.load(loader, self.0)
    }

    fn committed(&self, value: &mut T) -> Result<(), DeviceError> {
        value.committed()
    }
}

impl<E, T, W> Converted<E, T, W> {
    /// Convert by a pair of functions, each of which may refuse.
    pub fn new(
        element: E,
        to_wire: fn(&T) -> Result<W, BoxError>,
        from_wire: fn(W) -> Result<T, BoxError>,
    ) -> Self {
        Self {
            element,
            to_wire,
            from_wire,
        }
    }
}

impl<E, T, W> Converted<E, T, W>
where
    T: Clone + TryInto<W, Error: Into<BoxError>>,
    W: TryInto<T, Error: Into<BoxError>>,
{
    /// Convert by [`TryInto`] in both directions. The second argument only names `W`.
    pub fn by_try_into(element: E, _wire: PhantomData<W>) -> Self {
        Self::new(
            element,
            |value| value.clone().try_into().map_err(Into::into),
            |wire| wire.try_into().map_err(Into::into),
        )
    }
}

impl<T, W, E: Element<W>> Converted<E, T, W> {
    /// It is not the peer who is to blame if the value of this side has no form on the wire.
    fn own_value(&self, loader: &Loader<'_>, source: BoxError) -> DeviceError {
        let owner = Origin {
            offset: Some(loader.used()),
            ..self.element.describe().kind.as_str().into()
        };
        DeviceError::Hook {
            hook: "value on this side",
            owner,
            source,
        }
    }
}

impl<T: 'static, W: 'static, E: Element<W>> Element<T> for Converted<E, T, W> {
    fn describe(&self) -> ElementDescription {
        self.element.describe()
    }

    fn save(&self, value: &mut T, out: &mut Elements) -> Result<(), DeviceError> {
        let converted = (self.to_wire)(value);
        let mut wire = converted.map_err(|error| DeviceError::unsaveable(error.to_string()))?;
        self.element.save(&mut wire, out)
    }

    fn blank(&self) -> Option<T> {
        None
    }

    fn load(&self, value: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let mut wire = match self.element.blank() {
            Some(blank) => blank,
            // Begins with this side's value: an equal-checked type compares with it.
            None => (self.to_wire)(value).map_err(|source| self.own_value(loader, source))?,
        };
        self.element.load(&mut wire, loader)?;
        *value = (self.from_wire)(wire).map_err(|error| loader.fault(error.to_string()))?;
        Ok(())
    }

    /// What was on the wire is no more.
    fn committed(&self, _: &mut T) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl<T, E: Element<T>> Element<Box<T>> for Boxed<E> {
    fn describe(&self) -> ElementDescription {
        self.0.describe()
    }

    fn save(&self, value: &mut Box<T>, out: &mut Elements) -> Result<(), DeviceError> {
        self.0.save(value, out)
    }

    fn blank(&self) -> Option<Box<T>> {
        self.0.blank().map(Box::new)
    }

    fn load(&self, value: &mut Box<T>, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        self.0.load(value, loader)
    }

    fn committed(&self, value: &mut Box<T>) -> Result<(), DeviceError> {
        self.0.committed(value)
    }
}
