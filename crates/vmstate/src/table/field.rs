//! Fields with a length: single values, arrays, buffers, bitmaps, unused bytes, computed values.

use std::marker::PhantomData;
use std::sync::Arc;

use super::{Access, Saver, Sequence, Shape};
use crate::description::Count;
use crate::device::DeviceError;
use crate::element::{Element, Elements};
use crate::loader::Loader;
use crate::saved::{Content, FieldType, SavedField, Shape as SavedShape};
use crate::state::View;

/// What stands for a null in an array of pointers.
const NULL: u8 = 0x30;

/// Elements for which memory is allocated though the stream need not have a byte for each.
const MAX_FREE_ELEMENTS: usize = 1024;

/// How many elements, bytes or bits a field has.
pub enum Number<T> {
    /// Always so many.
    Fixed(usize),
    /// As many as the state says, usually in an earlier field.
    Counted {
        /// Reads the number; `None` if it is negative.
        read: fn(&T) -> Option<u64>,
        /// More are refused before memory is allocated for them.
        max: usize,
    },
}

/// A count of any integer type; `None` if it is negative.
pub fn count_of(count: impl TryInto<u64>) -> Option<u64> {
    count.try_into().ok()
}

impl<T> Number<T> {
    /// As many as `read` says (see [`count_of`]), at most `max`.
    #[must_use]
    pub fn counted(read: fn(&T) -> Option<u64>, max: usize) -> Self {
        Self::Counted { read, max }
    }

    /// The number now.
    fn now(&self, state: &T) -> Result<usize, String> {
        let (read, max) = match self {
            Self::Fixed(number) => return Ok(*number),
            Self::Counted { read, max } => (read, *max),
        };
        let number = read(state).ok_or("its count is negative")?;
        let small = usize::try_from(number).ok().filter(|small| *small <= max);
        small.ok_or_else(|| format!("its count is {number}, at most {max} are allowed"))
    }

    fn to_save(&self, state: &T) -> Result<usize, DeviceError> {
        self.now(state).map_err(DeviceError::unsaveable)
    }

    fn to_load(&self, state: &T, loader: &Loader<'_>) -> Result<usize, DeviceError> {
        self.now(state).map_err(|fault| loader.fault(fault))
    }

    /// The elements that there are now.
    fn elements<'a, S: Sequence + ?Sized>(
        &self,
        state: &'a mut T,
        at: fn(&mut T) -> &mut S,
    ) -> &'a mut [S::Item] {
        let count = self.now(state).ok();
        let items = count.and_then(|count| at(state).counted(count));
        items.unwrap_or_default()
    }

    fn fixed(&self) -> Option<u64> {
        match self {
            Self::Fixed(number) => u64::try_from(*number).ok(),
            Self::Counted { .. } => None,
        }
    }

    fn count(&self) -> Count {
        match self.fixed().map(u32::try_from) {
            Some(Ok(number)) => Count::Fixed(number),
            _ => Count::Variable,
        }
    }
}

impl<T> From<usize> for Number<T> {
    fn from(number: usize) -> Self {
        Self::Fixed(number)
    }
}

impl Saver<'_> {
    pub(super) fn push(&mut self, shape: SavedShape, content: Content) {
        let kind = self.kind.clone();
        self.push_as(kind, shape, content);
    }

    fn push_as(&mut self, kind: FieldType, shape: SavedShape, content: Content) {
        self.fields.push(SavedField {
            name: Arc::clone(self.name),
            kind,
            shape,
            content,
        });
    }

    /// A run of elements of an array that has `total`; the first of them is its `first`.
    fn run<I>(
        &mut self,
        (first, total): (usize, usize),
        items: &mut [I],
        save: impl Fn(&mut I, &mut Elements) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let is_one = items.len() <= 1;
        let mut all = Elements::default();
        for (k, item) in (first..).zip(items) {
            let saved = if self.one_by_one && !is_one {
                let mut one = Elements::default();
                let saved = save(item, &mut one);
                self.push(element_at(k, total), one.into_content());
                saved
            } else {
                save(item, &mut all)
            };
            saved.map_err(|error| error.inside_element(k))?;
        }
        let alike = all.are_alike();
        match all.into_content() {
            Content::Plain { count: 0, .. } => {}
            Content::Structs(states) if !alike => {
                for (k, state) in (first..).zip(states) {
                    self.push(element_at(k, total), Content::Structs(vec![state]));
                }
            }
            content if is_one => self.push(SavedShape::One, content),
            content => self.push(SavedShape::Array, content),
        }
        Ok(())
    }
}

fn element_at(index: usize, total: usize) -> SavedShape {
    SavedShape::Element {
        index: u32::try_from(index).unwrap_or(u32::MAX),
        last: index.checked_add(1) == Some(total),
    }
}

fn not_as_counted(count: usize) -> DeviceError {
    DeviceError::unsaveable(format!("there are not {count} of it, as its count says"))
}

fn no_room(loader: &Loader<'_>, count: usize) -> DeviceError {
    loader.fault(format!(
        "its count is {count}, there is no room for so many"
    ))
}

pub(super) struct Single<E, T, F> {
    pub(super) element: E,
    pub(super) at: fn(&mut T) -> &mut F,
}

impl<T, F, E: Element<F>> Access<T> for Single<E, T, F> {
    fn describe(&self) -> Shape {
        Shape::of(self.element.describe(), Count::One)
    }

    fn save(&self, state: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError> {
        let mut saved = Elements::default();
        self.element.save((self.at)(state), &mut saved)?;
        out.push(SavedShape::One, saved.into_content());
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        self.element.load((self.at)(state), loader)
    }

    fn committed(&self, state: &mut T) -> Result<(), DeviceError> {
        self.element.committed((self.at)(state))
    }
}

pub(super) struct Many<E, T, S: ?Sized> {
    element: E,
    at: fn(&mut T) -> &mut S,
    number: Number<T>,
    /// Bytes that an element takes at least.
    least: u64,
}

impl<T, S: Sequence + ?Sized, E: Element<S::Item>> Many<E, T, S> {
    pub(super) fn new(element: E, at: fn(&mut T) -> &mut S, number: Number<T>) -> Self {
        let least = element.describe().least_bytes();
        Self {
            element,
            at,
            number,
            least,
        }
    }
}

impl<T, S: Sequence + ?Sized, E: Element<S::Item>> Access<T> for Many<E, T, S> {
    fn describe(&self) -> Shape {
        Shape::of(self.element.describe(), self.number.count())
    }

    fn save(&self, state: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError> {
        let count = self.number.to_save(state)?;
        let items = (self.at)(state).counted(count);
        let items = items.ok_or_else(|| not_as_counted(count))?;
        out.run((0, count), items, |item, out| self.element.save(item, out))
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let count = self.number.to_load(state, loader)?;
        // Memory is allocated only for elements that are there. Those that may have no bytes at all
        // are taken for one, beyond a few.
        let new = count.saturating_sub((self.at)(state).held());
        let unsure = u64::try_from(new.saturating_sub(MAX_FREE_ELEMENTS)).unwrap_or(u64::MAX);
        let count_bytes = u64::try_from(count).unwrap_or(u64::MAX);
        loader.require(count_bytes.saturating_mul(self.least).max(unsure))?;
        let items = (self.at)(state).resized(count);
        let items = items.ok_or_else(|| no_room(loader, count))?;
        for (k, item) in items.iter_mut().enumerate() {
            let loaded = self.element.load(item, loader);
            loaded.map_err(|error| error.inside_element(k))?;
        }
        Ok(())
    }

    fn committed(&self, state: &mut T) -> Result<(), DeviceError> {
        let items = self.number.elements(state, self.at);
        for (k, item) in items.iter_mut().enumerate() {
            let told = self.element.committed(item);
            told.map_err(|error| error.inside_element(k))?;
        }
        Ok(())
    }
}

pub(super) struct Nullable<E, T, S: ?Sized> {
    pub(super) element: E,
    pub(super) at: fn(&mut T) -> &mut S,
    pub(super) number: Number<T>,
}

impl<T, I: 'static, S, E> Access<T> for Nullable<E, T, S>
where
    S: Sequence<Item = Option<I>> + ?Sized,
    E: Element<I>,
{
    fn describe(&self) -> Shape {
        Shape {
            // A null has one byte.
            bytes: None,
            ..Shape::of(self.element.describe(), self.number.count())
        }
    }

    fn save(&self, state: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError> {
        let count = self.number.to_save(state)?;
        let items = (self.at)(state).counted(count);
        let items = items.ok_or_else(|| not_as_counted(count))?;
        let mut first = 0usize;
        // Runs of nulls and of elements are described each by itself.
        for run in items.chunk_by_mut(|a, b| a.is_some() == b.is_some()) {
            let length = run.len();
            match run.first() {
                Some(Some(_)) => out.run((first, count), run, |item, out| match item {
                    Some(item) => self.element.save(item, out),
                    None => Ok(()),
                })?,
                _ => {
                    let nulls = Content::Plain {
                        count: u32::try_from(length).unwrap_or(u32::MAX),
                        bytes: vec![NULL; length],
                    };
                    let shape = match length {
                        1 => SavedShape::One,
                        _ => SavedShape::Array,
                    };
                    out.push_as(FieldType::NULLPTR, shape, nulls);
                }
            }
            first = first.saturating_add(length);
        }
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let count = self.number.to_load(state, loader)?;
        loader.require(u64::try_from(count).unwrap_or(u64::MAX))?;
        let items = (self.at)(state).resized(count);
        let items = items.ok_or_else(|| no_room(loader, count))?;
        for (k, item) in items.iter_mut().enumerate() {
            let loaded = match item {
                Some(item) => self.element.load(item, loader),
                None => match loader.byte() {
                    Ok(NULL) => Ok(()),
                    Ok(byte) => Err(loader.fault(format!(
                        "is {byte:#04x}, must be {NULL:#04x} for the null of this side"
                    ))),
                    Err(error) => Err(error),
                },
            };
            loaded.map_err(|error| error.inside_element(k))?;
        }
        Ok(())
    }

    fn committed(&self, state: &mut T) -> Result<(), DeviceError> {
        let items = self.number.elements(state, self.at);
        for (k, item) in items.iter_mut().enumerate() {
            if let Some(item) = item {
                let told = self.element.committed(item);
                told.map_err(|error| error.inside_element(k))?;
            }
        }
        Ok(())
    }
}

pub(super) struct Buffer<T, S: ?Sized> {
    pub(super) at: fn(&mut T) -> &mut S,
    pub(super) bytes: Number<T>,
}

impl<T, S: Sequence<Item = u8> + ?Sized> Access<T> for Buffer<T, S> {
    fn describe(&self) -> Shape {
        Shape {
            kind: FieldType::BUFFER,
            count: Count::One,
            bytes: self.bytes.fixed(),
            inner: None,
            varies: false,
        }
    }

    fn save(&self, state: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError> {
        let count = self.bytes.to_save(state)?;
        let bytes = (self.at)(state).counted(count);
        let bytes = bytes.ok_or_else(|| not_as_counted(count))?;
        out.push(SavedShape::One, Content::plain(&*bytes));
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let count = self.bytes.to_load(state, loader)?;
        let sent = loader.take(count)?;
        let bytes = (self.at)(state).resized(count);
        let bytes = bytes.ok_or_else(|| no_room(loader, count))?;
        bytes.copy_from_slice(sent);
        Ok(())
    }

    fn committed(&self, _: &mut T) -> Result<(), DeviceError> {
        Ok(())
    }
}

pub(super) struct Bitmap<T, S: ?Sized> {
    pub(super) at: fn(&mut T) -> &mut S,
    pub(super) bits: Number<T>,
}

impl<T, S: Sequence<Item = u64> + ?Sized> Access<T> for Bitmap<T, S> {
    fn describe(&self) -> Shape {
        let words = self.bits.fixed().map(|bits| bits.div_ceil(64));
        Shape {
            kind: FieldType::named("bitmap"),
            count: Count::One,
            bytes: words.map(|words| words.saturating_mul(8)),
            inner: None,
            varies: false,
        }
    }

    fn save(&self, state: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError> {
        let count = self.bits.to_save(state)?.div_ceil(64);
        let words = (self.at)(state).counted(count);
        let words = words.ok_or_else(|| not_as_counted(count))?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
        out.push(SavedShape::One, Content::plain(bytes));
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let count = self.bits.to_load(state, loader)?.div_ceil(64);
        let sent = loader.take(count.saturating_mul(8))?;
        let words = (self.at)(state).resized(count);
        let words = words.ok_or_else(|| no_room(loader, count))?;
        let (sent, _) = sent.as_chunks::<8>();
        for (word, sent) in words.iter_mut().zip(sent) {
            *word = u64::from_be_bytes(*sent);
        }
        Ok(())
    }

    fn committed(&self, _: &mut T) -> Result<(), DeviceError> {
        Ok(())
    }
}

pub(super) struct Unused {
    pub(super) bytes: usize,
}

impl<T> Access<T> for Unused {
    fn describe(&self) -> Shape {
        Shape {
            kind: FieldType::named("unused_buffer"),
            count: Count::One,
            bytes: u64::try_from(self.bytes).ok(),
            inner: None,
            varies: false,
        }
    }

    fn save(&self, _: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError> {
        out.push(SavedShape::One, Content::plain(vec![0; self.bytes]));
        Ok(())
    }

    fn load(&self, _: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        loader.take(self.bytes).map(drop)
    }

    fn committed(&self, _: &mut T) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Values that are computed for the stream.
pub(super) struct ViewField<V>(PhantomData<fn() -> V>);

impl<V> ViewField<V> {
    pub(super) fn new() -> Self {
        Self(PhantomData)
    }
}

impl<T, V: View<T>> Access<T> for ViewField<V> {
    fn describe(&self) -> Shape {
        let description = V::description();
        Shape {
            kind: FieldType::TMP,
            count: Count::One,
            bytes: description.fixed_bytes(V::VERSION),
            inner: Some(description.clone()),
            varies: false,
        }
    }

    fn save(&self, state: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError> {
        let view = V::take(state);
        let mut view = view.map_err(|error| DeviceError::unsaveable(error.to_string()))?;
        out.push(SavedShape::One, Content::Structs(vec![view.save()?]));
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let mut view = V::template(state);
        view.load(loader, V::VERSION)?;
        let put = view.put(state, V::VERSION);
        put.map_err(|error| loader.fault(error.to_string()))
    }

    /// It was put back, and is no more.
    fn committed(&self, _: &mut T) -> Result<(), DeviceError> {
        Ok(())
    }
}
