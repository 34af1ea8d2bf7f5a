//! What is in a stream, as JSON. It is written piece by piece: devices may hold much.

use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::{Value as Json, json};
use vmferry_inspect::{
    Container, DescriptionSource, DeviceReport, DeviceState, Found, Item, ItemKind, Report,
};
use vmferry_stream::{Section, SectionKind};
use vmferry_vmstate::{BodyError, Content, Node, Part, SavedBody, SavedField, SavedState, Shape};

use super::inspect::{Shown, notes};
use super::{name, value};
use crate::flags::device_glob;

/// The report as one object. With devices chosen only these are in it.
pub(crate) struct ReportJson<'a> {
    pub(crate) report: &'a Report,
    pub(crate) shown: &'a Shown,
}

impl Serialize for ReportJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let (report, shown) = (self.report, self.shown);
        let mut map = out.serialize_map(None)?;
        if !shown.devices.is_empty() {
            map.serialize_entry("devices", &Chosen(self))?;
            return map.end();
        }
        map.serialize_entry("machine", &report.machine().map(name::shown))?;
        map.serialize_entry("run_state", &report.run_state())?;
        map.serialize_entry("container", &container(report))?;
        map.serialize_entry("start", &report.start)?;
        map.serialize_entry("footers", &report.footers)?;
        map.serialize_entry("complete", &report.end.is_ok())?;
        match &report.end {
            Ok(finish) => map.serialize_entry("bytes", &finish.bytes)?,
            Err(error) => map.serialize_entry("error", &name::message(&error.to_string()))?,
        }
        let description = match report.description_is {
            DescriptionSource::Nowhere => "none",
            DescriptionSource::Stream => "stream",
            DescriptionSource::Elsewhere => "other",
        };
        map.serialize_entry("description", description)?;
        map.serialize_entry("configuration", &configuration(report))?;
        map.serialize_entry("items", &Items(self))?;
        map.serialize_entry("items_left_out", &report.items_left_out)?;
        map.serialize_entry("ram", &ram(report))?;
        map.serialize_entry("disks", &disks(report))?;
        map.serialize_entry("bitmaps", &bitmaps(report))?;
        map.serialize_entry("notes", &notes(report))?;
        map.serialize_entry("problems", &problems(report))?;
        map.serialize_entry("problems_left_out", &report.problems_left_out)?;
        map.end()
    }
}

/// All items in their order.
struct Items<'a>(&'a ReportJson<'a>);

impl Serialize for Items<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let ReportJson { report, shown } = *self.0;
        let items = report.items.iter();
        out.collect_seq(items.map(|item| ItemJson {
            report,
            shown,
            item,
        }))
    }
}

/// The devices that were asked for.
struct Chosen<'a>(&'a ReportJson<'a>);

impl Serialize for Chosen<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let ReportJson { report, shown } = *self.0;
        let chosen = report.items.iter().filter(|item| {
            let device = device_of(report, item);
            device.is_some_and(|it| device_glob::chosen(&shown.devices, &it.section.name))
        });
        out.collect_seq(chosen.map(|item| ItemJson {
            report,
            shown,
            item,
        }))
    }
}

fn device_of<'a>(report: &'a Report, item: &Item) -> Option<&'a DeviceReport> {
    match item.kind {
        ItemKind::Device(place) => report.devices.get(place),
        _ => None,
    }
}

struct ItemJson<'a> {
    report: &'a Report,
    shown: &'a Shown,
    item: &'a Item,
}

impl Serialize for ItemJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let item = self.item;
        let mut map = out.serialize_map(None)?;
        match &item.kind {
            ItemKind::Device(_) => {
                if let Some(device) = device_of(self.report, item) {
                    section_entries("device", &device.section, &mut map)?;
                }
            }
            ItemKind::Section(section) => section_entries("section", section, &mut map)?,
            ItemKind::Header => {
                map.serialize_entry("kind", "header")?;
                map.serialize_entry("version", &3)?;
            }
            ItemKind::Configuration => map.serialize_entry("kind", "configuration")?,
            ItemKind::Command { name, detail } => {
                map.serialize_entry("kind", "command")?;
                map.serialize_entry("command", name)?;
                map.serialize_entry("detail", detail)?;
            }
            ItemKind::Package => map.serialize_entry("kind", "package")?,
            ItemKind::Eof => map.serialize_entry("kind", "eof")?,
            ItemKind::Description => map.serialize_entry("kind", "description")?,
        }
        map.serialize_entry("offset", &item.offset)?;
        map.serialize_entry("bytes", &item.bytes)?;
        if item.count > 1 {
            map.serialize_entry("count", &item.count)?;
        }
        if item.in_package {
            map.serialize_entry("in_package", &true)?;
        }
        if let Some(device) = device_of(self.report, item) {
            self.device_entries(device, &mut map)?;
        }
        map.end()
    }
}

impl ItemJson<'_> {
    fn device_entries<M: SerializeMap>(
        &self,
        device: &DeviceReport,
        map: &mut M,
    ) -> Result<(), M::Error> {
        map.serialize_entry("body_offset", &device.offset)?;
        map.serialize_entry("body_bytes", &device.bytes)?;
        let found = match device.found {
            Found::ByDescription => "description",
            Found::ByFooter => "footer",
            Found::ByNextHeader => "next-header",
            Found::Cut => "cut",
        };
        map.serialize_entry("found", found)?;
        match self.report.state(device) {
            DeviceState::Decoded(body) => self.body_entries(&body, device, map),
            DeviceState::Broken(body, error) => {
                self.body_entries(&body, device, map)?;
                map.serialize_entry("error", &error_json(device, &error))
            }
            DeviceState::Undescribed | DeviceState::NotKept => match &device.body {
                Some(body) if self.shown.hex => map.serialize_entry("hex", &value::hex(body)),
                _ => Ok(()),
            },
        }
    }

    fn body_entries<M: SerializeMap>(
        &self,
        body: &SavedBody,
        device: &DeviceReport,
        map: &mut M,
    ) -> Result<(), M::Error> {
        match body {
            SavedBody::Described(state) => map.serialize_entry(
                "state",
                &StateJson {
                    state,
                    at: device.offset,
                    shown: self.shown,
                },
            ),
            SavedBody::OldStyle(data) => {
                map.serialize_entry("data_bytes", &data.len())?;
                if self.shown.hex {
                    map.serialize_entry("hex", &value::hex(data))?;
                }
                Ok(())
            }
        }
    }
}

fn section_entries<M: SerializeMap>(
    kind: &str,
    section: &Section,
    map: &mut M,
) -> Result<(), M::Error> {
    let section_type = match section.kind {
        SectionKind::Start => "START",
        SectionKind::Part => "PART",
        SectionKind::End => "END",
        SectionKind::Full => "FULL",
    };
    map.serialize_entry("kind", kind)?;
    map.serialize_entry("type", section_type)?;
    map.serialize_entry("name", &name::shown(&section.name))?;
    map.serialize_entry("instance", &section.instance.0)?;
    map.serialize_entry("id", &section.id.0)?;
    map.serialize_entry("version", &section.version)
}

fn error_json(device: &DeviceReport, error: &BodyError) -> Json {
    json!({
        "offset": device.offset.saturating_add(error.offset as u64),
        "field": error.field,
        "problem": error.fault.to_string(),
    })
}

/// A state that starts at byte `at` of the input.
struct StateJson<'a> {
    state: &'a SavedState,
    at: u64,
    shown: &'a Shown,
}

impl Serialize for StateJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(None)?;
        map.serialize_entry("name", &*self.state.name)?;
        map.serialize_entry("version", &self.state.version)?;
        map.serialize_entry("fields", &Fields(self))?;
        if !self.state.subsections.is_empty() {
            map.serialize_entry("subsections", &Subsections(self))?;
        }
        map.end()
    }
}

struct Fields<'a>(&'a StateJson<'a>);

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let StateJson { state, at, shown } = *self.0;
        out.collect_seq(state.parts(at).filter_map(|part| match part {
            Part::Field(at, field) => Some(FieldJson { field, at, shown }),
            Part::Subsection(..) => None,
        }))
    }
}

struct Subsections<'a>(&'a StateJson<'a>);

impl Serialize for Subsections<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let StateJson { state, at, shown } = *self.0;
        out.collect_seq(state.parts(at).filter_map(|part| match part {
            Part::Field(..) => None,
            Part::Subsection(at, state) => Some(StateJson { state, at, shown }),
        }))
    }
}

/// A field that starts at byte `at` of the input.
struct FieldJson<'a> {
    field: &'a SavedField,
    at: u64,
    shown: &'a Shown,
}

impl Serialize for FieldJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let field = self.field;
        let mut map = out.serialize_map(None)?;
        map.serialize_entry("name", &*field.name)?;
        map.serialize_entry("type", field.kind.as_str())?;
        if let Shape::Element { index, .. } = field.shape {
            map.serialize_entry("index", &index)?;
        }
        if self.shown.offsets {
            map.serialize_entry("offset", &self.at)?;
        }
        let states = States {
            content: &field.content,
            at: self.at,
            shown: self.shown,
        };
        match &field.content {
            Content::Plain { .. } => map.serialize_entry(
                "value",
                &value::PlainJson {
                    field,
                    with_bytes: self.shown.hex,
                },
            )?,
            Content::Structs(_) => map.serialize_entry("structs", &states)?,
            Content::List(_) => map.serialize_entry("list", &states)?,
            Content::Tree(_) => map.serialize_entry("tree", &Nodes(&states))?,
        }
        map.end()
    }
}

/// What is inside a field that starts at byte `at` of the input.
struct States<'a> {
    content: &'a Content,
    at: u64,
    shown: &'a Shown,
}

impl Serialize for States<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let shown = self.shown;
        let states = self.content.states(self.at);
        out.collect_seq(states.map(|(at, state)| StateJson { state, at, shown }))
    }
}

struct Nodes<'a>(&'a States<'a>);

impl Serialize for Nodes<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let States { content, at, shown } = *self.0;
        out.collect_seq(content.nodes(at).map(|node| NodeJson { node, shown }))
    }
}

struct NodeJson<'a> {
    node: Node<'a>,
    shown: &'a Shown,
}

impl Serialize for NodeJson<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let (node, shown) = (&self.node, self.shown);
        let mut map = out.serialize_map(None)?;
        match node.key {
            Content::Plain { bytes, .. } => map.serialize_entry("key", &value::hex(bytes))?,
            content => map.serialize_entry(
                "key",
                &States {
                    content,
                    at: node.key_at,
                    shown,
                },
            )?,
        }
        map.serialize_entry(
            "value",
            &StateJson {
                state: node.value,
                at: node.value_at,
                shown,
            },
        )?;
        map.end()
    }
}

fn container(report: &Report) -> Json {
    match &report.container {
        Container::None => Json::Null,
        Container::Libvirt(header) => json!({
            "type": "libvirt",
            "version": header.version,
            "was_running": header.was_running,
            "is_unfinished": header.is_unfinished,
        }),
    }
}

fn configuration(report: &Report) -> Json {
    report
        .configuration
        .as_ref()
        .map_or(Json::Null, |configuration| {
            let capabilities = configuration.capabilities.as_ref();
            json!({
                "machine": name::shown(&configuration.machine),
                "page_bits": configuration.page_bits.map(vmferry_stream::PageBits::bits),
                "capabilities": capabilities.map(|names| {
                    names.iter().map(vmferry_stream::Name::as_str).collect::<Vec<_>>()
                }),
                "uuid": configuration.uuid.map(|uuid| value::hex(&uuid)),
            })
        })
}

fn ram(report: &Report) -> Json {
    let blocks = report.ram.blocks.iter().map(|block| {
        let pages = &block.pages;
        json!({
            "name": name::shown(&block.name),
            "bytes": block.used_bytes,
            "page_bytes": block.page_bytes,
            "guest_address": block.guest_address,
            "mapped": block.mapped.map(|mapped| json!({
                "bitmap_offset": mapped.bitmap_offset,
                "pages_offset": mapped.pages_offset,
                "pages": mapped.pages,
            })),
            "zero": pages.zero,
            "filled": pages.filled,
            "data": pages.data,
            "xbzrle": pages.xbzrle,
            "xbzrle_bytes": pages.xbzrle_bytes,
            "compressed": pages.compressed,
            "compressed_bytes": pages.compressed_bytes,
            "repeated": pages.repeated,
        })
    });
    json!({
        "bytes": report.ram.total_bytes,
        "blocks": blocks.collect::<Vec<_>>(),
        "multifd_flushes": report.ram.multifd_flushes,
    })
}

fn disks(report: &Report) -> Json {
    let disks = report.disks.iter().map(|disk| {
        json!({
            "name": name::shown(&disk.name),
            "data_chunks": disk.data_chunks,
            "zero_chunks": disk.zero_chunks,
            "end_bytes": disk.end_bytes,
        })
    });
    disks.collect()
}

fn bitmaps(report: &Report) -> Json {
    let bitmaps = report.bitmaps.iter().map(|bitmap| {
        json!({
            "node": name::shown(&bitmap.node),
            "name": name::shown(&bitmap.name),
            "granularity_bytes": bitmap.granularity_bytes,
            "flags": bitmap.flags.0,
            "chunks": bitmap.chunks,
            "zero_chunks": bitmap.zero_chunks,
            "bits_set": bitmap.bits_set,
            "complete": bitmap.is_complete,
        })
    });
    bitmaps.collect()
}

fn problems(report: &Report) -> Json {
    let problems = report.problems.iter().map(|problem| {
        json!({
            "offset": problem.offset,
            "section": name::shown(&problem.section),
            "problem": name::message(&problem.text),
        })
    });
    problems.collect()
}
