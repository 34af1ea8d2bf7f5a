//! What a live section's owner must be able to do, on either side.
//!
//! The traits have no default bodies: whoever cannot do a thing says so. Devices, whose state goes
//! over at once, are [`vmferry_vmstate::Device`]s.

use std::error::Error;
use std::time::Duration;

use vmferry_stream::{DiscardRange, Name, Record};

/// Why a handler failed; the machine adds the section's name.
pub type HandlerError = Box<dyn Error + Send + Sync>;

/// Where a save machine puts its bytes: a channel, a file, a test's vector.
pub trait Sink {
    /// Take these parts, in order, as one piece.
    ///
    /// # Errors
    /// The channel broke, or the migration was stopped.
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError>;

    /// Bytes that the rate limit still allows in this time slice.
    fn allowance(&self) -> u64;

    /// Fails once the migration was stopped; called by handlers that wait.
    fn check(&self) -> Result<(), HandlerError>;
}

/// Keeps everything, and never waits.
impl Sink for Vec<u8> {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        parts.iter().for_each(|part| self.extend_from_slice(part));
        Ok(())
    }

    fn allowance(&self) -> u64 {
        u64::MAX
    }

    fn check(&self) -> Result<(), HandlerError> {
        Ok(())
    }
}

/// How an iteration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The bulk phase is over and nothing is left that could be sent now.
    Finished,
    /// There is more to send: handlers after this one wait.
    Unfinished,
    /// There is more, but its data is still being read.
    Waiting,
}

/// What a handler still has to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// The first pass is not over: a precopy cannot complete, whatever the number.
    Bulk {
        /// Estimate of the bytes that are left.
        bytes: u64,
    },
    /// Everything was sent once.
    Dirty {
        /// Bytes that must be sent before the guest runs at the destination.
        bytes: u64,
        /// Bytes that a postcopy may send after that. In a precopy they come before it too.
        later_bytes: u64,
        /// How long reading them will take.
        read_time: Duration,
    },
}

/// Proof that nothing writes any more: guests are held and their last requests have ended.
///
/// Whoever drives a machine makes it: when saving, after [`Iterating::try_complete`] said `Go` and
/// the holds were drained.
///
/// [`Iterating::try_complete`]: crate::Iterating::try_complete
#[derive(Debug)]
pub struct GuestStopped(());

impl GuestStopped {
    /// Assert that every guest request has ended and none can begin.
    #[must_use]
    pub fn assert_drained() -> Self {
        Self(())
    }
}

/// The sending owner of a live section.
pub trait SaveHandler {
    /// Does it take part in this migration? One that does not is left out everywhere.
    fn is_active(&self) -> bool;

    /// Write the body of START.
    fn setup(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError>;

    /// Write the body of one PART.
    fn iterate(&mut self, sink: &mut dyn Sink) -> Result<Progress, HandlerError>;

    /// What is left now.
    fn pending(&mut self) -> Pending;

    /// Write the body of END: everything that is left.
    fn complete(&mut self, stopped: &GuestStopped, sink: &mut dyn Sink)
    -> Result<(), HandlerError>;

    /// What goes on when the guest runs at the destination; `None` if everything must be sent before.
    fn postcopy(&mut self) -> Option<&mut dyn PostcopyHandler>;

    /// The migration is over, well or not: end what runs for it. Called once, whatever happened.
    fn cleanup(&mut self);
}

/// The part of a [`SaveHandler`] that goes on after the switch: [`SaveHandler::iterate`] is still
/// called, [`SaveHandler::complete`] is not.
pub trait PostcopyHandler {
    /// The guest has stopped: `tell` all that the destination has not, or has in an older state. It is
    /// called with a RAM block and ranges in it; what it is told will be sent again exactly once.
    ///
    /// # Errors
    /// Those of `tell`, and its own.
    fn discard(&mut self, tell: &mut TellDiscard<'_>) -> Result<(), HandlerError>;

    /// Write the body of END: everything that is left. Called again, on a new connection, if the one
    /// before broke.
    fn complete(&mut self, sink: &mut dyn Sink) -> Result<(), HandlerError>;
}

/// Sends ranges of a RAM block that the destination shall forget.
pub type TellDiscard<'a> = dyn FnMut(&Name, &[DiscardRange]) -> Result<(), HandlerError> + 'a;

/// The receiving owner of a live section.
pub trait LoadHandler {
    /// A START or FULL of the section, in a version that the registry accepts.
    fn start(&mut self, version: u32) -> Result<(), HandlerError>;

    /// A record of the section's body.
    fn record(&mut self, record: &Record) -> Result<(), HandlerError>;

    /// Room for the payload of the record before, exactly `length` bytes.
    fn payload(&mut self, length: usize) -> Result<&mut [u8], HandlerError>;

    /// The payload is in place.
    fn payload_filled(&mut self) -> Result<(), HandlerError>;

    /// The END of the section, footer included.
    fn end(&mut self) -> Result<(), HandlerError>;

    /// The migration is over, well or not: end what runs for it. Called once, whatever happened.
    fn cleanup(&mut self);
}
