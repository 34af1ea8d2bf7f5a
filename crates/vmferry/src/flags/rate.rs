//! Rates: `100MiB/s`, or `unlimited`.

use std::fmt;
use std::str::FromStr;

use super::size::{Size, SizeError};

/// A number of bytes a second, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rate {
    /// As fast as it goes.
    Unlimited,
    /// At least 1.
    BytesPerSecond(u64),
}

/// Why a rate was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RateError {
    #[error("a rate is a size a second, such as 100MiB/s, or \"unlimited\"")]
    NotPerSecond,
    #[error("a rate of nothing would never end; for no limit say \"unlimited\"")]
    Nothing,
    #[error(transparent)]
    Size(#[from] SizeError),
}

impl Rate {
    /// QEMU's `max-bandwidth`, where 0 is no limit.
    pub(crate) fn max_bandwidth(self) -> u64 {
        match self {
            Self::Unlimited => 0,
            Self::BytesPerSecond(bytes) => bytes,
        }
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Self, RateError> {
        if text == "unlimited" {
            return Ok(Self::Unlimited);
        }
        let size = text.strip_suffix("/s").ok_or(RateError::NotPerSecond)?;
        match size.parse::<Size>()?.bytes {
            0 => Err(RateError::Nothing),
            bytes => Ok(Self::BytesPerSecond(bytes)),
        }
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Unlimited => f.write_str("unlimited"),
            Self::BytesPerSecond(bytes) => write!(f, "{}/s", Size { bytes }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_size_a_second() {
        assert_eq!("100MiB/s".parse(), Ok(Rate::BytesPerSecond(100 << 20)));
        assert_eq!("1/s".parse(), Ok(Rate::BytesPerSecond(1)));
        assert_eq!("unlimited".parse(), Ok(Rate::Unlimited));
        assert_eq!(Rate::Unlimited.max_bandwidth(), 0);
        assert_eq!(Rate::BytesPerSecond(9).max_bandwidth(), 9);
    }

    #[test]
    fn a_size_alone_or_nothing_a_second_is_refused() {
        assert_eq!("100MiB".parse::<Rate>(), Err(RateError::NotPerSecond));
        assert_eq!("0/s".parse::<Rate>(), Err(RateError::Nothing));
        assert_eq!(
            "1MB/s".parse::<Rate>(),
            Err(RateError::Size(SizeError::DecimalUnit("MB".into())))
        );
    }

    #[test]
    fn what_is_shown_reads_back() {
        for rate in [Rate::Unlimited, Rate::BytesPerSecond(3 << 20)] {
            assert_eq!(rate.to_string().parse(), Ok(rate));
        }
    }
}
