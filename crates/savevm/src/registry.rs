//! Who owns which section.
//!
//! ```text
//!              idstr                 instance  alias   owner
//!   priority 9 pci.0/pcie-root-port  0                 device      described
//!            0 ram                   0                 live        saves, loads
//!            0 0000:00:01.0/serial   0         2       device      described   also: serial 1, serial 2
//!            0 slirp                 0                 device      old-style
//! ```
//!
//! One list serves both directions: what it saves in this order it finds when loading, by name and
//! instance, in any order.

use std::fmt;
use std::ops::RangeInclusive;

use vmferry_stream::{Content, InstanceId, Name, Section, SectionId, SectionKind};
use vmferry_vmstate::{ByHand, Description, Device, OldStyle};

use crate::handler::{LoadHandler, SaveHandler};

/// The sending half of a live section.
pub type LiveSaver<'a> = Box<dyn SaveHandler + Send + 'a>;
/// The receiving half of a live section.
pub type LiveLoader<'a> = Box<dyn LoadHandler + Send + 'a>;

/// The order in which sections are saved: higher ones first, equal ones as registered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(pub i32);

/// Everything that can be saved and loaded, in order.
///
/// Owners live here and the machines borrow them, so that a failed transition leaves them to be
/// cleaned up.
#[derive(Debug)]
pub struct Registry<'a> {
    entries: Vec<Entry<'a>>,
    next_section_id: u32,
    blockers: Vec<(BlockerId, String)>,
    next_blocker: u64,
}

/// One registered section.
pub struct Entry<'a> {
    idstr: Name,
    instance: InstanceId,
    /// A second instance number, accepted when loading.
    alias: Option<InstanceId>,
    /// Name without the path, by which older versions know it, and its own count.
    compat: Option<(Name, InstanceId)>,
    versions: RangeInclusive<u32>,
    section_id: SectionId,
    priority: Priority,
    early: bool,
    pub(crate) state: State<'a>,
}

/// Whose state a section carries.
pub(crate) enum State<'a> {
    /// A live handler, in the directions that it knows.
    Live {
        save: Option<LiveSaver<'a>>,
        load: Option<LiveLoader<'a>>,
    },
    /// A device.
    Device(Box<dyn Device + 'a>),
}

/// A section to be registered.
///
/// ```
/// # use vmferry_savevm::{LoadHandler, Priority, Registration, Registry, SaveHandler};
/// # use vmferry_stream::InstanceId;
/// # use vmferry_vmstate::Device;
/// # fn example(
/// #     save: Box<dyn SaveHandler + Send>,
/// #     load: Box<dyn LoadHandler + Send>,
/// #     serial: Box<dyn Device>,
/// #     bridge: Box<dyn Device>,
/// # ) -> Result<(), vmferry_savevm::RegisterError> {
/// let mut registry = Registry::new();
/// registry.register(Registration::live("ram", 4..=4, save, load))?;
/// registry.register(Registration::device("serial", serial).at("0000:00:03.0"))?;
/// registry.register(Registration::device("pci_bridge", bridge).priority(Priority(1)))?;
/// # Ok(()) }
/// ```
#[must_use = "it is not registered yet"]
pub struct Registration<'a> {
    name: String,
    path: Option<String>,
    instance: Option<InstanceId>,
    /// With the version that requires it.
    alias: Option<(InstanceId, u32)>,
    versions: Option<RangeInclusive<u32>>,
    priority: Priority,
    early: bool,
    may_repeat: bool,
    state: State<'a>,
}

/// A section could not be registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// Name and instance are taken.
    #[error("section '{idstr}' instance {} is registered already", instance.0)]
    Taken {
        /// Its name.
        idstr: Name,
        /// Its instance.
        instance: InstanceId,
    },
    /// Device path and name do not fit into the length byte.
    #[error("section '{idstr}' has a name of {} bytes, which may be 255 bytes long", idstr.len())]
    NameTooLong {
        /// The name.
        idstr: String,
    },
    /// An alias for streams that are too old to be read at all.
    #[error(
        "section '{idstr}': its alias is required for version {required_for}, but version \
         {minimum} is the lowest that is read"
    )]
    AliasTooOld {
        /// Its name.
        idstr: Name,
        /// Version that requires the alias.
        required_for: u32,
        /// Lowest version that is read.
        minimum: u32,
    },
    /// The range of versions is empty.
    #[error("section '{idstr}': lowest version {minimum} is above version {version}")]
    NoVersion {
        /// Its name.
        idstr: Name,
        /// Lowest version.
        minimum: u32,
        /// Version that is written.
        version: u32,
    },
    /// The device has no description; an old-style pair of functions is registered as such.
    #[error("device '{idstr}' has no description")]
    NotDescribed {
        /// Its name.
        idstr: Name,
    },
    /// The name says what a section's body is made of.
    #[error(
        "section '{idstr}' cannot be {what}: the bodies of 'block', 'ram' and 'dirty-bitmap', and only those, are received live"
    )]
    WrongName {
        /// Its name.
        idstr: Name,
        /// `a device`, `received live`.
        what: &'static str,
    },
}

/// Names a blocker, to remove it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockerId(u64);

/// Nothing can be saved, or loaded, now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Blocked {
    /// The description of a device, or of a part of it, says that it cannot be migrated.
    #[error("device '{device}' instance {} cannot be migrated", instance.0)]
    Device {
        /// Its section's name.
        device: Name,
        /// Its section's instance.
        instance: InstanceId,
    },
    /// See [`Registry::add_blocker`].
    #[error("migration is blocked: {}", .0.join("; "))]
    Reasons(Vec<String>),
}

impl<'a> Registry<'a> {
    /// No sections yet. The first gets section id 1.
    #[must_use]
    pub fn new() -> Self {
        Self {
            entries: Vec::new(),
            next_section_id: 1,
            blockers: Vec::new(),
            next_blocker: 0,
        }
    }

    /// Add a section; the number is what PART and END will refer to.
    ///
    /// # Errors
    /// See [`RegisterError`].
    pub fn register(&mut self, registration: Registration<'a>) -> Result<SectionId, RegisterError> {
        let idstr = registration.idstr()?;
        let versions = registration.versions(&idstr)?;
        registration.check_name(&idstr)?;
        if let Some((_, required_for)) = registration.alias
            && required_for < *versions.start()
        {
            return Err(RegisterError::AliasTooOld {
                idstr,
                required_for,
                minimum: *versions.start(),
            });
        }
        let (instance, compat) = self.number(&registration, &idstr)?;
        let section_id = self.next_id();
        let priority = registration.priority;
        let place = self.entries.partition_point(|e| e.priority >= priority);
        let entry = Entry {
            idstr,
            instance,
            alias: registration.alias.map(|(instance, _)| instance),
            compat,
            versions,
            section_id,
            priority,
            early: registration.early,
            state: registration.state,
        };
        self.entries.insert(place, entry);
        Ok(section_id)
    }

    /// Take out every section of that device path and name; gives them back.
    pub fn unregister(&mut self, path: Option<&str>, name: &str) -> Vec<Entry<'a>> {
        let idstr = full_name(path, name);
        let is_it = |entry: &mut Entry<'a>| *entry.idstr == *idstr;
        self.entries.extract_if(.., is_it).collect()
    }

    /// Take out one section.
    pub fn remove(&mut self, id: SectionId) -> Option<Entry<'a>> {
        let place = self.entries.iter().position(|e| e.section_id == id)?;
        Some(self.entries.remove(place))
    }

    /// Take out the live sections, as a registry of their own. At a postcopy's destination they go on
    /// receiving while the devices are loaded.
    #[must_use]
    pub fn split_live(&mut self) -> Self {
        Self {
            entries: self
                .entries
                .extract_if(.., |entry| entry.is_live())
                .collect(),
            next_section_id: self.next_section_id,
            blockers: Vec::new(),
            next_blocker: 0,
        }
    }

    /// The sections in their order.
    pub fn entries(&self) -> impl Iterator<Item = &Entry<'a>> {
        self.entries.iter()
    }

    /// Nothing may be saved until this is taken back.
    pub fn add_blocker(&mut self, reason: impl Into<String>) -> BlockerId {
        let id = BlockerId(self.next_blocker);
        self.next_blocker = self.next_blocker.saturating_add(1);
        self.blockers.push((id, reason.into()));
        id
    }

    /// Take a blocker back. No effect if that was done before.
    pub fn remove_blocker(&mut self, id: BlockerId) {
        self.blockers.retain(|(other, _)| *other != id);
    }

    /// Can everything that is registered be saved now?
    ///
    /// # Errors
    /// Names the device, or the reasons.
    pub fn check_saving(&self) -> Result<(), Blocked> {
        self.check_loading()?;
        if self.blockers.is_empty() {
            return Ok(());
        }
        let reasons = self.blockers.iter().map(|(_, reason)| reason.clone());
        Err(Blocked::Reasons(reasons.collect()))
    }

    /// Can everything that is registered be loaded? Blockers do not matter for that.
    ///
    /// # Errors
    /// Names the device that cannot.
    pub fn check_loading(&self) -> Result<(), Blocked> {
        match self.entries.iter().find(|entry| entry.is_unmigratable()) {
            None => Ok(()),
            Some(entry) => Err(Blocked::Device {
                device: entry.idstr.clone(),
                instance: entry.instance,
            }),
        }
    }

    pub(crate) fn entries_mut(&mut self) -> impl Iterator<Item = &mut Entry<'a>> {
        self.entries.iter_mut()
    }

    pub(crate) fn entry(&mut self, id: SectionId) -> Option<&mut Entry<'a>> {
        self.entries.iter_mut().find(|e| e.section_id == id)
    }

    /// The owner of a section that comes in. An entry's own names come before those of older
    /// versions, one entry after another.
    pub(crate) fn find(&self, section: &Section) -> Option<&Entry<'a>> {
        self.entries.iter().find(|entry| entry.answers_to(section))
    }

    /// The instance of a new section, and its plain name with the instance in that name. An instance
    /// that was asked for is one of the plain name: a path tells devices apart already.
    fn number(
        &self,
        registration: &Registration<'_>,
        idstr: &Name,
    ) -> Result<(InstanceId, Option<(Name, InstanceId)>), RegisterError> {
        let own = |e: &Entry<'_>| (e.idstr == *idstr).then_some(e.instance);
        if registration.path.is_none() {
            let instance = registration.instance.unwrap_or_else(|| self.free(own));
            let taken = |e: &Entry<'_>| e.idstr == *idstr && e.instance == instance;
            if !registration.may_repeat && self.entries.iter().any(taken) {
                let idstr = idstr.clone();
                return Err(RegisterError::Taken { idstr, instance });
            }
            return Ok((instance, None));
        }
        let plain = short(&registration.name)?;
        let compat = |e: &Entry<'_>| {
            let (name, instance) = e.compat.as_ref()?;
            (*name == plain).then_some(*instance)
        };
        let compat_instance = registration.instance.unwrap_or_else(|| self.free(compat));
        Ok((self.free(own), Some((plain, compat_instance))))
    }

    /// One more than the highest instance.
    fn free(&self, instance: impl Fn(&Entry<'_>) -> Option<InstanceId>) -> InstanceId {
        let highest = self.entries.iter().filter_map(instance).max();
        highest.map_or(InstanceId(0), |highest| {
            InstanceId(highest.0.saturating_add(1))
        })
    }

    fn next_id(&mut self) -> SectionId {
        loop {
            let id = SectionId(self.next_section_id);
            self.next_section_id = self.next_section_id.wrapping_add(1);
            if !self.entries.iter().any(|entry| entry.section_id == id) {
                return id;
            }
        }
    }
}

impl Default for Registry<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> Registration<'a> {
    /// A live section that is saved and loaded here. It reads these versions and writes the highest.
    pub fn live(
        name: &str,
        versions: RangeInclusive<u32>,
        save: LiveSaver<'a>,
        load: LiveLoader<'a>,
    ) -> Self {
        let (save, load) = (Some(save), Some(load));
        Self::new(name, Some(versions), State::Live { save, load })
    }

    /// A live section that is only saved here.
    pub fn saving(name: &str, version: u32, save: LiveSaver<'a>) -> Self {
        let (save, load) = (Some(save), None);
        Self::new(name, Some(version..=version), State::Live { save, load })
    }

    /// A live section that is only loaded here, in these versions.
    pub fn loading(name: &str, versions: RangeInclusive<u32>, load: LiveLoader<'a>) -> Self {
        let (save, load) = (None, Some(load));
        Self::new(name, Some(versions), State::Live { save, load })
    }

    /// A device with a description, which also says the versions.
    pub fn device(name: &str, device: Box<dyn Device + 'a>) -> Self {
        Self::new(name, None, State::Device(device))
    }

    /// A device with a description that is saved before the first page, among the STARTs. For state
    /// that does not change while the guest runs, and that the destination needs to place what
    /// follows.
    pub fn early_device(name: &str, device: Box<dyn Device + 'a>) -> Self {
        Self {
            early: true,
            ..Self::device(name, device)
        }
    }

    /// A device that saves and loads itself by a pair of functions, in the versions that it says.
    pub fn old_style<T: OldStyle>(name: &str, device: ByHand<T>) -> Self {
        let versions = ByHand::<T>::versions();
        Self::new(name, Some(versions), State::Device(Box::new(device)))
    }

    fn new(name: &str, versions: Option<RangeInclusive<u32>>, state: State<'a>) -> Self {
        Self {
            name: name.to_owned(),
            path: None,
            instance: None,
            alias: None,
            versions,
            priority: Priority::default(),
            early: false,
            may_repeat: false,
            state,
        }
    }

    /// The device is on a bus: the section is called `<path>/<name>`. Streams of versions that did
    /// not send the path, find it by its name and an instance that counts devices of that name.
    pub fn at(mut self, path: &str) -> Self {
        self.path = Some(path.to_owned());
        self
    }

    /// Which of several of that name; without it, the highest so far and one more. With a path this
    /// is the instance for streams without the path.
    pub fn instance(mut self, instance: InstanceId) -> Self {
        self.instance = Some(instance);
        self
    }

    /// Accept this instance number too when loading, with the path and without it. It is there for
    /// streams of that version, which must be one that is read; others may use it as well.
    pub fn alias(mut self, instance: InstanceId, required_for_version: u32) -> Self {
        self.alias = Some((instance, required_for_version));
        self
    }

    /// Another section may have the same name and instance, as in streams of real machines: a
    /// destination gives both to one device. For whoever saves what came from elsewhere.
    pub fn may_repeat(mut self) -> Self {
        self.may_repeat = true;
        self
    }

    /// Where in the order.
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }

    fn idstr(&self) -> Result<Name, RegisterError> {
        short(&full_name(self.path.as_deref(), &self.name))
    }

    fn versions(&self, idstr: &Name) -> Result<RangeInclusive<u32>, RegisterError> {
        let versions = match (&self.versions, &self.state) {
            (Some(versions), _) => Some(versions.clone()),
            (None, State::Live { .. }) => None,
            (None, State::Device(device)) => device
                .description()
                .map(|it| it.minimum_version..=it.version),
        };
        let versions = versions.ok_or_else(|| RegisterError::NotDescribed {
            idstr: idstr.clone(),
        })?;
        if versions.is_empty() {
            return Err(RegisterError::NoVersion {
                idstr: idstr.clone(),
                minimum: *versions.start(),
                version: *versions.end(),
            });
        }
        Ok(versions)
    }

    /// The decoder knows bodies by their section's name.
    fn check_name(&self, idstr: &Name) -> Result<(), RegisterError> {
        let section = Section {
            kind: SectionKind::Full,
            id: SectionId(0),
            name: idstr.clone(),
            instance: InstanceId(0),
            version: 0,
        };
        let is_device_name = section.content() == Content::Device;
        let what = match &self.state {
            State::Device(_) if !is_device_name => "a device",
            State::Live { load: Some(_), .. } if is_device_name => "received live",
            _ => return Ok(()),
        };
        let idstr = idstr.clone();
        Err(RegisterError::WrongName { idstr, what })
    }
}

impl<'a> Entry<'a> {
    /// Name on the wire: `<device path>/<name>` for a device on a bus.
    #[must_use]
    pub fn idstr(&self) -> &Name {
        &self.idstr
    }

    /// Which of several of that name.
    #[must_use]
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Versions that are read; the highest is written.
    #[must_use]
    pub fn versions(&self) -> RangeInclusive<u32> {
        self.versions.clone()
    }

    /// What PART and END refer to.
    #[must_use]
    pub fn section_id(&self) -> SectionId {
        self.section_id
    }

    /// What the device's state looks like; `None` for live sections and old-style devices.
    #[must_use]
    pub fn description(&self) -> Option<&Description> {
        match &self.state {
            State::Live { .. } => None,
            State::Device(device) => device.description(),
        }
    }

    /// Is it sent while the guest runs?
    #[must_use]
    pub fn is_live(&self) -> bool {
        matches!(self.state, State::Live { .. })
    }

    pub(crate) fn is_early(&self) -> bool {
        self.early
    }

    pub(crate) fn section(&self, kind: SectionKind) -> Section {
        Section {
            kind,
            id: self.section_id,
            name: self.idstr.clone(),
            instance: self.instance,
            version: *self.versions.end(),
        }
    }

    pub(crate) fn saver(&mut self) -> Option<&mut LiveSaver<'a>> {
        match &mut self.state {
            State::Live { save, .. } => save.as_mut(),
            State::Device(_) => None,
        }
    }

    pub(crate) fn loader(&mut self) -> Option<&mut LiveLoader<'a>> {
        match &mut self.state {
            State::Live { load, .. } => load.as_mut(),
            State::Device(_) => None,
        }
    }

    pub(crate) fn device(&mut self) -> Option<&mut Box<dyn Device + 'a>> {
        match &mut self.state {
            State::Live { .. } => None,
            State::Device(device) => Some(device),
        }
    }

    fn is_unmigratable(&self) -> bool {
        self.description().is_some_and(is_unmigratable)
    }

    /// A live section that is only saved here cannot receive.
    fn answers_to(&self, section: &Section) -> bool {
        let receives = !matches!(self.state, State::Live { load: None, .. });
        // Whatever the version: QEMU 10.0 takes an rtc with its alias, which is required for version
        // 3, in sections of version 1.
        let is_alias = self.alias == Some(section.instance);
        let is_own = self.idstr == section.name && (self.instance == section.instance || is_alias);
        let is_compat = self.compat.as_ref().is_some_and(|(name, instance)| {
            *name == section.name && (*instance == section.instance || is_alias)
        });
        receives && (is_own || is_compat)
    }
}

/// Is there a part, a struct or a subsection, that cannot be migrated?
fn is_unmigratable(description: &Description) -> bool {
    let structs = description.fields.iter();
    let mut parts = structs
        .filter_map(|field| field.inner.as_ref())
        .chain(&description.subsections);
    description.unmigratable || parts.any(is_unmigratable)
}

fn full_name(path: Option<&str>, name: &str) -> String {
    match path {
        Some(path) => format!("{path}/{name}"),
        None => name.to_owned(),
    }
}

fn short(idstr: &str) -> Result<Name, RegisterError> {
    Name::new(idstr).map_err(|_| RegisterError::NameTooLong {
        idstr: idstr.to_owned(),
    })
}

impl fmt::Debug for Entry<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("idstr", &self.idstr)
            .field("instance", &self.instance)
            .field("section_id", &self.section_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Registration<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("name", &self.name)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}
