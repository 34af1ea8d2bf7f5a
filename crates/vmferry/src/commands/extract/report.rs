//! What is said about what was extracted.

use std::io::{self, Write};

use serde_json::{Value, json};
use vmferry_inspect::{
    Addresses, BlockImage, CoreReport, DeviceBytes, DiskReport, MachineKind, WalkError, WhyPhysical,
};

use crate::flags::extract::FileFlags;
use crate::output::{self, Out};
use crate::render;

/// A line, notes for a person, and an object for a program.
pub(super) struct Report {
    line: String,
    notes: Vec<String>,
    object: Value,
}

impl Report {
    pub(super) fn of_memory(blocks: &[BlockImage]) -> Self {
        let taken: Vec<_> = blocks
            .iter()
            .filter(|block| block.file_offset.is_some())
            .collect();
        let names: Vec<_> = taken
            .iter()
            .map(|block| format!("'{}'", block.name))
            .collect();
        let length: u64 = taken.iter().map(|block| block.length_bytes).sum();
        let data: u64 = taken.iter().map(|block| block.data_bytes).sum();
        Self {
            line: format!(
                "RAM block {}: {}, of which {} are data",
                names.join(", "),
                render::bytes(length),
                render::bytes(data)
            ),
            notes: taken.iter().filter_map(|block| absence(block)).collect(),
            object: json!({
                "what": "ram",
                "bytes": length,
                "blocks": taken.iter().map(|block| block_object(block)).collect::<Vec<_>>(),
            }),
        }
    }

    pub(super) fn of_core(core: &CoreReport) -> Self {
        let length: u64 = core.blocks.iter().map(|block| block.length_bytes).sum();
        let mut notes: Vec<String> = core.blocks.iter().filter_map(absence).collect();
        notes.extend(layout_notes(core));
        notes.extend(address_notes(core));
        let seen_by = match core.addresses {
            Addresses::Virtual { cpu, .. } => {
                format!("addresses as processor {cpu} sees them")
            }
            Addresses::Physical(_) => "guest-physical addresses".into(),
        };
        Self {
            line: format!(
                "a core of {}: {} of memory, {}, {seen_by}",
                machine(core),
                render::bytes(length),
                render::count(core.cpus.len() as u64, "processor"),
            ),
            notes,
            object: core_object(core),
        }
    }

    pub(super) fn of_disk(disk: &DiskReport) -> Self {
        let mut notes = Vec::new();
        if !disk.length_is_given {
            notes.push(
                "the stream does not say how long the disk is; the image ends with the last chunk \
                 (see --size)"
                    .into(),
            );
        }
        if disk.absent_bytes > 0 {
            notes.push(format!(
                "{} of the disk did not come, and are zero: it was an incremental migration, or it \
                 did not finish",
                render::bytes(disk.absent_bytes)
            ));
        }
        if disk.name.is_empty() {
            notes.push(
                "the disk has no name in the stream (-blockdev): if the machine had more than one \
                 such disk, this is a mixture of them"
                    .into(),
            );
        }
        Self {
            line: format!(
                "disk '{}': {}, of which {} are data",
                disk.name,
                render::bytes(disk.length_bytes),
                render::bytes(disk.data_bytes)
            ),
            notes,
            object: json!({
                "what": "disk",
                "name": disk.name.as_str(),
                "bytes": disk.length_bytes,
                "length-is-given": disk.length_is_given,
                "data-bytes": disk.data_bytes,
                "zero-bytes": disk.zero_bytes,
                "absent-bytes": disk.absent_bytes,
            }),
        }
    }

    pub(super) fn of_device(device: &DeviceBytes) -> Self {
        let section = &device.section;
        Self {
            line: format!(
                "device '{}' (instance {}, version {}): {} bytes from byte {} of the stream on",
                section.name,
                section.instance.0,
                section.version,
                device.body.len(),
                device.offset
            ),
            notes: Vec::new(),
            object: json!({
                "what": "device",
                "name": section.name.as_str(),
                "instance": section.instance.0,
                "version": section.version,
                "offset": device.offset,
                "bytes": device.body.len(),
            }),
        }
    }

    pub(super) fn of_description(text: &[u8]) -> Self {
        Self {
            line: format!("the description: {}", render::bytes(text.len() as u64)),
            notes: Vec::new(),
            object: json!({"what": "vmdescription", "bytes": text.len()}),
        }
    }

    /// Say it. `broken` is why it is not whole.
    pub(super) fn tell(mut self, files: &FileFlags, broken: Option<&WalkError>) -> io::Result<()> {
        let mut out = out(files);
        if files.json {
            self.object["event"] = json!("extracted");
            self.object["path"] = json!(files.to.output.display().to_string());
            self.object["whole"] = json!(broken.is_none());
            self.object["notes"] = json!(self.notes);
            if let Some(broken) = broken {
                self.object["error"] = json!(broken.to_string());
            }
            return render::write_json(&mut out, &self.object);
        }
        let verb = if broken.is_some() {
            "extracted a part of"
        } else {
            "extracted"
        };
        writeln!(out, "{verb} {}", self.line)?;
        for note in self.notes {
            output::say(&format!("note: {note}"));
        }
        Ok(())
    }
}

/// Standard output, unless it carries the bytes.
fn out(files: &FileFlags) -> Out {
    if files.to.is_stdout() {
        output::stderr()
    } else {
        output::stdout()
    }
}

fn absence(block: &BlockImage) -> Option<String> {
    if block.is_absent() {
        return Some(format!(
            "RAM block '{}' is listed, but no page of it is in the stream; it is zero",
            block.name
        ));
    }
    (block.absent_bytes > 0).then(|| {
        format!(
            "{} of RAM block '{}' did not come, and are zero: on other channels (multifd, preempt), \
             or the migration did not finish",
            render::bytes(block.absent_bytes),
            block.name
        )
    })
}

fn block_object(block: &BlockImage) -> Value {
    json!({
        "name": block.name.as_str(),
        "bytes": block.length_bytes,
        "file-offset": block.file_offset,
        "data-bytes": block.data_bytes,
        "zero-bytes": block.zero_bytes,
        "absent-bytes": block.absent_bytes,
    })
}

fn machine(core: &CoreReport) -> String {
    match &core.machine {
        Some(machine) => format!("'{machine}'"),
        None => "a machine without a name".into(),
    }
}

fn layout_notes(core: &CoreReport) -> Vec<String> {
    let mut notes = Vec::new();
    if core.kind.is_none() {
        notes.push(format!(
            "the memory layout of {} is not known: its main memory starts at address 0",
            machine(core)
        ));
    }
    if !core.unplaced.is_empty() {
        let names: Vec<_> = core
            .unplaced
            .iter()
            .map(|name| format!("'{name}'"))
            .collect();
        notes.push(format!(
            "in the file, but at no address, because the stream does not say where they are: {}",
            names.join(", ")
        ));
    }
    notes
}

fn address_notes(core: &CoreReport) -> Vec<String> {
    let mut notes = Vec::new();
    let unknown = core.cpu_sections.saturating_sub(core.cpus.len());
    if unknown > 0 {
        let processors = render::count(unknown as u64, "processor");
        notes.push(format!("the registers of {processors} are not known"));
    }
    match core.addresses {
        Addresses::Virtual {
            isolated,
            cut_short,
            ..
        } => {
            if isolated {
                notes.push(
                    "the processor was in user space; the page tables of its kernel were taken"
                        .into(),
                );
            }
            if cut_short {
                notes.push("the page tables have no end: only a part of them is there".into());
            }
        }
        Addresses::Physical(WhyPhysical::UnknownRegisters) => notes.push(
            "no processor's registers are known, so there is no way to its page tables".into(),
        ),
        Addresses::Physical(WhyPhysical::NoPaging) => {
            notes.push("the processor does not use paging".into());
        }
        Addresses::Physical(WhyPhysical::NothingMapped) => {
            notes.push("the processor's page tables map no memory".into());
        }
    }
    notes
}

fn core_object(core: &CoreReport) -> Value {
    let (isolated, cut_short) = match core.addresses {
        Addresses::Virtual {
            isolated,
            cut_short,
            ..
        } => (isolated, cut_short),
        Addresses::Physical(_) => (false, false),
    };
    let (addresses, why) = match core.addresses {
        Addresses::Virtual { .. } => ("virtual", None),
        Addresses::Physical(WhyPhysical::UnknownRegisters) => {
            ("physical", Some("unknown-registers"))
        }
        Addresses::Physical(WhyPhysical::NoPaging) => ("physical", Some("no-paging")),
        Addresses::Physical(WhyPhysical::NothingMapped) => ("physical", Some("nothing-mapped")),
    };
    let layout = match core.kind {
        Some(MachineKind::Pc) => Some("pc"),
        Some(MachineKind::OldPc) => Some("pc-1"),
        Some(MachineKind::Q35) => Some("q35"),
        Some(MachineKind::Microvm) => Some("microvm"),
        Some(MachineKind::Isapc) => Some("isapc"),
        None => None,
    };
    json!({
        "what": "core",
        "machine": core.machine.as_ref().map(vmferry_stream::Name::as_str),
        "layout": layout,
        "processors": core.cpus.len(),
        "addresses": addresses,
        "why-physical": why,
        "kernel-tables-taken": isolated,
        "page-tables-cut-short": cut_short,
        "segments": core.pieces,
        "unplaced": core.unplaced.iter().map(vmferry_stream::Name::as_str).collect::<Vec<_>>(),
        "blocks": core.blocks.iter().map(block_object).collect::<Vec<_>>(),
    })
}
