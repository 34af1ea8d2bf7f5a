//! Streams, and what is asked of every one.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;
use vmferry_inspect::{DescriptionSource, DeviceReport, DeviceState, Found, ItemKind, Report};
use vmferry_vmstate::{Content, DescriptionWriter, Dialect, SavedBody, SavedState};

use crate::peers::qemu::{Machine, Qemu};
use crate::peers::vmferry::{PROGRAM, run};

/// A stream in a file.
pub(super) struct Stream {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
    pub(super) path: PathBuf,
    _dir: TempDir,
}

impl Stream {
    /// These bytes, in a file.
    pub(super) fn of(name: &str, bytes: Vec<u8>) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("stream");
        std::fs::write(&path, &bytes).expect("a file in the temporary folder");
        Self {
            name: name.to_owned(),
            bytes,
            path,
            _dir: dir,
        }
    }

    /// What a machine that never ran migrates into a file.
    pub(super) fn fresh(name: &str, machine: Machine) -> Self {
        saved(name, &mut machine.args(["-S"]).start())
    }

    /// `vmferry inspect` of the file.
    pub(super) fn inspect(&self, options: &[&str]) -> Output {
        let path = self.path.to_str().expect("test paths are UTF-8");
        run(["inspect", path].into_iter().chain(options.iter().copied()))
    }

    /// `vmferry inspect -`, which gets the bytes through a pipe.
    pub(super) fn inspect_piped(&self, options: &[&str]) -> Output {
        let mut child = Command::new(PROGRAM)
            .args(["inspect", "-"])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmferry can be run");
        let mut input = child.stdin.take().expect("its input is a pipe");
        std::thread::scope(|threads| {
            threads.spawn(move || {
                for piece in self.bytes.chunks(4000) {
                    // It may know enough before the end.
                    if input.write_all(piece).is_err() {
                        return;
                    }
                }
            });
            child.wait_with_output().expect("vmferry can be waited for")
        })
    }
}

/// What a QEMU migrates into a file.
pub(super) fn saved(name: &str, qemu: &mut Qemu) -> Stream {
    let path = qemu.path("saved");
    migrate_to(qemu, &path);
    Stream::of(name, std::fs::read(path).expect("the stream can be read"))
}

/// Let a QEMU migrate into a file, to the end.
pub(super) fn migrate_to(qemu: &mut Qemu, path: &Path) {
    let uri = format!("exec:cat > {}", path.display());
    qemu.qmp.execute("migrate", &json!({ "uri": uri }));
    qemu.migrated();
}

/// What was found in streams.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) devices: usize,
    pub(super) fields: usize,
}

/// A reader that gives one to `max` bytes at a time.
struct Dribble<'a>(&'a [u8], fastrand::Rng, usize);

impl Read for Dribble<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let bytes = self.1.usize(1..=self.2).min(out.len());
        self.0.read(&mut out[..bytes])
    }
}

/// A stream with a description: every device is decoded field by field, ends at its footer, encodes to
/// the same bytes; the description is written again as it was; the program shows the same.
pub(super) fn is_understood(stream: &Stream) -> Counts {
    let name = &stream.name;
    let report = Report::of(&stream.bytes[..]);
    assert!(
        report.is_clean(),
        "{name}: {:?}, {:?}",
        report.end,
        report.problems
    );
    assert_eq!(
        report.description_is,
        DescriptionSource::Stream,
        "{name} has a description"
    );
    let end = report.end.as_ref().expect("it is whole");
    assert_eq!(end.bytes, stream.bytes.len() as u64, "{name}");
    let counts = devices_are_decoded(stream, &report);
    is_the_same_in_pieces(stream, &report);
    shows_everything(stream, &report);
    println!("{name}: {counts:?}");
    counts
}

fn devices_are_decoded(stream: &Stream, report: &Report) -> Counts {
    let name = &stream.name;
    let description = report.description.as_ref().expect("it has a description");
    let dialect = match description.configuration {
        Some(_) => Dialect::Qemu10,
        None => Dialect::Qemu7,
    };
    let configuration = description.configuration.as_ref().map(|layout| {
        let body = &stream.bytes[9..];
        let length = usize::try_from(layout.wire_bytes()).expect("a small section");
        layout.decode(&body[..length]).expect("it is as described")
    });
    let page_bytes = description.page_bytes;
    let mut writer = DescriptionWriter::new(dialect, page_bytes, configuration.as_ref());
    let mut counts = Counts::default();
    assert_eq!(report.devices.len(), description.devices.len(), "{name}");
    for device in &report.devices {
        let section = &device.section;
        // What comes before the pages is shown before the description is there.
        let early = section.name.ends_with("-early");
        let found = if early {
            Found::ByFooter
        } else {
            Found::ByDescription
        };
        assert_eq!(device.found, found, "{name}: {}", section.name);
        let DeviceState::Decoded(body) = report.state(device) else {
            panic!("{name}: {} is not decoded", section.name);
        };
        let mut encoded = Vec::new();
        body.encode(&mut encoded);
        let kept = device.body.as_ref().expect("it is small enough");
        assert!(encoded == *kept, "{name}: {} changes", section.name);
        let start = usize::try_from(device.offset).expect("a small stream");
        assert!(
            stream.bytes[start..].starts_with(kept),
            "{name}: {}",
            section.name
        );
        writer.device(&section.name, section.instance.0, &body);
        counts.devices += 1;
        counts.fields += match &body {
            SavedBody::Described(state) => fields(state),
            SavedBody::OldStyle(_) => 1,
        };
    }
    let mut items = report.items.iter();
    let item = items.find(|item| item.kind == ItemKind::Description);
    let item = item.unwrap_or_else(|| panic!("{name} has a description"));
    let start = usize::try_from(item.offset).expect("a small stream") + 5;
    let text = String::from_utf8_lossy(&stream.bytes[start..]).into_owned();
    let written = writer.finish();
    let same = written
        .bytes()
        .zip(text.bytes())
        .take_while(|(a, b)| a == b)
        .count();
    let around = |text: &str| {
        text.chars()
            .skip(same.saturating_sub(300))
            .take(400)
            .collect::<String>()
    };
    assert!(
        written == text,
        "{name}: the description differs at byte {same}:\n{}\ninstead of\n{}",
        around(&written),
        around(&text)
    );
    counts
}

/// Plain fields, however deep.
fn fields(state: &SavedState) -> usize {
    let own = state.fields.iter().map(|field| match &field.content {
        Content::Plain { .. } => 1,
        Content::Structs(states) | Content::List(states) => states.iter().map(fields).sum(),
        Content::Tree(nodes) => nodes.iter().map(|(_, state)| 1 + fields(state)).sum(),
    });
    own.sum::<usize>() + state.subsections.iter().map(fields).sum::<usize>()
}

fn is_the_same_in_pieces(stream: &Stream, report: &Report) {
    for max in [7, 3000] {
        let dribble = Dribble(&stream.bytes, fastrand::Rng::with_seed(7), max);
        let again = Report::of(dribble);
        assert_eq!(again.items, report.items, "{} in pieces", stream.name);
        assert_eq!(again.devices, report.devices, "{} in pieces", stream.name);
        assert_eq!(again.ram, report.ram, "{} in pieces", stream.name);
    }
}

/// The program finds what the library does, in a file and through a pipe, and shows it as text and as JSON.
pub(super) fn shows_everything(stream: &Stream, report: &Report) {
    let name = &stream.name;
    for options in [
        &["--json"][..],
        &["--offsets"],
        &["--hex"],
        &["--json", "--hex", "--offsets"],
    ] {
        let output = stream.inspect(options);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name} {options:?}: {errors}");
        assert_eq!(errors, "", "{name} {options:?}");
        let piped = stream.inspect_piped(options);
        assert!(
            piped == output,
            "{name} {options:?} is something else through a pipe"
        );
        let text = String::from_utf8(output.stdout).expect("it prints UTF-8");
        if options[0] == "--json" {
            json_has_all(name, &text, report);
        } else {
            // Two IDE controllers of an isapc have one name.
            let same = |device: &DeviceReport| {
                let section =
                    |device: &DeviceReport| (device.section.name.clone(), device.section.instance);
                report
                    .devices
                    .iter()
                    .filter(|other| section(other) == section(device))
                    .count()
            };
            let lines = |device: &str| text.lines().filter(|line| line.contains(device)).count();
            for device in &report.devices {
                let line = format!(
                    "FULL  {} {} ",
                    device.section.name, device.section.instance.0
                );
                assert_eq!(lines(&line), same(device), "{name}: '{line}'");
            }
        }
    }
}

fn json_has_all(name: &str, text: &str, report: &Report) {
    let object: Value =
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{name}: {error}"));
    let items = object["items"].as_array().expect("items is an array");
    let shown = items.iter().filter(|item| item["kind"] == "device");
    let shown = shown.map(|item| {
        assert!(
            item.get("error").is_none()
                && (item["state"].is_object() || item["data_bytes"].is_u64()),
            "{name}: {item}"
        );
        (
            item["name"].as_str().expect("a name").to_owned(),
            item["instance"].as_u64().expect("a number"),
            item["body_bytes"].as_u64().expect("a number"),
        )
    });
    let devices = report.devices.iter().map(|device| {
        let section = &device.section;
        (
            section.name.as_str().to_owned(),
            u64::from(section.instance.0),
            device.bytes,
        )
    });
    assert!(shown.eq(devices), "{name}: the devices are others");
    assert_eq!(object["complete"], true, "{name}");
}
