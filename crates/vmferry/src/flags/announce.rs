//! A NIC to announce: `IFACE[,mac=MAC]`.

use std::fmt;
use std::str::FromStr;

use vmferry_channel::INTERFACE_NAME_BYTES_MAX;
use vmferry_relay::announce::{MacAddress, MacError};

/// One `--announce` of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AnnounceFlag {
    /// The host's interface.
    pub(crate) interface: String,
    /// The guest's address; else it has the interface's.
    pub(crate) mac: Option<MacAddress>,
}

/// Why a NIC was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AnnounceFlagError {
    #[error("the name of a network interface has 1 to {INTERFACE_NAME_BYTES_MAX} bytes")]
    Interface,
    #[error("unknown option \"{0}\": an interface takes mac")]
    UnknownOption(String),
    #[error("mac was given twice")]
    Twice,
    #[error(transparent)]
    Mac(#[from] MacError),
}

impl FromStr for AnnounceFlag {
    type Err = AnnounceFlagError;

    fn from_str(text: &str) -> Result<Self, AnnounceFlagError> {
        // The kernel takes commas in names; nobody uses them.
        let (interface, options) = text
            .split_once(',')
            .map_or((text, None), |(name, rest)| (name, Some(rest)));
        if !(1..=INTERFACE_NAME_BYTES_MAX).contains(&interface.len()) {
            return Err(AnnounceFlagError::Interface);
        }
        let mut mac = None;
        for option in options.into_iter().flat_map(|options| options.split(',')) {
            let Some(value) = option.strip_prefix("mac=") else {
                return Err(AnnounceFlagError::UnknownOption(option.to_owned()));
            };
            if mac.replace(value.parse()?).is_some() {
                return Err(AnnounceFlagError::Twice);
            }
        }
        Ok(Self {
            interface: interface.to_owned(),
            mac,
        })
    }
}

impl fmt::Display for AnnounceFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mac {
            Some(mac) => write!(f, "{},mac={mac}", self.interface),
            None => f.write_str(&self.interface),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flag(text: &str) -> Result<AnnounceFlag, AnnounceFlagError> {
        text.parse()
    }

    #[test]
    fn an_interface_and_perhaps_an_address() {
        for text in [
            "br0",
            "eth0.100",
            "br0,mac=52:54:00:12:34:56",
            "interface-of-15",
        ] {
            assert_eq!(flag(text).unwrap().to_string(), text);
        }
        let mac = "52:54:00:12:34:56".parse().unwrap();
        let expected = AnnounceFlag {
            interface: "br0".to_owned(),
            mac: Some(mac),
        };
        assert_eq!(flag("br0,mac=52:54:00:12:34:56"), Ok(expected));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        use AnnounceFlagError as E;
        let option = |text: &str| E::UnknownOption(text.to_owned());
        for (text, error) in [
            ("", E::Interface),
            (",mac=52:54:00:12:34:56", E::Interface),
            ("interface-of-16b", E::Interface),
            ("br0,", option("")),
            ("br0,mac", option("mac")),
            ("br0,vlan=3", option("vlan=3")),
            ("br0,mac=x", E::Mac(MacError::NotSixBytes("x".to_owned()))),
            ("br0,mac=00:00:00:00:00:00", E::Mac(MacError::Zero)),
            ("br0,mac=52:54:00:12:34:56,mac=52:54:00:12:34:56", E::Twice),
        ] {
            assert_eq!(flag(text), Err(error), "{text}");
        }
    }
}
