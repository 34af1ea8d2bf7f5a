//! What a command answers when it fails.

use serde::{Deserialize, Serialize};

/// QMP's error classes. Nearly everything is a [`ErrorClass::GenericError`]; clients tell the
/// others apart by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Any failure without a class of its own.
    GenericError,
    /// No such command, or not now (capabilities negotiation).
    CommandNotFound,
    /// The device exists but is not in use.
    DeviceNotActive,
    /// No device of that name.
    DeviceNotFound,
    /// The host's KVM lacks something.
    KVMMissingCap,
}

impl ErrorClass {
    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::GenericError => "GenericError",
            Self::CommandNotFound => "CommandNotFound",
            Self::DeviceNotActive => "DeviceNotActive",
            Self::DeviceNotFound => "DeviceNotFound",
            Self::KVMMissingCap => "KVMMissingCap",
        }
    }

    /// The class of that name; a class that we do not know counts as generic.
    #[must_use]
    pub fn from_name(name: &str) -> Self {
        match name {
            "CommandNotFound" => Self::CommandNotFound,
            "DeviceNotActive" => Self::DeviceNotActive,
            "DeviceNotFound" => Self::DeviceNotFound,
            "KVMMissingCap" => Self::KVMMissingCap,
            _ => Self::GenericError,
        }
    }
}

/// A command failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{description}")]
pub struct CommandError {
    /// The class, for programs.
    pub class: ErrorClass,
    /// One line, for people.
    pub description: String,
}

impl CommandError {
    /// A failure of `class`.
    #[must_use]
    pub fn new(class: ErrorClass, description: impl Into<String>) -> Self {
        Self {
            class,
            description: description.into(),
        }
    }

    /// A failure without a class of its own.
    #[must_use]
    pub fn generic(description: impl Into<String>) -> Self {
        Self::new(ErrorClass::GenericError, description)
    }

    /// No such command, or not now.
    #[must_use]
    pub fn command_not_found(description: impl Into<String>) -> Self {
        Self::new(ErrorClass::CommandNotFound, description)
    }

    /// No device of that name.
    #[must_use]
    pub fn device_not_found(name: &str) -> Self {
        Self::new(
            ErrorClass::DeviceNotFound,
            format!("Device '{name}' not found"),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn class_names_survive_a_round_trip() {
        for class in [
            ErrorClass::GenericError,
            ErrorClass::CommandNotFound,
            ErrorClass::DeviceNotActive,
            ErrorClass::DeviceNotFound,
            ErrorClass::KVMMissingCap,
        ] {
            assert_eq!(ErrorClass::from_name(class.name()), class);
            assert_eq!(serde_json::to_value(class).unwrap(), class.name());
        }
        assert_eq!(ErrorClass::from_name("Fancy"), ErrorClass::GenericError);
    }
}
