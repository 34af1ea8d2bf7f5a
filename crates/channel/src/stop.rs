//! An event that calls off everything that waits.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFlags, eventfd};

use crate::wait::{Ready, poll_until};

/// A stop event: once triggered, triggered for good. Clones are the same event.
///
/// Its descriptor is readable once it is triggered and belongs into every `poll` set of a thread
/// that should be stoppable; never read from it.
#[derive(Clone, Debug)]
pub struct Stop {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    event: OwnedFd,
    /// The same news without a system call.
    triggered: AtomicBool,
}

impl Stop {
    /// A stop event that was not triggered yet. Fails if the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            shared: Arc::new(Shared {
                event,
                triggered: AtomicBool::new(false),
            }),
        })
    }

    /// Stop everything that waits with this event.
    pub fn trigger(&self) {
        if !self.shared.triggered.swap(true, Ordering::SeqCst) {
            // Cannot fail: the counter of the event is 0, because only this line writes it.
            let _ = rustix::io::write(&self.shared.event, &1u64.to_ne_bytes());
        }
    }

    /// Was it triggered?
    #[must_use]
    pub fn is_triggered(&self) -> bool {
        self.shared.triggered.load(Ordering::SeqCst)
    }

    /// Wait for the trigger, at most `timeout`. True when it was triggered.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> bool {
        self.wait_until(Instant::now().checked_add(timeout))
    }

    /// Wait for the trigger until `deadline` (`None`: for ever). True when it was triggered.
    #[must_use]
    pub fn wait_until(&self, deadline: Option<Instant>) -> bool {
        // An error of poll (no memory) counts as the end of the wait: callers loop on their state.
        !self.is_triggered()
            && matches!(
                poll_until(self.as_fd(), PollFlags::IN, None, deadline),
                Ok(Ready::Yes)
            )
            || self.is_triggered()
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_readable_once_triggered_and_stays_so() {
        let stop = Stop::new().unwrap();
        assert!(!stop.is_triggered());
        assert!(!stop.wait(Duration::ZERO));
        let twin = stop.clone();
        twin.trigger();
        twin.trigger();
        for _ in 0..2 {
            assert!(stop.is_triggered());
            assert!(stop.wait(Duration::ZERO));
            assert!(stop.wait_until(None));
            let ready = poll_until(stop.as_fd(), PollFlags::IN, None, Some(Instant::now()));
            assert_eq!(ready.unwrap(), Ready::Yes);
        }
    }

    #[test]
    fn wakes_a_waiter() {
        let stop = Stop::new().unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| stop.wait_until(None));
            stop.trigger();
            assert!(waiter.join().unwrap());
        });
    }

    #[test]
    fn its_descriptor_is_not_inherited() {
        let stop = Stop::new().unwrap();
        let flags = rustix::io::fcntl_getfd(&stop).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}
