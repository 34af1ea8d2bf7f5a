//! Operations side by side, or one alone: a lock that lets both sides through.
//!
//! A lock that is let go and taken again at once leaves those who wait for it no chance to wake up:
//! a loop of snapshots would keep every write out. So whoever wants to be alone lets those go first
//! who were kept waiting by the one before.

use std::sync::{
    Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
    TryLockError,
};

/// Held shared by every operation; exclusively by those that change the shape of the image.
#[derive(Debug, Default)]
pub(crate) struct Operations {
    lock: RwLock<()>,
    /// Taken before the lock by those who want to be alone: only one at a time keeps others waiting.
    turn: Mutex<()>,
    /// Operations that wait because somebody is alone, or waits to be.
    waiting: Mutex<usize>,
    /// None of them waits any more.
    admitted: Condvar,
}

/// An operation is under way.
pub(crate) type Operation<'a> = RwLockReadGuard<'a, ()>;

/// Nothing else is under way.
pub(crate) struct Alone<'a> {
    // Before the turn, so that it is dropped first.
    _lock: RwLockWriteGuard<'a, ()>,
    _turn: MutexGuard<'a, ()>,
}

impl Operations {
    /// Begin an operation if nobody is alone, or waits to be.
    pub(crate) fn try_begin(&self) -> Option<Operation<'_>> {
        match self.lock.try_read() {
            Ok(operation) => Some(operation),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Begin an operation. Never called by a thread that is in one.
    pub(crate) fn begin(&self) -> Operation<'_> {
        if let Some(operation) = self.try_begin() {
            return operation;
        }
        *self.waiting() += 1;
        let operation = self.lock.read().unwrap_or_else(PoisonError::into_inner);
        let mut waiting = self.waiting();
        *waiting -= 1;
        if *waiting == 0 {
            self.admitted.notify_all();
        }
        operation
    }

    /// Wait until nothing else is under way. Never called by a thread that is in an operation.
    pub(crate) fn alone(&self) -> Alone<'_> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody has the lock alone while we have the turn: all of them get in now.
        let waiting = self.waiting();
        drop(
            self.admitted
                .wait_while(waiting, |waiting| *waiting > 0)
                .unwrap_or_else(PoisonError::into_inner),
        );
        Alone {
            _lock: self.lock.write().unwrap_or_else(PoisonError::into_inner),
            _turn: turn,
        }
    }

    fn waiting(&self) -> MutexGuard<'_, usize> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn whoever_waits_goes_before_the_next_who_wants_to_be_alone() {
        let operations = Operations::default();
        let through = AtomicUsize::new(0);
        for round in 1..=100 {
            thread::scope(|scope| {
                let alone = operations.alone();
                for _ in 0..3 {
                    scope.spawn(|| {
                        let _operation = operations.begin();
                        through.fetch_add(1, Ordering::SeqCst);
                    });
                }
                while *operations.waiting() < 3 {
                    thread::yield_now();
                }
                drop(alone);
                let _alone = operations.alone();
                assert_eq!(through.load(Ordering::SeqCst), 3 * round);
            });
        }
    }

    #[test]
    fn an_operation_ends_before_somebody_is_alone() {
        let operations = Operations::default();
        let ended = AtomicUsize::new(0);
        thread::scope(|scope| {
            let operation = operations.begin();
            scope.spawn(|| {
                let _alone = operations.alone();
                assert_eq!(ended.load(Ordering::SeqCst), 1);
                assert!(operations.try_begin().is_none());
            });
            // Who wants to be alone waits now, or comes later.
            while operations.try_begin().is_some() {
                thread::yield_now();
            }
            ended.store(1, Ordering::SeqCst);
            drop(operation);
        });
        assert!(operations.try_begin().is_some());
    }
}
