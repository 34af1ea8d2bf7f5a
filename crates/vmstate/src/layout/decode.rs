//! Bodies taken apart by their layouts.

use crate::layout::{BodyLayout, DeviceLayout, FieldLayout, StateLayout};
use crate::saved::{
    Content, ELEMENT, FieldType, LIST_END, SUBSECTION, SavedBody, SavedField, SavedState, Shape,
};
use crate::state::is_subsection_of;

/// Fields, structs and list elements of one body. A machine's largest device has some thousands; a
/// description that multiplies a few bytes into more is refused.
const MAX_NODES: usize = 1 << 18;
/// What a body without a byte may have: buffers of length 0, structs without fields.
const NODES_OF_NOTHING: usize = 1 << 10;
/// A single byte may stand in a struct in a struct in a list.
const NODES_PER_BYTE: usize = 8;

/// A body that is not laid out as its description says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset} of the device, field '{field}': {fault}")]
pub struct BodyError {
    /// Offset in the body.
    pub offset: usize,
    /// Path of the field: names, and places in arrays.
    pub field: String,
    /// What is wrong there.
    pub fault: BodyFault,
}

/// What is wrong with a field of a body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BodyFault {
    /// The body ends too early.
    #[error("the body ends {missing} bytes too early")]
    Truncated {
        /// Bytes that are not there.
        missing: u64,
    },
    /// The body goes on.
    #[error("{0} bytes more than described")]
    Trailing(usize),
    /// A byte that marks an element, the end of a list, or a subsection.
    #[error("{found:#04x} instead of {expected:#04x} ({what})")]
    Marker {
        /// What the byte marks.
        what: &'static str,
        /// In the body.
        found: u8,
        /// As described.
        expected: u8,
    },
    /// Another subsection than described.
    #[error("subsection {found} instead of {expected}")]
    Subsection {
        /// In the body, name and version.
        found: String,
        /// As described.
        expected: String,
    },
    /// A number of tree nodes.
    #[error("{found} nodes instead of {expected}")]
    Nodes {
        /// In the body.
        found: u32,
        /// As described.
        expected: usize,
    },
    /// Sizes in the description do not add up.
    #[error("described with {described} bytes, but its parts have {parts}")]
    Size {
        /// `size` of the field.
        described: u64,
        /// Sum of what is inside.
        parts: u64,
    },
    /// The description makes too much of too few bytes.
    #[error("described with more than {MAX_NODES} parts")]
    TooManyParts,
}

impl DeviceLayout {
    /// Take the whole body of the device's section apart.
    ///
    /// # Errors
    /// It is not laid out like this; says where.
    pub fn decode(&self, body: &[u8]) -> Result<SavedBody, BodyError> {
        match self.decode_partly(body) {
            (saved, None) => Ok(saved),
            (_, Some(error)) => Err(error),
        }
    }

    /// Take a body apart as far as it is laid out like this; what is wrong then.
    #[must_use]
    pub fn decode_partly(&self, body: &[u8]) -> (SavedBody, Option<BodyError>) {
        match &self.body {
            BodyLayout::Described(layout) => {
                let (state, error) = layout.decode_partly(body);
                (SavedBody::Described(state), error)
            }
            BodyLayout::OldStyle { bytes } => {
                let mut input = Input::new(body);
                let (data, error) = match input.take(*bytes) {
                    Ok(data) => (data, input.finish("data").err()),
                    Err(fault) => (body, Some(input.error("data", fault))),
                };
                (SavedBody::OldStyle(data.to_vec()), error)
            }
        }
    }
}

impl StateLayout {
    /// Take a body apart, to its last byte.
    ///
    /// # Errors
    /// It is not laid out like this; says where.
    pub fn decode(&self, body: &[u8]) -> Result<SavedState, BodyError> {
        match self.decode_partly(body) {
            (state, None) => Ok(state),
            (_, Some(error)) => Err(error),
        }
    }

    /// Take a body apart as far as it is laid out like this; what is wrong then.
    #[must_use]
    pub fn decode_partly(&self, body: &[u8]) -> (SavedState, Option<BodyError>) {
        let mut input = Input::new(body);
        let mut state = self.empty();
        let read = input.state(self, &mut state);
        let read = read.and_then(|()| input.no_more_subsections(&self.name));
        let error = read.and_then(|()| input.finish(&self.name)).err();
        (state, error)
    }

    fn empty(&self) -> SavedState {
        SavedState {
            name: self.name.clone(),
            version: self.version,
            fields: Vec::new(),
            subsections: Vec::new(),
        }
    }
}

struct Input<'a> {
    rest: &'a [u8],
    length: usize,
    nodes: usize,
    nodes_max: usize,
    /// The fields around the one that is being read.
    path: Vec<String>,
}

impl<'a> Input<'a> {
    fn new(body: &'a [u8]) -> Self {
        Self {
            rest: body,
            length: body.len(),
            nodes: 0,
            nodes_max: NODES_OF_NOTHING
                .saturating_add(body.len().saturating_mul(NODES_PER_BYTE))
                .min(MAX_NODES),
            path: Vec::new(),
        }
    }

    /// Read a state into an empty one, which holds on an error what was before it.
    fn state(&mut self, layout: &StateLayout, into: &mut SavedState) -> Result<(), BodyError> {
        self.count_node(&layout.name)?;
        for field in &layout.fields {
            let mut content = match field.inner.as_slice() {
                [] if !is_list(field) => self.plain(field)?,
                _ => Content::Structs(Vec::new()),
            };
            let read = self.inside(field, &mut content);
            into.fields.push(SavedField {
                name: field.name.clone(),
                kind: field.kind.clone(),
                shape: field.shape,
                content,
            });
            read?;
        }
        for subsection in &layout.subsections {
            let found = self.subsection_header(subsection);
            found.map_err(|fault| self.error(&subsection.name, fault))?;
            self.path.push(subsection.name.to_string());
            self.next(subsection, &mut into.subsections)?;
            self.path.pop();
        }
        Ok(())
    }

    /// Read one more state of several.
    fn next(&mut self, layout: &StateLayout, into: &mut Vec<SavedState>) -> Result<(), BodyError> {
        let mut state = layout.empty();
        let read = self.state(layout, &mut state);
        into.push(state);
        read
    }

    /// Read what has fields of its own.
    fn inside(&mut self, layout: &FieldLayout, content: &mut Content) -> Result<(), BodyError> {
        let (name, size) = (shown(layout), layout.element_bytes);
        match (layout.kind.as_str(), layout.inner.as_slice()) {
            ("qtailq" | "qlist", elements) => {
                let mut states = Vec::new();
                let read = self.measured(&name, size, |input| input.list(elements, &mut states));
                *content = Content::List(states);
                read
            }
            ("gtree", parts) => {
                let mut nodes = Vec::new();
                let read = self.measured(&name, size, |input| input.tree(parts, &mut nodes));
                *content = Content::Tree(nodes);
                read
            }
            (_, [inner, ..]) => {
                let mut states = Vec::new();
                let read = self.structs(layout, inner, &mut states);
                *content = Content::Structs(states);
                read
            }
            (_, []) => Ok(()),
        }
    }

    fn plain(&mut self, layout: &FieldLayout) -> Result<Content, BodyError> {
        self.count_node(&layout.name)?;
        let here = |input: &Self, fault| input.error(&shown(layout), fault);
        if layout.element_bytes == 0 && layout.count > 1 {
            return Err(here(self, BodyFault::TooManyParts));
        }
        let bytes = match layout.kind == FieldType::CAPABILITY {
            true => self.capabilities(layout),
            false => self.take(layout.element_bytes.saturating_mul(u64::from(layout.count))),
        };
        let bytes = bytes.map_err(|fault| here(self, fault))?;
        Ok(Content::Plain {
            count: layout.count,
            bytes: bytes.to_vec(),
        })
    }

    /// Names that say their own length; that of the first is described.
    fn capabilities(&mut self, layout: &FieldLayout) -> Result<&'a [u8], BodyFault> {
        let all = self.rest;
        for k in 0..layout.count {
            let [length] = self.array()?;
            self.take(u64::from(length))?;
            let (described, parts) = (layout.element_bytes, u64::from(length).saturating_add(1));
            if k == 0 && parts != described {
                return Err(BodyFault::Size { described, parts });
            }
        }
        let used = all.len().saturating_sub(self.rest.len());
        Ok(all.get(..used).unwrap_or_default())
    }

    fn structs(
        &mut self,
        layout: &FieldLayout,
        inner: &StateLayout,
        states: &mut Vec<SavedState>,
    ) -> Result<(), BodyError> {
        for k in 0..layout.count {
            let name = match layout.shape {
                Shape::Array => format!("{}[{k}]", layout.name),
                _ => shown(layout),
            };
            self.measured(&name, layout.element_bytes, |input| {
                input.next(inner, states)
            })?;
        }
        Ok(())
    }

    /// Read something that has a name and a size.
    fn measured<T>(
        &mut self,
        name: &str,
        described: u64,
        read: impl FnOnce(&mut Self) -> Result<T, BodyError>,
    ) -> Result<T, BodyError> {
        let before = self.rest.len();
        self.path.push(name.to_owned());
        let value = read(self)?;
        self.path.pop();
        let parts = u64::try_from(before.saturating_sub(self.rest.len())).unwrap_or(u64::MAX);
        if parts != described {
            return Err(self.error(name, BodyFault::Size { described, parts }));
        }
        Ok(value)
    }

    fn list(
        &mut self,
        elements: &[StateLayout],
        states: &mut Vec<SavedState>,
    ) -> Result<(), BodyError> {
        for (k, element) in elements.iter().enumerate() {
            self.path.push(format!("[{k}]"));
            self.marker("list element", ELEMENT)?;
            self.next(element, states)?;
            self.path.pop();
        }
        self.marker("end of the list", LIST_END)
    }

    fn tree(
        &mut self,
        parts: &[StateLayout],
        nodes: &mut Vec<(Content, SavedState)>,
    ) -> Result<(), BodyError> {
        let count = self.array::<4>().map_err(|fault| self.error("", fault))?;
        let found = u32::from_be_bytes(count);
        let length = usize::try_from(found).unwrap_or(usize::MAX);
        let keyed = length > 0 && parts.len() == length.saturating_mul(2);
        if !keyed && parts.len() != length {
            let expected = parts.len();
            return Err(self.error("", BodyFault::Nodes { found, expected }));
        }
        for (k, node) in parts.chunks(if keyed { 2 } else { 1 }).enumerate() {
            self.path.push(format!("[{k}]"));
            self.marker("tree node", ELEMENT)?;
            let key = match node {
                [key, _] => {
                    let mut keys = Vec::new();
                    self.next(key, &mut keys)?;
                    Content::Structs(keys)
                }
                _ => {
                    let key = self.array::<8>();
                    Content::plain(key.map_err(|fault| self.error("key", fault))?)
                }
            };
            if let Some(layout) = node.last() {
                let mut value = layout.empty();
                let read = self.state(layout, &mut value);
                nodes.push((key, value));
                read?;
            }
            self.path.pop();
        }
        self.marker("end of the tree", LIST_END)
    }

    fn subsection_header(&mut self, layout: &StateLayout) -> Result<(), BodyFault> {
        let [found, length] = self.peek()?;
        if found != SUBSECTION {
            return Err(BodyFault::Marker {
                what: "subsection",
                found,
                expected: SUBSECTION,
            });
        }
        self.array::<2>()?;
        let name = String::from_utf8_lossy(self.take(u64::from(length))?).into_owned();
        let version = u32::from_be_bytes(self.array()?);
        if *name != *layout.name || version != layout.version {
            return Err(BodyFault::Subsection {
                found: format!("'{}' version {version}", name.escape_debug()),
                expected: format!("'{}' version {}", layout.name, layout.version),
            });
        }
        Ok(())
    }

    /// What stands behind the last field may be a subsection that the description of another stream
    /// does not have.
    fn no_more_subsections(&self, name: &str) -> Result<(), BodyError> {
        let Some((&[SUBSECTION, length], rest)) = self.rest.split_first_chunk() else {
            return Ok(());
        };
        let found = rest.get(..usize::from(length)).map(str::from_utf8);
        match found {
            Some(Ok(found)) if is_subsection_of(found, name) => {
                let (found, expected) = (format!("'{}'", found.escape_debug()), "none".to_owned());
                Err(self.error(name, BodyFault::Subsection { found, expected }))
            }
            _ => Ok(()),
        }
    }

    fn marker(&mut self, what: &'static str, expected: u8) -> Result<(), BodyError> {
        let found = match self.peek::<1>() {
            Ok([found]) if found == expected => self.array::<1>().map(drop),
            Ok([found]) => Err(BodyFault::Marker {
                what,
                found,
                expected,
            }),
            Err(fault) => Err(fault),
        };
        found.map_err(|fault| self.error("", fault))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], BodyFault> {
        let array = self.peek()?;
        self.rest = self.rest.get(N..).unwrap_or_default();
        Ok(array)
    }

    fn peek<const N: usize>(&self) -> Result<[u8; N], BodyFault> {
        let array = self.rest.first_chunk::<N>().copied();
        array.ok_or_else(|| self.truncated(u64::try_from(N).unwrap_or(u64::MAX)))
    }

    fn take(&mut self, bytes: u64) -> Result<&'a [u8], BodyFault> {
        let split = usize::try_from(bytes)
            .ok()
            .and_then(|n| self.rest.split_at_checked(n));
        let (taken, rest) = split.ok_or_else(|| self.truncated(bytes))?;
        self.rest = rest;
        Ok(taken)
    }

    fn truncated(&self, wanted: u64) -> BodyFault {
        let have = u64::try_from(self.rest.len()).unwrap_or(u64::MAX);
        BodyFault::Truncated {
            missing: wanted.saturating_sub(have),
        }
    }

    fn count_node(&mut self, name: &str) -> Result<(), BodyError> {
        self.nodes = self.nodes.saturating_add(1);
        if self.nodes > self.nodes_max {
            return Err(self.error(name, BodyFault::TooManyParts));
        }
        Ok(())
    }

    fn finish(&self, name: &str) -> Result<(), BodyError> {
        match self.rest.len() {
            0 => Ok(()),
            more => Err(self.error(name, BodyFault::Trailing(more))),
        }
    }

    /// A fault at the next byte, in the field `name` of those around it.
    fn error(&self, name: &str, fault: BodyFault) -> BodyError {
        let around = self.path.iter().map(String::as_str);
        let names: Vec<_> = around
            .chain([name])
            .filter(|name| !name.is_empty())
            .collect();
        BodyError {
            offset: self.length.saturating_sub(self.rest.len()),
            field: names.join("/").replace("/[", "["),
            fault,
        }
    }
}

fn is_list(layout: &FieldLayout) -> bool {
    matches!(layout.kind.as_str(), "qtailq" | "qlist" | "gtree")
}

/// Name of a field with its place in its array.
fn shown(layout: &FieldLayout) -> String {
    match layout.shape {
        Shape::Element { index, .. } => format!("{}[{index}]", layout.name),
        _ => layout.name.to_string(),
    }
}
