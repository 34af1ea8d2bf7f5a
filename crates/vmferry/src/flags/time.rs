//! Times: `300ms`, `2s`.

use std::fmt;
use std::str::FromStr;

/// A time in milliseconds, from 1 to [`LONGEST_MS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Millis(pub(crate) u64);

/// 2000 s: the most that QEMU's `downtime-limit` takes.
pub(crate) const LONGEST_MS: u64 = 2_000_000;

/// Why a time was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TimeError {
    #[error("a time starts with a number, such as 300ms")]
    NoNumber,
    #[error("a time needs its unit, ms or s")]
    NoUnit,
    #[error("unknown unit \"{0}\": times take ms or s")]
    UnknownUnit(String),
    #[error("the longest time is 2000s")]
    TooLong,
    #[error("the shortest time is 1ms: guests wait at least until the destination has answered")]
    Zero,
}

impl FromStr for Millis {
    type Err = TimeError;

    fn from_str(text: &str) -> Result<Self, TimeError> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(TimeError::NoNumber);
        }
        let unit_ms = match unit {
            "" => return Err(TimeError::NoUnit),
            "ms" => 1,
            "s" => 1000,
            _ => return Err(TimeError::UnknownUnit(unit.to_owned())),
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(unit_ms))
            .filter(|ms| *ms <= LONGEST_MS)
            .ok_or(TimeError::TooLong)
            .and_then(|ms| {
                if ms == 0 {
                    Err(TimeError::Zero)
                } else {
                    Ok(Self(ms))
                }
            })
    }
}

impl fmt::Display for Millis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            ms if ms >= 1000 && ms % 1000 == 0 => write!(f, "{}s", ms / 1000),
            ms => write!(f, "{ms}ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_carry_their_unit() {
        assert_eq!("300ms".parse(), Ok(Millis(300)));
        assert_eq!("2s".parse(), Ok(Millis(2000)));
        assert_eq!("1ms".parse(), Ok(Millis(1)));
        assert_eq!("0s".parse::<Millis>(), Err(TimeError::Zero));
        assert_eq!("300".parse::<Millis>(), Err(TimeError::NoUnit));
        assert_eq!("ms".parse::<Millis>(), Err(TimeError::NoNumber));
        assert_eq!(
            "3min".parse::<Millis>(),
            Err(TimeError::UnknownUnit("min".into()))
        );
    }

    #[test]
    fn the_longest_time_is_that_of_qemu() {
        assert_eq!("2000s".parse(), Ok(Millis(LONGEST_MS)));
        assert_eq!("2000001ms".parse::<Millis>(), Err(TimeError::TooLong));
        assert_eq!(
            "99999999999999999999s".parse::<Millis>(),
            Err(TimeError::TooLong)
        );
    }

    #[test]
    fn what_is_shown_reads_back() {
        for ms in [1, 999, 1000, 1500, 60_000] {
            assert_eq!(Millis(ms).to_string().parse(), Ok(Millis(ms)));
        }
    }
}
