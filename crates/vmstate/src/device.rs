//! A device as the registry sees it.

use std::fmt;

use vmferry_stream::Blame;

use crate::description::Description;
use crate::saved::SavedBody;

/// A device that can be saved and loaded: one section of a stream.
pub trait Device: Send {
    /// What its state looks like; `None` for an old-style pair of functions.
    fn description(&self) -> Option<&Description>;

    /// Is there anything to save now? Asked when the guest has stopped.
    fn is_needed(&self) -> bool;

    /// Its state now, hooks included.
    ///
    /// # Errors
    /// A hook failed, or the state does not fit its description.
    fn save(&mut self) -> Result<SavedBody, DeviceError>;

    /// Decode a body that starts at the beginning of `window` and may end before it does. Nothing
    /// changes in the device: it is told to [`Decoded::commit`] when the section was whole.
    ///
    /// # Errors
    /// [`DeviceError::Incomplete`] if the window ends inside the body, or right behind its last
    /// field, where a subsection could still follow (in a stream, at least one byte follows every
    /// body); else the body is wrong, or a hook refused it.
    fn decode(&self, version: u32, window: &[u8]) -> Result<Decoded, DeviceError>;
}

/// State that was decoded and waits for its section's footer.
pub struct Decoded {
    /// Bytes of the body.
    pub used: usize,
    commit: Box<dyn FnOnce() -> Result<(), DeviceError> + Send>,
}

impl Decoded {
    /// A body of `used` bytes; `commit` puts it in place.
    pub fn new(
        used: usize,
        commit: impl FnOnce() -> Result<(), DeviceError> + Send + 'static,
    ) -> Self {
        Self {
            used,
            commit: Box::new(commit),
        }
    }

    /// Put the state in place, and have the device take the effects that it has elsewhere.
    ///
    /// # Errors
    /// The device refused it, or could not take the effects.
    pub fn commit(self) -> Result<(), DeviceError> {
        (self.commit)()
    }
}

impl fmt::Debug for Decoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoded")
            .field("used", &self.used)
            .finish_non_exhaustive()
    }
}

/// A device could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The window ends inside the body.
    #[error("device state is truncated after {have} bytes, in field '{field}'")]
    Incomplete {
        /// Bytes that there were.
        have: usize,
        /// The field that they end in.
        field: String,
    },
    /// A field holds what it must not.
    #[error("{}byte {offset} of the device{}: {fault}", in_field(.field), if .field.is_empty() { "" } else { ")" })]
    Field {
        /// Path of the field: struct, index, name; empty for the device as a whole.
        field: String,
        /// Offset in the body.
        offset: usize,
        /// What is wrong, and what was expected.
        fault: String,
    },
    /// A hook failed.
    #[error("{hook} of {owner}: {source}")]
    Hook {
        /// Which of them, such as `post_load`.
        hook: &'static str,
        /// The description that it belongs to.
        owner: Origin,
        /// What it said.
        source: BoxError,
    },
    /// The state of the device does not fit its description.
    #[error("field '{field}' cannot be saved: {fault}")]
    Unsaveable {
        /// Path of the field: struct, index, name.
        field: String,
        /// What is wrong with it.
        fault: String,
    },
    /// The body has a version that is not read here.
    #[error("version {version} of {owner} is not supported, only {lowest} to {highest}")]
    Version {
        /// The description.
        owner: Origin,
        /// Version of the body.
        version: u32,
        /// Lowest that is read.
        lowest: u32,
        /// Highest that is read.
        highest: u32,
    },
    /// The device is marked as one that cannot be migrated.
    #[error("device '{0}' cannot be migrated")]
    Unmigratable(String),
}

/// A description that an error is about, and where it stands in the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Name of the description.
    pub name: String,
    /// Path of the field that holds it: struct, index, name; empty for the device itself.
    pub field: String,
    /// Offset in the body, when loading.
    pub offset: Option<usize>,
}

impl From<&str> for Origin {
    fn from(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.name)?;
        match (self.field.as_str(), self.offset) {
            ("", _) => Ok(()),
            (field, None) if field == self.name => Ok(()),
            (field, Some(offset)) if field == self.name => {
                write!(f, " (byte {offset} of the device)")
            }
            (field, None) => write!(f, " (field '{field}')"),
            (field, Some(offset)) => {
                write!(f, " (field '{field}', byte {offset} of the device)")
            }
        }
    }
}

/// The beginning of what is said about a field.
fn in_field(field: &str) -> String {
    match field {
        "" => String::new(),
        field => format!("field '{field}' ("),
    }
}

/// What a load hook says when the state that came is wrong: then it is not this host that fails, but
/// who sent or stored the state.
///
/// ```
/// use vmferry_vmstate::{BadState, Loader, VmState};
///
/// #[derive(VmState)]
/// #[vmstate(name = "fifo", version = 1, post_load = Self::check)]
/// struct Fifo {
///     #[vmstate(uint8)]
///     level: u8,
/// }
///
/// impl Fifo {
///     fn check(&mut self, _version: u32) -> Result<(), BadState> {
///         match self.level {
///             0..=16 => Ok(()),
///             level => Err(BadState(format!("level {level} is above 16"))),
///         }
///     }
/// }
///
/// let error = Fifo { level: 0 }.load(&mut Loader::whole(b"\x11"), 1).unwrap_err();
/// assert_eq!(error.blame(), vmferry_stream::Blame::Peer);
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadState(pub String);

/// What a hook or a conversion says when it fails; `"text".into()` makes one.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl DeviceError {
    /// Whose fault it is: the peer's (or that of stored data), if the bytes are wrong or a load hook
    /// said [`BadState`]; this host's, if another hook failed or a value of this side cannot be sent.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self {
            Self::Incomplete { .. } | Self::Field { .. } | Self::Version { .. } => Blame::Peer,
            Self::Hook { .. } | Self::Unsaveable { .. } => Blame::Host,
            Self::Unmigratable(_) => Blame::Caller,
        }
    }

    /// A hook failed. When loading, one that said [`BadState`] has found a fault in the bytes.
    pub(crate) fn hook(hook: &'static str, owner: Origin, source: BoxError) -> Self {
        match owner.offset {
            Some(offset) if source.is::<BadState>() => Self::Field {
                fault: format!("{hook} of '{}': {source}", owner.name),
                field: owner.field,
                offset,
            },
            _ => Self::Hook {
                hook,
                owner,
                source,
            },
        }
    }

    /// The value cannot be saved. The field's name is added on the way out.
    #[must_use]
    pub fn unsaveable(fault: impl Into<String>) -> Self {
        Self::Unsaveable {
            field: String::new(),
            fault: fault.into(),
        }
    }

    /// The same error, found inside `name`: a field, or `[k]` for an element.
    #[must_use]
    pub(crate) fn inside(mut self, name: &str) -> Self {
        if let Self::Incomplete { field, .. }
        | Self::Field { field, .. }
        | Self::Hook {
            owner: Origin { field, .. },
            ..
        }
        | Self::Version {
            owner: Origin { field, .. },
            ..
        }
        | Self::Unsaveable { field, .. } = &mut self
        {
            let dot = match field.chars().next() {
                None | Some('[') => "",
                Some(_) => ".",
            };
            *field = format!("{name}{dot}{field}");
        }
        self
    }

    /// The same error, found inside element `index`.
    #[must_use]
    pub(crate) fn inside_element(self, index: usize) -> Self {
        self.inside(&format!("[{index}]"))
    }
}
