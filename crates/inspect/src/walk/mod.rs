//! One pass through a stream.
//!
//! ```text
//! container ─▶ record ─┬─ payload ─▶ visitor, in pieces
//!                      ├─ package ─▶ held, and walked through like a stream
//!                      ├─ description ─▶ held
//!                      └─ body of a device, of unknown length:
//!                           FULL  ─▶ held with all that follows, until it is clear what that is
//!                           other ─▶ visitor, in pieces, up to its footer
//! ```
//!
//! The lengths of devices' bodies stand in the description, which is the last thing in a stream. So
//! the device sections at the end are held; when the description is there, it says where each ends.
//! Where there is none, or something else follows the devices, their ends are looked for
//! ([`crate::scan`]).

mod search;
mod slice;

use std::collections::VecDeque;
use std::io::{self, Read, Seek};

use vmferry_stream::{
    Command, Content, DecodeError, Decoder, Ending, Fault, Name, Options, RamRecord, Record,
    Section, SectionId, SectionKind, Step,
};
use vmferry_vmstate::{DescriptionError, VmDescription};

use crate::container::{self, Container, ContainerError};
use crate::layouts::Layouts;
use crate::limits::{DESCRIPTION_BYTES_MAX, HELD_BYTES_MAX};
use crate::scan::{End, Wanted};
use crate::source::{Skip, Source};
use search::{Search, Seen, find_description};
use slice::{Slice, Walked};

/// Why a visitor wants no more.
pub type VisitError = Box<dyn std::error::Error + Send + Sync>;

/// Looks at a stream while it goes by.
pub trait Visitor {
    /// Something was found.
    ///
    /// # Errors
    /// Ends the walk.
    fn event(&mut self, event: Event<'_>) -> Result<(), VisitError>;
}

/// What is told of a stream, in its order. Offsets are bytes of the input, whatever container the
/// stream is in.
#[derive(Debug)]
pub enum Event<'a> {
    /// What stands before the stream.
    Container(&'a Container),
    /// A record, which starts at this byte. The section of a device is told by [`Event::Device`],
    /// too, before its [`Record::SectionEnd`].
    Record(u64, &'a Record),
    /// Payload of the record before, in pieces that start at this byte. Bodies of live sections that
    /// nobody knows are payload, too; devices, the description and packages are not.
    Payload(u64, &'a [u8]),
    /// What follows this byte is inside a package.
    Package(u64),
    /// The package ended before this byte.
    PackageEnd(u64),
    /// The body of a device's section; what there is of it, if the input ends inside ([`Found::Cut`]).
    Device(Body<'a>),
    /// The description. Told as soon as it is known: before the devices that were held for its sake,
    /// and before its own record.
    Description(Description<'a>),
}

/// The description of a stream's devices.
#[derive(Debug)]
pub struct Description<'a> {
    /// Where its text starts in the input.
    pub offset: u64,
    /// Its text.
    pub text: &'a [u8],
    /// The text, read.
    pub parsed: Result<VmDescription, DescriptionError>,
}

/// The body of a device.
#[derive(Clone, Copy, Debug)]
pub struct Body<'a> {
    /// Its section.
    pub section: &'a Section,
    /// Where it starts in the input.
    pub offset: u64,
    /// Its bytes.
    pub bytes: &'a [u8],
    /// How its end was found.
    pub found: Found,
}

/// How the end of a device's body was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The description says its length.
    ByDescription,
    /// By the footer behind it.
    ByFooter,
    /// By what follows it: the stream has no footers.
    ByNextHeader,
    /// It is not there: the input ends inside the body.
    Cut,
}

/// A stream could not be walked through to its end.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// It is broken, or ends too early.
    #[error(transparent)]
    Stream(#[from] DecodeError),
    /// What stands before it is broken, or it is something else.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// Something must be held to be understood, and is too long.
    #[error("byte {offset}: {what} is longer than {max} bytes, which is as much as is held")]
    TooLong {
        /// Where it starts.
        offset: u64,
        /// What it is.
        what: String,
        /// The maximum; see [`crate::limits`].
        max: usize,
    },
    /// What follows a device's section is there, and neither a footer nor the description says where
    /// its body ends.
    #[error("the end of section '{section}' ({id}) is not found (byte {offset}, device state)")]
    EndNotFound {
        /// Where its body starts.
        offset: u64,
        /// Its name.
        section: Name,
        /// Its id.
        id: SectionId,
    },
    /// The input cannot be read.
    #[error("byte {offset}: {source}")]
    Read {
        /// How far it was read.
        offset: u64,
        /// Why it ended.
        source: io::Error,
    },
    /// The visitor failed.
    #[error("{0}")]
    Visitor(VisitError),
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// With or without a description.
    pub ending: Ending,
    /// Length of the stream, with what stands before it.
    pub bytes: u64,
    /// More input follows, which does not belong to the stream.
    pub is_followed: bool,
}

/// Go through a stream, from its first byte to its end, and tell the visitor what is in it. Holds at
/// most [`HELD_BYTES_MAX`] and a package of that length; the input may be a pipe.
///
/// # Errors
/// The stream is broken or truncated, the input cannot be read, or the visitor failed. What was
/// before that has been told.
pub fn walk(input: impl Read, visitor: &mut impl Visitor) -> Result<Finish, WalkError> {
    walk_source(Source::new(input, 0), None, visitor)
}

/// As [`walk`], of an input that can seek and whose first byte is byte `start` of a file: this is
/// added to all offsets, and mapped-ram files count from there. Bitmaps, gaps and pages of mapped-ram
/// files are stepped over and not told. The input refuses to seek behind its end
/// ([`io::ErrorKind::UnexpectedEof`]).
///
/// # Errors
/// As those of [`walk`].
pub fn walk_skipping(
    input: impl Read + Seek,
    start: u64,
    visitor: &mut impl Visitor,
) -> Result<Finish, WalkError> {
    walk_source(Source::new(input, start), Some(step_over), visitor)
}

fn step_over(input: &mut impl Seek, bytes: u64) -> io::Result<()> {
    let bytes = i64::try_from(bytes).map_err(|_| io::ErrorKind::UnexpectedEof)?;
    input.seek_relative(bytes)
}

fn walk_source<R: Read>(
    mut source: Source<R>,
    skip: Option<Skip<R>>,
    visitor: &mut impl Visitor,
) -> Result<Finish, WalkError> {
    let container = container::read(&mut source)?;
    told(visitor.event(Event::Container(&container)))?;
    let base = source.offset();
    let mut walk = Walk {
        source,
        decoder: Decoder::new(Options {
            start: base,
            ..Options::default()
        }),
        base,
        skip,
        is_skipped: false,
        is_described: false,
        visitor,
    };
    walk.records()
}

struct Walk<'v, R, V> {
    source: Source<R>,
    decoder: Decoder,
    /// Where the decoder's first byte stands in the input.
    base: u64,
    skip: Option<Skip<R>>,
    /// The record before is one whose payload is stepped over.
    is_skipped: bool,
    /// The description has been told.
    is_described: bool,
    visitor: &'v mut V,
}

impl<R: Read, V: Visitor> Walk<'_, R, V> {
    fn records(&mut self) -> Result<Finish, WalkError> {
        loop {
            let offset = self.source.offset();
            let step = self.decoder.step(self.source.window());
            match step.map_err(|error| shifted(error, self.base))? {
                Step::NeedMore(bytes) => {
                    if !self.source.wait_for(bytes)? {
                        return self.end_of_input();
                    }
                }
                Step::Payload(bytes) => self.payload(bytes)?,
                Step::End => return self.finish(Ending::WithDescription),
                Step::Record { record, used } => {
                    self.source.consume(used);
                    told(self.visitor.event(Event::Record(offset, &record)))?;
                    self.is_skipped = matches!(
                        record,
                        Record::Ram(
                            RamRecord::MappedBitmap { .. }
                                | RamRecord::MappedGap { .. }
                                | RamRecord::MappedPages { .. }
                        )
                    );
                    self.follow(&record)?;
                }
            }
        }
    }

    fn end_of_input(&mut self) -> Result<Finish, WalkError> {
        let end = self.source.offset_of_end().saturating_sub(self.base);
        let ending = self.decoder.finish_at(end);
        let ending = ending.map_err(|error| shifted(error, self.base))?;
        self.finish(ending)
    }

    fn finish(&mut self, ending: Ending) -> Result<Finish, WalkError> {
        Ok(Finish {
            ending: self.decoder.ending().unwrap_or(ending),
            bytes: self.source.offset(),
            is_followed: self.source.wait_for(1)?,
        })
    }

    /// Hand payload on, in the pieces in which it comes.
    fn payload(&mut self, bytes: u32) -> Result<(), WalkError> {
        if let Some(skip) = self.skip.filter(|_| self.is_skipped) {
            return match self.source.skip(bytes.into(), skip)? {
                true => Ok(()),
                false => self.truncated(),
            };
        }
        let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
        while left > 0 {
            if !self.source.wait_for(1)? {
                return self.truncated();
            }
            let window = self.source.window();
            let piece = window.get(..left).unwrap_or(window);
            let used = piece.len();
            told(
                self.visitor
                    .event(Event::Payload(self.source.offset(), piece)),
            )?;
            self.source.consume(used);
            left = left.saturating_sub(used);
        }
        Ok(())
    }

    /// The input ends inside something that was announced.
    fn truncated<T>(&self) -> Result<T, WalkError> {
        let end = self.source.offset_of_end().saturating_sub(self.base);
        match self.decoder.finish_at(end) {
            Err(error) => Err(shifted(error, self.base)),
            Ok(_) => Err(WalkError::Read {
                offset: self.source.offset_of_end(),
                source: io::ErrorKind::UnexpectedEof.into(),
            }),
        }
    }

    /// What some records announce is not for the visitor as it stands.
    fn follow(&mut self, record: &Record) -> Result<(), WalkError> {
        match record {
            Record::Section(section) if section.content() == Content::Device => {
                match section.kind {
                    SectionKind::Full => self.devices(section),
                    _ => self.unknown(section),
                }
            }
            Record::Command(Command::Packaged { bytes }) => self.package(*bytes),
            Record::Description { bytes } => self.description(*bytes),
            _ => Ok(()),
        }
    }

    fn package(&mut self, bytes: u32) -> Result<(), WalkError> {
        let offset = self.source.offset();
        let what = "a package";
        let (package, is_whole) = self.announced(bytes, HELD_BYTES_MAX, what)?;
        told(self.visitor.event(Event::Package(offset)))?;
        let mut nested = self.decoder.package();
        let mut slice = Slice {
            decoder: &mut nested,
            bytes: &package,
            base: offset,
            described: None,
            found: VecDeque::new(),
            visitor: self.visitor,
        };
        // What is left behind an EOF or RUN is ignored.
        match slice.walk(0, None)? {
            Walked::Quit(_) => {}
            Walked::Short(_) => {
                let ending = nested.finish_at(count(package.len()));
                ending.map_err(|error| shifted(error, offset))?;
            }
            Walked::Open(section) if is_whole => {
                return Err(WalkError::EndNotFound {
                    offset: offset.saturating_add(nested.offset()),
                    section: section.name,
                    id: section.id,
                });
            }
            Walked::Open(section) => {
                let start = usize::try_from(nested.offset()).unwrap_or(usize::MAX);
                told(self.visitor.event(Event::Device(Body {
                    section: &section,
                    offset: offset.saturating_add(nested.offset()),
                    bytes: package.get(start..).unwrap_or_default(),
                    found: Found::Cut,
                })))?;
                return Err(cut_device(&nested, count(package.len()), offset));
            }
        }
        if !is_whole {
            return self.truncated();
        }
        told(self.visitor.event(Event::PackageEnd(self.source.offset())))
    }

    fn description(&mut self, bytes: u32) -> Result<(), WalkError> {
        let offset = self.source.offset();
        let (text, is_whole) = self.announced(bytes, DESCRIPTION_BYTES_MAX, "the description")?;
        if !is_whole {
            return self.truncated();
        }
        if !self.is_described {
            self.is_described = true;
            let parsed = VmDescription::parse(&text);
            let text = &text;
            told(self.visitor.event(Event::Description(Description {
                offset,
                text,
                parsed,
            })))?;
        }
        Ok(())
    }

    /// Take payload that the walk itself needs; whether it is all there.
    fn announced(
        &mut self,
        bytes: u32,
        max: usize,
        what: &str,
    ) -> Result<(Vec<u8>, bool), WalkError> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        if length > max {
            return Err(self.too_long(what, max));
        }
        // The announcement of an empty payload is left out.
        if length > 0 {
            let announced = self.decoder.step(self.source.window());
            debug_assert_eq!(announced, Ok(Step::Payload(bytes)));
        }
        let is_whole = self.source.wait_for(length)?;
        let window = self.source.window();
        let taken = window.get(..length).unwrap_or(window).to_vec();
        self.source.consume(taken.len());
        Ok((taken, is_whole))
    }

    fn too_long(&self, what: &str, max: usize) -> WalkError {
        WalkError::TooLong {
            offset: self.source.offset(),
            what: what.to_owned(),
            max,
        }
    }

    /// A live section whose body nobody knows: pass it on, up to its footer.
    fn unknown(&mut self, section: &Section) -> Result<(), WalkError> {
        let mut is_all = false;
        loop {
            let wanted = Wanted {
                id: section.id,
                footers: self.decoder.footers() != Some(false),
                decoder: &self.decoder,
                is_all,
            };
            let (bytes, ends) = match wanted.find(self.source.window(), 0) {
                End::At { body_bytes, .. } => (body_bytes, true),
                End::NotYet { searched } => (searched, false),
            };
            let announced = u32::try_from(bytes).unwrap_or(u32::MAX);
            if ends {
                self.decoder.skip_device(count(bytes));
            } else {
                self.decoder.part_of_device(count(bytes));
            }
            if bytes > 0 {
                let step = self.decoder.step(self.source.window());
                debug_assert_eq!(step, Ok(Step::Payload(announced)));
                self.payload(announced)?;
            }
            if ends {
                return Ok(());
            }
            if is_all {
                return self.truncated();
            }
            let have = self.source.window().len();
            is_all = !self.source.wait_for(have.saturating_add(1))?;
        }
    }

    /// Device sections, of which the first has just begun: hold what comes until it is clear where
    /// they end, then tell.
    fn devices(&mut self, first: &Section) -> Result<(), WalkError> {
        let footers = self.decoder.footers();
        let mut search = Search::new(&self.decoder, first, footers != Some(false));
        let mut is_all = false;
        let seen = loop {
            match search.advance(self.source.window(), is_all) {
                Seen::Nothing if is_all && footers.is_none() => {
                    // No section has ended yet: perhaps none has a footer.
                    let mut without = Search::new(&self.decoder, first, false);
                    let seen = without.advance(self.source.window(), true);
                    if !matches!(seen, Seen::Nothing) {
                        search = without;
                    }
                    break seen;
                }
                Seen::Nothing if is_all => break Seen::Nothing,
                Seen::Nothing => {
                    let have = self.source.window().len();
                    if have > HELD_BYTES_MAX {
                        let what = format!("what follows device section '{}'", first.name);
                        return Err(self.too_long(&what, HELD_BYTES_MAX));
                    }
                    is_all = !self.source.wait_for(have.saturating_add(1))?;
                }
                seen => break seen,
            }
        };
        let window = self.source.window();
        let (devices, text) = match seen {
            Seen::Live => (window.get(..search.at).unwrap_or_default(), None),
            Seen::End { description } => {
                let text = description.and_then(|range| Some((range.start, window.get(range)?)));
                (window.get(..search.at).unwrap_or_default(), text)
            }
            // The sections are broken somewhere. The description may still say where.
            Seen::Nothing => (window, find_description(window)),
        };
        let base = self.source.offset();
        let mut lengths = None;
        if let Some((start, text)) = text {
            let parsed = VmDescription::parse(text);
            lengths = parsed.as_ref().ok().map(Layouts::of);
            self.is_described = true;
            let start = base.saturating_add(count(start));
            told(self.visitor.event(Event::Description(Description {
                offset: start,
                text,
                parsed,
            })))?;
        }
        let is_described = lengths.is_some();
        let mut slice = Slice {
            decoder: &mut self.decoder,
            bytes: devices,
            base: self.base,
            described: lengths,
            found: search.found,
            visitor: self.visitor,
        };
        let used = match slice.walk(base.saturating_sub(self.base), Some(first))? {
            Walked::Short(used) | Walked::Quit(used) => used,
            Walked::Open(section) if is_described => {
                return Err(WalkError::EndNotFound {
                    offset: self.base.saturating_add(self.decoder.offset()),
                    section: section.name,
                    id: section.id,
                });
            }
            Walked::Open(section) => {
                let offset = self.base.saturating_add(self.decoder.offset());
                let start = usize::try_from(offset.saturating_sub(base)).unwrap_or(usize::MAX);
                told(self.visitor.event(Event::Device(Body {
                    section: &section,
                    offset,
                    bytes: self.source.window().get(start..).unwrap_or_default(),
                    found: Found::Cut,
                })))?;
                let end = self.source.offset_of_end().saturating_sub(self.base);
                return Err(cut_device(&self.decoder, end, self.base));
            }
        };
        self.source.consume(used);
        Ok(())
    }
}

/// The input ends at the decoder's byte `end`, inside the device that it has begun.
fn cut_device(decoder: &Decoder, end: u64, base: u64) -> WalkError {
    let fault = match decoder.finish_at(end) {
        Err(error) => error.fault,
        Ok(_) => Fault::Truncated("a device's section".into()),
    };
    let error = DecodeError {
        offset: end,
        field: "device state",
        fault,
    };
    shifted(error, base)
}

fn told(answer: Result<(), VisitError>) -> Result<(), WalkError> {
    answer.map_err(WalkError::Visitor)
}

/// An error of a decoder whose first byte stands at `base` of the input.
fn shifted(error: DecodeError, base: u64) -> WalkError {
    WalkError::Stream(DecodeError {
        offset: error.offset.saturating_add(base),
        ..error
    })
}

fn count(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}
