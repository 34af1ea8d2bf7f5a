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
