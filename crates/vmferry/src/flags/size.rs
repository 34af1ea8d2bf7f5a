//! Sizes: `4096`, `64KiB`, `512MiB`, `20GiB`, and QEMU's short forms `64K`, `512M`, `20G`.

use std::fmt;
use std::str::FromStr;

/// A number of bytes, at most 2^63 - 1 (what a file offset can say).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Size {
    pub(crate) bytes: u64,
}

const LARGEST_BYTES: u64 = i64::MAX as u64;

/// Why a size was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    #[error("a size starts with a number, such as 512MiB")]
    NoNumber,
    #[error(
        "unknown unit \"{0}\": sizes take KiB, MiB, GiB, TiB (or K, M, G, T, which mean the same)"
    )]
    UnknownUnit(String),
    #[error("\"{0}\" is not clear: say KiB, MiB, GiB or TiB, which are powers of 1024")]
    DecimalUnit(String),
    #[error("the size does not fit into 63 bits")]
    TooLarge,
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(SizeError::NoNumber);
        }
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "kib" | "k" => 10,
            "mib" | "m" => 20,
            "gib" | "g" => 30,
            "tib" | "t" => 40,
            "kb" | "mb" | "gb" | "tb" => return Err(SizeError::DecimalUnit(unit.to_owned())),
            _ => return Err(SizeError::UnknownUnit(unit.to_owned())),
        };
        number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(1 << shift))
            .filter(|bytes| *bytes <= LARGEST_BYTES)
            .map(|bytes| Self { bytes })
            .ok_or(SizeError::TooLarge)
    }
}

/// The shortest exact form: what [`Size::from_str`] would read back.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in units {
            if self.bytes != 0 && self.bytes.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.bytes >> shift);
            }
        }
        write!(f, "{}", self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024_in_every_spelling() {
        for (text, bytes) in [
            ("0", 0),
            ("1536", 1536),
            ("7B", 7),
            ("64KiB", 64 << 10),
            ("64k", 64 << 10),
            ("512MiB", 512 << 20),
            ("512mib", 512 << 20),
            ("20G", 20 << 30),
            ("3TiB", 3 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size { bytes }), "{text}");
        }
    }

    #[test]
    fn what_is_not_clear_is_refused() {
        assert_eq!("".parse::<Size>(), Err(SizeError::NoNumber));
        assert_eq!("MiB".parse::<Size>(), Err(SizeError::NoNumber));
        assert_eq!("-1".parse::<Size>(), Err(SizeError::NoNumber));
        assert_eq!(
            "1GB".parse::<Size>(),
            Err(SizeError::DecimalUnit("GB".into()))
        );
        assert_eq!(
            "1.5GiB".parse::<Size>(),
            Err(SizeError::UnknownUnit(".5GiB".into()))
        );
        assert_eq!(
            "1 GiB".parse::<Size>(),
            Err(SizeError::UnknownUnit(" GiB".into()))
        );
    }

    #[test]
    fn the_largest_size_is_63_bits() {
        assert_eq!(
            "9223372036854775807".parse(),
            Ok(Size {
                bytes: i64::MAX as u64
            })
        );
        for text in [
            "9223372036854775808",
            "8388608TiB",
            "99999999999999999999999",
        ] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn what_is_shown_reads_back() {
        for bytes in [0, 1, 1023, 1 << 10, 3 << 20, (1 << 30) + (1 << 20), 5 << 40] {
            let size = Size { bytes };
            assert_eq!(size.to_string().parse(), Ok(size));
        }
        assert_eq!(Size { bytes: 3 << 20 }.to_string(), "3MiB");
    }
}
