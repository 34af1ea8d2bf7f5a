//! One pass through a stream.

use vmferry_stream::{Record, Section};

/// Why a visitor wants no more.
pub type VisitError = Box<dyn std::error::Error + Send + Sync>;

/// What is told of a stream while it goes by, in its order. Offsets are bytes of the input, whatever
/// container the stream is in.
pub trait Visitor {
    /// A record, which starts at byte `offset`. A section of a device is told by
    /// [`Visitor::device`] too, before its [`Record::SectionEnd`].
    ///
    /// # Errors
    /// Ends the walk.
    fn record(&mut self, offset: u64, record: &Record) -> Result<(), VisitError>;

    /// Payload of the record before, in pieces: `bytes` stands at byte `offset`. Not the bodies of
    /// devices, nor a description or a package, which the walk reads itself.
    ///
    /// # Errors
    /// Ends the walk.
    fn payload(&mut self, offset: u64, bytes: &[u8]) -> Result<(), VisitError>;

    /// The body of a device's section, which starts at byte `offset`.
    ///
    /// # Errors
    /// Ends the walk.
    fn device(&mut self, section: &Section, offset: u64, body: &[u8]) -> Result<(), VisitError>;

    /// The text of the description, which starts at byte `offset`.
    ///
    /// # Errors
    /// Ends the walk.
    fn description(&mut self, offset: u64, text: &[u8]) -> Result<(), VisitError>;
}
