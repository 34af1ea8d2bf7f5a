//! Where a daemon waits for a migration: a URI, or `defer`.

use std::str::FromStr;

use vmferry_channel::{Uri, UriError};

/// Value of `--incoming`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum IncomingFlag {
    /// There.
    At(Uri),
    /// QMP's `migrate-incoming` will say where.
    Defer,
}

impl FromStr for IncomingFlag {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        match text {
            "defer" => Ok(Self::Defer),
            _ => text.parse().map(Self::At),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_or_later() {
        assert_eq!("defer".parse(), Ok(IncomingFlag::Defer));
        assert_eq!("-".parse(), Ok(IncomingFlag::At(Uri::Stdio)));
        assert!("later".parse::<IncomingFlag>().is_err());
    }
}
