//! The connection in use, for those who break it off.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmferry_channel::Stop;

/// The connection in use: an interrupted postcopy gets another one.
#[derive(Clone, Debug)]
pub(crate) struct Line(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    stop: Mutex<Stop>,
    ending: AtomicBool,
}

impl Line {
    pub(crate) fn new(stop: Stop) -> Self {
        Self(Arc::new(Inner {
            stop: Mutex::new(stop),
            ending: AtomicBool::new(false),
        }))
    }

    /// That of the connection in use.
    pub(crate) fn stop(&self) -> Stop {
        self.0
            .stop
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// There is another one now, unless all is to end.
    pub(crate) fn replace(&self, stop: Stop) {
        let mut current = self.0.stop.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_ending() {
            stop.trigger();
        }
        *current = stop;
    }

    /// End the connection in use.
    pub(crate) fn break_off(&self) {
        self.0
            .stop
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .trigger();
    }

    /// End it, and let no other one come.
    pub(crate) fn end(&self) {
        let stop = self.0.stop.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.ending.store(true, Ordering::SeqCst);
        stop.trigger();
    }

    pub(crate) fn is_ending(&self) -> bool {
        self.0.ending.load(Ordering::SeqCst)
    }
}
