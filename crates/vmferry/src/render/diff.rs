//! Differences of two streams.

use std::io::{self, Write};

use serde_json::{Value as Json, json};
use vmferry_inspect::diff::{Difference, Sides};
use vmferry_vmstate::{Content, SavedField};

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
            writeln!(out, "{}", palette.name(part))?;
        }
        let field = match difference.field.as_str() {
            "" => String::new(),
            field => format!("{}: ", field.escape_debug()),
        };
        let arrow = palette.faint("→");
        match &difference.sides {
            Sides::OnlyFirst => writeln!(out, "  {field}{}", palette.bad("only in the first"))?,
            Sides::OnlySecond => writeln!(out, "  {field}{}", palette.good("only in the second"))?,
            Sides::Words(one, other) => {
                let (one, other) = (one.escape_debug(), other.escape_debug());
                writeln!(
                    out,
                    "  {field}{} {arrow} {}",
                    palette.bad(one),
                    palette.good(other)
                )?;
            }
            Sides::Fields(one, other) => {
                if let Some(place) = place(one, other) {
                    writeln!(out, "  {field}{place}")?;
                } else {
                    let (one, other) = (value::line(one), value::line(other));
                    let (one, other) = (one.unwrap_or_default(), other.unwrap_or_default());
                    writeln!(
                        out,
                        "  {field}{} {arrow} {}",
                        palette.bad(one),
                        palette.good(other)
                    )?;
                }
            }
            Sides::Contents {
                units,
                unit_bytes,
                first_at,
            } => {
                let unit = super::bytes(*unit_bytes as u64);
                let units = count(*units, "piece");
                writeln!(
                    out,
                    "  {units} of {unit} differ, the first at {first_at:#x}"
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

/// Where two buffers of the same length differ; their bytes are not shown.
fn place(one: &SavedField, other: &SavedField) -> Option<String> {
    let (
        Content::Plain {
            bytes: one_bytes, ..
        },
        Content::Plain {
            bytes: other_bytes, ..
        },
    ) = (&one.content, &other.content)
    else {
        return None;
    };
    if !value::is_bytes(one) || one_bytes.len() != other_bytes.len() {
        return None;
    }
    let pairs = one_bytes.iter().zip(other_bytes).enumerate();
    let mut differ = pairs
        .filter(|(_, (one, other))| one != other)
        .map(|(place, _)| place);
    let first = differ.next()?;
    let many = differ.count() + 1;
    Some(format!(
        "{many} of {} bytes differ, the first at {first:#x}",
        one_bytes.len()
    ))
}

/// All differences as one object.
pub(crate) fn object(found: &[Difference]) -> Json {
    let differences = found.iter().map(|difference| {
        let (first, second) = match &difference.sides {
            Sides::OnlyFirst => (json!(true), json!(false)),
            Sides::OnlySecond => (json!(false), json!(true)),
            Sides::Words(one, other) => (json!(one), json!(other)),
            Sides::Fields(one, other) => (
                value::json(one, false).unwrap_or_default(),
                value::json(other, false).unwrap_or_default(),
            ),
            Sides::MoreElements(more) => (json!(more), json!(more)),
            Sides::Contents { .. } => (Json::Null, Json::Null),
        };
        let mut object = json!({
            "part": difference.part,
            "field": difference.field,
            "kind": match difference.sides {
                Sides::OnlyFirst => "only-first",
                Sides::OnlySecond => "only-second",
                Sides::Words(..) | Sides::Fields(..) => "changed",
                Sides::MoreElements(_) => "more-elements",
                Sides::Contents { .. } => "contents",
            },
            "first": first,
            "second": second,
        });
        if let Sides::Contents {
            units,
            unit_bytes,
            first_at,
        } = &difference.sides
        {
            object["units"] = json!(units);
            object["unit_bytes"] = json!(unit_bytes);
            object["first_at"] = json!(first_at);
        }
        object
    });
    json!({ "differences": differences.collect::<Vec<_>>() })
}
