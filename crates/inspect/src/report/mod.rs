//! What is in a stream, as one bounded picture.
//!
//! Sections, commands and devices stand in stream order, PARTs of a section with nothing but other
//! PARTs between them counted as one; pages, chunks and bits are counted. A broken stream has a report, too: what was
//! before the break, and what is wrong.

mod contents;
mod ram;
mod reporter;

use std::io::Read;

use vmferry_stream::{Configuration, Ending, Section};
use vmferry_vmstate::{BodyError, DeviceLayout, SavedBody, VmDescription};

use crate::container::Container;
use crate::layouts::Layouts;
use crate::walk::{Finish, Found, WalkError, walk};

pub use contents::{BitmapSummary, DiskSummary};
pub use ram::{MappedSummary, PageCounts, RamBlockSummary, RamSummary};

/// What is in a stream.
#[derive(Debug)]
pub struct Report {
    /// What stands before the stream.
    pub container: Container,
    /// Where the stream begins in the input.
    pub start: u64,
    /// The configuration section, if there is one.
    pub configuration: Option<Configuration>,
    /// Do sections end in footers? `None` if no section ended.
    pub footers: Option<bool>,
    /// What the stream consists of, in its order; at most [`crate::limits::REPORT_ITEMS_MAX`].
    pub items: Vec<Item>,
    /// Items that were left out behind the last.
    pub items_left_out: u64,
    /// The devices, in stream order; at most [`crate::limits::REPORT_DEVICES_MAX`].
    pub devices: Vec<DeviceReport>,
    /// Guest memory.
    pub ram: RamSummary,
    /// Disks of `block` sections, in the order in which they appear.
    pub disks: Vec<DiskSummary>,
    /// Bitmaps of `dirty-bitmap` sections, in the order in which they appear.
    pub bitmaps: Vec<BitmapSummary>,
    /// The description, read.
    pub description: Option<VmDescription>,
    /// Where the description is from.
    pub description_is: DescriptionSource,
    /// Things that are wrong although the stream could be read on.
    pub problems: Vec<Problem>,
    /// Problems that were left out.
    pub problems_left_out: u64,
    /// How the stream ended, or why it could not be read on.
    pub end: Result<Finish, WalkError>,
}

/// Where a description is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DescriptionSource {
    /// There is none.
    Nowhere,
    /// The stream itself.
    Stream,
    /// Another stream.
    Elsewhere,
}

/// A piece of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Where it starts in the input.
    pub offset: u64,
    /// Its length, payload and footer included; of all, if there are several.
    pub bytes: u64,
    /// How many of this kind stand here one after another, or in turn with PARTs of other sections.
    pub count: u64,
    /// It is inside a package.
    pub in_package: bool,
    /// What it is.
    pub kind: ItemKind,
}

/// What a piece of a stream is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ItemKind {
    /// Magic and version.
    Header,
    /// The configuration section.
    Configuration,
    /// A live section (START, PART, END), or a FULL section of something that is no device.
    Section(Section),
    /// A device; index in [`Report::devices`].
    Device(usize),
    /// A command.
    Command {
        /// QEMU's name.
        name: &'static str,
        /// Its payload, in words; of the first, if there are several.
        detail: String,
    },
    /// A package; the items inside follow.
    Package,
    /// The end of the guest's state.
    Eof,
    /// The description.
    Description,
}

/// A device's section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    /// Its header.
    pub section: Section,
    /// Where its body starts in the input.
    pub offset: u64,
    /// Length of its body.
    pub bytes: u64,
    /// Its body, unless too much was kept already.
    pub body: Option<Vec<u8>>,
    /// How the body's end was found.
    pub found: Found,
    /// Its place in the description, if it is described.
    pub described_as: Option<usize>,
}

/// What a device's body holds.
#[derive(Clone, Debug)]
pub enum DeviceState {
    /// Decoded, with its layout.
    Decoded(SavedBody),
    /// Not laid out as described; what stands before that is decoded.
    Broken(SavedBody, BodyError),
    /// Nothing describes it.
    Undescribed,
    /// Too much was kept before.
    NotKept,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where it stands in the input.
    pub offset: u64,
    /// The section.
    pub section: String,
    /// What is wrong, and what was expected.
    pub text: String,
}

impl Report {
    /// Read a stream to its end, or as far as it can be read.
    #[must_use]
    pub fn of(input: impl Read) -> Self {
        let mut reporter = reporter::Reporter::default();
        let end = walk(input, &mut reporter);
        reporter.finish(end)
    }

    /// Decode devices by this description, if the stream has none.
    pub fn describe_by(&mut self, description: VmDescription) {
        if self.description_is == DescriptionSource::Nowhere {
            place_in_description(&mut self.devices, &description);
            self.description = Some(description);
            self.description_is = DescriptionSource::Elsewhere;
        }
    }

    /// The layout of a device, if it is described.
    #[must_use]
    pub fn layout(&self, device: &DeviceReport) -> Option<&DeviceLayout> {
        let description = self.description.as_ref()?;
        description.devices.get(device.described_as?)
    }

    /// What a device's body holds.
    #[must_use]
    pub fn state(&self, device: &DeviceReport) -> DeviceState {
        let Some(layout) = self.layout(device) else {
            return DeviceState::Undescribed;
        };
        let Some(body) = &device.body else {
            return DeviceState::NotKept;
        };
        match layout.decode_partly(body) {
            (saved, None) => DeviceState::Decoded(saved),
            (saved, Some(error)) => DeviceState::Broken(saved, error),
        }
    }

    /// Machine type, if the stream names one.
    #[must_use]
    pub fn machine(&self) -> Option<&str> {
        let configuration = self.configuration.as_ref()?;
        Some(configuration.machine.as_str())
    }

    /// Run state of the guest when it was saved, such as `running`, if the stream says it.
    #[must_use]
    pub fn run_state(&self) -> Option<String> {
        let mut devices = self.devices.iter();
        let device = devices.find(|device| device.section.name == "globalstate")?;
        // A length, then the name in 100 bytes, padded with zeroes.
        let name = device.body.as_deref()?.get(4..)?;
        let name = name.split(|byte| *byte == 0).next()?;
        let is_name = !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
        is_name.then(|| String::from_utf8_lossy(name).into_owned())
    }

    /// Is nothing wrong with the stream, its devices included?
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.end.is_ok()
            && self.problems.is_empty()
            && !self
                .devices
                .iter()
                .any(|device| matches!(self.state(device), DeviceState::Broken(..)))
    }

    /// Did the stream end with its description?
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.end.as_ref().ok().map(|finish| finish.ending)
    }
}

/// Find each device of a stream in a description.
fn place_in_description(devices: &mut [DeviceReport], description: &VmDescription) -> Layouts {
    let mut layouts = Layouts::of(description);
    for device in devices {
        device.described_as = layouts.next(&device.section).map(|layout| layout.place);
    }
    layouts
}
