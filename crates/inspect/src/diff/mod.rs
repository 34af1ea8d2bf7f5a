//! How two streams differ, field by field.
//!
//! Sections are matched by name and instance, fields by name and place in their array, whatever
//! their order. What differs between any two streams of one machine is left out unless it is asked
//! for: where things stand, section ids, how often pages were sent, and clocks.

mod contents;

use std::collections::BTreeMap;

use vmferry_vmstate::{Content, SavedBody, SavedField, SavedState, Shape};

pub use contents::{ContentsError, Painting, compare, paint_disk, paint_memory};

use crate::report::{DeviceReport, DeviceState, RamBlockSummary, Report};

/// Elements of one array that are told; the others are counted.
const ELEMENTS_MAX: usize = 8;

/// The section that holds the machine's clocks.
const CLOCK_SECTION: &str = "timer";
/// The type of a field that is a point of time.
const CLOCK_TYPE: &str = "timer";
/// Fields that hold points of time, although their type does not say so.
const CLOCKS: [&str; 12] = [
    "base_rtc",
    "count_load_time",
    "env.tsc",
    "expire_time",
    "hpet_counter",
    "initial_count_load_time",
    "last_update",
    "next_alarm_time",
    "next_periodic_time",
    "next_time",
    "next_transition_time",
    "overflow_time",
];
/// The memory of a real-time clock, and the bytes of it that are the time: seconds, minutes, hours,
/// day of the week, day, month, year, century.
const RTC_MEMORY: &str = "cmos_data";
const RTC_TIME: [usize; 8] = [0, 2, 4, 6, 7, 8, 9, 0x32];

/// What to compare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiffOptions {
    /// Clocks, too.
    pub clocks: bool,
}

/// Something that is not the same in both streams.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Where: `machine`, `memory 'pc.ram'`, `device 'i8254' 0`.
    pub part: String,
    /// The device's section, if it is about one.
    pub device: Option<String>,
    /// Path of the field in a device; empty if it is about the whole part.
    pub field: String,
    /// What it is in each.
    pub sides: Sides,
}

/// What something is in two streams.
#[derive(Clone, Debug, PartialEq)]
pub enum Sides {
    /// Only in the first.
    OnlyFirst,
    /// Only in the second.
    OnlySecond,
    /// In both, and not the same; in words.
    Words(String, String),
    /// Fields of plain values.
    Fields(SavedField, SavedField),
    /// Buffers of the same length.
    Bytes {
        /// Bytes that differ.
        differ: usize,
        /// Length of both.
        bytes: usize,
        /// Where the first one stands in the buffer.
        first_at: usize,
    },
    /// More elements of the same array differ.
    MoreElements(usize),
    /// Content of memory or of a disk.
    Contents {
        /// Pages or chunks that differ.
        units: u64,
        /// Length of one.
        unit_bytes: usize,
        /// Where the first one starts.
        first_at: u64,
    },
}

/// Compare two streams, as far as each could be read.
#[must_use]
pub fn diff(first: &Report, second: &Report, options: DiffOptions) -> Vec<Difference> {
    let mut comparison = Comparison {
        options,
        part: String::new(),
        device: None,
        path: Vec::new(),
        found: Vec::new(),
    };
    comparison.headers(first, second);
    comparison.memory(first, second);
    comparison.disks(first, second);
    comparison.devices(first, second);
    comparison.found
}

struct Comparison {
    options: DiffOptions,
    part: String,
    device: Option<String>,
    path: Vec<String>,
    found: Vec<Difference>,
}

impl Comparison {
    fn tell(&mut self, sides: Sides) {
        let field = self.path.join("/").replace("/[", "[");
        self.found.push(Difference {
            part: self.part.clone(),
            device: self.device.clone(),
            field,
            sides,
        });
    }

    fn words(&mut self, first: &str, second: &str) {
        if first != second {
            self.tell(Sides::Words(first.to_owned(), second.to_owned()));
        }
    }

    fn headers(&mut self, first: &Report, second: &Report) {
        self.part = "machine".into();
        let machine = |report: &Report| report.machine().unwrap_or("(not named)").to_owned();
        self.words(&machine(first), &machine(second));
        self.part = "configuration".into();
        let capabilities = |report: &Report| {
            let configuration = report.configuration.as_ref();
            format!(
                "{:?}",
                configuration.map(|it| (&it.capabilities, it.uuid, it.page_bits))
            )
        };
        self.words(&capabilities(first), &capabilities(second));
        self.part = "section footers".into();
        let footers = |report: &Report| match report.footers {
            Some(true) => "yes",
            Some(false) => "no",
            None => "unknown",
        };
        self.words(footers(first), footers(second));
    }

    fn memory(&mut self, first: &Report, second: &Report) {
        let named = |report: &Report| -> BTreeMap<_, RamBlockSummary> {
            let blocks = report.ram.blocks.iter();
            blocks
                .map(|block| (block.name.to_string(), block.clone()))
                .collect()
        };
        let pairs = pairs(named(first), named(second));
        for (name, pair) in pairs {
            self.part = format!("memory '{name}'");
            let Some((first, second)) = self.both(pair) else {
                continue;
            };
            let length = |block: &RamBlockSummary| format!("{} bytes", block.used_bytes);
            self.words(&length(&first), &length(&second));
        }
    }

    fn disks(&mut self, first: &Report, second: &Report) {
        let named = |report: &Report| -> BTreeMap<_, _> {
            let disks = report.disks.iter();
            disks
                .map(|disk| (disk.name.to_string(), disk.end_bytes))
                .collect()
        };
        for (name, pair) in pairs(named(first), named(second)) {
            self.part = format!("disk '{name}'");
            let Some((first, second)) = self.both(pair) else {
                continue;
            };
            let reach = |end: u64| format!("reaches {end} bytes");
            self.words(&reach(first), &reach(second));
        }
    }

    fn devices(&mut self, first: &Report, second: &Report) {
        /// By name, instance, and which of several sections of both: some devices have that.
        fn named(report: &Report) -> BTreeMap<(String, u32, u32), &DeviceReport> {
            let mut times = BTreeMap::new();
            let devices = report.devices.iter().map(|device| {
                let section = &device.section;
                let key = (section.name.to_string(), section.instance.0);
                let time = times.entry(key.clone()).or_insert(0_u32);
                *time = time.saturating_add(1);
                ((key.0, key.1, *time), device)
            });
            devices.collect()
        }
        for ((name, instance, _), pair) in pairs(named(first), named(second)) {
            if name == CLOCK_SECTION && !self.options.clocks {
                continue;
            }
            self.part = format!("device '{name}' {instance}");
            self.device = Some(name);
            let Some((one, other)) = self.both(pair) else {
                continue;
            };
            let version = |device: &DeviceReport| format!("version {}", device.section.version);
            self.words(&version(one), &version(other));
            self.device(first.state(one), second.state(other), one, other);
        }
    }

    fn device(
        &mut self,
        first: DeviceState,
        second: DeviceState,
        one: &DeviceReport,
        other: &DeviceReport,
    ) {
        let described = |state| match state {
            DeviceState::Decoded(body) | DeviceState::Broken(body, _) => Some(body),
            DeviceState::Undescribed | DeviceState::NotKept => None,
        };
        match (described(first), described(second)) {
            (Some(SavedBody::Described(first)), Some(SavedBody::Described(second))) => {
                self.states(&first, &second);
            }
            // Bytes are all there is to compare.
            _ => match (&one.body, &other.body) {
                (Some(one), Some(other)) if one.len() == other.len() => self.bytes(one, other),
                _ => {
                    let bytes = |device: &DeviceReport| match &device.body {
                        Some(body) => format!("{} bytes, not described", body.len()),
                        None => format!("{} bytes, not kept", device.bytes),
                    };
                    self.words(&bytes(one), &bytes(other));
                }
            },
        }
    }

    fn states(&mut self, first: &SavedState, second: &SavedState) {
        let title = |state: &SavedState| format!("{} version {}", state.name, state.version);
        self.words(&title(first), &title(second));
        for ((name, time), pair) in pairs(fields(first), fields(second)) {
            self.path.push(match time {
                1 => name,
                time => format!("{name} #{time}"),
            });
            if let Some((first, second)) = self.both(pair) {
                self.fields(first, second);
            }
            self.path.pop();
        }
        fn named(state: &SavedState) -> BTreeMap<String, &SavedState> {
            let subsections = state.subsections.iter();
            subsections
                .map(|state| (state.name.to_string(), state))
                .collect()
        }
        for (name, pair) in pairs(named(first), named(second)) {
            self.path.push(format!("subsection {name}"));
            if let Some((first, second)) = self.both(pair) {
                self.states(first, second);
            }
            self.path.pop();
        }
    }

    fn fields(&mut self, first: &SavedField, second: &SavedField) {
        if !self.options.clocks && (is_clock(first) || is_clock(second)) {
            return;
        }
        match (&first.content, &second.content) {
            (Content::Structs(one), Content::Structs(other))
            | (Content::List(one), Content::List(other))
                if one.len() == other.len() =>
            {
                let single = matches!(first.content, Content::Structs(_)) && one.len() == 1;
                for (k, (one, other)) in one.iter().zip(other).enumerate() {
                    if single {
                        self.states(one, other);
                    } else {
                        self.path.push(format!("[{k}]"));
                        self.states(one, other);
                        self.path.pop();
                    }
                }
            }
            (one, other) if one == other => {}
            (Content::Plain { bytes: one, .. }, Content::Plain { bytes: other, .. })
                if !self.options.clocks
                    && &*first.name == RTC_MEMORY
                    && without_time(one) == without_time(other) => {}
            (Content::Plain { bytes: one, .. }, Content::Plain { bytes: other, .. })
                if first.holds_bytes() && second.holds_bytes() && one.len() == other.len() =>
            {
                self.bytes(one, other);
            }
            (Content::Tree(one), Content::Tree(other)) => self.trees(one, other),
            (Content::Plain { count: one, .. }, Content::Plain { count: other, .. })
                if first.shape == Shape::Array && one == other =>
            {
                self.elements(first, second);
            }
            (Content::Plain { .. }, Content::Plain { .. }) => {
                self.tell(Sides::Fields(first.clone(), second.clone()));
            }
            (one, other) => {
                let words = |content: &Content| match content {
                    Content::Plain { bytes, .. } => format!("{} bytes", bytes.len()),
                    Content::Structs(states) | Content::List(states) => {
                        format!("{} elements", states.len())
                    }
                    Content::Tree(nodes) => format!("{} nodes", nodes.len()),
                };
                self.tell(Sides::Words(words(one), words(other)));
            }
        }
    }

    /// Tell the elements of two arrays that differ.
    fn elements(&mut self, first: &SavedField, second: &SavedField) {
        let (Content::Plain { bytes: one, .. }, Content::Plain { bytes: other, .. }) =
            (&first.content, &second.content)
        else {
            return;
        };
        let size = first.element_bytes().max(1);
        let pairs = one.chunks(size).zip(other.chunks(size)).enumerate();
        let mut differ = pairs.filter(|(_, (one, other))| one != other);
        for (k, (one, other)) in differ.by_ref().take(ELEMENTS_MAX) {
            let element = |bytes: &[u8]| SavedField {
                name: first.name.clone(),
                kind: first.kind.clone(),
                shape: Shape::One,
                content: Content::plain(bytes),
            };
            self.path.push(format!("[{k}]"));
            self.tell(Sides::Fields(element(one), element(other)));
            self.path.pop();
        }
        match differ.count() {
            0 => {}
            more => self.tell(Sides::MoreElements(more)),
        }
    }

    /// Tell where two buffers of one length differ.
    fn bytes(&mut self, one: &[u8], other: &[u8]) {
        let pairs = one.iter().zip(other).enumerate();
        let mut differ = pairs.filter(|(_, (one, other))| one != other);
        if let Some((first_at, _)) = differ.next() {
            self.tell(Sides::Bytes {
                differ: differ.count().saturating_add(1),
                bytes: one.len(),
                first_at,
            });
        }
    }

    /// Nodes of trees are matched by their keys.
    fn trees(&mut self, one: &[(Content, SavedState)], other: &[(Content, SavedState)]) {
        fn named(nodes: &[(Content, SavedState)]) -> BTreeMap<Vec<u8>, &SavedState> {
            let nodes = nodes.iter().map(|(key, value)| {
                let mut name = Vec::new();
                key.encode(&mut name);
                (name, value)
            });
            nodes.collect()
        }
        for (k, (_, pair)) in pairs(named(one), named(other)).into_iter().enumerate() {
            self.path.push(format!("[{k}]"));
            if let Some((one, other)) = self.both(pair) {
                self.states(one, other);
            }
            self.path.pop();
        }
    }

    /// Both of a pair; if one is missing, that is told.
    fn both<T>(&mut self, pair: Pair<T>) -> Option<(T, T)> {
        match pair {
            (Some(first), Some(second)) => Some((first, second)),
            (Some(_), None) => {
                self.tell(Sides::OnlyFirst);
                None
            }
            (None, Some(_)) => {
                self.tell(Sides::OnlySecond);
                None
            }
            (None, None) => None,
        }
    }
}

/// The fields of a state by name, place in an array, and which of several they are.
fn fields(state: &SavedState) -> BTreeMap<(String, u32), &SavedField> {
    let mut times = BTreeMap::new();
    let fields = state.fields.iter().map(|field| {
        let name = match field.shape {
            Shape::Element { index, .. } => format!("{}[{index}]", field.name),
            Shape::One | Shape::Array => field.name.to_string(),
        };
        let time = times.entry(name.clone()).or_insert(0_u32);
        *time = time.saturating_add(1);
        ((name, *time), field)
    });
    fields.collect()
}

fn is_clock(field: &SavedField) -> bool {
    let name = &*field.name;
    let last = name.rsplit('.').next().unwrap_or(name);
    field.kind.as_str() == CLOCK_TYPE || CLOCKS.contains(&name) || CLOCKS.contains(&last)
}

fn without_time(memory: &[u8]) -> Vec<u8> {
    let bytes = memory.iter().enumerate();
    let bytes = bytes.filter(|(place, _)| !RTC_TIME.contains(place));
    bytes.map(|(_, byte)| *byte).collect()
}

/// What two maps have for the same key.
type Pair<T> = (Option<T>, Option<T>);

/// All keys of two maps, with what each map has for them.
fn pairs<K: Ord + Clone, T>(
    first: BTreeMap<K, T>,
    mut second: BTreeMap<K, T>,
) -> Vec<(K, Pair<T>)> {
    let mut all: Vec<_> = first
        .into_iter()
        .map(|(key, one)| {
            let other = second.remove(&key);
            (key, (Some(one), other))
        })
        .collect();
    all.extend(
        second
            .into_iter()
            .map(|(key, other)| (key, (None, Some(other)))),
    );
    all.sort_by(|(one, _), (other, _)| one.cmp(other));
    all
}
