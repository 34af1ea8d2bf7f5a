//! A schema as the JSON text that QEMU writes: two spaces a level, a blank line in an empty list.

use std::fmt::{self, Display, Formatter, Write};

use super::read::MACHINE_KEY;
use super::{Schema, SchemaField, SchemaState};

/// As QEMU writes it, down to the last byte.
impl Display for Schema {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut text = Text { out: f, level: 0 };
        text.open("{")?;
        text.key(true, MACHINE_KEY)?;
        text.open("{")?;
        text.string(true, "Name", &self.machine)?;
        text.close("}")?;
        for device in &self.devices {
            text.key(false, &device.name)?;
            text.open("{")?;
            text.string(true, "Name", &device.name)?;
            text.number("version_id", device.version.into())?;
            text.number("minimum_version_id", device.minimum_version.into())?;
            text.key(false, "Description")?;
            text.state(&device.state)?;
            text.close("}")?;
        }
        text.close("}")?;
        f.write_str("\n")
    }
}

struct Text<'a, 'f> {
    out: &'a mut Formatter<'f>,
    level: usize,
}

impl Text<'_, '_> {
    fn state(&mut self, state: &SchemaState) -> fmt::Result {
        self.open("{")?;
        self.string(true, "name", &state.name)?;
        self.number("version_id", state.version.into())?;
        self.number("minimum_version_id", state.minimum_version.into())?;
        if let Some(fields) = &state.fields {
            self.key(false, "Fields")?;
            self.list(fields, Self::field)?;
        }
        if !state.subsections.is_empty() {
            self.key(false, "Subsections")?;
            self.list(&state.subsections, Self::state)?;
        }
        self.close("}")
    }

    fn field(&mut self, field: &SchemaField) -> fmt::Result {
        self.open("{")?;
        self.string(true, "field", &field.name)?;
        self.number("version_id", field.since.into())?;
        self.key(false, "field_exists")?;
        write!(self.out, "{}", field.conditional)?;
        // QEMU does not count to one.
        if let Some(count) = field.count.filter(|count| *count != 1) {
            self.number("num", count.into())?;
        }
        self.number("size", field.element_bytes)?;
        if let Some(inner) = &field.inner {
            self.key(false, "Description")?;
            self.state(inner)?;
        }
        self.close("}")
    }

    fn list<T>(
        &mut self,
        items: &[T],
        mut item: impl FnMut(&mut Self, &T) -> fmt::Result,
    ) -> fmt::Result {
        self.open("[")?;
        if items.is_empty() {
            self.out.write_char('\n')?;
        }
        for (k, each) in items.iter().enumerate() {
            self.line(k == 0)?;
            item(self, each)?;
        }
        self.close("]")
    }

    fn open(&mut self, bracket: &str) -> fmt::Result {
        self.level = self.level.saturating_add(1);
        self.out.write_str(bracket)
    }

    fn close(&mut self, bracket: &str) -> fmt::Result {
        self.level = self.level.saturating_sub(1);
        self.line(true)?;
        self.out.write_str(bracket)
    }

    /// A new line, behind a comma unless it is the first of its object or list.
    fn line(&mut self, first: bool) -> fmt::Result {
        let comma = if first { "" } else { "," };
        let indent = self.level.saturating_mul(2);
        write!(self.out, "{comma}\n{:indent$}", "")
    }

    fn key(&mut self, first: bool, key: &str) -> fmt::Result {
        self.line(first)?;
        self.quoted(key)?;
        self.out.write_str(": ")
    }

    fn string(&mut self, first: bool, key: &str, value: &str) -> fmt::Result {
        self.key(first, key)?;
        self.quoted(value)
    }

    fn number(&mut self, key: &str, value: u64) -> fmt::Result {
        self.key(false, key)?;
        write!(self.out, "{value}")
    }

    fn quoted(&mut self, text: &str) -> fmt::Result {
        let quoted = serde_json::to_string(text).map_err(|_| fmt::Error)?;
        self.out.write_str(&quoted)
    }
}
