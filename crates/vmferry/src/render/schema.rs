//! Whether two programs load each other's device state.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::{Value, json};
use vmferry_vmstate::schema::{
    Comparison, DeviceComparison, Direction, Presence, Schema, Source, Verdict,
};

use super::style::Palette;
use super::write_json;
use crate::exit::one_line;
use crate::flags::device_glob::{self, DeviceGlob};
use crate::flags::stream_file::StreamFile;

/// With how many devices of the same description a device may share an entry. QEMU's largest family
/// has nine.
const MAX_TWINS: usize = 16;

/// One of the two that are compared.
pub(crate) struct Side {
    file: String,
    machine: String,
    devices: usize,
    is_stream: bool,
}

impl Side {
    pub(crate) fn new(file: &StreamFile, schema: &Schema) -> Self {
        Self {
            file: one_line(&file.to_string()),
            machine: one_line(&schema.machine),
            devices: schema.devices.len(),
            is_stream: schema.source == Source::Stream,
        }
    }

    fn line(&self) -> String {
        let Self { file, devices, .. } = self;
        let machine = if self.machine.is_empty() {
            "a machine without a name"
        } else {
            &self.machine
        };
        if self.is_stream {
            format!("{file}: a stream of {machine}, {devices} descriptions")
        } else {
            format!("{file}: {machine}, {devices} device types")
        }
    }

    fn object(&self) -> Value {
        json!({
            "file": self.file,
            "machine": self.machine,
            "devices": self.devices,
            "stream": self.is_stream,
        })
    }
}

/// What is shown of a comparison.
pub(crate) struct Diff<'a> {
    old: Side,
    new: Side,
    devices: Vec<&'a DeviceComparison>,
    all: bool,
}

impl<'a> Diff<'a> {
    /// Of the devices that the patterns choose; `all`: also of those that fit.
    pub(crate) fn new(
        old: Side,
        new: Side,
        comparison: &'a Comparison,
        globs: &[DeviceGlob],
        all: bool,
    ) -> Self {
        let devices = comparison.devices.iter();
        let chosen = devices.filter(|device| {
            device_glob::chosen(globs, &device.name) || device_glob::chosen(globs, &device.state)
        });
        Self {
            old,
            new,
            devices: chosen.collect(),
            all,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    pub(crate) fn is_compatible(&self) -> bool {
        self.with(Verdict::No).next().is_none()
    }

    fn with(&self, verdict: Verdict) -> impl Iterator<Item = &'a DeviceComparison> {
        let devices = self.of(Presence::Both);
        devices.filter(move |device| device.verdict() == verdict)
    }

    fn of(&self, presence: Presence) -> impl Iterator<Item = &'a DeviceComparison> {
        let devices = self.devices.iter().copied();
        devices.filter(move |device| device.presence == presence)
    }

    /// The machine must be the same for a stream to be accepted at all.
    fn note(&self) -> Option<String> {
        let (old, new) = (&self.old.machine, &self.new.machine);
        // A receiver compares as much as was sent.
        let differ = !old.is_empty() && !new.starts_with(old.as_str());
        differ.then(|| {
            format!(
                "the machine types differ: {new} does not take streams of {old}, whatever the devices"
            )
        })
    }

    /// For a person.
    pub(crate) fn text(&self, palette: Palette, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "{}  {}", palette.name("OLD"), self.old.line())?;
        writeln!(out, "{}  {}", palette.name("NEW"), self.new.line())?;
        if let Some(note) = self.note() {
            writeln!(out, "{}  {note}", palette.doubtful("note"))?;
        }
        let mut page = Page {
            palette,
            all: self.all,
            out,
        };
        page.group(
            &palette.bad("incompatible").to_string(),
            self.with(Verdict::No),
        )?;
        page.group(
            &palette.doubtful("depends").to_string(),
            self.with(Verdict::Depends),
        )?;
        if self.all {
            let differs = |device: &&DeviceComparison| device.differs();
            let title = palette.good("compatible").to_string();
            page.group(&title, self.with(Verdict::Yes).filter(differs))?;
            let same = self.with(Verdict::Yes).filter(|device| !device.differs());
            page.names("the same", same)?;
            page.names("cannot be migrated", self.of(Presence::Unmigratable))?;
        }
        page.names(self.only_old(), self.of(Presence::OnlyOld))?;
        page.names("only in NEW", self.of(Presence::OnlyNew))?;
        writeln!(page.out, "\n{}", self.summary())
    }

    /// CPUs, buses and timers are in streams, and in no schema: nothing can be said about them.
    fn only_old(&self) -> &'static str {
        if self.old.is_stream {
            "not in NEW's schema"
        } else {
            "only in OLD"
        }
    }

    fn summary(&self) -> String {
        let mut parts = vec![
            format!("{} compatible", self.with(Verdict::Yes).count()),
            format!("{} depend", self.with(Verdict::Depends).count()),
            format!("{} incompatible", self.with(Verdict::No).count()),
        ];
        for (presence, what) in [
            (Presence::Unmigratable, "cannot be migrated"),
            (Presence::OnlyOld, self.only_old()),
            (Presence::OnlyNew, "only in NEW"),
        ] {
            match self.of(presence).count() {
                0 => {}
                count => parts.push(format!("{count} {what}")),
            }
        }
        parts.join(", ")
    }

    /// For a program: an object a line for each device, and one for the whole.
    pub(crate) fn json(&self, out: &mut impl Write) -> io::Result<()> {
        let worth_telling = |device: &&&DeviceComparison| {
            let matters = device.verdict() != Verdict::Yes || device.presence != Presence::Both;
            self.all || (matters && device.presence != Presence::Unmigratable)
        };
        for device in self.devices.iter().filter(worth_telling) {
            write_json(out, &device_object(device))?;
        }
        let verdict = [Verdict::No, Verdict::Depends]
            .into_iter()
            .find(|verdict| self.with(*verdict).next().is_some());
        let object = json!({
            "event": "summary",
            "old": self.old.object(),
            "new": self.new.object(),
            "note": self.note(),
            "verdict": verdict.unwrap_or(Verdict::Yes).word(),
            "compatible": self.with(Verdict::Yes).count(),
            "depend": self.with(Verdict::Depends).count(),
            "incompatible": self.with(Verdict::No).count(),
            "unmigratable": self.of(Presence::Unmigratable).count(),
            "only-old": self.of(Presence::OnlyOld).count(),
            "only-new": self.of(Presence::OnlyNew).count(),
        });
        write_json(out, &object)
    }
}

fn device_object(device: &DeviceComparison) -> Value {
    let versions = |versions: Option<(u32, u32)>| {
        versions.map(|(version, minimum)| json!({"version": version, "minimum": minimum}))
    };
    json!({
        "event": "device",
        "device": device.name,
        "description": device.state,
        "presence": match device.presence {
            Presence::Both => "both",
            Presence::OnlyOld => "old",
            Presence::OnlyNew => "new",
            Presence::Unmigratable => "unmigratable",
        },
        "verdict": match device.presence {
            Presence::Both => Some(device.verdict().word()),
            _ => None,
        },
        "old": versions(device.old_versions),
        "new": versions(device.new_versions),
        "new-loads-old": device.forward.as_ref().map(direction_object),
        "old-loads-new": device.backward.as_ref().map(direction_object),
    })
}

fn direction_object(direction: &Direction) -> Value {
    let reasons = direction.reasons.iter().map(|reason| {
        json!({
            "verdict": reason.verdict.word(),
            "place": reason.place,
            "reason": reason.cause.to_string(),
        })
    });
    json!({
        "verdict": direction.verdict().word(),
        "reasons": reasons.collect::<Vec<_>>(),
        "reasons-left-out": direction.omitted,
    })
}

struct Page<'o, W> {
    palette: Palette,
    all: bool,
    out: &'o mut W,
}

impl<W: Write> Page<'_, W> {
    /// Devices with their reasons; those that have the very same reasons share an entry.
    fn group<'a>(
        &mut self,
        title: &str,
        devices: impl Iterator<Item = &'a DeviceComparison>,
    ) -> io::Result<()> {
        let mut entries: Vec<(Vec<&str>, &DeviceComparison)> = Vec::new();
        let mut by_state = BTreeMap::<&str, Vec<usize>>::new();
        for device in devices {
            let places = by_state.entry(&device.state).or_default();
            let twin = places.iter().copied().take(MAX_TWINS).find(|place| {
                entries.get(*place).is_some_and(|(_, twin)| {
                    twin.forward == device.forward && twin.backward == device.backward
                })
            });
            match twin.and_then(|place| entries.get_mut(place)) {
                Some((names, _)) => names.push(&device.name),
                None => {
                    places.push(entries.len());
                    entries.push((vec![&device.name], device));
                }
            }
        }
        if entries.is_empty() {
            return Ok(());
        }
        writeln!(self.out, "\n{title}")?;
        for (names, device) in &entries {
            self.device(names, device)?;
        }
        Ok(())
    }

    fn device(&mut self, names: &[&str], device: &DeviceComparison) -> io::Result<()> {
        let versions = match (device.old_versions, device.new_versions) {
            (Some((old, _)), Some((new, _))) if old == new => format!("version {old}"),
            (Some((old, _)), Some((new, _))) => format!("version {old} in OLD, {new} in NEW"),
            _ => String::new(),
        };
        let state = match names {
            [name] if *name == device.state => String::new(),
            _ => format!("{}, ", one_line(&device.state)),
        };
        writeln!(
            self.out,
            "  {} {}",
            self.palette.name(one_line(&names.join(", "))),
            self.palette.faint(format_args!("({state}{versions})"))
        )?;
        let ways = [
            ("OLD -> NEW", &device.forward),
            ("NEW -> OLD", &device.backward),
        ];
        for (way, direction) in ways {
            if let Some(direction) = direction {
                self.direction(way, direction)?;
            }
        }
        Ok(())
    }

    fn direction(&mut self, way: &str, direction: &Direction) -> io::Result<()> {
        let reasons = direction.reasons.iter();
        let told = reasons.filter(|reason| self.all || reason.verdict != Verdict::Yes);
        let mut way = way;
        for reason in told {
            let verdict = self.verdict(reason.verdict);
            writeln!(
                self.out,
                "    {way:10}  {verdict}  {}",
                one_line(&reason.to_string())
            )?;
            way = "";
        }
        if !way.is_empty() {
            writeln!(self.out, "    {way:10}  {}", self.palette.good("yes"))?;
        }
        match direction.omitted {
            0 => Ok(()),
            omitted => writeln!(self.out, "{:16}and {omitted} more", ""),
        }
    }

    fn verdict(&self, verdict: Verdict) -> String {
        let word = format!("{:7}", verdict.word());
        match verdict {
            Verdict::Yes => self.palette.good(word).to_string(),
            Verdict::Depends => self.palette.doubtful(word).to_string(),
            Verdict::No => self.palette.bad(word).to_string(),
        }
    }

    fn names<'a>(
        &mut self,
        title: &str,
        devices: impl Iterator<Item = &'a DeviceComparison>,
    ) -> io::Result<()> {
        let names: Vec<_> = devices.map(|device| one_line(&device.name)).collect();
        if names.is_empty() {
            return Ok(());
        }
        let title = self.palette.name(title);
        writeln!(
            self.out,
            "\n{title} ({})\n  {}",
            names.len(),
            names.join(", ")
        )
    }
}
