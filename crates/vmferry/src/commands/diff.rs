//! `vmferry diff`: how two streams differ, field by field.

use std::io::Write;

use vmferry_inspect::Report;
use vmferry_inspect::diff::{self, ContentsError, DiffOptions, Difference, Painting};

use super::inspect;
use crate::exit::{Exit, Failure};
use crate::flags::stream_file::StreamFile;
use crate::flags::{DiffFlags, device_glob};
use crate::output;
use crate::render;
use crate::render::style::Palette;

pub(crate) fn run(flags: &DiffFlags) -> Result<Exit, Failure> {
    let (one, two) = (flags.first.is_stdin(), flags.second.is_stdin());
    if one && two {
        return Err(Failure::usage(
            "only one of the streams can be standard input",
        ));
    }
    if flags.contents && (one || two) {
        return Err(Failure::usage(
            "--contents reads the streams more than once: standard input cannot be one of them",
        ));
    }
    let first = inspect::read(&flags.first)?;
    let second = inspect::read(&flags.second)?;
    let (first, second) = describe_each_other(first, second);
    let mut found = diff::diff(&first, &second, DiffOptions { clocks: flags.all });
    if flags.contents {
        found.extend(contents(flags, &first, &second)?);
    }
    if !flags.device.is_empty() {
        found.retain(|difference| {
            let device = difference.device.as_deref();
            device.is_some_and(|name| device_glob::chosen(&flags.device, name))
        });
    }
    let mut out = output::stdout();
    if flags.json {
        render::write_json(&mut out, &render::diff::DiffJson(&found))?;
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

/// Compare memory and the disks that both streams have, by way of scratch files.
fn contents(
    flags: &DiffFlags,
    first: &Report,
    second: &Report,
) -> Result<Vec<Difference>, Failure> {
    let paint = |file: &StreamFile, disk: Option<&str>| -> Result<Painting, Failure> {
        let failed = |error: ContentsError| broken(file, error);
        let scratch = tempfile::tempfile().map_err(|error| failed(error.into()))?;
        let input = file.open()?;
        let painting = match disk {
            Some(name) => diff::paint_disk(input, name, scratch),
            None => diff::paint_memory(input, scratch),
        };
        painting.map_err(failed)
    };
    let both = first.disks.iter().map(|disk| disk.name.as_str());
    let both = both.filter(|name| second.disks.iter().any(|disk| disk.name == *name));
    let mut found = Vec::new();
    for disk in std::iter::once(None).chain(both.map(Some)) {
        let (one, two) = (paint(&flags.first, disk)?, paint(&flags.second, disk)?);
        let differ = diff::compare(&one, &two);
        found.extend(differ.map_err(|error| broken(&flags.first, error))?);
    }
    Ok(found)
}

fn broken(file: &StreamFile, what: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, format!("{file}: {what}"))
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
