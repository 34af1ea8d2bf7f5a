//! `vmferry inspect`: what is in a stream, and where it breaks.

use std::io::Write;

use vmferry_inspect::{DeviceState, Found, Report, WalkError};
use vmferry_stream::Fault;
use vmferry_vmstate::VmDescription;

use crate::exit::{Exit, Failure};
use crate::flags::stream_file::StreamFile;
use crate::flags::{InspectFlags, device_glob};
use crate::output;
use crate::render;
use crate::render::inspect::Shown;
use crate::render::name;
use crate::render::style::Palette;

pub(crate) fn run(flags: &InspectFlags) -> Result<Exit, Failure> {
    let description = flags.description.as_ref().map(description_of).transpose()?;
    let mut report = match &flags.snapshot {
        Some(snapshot) => read_snapshot(&flags.file, snapshot)?,
        None => read(&flags.file)?,
    };
    if let Some(description) = description {
        report.describe_by(description);
    }
    let shown = Shown {
        devices: flags.device.clone(),
        offsets: flags.offsets,
        hex: flags.hex,
    };
    let mut out = output::stdout();
    if flags.json {
        let object = render::inspect_json::ReportJson {
            report: &report,
            shown: &shown,
        };
        render::write_json(&mut out, &object)?;
    } else {
        let mut text = std::io::BufWriter::new(&mut out);
        render::inspect::tree(&report, &shown, Palette::for_stdout(), &mut text)?;
        text.flush()?;
    }
    verdict(&flags.file, &report, &shown)
}

/// Read the VM state of a snapshot.
fn read_snapshot(file: &StreamFile, snapshot: &str) -> Result<Report, Failure> {
    let image = super::snapshot::image(file.path()?, true)?;
    let state = image.vm_state_reader(snapshot);
    let state = state.map_err(|error| file.unreadable(error))?;
    if state.length() == 0 {
        let why = format!("snapshot '{snapshot}' holds no VM state");
        return Err(file.unreadable(why));
    }
    Ok(Report::of(state))
}

/// Read a stream. What is no stream at all is refused.
pub(crate) fn read(file: &StreamFile) -> Result<Report, Failure> {
    let report = Report::of(file.open()?);
    match &report.end {
        Err(WalkError::Container(error)) => Err(file.unreadable(error)),
        Err(WalkError::Read { source, .. }) if report.items.is_empty() => {
            Err(file.unreadable(source))
        }
        Err(WalkError::Stream(error)) if error.offset == 0 && is_cut(&error.fault) => {
            Err(file.unreadable("it is empty"))
        }
        Err(WalkError::Stream(error)) if is_no_stream(&error.fault) => Err(file.unreadable(error)),
        // Not even a header.
        Err(WalkError::Stream(error)) if report.items.is_empty() => Err(file.unreadable(error)),
        _ => Ok(report),
    }
}

fn is_no_stream(fault: &Fault) -> bool {
    matches!(
        fault,
        Fault::BadMagic(_) | Fault::ObsoleteVersion | Fault::UnsupportedVersion(_)
    )
}

fn is_cut(fault: &Fault) -> bool {
    matches!(fault, Fault::Truncated(_))
}

/// The description of another stream, or its text in a file.
fn description_of(file: &StreamFile) -> Result<VmDescription, Failure> {
    let mut head = Vec::new();
    let mut input = file.open()?;
    let limit = vmferry_inspect::limits::DESCRIPTION_BYTES_MAX as u64;
    std::io::Read::read_to_end(&mut std::io::Read::take(&mut input, limit), &mut head)
        .map_err(|error| file.unreadable(error))?;
    if head.first() == Some(&b'{') {
        return VmDescription::parse(&head).map_err(|error| file.unreadable(error));
    }
    let report = Report::of(std::io::Read::chain(head.as_slice(), input));
    match (report.description, report.end) {
        (Some(description), _) => Ok(description),
        (None, Err(error)) => Err(file.unreadable(error)),
        (None, Ok(_)) => Err(file.unreadable("the stream has no description of its devices")),
    }
}

/// Everything was shown; is it whole?
fn verdict(file: &StreamFile, report: &Report, shown: &Shown) -> Result<Exit, Failure> {
    if let Err(error) = &report.end {
        let field = match cut_field(report) {
            Some(field) => format!(", in field '{field}'"),
            None => String::new(),
        };
        let error = name::message(&error.to_string());
        return Err(broken(file, format!("{error}{field}")));
    }
    let wrong = report
        .devices
        .iter()
        .find_map(|device| match report.state(device) {
            DeviceState::Broken(_, error) => Some((device, error)),
            _ => None,
        });
    if let Some((device, error)) = wrong {
        let place = device.offset.saturating_add(error.offset as u64);
        let what = format!(
            "device section '{}' is not laid out as described: {} (byte {place}, {})",
            name::shown(&device.section.name),
            error.fault,
            error.field
        );
        return Err(broken(file, what));
    }
    if let Some(problem) = report.problems.first() {
        let section = match problem.section.as_str() {
            "" => String::new(),
            section => format!(", section '{}'", name::shown(section)),
        };
        let what = format!(
            "{} (byte {}{section})",
            name::message(&problem.text),
            problem.offset
        );
        return Err(broken(file, what));
    }
    let names = report.devices.iter().map(|device| &device.section.name);
    if !shown.devices.is_empty()
        && !names
            .into_iter()
            .any(|name| device_glob::chosen(&shown.devices, name))
    {
        return Err(broken(file, "no device section has such a name"));
    }
    Ok(Exit::Whole)
}

/// The field in which a stream ends, if its last device is described by another stream.
fn cut_field(report: &Report) -> Option<String> {
    let last = report.devices.last()?;
    match (last.found, report.state(last)) {
        (Found::Cut, DeviceState::Broken(_, error)) => Some(error.field),
        _ => None,
    }
}

fn broken(file: &StreamFile, what: impl std::fmt::Display) -> Failure {
    Failure::new(Exit::Failed, format!("{file}: {what}"))
}
