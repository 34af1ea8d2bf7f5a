//! The visitor that makes a report.

use vmferry_stream::{
    Command, Configuration, Content, Ending, Name, Record, Section, SectionKind, Shown,
};
use vmferry_vmstate::{BodyLayout, VmDescription};

use super::contents::{Bitmaps, Disks};
use super::ram::RamTally;
use super::{
    DescriptionSource, DeviceReport, Item, ItemKind, Problem, Report, place_in_description,
};
use crate::container::Container;
use crate::limits::{
    HELD_BYTES_MAX, PROBLEMS_MAX, REPORT_DEVICES_MAX, REPORT_ITEMS_MAX, REPORT_NAMES_MAX,
};
use crate::walk::{Body, Event, Finish, VisitError, Visitor, WalkError};

/// Live sections whose PARTs are counted together although they take turns.
const SECTIONS_IN_TURN_MAX: usize = 16;

/// Collects what a walk tells.
#[derive(Debug)]
pub(super) struct Reporter {
    container: Container,
    start: Option<u64>,
    configuration: Option<Configuration>,
    footers: Option<bool>,
    items: Vec<Item>,
    items_left_out: u64,
    devices: Vec<DeviceReport>,
    has_too_many_devices: bool,
    /// Bytes of device state that can still be kept.
    keep_bytes: usize,
    ram: RamTally,
    disks: Disks,
    bitmaps: Bitmaps,
    description: Option<VmDescription>,
    problems: Vec<Problem>,
    problems_left_out: u64,
    /// The section that records are about.
    open: Option<Section>,
    /// Where the item that is not over yet starts.
    item: Option<(u64, ItemKind)>,
    in_package: bool,
    /// The item of the package, and where what is in it starts.
    package: Option<(usize, u64)>,
    /// Where the end of a section was told: what is told next is behind its footer.
    section_end: Option<u64>,
}

impl Default for Reporter {
    fn default() -> Self {
        Self {
            container: Container::None,
            start: None,
            configuration: None,
            footers: None,
            items: Vec::new(),
            items_left_out: 0,
            devices: Vec::new(),
            has_too_many_devices: false,
            keep_bytes: HELD_BYTES_MAX,
            ram: RamTally::default(),
            disks: Disks::default(),
            bitmaps: Bitmaps::default(),
            description: None,
            problems: Vec::new(),
            problems_left_out: 0,
            open: None,
            item: None,
            in_package: false,
            package: None,
            section_end: None,
        }
    }
}

impl Reporter {
    pub(super) fn finish(mut self, end: Result<Finish, WalkError>) -> Report {
        let reached = match &end {
            Ok(finish) => finish.bytes,
            Err(WalkError::Stream(error)) => error.offset,
            Err(_) => self.item.as_ref().map_or(0, |(offset, _)| *offset),
        };
        self.end_item(reached);
        self.open = None;
        if let Ok(finish) = &end
            && finish.is_followed
            && finish.ending == Ending::WithoutDescription
        {
            let text = "the stream ends before this byte without a description, and more follows";
            self.problem(finish.bytes, text.into());
        }
        self.compare_with_description(end.as_ref().ok());
        Report {
            container: self.container,
            start: self.start.unwrap_or(0),
            configuration: self.configuration,
            footers: self.footers,
            items: self.items,
            items_left_out: self.items_left_out,
            devices: self.devices,
            ram: self.ram.summary,
            disks: self.disks.0,
            bitmaps: self.bitmaps.all,
            description_is: match &self.description {
                Some(_) => DescriptionSource::Stream,
                None => DescriptionSource::Nowhere,
            },
            description: self.description,
            problems: self.problems,
            problems_left_out: self.problems_left_out,
            end,
        }
    }

    /// The description tells of the devices that are in the stream, in the versions in which they are.
    fn compare_with_description(&mut self, end: Option<&Finish>) {
        let Some(description) = self.description.take() else {
            return;
        };
        let layouts = place_in_description(&mut self.devices, &description);
        let wrong = self.devices.iter().filter_map(|device| {
            let section = &device.section;
            let layout = device.described_as;
            let Some(layout) = layout.and_then(|place| description.devices.get(place)) else {
                let text = "the description does not have this device".to_owned();
                return Some((device.offset, section.clone(), text));
            };
            let version = match &layout.body {
                BodyLayout::Described(state) => state.version,
                BodyLayout::OldStyle { .. } => return None,
            };
            let text = format!("version {}, but described as {version}", section.version);
            (version != section.version).then(|| (device.offset, section.clone(), text))
        });
        for (offset, section, text) in wrong.collect::<Vec<_>>() {
            self.open = Some(section);
            self.problem(offset, text);
        }
        if let Some(end) = end {
            self.open = None;
            for (name, instance) in layouts.missing() {
                let name = Shown(name);
                let text = format!("device '{name}' {instance} is described and not there");
                self.problem(end.bytes, text);
            }
        }
        self.description = Some(description);
    }

    /// An item begins at `offset`, and with it the one before is over.
    fn begin_item(&mut self, offset: u64, kind: ItemKind) {
        self.end_item(offset);
        self.item = Some((offset, kind));
    }

    fn end_item(&mut self, end: u64) {
        let Some((offset, kind)) = self.item.take() else {
            return;
        };
        let bytes = end.saturating_sub(offset);
        if let Some(same) = self.item_of_same_kind(&kind) {
            same.bytes = same.bytes.saturating_add(bytes);
            same.count = same.count.saturating_add(1);
            return;
        }
        if self.items.len() >= REPORT_ITEMS_MAX {
            self.items_left_out = self.items_left_out.saturating_add(1);
            return;
        }
        self.items.push(Item {
            offset,
            bytes,
            count: 1,
            in_package: self.in_package,
            kind,
        });
    }

    /// The item that one more of this kind belongs to: the last one, or one with nothing but PARTs of
    /// other sections behind it. QEMU 10.0 lets live sections take turns, tens of thousands of times.
    fn item_of_same_kind(&mut self, kind: &ItemKind) -> Option<&mut Item> {
        let mut last = self.items.iter().rev().take(SECTIONS_IN_TURN_MAX);
        let back =
            last.position(|item| belong_together(&item.kind, kind) || !is_part(&item.kind))?;
        let place = self.items.len().checked_sub(back.checked_add(1)?)?;
        let item = self.items.get_mut(place)?;
        let is_it = item.in_package == self.in_package && belong_together(&item.kind, kind);
        is_it.then_some(item)
    }

    fn problem(&mut self, offset: u64, text: String) {
        if self.problems.len() >= PROBLEMS_MAX {
            self.problems_left_out = self.problems_left_out.saturating_add(1);
            return;
        }
        let section = self.open.as_ref();
        self.problems.push(Problem {
            offset,
            section: section.map_or(String::new(), |section| section.name.to_string()),
            text,
        });
    }

    fn too_many(&mut self, offset: u64, what: &str) {
        self.problem(offset, format!("more than {REPORT_NAMES_MAX} {what}"));
    }

    fn command(&mut self, offset: u64, command: &Command) {
        let kind = match command {
            Command::Packaged { .. } => ItemKind::Package,
            command => ItemKind::Command {
                name: command.name(),
                detail: detail(command),
            },
        };
        self.begin_item(offset, kind);
    }
}

impl Visitor for Reporter {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Container(container) => self.container = container.clone(),
            Event::Record(offset, record) => self.record(offset, record),
            Event::Payload(offset, bytes) => self.payload(offset, bytes),
            Event::Package(offset) => self.package(offset),
            Event::PackageEnd(offset) => self.package_end(offset),
            Event::Device(body) => self.device(body),
            Event::Description(description) => match description.parsed {
                Ok(parsed) => self.description = Some(parsed),
                Err(error) => self.problem(description.offset, error.to_string()),
            },
        }
        Ok(())
    }
}

impl Reporter {
    fn record(&mut self, offset: u64, record: &Record) {
        if let Some(end) = self.section_end.take() {
            self.footers.get_or_insert(offset > end);
        }
        match record {
            Record::Header { .. } => {
                self.start = Some(offset);
                self.begin_item(offset, ItemKind::Header);
            }
            Record::Configuration(configuration) => {
                if let Some(bits) = configuration.page_bits {
                    self.ram.page_bits = bits;
                }
                self.configuration = Some(configuration.clone());
                self.begin_item(offset, ItemKind::Configuration);
            }
            Record::Section(section) => {
                self.open = Some(section.clone());
                // A device becomes an item when its body is told.
                self.begin_item(offset, ItemKind::Section(section.clone()));
            }
            Record::SectionEnd { .. } => {
                self.open = None;
                self.section_end = Some(offset);
            }
            Record::Ram(record) => {
                if let Err(text) = self.ram.record(record) {
                    self.problem(offset, text);
                }
            }
            Record::Block(chunk) => {
                if !self.disks.count(chunk) {
                    self.too_many(offset, "disks");
                }
            }
            Record::Bitmap(record) => {
                if !self.bitmaps.count(record) {
                    self.too_many(offset, "bitmaps");
                }
            }
            Record::Command(command) => self.command(offset, command),
            Record::DiscardRange(_) => {}
            Record::Eof => self.begin_item(offset, ItemKind::Eof),
            Record::Description { .. } => self.begin_item(offset, ItemKind::Description),
        }
    }

    fn payload(&mut self, offset: u64, bytes: &[u8]) {
        match self.open.as_ref().map(Section::content) {
            Some(Content::Ram) => {
                if let Err(text) = self.ram.payload(bytes) {
                    self.problem(offset, text);
                }
            }
            Some(Content::DirtyBitmap) => self.bitmaps.payload(bytes),
            Some(Content::Block | Content::Device) | None => {}
        }
    }

    fn package(&mut self, offset: u64) {
        self.end_item(offset);
        self.package = Some((self.items.len().saturating_sub(1), offset));
        self.in_package = true;
    }

    fn package_end(&mut self, offset: u64) {
        self.end_item(offset);
        self.in_package = false;
        if let Some((place, start)) = self.package.take()
            && let Some(item) = self.items.get_mut(place)
        {
            item.bytes = item.bytes.saturating_add(offset.saturating_sub(start));
        }
    }

    fn device(&mut self, body: Body<'_>) {
        if self.devices.len() >= REPORT_DEVICES_MAX {
            if !self.has_too_many_devices {
                self.has_too_many_devices = true;
                self.problem(
                    body.offset,
                    format!("more than {REPORT_DEVICES_MAX} devices"),
                );
            }
            return;
        }
        let kept = self.keep_bytes.checked_sub(body.bytes.len());
        self.keep_bytes = kept.unwrap_or(self.keep_bytes);
        if let Some((_, kind)) = &mut self.item
            && matches!(kind, ItemKind::Section(section) if section.kind == SectionKind::Full)
        {
            *kind = ItemKind::Device(self.devices.len());
        }
        self.devices.push(DeviceReport {
            section: body.section.clone(),
            offset: body.offset,
            bytes: u64::try_from(body.bytes.len()).unwrap_or(u64::MAX),
            body: kept.map(|_| body.bytes.to_vec()),
            found: body.found,
            described_as: None,
        });
    }
}

fn is_part(kind: &ItemKind) -> bool {
    matches!(kind, ItemKind::Section(section) if section.kind == SectionKind::Part)
}

/// PARTs of one section, and commands of one kind, are counted as one item.
fn belong_together(last: &ItemKind, next: &ItemKind) -> bool {
    match (last, next) {
        (ItemKind::Section(last), ItemKind::Section(next)) => {
            last.kind == SectionKind::Part && next.kind == SectionKind::Part && last.id == next.id
        }
        (ItemKind::Command { name: last, .. }, ItemKind::Command { name: next, .. }) => {
            last == next
        }
        _ => false,
    }
}

/// A command's payload, in words.
fn detail(command: &Command) -> String {
    let block = |name: &Name| format!("'{name}'");
    match command {
        Command::Ping(value) => value.to_string(),
        Command::PostcopyAdvise(Some(sizes)) => format!(
            "page sizes {:#x}, guest page size {:#x}",
            sizes.all_bytes, sizes.target_bytes
        ),
        Command::PostcopyAdvise(None) => "no RAM".into(),
        Command::PostcopyRamDiscard {
            block: name,
            ranges,
        } => {
            format!("{}, {ranges} ranges", block(name))
        }
        Command::ReceivedBitmap(name) => block(name),
        Command::Packaged { .. }
        | Command::OpenReturnPath
        | Command::PostcopyListen
        | Command::PostcopyRun
        | Command::EnableColo
        | Command::PostcopyResume
        | Command::SwitchoverStart => String::new(),
    }
}
