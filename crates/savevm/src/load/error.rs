//! Why a stream could not be loaded.

use std::fmt;

use vmferry_stream::{Blame, DecodeError, InstanceId, Name, Section, SectionId};
use vmferry_vmstate::DeviceError;

use crate::handler::HandlerError;
use crate::machine::Mismatch;
use crate::registry::Blocked;

/// A stream could not be loaded. Offsets are bytes of the stream, or of the package inside it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A device that is registered cannot be migrated.
    #[error(transparent)]
    Blocked(#[from] Blocked),
    /// The bytes are wrong.
    #[error(transparent)]
    Stream(#[from] DecodeError),
    /// The stream is of another machine.
    #[error("{0}")]
    Mismatch(#[from] Mismatch),
    /// Nobody here owns this section.
    #[error("byte {offset}: unknown section '{section}' instance {}: {hint}", instance.0)]
    UnknownSection {
        /// Where its header ends.
        offset: u64,
        /// Its name.
        section: Name,
        /// Its instance.
        instance: InstanceId,
        /// What that means.
        hint: &'static str,
    },
    /// The section comes from a newer machine.
    #[error("{section} has version {version}, the highest that is read here is {max}")]
    VersionTooHigh {
        /// The section.
        section: SectionLabel,
        /// In the stream.
        version: u32,
        /// Highest here.
        max: u32,
    },
    /// The section comes from a machine that is too old.
    #[error("{section} has version {version}, the lowest that is read here is {min}")]
    VersionTooLow {
        /// The section.
        section: SectionLabel,
        /// In the stream.
        version: u32,
        /// Lowest here.
        min: u32,
    },
    /// A live section in a stream that may only have devices.
    #[error("{section} is live, but only the state of devices is loaded here")]
    NotADevice {
        /// The section.
        section: SectionLabel,
    },
    /// The owner of a live section failed.
    #[error("{section}: {source}")]
    Section {
        /// The section.
        section: SectionLabel,
        /// What the owner said.
        source: HandlerError,
    },
    /// A device's state is wrong, or the device refused it.
    #[error("{section}, from byte {offset}: {source}")]
    Device {
        /// The section.
        section: SectionLabel,
        /// Where its body begins.
        offset: u64,
        /// What is wrong.
        source: Box<DeviceError>,
    },
    /// A device's state has no end.
    #[error("{section}, from byte {offset}: more than {max} bytes, still in field '{field}'")]
    DeviceTooLong {
        /// The section.
        section: SectionLabel,
        /// Where its body begins.
        offset: u64,
        /// [`crate::MAX_DEVICE_BYTES`].
        max: usize,
        /// Where it was.
        field: String,
    },
    /// The input ended inside a device's state.
    #[error("stream truncated at byte {end}, in field '{field}' of {section}, from byte {offset}")]
    DeviceTruncated {
        /// The section.
        section: SectionLabel,
        /// Where its body begins.
        offset: u64,
        /// Where the input ended.
        end: u64,
        /// The field that it ended in.
        field: String,
    },
    /// A command at the wrong time, or one that is not accepted.
    #[error("byte {offset}: command {command}: {reason}")]
    Command {
        /// Where it ends.
        offset: u64,
        /// Its name.
        command: &'static str,
        /// Why not.
        reason: String,
    },
    /// The package did not start the guest. A QEMU would wait for ever.
    #[error("the package ends without POSTCOPY_RUN")]
    PackageWithoutRun,
    /// The content of a package is wrong.
    #[error("in the package that begins at byte {offset}: {source}")]
    Package {
        /// Where it begins; offsets in `source` count from there.
        offset: u64,
        /// What is wrong.
        source: Box<LoadError>,
    },
}

/// Which section an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectionLabel {
    /// Its name.
    pub name: Name,
    /// Its instance.
    pub instance: InstanceId,
    /// Its number in the stream.
    pub id: SectionId,
}

impl From<&Section> for SectionLabel {
    fn from(section: &Section) -> Self {
        Self {
            name: section.name.clone(),
            instance: section.instance,
            id: section.id,
        }
    }
}

impl fmt::Display for SectionLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, instance, id } = self;
        write!(f, "section '{name}' instance {} (id {id})", instance.0)
    }
}

impl LoadError {
    /// Whose fault it is. What a handler says counts as this host's.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self {
            Self::Stream(error) => error.blame(),
            Self::Blocked(_) => Blame::Caller,
            Self::Section { .. } => Blame::Host,
            Self::Device { source, .. } => source.blame(),
            Self::Package { source, .. } => source.blame(),
            Self::Mismatch(_)
            | Self::UnknownSection { .. }
            | Self::VersionTooHigh { .. }
            | Self::VersionTooLow { .. }
            | Self::NotADevice { .. }
            | Self::DeviceTooLong { .. }
            | Self::DeviceTruncated { .. }
            | Self::Command { .. }
            | Self::PackageWithoutRun => Blame::Peer,
        }
    }
}
