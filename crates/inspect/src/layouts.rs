//! Which part of a description is about which section.

use std::collections::{HashMap, VecDeque};

use vmferry_stream::Section;
use vmferry_vmstate::VmDescription;

/// Finds each device of a stream in its description. Both have them in the same order; the sections of
/// some (`isa-ide`) have one name and instance, and each is described.
pub(crate) struct Layouts<'a> {
    /// By name, by instance.
    places: HashMap<&'a str, HashMap<u32, VecDeque<usize>>>,
}

impl<'a> Layouts<'a> {
    pub(crate) fn of(description: &'a VmDescription) -> Self {
        let mut places: HashMap<&str, HashMap<_, VecDeque<_>>> = HashMap::new();
        for (place, device) in description.devices.iter().enumerate() {
            let instances = places.entry(&device.name).or_default();
            instances
                .entry(device.instance)
                .or_default()
                .push_back(place);
        }
        Self { places }
    }

    /// The next section of the stream; where in the description it is, if it is there.
    pub(crate) fn next(&mut self, section: &Section) -> Option<usize> {
        let instances = self.places.get_mut(section.name.as_str())?;
        instances.get_mut(&section.instance.0)?.pop_front()
    }
}
