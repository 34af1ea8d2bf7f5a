//! Bytes that came from the socket and were not taken yet.

use std::io::IoSliceMut;
use std::os::fd::BorrowedFd;

use rustix::io::Errno as Os;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, recv, recvmsg};

/// A receive buffer that is read from the front and filled at the end.
#[derive(Debug)]
pub(crate) struct Window {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

/// What a receive brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Bytes(usize),
    /// Nothing is there now.
    Nothing,
    /// The peer sends no more.
    End,
}

impl Window {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            bytes: vec![0; capacity].into(),
            start: 0,
            end: 0,
        }
    }

    pub(crate) fn unread(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or(&[])
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.start = self.start.saturating_add(count).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        }
    }

    /// Receive what is there, without waiting. Fails with `NOBUFS` when the window is full.
    pub(crate) fn receive(&mut self, socket: BorrowedFd<'_>) -> rustix::io::Result<Received> {
        // Moving the rest to the front costs a copy: only when there is little room behind it.
        if self.start > 0 && self.end > self.bytes.len() / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end = self.end.saturating_sub(self.start);
            self.start = 0;
        }
        let room = self.bytes.get_mut(self.end..).unwrap_or(&mut []);
        if room.is_empty() {
            return Err(Os::NOBUFS);
        }
        let received = outcome(recv(socket, room, RecvFlags::DONTWAIT).map(|(count, _)| count))?;
        if let Received::Bytes(count) = received {
            self.end = self.end.saturating_add(count);
        }
        Ok(received)
    }

    /// Receive into `first`, and what comes after it, at most `behind` bytes, into the window,
    /// which is empty. How many bytes of `first` were filled.
    pub(crate) fn receive_into(
        &mut self,
        socket: BorrowedFd<'_>,
        first: &mut [u8],
        behind: usize,
    ) -> rustix::io::Result<Received> {
        debug_assert!(self.unread().is_empty());
        self.start = 0;
        self.end = 0;
        let wanted = first.len();
        let behind = self.bytes.get_mut(..behind).unwrap_or(&mut []);
        let mut slices = [IoSliceMut::new(first), IoSliceMut::new(behind)];
        let received = recvmsg(
            socket,
            &mut slices,
            &mut RecvAncillaryBuffer::default(),
            RecvFlags::DONTWAIT,
        );
        match outcome(received.map(|message| message.bytes))? {
            Received::Bytes(count) => {
                self.end = count.saturating_sub(wanted);
                Ok(Received::Bytes(count.min(wanted)))
            }
            other => Ok(other),
        }
    }
}

fn outcome(result: rustix::io::Result<usize>) -> rustix::io::Result<Received> {
    match result {
        Ok(0) => Ok(Received::End),
        Ok(count) => Ok(Received::Bytes(count)),
        Err(Os::AGAIN | Os::INTR) => Ok(Received::Nothing),
        Err(error) => Err(error),
    }
}
