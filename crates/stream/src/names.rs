//! Identifiers and small numbers with a meaning.

use std::fmt;
use std::sync::Arc;

use crate::limits::MAX_NAME_BYTES;

/// A name as the stream carries it: at most 255 bytes, of a section, a RAM block, a disk, a machine
/// type, a capability. May be empty. Cheap to clone.
///
/// The wire has bytes; this is text. Every name that QEMU makes (ids, device paths, machine types)
/// is ASCII, names are compared with what a person typed, and a lossy conversion could make two of
/// them equal: so a name that is not UTF-8 is refused instead.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

/// A name does not fit into its length byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name of {bytes} bytes is longer than 255 bytes")]
pub struct NameTooLong {
    /// Its length.
    pub bytes: usize,
}

impl Name {
    /// Check the length of `name`.
    pub fn new(name: &str) -> Result<Self, NameTooLong> {
        if name.len() > MAX_NAME_BYTES {
            return Err(NameTooLong { bytes: name.len() });
        }
        Ok(Self(name.into()))
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Length in bytes.
    pub(crate) fn length(&self) -> u8 {
        u8::try_from(self.0.len()).unwrap_or(u8::MAX)
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        encode_str8(self, out);
    }
}

/// One length byte, then the text, which has at most 255 bytes.
pub(crate) fn encode_str8(text: &str, out: &mut Vec<u8>) {
    debug_assert!(text.len() <= MAX_NAME_BYTES);
    out.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
    out.extend(text.bytes());
}

impl Default for Name {
    fn default() -> Self {
        Self("".into())
    }
}

impl std::ops::Deref for Name {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl std::borrow::Borrow<str> for Name {
    fn borrow(&self) -> &str {
        self
    }
}

impl TryFrom<&str> for Name {
    type Error = NameTooLong;

    fn try_from(name: &str) -> Result<Self, NameTooLong> {
        Self::new(name)
    }
}

impl PartialEq<str> for Name {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for Name {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// As [`Shown`]; [`Name::as_str`] is the name itself.
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Shown(self).fmt(f)
    }
}

/// Text of a peer or a file, for one line of a terminal or a log: what would move a cursor, end a line
/// or reorder text is shown as an escape, everything else as it is. Width and precision are those of
/// what is shown.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.contains(is_unsafe_to_show) {
            return f.pad(self.0);
        }
        let mut shown = String::new();
        for character in self.0.chars() {
            if is_unsafe_to_show(character) {
                shown.extend(character.escape_default());
            } else {
                shown.push(character);
            }
        }
        f.pad(&shown)
    }
}

/// Controls, and what is invisible, separates lines or changes the direction of text.
fn is_unsafe_to_show(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// The number by which PART, END and footers refer to a section; picked by the sender.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SectionId(pub u32);

impl fmt::Debug for SectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for SectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Tells sections of the same name apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(pub u32);

/// Binary logarithm of the guest's page size in bytes, 10 to 16.
///
/// A RAM record word keeps its flags below the page size, which needs 10 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageBits(u8);

impl PageBits {
    /// 4096 bytes: x86 and most others.
    pub const X86: Self = Self(12);

    /// `None` unless 10 to 16.
    #[must_use]
    pub fn new(bits: u32) -> Option<Self> {
        match u8::try_from(bits) {
            Ok(bits @ 10..=16) => Some(Self(bits)),
            _ => None,
        }
    }

    /// The logarithm.
    #[must_use]
    pub fn bits(self) -> u32 {
        u32::from(self.0)
    }

    /// The page size.
    #[must_use]
    pub fn bytes(self) -> u32 {
        1 << self.0
    }
}

#[cfg(test)]
mod tests {
    use super::Name;

    #[test]
    fn what_is_shown_stays_on_its_line() {
        for (name, shown) in [
            ("pc.ram", "pc.ram"),
            ("Größe 磁盘 'x' \\", "Größe 磁盘 'x' \\"),
            ("a\r\nb\tc", "a\\r\\nb\\tc"),
            (
                "\u{1b}[2J\u{9b}1m\u{7f}\0",
                "\\u{1b}[2J\\u{9b}1m\\u{7f}\\u{0}",
            ),
            ("\u{202e}x\u{2028}\u{200b}", "\\u{202e}x\\u{2028}\\u{200b}"),
        ] {
            let name = Name::new(name).expect("short");
            assert_eq!(name.to_string(), shown);
            assert_eq!(format!("{name:>4}"), format!("{shown:>4}"));
        }
    }

    #[test]
    fn names_are_padded() {
        let name = Name::new("ram").expect("short");
        assert_eq!(format!("{name:6}|"), "ram   |");
        let name = Name::new("a\n").expect("short");
        assert_eq!(format!("{name:6}|"), "a\\n   |");
    }
}
