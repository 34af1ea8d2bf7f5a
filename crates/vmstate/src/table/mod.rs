//! The fields of a type in wire order, with access to them: what a derived description is made of.

mod field;
mod list;
mod once;
mod sequence;
mod subsection;

use std::fmt;
use std::sync::Arc;

pub use field::{Number, count_of};
pub use list::Queue;
pub use sequence::{FixedArray, Sequence, fixed_array};

use crate::description::{Count, Description, Field};
use crate::device::{BoxError, DeviceError, Origin};
use crate::element::{Element, ElementDescription};
use crate::loader::Loader;
use crate::saved::{FieldType, SUBSECTION, SavedField, SavedState};
use crate::state::{View, VmState};

use field::{Bitmap, Buffer, Many, Nullable, Single, Unused, ViewField};
use list::{List, Tree};
use subsection::{FieldSubsection, Subsection, ViewSubsection};

/// Fields, subsections and hooks of a `T`, in wire order.
///
/// `#[derive(VmState)]` writes this; by hand it reads so:
///
/// ```
/// use vmferry_vmstate::{wire, Plain, Table};
///
/// struct Divisor {
///     latch: u16,
///     scratch: [u8; 4],
/// }
///
/// let table = Table::<Divisor>::new("divisor", 2, 1)
///     .single("latch", Plain(wire::Uint16), |divisor| &mut divisor.latch)
///     .many("scratch", Plain(wire::Uint8), |divisor| &mut divisor.scratch[..], 4)
///     .since(2);
/// let mut divisor = Divisor { latch: 12, scratch: *b"abcd" };
/// let mut bytes = Vec::new();
/// table.save(&mut divisor, 2)?.encode(&mut bytes);
/// assert_eq!(bytes, b"\x00\x0cabcd");
/// # Ok::<(), vmferry_vmstate::DeviceError>(())
/// ```
pub struct Table<T: 'static> {
    description: Description,
    fields: Vec<Entry<T>>,
    subsections: Vec<Box<dyn Subsection<T>>>,
    hooks: Hooks<T>,
}

struct Entry<T> {
    /// With the `[k]` of a repeated name.
    name: Arc<str>,
    kind: FieldType,
    since: u32,
    condition: Option<fn(&T, u32) -> bool>,
    one_by_one: bool,
    access: Box<dyn Access<T>>,
}

/// A hook that is told nothing.
type Hook<T> = Box<dyn Fn(&mut T) -> Result<(), BoxError> + Send + Sync>;

/// A hook that is told the version of the body.
type VersionHook<T> = Box<dyn Fn(&mut T, u32) -> Result<(), BoxError> + Send + Sync>;

struct Hooks<T> {
    needed: Option<fn(&T) -> bool>,
    pre_save: Option<Hook<T>>,
    post_save: Option<Hook<T>>,
    pre_load: Option<Hook<T>>,
    post_load: Option<VersionHook<T>>,
    committed: Option<Hook<T>>,
}

/// One field of a `T`.
trait Access<T>: Send + Sync {
    /// Its shape; name, version and condition are added by the table.
    fn describe(&self) -> Shape;

    /// Append what there is of it: one saved field, none, or one for each element.
    fn save(&self, state: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError>;

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError>;

    /// Tell the structs in it that they are in place.
    fn committed(&self, state: &mut T) -> Result<(), DeviceError>;
}

/// What a field is made of.
struct Shape {
    kind: FieldType,
    count: Count,
    bytes: Option<u64>,
    inner: Option<Description>,
    /// Its elements may differ in their layout.
    varies: bool,
}

impl Shape {
    fn of(element: ElementDescription, count: Count) -> Self {
        let ElementDescription { kind, bytes, inner } = element;
        let varies = match &inner {
            Some(inner) => kind == FieldType::STRUCT && inner.varies_by_element(),
            None => bytes.is_none(),
        };
        Self {
            kind,
            count,
            bytes,
            inner,
            varies,
        }
    }
}

/// Where a field puts what it saves.
struct Saver<'a> {
    name: &'a Arc<str>,
    kind: &'a FieldType,
    /// The elements of an array may differ in their layout.
    one_by_one: bool,
    fields: &'a mut Vec<SavedField>,
}

impl<T: 'static> Table<T> {
    /// A description without fields. A body of `minimum_version` up to `version` is read.
    #[must_use]
    pub fn new(name: &'static str, version: u32, minimum_version: u32) -> Self {
        Self {
            description: Description {
                name: name.into(),
                version,
                minimum_version,
                unmigratable: false,
                fields: Vec::new(),
                subsections: Vec::new(),
            },
            fields: Vec::new(),
            subsections: Vec::new(),
            hooks: Hooks {
                needed: None,
                pre_save: None,
                post_save: None,
                pre_load: None,
                post_load: None,
                committed: None,
            },
        }
    }

    /// What it looks like.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// A single value.
    #[must_use]
    pub fn single<F: 'static>(
        self,
        name: &'static str,
        element: impl Element<F>,
        at: fn(&mut T) -> &mut F,
    ) -> Self {
        self.add(name, Single { element, at })
    }

    /// An array: of fixed length, or counted by an earlier field ([`Number::counted`]).
    #[must_use]
    pub fn many<S: Sequence + ?Sized>(
        self,
        name: &'static str,
        element: impl Element<S::Item>,
        at: fn(&mut T) -> &mut S,
        number: impl Into<Number<T>>,
    ) -> Self {
        self.add(name, Many::new(element, at, number.into()))
    }

    /// An array of pointers of which some are null. Which of them is not sent: both sides must have
    /// nulls in the same places.
    #[must_use]
    pub fn nullable<S: Sequence<Item = Option<I>> + ?Sized, I: 'static>(
        self,
        name: &'static str,
        element: impl Element<I>,
        at: fn(&mut T) -> &mut S,
        number: impl Into<Number<T>>,
    ) -> Self {
        let number = number.into();
        let nullable = Nullable {
            element,
            at,
            number,
        };
        self.add(name, nullable)
    }

    /// Raw bytes: `bytes` of them, or as many as an earlier field says.
    #[must_use]
    pub fn buffer<S: Sequence<Item = u8> + ?Sized>(
        self,
        name: &'static str,
        at: fn(&mut T) -> &mut S,
        bytes: impl Into<Number<T>>,
    ) -> Self {
        let bytes = bytes.into();
        self.add(name, Buffer { at, bytes })
    }

    /// A bitmap in words of 64 bits, of which the first holds bits 0 to 63: `bits` bits, rounded up
    /// to whole words.
    #[must_use]
    pub fn bitmap<S: Sequence<Item = u64> + ?Sized>(
        self,
        name: &'static str,
        at: fn(&mut T) -> &mut S,
        bits: impl Into<Number<T>>,
    ) -> Self {
        let bits = bits.into();
        self.add(name, Bitmap { at, bits })
    }

    /// Bytes without a meaning: sent as zeroes, passed over when loading.
    #[must_use]
    pub fn unused(self, name: &'static str, bytes: usize) -> Self {
        self.add(name, Unused { bytes })
    }

    /// Values that are computed for the stream.
    #[must_use]
    pub fn tmp<V: View<T>>(self, name: &'static str) -> Self {
        self.add(name, ViewField::<V>::new())
    }

    /// A list that ends itself, of at most `max` elements; `kind` is [`FieldType::QTAILQ`] or
    /// [`FieldType::QLIST`].
    #[must_use]
    pub fn list<Q: Queue<Item: VmState + Default>>(
        self,
        name: &'static str,
        kind: FieldType,
        at: fn(&mut T) -> &mut Q,
        max: usize,
    ) -> Self {
        self.add(name, List { kind, at, max })
    }

    /// A tree of at most `max` nodes.
    #[must_use]
    pub fn tree<K, V>(
        self,
        name: &'static str,
        key: impl Element<K>,
        at: fn(&mut T) -> &mut std::collections::BTreeMap<K, V>,
        max: usize,
    ) -> Self
    where
        K: Ord + Clone + Default + 'static,
        V: VmState + Default,
    {
        self.add(name, Tree { key, at, max })
    }

    /// The field that was added last came with this version.
    #[must_use]
    pub fn since(mut self, version: u32) -> Self {
        if let (Some(entry), Some(field)) =
            (self.fields.last_mut(), self.description.fields.last_mut())
        {
            entry.since = version;
            field.since = version;
        }
        self
    }

    /// The field that was added last is present only if `condition` holds for the state (after
    /// `pre_save`; when loading, as far as it is loaded) and the version of the body.
    #[must_use]
    pub fn condition(mut self, condition: fn(&T, u32) -> bool) -> Self {
        if let (Some(entry), Some(field)) =
            (self.fields.last_mut(), self.description.fields.last_mut())
        {
            entry.condition = Some(condition);
            entry.one_by_one = true;
            field.conditional = true;
        }
        self
    }

    /// A subsection that is a field of `T`. It is sent if `needed` holds; without it, if its own
    /// description says so.
    #[must_use]
    pub fn subsection<S: VmState>(
        mut self,
        at: fn(&mut T) -> &mut S,
        needed: Option<fn(&T) -> bool>,
    ) -> Self {
        self.description.subsections.push(S::description().clone());
        self.subsections
            .push(Box::new(FieldSubsection { at, needed }));
        self
    }

    /// A subsection that is computed.
    #[must_use]
    pub fn view_subsection<V: View<T>>(mut self) -> Self {
        self.description.subsections.push(V::description().clone());
        self.subsections.push(Box::new(ViewSubsection::<V>::new()));
        self
    }

    /// The state cannot be migrated: it is neither saved nor loaded.
    #[must_use]
    pub fn unmigratable(mut self) -> Self {
        self.description.unmigratable = true;
        self
    }

    /// Is there anything to save? Without this, always.
    #[must_use]
    pub fn needed(mut self, needed: fn(&T) -> bool) -> Self {
        self.hooks.needed = Some(needed);
        self
    }

    /// Runs before the first field is saved; when it fails, nothing else runs.
    #[must_use]
    pub fn pre_save<E>(mut self, hook: fn(&mut T) -> Result<(), E>) -> Self
    where
        E: Into<BoxError> + 'static,
    {
        self.hooks.pre_save = Some(Box::new(move |state| hook(state).map_err(Into::into)));
        self
    }

    /// Runs after the last subsection was saved, or after saving failed.
    #[must_use]
    pub fn post_save<E>(mut self, hook: fn(&mut T) -> Result<(), E>) -> Self
    where
        E: Into<BoxError> + 'static,
    {
        self.hooks.post_save = Some(Box::new(move |state| hook(state).map_err(Into::into)));
        self
    }

    /// Runs before the first field is loaded, on a copy that may be thrown away.
    #[must_use]
    pub fn pre_load<E>(mut self, hook: fn(&mut T) -> Result<(), E>) -> Self
    where
        E: Into<BoxError> + 'static,
    {
        self.hooks.pre_load = Some(Box::new(move |state| hook(state).map_err(Into::into)));
        self
    }

    /// Runs after the last subsection was loaded, with the version that was sent; on a copy that may
    /// be thrown away.
    #[must_use]
    pub fn post_load<E>(mut self, hook: fn(&mut T, u32) -> Result<(), E>) -> Self
    where
        E: Into<BoxError> + 'static,
    {
        let hook = move |state: &mut T, version| hook(state, version).map_err(Into::into);
        self.hooks.post_load = Some(Box::new(hook));
        self
    }

    /// Runs once when the state is in place: for effects outside of it, such as lines, timers and
    /// memory maps. An error fails the loading, but the state stays.
    #[must_use]
    pub fn committed<E>(mut self, hook: fn(&mut T) -> Result<(), E>) -> Self
    where
        E: Into<BoxError> + 'static,
    {
        self.hooks.committed = Some(Box::new(move |state| hook(state).map_err(Into::into)));
        self
    }

    fn add(mut self, name: &'static str, access: impl Access<T> + 'static) -> Self {
        let Shape {
            kind,
            count,
            bytes,
            inner,
            varies,
        } = access.describe();
        self.description.fields.push(Field {
            name: name.into(),
            type_name: kind.as_str().to_owned().into(),
            since: 0,
            conditional: false,
            count,
            element_bytes: bytes,
            inner,
        });
        self.fields.push(Entry {
            name: name.into(),
            kind,
            since: 0,
            condition: None,
            one_by_one: varies,
            access: Box::new(access),
        });
        self.number_repeated(name);
        self
    }

    /// Fields that share a name are numbered, those that are not sent included.
    fn number_repeated(&mut self, name: &str) {
        let described = self.description.fields.iter();
        let same = described.zip(&mut self.fields);
        let same = same.filter(|(field, _)| field.name == name);
        let entries: Vec<_> = same.map(|(_, entry)| entry).collect();
        if entries.len() > 1 {
            for (k, entry) in entries.into_iter().enumerate() {
                entry.name = format!("{name}[{k}]").into();
            }
        }
    }
}

impl<T: 'static> Entry<T> {
    fn is_present(&self, state: &T, version: u32) -> bool {
        self.since <= version && self.condition.is_none_or(|holds| holds(state, version))
    }
}

impl<T: 'static> Table<T> {
    /// Is there anything to save now?
    #[must_use]
    pub fn is_needed(&self, state: &T) -> bool {
        self.hooks.needed.is_none_or(|needed| needed(state))
    }

    /// The state in a version, hooks included. `post_save` runs whenever `pre_save` succeeded.
    ///
    /// # Errors
    /// A hook failed, a value has no form on the wire, or there is no such version.
    pub fn save(&self, state: &mut T, version: u32) -> Result<SavedState, DeviceError> {
        self.check_version(version, None)?;
        let before = self.hooks.pre_save.as_ref().map(|hook| hook(state));
        self.run("pre_save", before, None)?;
        let saved = self.save_fields(state, version);
        let after = self.hooks.post_save.as_ref().map(|hook| hook(state));
        let after = self.run("post_save", after, None);
        let saved = saved?;
        after?;
        Ok(saved)
    }

    fn save_fields(&self, state: &mut T, version: u32) -> Result<SavedState, DeviceError> {
        let mut fields = Vec::with_capacity(self.fields.len());
        for entry in &self.fields {
            if entry.is_present(state, version) {
                let mut out = Saver {
                    name: &entry.name,
                    kind: &entry.kind,
                    one_by_one: entry.one_by_one,
                    fields: &mut fields,
                };
                let saved = entry.access.save(state, &mut out);
                saved.map_err(|error| error.inside(&entry.name))?;
            }
        }
        let mut subsections = Vec::new();
        for subsection in &self.subsections {
            if subsection.is_needed(state) {
                let saved = subsection.save(state);
                subsections.push(saved.map_err(|error| error.inside(subsection.name()))?);
            }
        }
        Ok(SavedState {
            name: self.description.name.as_ref().into(),
            version,
            fields,
            subsections,
        })
    }

    /// Read fields and subsections, and run the load hooks. After an error the state is part old,
    /// part new.
    ///
    /// # Errors
    /// The window is too short, the bytes are wrong, or a hook refused them.
    pub fn load(
        &self,
        state: &mut T,
        loader: &mut Loader<'_>,
        version: u32,
    ) -> Result<(), DeviceError> {
        self.check_version(version, Some(loader.taken_at()))?;
        let begin = Some(loader.used());
        let before = self.hooks.pre_load.as_ref().map(|hook| hook(state));
        self.run("pre_load", before, begin)?;
        for entry in &self.fields {
            if entry.is_present(state, version) {
                let loaded = entry.access.load(state, loader);
                loaded.map_err(|error| error.inside(&entry.name))?;
            }
        }
        self.load_subsections(state, loader)?;
        let after = self
            .hooks
            .post_load
            .as_ref()
            .map(|hook| hook(state, version));
        self.run("post_load", after, begin)
    }

    /// Run the `committed` hooks: those of structs in field order, sent or not, then of subsections,
    /// last the one of this description.
    ///
    /// # Errors
    /// A hook failed; those after it do not run.
    pub fn run_committed(&self, state: &mut T) -> Result<(), DeviceError> {
        for entry in &self.fields {
            let told = entry.access.committed(state);
            told.map_err(|error| error.inside(&entry.name))?;
        }
        for subsection in &self.subsections {
            let told = subsection.committed(state);
            told.map_err(|error| error.inside(subsection.name()))?;
        }
        let committed = self.hooks.committed.as_ref().map(|hook| hook(state));
        self.run("committed", committed, None)
    }

    fn load_subsections(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let mut loaded: Vec<&str> = Vec::new();
        while let Some(name) = self.subsection_ahead(loader)? {
            let header = 2usize.saturating_add(name.len());
            loader.take(header)?;
            let found = self.subsections.iter().find(|known| known.name() == name);
            let subsection = match found {
                Some(_) if loaded.contains(&name) => {
                    return Err(loader.fault("subsection comes twice").inside(name));
                }
                Some(subsection) => subsection,
                None => {
                    let fault = loader.fault("subsection is not known here");
                    return Err(fault.inside(&name.escape_default().to_string()));
                }
            };
            loaded.push(subsection.name());
            let version = loader.array().map(u32::from_be_bytes);
            version
                .and_then(|version| subsection.load(state, loader, version))
                .map_err(|error| error.inside(subsection.name()))?;
        }
        Ok(())
    }

    /// Name of the subsection of this description that comes next; `None` if what comes next
    /// belongs to someone else.
    fn subsection_ahead<'a>(&self, loader: &Loader<'a>) -> Result<Option<&'a str>, DeviceError> {
        let missing = || {
            // Behind a whole body comes nothing; in a stream, something always does.
            if loader.is_whole() {
                Ok(None)
            } else {
                Err(loader.incomplete().inside("subsections"))
            }
        };
        let Some(kind) = loader.peek(1) else {
            return missing();
        };
        if kind != [SUBSECTION] {
            return Ok(None);
        }
        let Some([_, length]) = loader.peek(2).and_then(<[u8]>::first_chunk) else {
            return missing();
        };
        // A value may begin with the same byte: the name tells, as far as it can be seen.
        let owner = self.description.name.as_bytes();
        let length = usize::from(*length);
        let there = length.min(loader.remaining().saturating_sub(2));
        let Some([_, _, name @ ..]) = loader.peek(there.saturating_add(2)) else {
            return missing();
        };
        let differs = owner.iter().zip(name).any(|(owner, name)| owner != name);
        if differs || length <= owner.len() {
            return Ok(None);
        }
        if there < length {
            return missing();
        }
        Ok(std::str::from_utf8(name).ok())
    }

    fn check_version(&self, version: u32, offset: Option<usize>) -> Result<(), DeviceError> {
        let description = &self.description;
        if description.unmigratable {
            return Err(DeviceError::Unmigratable(description.name.to_string()));
        }
        if (description.minimum_version..=description.version).contains(&version) {
            return Ok(());
        }
        Err(DeviceError::Version {
            owner: self.origin(offset),
            version,
            lowest: description.minimum_version,
            highest: description.version,
        })
    }

    /// What a hook said; `offset` is where the state begins when it is loaded.
    fn run(
        &self,
        hook: &'static str,
        result: Option<Result<(), BoxError>>,
        offset: Option<usize>,
    ) -> Result<(), DeviceError> {
        let result = result.unwrap_or(Ok(()));
        result.map_err(|source| DeviceError::hook(hook, self.origin(offset), source))
    }

    fn origin(&self, offset: Option<usize>) -> Origin {
        Origin {
            offset,
            ..self.description.name.as_ref().into()
        }
    }
}

impl<T> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Table").field(&self.description).finish()
    }
}
