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
    is_being_told: bool,
    closed: bool,
}

/// No postcopy waits for a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the migration is not in 'postcopy-paused'")]
pub struct NotPaused;

impl Reconnections {
    /// Go on over this channel. When it returns the migration is not paused any more.
    ///
    /// # Errors
    /// Nobody waits for one.
    pub fn offer(&self, channel: Channel) -> Result<(), NotPaused> {
        let mut place = self.lock();
        if !place.awaited || place.closed {
            return Err(NotPaused);
        }
        place.awaited = false;
        place.channel = Some(channel);
        self.0.changed.notify_all();
        // Whoever takes it does no more than tell that, and looks here again.
        let taken = self.0.changed.wait_while(place, |place| {
            place.channel.is_some() || place.is_being_told
        });
        drop(taken.unwrap_or_else(PoisonError::into_inner));
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

    /// The one that was asked for, after `tell` was called with it; `None` when there will be none.
    pub(super) fn next(&self, tell: impl FnOnce(&Channel)) -> Option<Channel> {
        let changed = &self.0.changed;
        let is_awaited = |place: &mut Place| place.channel.is_none() && !place.closed;
        let place = changed.wait_while(self.lock(), is_awaited);
        let mut place = place.unwrap_or_else(PoisonError::into_inner);
        let channel = place.channel.take();
        place.awaited = false;
        place.is_being_told = true;
        drop(place);
        if let Some(channel) = &channel {
            tell(channel);
        }
        self.lock().is_being_told = false;
        changed.notify_all();
        channel
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.0.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
