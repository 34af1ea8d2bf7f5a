//! Where a postcopy that was interrupted gets its next connection.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmferry_channel::Channel;

use crate::status::{Published, State};

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
    /// Who waits for one; told when it is there.
    awaited_by: Option<Published>,
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
        let published = {
            let mut place = self.lock();
            match place.awaited_by.take() {
                Some(published) if !place.closed => published,
                _ => return Err(NotPaused),
            }
        };
        // Before it can be taken, for that may fail at once.
        published.update(|status| {
            status.state = State::PostcopyRecover;
            channel.peer().clone_into(&mut status.peer);
        });
        self.lock().channel = Some(channel);
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
    pub(super) fn ask(&self, published: &Published) {
        self.lock().awaited_by = Some(published.clone());
    }

    /// The one that was asked for; `None` when there will be none, or when it is of no use any more.
    /// Who sets `useless` calls [`Reconnections::look`].
    pub(super) fn next(&self, useless: &AtomicBool) -> Option<Channel> {
        let is_over = |place: &Place| place.closed || useless.load(Ordering::Acquire);
        let place = self.0.changed.wait_while(self.lock(), |place| {
            place.channel.is_none() && !is_over(place)
        });
        let mut place = place.unwrap_or_else(PoisonError::into_inner);
        let over = is_over(&place);
        place.awaited_by = None;
        place.channel.take().filter(|_| !over)
    }

    /// Let who waits look again whether it is of any use.
    pub(super) fn look(&self) {
        drop(self.lock());
        self.0.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.0.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
