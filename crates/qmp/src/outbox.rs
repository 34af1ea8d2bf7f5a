//! What a client has still to be sent: bounded, so that a client that does not read costs neither
//! memory nor anybody else's time.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes that may wait for a client to read them. An event past that ends the connection.
pub const OUTBOX_BYTES_MAX: usize = 1 << 20;
/// No further request of a client is carried out while more than this waits for it.
const BUSY_BYTES: usize = OUTBOX_BYTES_MAX / 4;

/// A queue of messages with one sender thread. Closing wakes everybody.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    messages: VecDeque<Vec<u8>>,
    /// Of the messages, and of what the sender has taken and not yet sent.
    bytes: usize,
    /// Wants events.
    listening: bool,
    /// A request is being carried out: a reply will come.
    busy: bool,
    /// No request is taken any more; what is there, and the reply that comes, goes out.
    finishing: bool,
    /// The very last message.
    farewell: Option<Vec<u8>>,
    /// Nothing goes out any more.
    closed: bool,
}

impl Outbox {
    /// Wait until the client has read most of what was sent; then a request may be carried out,
    /// or a reply be made. False when that is not wanted any more.
    pub(crate) fn begin(&self) -> bool {
        let mut state = self
            .changed
            .wait_while(self.lock(), |state| {
                !state.closed && !state.finishing && state.bytes > BUSY_BYTES
            })
            .unwrap_or_else(PoisonError::into_inner);
        state.busy = !state.closed && !state.finishing;
        state.busy
    }

    /// Queue the reply that [`Outbox::begin`] allowed. `listening` says whether events may follow.
    pub(crate) fn reply(&self, message: Vec<u8>, listening: bool) {
        let mut state = self.lock();
        state.busy = false;
        state.listening = listening;
        if !state.closed {
            state.push(message);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Queue an event without waiting. False when there is no room: the client is lost.
    pub(crate) fn event(&self, message: &[u8]) -> bool {
        let mut state = self.lock();
        if state.closed || state.finishing || !state.listening {
            return true;
        }
        if state.bytes.saturating_add(message.len()) > OUTBOX_BYTES_MAX {
            drop(state);
            self.close();
            return false;
        }
        state.push(message.to_vec());
        drop(state);
        self.changed.notify_all();
        true
    }

    /// The next message to send; waits for one. `None` when the sender's work is over. The message
    /// counts against the bound until [`Outbox::sent`].
    pub(crate) fn next(&self) -> Option<Vec<u8>> {
        let mut state = self
            .changed
            .wait_while(self.lock(), |state| {
                state.messages.is_empty() && !state.closed && (state.busy || !state.finishing)
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        match state.messages.pop_front() {
            Some(message) => Some(message),
            None => state.farewell.take(),
        }
    }

    /// A message of this length was sent.
    pub(crate) fn sent(&self, length: usize) {
        let mut state = self.lock();
        state.bytes = state.bytes.saturating_sub(length);
        drop(state);
        self.changed.notify_all();
    }

    /// Take no further request; let what is there go out, then `farewell` if the client wants
    /// events.
    pub(crate) fn finish(&self, farewell: Option<&[u8]>) {
        let mut state = self.lock();
        if !state.finishing && state.listening {
            state.farewell = farewell.map(<[u8]>::to_vec);
        }
        state.finishing = true;
        drop(state);
        self.changed.notify_all();
    }

    /// Drop everything.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.messages = VecDeque::new();
        state.bytes = 0;
        drop(state);
        self.changed.notify_all();
    }

    /// Wait until it is closed, at most `patience`.
    pub(crate) fn wait_closed(&self, patience: Duration) {
        let _ = self
            .changed
            .wait_timeout_while(self.lock(), patience, |state| !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(&mut self, message: Vec<u8>) {
        self.bytes = self.bytes.saturating_add(message.len());
        self.messages.push_back(message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(outbox: &Outbox, message: Vec<u8>) {
        assert!(outbox.begin());
        outbox.reply(message, true);
    }

    #[test]
    fn events_fill_it_to_the_last_byte_and_not_further() {
        let outbox = Outbox::default();
        assert!(outbox.event(b"before anybody listens"));
        reply(&outbox, vec![0; 10]);
        assert!(outbox.event(&vec![0; OUTBOX_BYTES_MAX - 10]));
        assert!(!outbox.event(b"x"), "one byte too many");
        assert_eq!(outbox.next(), None, "closed");
        assert!(!outbox.begin());
        assert!(outbox.event(b"x"), "nobody is there to be lost");
    }

    #[test]
    fn a_request_waits_until_the_client_has_read() {
        let outbox = Outbox::default();
        reply(&outbox, vec![0; BUSY_BYTES + 1]);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| reply(&outbox, b"second".to_vec()));
            let first = outbox.next().unwrap();
            assert_eq!(first.len(), BUSY_BYTES + 1);
            // Taken is not sent: it still counts.
            assert!(outbox.event(b"between"));
            assert_eq!(outbox.next().unwrap(), b"between");
            outbox.sent(first.len());
            waiter.join().unwrap();
        });
        assert_eq!(outbox.next().unwrap(), b"second");
    }

    #[test]
    fn finishing_lets_out_the_rest_the_reply_under_way_and_the_farewell() {
        let outbox = Outbox::default();
        reply(&outbox, b"a".to_vec());
        assert!(outbox.begin());
        outbox.finish(Some(b"z"));
        assert!(outbox.event(b"too late"));
        assert_eq!(outbox.next().unwrap(), b"a");
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| outbox.next());
            outbox.reply(b"b".to_vec(), true);
            assert_eq!(sender.join().unwrap().unwrap(), b"b");
        });
        assert!(!outbox.begin());
        assert_eq!(outbox.next().unwrap(), b"z");
        assert_eq!(outbox.next(), None);
    }
}
