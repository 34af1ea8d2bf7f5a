//! The end of a stream whose middle is not understood.
//!
//! Whoever passes device sections on unread must still know when the stream is over: a sender with
//! a return path keeps its connection open after the last byte and waits for an answer. [`Tail`]
//! watches the bytes go by and says whether, as of now, they end as a stream does:
//!
//! ```text
//! … 7e id │ 00 │ 06 u32 length { … }
//! ```
//!
//! Nothing is kept but the last bytes and where a description that may be under way would end.
//! JSON text has no control characters except tab and line ends, so a NUL rules a description out:
//! only descriptions whose headers overlap can be under way at the same time, and there are at most
//! three of those.

use crate::limits::MAX_DESCRIPTION_BYTES;
use crate::section::FOOTER;

/// How a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// With EOF and a description of its device sections.
    WithDescription,
    /// With EOF alone (or, for the content of a package, between two items).
    WithoutDescription,
}

/// Watches for the end of a stream.
#[derive(Clone, Debug)]
pub struct Tail {
    footers: bool,
    /// Bytes seen.
    length: u64,
    /// The last eight bytes, newest lowest.
    last: u64,
    /// Where descriptions under way would end; 0 is none.
    ends: [u64; 4],
    under_way: bool,
}

impl Tail {
    /// Nothing seen yet. `footers` says whether the stream's sections have footers.
    #[must_use]
    pub fn new(footers: bool) -> Self {
        Self {
            footers,
            length: 0,
            last: u64::MAX,
            ends: [0; 4],
            under_way: false,
        }
    }

    /// These bytes went by.
    pub fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.length = self.length.saturating_add(1);
            self.last = self.last << 8 | u64::from(byte);
            if self.under_way && byte < b' ' && !matches!(byte, b'\t' | b'\n' | b'\r') {
                self.ends = [0; 4];
                self.under_way = false;
            }
            if byte == b'{' && self.last & HEADER_MASK == HEADER {
                self.description_begins();
            }
        }
    }

    /// The last seven bytes are `00 06`, a length and `{`.
    fn description_begins(&mut self) {
        let text_bytes = self.last >> 8 & 0xffff_ffff;
        if !(2..=u64::from(MAX_DESCRIPTION_BYTES)).contains(&text_bytes) {
            return;
        }
        let [_, ends @ ..] = self.ends;
        let [a, b, c] = ends;
        let end = self.length.saturating_sub(1).saturating_add(text_bytes);
        self.ends = [a, b, c, end];
        self.under_way = true;
    }

    /// How the stream ends if nothing more comes; `None` if it is truncated.
    ///
    /// An end without a description is short (`7e`, an id and `00`, or only `00` without footers): a
    /// stream that was cut after such bytes by chance is not told apart.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        let closed = self.last & 0xff == u64::from(b'}');
        if closed && self.ends.contains(&self.length) {
            return Some(Ending::WithDescription);
        }
        let eof = self.last & 0xff == 0;
        let footer = self.last >> 40 & 0xff == u64::from(FOOTER);
        let seen = self.length >= if self.footers { 6 } else { 1 };
        (seen && eof && (footer || !self.footers)).then_some(Ending::WithoutDescription)
    }
}

const HEADER_MASK: u64 = 0x00ff_ff00_0000_00ff;
const HEADER: u64 = 0x0000_0600_0000_007b;

#[cfg(test)]
mod tests {
    use super::{Ending, Tail};

    fn after(parts: &[&[u8]]) -> Option<Ending> {
        let mut tail = Tail::new(true);
        for part in parts {
            tail.push(part);
        }
        tail.ending()
    }

    fn described(text: &[u8]) -> Vec<u8> {
        let mut bytes = b"\x7e\0\0\0\x09\0\x06".to_vec();
        bytes.extend((text.len() as u32).to_be_bytes());
        bytes.extend(text);
        bytes
    }

    #[test]
    fn sees_the_description_at_its_last_byte_only() {
        let stream = described(b"{\"devices\": [{}, {}]}");
        let mut tail = Tail::new(true);
        for (at, byte) in stream.iter().enumerate() {
            tail.push(&[*byte]);
            let expected = match at + 1 {
                6 => Some(Ending::WithoutDescription),
                end if end == stream.len() => Some(Ending::WithDescription),
                _ => None,
            };
            assert_eq!(tail.ending(), expected, "after {} bytes", at + 1);
        }
        tail.push(b" ");
        assert_eq!(tail.ending(), None);
    }

    #[test]
    fn does_not_care_how_it_is_fed() {
        let stream = [&[0x55; 1000], &described(b"{}")[..]].concat();
        for cut in 0..stream.len() {
            let (a, b) = stream.split_at(cut);
            assert_eq!(after(&[a, b]), Some(Ending::WithDescription), "{cut}");
        }
    }

    #[test]
    fn text_must_fill_its_length() {
        let whole = described(b"{\"a\": 1}");
        for wrong in [0, 7, 9, 0x0100_0008] {
            let mut stream = whole.clone();
            stream[7..11].copy_from_slice(&(wrong as u32).to_be_bytes());
            assert_eq!(after(&[&stream]), None, "{wrong}");
        }
    }

    #[test]
    fn control_characters_are_not_text() {
        assert_eq!(after(&[&described(b"{\"a\": \"\0\"}")]), None);
        assert_eq!(
            after(&[&described(b"{\n\t\r}")]),
            Some(Ending::WithDescription)
        );
    }

    #[test]
    fn a_header_inside_device_state_does_not_hide_the_real_one() {
        for decoy in [
            &b"\0\x06\0\0\x10\0{"[..],
            b"\0\x06\0\0\0\x02{\0\x06\0\0\0\x03{",
            b"\0\x06\0\0\0\x02{}",
        ] {
            let stream = [decoy, &described(b"{\"x\": 0}")].concat();
            assert_eq!(
                after(&[&stream]),
                Some(Ending::WithDescription),
                "{decoy:x?}"
            );
        }
    }

    /// A section id that ends in 6, and a length whose third byte is a brace: two headers overlap.
    #[test]
    fn overlapping_headers() {
        let text = [b"{", &[b'x'; 0x7b41 - 2][..], b"}"].concat();
        let mut stream = b"\x7e\0\0\0\x06\0\x06\0\0\x7b\x41".to_vec();
        stream.extend(&text);
        assert_eq!(after(&[&stream]), Some(Ending::WithDescription));
    }

    #[test]
    fn length_limit() {
        let max = super::MAX_DESCRIPTION_BYTES as usize;
        for (length, ending) in [(max, Some(Ending::WithDescription)), (max + 1, None)] {
            let mut tail = Tail::new(true);
            tail.push(b"\0\x06");
            tail.push(&(length as u32).to_be_bytes());
            tail.push(b"{");
            let spaces = vec![b' '; 1 << 20];
            let mut left = length - 2;
            while left > 0 {
                let now = left.min(spaces.len());
                tail.push(&spaces[..now]);
                left -= now;
            }
            tail.push(b"}");
            assert_eq!(tail.ending(), ending, "{length}");
        }
    }

    #[test]
    fn without_a_description() {
        assert_eq!(after(&[]), None);
        assert_eq!(after(&[b"\0"]), None);
        assert_eq!(
            after(&[b"\x7e\0\0\0\x09\0"]),
            Some(Ending::WithoutDescription)
        );
        assert_eq!(after(&[b"\x7f\0\0\0\x09\0"]), None);
        assert_eq!(after(&[b"\x7e\0\0\0\x09\x01"]), None);
        let mut tail = Tail::new(false);
        assert_eq!(tail.ending(), None);
        tail.push(b"state\0");
        assert_eq!(tail.ending(), Some(Ending::WithoutDescription));
    }
}
