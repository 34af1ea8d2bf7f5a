//! A bounded pool of equal buffers.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::memory::Memory;

/// Page-aligned buffers of one size, within a byte budget. Clones are handles to the same pool.
///
/// Memory is allocated when it is first needed, zeroed, and reused afterwards with whatever the
/// last user left in it. Idle memory is freed by [`Pool::shrink`] and with the last handle and
/// buffer.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    buffer_bytes: usize,
    buffers_max: usize,
    state: Mutex<State>,
    returned: Condvar,
}

struct State {
    idle: Vec<Memory>,
    /// Buffers in the hands of users.
    taken: usize,
    closed: bool,
}

impl Pool {
    /// A pool of buffers of `buffer_bytes` each that holds at most `budget_bytes` in all. A budget
    /// smaller than one buffer allows one, because none would let nobody ever go on.
    ///
    /// # Panics
    ///
    /// If `buffer_bytes` is 0.
    #[must_use]
    pub fn new(buffer_bytes: usize, budget_bytes: usize) -> Self {
        assert!(buffer_bytes > 0, "a buffer has at least one byte");
        Self {
            shared: Arc::new(Shared {
                buffer_bytes,
                buffers_max: (budget_bytes / buffer_bytes).max(1),
                state: Mutex::new(State {
                    idle: Vec::new(),
                    taken: 0,
                    closed: false,
                }),
                returned: Condvar::new(),
            }),
        }
    }

    /// Size of each buffer in bytes.
    #[must_use]
    pub fn buffer_bytes(&self) -> usize {
        self.shared.buffer_bytes
    }

    /// How many buffers can be in use at once.
    #[must_use]
    pub fn buffers_max(&self) -> usize {
        self.shared.buffers_max
    }

    /// How many buffers are in use now.
    #[must_use]
    pub fn buffers_taken(&self) -> usize {
        self.shared.lock().taken
    }

    /// A buffer, if the budget has one left and the pool is open. Never waits.
    #[must_use]
    pub fn try_take(&self) -> Option<Buffer> {
        self.finish_take(self.shared.lock())
    }

    /// A buffer; waits until one comes back. `None` once the pool is closed.
    #[must_use]
    pub fn take(&self) -> Option<Buffer> {
        let state = self
            .shared
            .returned
            .wait_while(self.shared.lock(), |state| {
                !state.closed && state.taken >= self.shared.buffers_max
            })
            .unwrap_or_else(PoisonError::into_inner);
        self.finish_take(state)
    }

    /// Hand out no more buffers: who waits in [`Pool::take`] and who asks later gets `None`.
    /// Buffers in use stay valid. A closed pool stays closed.
    pub fn close(&self) {
        let idle = {
            let mut state = self.shared.lock();
            state.closed = true;
            std::mem::take(&mut state.idle)
        };
        self.shared.returned.notify_all();
        drop(idle);
    }

    /// True after [`Pool::close`].
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// Free the memory that nobody uses now. Returns how many bytes that was.
    pub fn shrink(&self) -> usize {
        let idle = std::mem::take(&mut self.shared.lock().idle);
        idle.len() * self.shared.buffer_bytes
    }

    /// Allocates outside the lock: zeroing fresh memory must not stop others.
    fn finish_take(&self, mut state: MutexGuard<'_, State>) -> Option<Buffer> {
        if state.closed || state.taken >= self.shared.buffers_max {
            return None;
        }
        state.taken += 1;
        let idle = state.idle.pop();
        drop(state);
        let memory = idle.unwrap_or_else(|| Memory::zeroed(self.shared.buffer_bytes));
        Some(Buffer {
            memory: Some(memory),
            shared: Arc::clone(&self.shared),
        })
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("buffer_bytes", &self.buffer_bytes())
            .field("buffers_max", &self.buffers_max())
            .field("buffers_taken", &self.buffers_taken())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// A poisoned lock is taken all the same: the state is whole between statements.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A page-aligned buffer of its pool's size. It goes back when dropped.
pub struct Buffer {
    /// Always there, until drop gives it back.
    memory: Option<Memory>,
    shared: Arc<Shared>,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_ref().map_or(&[], Memory::bytes)
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut().map_or(&mut [], Memory::bytes_mut)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut memory = self.memory.take();
        {
            let mut state = self.shared.lock();
            state.taken -= 1;
            if !state.closed {
                state.idle.extend(memory.take());
            }
        }
        self.shared.returned.notify_one();
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("bytes", &self.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::memory::ALIGNMENT_BYTES;

    #[test]
    fn hands_out_zeroed_aligned_buffers_within_the_budget() {
        let pool = Pool::new(10_000, 35_000);
        assert_eq!(pool.buffers_max(), 3);
        let buffers: Vec<Buffer> = std::iter::from_fn(|| pool.try_take()).collect();
        assert_eq!(buffers.len(), 3);
        assert_eq!(pool.buffers_taken(), 3);
        for buffer in &buffers {
            assert_eq!(buffer.len(), 10_000);
            assert_eq!(buffer.as_ptr().addr() % ALIGNMENT_BYTES, 0);
            assert!(buffer.iter().all(|byte| *byte == 0));
        }
        assert!(pool.try_take().is_none());
        drop(buffers);
        assert_eq!(pool.buffers_taken(), 0);
        assert!(pool.try_take().is_some());
    }

    #[test]
    fn a_budget_below_one_buffer_allows_one() {
        let pool = Pool::new(4096, 0);
        let one = pool.try_take();
        assert!(one.is_some());
        assert!(pool.try_take().is_none());
    }

    #[test]
    fn reuses_returned_memory_and_frees_it_when_told() {
        let pool = Pool::new(4096, 8192);
        let mut buffer = pool.take().unwrap();
        buffer.fill(7);
        drop(buffer);
        let again = pool.take().unwrap();
        assert_eq!(again[0], 7, "memory is reused as it is");
        assert_eq!(pool.shrink(), 0, "a buffer in use is not freed");
        drop(again);
        assert_eq!(pool.shrink(), 4096);
        assert_eq!(pool.take().unwrap()[0], 0, "fresh memory is zero");
    }

    #[test]
    fn a_waiter_gets_the_buffer_that_comes_back() {
        let pool = Pool::new(4096, 4096);
        let buffer = pool.take().unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| pool.take().map(|buffer| buffer.len()));
            drop(buffer);
            assert_eq!(waiter.join().unwrap(), Some(4096));
        });
    }

    #[test]
    fn closing_wakes_every_waiter() {
        let pool = Pool::new(4096, 4096);
        let mut buffer = pool.take().unwrap();
        std::thread::scope(|scope| {
            let waiters: Vec<_> = (0..3)
                .map(|_| scope.spawn(|| pool.take().is_none()))
                .collect();
            pool.close();
            for waiter in waiters {
                assert!(waiter.join().unwrap());
            }
        });
        buffer[0] = 1;
        drop(buffer);
        assert!(pool.is_closed());
        assert!(pool.try_take().is_none());
        assert_eq!(pool.shrink(), 0, "a closed pool keeps no memory");
    }

    #[test]
    fn buffers_outlive_the_handles() {
        let pool = Pool::new(4096, 4096);
        let mut buffer = pool.clone().take().unwrap();
        drop(pool);
        buffer.fill(1);
        assert_eq!(
            buffer.iter().map(|byte| usize::from(*byte)).sum::<usize>(),
            4096
        );
    }

    #[test]
    fn threads_never_exceed_the_budget_and_all_get_their_turn() {
        const BUFFERS: usize = 3;
        let pool = Pool::new(64, BUFFERS * 64);
        let in_use = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for mark in 1..=8u8 {
                let (pool, in_use) = (&pool, &in_use);
                scope.spawn(move || {
                    for _ in 0..500 {
                        let mut buffer = pool.take().unwrap();
                        assert!(in_use.fetch_add(1, Ordering::SeqCst) < BUFFERS);
                        buffer.fill(mark);
                        std::thread::yield_now();
                        assert!(buffer.iter().all(|byte| *byte == mark));
                        in_use.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(pool.buffers_taken(), 0);
        assert!(pool.shrink() <= BUFFERS * 64);
    }
}
