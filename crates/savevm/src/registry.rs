//! Who owns which section.

use vmferry_stream::{InstanceId, Name, SectionId};

use crate::handler::{LoadHandler, SaveHandler};

/// The order in which sections are saved: higher ones first, equal ones as registered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(pub i32);

/// Everything that can be saved (or loaded), in order.
///
/// Handlers live here and the machines borrow them, so that a failed transition leaves them to be
/// cleaned up.
pub struct Registry<H: ?Sized> {
    entries: Vec<Entry<H>>,
    next_section_id: u32,
}

/// Sections that can be saved.
pub type SaveRegistry<'a> = Registry<dyn SaveHandler + 'a>;
/// Sections that can be loaded.
pub type LoadRegistry<'a> = Registry<dyn LoadHandler + 'a>;

/// One registered section.
pub struct Entry<H: ?Sized> {
    /// Name on the wire.
    pub idstr: Name,
    /// Which of several of that name.
    pub instance: InstanceId,
    /// Version that is written, and the highest that is read.
    pub version: u32,
    /// Lowest version that is read.
    pub version_min: u32,
    /// What PART and END refer to.
    pub section_id: SectionId,
    priority: Priority,
    /// Its owner.
    pub handler: Box<H>,
}

/// A section could not be registered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Name and instance are taken.
    #[error("section '{idstr}' instance {} is registered already", instance.0)]
    Taken {
        /// Its name.
        idstr: Name,
        /// Its instance.
        instance: InstanceId,
    },
}

impl<H: ?Sized> Registry<H> {
    /// No sections yet. The first gets section id 1, as QEMU's own streams have it.
    #[must_use]
    pub fn new() -> Self {
        Self {
            entries: Vec::new(),
            next_section_id: 1,
        }
    }

    /// Add a section. Without `instance` it gets the next free one of its name.
    ///
    /// # Errors
    /// Name and instance are taken.
    pub fn register(
        &mut self,
        idstr: Name,
        instance: Option<InstanceId>,
        version: u32,
        version_min: u32,
        priority: Priority,
        handler: Box<H>,
    ) -> Result<(), RegisterError> {
        let instance = instance.unwrap_or_else(|| self.next_instance(&idstr));
        if self.find(&idstr, instance).is_some() {
            return Err(RegisterError::Taken { idstr, instance });
        }
        let section_id = SectionId(self.next_section_id);
        self.next_section_id = self.next_section_id.wrapping_add(1);
        let place = self
            .entries
            .partition_point(|entry| entry.priority >= priority);
        let entry = Entry {
            idstr,
            instance,
            version,
            version_min,
            section_id,
            priority,
            handler,
        };
        self.entries.insert(place, entry);
        Ok(())
    }

    /// The sections in their order.
    pub fn entries(&mut self) -> impl Iterator<Item = &mut Entry<H>> {
        self.entries.iter_mut()
    }

    pub(crate) fn find(&mut self, idstr: &str, instance: InstanceId) -> Option<&mut Entry<H>> {
        self.entries
            .iter_mut()
            .find(|entry| entry.idstr == *idstr && entry.instance == instance)
    }

    fn next_instance(&self, idstr: &str) -> InstanceId {
        let instances = self
            .entries
            .iter()
            .filter(|e| e.idstr == *idstr)
            .map(|e| e.instance);
        instances.max().map_or(InstanceId(0), |highest| {
            InstanceId(highest.0.saturating_add(1))
        })
    }
}

impl<H: ?Sized> Default for Registry<H> {
    fn default() -> Self {
        Self::new()
    }
}
