//! A walk through bytes that are all at hand.

use std::collections::VecDeque;

use vmferry_stream::{Command, Content, Decoder, Record, Section, Step};

use super::{Body, Event, Found, Visitor, WalkError, count, shifted, told};
use crate::layouts::Layouts;
use crate::scan::{self, End, Wanted};

/// Bytes that are all at hand: device sections, or a package.
pub(super) struct Slice<'a, V> {
    pub(super) decoder: &'a mut Decoder,
    pub(super) bytes: &'a [u8],
    /// Where the decoder's first byte stands in the input.
    pub(super) base: u64,
    pub(super) described: Option<Layouts>,
    /// Lengths of the first bodies, as they were guessed.
    pub(super) found: VecDeque<usize>,
    pub(super) visitor: &'a mut V,
}

/// How far a slice was walked through.
pub(super) enum Walked {
    /// Up to here; there are too few bytes for the next step.
    Short(usize),
    /// POSTCOPY_RUN ends a package; what follows is ignored.
    Quit(usize),
    /// The end of this device's section is not there.
    Open(Section),
}

impl<V: Visitor> Slice<'_, V> {
    /// The first byte is the decoder's byte `start`. `open`: the section that has begun.
    pub(super) fn walk(&mut self, start: u64, open: Option<&Section>) -> Result<Walked, WalkError> {
        let mut at = 0_usize;
        let mut is_description = false;
        if let Some(section) = open {
            match self.device(section, at)? {
                Some(bytes) => at = bytes,
                None => return Ok(Walked::Open(section.clone())),
            }
        }
        loop {
            let offset = self.base.saturating_add(start).saturating_add(count(at));
            let window = self.bytes.get(at..).unwrap_or_default();
            let step = self.decoder.step(window);
            match step.map_err(|error| shifted(error, self.base))? {
                Step::NeedMore(_) | Step::End => return Ok(Walked::Short(at)),
                Step::Payload(bytes) => {
                    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                    let Some(piece) = window.get(..bytes) else {
                        return Ok(Walked::Short(at));
                    };
                    if !is_description {
                        told(self.visitor.event(Event::Payload(offset, piece)))?;
                    }
                    at = at.saturating_add(bytes);
                }
                Step::Record { record, used } => {
                    at = at.saturating_add(used);
                    told(self.visitor.event(Event::Record(offset, &record)))?;
                    // Its text has been told.
                    is_description = matches!(record, Record::Description { .. });
                    match record {
                        Record::Command(Command::PostcopyRun) => return Ok(Walked::Quit(at)),
                        Record::Section(section) if section.content() == Content::Device => {
                            match self.device(&section, at)? {
                                Some(bytes) => at = at.saturating_add(bytes),
                                None => return Ok(Walked::Open(section)),
                            }
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    /// Tell a device's body, which starts at `at`; how long it is. `None` if its end is not there.
    fn device(&mut self, section: &Section, at: usize) -> Result<Option<usize>, WalkError> {
        let offset = self.base.saturating_add(self.decoder.offset());
        let rest = self.bytes.get(at..).unwrap_or_default();
        let Some((length, found)) = self.body_bytes(section, rest) else {
            return Ok(None);
        };
        let Some(bytes) = rest.get(..length) else {
            return Ok(None);
        };
        told(self.visitor.event(Event::Device(Body {
            section,
            offset,
            bytes,
            found,
        })))?;
        self.decoder.skip_device(count(length));
        if length > 0 {
            let announced = self.decoder.step(rest);
            debug_assert!(matches!(announced, Ok(Step::Payload(_))));
        }
        Ok(Some(length))
    }

    /// The description's word counts if what stands where it says can end a section. Else a guess
    /// counts; and if there is none, the place before a footer, whatever is behind it, or before the
    /// next header, or the description's word again: the decoder will say what is there instead.
    fn body_bytes(&mut self, section: &Section, rest: &[u8]) -> Option<(usize, Found)> {
        let guessed = self.found.pop_front();
        let footers = self.decoder.footers();
        let described = self.described.as_mut().and_then(|layouts| {
            let layout = layouts.next(section)?;
            usize::try_from(layout.bytes).ok()
        });
        let wanted = Wanted {
            id: section.id,
            footers: footers != Some(false),
            decoder: self.decoder,
            is_all: true,
        };
        let is_right = |length: usize| {
            let behind = rest.get(length..).unwrap_or_default();
            match footers {
                Some(false) => true,
                Some(true) => scan::is_any_footer(behind),
                None => scan::is_any_footer(behind) || wanted.can_follow(behind),
            }
        };
        if let Some(length) = described.filter(|length| is_right(*length)) {
            if guessed != Some(length) {
                // From here on the guesses were about something else.
                self.found.clear();
            }
            return Some((length, Found::ByDescription));
        }
        let found = guessed.or_else(|| match wanted.find(rest, 0) {
            End::At { body_bytes, .. } => Some(body_bytes),
            End::NotYet { .. } => wanted.find_broken(rest),
        });
        match (found, described) {
            (Some(length), _) if scan::is_any_footer(rest.get(length..).unwrap_or_default()) => {
                Some((length, Found::ByFooter))
            }
            (Some(length), _) => Some((length, Found::ByNextHeader)),
            (None, Some(length)) => Some((length, Found::ByDescription)),
            (None, None) => None,
        }
    }
}
