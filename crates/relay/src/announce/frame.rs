//! The frame that a NIC announces itself with.
//!
//! ```text
//!    0 destination ff:ff:ff:ff:ff:ff     6 source: the NIC    12 type 0x8035 (RARP)
//!   14 hardware 0x0001   16 protocol 0x0800   18 lengths 6, 4   20 operation 3 (request)
//!   22 sender: the NIC   28 0.0.0.0   32 target: the NIC   38 0.0.0.0   42 zeroes to byte 60
//! ```
//!
//! Source: "core" wire notes §6, RFC 903.

use std::fmt;
use std::str::FromStr;

/// Length of the frame: the shortest that Ethernet carries, without its checksum.
pub const FRAME_BYTES: usize = 60;

/// A whole Ethernet frame without its checksum.
pub type Frame = [u8; FRAME_BYTES];

/// Address of one NIC: neither that of a group nor all zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress([u8; 6]);

/// Why six bytes, or a text, are not the address of a NIC.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MacError {
    /// Not six bytes in hexadecimal with colons.
    #[error("\"{0}\" is no MAC address, such as 52:54:00:12:34:56")]
    NotSixBytes(String),
    /// The address stands for many NICs.
    #[error("{0} is the address of a group, not of one NIC")]
    Group(String),
    /// Nobody has it.
    #[error("00:00:00:00:00:00 is nobody's address")]
    Zero,
}

impl MacAddress {
    /// # Errors
    /// The address is that of a group, or all zeroes.
    pub fn new(bytes: [u8; 6]) -> Result<Self, MacError> {
        let address = Self(bytes);
        match bytes {
            [0, 0, 0, 0, 0, 0] => Err(MacError::Zero),
            [first, ..] if first & 1 == 1 => Err(MacError::Group(address.to_string())),
            _ => Ok(address),
        }
    }

    /// The six bytes in the order of the wire.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MacAddress({self})")
    }
}

impl FromStr for MacAddress {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let byte = |part: &str| {
            let digits = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            digits.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        };
        let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        let bytes = bytes.ok_or_else(|| MacError::NotSixBytes(text.to_owned()))?;
        Self::new(bytes)
    }
}

/// The broadcast in which this NIC asks for its own address: nobody needs to answer, but every
/// switch learns the port that it came from.
#[must_use]
pub fn rarp_request(nic: MacAddress) -> Frame {
    let mut frame = [0; FRAME_BYTES];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&nic.0);
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 0x08, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&nic.0);
    frame[32..38].copy_from_slice(&nic.0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_that_of_the_notes() {
        #[rustfmt::skip]
        let expected: Frame = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x80, 0x35,
            0x00, 0x01, 0x08, 0x00, 0x06, 0x04, 0x00, 0x03,
            0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x00, 0x00, 0x00, 0x00,
            0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x00, 0x00, 0x00, 0x00,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(rarp_request("52:54:00:12:34:56".parse().unwrap()), expected);
    }

    #[test]
    fn addresses_read_back() {
        for text in [
            "52:54:00:12:34:56",
            "00:00:00:00:00:01",
            "fe:ff:ff:ff:ff:ff",
        ] {
            assert_eq!(text.parse::<MacAddress>().unwrap().to_string(), text);
        }
        let upper: MacAddress = "0A:BC:DE:F0:12:34".parse().unwrap();
        assert_eq!(upper.to_string(), "0a:bc:de:f0:12:34");
        assert_eq!(upper.bytes(), [0x0a, 0xbc, 0xde, 0xf0, 0x12, 0x34]);
    }

    #[test]
    fn what_is_no_nic_s_address_is_refused() {
        let refused = |text: &str| text.parse::<MacAddress>().unwrap_err();
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52-54-00-12-34-56",
            "5254:00:12:34:56",
            "+2:54:00:12:34:56",
            "52:54:00:12:34:5g",
            "2:54:0:12:34:56",
        ] {
            assert_eq!(refused(text), MacError::NotSixBytes(text.to_owned()));
        }
        let group = "01:00:5e:00:00:01";
        assert_eq!(refused(group), MacError::Group(group.to_owned()));
        assert!(refused("ff:ff:ff:ff:ff:ff").to_string().contains("group"));
        assert_eq!(refused("00:00:00:00:00:00"), MacError::Zero);
    }
}
