//! `vmferry diff`: how two streams differ, field by field.

use std::io::Write;

use vmferry_inspect::{DiffOptions, Report, diff};

use super::inspect;
use crate::exit::{Exit, Failure};
use crate::flags::{DiffFlags, device_glob};
use crate::output;
use crate::render;
use crate::render::style::Palette;

pub(crate) fn run(flags: &DiffFlags) -> Result<Exit, Failure> {
    if flags.first.is_stdin() && flags.second.is_stdin() {
        return Err(Failure::usage(
            "only one of the streams can be standard input",
        ));
    }
    let first = inspect::read(&flags.first)?;
    let second = inspect::read(&flags.second)?;
    let (first, second) = describe_each_other(first, second);
    let mut found = diff(&first, &second, DiffOptions { clocks: flags.all });
    if !flags.device.is_empty() {
        found.retain(|difference| {
            let device = difference.device.as_deref();
            device.is_some_and(|name| device_glob::chosen(&flags.device, name))
        });
    }
    let mut out = output::stdout();
    if flags.json {
        render::write_json(&mut out, &render::diff::object(&found))?;
    } else {
        let mut text = std::io::BufWriter::new(&mut out);
        render::diff::lines(&found, Palette::for_stdout(), &mut text)?;
        text.flush()?;
    }
    for (file, report) in [(&flags.first, &first), (&flags.second, &second)] {
        if let Err(error) = &report.end {
            let what = format!("{file}: {error}; what was before that is compared");
            return Err(Failure::new(Exit::Failed, what));
        }
    }
    Ok(match found.as_slice() {
        [] => Exit::Whole,
        _ => Exit::Different,
    })
}

/// A stream without a description is read by the other's.
fn describe_each_other(mut first: Report, mut second: Report) -> (Report, Report) {
    match (&first.description, &second.description) {
        (Some(description), None) => second.describe_by(description.clone()),
        (None, Some(description)) => first.describe_by(description.clone()),
        _ => {}
    }
    (first, second)
}
