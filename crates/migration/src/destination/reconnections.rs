//! Where a postcopy that was interrupted gets its next connection.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmferry_channel::Channel;

/// Where a postcopy that was interrupted gets its next connection. Clones are the same place.
#[derive(Clone, Debug, Default)]
pub struct Reconnections(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    place: Mutex<Place>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Place {
    channel: Option<Channel>,
    awaited: bool,
    closed: bool,
}

/// No postcopy waits for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the migration is not in 'postcopy-paused'")]
pub struct NotPaused;

impl Reconnections {
    /// Go on over this channel.
    ///
    /// # Errors
    /// Nobody waits for one.
    pub fn offer(&self, channel: Channel) -> Result<(), NotPaused> {
        let mut place = self.lock();
        if !place.awaited || place.channel.is_some() {
            return Err(NotPaused);
        }
        place.channel = Some(channel);
        self.0.changed.notify_all();
        Ok(())
    }

    /// There will be none: what was interrupted stays so, and [`receive_machine`] ends.
    ///
    /// [`receive_machine`]: crate::receive_machine
    pub fn close(&self) {
        self.lock().closed = true;
        self.0.changed.notify_all();
    }

    /// One is wanted: it may be offered from now on.
    pub(super) fn ask(&self) {
        self.lock().awaited = true;
    }

    /// The one that was asked for; `None` when there will be none.
    pub(super) fn next(&self) -> Option<Channel> {
        let mut place = self
            .0
            .changed
            .wait_while(self.lock(), |place| {
                place.channel.is_none() && !place.closed
            })
            .unwrap_or_else(PoisonError::into_inner);
        place.awaited = false;
        place.channel.take().filter(|_| !place.closed)
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.0.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
