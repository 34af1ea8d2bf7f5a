//! A parked machine as the source of a migration.
//!
//! ```text
//!   image ─┬─ memory ───────── StoredRam ─▶ the `ram` section: all at once, or as the guest asks for it
//!          ├─ devices ──────── bodies as they are ─▶ FULL sections, or the package of a postcopy
//!          └─ other sections ─ bodies as they are ─▶ START, PART, END, before the devices
//! ```
//!
//! The machine stands still: it is sent by the engine that sends machines that run, whose guest cannot be
//! stopped, never runs on here, and writes nothing.

mod sections;

use std::sync::Arc;

use vmferry_image::{Head, Image, ImageError};
use vmferry_migration::{Guest, SourceMachine, SourceMemory};
use vmferry_ram::{LEARNT_MAX, RamSourceOptions, StoredRam, StoredRange};
use vmferry_savevm::{Describe, HandlerError, Machine, Opening, Priority, Registration};
use vmferry_stream::{Name, PageBits};

use sections::{DIRTY_BITMAP, RawDevice, RawLive};

/// The capability with which shared memory stays where it is.
const IGNORE_SHARED: &str = "x-ignore-shared";
/// The capability without which no UUID is sent.
const VALIDATE_UUID: &str = "validate-uuid";

/// Devices that a destination must have before its memory, and before `ram` in the stream.
const EARLY: Priority = Priority(2);

/// How a parked machine is restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreOptions {
    /// The guest may run before its memory is there.
    pub postcopy: bool,
}

/// A parked machine cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// It cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Only its own device knows how it goes on.
    #[error("the live section '{0}' of a parked machine cannot be sent")]
    Live(Name),
    /// Pages of another size cannot be asked for.
    #[error("the machine has guest pages of {bytes} bytes, of which only 4096 can be sent")]
    PageSize {
        /// Their size.
        bytes: u32,
    },
}

/// What a [`RunningSource`](vmferry_migration::RunningSource) sends. All state of its devices is read, and
/// checked, before this returns; its memory later.
///
/// # Errors
/// The image is damaged where that matters now.
pub fn machine(image: &Arc<Image>, options: RestoreOptions) -> Result<SourceMachine, RestoreError> {
    let head = image.head();
    let opening = Opening {
        machine: configured(head)?,
        configuration: head.configuration.is_some(),
        footers: head.footers,
        switchover_start: head.switchover_start,
        describe: match image.description()? {
            Some(text) => Describe::Text(text.into()),
            // Machines without footers are those that expect none.
            None if head.footers => Describe::Empty,
            None => Describe::Suppressed,
        },
        commands: Vec::new(),
    };
    let mut devices = Vec::new();
    for live in &head.live {
        let section = live.bodies.first().map(|body| &body.section);
        if let Some(section) = section.filter(|section| section.name != *DIRTY_BITMAP) {
            return Err(RestoreError::Live(section.name.clone()));
        }
        devices.extend(RawLive::read(image, live)?.map(RawLive::registration));
    }
    for (index, section) in head.devices.iter().enumerate() {
        let device = RawDevice::new(&section.section, image.section_body(section)?);
        devices.push(match index < head.early_devices {
            true => early(device),
            false => device.registration(),
        });
    }
    Ok(SourceMachine {
        opening,
        memory: SourceMemory::Stored(Arc::clone(image) as Arc<dyn StoredRam>),
        ram_options: RamSourceOptions {
            postcopy: options.postcopy,
            ignore_shared: has(head, IGNORE_SHARED),
            ..RamSourceOptions::default()
        },
        devices,
        guest: Box::new(Nobody),
    })
}

fn early(device: RawDevice) -> Registration<'static> {
    device.early_registration().priority(EARLY)
}

/// The machine as its own configuration shows it.
fn configured(head: &Head) -> Result<Machine, RestoreError> {
    let Some(configuration) = &head.configuration else {
        return Ok(Machine::default());
    };
    if let Some(bits) = configuration.page_bits
        && bits != PageBits::X86
    {
        return Err(RestoreError::PageSize {
            bytes: bits.bytes(),
        });
    }
    let mut capabilities = configuration.capabilities.clone().unwrap_or_default();
    if configuration.uuid.is_some() {
        capabilities.extend(Name::new(VALIDATE_UUID));
    }
    Ok(Machine {
        capabilities: Some(capabilities),
        uuid: configuration.uuid,
        ..Machine::named(configuration.machine.clone())
    })
}

fn has(head: &Head, capability: &str) -> bool {
    let configuration = head.configuration.as_ref();
    configuration.is_some_and(|it| it.has_capability(capability))
}

/// What to send first the next time: what was sent first this time, and what was asked for besides.
#[must_use]
pub fn learnt(image: &Image, requested: &[StoredRange]) -> Vec<StoredRange> {
    let mut order = image.working_set();
    order.extend_from_slice(requested);
    order.truncate(LEARNT_MAX);
    order
}

/// It runs nowhere but at the destination.
struct Nobody;

impl Guest for Nobody {
    fn stop(&mut self) -> Result<(), HandlerError> {
        Ok(())
    }

    fn run(&mut self) {}
}
