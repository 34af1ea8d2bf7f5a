//! What a machine is made of, as its QEMU says it: names and lengths of its memory, sections of its devices.

use std::fs::File;
use std::sync::{Arc, Mutex};

use serde_json::json;
use vmferry_inspect::{Event, VisitError, Visitor, walk};
use vmferry_ram::{AnonymousRam, BlockLayout, PAGE_BYTES, Sharing};
use vmferry_savevm::{Command, Name, Record, Registration};
use vmferry_stream::{RamRecord, Section};
use vmferry_vmstate::{Decoded, Description, Device, DeviceError, SavedBody};

use crate::peers::qemu::Machine;

/// The length that blocks of firmware tables may grow to.
const GROWS_TO_BYTES: u64 = 2 << 20;

/// Learnt from a machine that was never let run.
#[derive(Default)]
pub(crate) struct Layout {
    pub(crate) machine: Name,
    /// Its sender says when the guest has stopped.
    pub(crate) switchover_start: bool,
    blocks: Vec<(Name, u64)>,
    devices: Vec<Section>,
}

impl Layout {
    /// Of such a machine.
    pub(crate) fn of(machine: Machine) -> Self {
        let mut qemu = machine.args(["-S"]).start();
        let path = qemu.path("stream");
        let uri = format!("exec:cat >{}", path.display());
        qemu.limits((1 << 40, 1000));
        qemu.qmp.execute("migrate", &json!({"uri": uri}));
        qemu.migrated();
        let mut layout = Self::default();
        let stream = File::open(&path).expect("the stream was written");
        walk(stream, &mut layout).expect("it is a stream");
        assert!(layout.devices.len() > 10, "{:?}", layout.devices);
        layout
    }

    /// Memory for it.
    pub(crate) fn memory(&self) -> AnonymousRam {
        let mut guest_address = 0;
        let layouts = self.blocks.iter().map(|(idstr, bytes)| {
            let max_bytes = match idstr.starts_with("/rom@") {
                true => GROWS_TO_BYTES.max(*bytes),
                false => *bytes,
            };
            let layout = BlockLayout {
                idstr: idstr.clone(),
                used_bytes: *bytes,
                max_bytes,
                page_bytes: PAGE_BYTES,
                guest_address: Some(guest_address),
                sharing: Sharing::Private,
            };
            guest_address += max_bytes;
            layout
        });
        AnonymousRam::with_layouts(layouts.collect()).expect("memory")
    }

    /// Devices for it, in the order in which their QEMU sends them.
    pub(crate) fn devices(&self) -> Vec<RawDevice> {
        let raw = |section: &Section| RawDevice {
            description: Description {
                name: section.name.to_string().into(),
                version: section.version,
                minimum_version: section.version,
                unmigratable: false,
                fields: Vec::new(),
                subsections: Vec::new(),
            },
            section: section.clone(),
            body: Arc::default(),
        };
        self.devices.iter().map(raw).collect()
    }
}

impl Visitor for Layout {
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError> {
        match event {
            Event::Record(_, Record::Configuration(configuration)) => {
                self.machine = configuration.machine.clone();
            }
            Event::Record(
                _,
                Record::Ram(RamRecord::Block {
                    name, used_bytes, ..
                }),
            ) => self.blocks.push((name.clone(), *used_bytes)),
            Event::Record(_, Record::Command(Command::SwitchoverStart)) => {
                self.switchover_start = true;
            }
            Event::Device(body) => self.devices.push(body.section.clone()),
            _ => {}
        }
        Ok(())
    }
}

/// A device whose state is nothing but bytes: they come, and go on as they are. Clones are the same device.
#[derive(Clone)]
pub(crate) struct RawDevice {
    description: Description,
    /// As its QEMU sends it.
    section: Section,
    body: Arc<Mutex<Option<Vec<u8>>>>,
}

impl RawDevice {
    pub(crate) fn registration(&self) -> Registration<'static> {
        let name = self.section.name.clone();
        Registration::device(&name, Box::new(self.clone())).instance(self.section.instance)
    }

    /// Where a body ends that is followed by its footer, and by what can follow a section: only the sender knows its
    /// length. `None` if that is not there.
    fn end(&self, window: &[u8]) -> Option<usize> {
        let [a, b, c, d] = self.section.id.0.to_be_bytes();
        let footer = [0x7e, a, b, c, d];
        let ends = |at: &usize| {
            window[*at..].starts_with(&footer)
                && match window.get(at + 5..) {
                    // Another device; section ids are small.
                    Some([4, 0, 0, _, _, length, name @ ..]) => {
                        let name = &name[..usize::from(*length).min(name.len())];
                        *length > 2 && name.iter().all(u8::is_ascii_graphic)
                    }
                    // A PING, POSTCOPY_RUN.
                    Some([8, 0, 2, 0, 4, ..] | [8, 0, 5, 0, 0, ..]) => true,
                    // EOF and the description. EOF alone would be found inside of bodies, too.
                    Some([0, 6, _, _, _, _, b'{', ..]) => true,
                    _ => false,
                }
        };
        (0..window.len()).find(ends)
    }
}

impl Device for RawDevice {
    fn description(&self) -> Option<&Description> {
        Some(&self.description)
    }

    /// One that did not come, because its state was that of a reset, does not go.
    fn is_needed(&self) -> bool {
        self.body.lock().expect("no panic").is_some()
    }

    fn save(&mut self) -> Result<SavedBody, DeviceError> {
        let body = self.body.lock().expect("no panic").clone();
        Ok(SavedBody::OldStyle(body.unwrap_or_default()))
    }

    fn decode(&self, _version: u32, window: &[u8]) -> Result<Decoded, DeviceError> {
        let Some(used) = self.end(window) else {
            return Err(DeviceError::Incomplete {
                have: window.len(),
                field: String::new(),
            });
        };
        let (body, bytes) = (Arc::clone(&self.body), window[..used].to_vec());
        Ok(Decoded::new(used, move || {
            *body.lock().expect("no panic") = Some(bytes);
            Ok(())
        }))
    }
}
