//! Decoding of fields from a window.
//!
//! A [`Reader`] knows which field it reads: input that is too short and values that are wrong name
//! it, with its place in the stream.

use crate::error::{DecodeError, Fault};
use crate::limits::MAX_HEADER_BYTES;
use crate::names::Name;

/// Why decoding stopped.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The window ends inside `field`; this many bytes of window are needed.
    Short { needed: usize, field: &'static str },
    /// The stream is wrong.
    Wrong(DecodeError),
}

pub(crate) type Parse<T> = Result<T, Stop>;

/// Reads fields one after another.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    used: usize,
    /// Offset of the window in the stream.
    base: u64,
    /// The field read last, and where it starts in the window.
    field: (&'static str, usize),
}

impl<'a> Reader<'a> {
    /// Of a longer window only the first [`MAX_HEADER_BYTES`] are looked at: no header may be longer,
    /// whatever the window is.
    pub(crate) fn new(window: &'a [u8], base: u64) -> Self {
        Self {
            rest: window.get(..MAX_HEADER_BYTES).unwrap_or(window),
            used: 0,
            base,
            field: ("start", 0),
        }
    }

    /// Bytes of the window read so far.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Offset in the stream of the next byte.
    pub(crate) fn offset(&self) -> u64 {
        let used = u64::try_from(self.used).unwrap_or(u64::MAX);
        self.base.saturating_add(used)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Parse<u8> {
        self.array(field).map(u8::from_be_bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Parse<u16> {
        self.array(field).map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Parse<u32> {
        self.array(field).map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Parse<u64> {
        self.array(field).map(u64::from_be_bytes)
    }

    /// The next byte, which stays where it is.
    pub(crate) fn peek_u8(&mut self, field: &'static str) -> Parse<u8> {
        self.peek(field).map(u8::from_be_bytes)
    }

    /// The next eight bytes, which stay where they are.
    pub(crate) fn peek_u64(&mut self, field: &'static str) -> Parse<u64> {
        self.peek(field).map(u64::from_be_bytes)
    }

    /// One length byte and that many bytes.
    pub(crate) fn name(&mut self, field: &'static str) -> Parse<Name> {
        let length = self.u8(field)?;
        self.name_of(u32::from(length), field)
    }

    /// A name of known length, at most 255.
    pub(crate) fn name_of(&mut self, length: u32, field: &'static str) -> Parse<Name> {
        let bytes = self.bytes(usize::try_from(length).unwrap_or(usize::MAX), field)?;
        let text = std::str::from_utf8(bytes);
        text.ok()
            .and_then(|text| Name::new(text).ok())
            .ok_or_else(|| self.wrong(Fault::NotUtf8(bytes.to_vec())))
    }

    pub(crate) fn array<const N: usize>(&mut self, field: &'static str) -> Parse<[u8; N]> {
        let array = self.peek(field)?;
        self.rest = self.rest.get(N..).unwrap_or_default();
        self.used = self.used.saturating_add(N);
        Ok(array)
    }

    fn peek<const N: usize>(&mut self, field: &'static str) -> Parse<[u8; N]> {
        self.field = (field, self.used);
        let array = self.rest.first_chunk::<N>();
        array.copied().ok_or_else(|| self.short(N))
    }

    fn bytes(&mut self, length: usize, field: &'static str) -> Parse<&'a [u8]> {
        self.field = (field, self.used);
        let (bytes, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or_else(|| self.short(length))?;
        self.rest = rest;
        self.used = self.used.saturating_add(length);
        Ok(bytes)
    }

    fn short(&self, length: usize) -> Stop {
        Stop::Short {
            needed: self.used.saturating_add(length),
            field: self.field.0,
        }
    }

    /// The field read last is wrong.
    pub(crate) fn wrong(&self, fault: Fault) -> Stop {
        let (field, start) = self.field;
        Stop::Wrong(DecodeError {
            offset: self
                .base
                .saturating_add(u64::try_from(start).unwrap_or(u64::MAX)),
            field,
            fault,
        })
    }

    /// The field read last holds `value`, which may be `max` at most.
    pub(crate) fn at_most(&self, value: u64, max: u64) -> Parse<()> {
        if value > max {
            return Err(self.wrong(Fault::OverMaximum { value, max }));
        }
        Ok(())
    }

    /// The field read last holds `found`, which can only be `expected`.
    pub(crate) fn exactly(&self, found: u64, expected: u64) -> Parse<()> {
        if found != expected {
            return Err(self.wrong(Fault::Unexpected { found, expected }));
        }
        Ok(())
    }

    /// The field read last holds `value`, which must be a multiple of `unit`, a power of two.
    pub(crate) fn multiple(&self, value: u64, unit: u64) -> Parse<()> {
        if value & unit.saturating_sub(1) != 0 {
            return Err(self.wrong(Fault::Unaligned { value, unit }));
        }
        Ok(())
    }
}
