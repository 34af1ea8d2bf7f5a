//! The machine that reads a stream: finds each section's owner and feeds it.
//!
//! What has no owner is either refused or passed on as *the rest*: the bytes of the stream without
//! the owned sections, which are a stream of their own.

use vmferry_stream::{
    Blame, Content, DecodeError, Decoder, Ending, Name, Options, Record, Section, SectionKind, Step,
};

use crate::handler::HandlerError;
use crate::registry::LoadRegistry;

/// A stream could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The bytes are wrong.
    #[error(transparent)]
    Stream(#[from] DecodeError),
    /// The stream is of another machine.
    #[error("received machine '{received}', here is '{local}'")]
    Machine {
        /// In the stream.
        received: Name,
        /// Here.
        local: Name,
    },
    /// Nobody here owns this section.
    #[error("byte {offset}: unknown section '{section}' instance {instance}: {hint}")]
    UnknownSection {
        /// Where its header ends.
        offset: u64,
        /// Its name.
        section: Name,
        /// Its instance.
        instance: u32,
        /// What that means.
        hint: &'static str,
    },
    /// The section is of a version that is not read here.
    #[error("section '{section}' has version {version}, versions {min} to {max} are read here")]
    Version {
        /// Its name.
        section: Name,
        /// In the stream.
        version: u32,
        /// Lowest here.
        min: u32,
        /// Highest here.
        max: u32,
    },
    /// The owner failed.
    #[error("section '{section}': {source}")]
    Section {
        /// Its name.
        section: Name,
        /// What the owner said.
        source: HandlerError,
    },
}

impl LoadError {
    /// Whose fault it is. An owner's failure counts as this host's.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self {
            Self::Stream(error) => error.blame(),
            Self::Machine { .. } | Self::UnknownSection { .. } | Self::Version { .. } => {
                Blame::Peer
            }
            Self::Section { .. } => Blame::Host,
        }
    }
}

/// What to expect of a stream.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// How its bytes are laid out.
    pub stream: Options,
    /// Name of the machine here, of which the received name must be a beginning, as in QEMU;
    /// `None` takes a stream of any machine.
    pub machine: Option<Name>,
    /// Why a section without an owner is refused; `None` passes it on as the rest.
    pub refuse_rest: Option<&'static str>,
}

/// To whom bytes belong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A handler of the registry, which has them already (records) or wants them (payload).
    Handler,
    /// The rest of the stream.
    Rest,
}

/// What the machine says to a window of input.
#[derive(Debug, PartialEq, Eq)]
pub enum LoadStep {
    /// The window must have at least so many bytes.
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

/// Loads one stream.
#[derive(Debug)]
pub struct LoadMachine {
    options: LoadOptions,
    decoder: Decoder,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    section: Section,
    owner: Owner,
}

impl LoadMachine {
    /// A machine at the first byte of a stream.
    #[must_use]
    pub fn new(options: LoadOptions) -> Self {
        Self {
            decoder: Decoder::new(options.stream),
            options,
            open: None,
        }
    }

    /// Offset in the stream of the next byte.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.decoder.offset()
    }

    /// How the stream ends if it ends here; `None` if it would be truncated.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.decoder.ending()
    }

    /// The input has ended, at byte `end`.
    ///
    /// # Errors
    /// The stream is truncated.
    pub fn finish_at(&self, end: u64) -> Result<Ending, LoadError> {
        Ok(self.decoder.finish_at(end)?)
    }

    /// Look at the next bytes of the stream.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn step(
        &mut self,
        window: &[u8],
        registry: &mut LoadRegistry<'_>,
    ) -> Result<LoadStep, LoadError> {
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
        registry: &'r mut LoadRegistry<'_>,
        bytes: usize,
    ) -> Result<&'r mut [u8], LoadError> {
        let (section, entry) = self.open_handler(registry)?;
        entry
            .handler
            .payload(bytes)
            .map_err(|source| failed(section, source))
    }

    /// The payload is in place.
    ///
    /// # Errors
    /// The handler failed.
    pub fn payload_filled(&self, registry: &mut LoadRegistry<'_>) -> Result<(), LoadError> {
        let (section, entry) = self.open_handler(registry)?;
        entry
            .handler
            .payload_filled()
            .map_err(|source| failed(section, source))
    }

    fn owner(&self) -> Owner {
        self.open.as_ref().map_or(Owner::Rest, |open| open.owner)
    }

    fn take(
        &mut self,
        record: &Record,
        registry: &mut LoadRegistry<'_>,
    ) -> Result<Owner, LoadError> {
        match record {
            Record::Configuration(configuration) => {
                self.check_machine(&configuration.machine)?;
                Ok(Owner::Rest)
            }
            Record::Section(section) => self.open_section(section, registry),
            Record::SectionEnd { .. } => self.close_section(registry),
            record if self.owner() == Owner::Handler => {
                let (section, entry) = self.open_handler(registry)?;
                entry
                    .handler
                    .record(record)
                    .map_err(|source| failed(section, source))?;
                Ok(Owner::Handler)
            }
            _ => Ok(Owner::Rest),
        }
    }

    fn check_machine(&self, received: &Name) -> Result<(), LoadError> {
        match &self.options.machine {
            Some(local) if !local.starts_with(received.as_str()) => Err(LoadError::Machine {
                received: received.clone(),
                local: local.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn open_section(
        &mut self,
        section: &Section,
        registry: &mut LoadRegistry<'_>,
    ) -> Result<Owner, LoadError> {
        let owner = match registry.find(&section.name, section.instance) {
            Some(entry) => {
                if section.version < entry.version_min || section.version > entry.version {
                    return Err(LoadError::Version {
                        section: section.name.clone(),
                        version: section.version,
                        min: entry.version_min,
                        max: entry.version,
                    });
                }
                if matches!(section.kind, SectionKind::Start | SectionKind::Full) {
                    let started = entry.handler.start(section.version);
                    started.map_err(|source| failed(&section.name, source))?;
                }
                Owner::Handler
            }
            None => {
                self.refuse_rest(section)?;
                if section.content() == Content::Device {
                    self.decoder.pass_rest();
                }
                Owner::Rest
            }
        };
        self.open = Some(Open {
            section: section.clone(),
            owner,
        });
        Ok(owner)
    }

    fn refuse_rest(&self, section: &Section) -> Result<(), LoadError> {
        match self.options.refuse_rest {
            None => Ok(()),
            Some(hint) => Err(LoadError::UnknownSection {
                offset: self.decoder.offset(),
                section: section.name.clone(),
                instance: section.instance.0,
                hint,
            }),
        }
    }

    fn close_section(&mut self, registry: &mut LoadRegistry<'_>) -> Result<Owner, LoadError> {
        let owner = self.owner();
        if owner == Owner::Handler {
            let (section, entry) = self.open_handler(registry)?;
            let is_last = self.open.as_ref().is_some_and(|open| {
                matches!(open.section.kind, SectionKind::End | SectionKind::Full)
            });
            if is_last {
                entry
                    .handler
                    .end()
                    .map_err(|source| failed(section, source))?;
            }
        }
        self.open = None;
        Ok(owner)
    }

    fn open_handler<'s, 'r, 'h>(
        &'s self,
        registry: &'r mut LoadRegistry<'h>,
    ) -> Result<(&'s Name, &'r mut crate::Entry<dyn crate::LoadHandler + 'h>), LoadError> {
        let Some(Open {
            section,
            owner: Owner::Handler,
        }) = &self.open
        else {
            return Err(no_handler(Name::default()));
        };
        match registry.find(&section.name, section.instance) {
            Some(entry) => Ok((&section.name, entry)),
            None => Err(no_handler(section.name.clone())),
        }
    }
}

fn failed(section: &Name, source: HandlerError) -> LoadError {
    LoadError::Section {
        section: section.clone(),
        source,
    }
}

/// The caller asked for a handler's payload outside its section, or took it from the registry.
fn no_handler(section: Name) -> LoadError {
    LoadError::Section {
        section,
        source: "no handler is at work".into(),
    }
}
