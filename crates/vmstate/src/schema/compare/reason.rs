//! Why state that one program sends is, or is not, loaded by another.

use std::fmt::{self, Display, Formatter};

/// Is what one program sends loaded by the other?
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// It is.
    Yes,
    /// It depends on what schemas do not tell: conditions of fields, whether a subsection is sent,
    /// lengths that are known when saving.
    Depends,
    /// It is not.
    No,
}

/// One way: from a sender to a receiver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Direction {
    /// What differs, in wire order; at most [`MAX_REASONS`].
    pub reasons: Vec<Reason>,
    /// How many more there are.
    pub omitted: usize,
    /// The worst of those omitted.
    pub(super) omitted_verdict: Option<Verdict>,
}

/// Longest list of reasons for one direction of one device.
pub const MAX_REASONS: usize = 64;

/// One difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// What it does.
    pub verdict: Verdict,
    /// Where: names from the outermost struct or subsection to the field, with dots between; empty for
    /// the whole device.
    pub place: String,
    /// What it is.
    pub cause: Cause,
}

/// What can differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The sender cannot migrate it.
    CannotBeSaved,
    /// The receiver cannot migrate it.
    CannotBeLoaded,
    /// A later version than the receiver knows.
    VersionTooNew {
        /// What is sent.
        sent: u32,
        /// The highest that is loaded.
        known: u32,
    },
    /// An earlier version than the receiver still loads.
    VersionTooOld {
        /// What is sent.
        sent: u32,
        /// The lowest that is loaded.
        minimum: u32,
    },
    /// A field that the receiver does not read.
    NotRead(Extent),
    /// A field that the sender does not send.
    NotSent(Extent),
    /// A field that the receiver reads at another place.
    Moved,
    /// A field of another length.
    Size {
        /// As sent.
        sent: Extent,
        /// As read.
        read: Extent,
    },
    /// An array of another number of elements.
    Elements {
        /// As sent; `None` for a single value or a number that another field says.
        sent: Option<u32>,
        /// As read.
        read: Option<u32>,
    },
    /// Several fields that do not fit those in their place.
    Fields {
        /// What is sent, and its length.
        sent: (Names, Extent),
        /// What is read, and its length.
        read: (Names, Extent),
    },
    /// Fields that may fit those in their place, or not.
    Unclear {
        /// What is sent.
        sent: Names,
        /// What is read.
        read: Names,
    },
    /// A field whose length only one of the schemas tells.
    UnknownLength,
    /// A field that is sent under a condition and always read.
    SentSometimes,
    /// A field that is always sent and read under a condition.
    ReadSometimes,
    /// A field that is sent under a condition and not known to the receiver.
    NotReadSometimes,
    /// A field that is read under a condition and not known to the sender.
    NotSentSometimes,
    /// A struct that is always read and not in the stream, unless it is an array without elements.
    NotSentUnlessEmpty,
    /// A subsection that the receiver does not know.
    UnknownSubsection,
    /// Fields of the same length under other names: they are loaded.
    Renamed {
        /// What is sent.
        sent: Names,
        /// What is read.
        read: Names,
    },
}

/// Length of a field, as far as a schema tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// So many bytes.
    Bytes(u64),
    /// Known when saving.
    Unknown,
}

/// Names of fields that stand one after another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// The first of them, at most four.
    pub first: Vec<String>,
    /// How many more.
    pub more: usize,
}

/// How many names of a run of fields are kept.
const MAX_NAMES: usize = 4;

impl Direction {
    /// What they come to.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let reasons = self.reasons.iter().map(|reason| reason.verdict);
        reasons
            .chain(self.omitted_verdict)
            .max()
            .unwrap_or(Verdict::Yes)
    }

    pub(super) fn add(&mut self, reason: Reason) {
        if self.reasons.len() < MAX_REASONS {
            self.reasons.push(reason);
        } else {
            self.omitted = self.omitted.saturating_add(1);
            self.omitted_verdict = self.omitted_verdict.max(Some(reason.verdict));
        }
    }
}

impl Verdict {
    /// A word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::Depends => "depends",
            Self::No => "no",
        }
    }
}

impl Names {
    pub(super) fn new<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut names = names.into_iter();
        Self {
            first: names.by_ref().take(MAX_NAMES).map(str::to_owned).collect(),
            more: names.count(),
        }
    }
}

impl Display for Reason {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        if !self.place.is_empty() {
            write!(f, "{}: ", self.place)?;
        }
        self.cause.fmt(f)
    }
}

impl Display for Cause {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::CannotBeSaved => f.write_str("the sender cannot migrate it"),
            Self::CannotBeLoaded => f.write_str("the receiver cannot migrate it"),
            Self::VersionTooNew { sent, known } => {
                write!(f, "version {sent} is sent, at most {known} is loaded")
            }
            Self::VersionTooOld { sent, minimum } => {
                write!(f, "version {sent} is sent, at least {minimum} is needed")
            }
            Self::NotRead(extent) => write!(f, "{extent} sent and not read"),
            Self::NotSent(extent) => write!(f, "{extent} read and not sent"),
            Self::Moved => f.write_str("read at another place than it is sent"),
            Self::Size { sent, read } => write!(f, "{sent} sent, {read} read"),
            Self::Elements { sent, read } => {
                write!(f, "{} sent, {} read", Elements(*sent), Elements(*read))
            }
            Self::Fields { sent, read } => write!(
                f,
                "{} ({}) sent, {} ({}) read",
                sent.0, sent.1, read.0, read.1
            ),
            Self::Unclear { sent, read } => write!(
                f,
                "{sent} sent, {read} read: fits only under conditions or at lengths that a schema \
                 does not tell"
            ),
            Self::UnknownLength => f.write_str("a schema does not tell its length"),
            Self::SentSometimes => f.write_str("sent under a condition, always read"),
            Self::ReadSometimes => f.write_str("always sent, read under a condition"),
            Self::NotReadSometimes => f.write_str("not read, sent under a condition"),
            Self::NotSentSometimes => f.write_str("not sent, read under a condition"),
            Self::NotSentUnlessEmpty => {
                f.write_str("not sent, and read unless it is an array without elements")
            }
            Self::UnknownSubsection => f.write_str("not known to the receiver"),
            Self::Renamed { sent, read } => write!(f, "{sent} is read as {read}"),
        }
    }
}

impl Display for Extent {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(1) => f.write_str("1 byte"),
            Self::Bytes(bytes) => write!(f, "{bytes} bytes"),
            Self::Unknown => f.write_str("some bytes"),
        }
    }
}

struct Elements(Option<u32>);

impl Display for Elements {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(1) => f.write_str("1 element"),
            Some(count) => write!(f, "{count} elements"),
            None => f.write_str("one element (or a number that another field says)"),
        }
    }
}

impl Display for Names {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (k, name) in self.first.iter().enumerate() {
            let separator = if k == 0 { "" } else { ", " };
            write!(f, "{separator}{name}")?;
        }
        match self.more {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}
