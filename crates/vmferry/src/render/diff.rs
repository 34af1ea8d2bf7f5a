//! Differences of two streams.

use std::io::{self, Write};

use serde::ser::{Serialize, SerializeMap, Serializer};
use vmferry_inspect::diff::{Difference, Sides};
use vmferry_stream::Shown as Escaped;

use super::style::Palette;
use super::{count, value};

/// One line for each difference, under the part that it is in.
pub(crate) fn lines(
    found: &[Difference],
    palette: Palette,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut part = "";
    for difference in found {
        if difference.part != part {
            part = &difference.part;
            writeln!(out, "{}", palette.name(Escaped(part)))?;
        }
        let field = match difference.field.as_str() {
            "" => String::new(),
            field => format!("{}: ", Escaped(field)),
        };
        let arrow = palette.faint("→");
        match &difference.sides {
            Sides::OnlyFirst => writeln!(out, "  {field}{}", palette.bad("only in the first"))?,
            Sides::OnlySecond => writeln!(out, "  {field}{}", palette.good("only in the second"))?,
            Sides::Words(one, other) => {
                let (one, other) = (Escaped(one), Escaped(other));
                writeln!(
                    out,
                    "  {field}{} {arrow} {}",
                    palette.bad(one),
                    palette.good(other)
                )?;
            }
            Sides::Fields(one, other) => {
                let (one, other) = (value::line(one), value::line(other));
                let one = palette.bad(one.unwrap_or_default());
                let other = palette.good(other.unwrap_or_default());
                writeln!(out, "  {field}{one} {arrow} {other}")?;
            }
            Sides::Bytes {
                differ,
                bytes,
                first_at,
            } => writeln!(
                out,
                "  {field}{differ} of {bytes} bytes differ, the first at {first_at:#x}"
            )?,
            Sides::Contents {
                units,
                unit_bytes,
                first_at,
            } => {
                let unit = super::bytes(*unit_bytes as u64);
                let differ = if *units == 1 { "differs" } else { "differ" };
                let units = count(*units, "piece");
                writeln!(
                    out,
                    "  {units} of {unit} {differ}, the first at {first_at:#x}"
                )?;
            }
            Sides::MoreElements(more) => {
                let more = count(*more as u64, "element");
                writeln!(out, "  {field}{more} more")?;
            }
        }
    }
    Ok(())
}

/// All differences as one object.
pub(crate) struct DiffJson<'a>(pub(crate) &'a [Difference]);

impl Serialize for DiffJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(Some(1))?;
        map.serialize_entry("differences", &Differences(self.0))?;
        map.end()
    }
}

struct Differences<'a>(&'a [Difference]);

impl Serialize for Differences<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        out.collect_seq(self.0.iter().map(DifferenceJson))
    }
}

struct DifferenceJson<'a>(&'a Difference);

impl Serialize for DifferenceJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let Self(difference) = self;
        let mut map = out.serialize_map(None)?;
        map.serialize_entry("part", &difference.part)?;
        map.serialize_entry("field", &difference.field)?;
        match &difference.sides {
            Sides::OnlyFirst => map.serialize_entry("kind", "only-first")?,
            Sides::OnlySecond => map.serialize_entry("kind", "only-second")?,
            Sides::Words(first, second) => {
                map.serialize_entry("kind", "changed")?;
                map.serialize_entry("first", first)?;
                map.serialize_entry("second", second)?;
            }
            Sides::Fields(first, second) => {
                let plain = |field| value::PlainJson {
                    field,
                    with_bytes: false,
                };
                map.serialize_entry("kind", "changed")?;
                map.serialize_entry("first", &plain(first))?;
                map.serialize_entry("second", &plain(second))?;
            }
            Sides::Bytes {
                differ,
                bytes,
                first_at,
            } => {
                map.serialize_entry("kind", "bytes")?;
                map.serialize_entry("differ", differ)?;
                map.serialize_entry("bytes", bytes)?;
                map.serialize_entry("first_at", first_at)?;
            }
            Sides::MoreElements(more) => {
                map.serialize_entry("kind", "more-elements")?;
                map.serialize_entry("differ", more)?;
            }
            Sides::Contents {
                units,
                unit_bytes,
                first_at,
            } => {
                map.serialize_entry("kind", "contents")?;
                map.serialize_entry("units", units)?;
                map.serialize_entry("unit_bytes", unit_bytes)?;
                map.serialize_entry("first_at", first_at)?;
            }
        }
        map.end()
    }
}
