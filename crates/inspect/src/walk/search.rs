//! Where device sections end, before the description is there.

use std::collections::VecDeque;
use std::ops::Range;

use vmferry_stream::{Content, Decoder, Record, Section, SectionKind, Step};
use vmferry_vmstate::VmDescription;

use super::count;
use crate::scan::{End, Next, Wanted};

/// Texts that are no description, until one is taken for it: reading them takes time.
const DECOYS_MAX: u32 = 4;

/// Goes ahead through device sections, from guess to guess.
pub(super) struct Search {
    ahead: Decoder,
    section: Section,
    /// Where the next body starts, or what follows the last one.
    pub(super) at: usize,
    searched: usize,
    /// Lengths of the bodies whose ends were found.
    pub(super) found: VecDeque<usize>,
    footers: bool,
    /// Descriptions that were none; of so many the next one is taken as it is.
    decoys_left: u32,
}

/// What was seen ahead.
pub(super) enum Seen {
    /// Not enough.
    Nothing,
    /// A live section or a command follows the devices.
    Live,
    /// EOF follows, and the description, if there is one.
    End { description: Option<Range<usize>> },
}

impl Search {
    /// Begin with the first section, whose body is next. `footers`: do sections end in them?
    pub(super) fn new(decoder: &Decoder, first: &Section, footers: bool) -> Self {
        Self {
            ahead: decoder.clone(),
            footers,
            section: first.clone(),
            at: 0,
            searched: 0,
            found: VecDeque::new(),
            decoys_left: DECOYS_MAX,
        }
    }

    pub(super) fn advance(&mut self, window: &[u8], is_all: bool) -> Seen {
        loop {
            let wanted = Wanted {
                id: self.section.id,
                footers: self.footers,
                decoder: &self.ahead,
                is_all,
            };
            let rest = window.get(self.at..).unwrap_or_default();
            let (body_bytes, next) = match wanted.find(rest, self.searched) {
                End::At { body_bytes, next } => (body_bytes, next),
                End::NotYet { searched } => {
                    self.searched = searched;
                    return Seen::Nothing;
                }
            };
            if next == Next::Eof {
                let Some(description) = eof(self.ahead.clone(), body_bytes, rest, is_all) else {
                    // Look again when there is more.
                    self.searched = body_bytes;
                    return Seen::Nothing;
                };
                if self.is_decoy(rest, description.as_ref()) {
                    self.searched = body_bytes.saturating_add(1);
                    continue;
                }
                let start = self.at;
                self.found.push_back(body_bytes);
                self.at = pass(&mut self.ahead, body_bytes, rest)
                    .map_or(self.at, |used| start.saturating_add(used));
                let description = description.map(|range| {
                    range.start.saturating_add(start)..range.end.saturating_add(start)
                });
                return Seen::End { description };
            }
            let Some(used) = pass(&mut self.ahead, body_bytes, rest) else {
                self.searched = body_bytes.saturating_add(1);
                continue;
            };
            self.found.push_back(body_bytes);
            self.at = self.at.saturating_add(used);
            self.searched = 0;
            if next == Next::Live {
                return Seen::Live;
            }
            let rest = window.get(self.at..).unwrap_or_default();
            match self.ahead.step(rest) {
                Ok(Step::Record {
                    record: Record::Section(section),
                    used,
                }) if section.kind == SectionKind::Full && section.content() == Content::Device => {
                    self.section = section;
                    self.at = self.at.saturating_add(used);
                }
                _ => return Seen::Live,
            }
        }
    }
}

impl Search {
    /// Is what looks like the description something inside a device?
    fn is_decoy(&mut self, bytes: &[u8], description: Option<&Range<usize>>) -> bool {
        let text = description.and_then(|range| bytes.get(range.clone()));
        let Some(text) = text else {
            return false;
        };
        if self.decoys_left == 0 || VmDescription::parse(text).is_ok() {
            return false;
        }
        self.decoys_left = self.decoys_left.saturating_sub(1);
        true
    }
}

/// Go over a body and its footer; how long they are. `None` if there is no footer after all.
fn pass(decoder: &mut Decoder, body_bytes: usize, bytes: &[u8]) -> Option<usize> {
    decoder.skip_device(count(body_bytes));
    if body_bytes > 0 {
        decoder.step(&[]).ok()?;
    }
    match decoder.step(bytes.get(body_bytes..)?) {
        Ok(Step::Record { used, .. }) => Some(body_bytes.saturating_add(used)),
        _ => None,
    }
}

/// Where the description is behind the last body. `None` if there are too few bytes to say so.
fn eof(
    mut ahead: Decoder,
    body_bytes: usize,
    bytes: &[u8],
    is_all: bool,
) -> Option<Option<Range<usize>>> {
    let mut at = pass(&mut ahead, body_bytes, bytes)?;
    for _ in 0..2 {
        let rest = bytes.get(at..).unwrap_or_default();
        let Ok(Step::Record { record, used }) = ahead.step(rest) else {
            return is_all.then_some(None);
        };
        at = at.saturating_add(used);
        if let Record::Description { bytes: length } = record {
            let end = at.saturating_add(usize::try_from(length).unwrap_or(usize::MAX));
            return match bytes.len() >= end {
                true => Some(Some(at..end)),
                false => is_all.then_some(None),
            };
        }
    }
    is_all.then_some(None)
}

/// A description at the very end: its place and text.
pub(super) fn find_description(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let mut ends = memchr::memmem::rfind_iter(bytes, b"{\"");
    ends.find_map(|start| {
        let text = bytes.get(start..)?;
        let header = bytes.get(start.checked_sub(5)?..start)?;
        let length = u32::try_from(text.len()).ok()?.to_be_bytes();
        let is_header = header.split_first() == Some((&0x06, length.as_slice()));
        is_header.then_some((start, text))
    })
}
