//! What changed in a page: the payload of [`crate::RamRecord::Xbzrle`].
//!
//! ```text
//! skip, literal, bytes │ skip, literal, bytes │ …
//!
//! skip     bytes that stay; 0 only at the very beginning
//! literal  bytes that follow and replace what is there; never 0
//! length   7 bits, or with the top bit set 7 low bits and a byte of 7 high ones: at most 16383
//! ```
//!
//! Nothing stands for what stays after the last literal; no bytes at all change nothing. An encoding
//! applies to the version of the page that its sender sent before, a page of zeroes included.

/// Longest run that a length can say.
const RUN_MAX: usize = (1 << 14) - 1;

/// Unchanged bytes between two literals that are cheaper as part of one than as a skip.
const GAP_MAX: usize = 2;

/// What [`encode`] made of two versions of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// They are equal: nothing was appended, and nothing need be sent.
    Unchanged,
    /// The encoding was appended.
    Changed,
    /// An encoding would be longer than the page: nothing was appended, the page itself is shorter.
    TooLong,
}

/// Append to `out` what makes `new` out of `old`, two versions of one page. At most as many bytes as
/// the page has.
///
/// The shorter one decides if their lengths differ. A run of more than 16383 bytes, which no length
/// can say, counts as too long.
pub fn encode(old: &[u8], new: &[u8], out: &mut Vec<u8>) -> Encoded {
    let start = out.len();
    let bytes_max = old.len().min(new.len());
    let (mut old, mut new) = (until(old, bytes_max), until(new, bytes_max));
    loop {
        let skip = equal_bytes(old, new);
        (old, new) = (behind(old, skip), behind(new, skip));
        if new.is_empty() {
            break;
        }
        let literal = changed_bytes(old, new);
        let bytes = until(new, literal);
        let fits = encode_length(skip, out) && encode_length(literal, out);
        out.extend_from_slice(bytes);
        if !fits || out.len().saturating_sub(start) > bytes_max {
            out.truncate(start);
            return Encoded::TooLong;
        }
        (old, new) = (behind(old, literal), behind(new, literal));
    }
    match out.len() == start {
        true => Encoded::Unchanged,
        false => Encoded::Changed,
    }
}

fn until(bytes: &[u8], count: usize) -> &[u8] {
    bytes.get(..count).unwrap_or(bytes)
}

fn behind(bytes: &[u8], count: usize) -> &[u8] {
    bytes.get(count..).unwrap_or_default()
}

/// False if no length can say it.
fn encode_length(length: usize, out: &mut Vec<u8>) -> bool {
    let [low, high] = [length & 0x7f, length >> 7].map(u8::try_from);
    match (low, high) {
        (Ok(low), Ok(0)) => out.push(low),
        (Ok(low), Ok(high)) if length <= RUN_MAX => out.extend([low | 0x80, high]),
        _ => return false,
    }
    true
}

/// How many bytes are equal at the beginning.
fn equal_bytes(old: &[u8], new: &[u8]) -> usize {
    let ((old_words, old_rest), (new_words, new_rest)) = (old.as_chunks(), new.as_chunks());
    let mut equal: usize = 0;
    for (old, new) in old_words.iter().zip(new_words) {
        match differences(old, new) {
            0 => equal = equal.saturating_add(WORD_BYTES),
            bits => return equal.saturating_add(lowest_byte(bits)),
        }
    }
    let rest = old_rest.iter().zip(new_rest);
    equal.saturating_add(rest.take_while(|(old, new)| old == new).count())
}

/// How many bytes a literal at the beginning should have: up to a gap that is worth a skip, or to the
/// last byte that changed.
fn changed_bytes(old: &[u8], new: &[u8]) -> usize {
    let (mut end, mut at): (usize, usize) = (0, 0);
    let ((old_words, old_rest), (new_words, new_rest)) = (old.as_chunks(), new.as_chunks());
    for (old, new) in old_words.iter().zip(new_words) {
        let bits = differences(old, new);
        if has_no_zero_byte(bits) {
            at = at.saturating_add(WORD_BYTES);
            end = at;
            continue;
        }
        for byte in bits.to_le_bytes() {
            at = at.saturating_add(1);
            if byte != 0 {
                end = at;
            } else if at.saturating_sub(end) > GAP_MAX {
                return end;
            }
        }
    }
    for (old, new) in old_rest.iter().zip(new_rest) {
        at = at.saturating_add(1);
        if old != new {
            end = at;
        } else if at.saturating_sub(end) > GAP_MAX {
            return end;
        }
    }
    end
}

const WORD_BYTES: usize = size_of::<u64>();

/// Not zero where they differ; the first byte is the lowest.
fn differences(old: &[u8; WORD_BYTES], new: &[u8; WORD_BYTES]) -> u64 {
    u64::from_le_bytes(*old) ^ u64::from_le_bytes(*new)
}

/// Position of the lowest byte that is not zero.
fn lowest_byte(bits: u64) -> usize {
    usize::try_from(bits.trailing_zeros() / u8::BITS).unwrap_or(WORD_BYTES)
}

fn has_no_zero_byte(bits: u64) -> bool {
    const ONES: u64 = u64::from_ne_bytes([0x01; WORD_BYTES]);
    const TOPS: u64 = u64::from_ne_bytes([0x80; WORD_BYTES]);
    bits.wrapping_sub(ONES) & !bits & TOPS == 0
}

/// Bytes that are no encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{fault} (byte {at} of the encoding)")]
pub struct XbzrleError {
    /// Offset in the encoding of the length that is wrong, or of its end if it is too short.
    pub at: usize,
    /// What is wrong.
    pub fault: XbzrleFault,
}

/// What is wrong with an encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum XbzrleFault {
    /// A sender would have sent the page.
    #[error("an encoding of {bytes} bytes is longer than a page of {page_bytes}")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The page's.
        page_bytes: usize,
    },
    /// It ends inside a length.
    #[error("the encoding ends inside a length")]
    LengthCut,
    /// It ends behind a skip.
    #[error("the encoding ends with a skip")]
    TrailingSkip,
    /// It ends inside a literal.
    #[error("the encoding ends inside a literal of {bytes} bytes")]
    LiteralCut {
        /// The literal's length.
        bytes: usize,
    },
    /// The second byte of a length has its top bit set.
    #[error("a length of more than two bytes")]
    LongLength,
    /// A skip of 0 that is not the first.
    #[error("a skip of 0 bytes")]
    EmptySkip,
    /// A literal of 0.
    #[error("a literal of 0 bytes")]
    EmptyLiteral,
    /// A run reaches over the end of the page.
    #[error("a run to byte {end} of a page of {page_bytes}")]
    PastPage {
        /// Where it ends.
        end: usize,
        /// The page's length.
        page_bytes: usize,
    },
}

/// Change `page`, one whole page, as `encoded` says.
///
/// # Errors
/// `encoded` is wrong; the page is as it was.
pub fn apply(page: &mut [u8], encoded: &[u8]) -> Result<(), XbzrleError> {
    check(encoded, page.len())?;
    for literal in Literals::new(encoded, page.len()) {
        let Literal { start, bytes } = literal?;
        let target = page.iter_mut().skip(start);
        for (target, byte) in target.zip(bytes) {
            *target = *byte;
        }
    }
    Ok(())
}

/// Would [`apply`] change a page of `page_bytes` bytes?
///
/// # Errors
/// `encoded` is wrong.
pub fn check(encoded: &[u8], page_bytes: usize) -> Result<(), XbzrleError> {
    if encoded.len() > page_bytes {
        let fault = XbzrleFault::TooLong {
            bytes: encoded.len(),
            page_bytes,
        };
        return Err(XbzrleError { at: 0, fault });
    }
    Literals::new(encoded, page_bytes).try_for_each(|literal| literal.map(|_| ()))
}

/// New bytes for a page; inside it.
struct Literal<'a> {
    start: usize,
    bytes: &'a [u8],
}

/// The literals of an encoding, in their order; ends after an error.
struct Literals<'a> {
    encoded: &'a [u8],
    /// How much of it was read.
    at: usize,
    page_bytes: usize,
    /// Where in the page the last literal ended.
    page_at: usize,
}

impl<'a> Literals<'a> {
    fn new(encoded: &'a [u8], page_bytes: usize) -> Self {
        Self {
            encoded,
            at: 0,
            page_bytes,
            page_at: 0,
        }
    }

    fn read(&mut self) -> Result<Literal<'a>, XbzrleError> {
        let skip_at = self.at;
        let skip = self.length()?;
        if skip == 0 && skip_at > 0 {
            return Err(wrong(skip_at, XbzrleFault::EmptySkip));
        }
        let start = self.run(skip_at, skip)?;
        if self.at == self.encoded.len() {
            return Err(wrong(self.at, XbzrleFault::TrailingSkip));
        }
        let literal_at = self.at;
        let length = self.length()?;
        if length == 0 {
            return Err(wrong(literal_at, XbzrleFault::EmptyLiteral));
        }
        self.page_at = start;
        let end = self.run(literal_at, length)?;
        let bytes = self.encoded.get(self.at..self.at.saturating_add(length));
        let bytes = bytes.ok_or_else(|| {
            wrong(
                self.encoded.len(),
                XbzrleFault::LiteralCut { bytes: length },
            )
        })?;
        self.at = self.at.saturating_add(length);
        self.page_at = end;
        Ok(Literal { start, bytes })
    }

    /// Where in the page a run of `length` bytes ends; its length stands at `at`.
    fn run(&self, at: usize, length: usize) -> Result<usize, XbzrleError> {
        let end = self.page_at.saturating_add(length);
        if end > self.page_bytes {
            let page_bytes = self.page_bytes;
            return Err(wrong(at, XbzrleFault::PastPage { end, page_bytes }));
        }
        Ok(end)
    }

    fn length(&mut self) -> Result<usize, XbzrleError> {
        let at = self.at;
        let low = self.byte()?;
        if low & 0x80 == 0 {
            return Ok(usize::from(low));
        }
        let high = self.byte()?;
        if high & 0x80 != 0 {
            return Err(wrong(at, XbzrleFault::LongLength));
        }
        Ok(usize::from(low & 0x7f) | usize::from(high) << 7)
    }

    fn byte(&mut self) -> Result<u8, XbzrleError> {
        let byte = self.encoded.get(self.at);
        let byte = byte.ok_or_else(|| wrong(self.encoded.len(), XbzrleFault::LengthCut))?;
        self.at = self.at.saturating_add(1);
        Ok(*byte)
    }
}

impl<'a> Iterator for Literals<'a> {
    type Item = Result<Literal<'a>, XbzrleError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.encoded.len() {
            return None;
        }
        let literal = self.read();
        if literal.is_err() {
            self.at = usize::MAX;
        }
        Some(literal)
    }
}

fn wrong(at: usize, fault: XbzrleFault) -> XbzrleError {
    XbzrleError { at, fault }
}

#[cfg(test)]
mod tests {
    use super::{XbzrleError, XbzrleFault, apply, check};

    const PAGE: usize = 4096;

    /// The page that `encoded` makes of ones.
    fn applied(encoded: &[u8]) -> Result<Vec<u8>, XbzrleError> {
        let mut page = vec![1; PAGE];
        let result = apply(&mut page, encoded);
        assert_eq!(check(encoded, PAGE), result);
        if result.is_err() {
            assert!(page.iter().all(|byte| *byte == 1), "the page was changed");
        }
        result.map(|()| page)
    }

    fn error(encoded: &[u8]) -> (usize, XbzrleFault) {
        let error = applied(encoded).expect_err("encoding is refused");
        (error.at, error.fault)
    }

    #[test]
    fn two_literals() {
        let page = applied(b"\x10\x02\xca\x5d\x0e\x02\xc9\x5d").expect("right");
        let mut expected = vec![1; PAGE];
        expected[0x10..0x12].copy_from_slice(b"\xca\x5d");
        expected[0x20..0x22].copy_from_slice(b"\xc9\x5d");
        assert_eq!(page, expected);
    }

    #[test]
    fn nothing_changes_nothing() {
        assert_eq!(applied(b""), Ok(vec![1; PAGE]));
    }

    #[test]
    fn a_skip_of_0_stands_at_the_beginning_only() {
        let page = applied(b"\0\x02\x08\x09\x01\x01\x07").expect("right");
        assert_eq!(page[..5], [8, 9, 1, 7, 1]);
        assert_eq!(
            error(b"\0\x02\x08\x09\0\x01\x07"),
            (4, XbzrleFault::EmptySkip)
        );
        // A longer form of 0 is 0 too.
        assert_eq!(applied(b"\x80\0\x01\x07").expect("right")[0], 7);
        assert_eq!(error(b"\0\x01\x07\x80\0\x01"), (3, XbzrleFault::EmptySkip));
    }

    #[test]
    fn lengths_of_two_bytes() {
        let page = applied(b"\x85\0\x81\0\x07").expect("right");
        assert_eq!(page[4..7], [1, 7, 1]);
        let page = applied(b"\xff\x1f\x01\x07").expect("right");
        assert_eq!(page[4094..], [1, 7]);
        let long = [&b"\0\xac\x02"[..], &[9; 300]].concat();
        let page = applied(&long).expect("right");
        assert_eq!((page[299], page[300]), (9, 1));
    }

    #[test]
    fn lengths_of_three_bytes() {
        assert_eq!(error(b"\x80\x80\x01\x01\x07"), (0, XbzrleFault::LongLength));
        assert_eq!(error(b"\x01\x80\x80\x01\x07"), (1, XbzrleFault::LongLength));
    }

    #[test]
    fn a_literal_is_never_empty() {
        assert_eq!(error(b"\x01\0"), (1, XbzrleFault::EmptyLiteral));
        assert_eq!(error(b"\x01\x80\0\x07"), (1, XbzrleFault::EmptyLiteral));
        assert_eq!(
            error(b"\x01\x01\x07\x01\0\x07"),
            (4, XbzrleFault::EmptyLiteral)
        );
    }

    #[test]
    fn a_skip_is_never_last() {
        assert_eq!(error(b"\x01"), (1, XbzrleFault::TrailingSkip));
        assert_eq!(error(b"\x01\x01\x07\x05"), (4, XbzrleFault::TrailingSkip));
    }

    #[test]
    fn the_encoding_ends_too_early() {
        assert_eq!(error(b"\x81"), (1, XbzrleFault::LengthCut));
        assert_eq!(error(b"\x01\x81"), (2, XbzrleFault::LengthCut));
        assert_eq!(
            error(b"\x01\x03\x07\x07"),
            (4, XbzrleFault::LiteralCut { bytes: 3 })
        );
    }

    #[test]
    fn nothing_reaches_over_the_page() {
        let past = |end| XbzrleFault::PastPage {
            end,
            page_bytes: PAGE,
        };
        assert_eq!(error(b"\x80\x20\x01\x07"), (2, past(4097)));
        assert_eq!(error(b"\x81\x20\x01\x07"), (0, past(4097)));
        assert_eq!(error(b"\xff\x7f\x01\x07"), (0, past(16383)));
        assert_eq!(error(b"\xff\x1f\x02\x07\x07"), (2, past(4097)));
        assert_eq!(error(b"\0\xff\x7f\x07"), (1, past(16383)));
    }

    #[test]
    fn an_encoding_is_not_longer_than_a_page() {
        // Short runs take more room than they describe: skip 1, write 1.
        let pairs = [1, 1, 7].repeat(PAGE / 3);
        assert_eq!(pairs.len(), PAGE - 1);
        assert!(applied(&pairs).is_ok());
        let pairs = [pairs, vec![1, 1]].concat();
        let fault = XbzrleFault::TooLong {
            bytes: PAGE + 1,
            page_bytes: PAGE,
        };
        assert_eq!(error(&pairs), (0, fault));
        let full = [&b"\x01\xfd\x1f"[..], &[9; PAGE - 3]].concat();
        assert_eq!(full.len(), PAGE);
        assert_eq!(applied(&full).expect("right")[1..PAGE - 2], [9; PAGE - 3]);
    }

    #[test]
    fn an_error_says_where() {
        assert_eq!(
            applied(b"\0\x01\x07\0\x01\x07")
                .expect_err("wrong")
                .to_string(),
            "a skip of 0 bytes (byte 3 of the encoding)"
        );
    }
}
