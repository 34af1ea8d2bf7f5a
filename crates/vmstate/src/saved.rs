//! State as it stands in a stream: fields in wire order with their bytes, names and types.
//!
//! ```text
//! body:        field field … subsection subsection …
//! subsection:  05, str8 name, u32 version, body
//! ```

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

/// First byte of a subsection.
pub(crate) const SUBSECTION: u8 = 0x05;
/// Before each element of a list or tree.
pub(crate) const ELEMENT: u8 = 1;
/// Behind the last element of a list or tree.
pub(crate) const LIST_END: u8 = 0;
/// Type byte, length byte and version of a subsection; its name comes on top.
pub(crate) const SUBSECTION_HEADER_BYTES: usize = 6;
/// Longer arrays of bytes are buffers to a reader.
const BYTE_ARRAY_MAX: u32 = 32;

/// What the body of a device's section holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SavedBody {
    /// Described field by field.
    Described(SavedState),
    /// Written by an old-style pair of functions: nothing is known but the bytes.
    OldStyle(Vec<u8>),
}

/// State of a device, a struct or a subsection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// Name of its description.
    pub name: Arc<str>,
    /// Version of its description.
    pub version: u32,
    /// Its fields in wire order; those that fail their condition are not here.
    pub fields: Vec<SavedField>,
    /// Its subsections in wire order; those that are not needed are not here.
    pub subsections: Vec<SavedState>,
}

/// A field that was saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedField {
    /// Its name, with the `[k]` of a repeated name.
    pub name: Arc<str>,
    /// Its type.
    pub kind: FieldType,
    /// A single value, an array, or one element of an array.
    pub shape: Shape,
    /// What it holds.
    pub content: Content,
}

/// How a field stands in an array.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A single value.
    One,
    /// An array whose elements have the same layout, described once.
    Array,
    /// An element of an array that is described one by one.
    Element {
        /// Its place in the array.
        index: u32,
        /// It is the last of its array: of the whole of it, in an array of pointers with nulls, too.
        last: bool,
    },
}

/// What a field holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Bytes as on the wire: one element, or all elements of [`Shape::Array`] one after another.
    Plain {
        /// Number of elements: 1 unless the shape is an array.
        count: u32,
        /// Their bytes: a multiple of `count`, unless elements of the type say their own length
        /// ([`FieldType::CAPABILITY`]).
        bytes: Vec<u8>,
    },
    /// One struct, or the structs of an array (`struct`, `vstruct`, `tmp`).
    Structs(Vec<SavedState>),
    /// A list that ends itself (`qtailq`, `qlist`).
    List(Vec<SavedState>),
    /// A tree (`gtree`): each node is a key and a value.
    Tree(Vec<(Content, SavedState)>),
}

/// QEMU's name of a field's type.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct FieldType(Cow<'static, str>);

/// A piece of a [`SavedState`], with the place of its first byte.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// A field.
    Field(u64, &'a SavedField),
    /// A subsection; the place is that of its fields, behind its header.
    Subsection(u64, &'a SavedState),
}

/// A node of a tree, with the places of its key and its value.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    /// Where the key starts.
    pub key_at: u64,
    /// The key.
    pub key: &'a Content,
    /// Where the value starts.
    pub value_at: u64,
    /// The value.
    pub value: &'a SavedState,
}

/// A value of plain bytes, by its type.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// `bool`; other bytes than 0 and 1 stay [`Value::Bytes`].
    Bool(bool),
    /// A signed number.
    Int(i64),
    /// An unsigned number.
    Uint(u64),
    /// Expiry in nanoseconds of the timer's clock; `None` when it is not armed.
    Timer(Option<u64>),
    /// A null pointer in an array of pointers.
    Null,
    /// Anything else.
    Bytes(&'a [u8]),
}

impl FieldType {
    /// A struct described inside the field.
    pub const STRUCT: Self = Self::named("struct");
    /// A struct in a version that its owner fixes.
    pub const VSTRUCT: Self = Self::named("vstruct");
    /// Values computed for the stream.
    pub const TMP: Self = Self::named("tmp");
    /// A tail queue.
    pub const QTAILQ: Self = Self::named("qtailq");
    /// A list.
    pub const QLIST: Self = Self::named("qlist");
    /// A balanced tree.
    pub const GTREE: Self = Self::named("gtree");
    /// A null in an array of pointers.
    pub const NULLPTR: Self = Self::named("nullptr");
    /// Bytes without a length.
    pub const BUFFER: Self = Self::named("buffer");
    /// The name of a capability: a byte with its length, and so many bytes. The only type whose
    /// elements differ in length although one describes them all.
    pub const CAPABILITY: Self = Self::named("capability");

    /// A type whose name is known when compiling.
    #[must_use]
    pub const fn named(name: &'static str) -> Self {
        Self(Cow::Borrowed(name))
    }

    /// A type whose name was read.
    #[must_use]
    pub fn new(name: String) -> Self {
        Self(Cow::Owned(name))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The value of one element of this type.
    #[must_use]
    pub fn value<'a>(&self, bytes: &'a [u8]) -> Value<'a> {
        let name = self.as_str();
        let signed = name.starts_with("int");
        match (name, bytes) {
            ("bool", [byte @ (0 | 1)]) => Value::Bool(*byte == 1),
            ("nullptr", [0x30]) => Value::Null,
            ("timer", _) => match uint(bytes) {
                Some(u64::MAX) => Value::Timer(None),
                Some(expiry) => Value::Timer(Some(expiry)),
                None => Value::Bytes(bytes),
            },
            _ if signed && name != "int64 equal" => {
                int(bytes).map_or(Value::Bytes(bytes), Value::Int)
            }
            _ if signed || name.starts_with("uint") => {
                uint(bytes).map_or(Value::Bytes(bytes), Value::Uint)
            }
            _ => Value::Bytes(bytes),
        }
    }
}

fn uint(bytes: &[u8]) -> Option<u64> {
    match bytes.len() {
        1 | 2 | 4 | 8 => Some(
            bytes
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte)),
        ),
        _ => None,
    }
}

fn int(bytes: &[u8]) -> Option<i64> {
    Some(match *bytes {
        [a] => i8::from_be_bytes([a]).into(),
        [a, b] => i16::from_be_bytes([a, b]).into(),
        [a, b, c, d] => i32::from_be_bytes([a, b, c, d]).into(),
        [a, b, c, d, e, f, g, h] => i64::from_be_bytes([a, b, c, d, e, f, g, h]),
        _ => return None,
    })
}

impl SavedBody {
    /// Append the bytes of the body.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Described(state) => state.encode(out),
            Self::OldStyle(bytes) => out.extend_from_slice(bytes),
        }
    }
}

impl SavedState {
    /// Append fields and subsections.
    pub fn encode(&self, out: &mut Vec<u8>) {
        for field in &self.fields {
            field.content.encode(out);
        }
        for subsection in &self.subsections {
            out.push(SUBSECTION);
            let name = subsection.name.as_bytes();
            out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(name);
            out.extend_from_slice(&subsection.version.to_be_bytes());
            subsection.encode(out);
        }
    }

    /// Bytes on the wire, of fields and subsections.
    #[must_use]
    pub fn wire_bytes(&self) -> usize {
        let fields = self.fields.iter().map(|field| field.content.wire_bytes());
        let subsections = self.subsections.iter().map(|state| {
            let header = state.subsection_header_bytes();
            header.saturating_add(state.wire_bytes())
        });
        fields.chain(subsections).fold(0, usize::saturating_add)
    }

    /// Fields and subsections in wire order, with their places, for a state that starts at `start`.
    pub fn parts(&self, start: u64) -> impl Iterator<Item = Part<'_>> {
        let mut at = start;
        let fields = self.fields.iter().map(Err);
        let subsections = self.subsections.iter().map(Ok);
        fields.chain(subsections).map(move |part| match part {
            Err(field) => {
                let here = at;
                at = at.saturating_add(count(field.content.wire_bytes()));
                Part::Field(here, field)
            }
            Ok(state) => {
                let here = at.saturating_add(count(state.subsection_header_bytes()));
                at = here.saturating_add(count(state.wire_bytes()));
                Part::Subsection(here, state)
            }
        })
    }

    /// Bytes in front of the fields, if it is a subsection: type, name with its length, version.
    #[must_use]
    pub fn subsection_header_bytes(&self) -> usize {
        self.name.len().saturating_add(SUBSECTION_HEADER_BYTES)
    }

    /// The field of that name, the first of several.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&SavedField> {
        self.fields.iter().find(|field| &*field.name == name)
    }

    /// The subsection of that name.
    #[must_use]
    pub fn subsection(&self, name: &str) -> Option<&SavedState> {
        self.subsections.iter().find(|state| &*state.name == name)
    }
}

impl SavedField {
    /// The elements of a plain field, in order; none for structs, lists and trees.
    pub fn values(&self) -> impl Iterator<Item = Value<'_>> {
        self.elements().map(|element| self.kind.value(element))
    }

    /// Bytes on the wire of its first element.
    #[must_use]
    pub fn element_bytes(&self) -> usize {
        match &self.content {
            Content::Plain { .. } => self.elements().next().map_or(0, <[u8]>::len),
            Content::Structs(states) => states.first().map_or(0, SavedState::wire_bytes),
            list @ (Content::List(_) | Content::Tree(_)) => list.wire_bytes(),
        }
    }

    fn elements(&self) -> impl Iterator<Item = &[u8]> {
        let (count, mut rest): (u32, &[u8]) = match &self.content {
            Content::Plain { count, bytes } => (*count, bytes),
            _ => (0, &[]),
        };
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let size = rest.len().checked_div(count).unwrap_or(0);
        (0..count).map(move |_| {
            let length = match (&self.kind, rest.first()) {
                (kind, Some(&length)) if *kind == FieldType::CAPABILITY => {
                    usize::from(length).saturating_add(1)
                }
                _ => size,
            };
            let split = rest.split_at_checked(length);
            let (element, after) = split.unwrap_or((rest, &[]));
            rest = after;
            element
        })
    }
}

impl SavedField {
    /// Is it bytes to a reader, rather than numbers? Then it may hold what a guest has written: a
    /// buffer, an opaque format, a long array of single bytes.
    #[must_use]
    pub fn holds_bytes(&self) -> bool {
        let Content::Plain { count, bytes } = &self.content else {
            return false;
        };
        match self.kind.as_str() {
            "uint8" | "int8" => *count > BYTE_ARRAY_MAX,
            "bool" => bytes.len() > 1 && *count == 1,
            _ => self
                .values()
                .next()
                .is_none_or(|value| matches!(value, Value::Bytes(_))),
        }
    }
}

impl Content {
    /// The structs of a field, or the elements of a list, with their places, for a field that starts
    /// at `start`.
    pub fn states(&self, start: u64) -> impl Iterator<Item = (u64, &SavedState)> {
        let (states, mark) = match self {
            Self::Structs(states) => (states.as_slice(), 0),
            Self::List(states) => (states.as_slice(), 1),
            Self::Plain { .. } | Self::Tree(_) => (&[][..], 0),
        };
        let mut at = start;
        states.iter().map(move |state| {
            let here = at.saturating_add(mark);
            at = here.saturating_add(count(state.wire_bytes()));
            (here, state)
        })
    }

    /// The nodes of a tree, with their places, for a field that starts at `start`.
    pub fn nodes(&self, start: u64) -> impl Iterator<Item = Node<'_>> {
        let nodes = match self {
            Self::Tree(nodes) => nodes.as_slice(),
            _ => &[],
        };
        // The number of nodes comes first.
        let mut at = start.saturating_add(4);
        nodes.iter().map(move |(key, value)| {
            let key_at = at.saturating_add(1);
            let value_at = key_at.saturating_add(count(key.wire_bytes()));
            at = value_at.saturating_add(count(value.wire_bytes()));
            Node {
                key_at,
                key,
                value_at,
                value,
            }
        })
    }

    /// A single plain value.
    #[must_use]
    pub fn plain(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Plain {
            count: 1,
            bytes: bytes.into(),
        }
    }

    /// Number of elements: 1 unless it is an array. A list counts as one.
    #[must_use]
    pub fn count(&self) -> u32 {
        match self {
            Self::Plain { count, .. } => *count,
            Self::Structs(states) => u32::try_from(states.len()).unwrap_or(u32::MAX),
            Self::List(_) | Self::Tree(_) => 1,
        }
    }

    /// Bytes on the wire.
    #[must_use]
    pub fn wire_bytes(&self) -> usize {
        let add = usize::saturating_add;
        match self {
            Self::Plain { bytes, .. } => bytes.len(),
            Self::Structs(states) => states.iter().map(SavedState::wire_bytes).fold(0, add),
            Self::List(states) => states
                .iter()
                .map(|state| state.wire_bytes().saturating_add(1))
                .fold(1, add),
            Self::Tree(nodes) => nodes
                .iter()
                .map(|(key, value)| add(key.wire_bytes(), value.wire_bytes()).saturating_add(1))
                .fold(5, add),
        }
    }

    /// Append the bytes on the wire.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Plain { bytes, .. } => out.extend_from_slice(bytes),
            Self::Structs(states) => {
                for state in states {
                    state.encode(out);
                }
            }
            Self::List(states) => {
                for state in states {
                    out.push(ELEMENT);
                    state.encode(out);
                }
                out.push(LIST_END);
            }
            Self::Tree(nodes) => {
                let count = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
                out.extend_from_slice(&count.to_be_bytes());
                for (key, value) in nodes {
                    out.push(ELEMENT);
                    key.encode(out);
                    value.encode(out);
                }
                out.push(LIST_END);
            }
        }
    }
}

fn count(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

impl fmt::Debug for FieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for FieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
