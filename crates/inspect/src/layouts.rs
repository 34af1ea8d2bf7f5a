//! Which part of a description is about which section.

use std::cmp::Ordering;
use std::sync::Arc;

use vmferry_stream::Section;
use vmferry_vmstate::VmDescription;

/// Finds each device of a stream in its description. Both have them in the same order; the sections of
/// some (`isa-ide`) have one name and instance, and each is described.
#[derive(Debug)]
pub(crate) struct Layouts {
    /// By name, instance and place.
    sorted: Vec<Layout>,
    /// How many were found of those that begin here and have one name and instance.
    found: Vec<usize>,
}

/// A device of a description.
#[derive(Debug)]
pub(crate) struct Layout {
    name: Arc<str>,
    instance: u32,
    /// Its place in the description.
    pub(crate) place: usize,
    /// Length of its body.
    pub(crate) bytes: u64,
}

impl Layouts {
    pub(crate) fn of(description: &VmDescription) -> Self {
        let devices = description.devices.iter().enumerate();
        let mut sorted: Vec<_> = devices
            .map(|(place, device)| Layout {
                name: Arc::clone(&device.name),
                instance: device.instance,
                place,
                bytes: device.wire_bytes(),
            })
            .collect();
        // Stable: those of one name and instance stay in order.
        sorted.sort_by(|one, other| one.compare(&other.name, other.instance));
        let found = vec![0; sorted.len()];
        Self { sorted, found }
    }

    /// Names and instances that were described more often than found.
    pub(crate) fn missing(&self) -> impl Iterator<Item = (&str, u32)> {
        let groups = self
            .sorted
            .chunk_by(|one, other| one.compare(&other.name, other.instance) == Ordering::Equal);
        let mut start = 0_usize;
        groups.filter_map(move |group| {
            let found = self.found.get(start).copied().unwrap_or(0);
            start = start.saturating_add(group.len());
            let layout = group.get(found)?;
            Some((&*layout.name, layout.instance))
        })
    }

    /// The next section of the stream; what describes it, if anything does.
    pub(crate) fn next(&mut self, section: &Section) -> Option<&Layout> {
        let (name, instance) = (section.name.as_str(), section.instance.0);
        let is_before = |layout: &Layout| layout.compare(name, instance) == Ordering::Less;
        let first = self.sorted.partition_point(is_before);
        let found = self.found.get_mut(first)?;
        let layout = self.sorted.get(first.saturating_add(*found))?;
        let is_it = layout.compare(name, instance) == Ordering::Equal;
        *found = found.saturating_add(usize::from(is_it));
        is_it.then_some(layout)
    }
}

impl Layout {
    fn compare(&self, name: &str, instance: u32) -> Ordering {
        let by_name = (*self.name).cmp(name);
        by_name.then(self.instance.cmp(&instance))
    }
}

#[cfg(test)]
mod tests {
    use vmferry_stream::{InstanceId, Name, SectionId, SectionKind};

    use super::*;

    fn section(name: &str, instance: u32) -> Section {
        Section {
            kind: SectionKind::Full,
            id: SectionId(1),
            name: Name::new(name).unwrap(),
            instance: InstanceId(instance),
            version: 1,
        }
    }

    #[test]
    fn each_section_is_found_once_in_its_order() {
        let device = |name: &str, instance: u32| {
            format!("{{\"name\": \"{name}\", \"instance_id\": {instance}, \"size\": 1}}")
        };
        let devices = [("ide", 0), ("dma", 1), ("ide", 0), ("dma", 0)];
        let devices = devices
            .map(|(name, instance)| device(name, instance))
            .join(", ");
        let text = format!("{{\"page_size\": 4096, \"devices\": [{devices}]}}");
        let description = VmDescription::parse(text.as_bytes()).unwrap();
        let mut layouts = Layouts::of(&description);
        for (name, instance, place) in [
            ("ide", 0, Some(0)),
            ("dma", 0, Some(3)),
            ("ide", 0, Some(2)),
            ("ide", 0, None),
            ("dma", 1, Some(1)),
            ("dma", 2, None),
            ("a", 0, None),
            ("z", 0, None),
        ] {
            let found = layouts.next(&section(name, instance));
            assert_eq!(found.map(|layout| layout.place), place, "{name} {instance}");
        }
    }
}
