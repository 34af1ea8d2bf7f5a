//! The machine that reads a stream: finds each section's owner and feeds it.
//!
//! ```text
//!               ┌─ live ──▶ start ─▶ record, payload … ─▶ footer ─▶ end
//!   section ────┼─ device ▶ decode ─▶ (NeedMore …) ─────▶ footer ─▶ commit
//!               └─ nobody ▶ refused, or the rest
//!   command ────▶ checked against the state of postcopy ─▶ the driver
//!   PACKAGED ───▶ the driver reads the package ─▶ package() ─▶ … RUN ─▶ leave_package()
//! ```
//!
//! What has no owner is either refused or passed on as *the rest*: the bytes of the stream without
//! the owned sections, which are a stream of their own.
//!
//! A device's state is decoded without changing the device; it is put in place when the footer of
//! its section was right.

mod error;

use vmferry_stream::{
    Command, Configuration, Content, Decoder, Ending, Expect, Footers, Options, Record, Section,
    SectionId, SectionKind, Step,
};
use vmferry_vmstate::{Decoded, DeviceError};

use crate::handler::{GuestStopped, HandlerError};
use crate::machine::Machine;
use crate::postcopy::{Incoming, PostcopyState};
use crate::registry::{Entry, LiveLoader, Registry};

pub use error::{LoadError, SectionLabel};

/// Bytes of one device's state, which is decoded from one window. The largest that we saw, of an
/// e1000, has 198,785; a QEMU has no limit.
pub const MAX_DEVICE_BYTES: usize = 64 << 20;

/// What to expect of a stream.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// How its bytes are laid out. A machine that must not be confused with another requires the
    /// configuration; machine types up to 2.3 do not send it.
    pub stream: Options,
    /// The machine here; `None` takes a stream of any machine.
    pub machine: Option<Machine>,
    /// Why a section without an owner is refused; `None` passes it on as the rest.
    pub refuse_rest: Option<&'static str>,
    /// Read a description after EOF: a sender that is still writing it must not get a reset. If it is
    /// not there the stream ends in [`Ending::WithoutDescription`]. False ends the stream at EOF.
    pub description: bool,
    /// What of postcopy is accepted.
    pub postcopy: Incoming,
}

impl Default for LoadOptions {
    /// A precopy of any machine, with any sections, as any QEMU sends it.
    fn default() -> Self {
        Self {
            stream: Options::default(),
            machine: None,
            refuse_rest: None,
            description: true,
            postcopy: Incoming::Refused("postcopy is not accepted here"),
        }
    }
}

/// To whom bytes belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// An entry of the registry, which has them already (records) or wants them (payload).
    Handler,
    /// The rest of the stream.
    Rest,
}

/// What the machine says to a window of input.
#[derive(Debug, PartialEq, Eq)]
pub enum LoadStep {
    /// The window must have at least so many bytes. Between devices that is at most
    /// [`MAX_HEADER_BYTES`](vmferry_stream::limits::MAX_HEADER_BYTES). Inside a device's state, whose
    /// length nobody knows, it is one byte more than the window had, up to [`MAX_DEVICE_BYTES`]: more
    /// may never come. Its decoding starts anew each time, so offer room for twice the window and
    /// take what is there.
    NeedMore(usize),
    /// A record was read; drop `used` bytes from the window.
    Record {
        /// The record. Its owner, if it has one, has seen it.
        record: Record,
        /// Its length in the window.
        used: usize,
        /// Whose it is.
        owner: Owner,
    },
    /// A device's state was decoded; drop `used` bytes (possibly none) from the window.
    Device {
        /// Its length in the window.
        used: usize,
    },
    /// The next bytes are payload. For a handler: read them into [`LoadMachine::payload`], then call
    /// [`LoadMachine::payload_filled`].
    Payload {
        /// How many.
        bytes: u32,
        /// Whose they are.
        owner: Owner,
    },
    /// The stream is over.
    End,
}

/// Something that does not keep a stream from being loaded, but that somebody should know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The source sent the guest's UUID, and there is none here to compare it with.
    UuidNotCompared,
    /// A second OPEN_RETURN_PATH.
    ReturnPathOpenedTwice,
    /// POSTCOPY_RESUME or RECV_BITMAP, although nothing was interrupted. It has no effect.
    NothingToRecover,
}

/// Loads one stream.
#[derive(Debug)]
pub struct LoadMachine {
    options: LoadOptions,
    devices_only: bool,
    decoder: Decoder,
    open: Option<Open>,
    place: Place,
    postcopy: PostcopyState,
    return_path: bool,
    notices: Vec<Notice>,
    begun: bool,
    over: bool,
}

/// Is told every record, and may refuse.
type Heard<'a> = dyn FnMut(&Record) -> Result<(), HandlerError> + 'a;

/// What the machine reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Stream,
    Package,
    /// The connection after an interrupted postcopy.
    Recovery,
}

/// The section that is being read.
#[derive(Debug)]
struct Open {
    section: Section,
    /// Where its body begins.
    offset: u64,
    owner: OpenOwner,
}

#[derive(Debug)]
enum OpenOwner {
    Rest,
    Live(SectionId),
    /// Its body is awaited; names the field in which the last window ended.
    Awaited(SectionId, String),
    /// Its state waits for the footer.
    Decoded(Decoded),
}

impl LoadMachine {
    /// A machine at the first byte of a stream.
    #[must_use]
    pub fn new(options: LoadOptions) -> Self {
        let mut stream = options.stream;
        if let Some(machine) = &options.machine {
            stream.page_bits = machine.smallest_page_bits;
        }
        Self {
            options,
            devices_only: false,
            decoder: Decoder::new(stream),
            open: None,
            place: Place::Stream,
            postcopy: PostcopyState::None,
            return_path: false,
            notices: Vec::new(),
            begun: false,
            over: false,
        }
    }

    /// A machine that loads a stream of [`crate::save_device_state`]: the state of devices and
    /// nothing else. The guest must not run, or it would see its devices change.
    #[must_use]
    pub fn of_device_state(footers: Footers, _stopped: &GuestStopped) -> Self {
        let options = LoadOptions {
            stream: Options {
                configuration: Expect::Absent,
                footers,
                ..Options::default()
            },
            refuse_rest: Some("no such device is here"),
            description: false,
            ..LoadOptions::default()
        };
        Self {
            devices_only: true,
            ..Self::new(options)
        }
    }

    /// A machine for the content of the package that was announced last, with the same section ids.
    /// It is at its end when it has read POSTCOPY_RUN; what follows that is ignored. Then tell
    /// [`LoadMachine::leave_package`].
    ///
    /// It is a value of its own because this machine goes on meanwhile: loading devices reads guest
    /// memory, and its pages come on the connection.
    #[must_use]
    pub fn package(&self) -> Self {
        self.nested(self.decoder.package(), Place::Package)
    }

    /// A machine for the connection on which an interrupted postcopy goes on: no header, the same
    /// section ids. What was half received is forgotten.
    #[must_use]
    pub fn resumed(&self) -> Self {
        self.nested(self.decoder.resumed(), Place::Recovery)
    }

    fn nested(&self, decoder: Decoder, place: Place) -> Self {
        Self {
            options: self.options.clone(),
            devices_only: self.devices_only,
            decoder,
            open: None,
            place,
            postcopy: self.postcopy,
            return_path: self.return_path,
            notices: self.notices.clone(),
            begun: self.begun,
            over: false,
        }
    }

    /// The package was loaded.
    ///
    /// # Errors
    /// It did not start the guest.
    pub fn leave_package(&mut self, package: Self) -> Result<(), LoadError> {
        if package.postcopy != PostcopyState::Running {
            return Err(LoadError::PackageWithoutRun);
        }
        self.postcopy = package.postcopy;
        self.return_path = package.return_path;
        self.notices = package.notices;
        Ok(())
    }

    /// Load a stream that is in memory, packages in it included, to its end: the whole driver for
    /// whoever answers nobody and needs no windows. What belongs to nobody is passed over; bytes
    /// behind the stream stay unread, see [`LoadMachine::offset`]. Then comes [`load_cleanup`].
    ///
    /// # Errors
    /// See [`LoadError`]. Devices whose sections were whole have their new state.
    pub fn load_slice(
        &mut self,
        stream: &[u8],
        registry: &mut Registry<'_>,
    ) -> Result<Ending, LoadError> {
        self.load_all(stream, registry, &mut |_| Ok(()))
    }

    /// Like [`LoadMachine::load_slice`]; `heard` is told every record, and may refuse. For the content
    /// of a package, with the machine of [`LoadMachine::package`].
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn load_heard(
        &mut self,
        bytes: &[u8],
        registry: &mut Registry<'_>,
        mut heard: impl FnMut(&Record) -> Result<(), HandlerError>,
    ) -> Result<Ending, LoadError> {
        self.load_all(bytes, registry, &mut heard)
    }

    fn load_nested(
        &mut self,
        bytes: &[u8],
        registry: &mut Registry<'_>,
        heard: &mut Heard<'_>,
    ) -> Result<(), LoadError> {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let offset = self.offset().saturating_sub(length);
        let in_package = |source| {
            let source = Box::new(source);
            LoadError::Package { offset, source }
        };
        let mut package = self.package();
        let loaded = package.load_all(bytes, registry, heard);
        loaded.map_err(in_package)?;
        self.leave_package(package).map_err(in_package)
    }

    fn load_all(
        &mut self,
        bytes: &[u8],
        registry: &mut Registry<'_>,
        heard: &mut Heard<'_>,
    ) -> Result<Ending, LoadError> {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let end = self.offset().saturating_add(length);
        let mut window = bytes;
        let mut is_package = false;
        loop {
            let used = match self.step(window, registry)? {
                LoadStep::End | LoadStep::NeedMore(_) => return self.finish_at(end),
                LoadStep::Device { used } => used,
                LoadStep::Record { record, used, .. } => {
                    heard(&record).map_err(|reason| self.refused(&record, reason.to_string()))?;
                    is_package = matches!(record, Record::Command(Command::Packaged { .. }));
                    used
                }
                LoadStep::Payload { bytes, owner } => {
                    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
                    let Some(payload) = window.get(..length) else {
                        return self.finish_at(end);
                    };
                    if owner == Owner::Handler {
                        self.payload(registry, length)?.copy_from_slice(payload);
                        self.payload_filled(registry)?;
                    } else if is_package {
                        self.load_nested(payload, registry, heard)?;
                    }
                    length
                }
            };
            window = window.get(used..).unwrap_or_default();
        }
    }

    /// Offset in the stream of the next byte.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.decoder.offset()
    }

    /// How far a postcopy is.
    #[must_use]
    pub fn postcopy(&self) -> PostcopyState {
        self.postcopy
    }

    /// May something be sent to the source?
    #[must_use]
    pub fn is_return_path_open(&self) -> bool {
        self.return_path
    }

    /// What somebody should know, each once.
    #[must_use]
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// How the stream ends if it ends here; `None` if it would be truncated.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        match self.over {
            true => Some(Ending::WithoutDescription),
            false => self.decoder.ending(),
        }
    }

    /// The input has ended, at byte `end`.
    ///
    /// # Errors
    /// The stream is truncated.
    pub fn finish_at(&self, end: u64) -> Result<Ending, LoadError> {
        if self.over && end >= self.offset() {
            return Ok(Ending::WithoutDescription);
        }
        match &self.open {
            Some(Open {
                section,
                offset,
                owner: OpenOwner::Awaited(_, field),
            }) => Err(LoadError::DeviceTruncated {
                section: section.into(),
                offset: *offset,
                end,
                field: field.clone(),
            }),
            _ => Ok(self.decoder.finish_at(end)?),
        }
    }

    /// Look at the next bytes of the stream. Call it again with the same window, and more, after
    /// [`LoadStep::NeedMore`].
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn step(
        &mut self,
        window: &[u8],
        registry: &mut Registry<'_>,
    ) -> Result<LoadStep, LoadError> {
        if !self.begun {
            registry.check_loading()?;
            self.begun = true;
        }
        if self.over {
            return Ok(LoadStep::End);
        }
        if let Some(Open {
            owner: OpenOwner::Awaited(id, _),
            ..
        }) = &self.open
        {
            return self.device_body(*id, window, registry);
        }
        match self.decoder.step(window)? {
            Step::NeedMore(bytes) => Ok(LoadStep::NeedMore(bytes)),
            Step::Payload(bytes) => Ok(LoadStep::Payload {
                bytes,
                owner: self.owner(),
            }),
            Step::End => Ok(LoadStep::End),
            Step::Record { record, used } => {
                let owner = self.take(&record, registry)?;
                Ok(LoadStep::Record {
                    record,
                    used,
                    owner,
                })
            }
        }
    }

    /// Room for payload that belongs to a handler, exactly `bytes` long.
    ///
    /// # Errors
    /// The handler has none.
    pub fn payload<'r>(
        &self,
        registry: &'r mut Registry<'_>,
        bytes: usize,
    ) -> Result<&'r mut [u8], LoadError> {
        let (section, handler) = self.open_handler(registry)?;
        let room = handler
            .payload(bytes)
            .map_err(|source| failed(section, source))?;
        match room.len() == bytes {
            true => Ok(room),
            false => Err(failed(section, "room of another length".into())),
        }
    }

    /// The payload is in place.
    ///
    /// # Errors
    /// The handler failed.
    pub fn payload_filled(&self, registry: &mut Registry<'_>) -> Result<(), LoadError> {
        let (section, handler) = self.open_handler(registry)?;
        let filled = handler.payload_filled();
        filled.map_err(|source| failed(section, source))
    }

    fn owner(&self) -> Owner {
        match &self.open {
            None
            | Some(Open {
                owner: OpenOwner::Rest,
                ..
            }) => Owner::Rest,
            Some(_) => Owner::Handler,
        }
    }

    fn take(&mut self, record: &Record, registry: &mut Registry<'_>) -> Result<Owner, LoadError> {
        match record {
            Record::Configuration(configuration) => self.check_machine(configuration)?,
            Record::Section(section) => return self.open_section(section, registry),
            Record::SectionEnd { .. } => return self.close_section(registry),
            Record::Command(command) => self.command(command)?,
            Record::Eof => self.end_of_stream(),
            record if self.owner() == Owner::Handler => {
                let (section, handler) = self.open_handler(registry)?;
                let taken = handler.record(record);
                taken.map_err(|source| failed(section, source))?;
                return Ok(Owner::Handler);
            }
            _ => {}
        }
        Ok(Owner::Rest)
    }

    fn check_machine(&mut self, received: &Configuration) -> Result<(), LoadError> {
        let Some(machine) = &self.options.machine else {
            return Ok(());
        };
        machine.check(received)?;
        if received.uuid.is_some() && machine.uuid.is_none() {
            self.notice(Notice::UuidNotCompared);
        }
        Ok(())
    }

    fn command(&mut self, command: &Command) -> Result<(), LoadError> {
        let in_package = self.place == Place::Package;
        match command {
            Command::Ping(_) if !self.return_path => {
                return Err(self.refuse(command, "no return path was opened".into()));
            }
            Command::OpenReturnPath if self.return_path => {
                self.notice(Notice::ReturnPathOpenedTwice);
            }
            Command::OpenReturnPath => self.return_path = true,
            // As QEMU 10.0 does. 7.2 takes it even where COLO is off.
            Command::EnableColo => {
                return Err(self.refuse(command, "COLO is not supported here".into()));
            }
            Command::PostcopyResume | Command::ReceivedBitmap(_)
                if self.place != Place::Recovery =>
            {
                self.notice(Notice::NothingToRecover);
            }
            _ => {}
        }
        let accepted = self.options.postcopy;
        let after = self.postcopy.after(command, accepted, in_package);
        self.postcopy = after.map_err(|reason| self.refuse(command, reason))?;
        if in_package && *command == Command::PostcopyRun {
            self.over = true;
        }
        Ok(())
    }

    fn end_of_stream(&mut self) {
        match self.place {
            // What is missing will be noticed in `leave_package`.
            Place::Package => self.over = true,
            Place::Stream | Place::Recovery => {
                self.postcopy = PostcopyState::Ended;
                self.over = !self.options.description;
            }
        }
    }

    fn open_section(
        &mut self,
        section: &Section,
        registry: &mut Registry<'_>,
    ) -> Result<Owner, LoadError> {
        let is_live = section.kind != SectionKind::Full || section.content() != Content::Device;
        if self.devices_only && is_live {
            let section = section.into();
            return Err(LoadError::NotADevice { section });
        }
        let id = match registry.find(section) {
            Some(entry) => {
                check_version(section, entry)?;
                Some(entry.section_id())
            }
            None => None,
        };
        let owner = match id.and_then(|id| registry.entry(id)) {
            None => self.pass_on(section)?,
            Some(entry) => match entry.loader() {
                None => OpenOwner::Awaited(entry.section_id(), String::new()),
                Some(handler) => {
                    if matches!(section.kind, SectionKind::Start | SectionKind::Full) {
                        let started = handler.start(section.version);
                        started.map_err(|source| failed(section, source))?;
                    }
                    OpenOwner::Live(entry.section_id())
                }
            },
        };
        self.open = Some(Open {
            section: section.clone(),
            offset: self.decoder.offset(),
            owner,
        });
        Ok(self.owner())
    }

    /// Nobody owns the section.
    fn pass_on(&mut self, section: &Section) -> Result<OpenOwner, LoadError> {
        if let Some(hint) = self.options.refuse_rest {
            return Err(LoadError::UnknownSection {
                offset: self.decoder.offset(),
                section: section.name.clone(),
                instance: section.instance,
                hint,
            });
        }
        if section.content() == Content::Device {
            self.decoder.pass_rest();
        }
        Ok(OpenOwner::Rest)
    }

    /// Decode the body of the open section, which begins with the window.
    fn device_body(
        &mut self,
        id: SectionId,
        window: &[u8],
        registry: &mut Registry<'_>,
    ) -> Result<LoadStep, LoadError> {
        let Some(open) = &mut self.open else {
            return Ok(LoadStep::NeedMore(1));
        };
        let (section, offset) = (&open.section, open.offset);
        let Some(device) = registry.entry(id).and_then(Entry::device) else {
            return Err(no_handler(section));
        };
        let window = window.get(..MAX_DEVICE_BYTES).unwrap_or(window);
        match device.decode(section.version, window) {
            Ok(decoded) => {
                let used = decoded.used.min(window.len());
                open.owner = OpenOwner::Decoded(decoded);
                self.decoder.skip_device(u64::try_from(used).unwrap_or(0));
                if used > 0 {
                    // The announcement of the body, which is here already.
                    self.decoder.step(&[])?;
                }
                Ok(LoadStep::Device { used })
            }
            Err(DeviceError::Incomplete { field, .. }) if window.len() < MAX_DEVICE_BYTES => {
                open.owner = OpenOwner::Awaited(id, field);
                Ok(LoadStep::NeedMore(window.len().saturating_add(1)))
            }
            Err(DeviceError::Incomplete { field, .. }) => Err(LoadError::DeviceTooLong {
                section: section.into(),
                offset,
                max: MAX_DEVICE_BYTES,
                field,
            }),
            Err(source) => Err(LoadError::Device {
                section: section.into(),
                offset,
                source: Box::new(source),
            }),
        }
    }

    fn close_section(&mut self, registry: &mut Registry<'_>) -> Result<Owner, LoadError> {
        let owner = self.owner();
        let Some(open) = self.open.take() else {
            return Ok(owner);
        };
        let section = &open.section;
        match open.owner {
            OpenOwner::Rest | OpenOwner::Awaited(..) => {}
            OpenOwner::Decoded(decoded) => {
                decoded.commit().map_err(|source| LoadError::Device {
                    section: section.into(),
                    offset: open.offset,
                    source: Box::new(source),
                })?;
            }
            OpenOwner::Live(id) => {
                if matches!(section.kind, SectionKind::End | SectionKind::Full) {
                    let ended = live_handler(id, section, registry)?.end();
                    ended.map_err(|source| failed(section, source))?;
                }
            }
        }
        Ok(owner)
    }

    fn open_handler<'s, 'r, 'a>(
        &'s self,
        registry: &'r mut Registry<'a>,
    ) -> Result<(&'s Section, &'r mut LiveLoader<'a>), LoadError> {
        match &self.open {
            Some(Open {
                section,
                owner: OpenOwner::Live(id),
                ..
            }) => Ok((section, live_handler(*id, section, registry)?)),
            Some(open) => Err(no_handler(&open.section)),
            None => Err(no_handler(&no_section())),
        }
    }

    fn refuse(&self, command: &Command, reason: String) -> LoadError {
        LoadError::Command {
            offset: self.decoder.offset(),
            command: command.name(),
            reason,
        }
    }

    /// The driver does not like a record.
    fn refused(&self, record: &Record, reason: String) -> LoadError {
        match (record, &self.open) {
            (Record::Command(command), _) => self.refuse(command, reason),
            (_, Some(open)) => failed(&open.section, reason.into()),
            (_, None) => failed(&no_section(), reason.into()),
        }
    }

    fn notice(&mut self, notice: Notice) {
        if !self.notices.contains(&notice) {
            self.notices.push(notice);
        }
    }
}

/// End what runs for the handlers that load, whatever happened before.
pub fn load_cleanup(registry: &mut Registry<'_>) {
    for entry in registry.entries_mut() {
        if let Some(loader) = entry.loader() {
            loader.cleanup();
        }
    }
}

fn check_version(section: &Section, entry: &Entry<'_>) -> Result<(), LoadError> {
    let (version, versions) = (section.version, entry.versions());
    if version > *versions.end() {
        return Err(LoadError::VersionTooHigh {
            section: section.into(),
            version,
            max: *versions.end(),
        });
    }
    if version < *versions.start() {
        return Err(LoadError::VersionTooLow {
            section: section.into(),
            version,
            min: *versions.start(),
        });
    }
    Ok(())
}

fn live_handler<'r, 'a>(
    id: SectionId,
    section: &Section,
    registry: &'r mut Registry<'a>,
) -> Result<&'r mut LiveLoader<'a>, LoadError> {
    let handler = registry.entry(id).and_then(Entry::loader);
    handler.ok_or_else(|| no_handler(section))
}

fn failed(section: &Section, source: HandlerError) -> LoadError {
    LoadError::Section {
        section: section.into(),
        source,
    }
}

/// The caller asked for a handler's payload outside its section, or took it from the registry.
fn no_handler(section: &Section) -> LoadError {
    failed(section, "no handler is at work".into())
}

fn no_section() -> Section {
    Section {
        kind: SectionKind::Full,
        id: SectionId(0),
        name: vmferry_stream::Name::default(),
        instance: vmferry_stream::InstanceId(0),
        version: 0,
    }
}
