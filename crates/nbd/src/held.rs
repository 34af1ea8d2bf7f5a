//! Requests that their node does not let in yet.

use std::collections::VecDeque;

use vmferry_disk::Hold;

use crate::budget::Account;
use crate::job::is_write;
use crate::line::Ticket;
use crate::payload::Payload;
use crate::protocol::{Command, Request};

/// A request that waits in its connection. Its ticket stands for the memory that it has, or, for a
/// read, will need: whatever is held is admitted already, so letting it go needs nothing more.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) request: Request,
    pub(crate) payload: Payload,
    pub(crate) ticket: Ticket,
}

/// What a hold can let pass while it stops the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Reads and block status.
    Reads,
    Writes,
}

impl Kind {
    pub(crate) fn of(command: Command) -> Self {
        if is_write(command) {
            Self::Writes
        } else {
            Self::Reads
        }
    }

    /// None is a disk that has left, which holds nothing.
    pub(crate) fn is_stopped_by(self, hold: Option<Hold>) -> bool {
        match hold {
            None | Some(Hold::Nothing) => false,
            Some(Hold::Writes) => self == Self::Writes,
            Some(Hold::Everything) => true,
        }
    }
}

/// The held requests of one connection, each kind in the order in which it came. Dropping it
/// forgets them.
#[derive(Debug)]
pub(crate) struct HeldList<'a> {
    reads: VecDeque<Held>,
    writes: VecDeque<Held>,
    bytes: u64,
    /// Held by all connections of the server.
    of_all: &'a Account,
}

impl<'a> HeldList<'a> {
    pub(crate) fn new(of_all: &'a Account) -> Self {
        Self {
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            bytes: 0,
            of_all,
        }
    }

    pub(crate) fn push(&mut self, held: Held) {
        self.count(&held);
        self.queue(Kind::of(held.request.command)).push_back(held);
    }

    /// Put back what [`HeldList::pop`] gave.
    pub(crate) fn push_front(&mut self, held: Held) {
        self.count(&held);
        self.queue(Kind::of(held.request.command)).push_front(held);
    }

    /// The oldest of its kind.
    pub(crate) fn pop(&mut self, kind: Kind) -> Option<Held> {
        let held = self.queue(kind).pop_front()?;
        self.bytes = self.bytes.saturating_sub(held.ticket.bytes());
        self.of_all.subtract(held.ticket.bytes());
        Some(held)
    }

    pub(crate) fn clear(&mut self) {
        for kind in [Kind::Reads, Kind::Writes] {
            while self.pop(kind).is_some() {}
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.reads.is_empty() && self.writes.is_empty()
    }

    pub(crate) fn has_writes(&self) -> bool {
        !self.writes.is_empty()
    }

    pub(crate) fn requests(&self) -> u64 {
        self.reads.len().saturating_add(self.writes.len()) as u64
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn bytes_of_all(&self) -> u64 {
        self.of_all.bytes()
    }

    fn count(&mut self, held: &Held) {
        self.bytes = self.bytes.saturating_add(held.ticket.bytes());
        self.of_all.add(held.ticket.bytes());
    }

    fn queue(&mut self, kind: Kind) -> &mut VecDeque<Held> {
        match kind {
            Kind::Reads => &mut self.reads,
            Kind::Writes => &mut self.writes,
        }
    }
}

impl Drop for HeldList<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}
