//! Where a device's section ends, when nobody says how long it is.
//!
//! With footers, an end is the footer of this very section with something behind it that can follow a
//! section. Without, all there is to look for is the header of another section. Device state that
//! looks like that by chance is possible, and so unlikely that nobody has seen it.

use memchr::memmem;
use vmferry_stream::{Decoder, Section, SectionId};

const FOOTER: u8 = 0x7e;
const FOOTER_BYTES: usize = 5;
/// Versions of QEMU's devices stay below; the highest is 10000.
const VERSION_MAX: u32 = 1 << 16;
/// Section ids count registered devices.
const ID_MAX: u32 = 1 << 16;

/// The end of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The body has this many bytes.
    At { body_bytes: usize, next: Next },
    /// Not among the bytes so far; the first `searched` need not be searched again.
    NotYet { searched: usize },
}

/// What can follow a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another FULL section.
    Full,
    /// A live section or a command.
    Live,
    /// EOF.
    Eof,
}

/// Which end to look for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// The section.
    pub(crate) id: SectionId,
    /// Do sections end in footers?
    pub(crate) footers: bool,
    /// Knows the live sections.
    pub(crate) decoder: &'a Decoder,
    /// Nothing follows the bytes at hand.
    pub(crate) is_all: bool,
}

impl Wanted<'_> {
    /// Look for the end of a body that starts at the beginning of `bytes`, of which the first
    /// `searched` were searched before.
    pub(crate) fn find(&self, bytes: &[u8], searched: usize) -> End {
        if self.footers {
            self.find_footer(bytes, searched)
        } else {
            self.find_header(bytes, searched)
        }
    }

    fn find_footer(&self, bytes: &[u8], searched: usize) -> End {
        let footer = self.footer();
        let rest = bytes.get(searched..).unwrap_or_default();
        for at in memmem::find_iter(rest, &footer) {
            let body_bytes = searched.saturating_add(at);
            let behind = bytes.get(body_bytes.saturating_add(FOOTER_BYTES)..);
            match self.next(behind.unwrap_or_default()) {
                Guess::Is(next) => return End::At { body_bytes, next },
                Guess::TooShort => {
                    return End::NotYet {
                        searched: body_bytes,
                    };
                }
                Guess::No => {}
            }
        }
        let searched = bytes.len().saturating_sub(FOOTER_BYTES.saturating_sub(1));
        End::NotYet { searched }
    }

    /// Where the body ends if something is wrong with what follows: before the first footer of the
    /// section, whatever stands behind it, or before something as long as a footer with a header
    /// behind it.
    pub(crate) fn find_broken(&self, bytes: &[u8]) -> Option<usize> {
        if !self.footers {
            return None;
        }
        let footer = memmem::find(bytes, &self.footer());
        footer.or_else(|| {
            let headers = memchr::memchr_iter(0x04, bytes);
            let mut bodies = headers.filter_map(|header| header.checked_sub(FOOTER_BYTES));
            bodies.find(|body| self.is_header_behind_footer(bytes, *body))
        })
    }

    /// Can these bytes follow a section that has no footer?
    pub(crate) fn can_follow(&self, bytes: &[u8]) -> bool {
        let without = Self {
            footers: false,
            ..*self
        };
        matches!(without.next(bytes), Guess::Is(_))
    }

    fn is_header_behind_footer(&self, bytes: &[u8], footer: usize) -> bool {
        let behind = bytes.get(footer.saturating_add(FOOTER_BYTES)..);
        let Some((0x04, header)) = behind.and_then(<[u8]>::split_first) else {
            return false;
        };
        // The shortest names of devices have three letters.
        let is_named = header.get(4).is_some_and(|length| *length > 2);
        is_named && matches!(self.header(header), Guess::Is(Next::Full))
    }

    fn footer(&self) -> [u8; FOOTER_BYTES] {
        let [a, b, c, d] = self.id.0.to_be_bytes();
        [FOOTER, a, b, c, d]
    }

    fn find_header(&self, bytes: &[u8], searched: usize) -> End {
        for at in searched..bytes.len() {
            let behind = bytes.get(at..).unwrap_or_default();
            if !matches!(behind.first(), Some(0x00 | 0x04)) {
                continue;
            }
            match self.next(behind) {
                Guess::Is(next) => {
                    return End::At {
                        body_bytes: at,
                        next,
                    };
                }
                Guess::TooShort => return End::NotYet { searched: at },
                Guess::No => {}
            }
        }
        End::NotYet {
            searched: bytes.len(),
        }
    }

    /// Can `bytes` follow a section?
    fn next(&self, bytes: &[u8]) -> Guess {
        let Some((kind, rest)) = bytes.split_first() else {
            return if self.is_all {
                Guess::Is(Next::Live)
            } else {
                Guess::TooShort
            };
        };
        match kind {
            0x00 => self.eof(rest),
            0x01 | 0x04 => match self.header(rest) {
                Guess::Is(_) if *kind == 0x01 => Guess::Is(Next::Live),
                guess => guess,
            },
            0x02 | 0x03 => match u32_at(rest, 0) {
                Some(id) if self.decoder.is_live(SectionId(id)) => Guess::Is(Next::Live),
                Some(_) => Guess::No,
                None => self.short(),
            },
            0x08 => match u32_at(rest, 0) {
                Some(command) if is_command(command) => Guess::Is(Next::Live),
                Some(_) => Guess::No,
                None => self.short(),
            },
            _ => Guess::No,
        }
    }

    /// The description follows, or nothing.
    fn eof(&self, rest: &[u8]) -> Guess {
        match (rest, self.is_all) {
            ([], true) => Guess::Is(Next::Eof),
            ([0x06, _, _, _, _, b'{', ..], _) => Guess::Is(Next::Eof),
            ([] | [0x06] | [0x06, _] | [0x06, _, _] | [0x06, _, _, _] | [0x06, _, _, _, _], _) => {
                self.short()
            }
            _ => Guess::No,
        }
    }

    fn header(&self, rest: &[u8]) -> Guess {
        let (Some(id), Some(length)) = (u32_at(rest, 0), rest.get(4)) else {
            return self.short();
        };
        let length = usize::from(*length);
        if id > ID_MAX || length == 0 {
            return Guess::No;
        }
        let Some((name, numbers)) = rest.get(5..).and_then(|rest| rest.split_at_checked(length))
        else {
            return self.short();
        };
        if !name.iter().all(u8::is_ascii_graphic) {
            return Guess::No;
        }
        match u32_at(numbers, 4) {
            Some(version) if version < VERSION_MAX => Guess::Is(Next::Full),
            Some(_) => Guess::No,
            None => self.short(),
        }
    }

    /// What is there of something that could follow. At the end of the input that is enough behind a
    /// footer: the stream is cut there.
    fn short(&self) -> Guess {
        match (self.is_all, self.footers) {
            (false, _) => Guess::TooShort,
            (true, true) => Guess::Is(Next::Live),
            (true, false) => Guess::No,
        }
    }
}

/// Does a footer stand at the beginning of `bytes`, of whatever section?
pub(crate) fn is_any_footer(bytes: &[u8]) -> bool {
    bytes.first() == Some(&FOOTER) && u32_at(bytes, 1).is_some()
}

enum Guess {
    Is(Next),
    No,
    TooShort,
}

/// Number and length of a command, as one word.
fn is_command(word: u32) -> bool {
    let (number, length) = (word >> 16, word & 0xffff);
    match number {
        1 | 4 | 5 | 8 | 9 | 11 => length == 0,
        2 | 7 => length == 4,
        3 => length == 0 || length == 16,
        6 => length >= 20,
        10 => (2..=256).contains(&length),
        _ => false,
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk::<4>()?;
    Some(u32::from_be_bytes(*word))
}

/// Where a device's body ends, for those who are given a stream piece by piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyEnd {
    /// The body has this many bytes.
    At(usize),
    /// Not among the bytes so far; the first `searched` need not be searched again.
    NotYet {
        /// To be said with the next call.
        searched: usize,
    },
}

/// Look for the end of the body of `section`, which `decoder` returned last. `bytes` starts with the body;
/// the first `searched` of them were searched before. `is_all`: nothing follows them.
///
/// An end is the section's footer with something behind it that can follow a section; in a stream without
/// footers, that alone.
#[must_use]
pub fn find_body_end(
    decoder: &Decoder,
    section: &Section,
    bytes: &[u8],
    searched: usize,
    is_all: bool,
) -> BodyEnd {
    let wanted = Wanted {
        id: section.id,
        footers: decoder.footers() != Some(false),
        decoder,
        is_all,
    };
    match wanted.find(bytes, searched) {
        End::At { body_bytes, .. } => BodyEnd::At(body_bytes),
        End::NotYet { searched } => BodyEnd::NotYet { searched },
    }
}
