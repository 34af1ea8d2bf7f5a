//! Patterns for names of devices.

use std::str::FromStr;

use glob::{Pattern, PatternError};

/// A pattern with `*`, `?` and `[…]`; `*` stands for slashes, too.
#[derive(Clone, Debug)]
pub(crate) struct DeviceGlob(Pattern);

impl FromStr for DeviceGlob {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        Pattern::new(text).map(Self)
    }
}

impl DeviceGlob {
    /// Does the pattern stand for the whole name, or for what follows the device's path in it?
    pub(crate) fn is_for(&self, name: &str) -> bool {
        let short = name.rsplit('/').next().unwrap_or(name);
        self.0.matches(name) || self.0.matches(short)
    }
}

/// Is the name chosen? Without patterns every name is.
pub(crate) fn chosen(globs: &[DeviceGlob], name: &str) -> bool {
    globs.is_empty() || globs.iter().any(|glob| glob.is_for(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_chosen_whole_or_without_its_path() {
        let glob: DeviceGlob = "PIIX*".parse().unwrap();
        assert!(glob.is_for("0000:00:01.0/PIIX3") && glob.is_for("PIIX3"));
        assert!(!glob.is_for("xPIIX3"));
        let glob: DeviceGlob = "0000:00:02.0*".parse().unwrap();
        assert!(glob.is_for("0000:00:02.0/1/usb-ptr") && !glob.is_for("usb-ptr"));
        assert!(chosen(&[], "anything") && !chosen(&[glob], "anything"));
        assert!("[".parse::<DeviceGlob>().is_err());
    }
}
