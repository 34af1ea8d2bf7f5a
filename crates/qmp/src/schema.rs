//! Types of the schema: what a value must look like, checks with QEMU's wordings, and the list
//! that `query-qmp-schema` returns.
//!
//! A type stands once, in [`object!`] or [`enumeration!`]; serde, the checks and the
//! introspection are made from it.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::error::CommandError;

/// What a JSON value must look like.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// `true` or `false`.
    Bool,
    /// An integer that fits into 64 bits with sign.
    Int,
    /// An integer of 0 to 2⁶⁴−1.
    Unsigned,
    /// Any number.
    Number,
    /// A string.
    Text,
    /// Anything.
    Any,
    /// One of a few strings.
    Enumeration(&'static Enumeration),
    /// An object with known members.
    Object(&'static Object),
    /// An array of equal elements.
    Array(&'static Shape),
}

/// A named set of strings.
#[derive(Debug)]
pub struct Enumeration {
    /// Name in the schema.
    pub name: &'static str,
    /// The strings.
    pub values: &'static [&'static str],
}

/// A named object type.
#[derive(Debug)]
pub struct Object {
    /// Name in the schema.
    pub name: &'static str,
    /// The members, in order.
    pub members: &'static [Member],
}

/// A member of an [`Object`].
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// The key.
    pub name: &'static str,
    /// What its value looks like.
    pub shape: Shape,
    /// May be left out.
    pub optional: bool,
}

/// A Rust type that has a place in the schema.
pub trait Described {
    /// What its JSON looks like.
    const SHAPE: Shape;
    /// As a member it may be left out.
    const OPTIONAL: bool;
    /// As a member it is left out now.
    fn absent(&self) -> bool;
}

macro_rules! describe_builtin {
    ($($type:ty => $shape:ident),*) => {$(
        impl Described for $type {
            const SHAPE: Shape = Shape::$shape;
            const OPTIONAL: bool = false;
            fn absent(&self) -> bool {
                false
            }
        }
    )*};
}

describe_builtin!(bool => Bool, i64 => Int, u64 => Unsigned, f64 => Number, String => Text, Value => Any);

impl<T: Described> Described for Vec<T> {
    const SHAPE: Shape = Shape::Array(&T::SHAPE);
    const OPTIONAL: bool = false;
    fn absent(&self) -> bool {
        false
    }
}

impl<T: Described> Described for Option<T> {
    const SHAPE: Shape = T::SHAPE;
    const OPTIONAL: bool = true;
    fn absent(&self) -> bool {
        self.is_none()
    }
}

/// Declare an object type: a struct for serde and its place in the schema, both with the names
/// of the wire.
macro_rules! object {
    (
        $(#[$meta:meta])*
        $name:ident = $wire_name:literal {
            $($(#[$member_meta:meta])* $field:ident $key:literal: $type:ty,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        // An older QEMU leaves out what came later; for arguments, what must be there is checked first.
        #[serde(default)]
        pub struct $name {
            $(
                $(#[$member_meta])*
                #[serde(
                    rename = $key,
                    skip_serializing_if = "crate::schema::Described::absent"
                )]
                pub $field: $type,
            )*
        }

        impl $crate::schema::Described for $name {
            const SHAPE: $crate::schema::Shape =
                $crate::schema::Shape::Object(&$crate::schema::Object {
                    name: $wire_name,
                    members: &[$($crate::schema::Member {
                        name: $key,
                        shape: <$type as $crate::schema::Described>::SHAPE,
                        optional: <$type as $crate::schema::Described>::OPTIONAL,
                    },)*],
                });
            const OPTIONAL: bool = false;
            fn absent(&self) -> bool {
                false
            }
        }
    };
}

/// Declare a set of strings: an enum for serde and its place in the schema. The first is the
/// default.
macro_rules! enumeration {
    (
        $(#[$meta:meta])*
        $name:ident = $wire_name:literal {
            $(#[$first_meta:meta])* $first:ident $first_text:literal,
            $($(#[$value_meta:meta])* $value:ident $text:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
        )]
        pub enum $name {
            $(#[$first_meta])*
            #[default]
            #[serde(rename = $first_text)]
            $first,
            $(
                $(#[$value_meta])*
                #[serde(rename = $text)]
                $value,
            )*
        }

        impl $name {
            /// Every value, in the order of the schema.
            pub const ALL: &'static [Self] = &[Self::$first, $(Self::$value,)*];

            /// The string on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    Self::$first => $first_text,
                    $(Self::$value => $text,)*
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl $crate::schema::Described for $name {
            const SHAPE: $crate::schema::Shape =
                $crate::schema::Shape::Enumeration(&$crate::schema::Enumeration {
                    name: $wire_name,
                    values: &[$first_text, $($text,)*],
                });
            const OPTIONAL: bool = false;
            fn absent(&self) -> bool {
                false
            }
        }
    };
}

pub(crate) use {enumeration, object};

/// A value does not have the shape it should have. The wordings are those of QEMU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// A member that must be there is not.
    #[error("Parameter '{0}' is missing")]
    Missing(String),
    /// A member that no one knows.
    #[error("Parameter '{0}' is unexpected")]
    Unexpected(String),
    /// A value of another type.
    #[error("Invalid parameter type for '{path}', expected: {expected}")]
    WrongType {
        /// The member.
        path: String,
        /// `boolean`, `integer`, `number`, `string`, `object` or `array`.
        expected: &'static str,
    },
    /// A negative, fractional or too large number, or no number.
    #[error("Parameter '{0}' expects uint64")]
    NotUnsigned(String),
    /// A string that is none of the enumeration's.
    #[error("Parameter '{path}' does not accept value '{value}'")]
    UnknownValue {
        /// The member.
        path: String,
        /// The string.
        value: String,
    },
}

impl From<Mismatch> for CommandError {
    fn from(mismatch: Mismatch) -> Self {
        Self::generic(mismatch.to_string())
    }
}

/// Check a command's arguments: unknown members are refused.
///
/// # Errors
/// The first member that does not fit.
pub fn check_arguments(object: &Object, arguments: &Map<String, Value>) -> Result<(), Mismatch> {
    check_members(object, arguments, "")
}

/// Check that `value` has the shape; `path` names it in errors.
///
/// # Errors
/// The first part that does not fit.
pub fn check_value(shape: Shape, value: &Value, path: &str) -> Result<(), Mismatch> {
    let wrong = |expected| {
        Err(Mismatch::WrongType {
            path: path.to_owned(),
            expected,
        })
    };
    match (shape, value) {
        (Shape::Any, _)
        | (Shape::Bool, Value::Bool(_))
        | (Shape::Number, Value::Number(_))
        | (Shape::Text, Value::String(_)) => Ok(()),
        (Shape::Int, Value::Number(number)) if number.is_i64() => Ok(()),
        (Shape::Unsigned, Value::Number(number)) if number.is_u64() => Ok(()),
        (Shape::Enumeration(enumeration), Value::String(value)) => {
            if enumeration.values.contains(&value.as_str()) {
                return Ok(());
            }
            Err(Mismatch::UnknownValue {
                path: path.to_owned(),
                value: shorten(value),
            })
        }
        (Shape::Object(object), Value::Object(members)) => {
            check_members(object, members, &format!("{path}."))
        }
        (Shape::Array(element), Value::Array(elements)) => {
            elements.iter().enumerate().try_for_each(|(index, value)| {
                check_value(*element, value, &format!("{path}[{index}]"))
            })
        }
        (Shape::Unsigned, _) => Err(Mismatch::NotUnsigned(path.to_owned())),
        (Shape::Bool, _) => wrong("boolean"),
        (Shape::Int, _) => wrong("integer"),
        (Shape::Number, _) => wrong("number"),
        (Shape::Text | Shape::Enumeration(_), _) => wrong("string"),
        (Shape::Object(_), _) => wrong("object"),
        (Shape::Array(_), _) => wrong("array"),
    }
}

fn check_members(
    object: &Object,
    members: &Map<String, Value>,
    prefix: &str,
) -> Result<(), Mismatch> {
    for member in object.members {
        let path = format!("{prefix}{}", member.name);
        match members.get(member.name) {
            Some(value) => check_value(member.shape, value, &path)?,
            None if member.optional => {}
            None => return Err(Mismatch::Missing(path)),
        }
    }
    let known = |key: &String| object.members.iter().any(|member| member.name == key);
    match members.keys().find(|key| !known(key)) {
        Some(key) => Err(Mismatch::Unexpected(format!("{prefix}{}", shorten(key)))),
        None => Ok(()),
    }
}

/// A peer's string as it may stand in an error: at most 80 characters.
pub(crate) fn shorten(text: &str) -> String {
    const SHOWN_MAX: usize = 80;
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// Collects the `SchemaInfo` list. Types are listed under their own names; as in QEMU, clients
/// must start from a command or event and follow the names.
#[derive(Debug, Default)]
pub(crate) struct Introspection {
    entries: BTreeMap<String, Value>,
}

impl Introspection {
    pub(crate) fn command(&mut self, name: &str, arguments: Shape, returns: Shape) {
        let entry = json!({
            "name": name, "meta-type": "command",
            "arg-type": self.type_name(arguments), "ret-type": self.type_name(returns),
        });
        self.entries.insert(name.to_owned(), entry);
    }

    pub(crate) fn event(&mut self, name: &str, data: Shape) {
        let entry = json!({"name": name, "meta-type": "event", "arg-type": self.type_name(data)});
        self.entries.insert(name.to_owned(), entry);
    }

    pub(crate) fn finish(self) -> Value {
        Value::Array(self.entries.into_values().collect())
    }

    /// The name under which a shape is listed; lists it.
    fn type_name(&mut self, shape: Shape) -> String {
        match shape {
            Shape::Bool => self.builtin("bool", "boolean"),
            Shape::Int | Shape::Unsigned => self.builtin("int", "int"),
            Shape::Number => self.builtin("number", "number"),
            Shape::Text => self.builtin("str", "string"),
            Shape::Any => self.builtin("any", "value"),
            Shape::Array(element) => {
                let element = self.type_name(*element);
                let name = format!("[{element}]");
                let entry = json!({"name": name, "meta-type": "array", "element-type": element});
                self.entries.insert(name.clone(), entry);
                name
            }
            Shape::Enumeration(Enumeration { name, values }) => {
                let members: Vec<Value> =
                    values.iter().map(|value| json!({"name": value})).collect();
                let entry = json!({
                    "name": name, "meta-type": "enum", "members": members, "values": values,
                });
                self.entries.insert((*name).to_owned(), entry);
                (*name).to_owned()
            }
            Shape::Object(object) => {
                let members: Vec<Value> = object
                    .members
                    .iter()
                    .map(|member| {
                        let mut entry =
                            json!({"name": member.name, "type": self.type_name(member.shape)});
                        if let (true, Some(entry)) = (member.optional, entry.as_object_mut()) {
                            entry.insert("default".to_owned(), Value::Null);
                        }
                        entry
                    })
                    .collect();
                let entry = json!({"name": object.name, "meta-type": "object", "members": members});
                self.entries.insert(object.name.to_owned(), entry);
                object.name.to_owned()
            }
        }
    }

    fn builtin(&mut self, name: &str, json_type: &str) -> String {
        let entry = json!({"name": name, "meta-type": "builtin", "json-type": json_type});
        self.entries.insert(name.to_owned(), entry);
        name.to_owned()
    }
}

#[cfg(test)]
#[expect(unreachable_pub, reason = "the macros declare public types")]
mod tests {
    use super::*;

    enumeration! {
        /// Colours.
        Colour = "Colour" {
            /// Like blood.
            Red "red",
            /// Like grass.
            LightGreen "light-green",
        }
    }

    object! {
        /// Inner.
        Inner = "Inner" {
            /// Text.
            text "some-text": String,
        }
    }

    object! {
        /// Outer.
        Outer = "Outer" {
            /// Number.
            size "size": u64,
            /// Signed.
            offset "off-set": Option<i64>,
            /// Enum.
            colour "colour": Option<Colour>,
            /// Nested.
            inner "inner": Option<Vec<Inner>>,
            /// Flag.
            flag "flag": Option<bool>,
        }
    }

    fn complaint(value: &Value) -> String {
        let Shape::Object(object) = Outer::SHAPE else {
            panic!("an object");
        };
        check_arguments(object, value.as_object().unwrap())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn mismatches_are_worded_like_qemu_words_them() {
        for (value, expected) in [
            (json!({}), "Parameter 'size' is missing"),
            (json!({"size": 1, "x": 1}), "Parameter 'x' is unexpected"),
            (json!({"size": -1}), "Parameter 'size' expects uint64"),
            (json!({"size": 1.5}), "Parameter 'size' expects uint64"),
            (json!({"size": "1"}), "Parameter 'size' expects uint64"),
            (
                json!({"size": 1, "off-set": u64::MAX}),
                "Invalid parameter type for 'off-set', expected: integer",
            ),
            (
                json!({"size": 1, "colour": "blue"}),
                "Parameter 'colour' does not accept value 'blue'",
            ),
            (
                json!({"size": 1, "colour": 3}),
                "Invalid parameter type for 'colour', expected: string",
            ),
            (
                json!({"size": 1, "flag": null}),
                "Invalid parameter type for 'flag', expected: boolean",
            ),
            (
                json!({"size": 1, "inner": {}}),
                "Invalid parameter type for 'inner', expected: array",
            ),
            (
                json!({"size": 1, "inner": [{"some-text": ""}, {}]}),
                "Parameter 'inner[1].some-text' is missing",
            ),
            (
                json!({"size": 1, "inner": [{"some-text": "", "y": 1}]}),
                "Parameter 'inner[0].y' is unexpected",
            ),
        ] {
            assert_eq!(complaint(&value), expected);
        }
    }

    #[test]
    fn what_passes_the_check_is_what_serde_takes() {
        let value = json!({
            "size": u64::MAX, "off-set": -5, "colour": "light-green",
            "inner": [{"some-text": "a"}], "flag": true,
        });
        check_value(Outer::SHAPE, &value, "x").unwrap();
        let outer: Outer = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(outer.colour, Some(Colour::LightGreen));
        let names: Vec<&str> = Colour::ALL.iter().map(|colour| colour.as_str()).collect();
        assert_eq!(names, ["red", "light-green"]);
        assert_eq!(serde_json::to_value(&outer).unwrap(), value);
        let least = serde_json::to_value(Outer::default()).unwrap();
        assert_eq!(least, json!({"size": 0}), "absent members stay out");
    }

    #[test]
    fn introspection_lists_every_type_that_is_named() {
        let mut introspection = Introspection::default();
        introspection.command("do-it", Outer::SHAPE, Vec::<Inner>::SHAPE);
        introspection.event("DONE", Inner::SHAPE);
        let list = introspection.finish();
        let find = |name: &str| {
            let mut found = list.as_array().unwrap().iter();
            found.find(|entry| entry["name"] == name).unwrap().clone()
        };
        assert_eq!(find("do-it")["arg-type"], "Outer");
        assert_eq!(find("do-it")["ret-type"], "[Inner]");
        assert_eq!(find("[Inner]")["element-type"], "Inner");
        assert_eq!(find("Colour")["values"], json!(["red", "light-green"]));
        assert_eq!(
            find("Outer")["members"][1],
            json!({"name": "off-set", "type": "int", "default": null})
        );
        assert_eq!(find("DONE")["meta-type"], "event");
        assert_eq!(find("int")["json-type"], "int");
    }

    #[test]
    fn long_strings_of_a_peer_are_shortened() {
        assert_eq!(shorten(&"é".repeat(80)), "é".repeat(80));
        assert_eq!(shorten(&"é".repeat(81)), "é".repeat(80) + "…");
    }
}
