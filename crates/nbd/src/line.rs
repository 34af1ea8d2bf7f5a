//! What the reader thread and the workers share of one connection: the socket's sending side, the
//! queue of replies, the count of what is outstanding, and the event that wakes the reader.
//!
//! Nobody waits here. A reply that does not fit into the socket stays in the queue, and the reader
//! thread, which waits in poll anyway, sends it when there is room.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno as Os;
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown, send, sendmsg, shutdown};

use crate::budget::{Account, Budget, Source};
use crate::payload::Payload;
use crate::reply::Reply;

/// Most replies in one system call.
const REPLIES_PER_SEND: usize = 64;

/// One connection as its workers see it.
#[derive(Debug)]
pub(crate) struct Line {
    socket: OwnedFd,
    wake: OwnedFd,
    /// Something happened that the reader thread must look at.
    attention: AtomicBool,
    /// The connection is to end without further replies.
    severed: AtomicBool,
    outstanding: Account,
    /// The reader thread sleeps until something outstanding is done.
    waits_for_tickets: AtomicBool,
    budget: Arc<Budget>,
    outbox: Mutex<Outbox>,
}

#[derive(Debug, Default)]
struct Outbox {
    queue: VecDeque<Reply>,
    /// How much of the first reply is sent.
    front_sent: usize,
    /// Somebody is in the system call; he will look into the queue again.
    sending: bool,
    /// The socket was full.
    blocked: bool,
    /// When something was sent last, or was there to be sent.
    progress: Option<Instant>,
    failed: bool,
}

/// One outstanding request: from when it is held or leaves the reader thread until its reply is
/// sent or lost.
#[derive(Debug)]
pub(crate) struct Ticket {
    line: Arc<Line>,
    bytes: u64,
    source: Source,
}

impl Ticket {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.line.outstanding.subtract(self.bytes);
        self.line.budget.give_back(self.bytes, self.source);
        if self.line.waits_for_tickets.swap(false, Ordering::SeqCst) {
            self.line.wake();
        }
    }
}

impl Line {
    pub(crate) fn new(socket: OwnedFd, budget: Arc<Budget>) -> rustix::io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            socket,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            attention: AtomicBool::new(false),
            severed: AtomicBool::new(false),
            outstanding: Account::default(),
            waits_for_tickets: AtomicBool::new(false),
            budget,
            outbox: Mutex::default(),
        }))
    }

    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    pub(crate) fn wake_event(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Have the reader thread look at the state of things.
    pub(crate) fn wake(&self) {
        if !self.attention.swap(true, Ordering::SeqCst) {
            // Fails only when the counter is full, and then the reader is awake.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Was there a [`Line::wake`] since the last call? The caller looks at everything afterwards.
    pub(crate) fn take_attention(&self) -> bool {
        self.attention.load(Ordering::SeqCst) && self.attention.swap(false, Ordering::SeqCst)
    }

    /// Make the event unreadable. Whoever woke the reader has set the flag before he wrote the
    /// event, so nothing is lost when [`Line::take_attention`] comes next.
    pub(crate) fn empty_event(&self) {
        let mut counter = [0; 8];
        // Nothing to read is fine.
        let _ = rustix::io::read(&self.wake, &mut counter);
    }

    /// End the connection: nothing is sent any more.
    pub(crate) fn sever(&self) {
        self.severed.store(true, Ordering::SeqCst);
        let lost = {
            let mut outbox = self.outbox();
            outbox.failed = true;
            std::mem::take(&mut outbox.queue)
        };
        drop(lost);
        // The peer may be gone already.
        let _ = shutdown(&self.socket, Shutdown::Both);
        self.wake();
    }

    pub(crate) fn is_severed(&self) -> bool {
        self.severed.load(Ordering::SeqCst)
    }

    pub(crate) fn outstanding(&self) -> &Account {
        &self.outstanding
    }

    /// What all connections of the server share.
    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Count a request of this many bytes as outstanding.
    pub(crate) fn ticket(self: &Arc<Self>, bytes: u64) -> Ticket {
        self.ticket_from(self.budget.take(bytes), bytes)
    }

    /// The same for a large request, if there is memory for it. The reserve is for a connection
    /// that has nothing else.
    pub(crate) fn try_ticket(self: &Arc<Self>, bytes: u64) -> Option<Ticket> {
        let idle = self.outstanding.requests() == 0;
        let source = self.budget.try_take(bytes, idle)?;
        Some(self.ticket_from(source, bytes))
    }

    fn ticket_from(self: &Arc<Self>, source: Source, bytes: u64) -> Ticket {
        self.outstanding.add(bytes);
        Ticket {
            line: Arc::clone(self),
            bytes,
            source,
        }
    }

    /// Have the next ticket that comes back wake the reader thread. It must look at
    /// [`Line::outstanding`] once more before it sleeps.
    pub(crate) fn wake_on_ticket(&self) {
        self.waits_for_tickets.store(true, Ordering::SeqCst);
    }

    /// Is there something to send that the socket has no room for?
    pub(crate) fn is_blocked(&self) -> bool {
        self.outbox().blocked
    }

    /// Since when the client has not taken any byte of what there is to send.
    pub(crate) fn blocked_since(&self) -> Option<Instant> {
        let outbox = self.outbox();
        outbox.progress.filter(|_| outbox.blocked)
    }

    /// Let a client that does not read begin anew to be slow.
    pub(crate) fn forgive(&self) {
        self.outbox().progress = Some(Instant::now());
    }

    /// Queue a reply, and send what can be sent.
    pub(crate) fn reply(&self, reply: Reply) {
        {
            let mut outbox = self.outbox();
            if outbox.failed {
                drop(outbox);
                drop(reply);
                return;
            }
            outbox.queue.push_back(reply);
            if outbox.sending || outbox.blocked {
                return;
            }
            outbox.sending = true;
            outbox.progress = Some(Instant::now());
        }
        self.pump();
    }

    /// Send as much of `bytes` as there is room for; only in the handshake, when nobody else sends.
    pub(crate) fn send_some(&self, bytes: &[u8]) -> rustix::io::Result<usize> {
        rustix::io::retry_on_intr(|| {
            send(
                &self.socket,
                bytes,
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            )
        })
    }

    /// Send bytes that hold whole replies. What the socket has no room for is copied into the queue.
    pub(crate) fn send_now(self: &Arc<Self>, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let later = |rest: &[u8]| {
            let ticket = self.ticket(rest.len() as u64);
            Reply::ready(Payload::Owned(rest.to_vec()), ticket)
        };
        {
            let mut outbox = self.outbox();
            if outbox.failed {
                return;
            }
            if outbox.sending || !outbox.queue.is_empty() {
                outbox.queue.push_back(later(bytes));
                return;
            }
            outbox.sending = true;
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.send_some(rest) {
                Ok(sent) => rest = rest.get(sent..).unwrap_or(&[]),
                Err(Os::AGAIN) => break,
                Err(_) => {
                    self.outbox().sending = false;
                    return self.sever();
                }
            }
        }
        if !rest.is_empty() {
            let reply = later(rest);
            let mut outbox = self.outbox();
            outbox.queue.push_front(reply);
            outbox.progress = Some(Instant::now());
        }
        self.pump();
    }

    /// The socket may have room again.
    pub(crate) fn resume(&self) {
        {
            let mut outbox = self.outbox();
            if outbox.sending || outbox.failed {
                return;
            }
            outbox.sending = true;
            outbox.blocked = false;
        }
        self.pump();
    }

    /// Send until the queue is empty or the socket is full. The caller has set `sending`.
    fn pump(&self) {
        loop {
            let (mut batch, skip) = {
                let mut outbox = self.outbox();
                if outbox.queue.is_empty() || outbox.failed {
                    outbox.sending = false;
                    return;
                }
                let count = outbox.queue.len().min(REPLIES_PER_SEND);
                let batch: VecDeque<Reply> = outbox.queue.drain(..count).collect();
                (batch, std::mem::take(&mut outbox.front_sent))
            };
            let result = self.send_batch(&batch, skip);
            let mut left = skip.saturating_add(*result.as_ref().unwrap_or(&0));
            while let Some(reply) = batch.front() {
                let Some(rest) = left.checked_sub(reply.length()) else {
                    break;
                };
                left = rest;
                batch.pop_front();
            }
            let full = match result {
                Ok(_) | Err(Os::INTR) => false,
                Err(Os::AGAIN) => true,
                Err(_) => {
                    self.outbox().sending = false;
                    return self.sever();
                }
            };
            let mut outbox = self.outbox();
            if outbox.failed {
                outbox.sending = false;
                return;
            }
            if !full {
                outbox.progress = Some(Instant::now());
            }
            outbox.front_sent = left;
            while let Some(reply) = batch.pop_back() {
                outbox.queue.push_front(reply);
            }
            if full {
                outbox.sending = false;
                outbox.blocked = true;
                drop(outbox);
                return self.wake();
            }
        }
    }

    fn send_batch(&self, batch: &VecDeque<Reply>, skip: usize) -> rustix::io::Result<usize> {
        let mut slices = Vec::with_capacity(batch.len().saturating_mul(2));
        let mut skip = skip;
        for part in batch.iter().flat_map(Reply::parts) {
            let skipped = skip.min(part.len());
            skip = skip.saturating_sub(skipped);
            match part.get(skipped..) {
                Some(rest) if !rest.is_empty() => slices.push(IoSlice::new(rest)),
                _ => {}
            }
        }
        sendmsg(
            &self.socket,
            &slices,
            &mut SendAncillaryBuffer::default(),
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        )
    }

    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
