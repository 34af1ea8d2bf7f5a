//! What is in a stream, as JSON.

use serde_json::{Map, Value as Json, json};
use vmferry_inspect::{
    Container, DescriptionSource, DeviceReport, DeviceState, Found, Item, ItemKind, Report,
};
use vmferry_stream::{Section, SectionKind};
use vmferry_vmstate::{Content, SavedBody, SavedField, SavedState, Shape};

use super::inspect::{Shown, notes};
use super::name;
use super::value;
use crate::flags::device_glob;

/// The report as one object. With devices chosen only these are in it.
pub(crate) fn object(report: &Report, shown: &Shown) -> Json {
    let devices = report.items.iter().filter_map(|item| match item.kind {
        ItemKind::Device(place) => Some((item, report.devices.get(place)?)),
        _ => None,
    });
    if !shown.devices.is_empty() {
        let chosen = devices
            .filter(|(_, device)| device_glob::chosen(&shown.devices, &device.section.name))
            .map(|(item, device)| device_json(report, device, item, shown));
        return json!({ "devices": chosen.collect::<Vec<_>>() });
    }
    let mut object = Map::new();
    let mut put = |key: &str, value: Json| {
        object.insert(key.to_owned(), value);
    };
    put("machine", json!(report.machine().map(name::shown)));
    put("run_state", json!(report.run_state()));
    put("container", container(report));
    put("start", json!(report.start));
    put("footers", json!(report.footers));
    put("complete", json!(report.end.is_ok()));
    match &report.end {
        Ok(finish) => put("bytes", json!(finish.bytes)),
        Err(error) => put("error", json!(name::message(&error.to_string()))),
    }
    put(
        "description",
        json!(match report.description_is {
            DescriptionSource::Nowhere => "none",
            DescriptionSource::Stream => "stream",
            DescriptionSource::Elsewhere => "other",
        }),
    );
    put("configuration", configuration(report));
    let items = report
        .items
        .iter()
        .map(|item| item_json(report, item, shown));
    put("items", items.collect());
    put("items_left_out", json!(report.items_left_out));
    put("ram", ram(report));
    put("disks", disks(report));
    put("bitmaps", bitmaps(report));
    put("notes", json!(notes(report)));
    let problems = report.problems.iter().map(|problem| {
        json!({
            "offset": problem.offset,
            "section": name::shown(&problem.section),
            "problem": name::message(&problem.text),
        })
    });
    put("problems", problems.collect());
    put("problems_left_out", json!(report.problems_left_out));
    Json::Object(object)
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

fn item_json(report: &Report, item: &Item, shown: &Shown) -> Json {
    let mut object = match &item.kind {
        ItemKind::Device(place) => {
            let device = report.devices.get(*place);
            return device.map_or(Json::Null, |device| {
                device_json(report, device, item, shown)
            });
        }
        ItemKind::Header => json!({ "kind": "header", "version": 3 }),
        ItemKind::Configuration => json!({ "kind": "configuration" }),
        ItemKind::Section(section) => section_json("section", section),
        ItemKind::Command { name, detail } => {
            json!({ "kind": "command", "command": name, "detail": detail })
        }
        ItemKind::Package => json!({ "kind": "package" }),
        ItemKind::Eof => json!({ "kind": "eof" }),
        ItemKind::Description => json!({ "kind": "description" }),
    };
    place(&mut object, item);
    object
}

fn place(object: &mut Json, item: &Item) {
    object["offset"] = json!(item.offset);
    object["bytes"] = json!(item.bytes);
    if item.count > 1 {
        object["count"] = json!(item.count);
    }
    if item.in_package {
        object["in_package"] = json!(true);
    }
}

fn section_json(kind: &str, section: &Section) -> Json {
    json!({
        "kind": kind,
        "type": match section.kind {
            SectionKind::Start => "START",
            SectionKind::Part => "PART",
            SectionKind::End => "END",
            SectionKind::Full => "FULL",
        },
        "name": name::shown(&section.name),
        "instance": section.instance.0,
        "id": section.id.0,
        "version": section.version,
    })
}

fn device_json(report: &Report, device: &DeviceReport, item: &Item, shown: &Shown) -> Json {
    let mut object = section_json("device", &device.section);
    place(&mut object, item);
    object["body_offset"] = json!(device.offset);
    object["body_bytes"] = json!(device.bytes);
    object["found"] = json!(match device.found {
        Found::ByDescription => "description",
        Found::ByFooter => "footer",
        Found::ByNextHeader => "next-header",
        Found::Cut => "cut",
    });
    match report.state(device) {
        DeviceState::Decoded(body) => body_json(&body, device.offset, shown, &mut object),
        DeviceState::Broken(body, error) => {
            body_json(&body, device.offset, shown, &mut object);
            object["error"] = json!({
                "offset": device.offset.saturating_add(error.offset as u64),
                "field": error.field,
                "problem": error.fault.to_string(),
            });
        }
        DeviceState::Undescribed | DeviceState::NotKept => {
            if let (Some(body), true) = (&device.body, shown.hex) {
                object["hex"] = json!(value::hex(body));
            }
        }
    }
    object
}

fn body_json(body: &SavedBody, offset: u64, shown: &Shown, object: &mut Json) {
    match body {
        SavedBody::Described(state) => {
            object["state"] = state_json(state, offset, shown);
        }
        SavedBody::OldStyle(data) => {
            object["data_bytes"] = json!(data.len());
            if shown.hex {
                object["hex"] = json!(value::hex(data));
            }
        }
    }
}

fn state_json(state: &SavedState, offset: u64, shown: &Shown) -> Json {
    let mut at = offset;
    let fields = state.fields.iter().map(|field| {
        let object = field_json(field, at, shown);
        at = at.saturating_add(field.content.wire_bytes() as u64);
        object
    });
    let fields: Vec<_> = fields.collect();
    let subsections = state.subsections.iter().map(|subsection| {
        let header = subsection.name.len().saturating_add(6) as u64;
        let object = state_json(subsection, at.saturating_add(header), shown);
        at = at
            .saturating_add(header)
            .saturating_add(subsection.wire_bytes() as u64);
        object
    });
    let subsections: Vec<_> = subsections.collect();
    let mut object = json!({ "name": &*state.name, "version": state.version, "fields": fields });
    if !subsections.is_empty() {
        object["subsections"] = json!(subsections);
    }
    object
}

fn field_json(field: &SavedField, offset: u64, shown: &Shown) -> Json {
    let mut object = json!({ "name": &*field.name, "type": field.kind.as_str() });
    if let Shape::Element { index, .. } = field.shape {
        object["index"] = json!(index);
    }
    if shown.offsets {
        object["offset"] = json!(offset);
    }
    // Each element of a list or tree has a mark in front of it, and a tree its number of nodes.
    let states = |states: &[SavedState], mut at: u64, mark: u64| {
        let states = states.iter().map(|state| {
            at = at.saturating_add(mark);
            let object = state_json(state, at, shown);
            at = at.saturating_add(state.wire_bytes() as u64);
            object
        });
        states.collect::<Vec<_>>()
    };
    match &field.content {
        Content::Plain { .. } => {
            object["value"] = value::json(field, shown.hex).unwrap_or(Json::Null);
        }
        Content::Structs(inner) => object["structs"] = json!(states(inner, offset, 0)),
        Content::List(inner) => object["list"] = json!(states(inner, offset, 1)),
        Content::Tree(nodes) => {
            let mut at = offset.saturating_add(4);
            let nodes = nodes.iter().map(|(key, state)| {
                at = at.saturating_add(1);
                let key_json = match key {
                    Content::Plain { bytes, .. } => json!(value::hex(bytes)),
                    Content::Structs(keys) => json!(states(keys, at, 0)),
                    Content::List(_) | Content::Tree(_) => Json::Null,
                };
                at = at.saturating_add(key.wire_bytes() as u64);
                let node = json!({ "key": key_json, "value": state_json(state, at, shown) });
                at = at.saturating_add(state.wire_bytes() as u64);
                node
            });
            object["tree"] = nodes.collect();
        }
    }
    object
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
