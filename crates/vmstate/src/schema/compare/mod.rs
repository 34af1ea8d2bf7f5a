//! Does one program load what another one sends?
//!
//! The rules ("vmstate" wire notes, §3): the receiver refuses a version above its own or below its
//! minimum, else it reads the layout of the version that was sent, without the fields that are newer
//! than that. Nothing in a stream delimits fields, so what is read must be what is sent, byte for byte.
//! Structs carry no version: each side uses its own. Subsections carry one, and one that the
//! receiver does not know is fatal, but only when it is sent.

mod align;
mod reason;
mod totals;

use std::collections::BTreeMap;

use super::{Schema, SchemaDevice, SchemaState, Source};
pub use reason::{Cause, Direction, Extent, MAX_REASONS, Names, Reason, Verdict};

/// How many device types that share a description are tried for a device of a stream. QEMU has up to
/// nine.
const MAX_CANDIDATES: usize = 16;

/// Two schemas compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Every device type of the old schema in its order, then those that only the new one has. When
    /// the old one is a stream's, its devices only.
    pub devices: Vec<DeviceComparison>,
}

/// A device type compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceComparison {
    /// The type's name (for a device of a stream, its description's).
    pub name: String,
    /// The description's name.
    pub state: String,
    /// Where it is.
    pub presence: Presence,
    /// Old version, and the lowest that the old program loads.
    pub old_versions: Option<(u32, u32)>,
    /// New version, and the lowest that the new program loads.
    pub new_versions: Option<(u32, u32)>,
    /// Does the new program load what the old one sends? `None` unless it is in both and the old one
    /// can send it.
    pub forward: Option<Direction>,
    /// Does the old program load what the new one sends? `None` also if the old one is a stream,
    /// which loads nothing.
    pub backward: Option<Direction>,
}

/// Which schemas have a device type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Both.
    Both,
    /// Only the old one: that matters if the machine has such a device.
    OnlyOld,
    /// Only the new one.
    OnlyNew,
    /// Both, and neither can migrate it.
    Unmigratable,
}

impl DeviceComparison {
    /// The worse of both directions; yes if there is none.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let directions = [&self.forward, &self.backward].into_iter().flatten();
        directions
            .map(Direction::verdict)
            .max()
            .unwrap_or(Verdict::Yes)
    }

    /// Is there anything to say about it, even if it changes nothing?
    #[must_use]
    pub fn differs(&self) -> bool {
        let has_reasons = |direction: &Option<Direction>| {
            direction
                .as_ref()
                .is_some_and(|direction| !direction.reasons.is_empty())
        };
        match self.presence {
            Presence::OnlyOld | Presence::OnlyNew => true,
            Presence::Unmigratable => false,
            Presence::Both => {
                let versions_differ =
                    self.backward.is_some() && self.old_versions != self.new_versions;
                versions_differ || has_reasons(&self.forward) || has_reasons(&self.backward)
            }
        }
    }
}

/// Compare what an old program, or a stream, sends and loads with what a new program does.
///
/// A device type is found in the other schema by its name; one that is named like its description,
/// as those of a stream are, also by that.
#[must_use]
pub fn compare(old: &Schema, new: &Schema) -> Comparison {
    let index = Index::new(new);
    let mut matched = vec![false; new.devices.len()];
    let mut devices = Vec::new();
    for device in &old.devices {
        let candidates = index.candidates(device, old.source);
        let compared = candidates.iter().map(|place| {
            let twin = new.devices.get(*place);
            (*place, twin.map(|twin| both(old, device, new, twin)))
        });
        // Which of several types a device of a stream has is not known: one that fits is enough.
        let best = compared
            .filter_map(|(place, compared)| Some((place, compared?)))
            .min_by_key(|(_, compared)| compared.verdict());
        match best {
            Some((place, compared)) => {
                if let Some(matched) = matched.get_mut(place) {
                    *matched = true;
                }
                devices.push(compared);
            }
            None => devices.push(alone(device, Presence::OnlyOld)),
        }
    }
    if old.source != Source::Stream {
        let rest = new.devices.iter().zip(&matched);
        let rest = rest.filter(|(_, matched)| !**matched);
        devices.extend(rest.map(|(device, _)| alone(device, Presence::OnlyNew)));
    }
    Comparison { devices }
}

/// Where a schema has the device types of a name, and those of a description.
struct Index<'a> {
    by_name: BTreeMap<&'a str, usize>,
    by_state: BTreeMap<&'a str, Vec<usize>>,
}

impl<'a> Index<'a> {
    fn new(schema: &'a Schema) -> Self {
        let mut by_name = BTreeMap::new();
        let mut by_state = BTreeMap::<_, Vec<usize>>::new();
        for (place, device) in schema.devices.iter().enumerate() {
            by_name.entry(device.name.as_str()).or_insert(place);
            let places = by_state.entry(device.state.name.as_str()).or_default();
            if places.len() < MAX_CANDIDATES {
                places.push(place);
            }
        }
        Self { by_name, by_state }
    }

    fn candidates(&self, device: &SchemaDevice, source: Source) -> &[usize] {
        let by_state = || self.by_state.get(device.state.name.as_str());
        match self.by_name.get(device.name.as_str()) {
            Some(place) if source != Source::Stream => std::slice::from_ref(place),
            None if device.name != device.state.name => &[],
            _ => by_state().map(Vec::as_slice).unwrap_or_default(),
        }
    }
}

fn both(
    old: &Schema,
    device: &SchemaDevice,
    new: &Schema,
    twin: &SchemaDevice,
) -> DeviceComparison {
    let unmigratable = device.state.fields.is_none() && twin.state.fields.is_none();
    let direction = |sender: (&Schema, &SchemaDevice), receiver: (&Schema, &SchemaDevice)| {
        let possible = !unmigratable && receiver.0.source != Source::Stream;
        possible.then(|| {
            align::direction(
                (sender.0.source, &sender.1.state),
                (receiver.0.source, &receiver.1.state),
            )
        })
    };
    DeviceComparison {
        name: device.name.clone(),
        state: twin.state.name.clone(),
        presence: if unmigratable {
            Presence::Unmigratable
        } else {
            Presence::Both
        },
        old_versions: Some(versions(&device.state)),
        new_versions: Some(versions(&twin.state)),
        forward: direction((old, device), (new, twin)),
        backward: direction((new, twin), (old, device)),
    }
}

fn alone(device: &SchemaDevice, presence: Presence) -> DeviceComparison {
    let is_old = presence == Presence::OnlyOld;
    DeviceComparison {
        name: device.name.clone(),
        state: device.state.name.clone(),
        presence,
        old_versions: is_old.then(|| versions(&device.state)),
        new_versions: (!is_old).then(|| versions(&device.state)),
        forward: None,
        backward: None,
    }
}

fn versions(state: &SchemaState) -> (u32, u32) {
    (state.version, state.minimum_version)
}
