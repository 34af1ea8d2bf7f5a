//! `vmferry schema`: what programs, and streams, know of device state.

use std::io::{BufWriter, Read, Write};

use vmferry_inspect::Report;
use vmferry_vmstate::schema::{MAX_SCHEMA_BYTES, Schema, Source, compare};
use vmferry_vmstate::{BodyLayout, VmDescription};

use crate::exit::{Exit, Failure, one_line};
use crate::flags::stream_file::StreamFile;
use crate::flags::{SchemaCommand, SchemaDiffFlags, SchemaDumpFlags, SchemaFlags};
use crate::output;
use crate::render::schema::{Diff, Side};
use crate::render::style::Palette;

pub(crate) fn run(flags: &SchemaFlags) -> Result<Exit, Failure> {
    match &flags.command {
        SchemaCommand::Diff(flags) => diff(flags),
        SchemaCommand::Dump(flags) => dump(flags),
    }
}

fn diff(flags: &SchemaDiffFlags) -> Result<Exit, Failure> {
    if flags.old.is_stdin() && flags.new.is_stdin() {
        return Err(Failure::usage(
            "only one of OLD and NEW can be standard input",
        ));
    }
    let old = read(&flags.old)?;
    let new = read(&flags.new)?;
    if new.source == Source::Stream {
        return Err(Failure::usage(format!(
            "{}: NEW is a stream, which loads nothing; OLD may be one",
            flags.new
        )));
    }
    let comparison = compare(&old, &new);
    let diff = Diff::new(
        Side::new(&flags.old, &old),
        Side::new(&flags.new, &new),
        &comparison,
        &flags.device,
        flags.all,
    );
    if diff.is_empty() && !flags.device.is_empty() {
        return Err(Failure::usage("no device type has such a name"));
    }
    let mut out = BufWriter::new(output::stdout());
    if flags.json {
        diff.json(&mut out)?;
    } else {
        diff.text(Palette::for_stdout(), &mut out)?;
    }
    out.flush()?;
    Ok(if diff.is_compatible() {
        Exit::Whole
    } else {
        Exit::Failed
    })
}

fn dump(flags: &SchemaDumpFlags) -> Result<Exit, Failure> {
    let file = &flags.file;
    let Input::Stream(report) = open(file)? else {
        return Err(file.unreadable("it is a schema already"));
    };
    let (machine, description) = described(file, &report)?;
    let mut out = BufWriter::new(output::stdout());
    write!(out, "{}", Schema::of_stream(machine, description))?;
    out.flush()?;
    let is_old = |body: &BodyLayout| matches!(body, BodyLayout::OldStyle { .. });
    for device in &description.devices {
        if is_old(&device.body) {
            let name = one_line(&device.name);
            output::say(&format!("{file}: '{name}' has no fields and is left out"));
        }
    }
    Ok(Exit::Whole)
}

enum Input {
    Schema(Schema),
    Stream(Box<Report>),
}

/// A schema is JSON, and nothing else that is understood begins with a brace.
fn open(file: &StreamFile) -> Result<Input, Failure> {
    let mut input = file.open()?;
    let mut first = [0];
    let got = read_first(&mut input, &mut first).map_err(|error| file.unreadable(error))?;
    let rest = first.get(..got).unwrap_or_default().chain(input);
    if first != *b"{" {
        return Ok(Input::Stream(Box::new(Report::of(rest))));
    }
    let mut text = Vec::new();
    let limit = MAX_SCHEMA_BYTES as u64 + 1;
    let mut rest = rest.take(limit);
    rest.read_to_end(&mut text)
        .map_err(|error| file.unreadable(error))?;
    if text.len() > MAX_SCHEMA_BYTES {
        let max = crate::render::bytes(MAX_SCHEMA_BYTES as u64);
        return Err(file.unreadable(format!("a schema of more than {max}")));
    }
    Schema::parse(&text)
        .map(Input::Schema)
        .map_err(|error| file.unreadable(error))
}

fn read_first(input: &mut impl Read, first: &mut [u8; 1]) -> std::io::Result<usize> {
    loop {
        match input.read(first) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

fn read(file: &StreamFile) -> Result<Schema, Failure> {
    match open(file)? {
        Input::Schema(schema) => Ok(schema),
        Input::Stream(report) => {
            let (machine, description) = described(file, &report)?;
            Ok(Schema::of_stream(machine, description))
        }
    }
}

/// Machine type, empty if the stream does not say it, and description.
fn described<'a>(
    file: &StreamFile,
    report: &'a Report,
) -> Result<(&'a str, &'a VmDescription), Failure> {
    let description = report
        .description
        .as_ref()
        .ok_or_else(|| match &report.end {
            Err(error) => file.unreadable(error),
            Ok(_) => file.unreadable("the stream has no description of its devices"),
        })?;
    Ok((report.machine().unwrap_or_default(), description))
}
