//! Values of device state as a person reads them, and as JSON.

use std::fmt::Write as _;

use serde::ser::{Serialize, SerializeMap, Serializer};
use vmferry_vmstate::{Content, SavedField, Shape, Value};

/// Runs of equal elements that are shown of an array.
const RUNS_SHOWN: usize = 8;
/// Bytes in a line of a hex dump.
const HEX_LINE_BYTES: usize = 16;

/// A plain field on one line; nothing for structs, lists and trees. Bytes are counted, not shown.
pub(crate) fn line(field: &SavedField) -> Option<String> {
    let Content::Plain { count, bytes } = &field.content else {
        return None;
    };
    if field.holds_bytes() {
        let zero = match bytes.iter().all(|byte| *byte == 0) {
            true if bytes.is_empty() => "",
            true => ", all zero",
            false => "",
        };
        return Some(format!("{}{zero}", super::bytes(bytes.len() as u64)));
    }
    let mut text = String::new();
    let mut values = field.values().peekable();
    let mut runs = 0;
    while let Some(value) = values.next() {
        if runs == RUNS_SHOWN {
            let _ = write!(text, ", … ({count} in all)");
            break;
        }
        let mut same = 1;
        while values.next_if_eq(&value).is_some() {
            same += 1;
        }
        if runs > 0 {
            text.push_str(", ");
        }
        text.push_str(&scalar(value));
        if same > 1 {
            let _ = write!(text, " ×{same}");
        }
        runs += 1;
    }
    Some(text)
}

/// One value.
pub(crate) fn scalar(value: Value<'_>) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Uint(value @ 0..=9) => value.to_string(),
        Value::Uint(value) => format!("{value:#x}"),
        Value::Timer(None) => "not armed".into(),
        Value::Timer(Some(expiry)) => {
            format!("{}.{:09} s", expiry / 1_000_000_000, expiry % 1_000_000_000)
        }
        Value::Null => "null".into(),
        Value::Bytes(bytes) => hex(bytes),
    }
}

/// A plain field as JSON: a value, or an array of them. Bytes are a string of hex digits where they
/// are asked for, else their number.
pub(crate) struct PlainJson<'a> {
    pub(crate) field: &'a SavedField,
    pub(crate) with_bytes: bool,
}

impl Serialize for PlainJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let field = self.field;
        let Content::Plain { bytes, .. } = &field.content else {
            return out.serialize_unit();
        };
        if field.holds_bytes() {
            return match self.with_bytes {
                true => out.collect_str(&hex(bytes)),
                false => BytesJson(bytes).serialize(out),
            };
        }
        let mut values = field.values().map(ValueJson);
        match (field.shape, values.next()) {
            (Shape::Array, _) => out.collect_seq(field.values().map(ValueJson)),
            (_, Some(value)) => value.serialize(out),
            (_, None) => out.serialize_unit(),
        }
    }
}

/// Bytes that are not shown.
struct BytesJson<'a>(&'a [u8]);

impl Serialize for BytesJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(None)?;
        map.serialize_entry("bytes", &self.0.len())?;
        map.serialize_entry("zero", &self.0.iter().all(|byte| *byte == 0))?;
        map.end()
    }
}

struct ValueJson<'a>(Value<'a>);

impl Serialize for ValueJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Bool(value) => out.serialize_bool(value),
            Value::Int(value) => out.serialize_i64(value),
            Value::Uint(value) => out.serialize_u64(value),
            Value::Timer(expiry) => expiry.serialize(out),
            Value::Null => out.serialize_unit(),
            Value::Bytes(bytes) => out.collect_str(&hex(bytes)),
        }
    }
}

/// Hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Lines of a hex dump: offset, digits, and what is printable.
pub(crate) fn hex_lines(bytes: &[u8]) -> impl Iterator<Item = String> {
    bytes.chunks(HEX_LINE_BYTES).enumerate().map(|(k, chunk)| {
        let mut text = format!("{:04x} ", k * HEX_LINE_BYTES);
        for byte in chunk {
            let _ = write!(text, " {byte:02x}");
        }
        let printable = chunk.iter().map(|byte| match byte {
            0x20..=0x7e => char::from(*byte),
            _ => '.',
        });
        let digits = 5 + 3 * HEX_LINE_BYTES;
        format!("{text:<digits$}  {}", printable.collect::<String>())
    })
}

#[cfg(test)]
mod tests {
    use vmferry_vmstate::FieldType;

    use super::*;

    fn field(kind: &'static str, count: u32, bytes: &[u8]) -> SavedField {
        SavedField {
            name: "f".into(),
            kind: FieldType::named(kind),
            shape: if count == 1 { Shape::One } else { Shape::Array },
            content: Content::Plain {
                count,
                bytes: bytes.to_vec(),
            },
        }
    }

    #[test]
    fn lines() {
        for (kind, count, bytes, shown) in [
            ("bool", 1, &[1][..], "true"),
            ("bool", 1, &[3], "03"),
            ("uint16", 1, &[0, 9], "9"),
            ("uint16", 1, &[1, 0], "0x100"),
            ("int32", 1, &[255; 4], "-1"),
            ("uint8", 4, &[0, 0, 0, 7], "0 ×3, 7"),
            (
                "uint8",
                10,
                &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
                "0, 1, 2, 3, 4, 5, 6, 7, … (10 in all)",
            ),
            ("timer", 1, &[255; 8], "not armed"),
            (
                "timer",
                1,
                &[0, 0, 0, 0, 0x3b, 0x9a, 0xca, 0x01],
                "1.000000001 s",
            ),
            ("buffer", 1, &[], "0 B"),
            ("buffer", 1, &[0; 100], "100 B, all zero"),
            ("buffer", 1, b"secret", "6 B"),
            ("uint8", 33, &[1; 33], "33 B"),
        ] {
            assert_eq!(
                line(&field(kind, count, bytes)).as_deref(),
                Some(shown),
                "{kind} {bytes:?}"
            );
        }
    }

    #[test]
    fn hex_dump() {
        let lines: Vec<_> = hex_lines(b"0123456789abcdef\0!").collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].ends_with("  0123456789abcdef"), "{}", lines[0]);
        assert!(
            lines[1].starts_with("0010  00 21 ") && lines[1].ends_with("  .!"),
            "{}",
            lines[1]
        );
    }
}
