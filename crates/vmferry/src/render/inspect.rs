//! What is in a stream, as a tree.

use std::io::{self, Write};

use vmferry_inspect::{
    Container, DescriptionSource, DeviceReport, DeviceState, Found, Item, ItemKind,
    RamBlockSummary, Report,
};
use vmferry_stream::{Configuration, Ending, Section, SectionKind, Shown as Escaped};
use vmferry_vmstate::{Content, Node, Part, SavedBody, SavedField, SavedState, Shape};

use super::style::Palette;
use super::{bytes, count, name, value};
use crate::flags::device_glob::{self, DeviceGlob};

/// Names of fields get no more room than this.
const NAME_WIDTH_MAX: usize = 36;

/// What is shown of a stream.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    /// Only devices of these names, and nothing else.
    pub(crate) devices: Vec<DeviceGlob>,
    /// Where each field stands.
    pub(crate) offsets: bool,
    /// The bytes of buffers, and of what is not described.
    pub(crate) hex: bool,
}

/// Print the tree.
pub(crate) fn tree(
    report: &Report,
    shown: &Shown,
    palette: Palette,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut tree = Tree {
        report,
        shown,
        palette,
        out,
    };
    if shown.devices.is_empty() {
        tree.title()?;
        tree.items()?;
        tree.ram()?;
        tree.disks()?;
        tree.bitmaps()?;
        tree.notes()
    } else {
        tree.chosen_devices()
    }
}

struct Tree<'a, W> {
    report: &'a Report,
    shown: &'a Shown,
    palette: Palette,
    out: &'a mut W,
}

impl<W: Write> Tree<'_, W> {
    fn title(&mut self) -> io::Result<()> {
        let machine = self.report.machine().filter(|machine| !machine.is_empty());
        let machine = machine.map_or("a machine without a name".into(), name::shown);
        write!(self.out, "{}", self.palette.name(machine))?;
        match &self.report.end {
            Ok(finish) => {
                let description = match finish.ending {
                    Ending::WithDescription => "with description",
                    Ending::WithoutDescription => "without description",
                };
                let whole = self.palette.good("complete");
                write!(
                    self.out,
                    ": {}, {whole}, {description}",
                    bytes(finish.bytes)
                )?;
                if let Some(state) = self.report.run_state() {
                    write!(self.out, ", guest {state}")?;
                }
            }
            Err(_) => write!(self.out, ": {}", self.palette.bad("broken"))?,
        }
        writeln!(self.out)?;
        if let Container::Libvirt(header) = &self.report.container {
            let state = match (header.is_unfinished, header.was_running) {
                (true, _) => "the save did not finish",
                (false, true) => "the guest ran",
                (false, false) => "the guest was paused",
            };
            let text = format!(
                "libvirt save image version {}, {} before the stream, {state}",
                header.version,
                bytes(self.report.start)
            );
            self.at(0)?;
            writeln!(self.out, "{text}")?;
        }
        Ok(())
    }

    /// Begin a line with its place in the input.
    fn at(&mut self, offset: u64) -> io::Result<()> {
        let offset = format!("{offset:#x}");
        write!(
            self.out,
            "{}  ",
            self.palette.faint(format!("{offset:>12}"))
        )
    }

    fn items(&mut self) -> io::Result<()> {
        for item in &self.report.items {
            self.item(item)?;
        }
        match self.report.items_left_out {
            0 => Ok(()),
            more => writeln!(self.out, "{:14}… and {more} more", ""),
        }
    }

    fn item(&mut self, item: &Item) -> io::Result<()> {
        if let ItemKind::Device(place) = item.kind {
            let device = &self.report.devices[place];
            return self.device(device, item);
        }
        self.at(item.offset)?;
        self.indent(item.in_package)?;
        let length = bytes(item.bytes);
        match &item.kind {
            ItemKind::Header => writeln!(self.out, "header: version 3"),
            ItemKind::Configuration => {
                let text = configuration(self.report.configuration.as_ref());
                writeln!(self.out, "configuration: {text}")
            }
            ItemKind::Section(section) => {
                self.section(section)?;
                match item.count {
                    1 => writeln!(self.out, ", {length}"),
                    times => writeln!(self.out, " ×{times}, {length}"),
                }
            }
            ItemKind::Command { name, detail } => {
                let times = match item.count {
                    1 => String::new(),
                    times => format!(" ×{times}"),
                };
                let detail = match detail.as_str() {
                    "" => String::new(),
                    detail => format!(": {detail}"),
                };
                writeln!(self.out, "command {name}{times}{detail}")
            }
            ItemKind::Package => writeln!(self.out, "command PACKAGED, {length}"),
            ItemKind::Eof => writeln!(self.out, "EOF"),
            ItemKind::Description => writeln!(self.out, "description, {length}"),
            ItemKind::Device(_) => Ok(()),
        }
    }

    fn indent(&mut self, in_package: bool) -> io::Result<()> {
        write!(self.out, "{}", if in_package { "  " } else { "" })
    }

    fn section(&mut self, section: &Section) -> io::Result<()> {
        let kind = match section.kind {
            SectionKind::Start => "START",
            SectionKind::Part => "PART ",
            SectionKind::End => "END  ",
            SectionKind::Full => "FULL ",
        };
        let name = self.palette.name(name::shown(&section.name));
        let (instance, id) = (section.instance.0, section.id.0);
        write!(
            self.out,
            "{kind} {name} {instance} (id {id}) version {}",
            section.version
        )
    }

    fn chosen_devices(&mut self) -> io::Result<()> {
        for item in &self.report.items {
            if let ItemKind::Device(place) = item.kind
                && let Some(device) = self.report.devices.get(place)
                && device_glob::chosen(&self.shown.devices, &device.section.name)
            {
                self.device(device, item)?;
            }
        }
        Ok(())
    }

    fn device(&mut self, device: &DeviceReport, item: &Item) -> io::Result<()> {
        self.at(item.offset)?;
        self.indent(item.in_package)?;
        self.section(&device.section)?;
        write!(self.out, ", {}", bytes(device.bytes))?;
        let depth = if item.in_package { 3 } else { 2 };
        match self.report.state(device) {
            DeviceState::Decoded(body) => {
                writeln!(self.out)?;
                self.body(&body, device.offset, depth)
            }
            DeviceState::Broken(body, error) => {
                writeln!(self.out)?;
                self.body(&body, device.offset, depth)?;
                let place = device.offset.saturating_add(error.offset as u64);
                let text = format!("byte {place} (field '{}'): {}", error.field, error.fault);
                writeln!(self.out, "{:14}{}", "", self.palette.bad(text))
            }
            DeviceState::Undescribed => {
                writeln!(self.out, "{}", self.palette.faint(", not described"))?;
                match (&device.body, self.shown.hex) {
                    (Some(body), true) => self.hex(body, depth),
                    _ => Ok(()),
                }
            }
            DeviceState::NotKept => {
                writeln!(
                    self.out,
                    "{}",
                    self.palette.faint(", too much state to show")
                )
            }
        }
    }

    fn body(&mut self, body: &SavedBody, offset: u64, depth: usize) -> io::Result<()> {
        match body {
            SavedBody::Described(state) => self.state(state, offset, depth),
            SavedBody::OldStyle(data) => {
                let text = format!("data  {}", bytes(data.len() as u64));
                self.line(offset, depth, &text)?;
                if self.shown.hex {
                    self.hex(data, depth + 1)?;
                }
                Ok(())
            }
        }
    }

    fn state(&mut self, state: &SavedState, start: u64, depth: usize) -> io::Result<()> {
        let names = state.fields.iter().map(field_name);
        let width = names.map(|name| name.chars().count()).max();
        let width = width.unwrap_or(0).min(NAME_WIDTH_MAX);
        for part in state.parts(start) {
            match part {
                Part::Field(at, field) => self.field(field, width, at, depth)?,
                Part::Subsection(at, state) => {
                    let header = state.subsection_header_bytes() as u64;
                    let text = format!("subsection {}", title(state));
                    self.line(at.saturating_sub(header), depth, &text)?;
                    self.state(state, at, depth + 1)?;
                }
            }
        }
        Ok(())
    }

    fn field(&mut self, field: &SavedField, width: usize, at: u64, depth: usize) -> io::Result<()> {
        let kind = Escaped(field.kind.as_str());
        let kind = self.palette.faint(format!("{kind:<13}")).to_string();
        let start = format!("{:<width$}  {kind}", field_name(field));
        match &field.content {
            Content::Plain { bytes, .. } => {
                let text = value::line(field).unwrap_or_default();
                self.line(at, depth, &format!("{start} {text}"))?;
                if self.shown.hex && field.holds_bytes() {
                    self.hex(bytes, depth + 1)?;
                }
                Ok(())
            }
            Content::Structs(states) if states.len() == 1 => {
                for (at, state) in field.content.states(at) {
                    self.line(at, depth, &format!("{start} {}", title(state)))?;
                    self.state(state, at, depth + 1)?;
                }
                Ok(())
            }
            Content::Structs(states) | Content::List(states) => {
                let elements = count(states.len() as u64, "element");
                self.line(at, depth, &format!("{start} {elements}"))?;
                for (k, (at, state)) in field.content.states(at).enumerate() {
                    self.line(at, depth + 1, &format!("[{k}] {}", title(state)))?;
                    self.state(state, at, depth + 2)?;
                }
                Ok(())
            }
            Content::Tree(nodes) => {
                let nodes = count(nodes.len() as u64, "node");
                self.line(at, depth, &format!("{start} {nodes}"))?;
                for node in field.content.nodes(at) {
                    self.node(&node, depth + 1)?;
                }
                Ok(())
            }
        }
    }

    /// A node of a tree: its key, then its value.
    fn node(&mut self, node: &Node<'_>, depth: usize) -> io::Result<()> {
        let key = match node.key {
            Content::Plain { bytes, .. } => format!("0x{}", value::hex(bytes)),
            _ => "key".to_owned(),
        };
        self.line(node.key_at, depth, &format!("{key}: {}", title(node.value)))?;
        for (at, key) in node.key.states(node.key_at) {
            self.line(at, depth + 1, &format!("key {}", title(key)))?;
            self.state(key, at, depth + 2)?;
        }
        self.state(node.value, node.value_at, depth + 1)
    }

    /// A line of the tree, with its place in the input if that is wanted.
    fn line(&mut self, offset: u64, depth: usize, text: &str) -> io::Result<()> {
        if self.shown.offsets {
            self.at(offset)?;
        } else {
            write!(self.out, "{:14}", "")?;
        }
        writeln!(self.out, "{:1$}{text}", "", depth * 2)
    }

    fn hex(&mut self, bytes: &[u8], depth: usize) -> io::Result<()> {
        for line in value::hex_lines(bytes) {
            let line = self.palette.faint(line);
            writeln!(self.out, "{:14}{:2$}{line}", "", "", depth * 2)?;
        }
        Ok(())
    }

    fn ram(&mut self) -> io::Result<()> {
        let ram = &self.report.ram;
        if ram.blocks.is_empty() {
            return Ok(());
        }
        let blocks = count(ram.blocks.len() as u64, "block");
        let title = format!("guest memory: {} in {blocks}", bytes(ram.total_bytes));
        writeln!(self.out, "\n{title}")?;
        let longest = ram
            .blocks
            .iter()
            .map(|block| name::shown(&block.name).len());
        let width = longest.max().unwrap_or(0).max(5);
        writeln!(
            self.out,
            "  {:width$} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "block", "size", "zero", "data", "xbzrle", "compressed", "repeated"
        )?;
        for block in &ram.blocks {
            let name = self
                .palette
                .name(format!("{:width$}", name::shown(&block.name)));
            writeln!(self.out, "  {name} {}", ram_line(block))?;
        }
        match ram.multifd_flushes {
            0 => Ok(()),
            times => writeln!(
                self.out,
                "  {}: pages travel on other connections",
                count(times, "multifd flush")
            ),
        }
    }

    fn disks(&mut self) -> io::Result<()> {
        for disk in &self.report.disks {
            writeln!(
                self.out,
                "\ndisk '{}': {} of data, {} of zeroes, reaching {}",
                self.palette.name(name::shown(&disk.name)),
                count(disk.data_chunks, "chunk"),
                disk.zero_chunks,
                bytes(disk.end_bytes)
            )?;
        }
        Ok(())
    }

    fn bitmaps(&mut self) -> io::Result<()> {
        for bitmap in &self.report.bitmaps {
            let granularity = bitmap
                .granularity_bytes
                .map_or("unknown".into(), |granularity| {
                    bytes(u64::from(granularity))
                });
            let end = if bitmap.is_complete {
                ""
            } else {
                ", not complete"
            };
            writeln!(
                self.out,
                "\nbitmap '{}' of '{}': {granularity} a bit, {} set{end}",
                self.palette.name(name::shown(&bitmap.name)),
                name::shown(&bitmap.node),
                count(bitmap.bits_set, "bit"),
            )?;
        }
        Ok(())
    }

    /// How this was found out, and what is wrong.
    fn notes(&mut self) -> io::Result<()> {
        for note in notes(self.report) {
            writeln!(self.out, "\nnote: {note}")?;
        }
        for problem in &self.report.problems {
            let section = match problem.section.as_str() {
                "" => String::new(),
                section => format!(", section '{}'", name::shown(section)),
            };
            let text = name::message(&problem.text);
            let text = format!("byte {}{section}: {text}", problem.offset);
            writeln!(self.out, "\n{} {text}", self.palette.bad("problem:"))?;
        }
        match self.report.problems_left_out {
            0 => Ok(()),
            more => writeln!(self.out, "… and {more} more problems"),
        }
    }
}

/// What a reader should know of how the picture came about.
pub(crate) fn notes(report: &Report) -> Vec<String> {
    let mut notes = Vec::new();
    let found = |how| {
        report
            .devices
            .iter()
            .filter(|device| device.found == how)
            .count()
    };
    let undescribed = match report.description_is {
        DescriptionSource::Nowhere => {
            ", and no description says what is in them (--description FILE takes one of another \
             stream)"
        }
        DescriptionSource::Elsewhere => ", decoded by the description of another stream",
        DescriptionSource::Stream => "",
    };
    for (how, by) in [
        (Found::ByFooter, "the footer behind each"),
        (
            Found::ByNextHeader,
            "the header behind them: the stream has no footers",
        ),
    ] {
        match found(how) {
            0 => {}
            devices => notes.push(format!(
                "{} found by {by}{undescribed}",
                count(devices as u64, "device section"),
            )),
        }
    }
    let ended = report.end.as_ref().ok();
    if ended.is_some() && found(Found::ByNextHeader) > 0 && report.description.is_none() {
        notes.push("whether the last device section is whole cannot be told".into());
    }
    if ended.is_some_and(|finish| finish.is_followed) {
        notes.push("more input follows the end of the stream".into());
    }
    notes
}

fn configuration(configuration: Option<&Configuration>) -> String {
    let Some(configuration) = configuration else {
        return String::new();
    };
    let mut parts = vec![match name::shown(&configuration.machine) {
        machine if machine.is_empty() => "no machine type".to_owned(),
        machine => format!("machine '{machine}'"),
    }];
    if let Some(bits) = configuration.page_bits {
        parts.push(format!("page bits {}", bits.bits()));
    }
    if let Some(names) = &configuration.capabilities {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        parts.push(format!("capabilities {}", names.join(" ")));
    }
    if let Some(uuid) = configuration.uuid {
        parts.push(format!("uuid {}", value::hex(&uuid)));
    }
    parts.join(", ")
}

fn ram_line(block: &RamBlockSummary) -> String {
    let pages = &block.pages;
    if let Some(mapped) = block.mapped {
        return format!(
            "{:>10} mapped: {} at {:#x}, the others zero",
            bytes(block.used_bytes),
            count(mapped.pages, "page"),
            mapped.pages_offset
        );
    }
    let repeated = match pages.repeated {
        Some(repeated) => repeated.to_string(),
        None if pages.records() == 0 => "0".into(),
        None => "?".into(),
    };
    let mut line = format!(
        "{:>10} {:>10} {:>10} {:>10} {:>10} {repeated:>10}",
        bytes(block.used_bytes),
        pages.zero,
        pages.data,
        pages.xbzrle,
        pages.compressed,
    );
    if pages.filled > 0 {
        line += &format!("  {} of another byte", pages.filled);
    }
    if let Some(page_bytes) = block.page_bytes {
        line += &format!("  pages of {}", bytes(page_bytes));
    }
    if let Some(address) = block.guest_address {
        line += &format!("  at {address:#x}");
    }
    line
}

/// Name of a field, with its place in its array or the array's length.
fn field_name(field: &SavedField) -> String {
    let name = Escaped(&field.name);
    match field.shape {
        Shape::One => name.to_string(),
        Shape::Array => format!("{name}[{}]", field.content.count()),
        Shape::Element { index, .. } => format!("{name}[{index}]"),
    }
}

fn title(state: &SavedState) -> String {
    format!("{} version {}", Escaped(&state.name), state.version)
}
