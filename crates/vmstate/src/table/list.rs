//! Lists and trees: they end themselves, so each has a maximum.

use std::collections::{BTreeMap, LinkedList, VecDeque};

use super::{Access, Saver, Shape};
use crate::description::Count;
use crate::device::DeviceError;
use crate::element::{Element, Elements};
use crate::loader::Loader;
use crate::saved::{Content, ELEMENT, FieldType, LIST_END, Shape as SavedShape};
use crate::state::VmState;

/// What can hold the elements of a `qtailq` or `qlist`.
pub trait Queue: 'static {
    /// An element.
    type Item: 'static;

    /// The elements in order.
    fn elements(&mut self) -> impl Iterator<Item = &mut Self::Item>;

    /// Put these elements in the place of all that were there.
    fn replace(&mut self, elements: Vec<Self::Item>);
}

macro_rules! queues {
    ($($queue:ident)*) => {$(
        impl<T: 'static> Queue for $queue<T> {
            type Item = T;

            fn elements(&mut self) -> impl Iterator<Item = &mut T> {
                self.iter_mut()
            }

            fn replace(&mut self, elements: Vec<T>) {
                *self = elements.into_iter().collect();
            }
        }
    )*};
}

queues!(Vec VecDeque LinkedList);

/// Does an element follow?
fn next_element(loader: &mut Loader<'_>) -> Result<bool, DeviceError> {
    match loader.byte()? {
        ELEMENT => Ok(true),
        LIST_END => Ok(false),
        byte => Err(loader.fault(format!(
            "is {byte} before an element, must be 1, or 0 for the end"
        ))),
    }
}

pub(super) struct List<T, Q> {
    pub(super) kind: FieldType,
    pub(super) at: fn(&mut T) -> &mut Q,
    pub(super) max: usize,
}

impl<T, I: VmState + Default, Q: Queue<Item = I>> Access<T> for List<T, Q> {
    fn describe(&self) -> Shape {
        Shape {
            kind: self.kind.clone(),
            count: Count::Variable,
            bytes: None,
            inner: Some(I::description().clone()),
            varies: false,
        }
    }

    fn save(&self, state: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError> {
        let mut saved = Vec::new();
        for (k, element) in (self.at)(state).elements().enumerate() {
            if k >= self.max {
                let fault = format!("it has more than {} elements", self.max);
                return Err(DeviceError::unsaveable(fault));
            }
            saved.push(element.save().map_err(|error| error.inside_element(k))?);
        }
        out.push(SavedShape::One, Content::List(saved));
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let mut elements = Vec::new();
        while next_element(loader)? {
            let k = elements.len();
            if k >= self.max {
                return Err(loader.fault(format!("more than {} elements", self.max)));
            }
            let mut element = I::default();
            let loaded = element.load(loader, I::VERSION);
            loaded.map_err(|error| error.inside_element(k))?;
            elements.push(element);
        }
        (self.at)(state).replace(elements);
        Ok(())
    }

    fn committed(&self, state: &mut T) -> Result<(), DeviceError> {
        for (k, element) in (self.at)(state).elements().enumerate() {
            let told = element.committed();
            told.map_err(|error| error.inside_element(k))?;
        }
        Ok(())
    }
}

pub(super) struct Tree<E, T, K, V> {
    pub(super) key: E,
    pub(super) at: fn(&mut T) -> &mut BTreeMap<K, V>,
    pub(super) max: usize,
}

impl<T, K, V, E> Access<T> for Tree<E, T, K, V>
where
    K: Ord + Clone + Default,
    V: VmState + Default,
    E: Element<K>,
{
    fn describe(&self) -> Shape {
        Shape {
            kind: FieldType::GTREE,
            count: Count::Variable,
            bytes: None,
            inner: Some(V::description().clone()),
            varies: false,
        }
    }

    fn save(&self, state: &mut T, out: &mut Saver<'_>) -> Result<(), DeviceError> {
        let nodes = (self.at)(state);
        if nodes.len() > self.max {
            let fault = format!("it has {} nodes, at most {}", nodes.len(), self.max);
            return Err(DeviceError::unsaveable(fault));
        }
        let mut saved = Vec::with_capacity(nodes.len());
        for (k, (key, value)) in nodes.iter_mut().enumerate() {
            let mut content = Elements::default();
            let node = self.key.save(&mut key.clone(), &mut content);
            let node = node.and_then(|()| Ok((content.into_content(), value.save()?)));
            saved.push(node.map_err(|error| error.inside_element(k))?);
        }
        out.push(SavedShape::One, Content::Tree(saved));
        Ok(())
    }

    fn load(&self, state: &mut T, loader: &mut Loader<'_>) -> Result<(), DeviceError> {
        let promised = u32::from_be_bytes(loader.array()?);
        let count = usize::try_from(promised).unwrap_or(usize::MAX);
        if count > self.max {
            let fault = format!("announces {count} nodes, at most {}", self.max);
            return Err(loader.fault(fault));
        }
        let mut nodes = BTreeMap::new();
        for k in 0..count {
            if !next_element(loader)? {
                return Err(loader.fault(format!("ends after {k} nodes, {count} were announced")));
            }
            let (key, value) = self.node(loader).map_err(|error| error.inside_element(k))?;
            if nodes.insert(key, value).is_some() {
                return Err(loader.fault("a key comes twice").inside_element(k));
            }
        }
        if next_element(loader)? {
            return Err(loader.fault(format!("has more than the {count} nodes announced")));
        }
        *(self.at)(state) = nodes;
        Ok(())
    }

    fn committed(&self, state: &mut T) -> Result<(), DeviceError> {
        for (k, value) in (self.at)(state).values_mut().enumerate() {
            let told = value.committed();
            told.map_err(|error| error.inside_element(k))?;
        }
        Ok(())
    }
}

impl<T, K: Default, V: VmState + Default, E: Element<K>> Tree<E, T, K, V> {
    fn node(&self, loader: &mut Loader<'_>) -> Result<(K, V), DeviceError> {
        let (mut key, mut value) = (K::default(), V::default());
        let loaded = self.key.load(&mut key, loader);
        loaded.map_err(|error| error.inside("key"))?;
        value.load(loader, V::VERSION)?;
        Ok((key, value))
    }
}
