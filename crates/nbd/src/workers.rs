//! The threads that wait for disks, so that connections need not.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::job::Job;
use crate::lanes::{Key, Lanes};

/// A fixed number of threads and a queue that can be closed. Dropping it runs what is queued and
/// ends the threads.
#[derive(Debug)]
pub(crate) struct Workers {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
pub(crate) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
}

#[derive(Debug)]
struct State {
    lanes: Lanes,
    idle: usize,
    closed: bool,
}

impl Workers {
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let count = count.max(1);
        let mut workers = Self {
            queue: Arc::new(Queue::new(count)),
            threads: Vec::new(),
        };
        for number in 0..count {
            let queue = Arc::clone(&workers.queue);
            let thread = std::thread::Builder::new()
                .name(format!("nbd-worker-{number}"))
                .spawn(move || queue.work())?;
            workers.threads.push(thread);
        }
        Ok(workers)
    }

    pub(crate) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.queue.state().closed = true;
        self.queue.filled.notify_all();
        for thread in self.threads.drain(..) {
            // A worker catches panics; there is nothing to learn from its end.
            let _ = thread.join();
        }
    }
}

impl Queue {
    fn new(workers: usize) -> Self {
        let state = State {
            lanes: Lanes::new(workers),
            idle: 0,
            closed: false,
        };
        Self {
            state: Mutex::new(state),
            filled: Condvar::new(),
        }
    }

    /// Hand over jobs; the list is empty afterwards. A job that comes after the close is dropped,
    /// which ends its connection.
    pub(crate) fn submit(&self, jobs: &mut Vec<Job>) {
        if jobs.is_empty() {
            return;
        }
        let wake = {
            let mut state = self.state();
            if state.closed {
                drop(state);
                return jobs.clear();
            }
            for job in jobs.drain(..) {
                state.lanes.push(job);
            }
            state.idle.min(state.lanes.startable())
        };
        for _ in 0..wake {
            self.filled.notify_one();
        }
    }

    fn work(&self) {
        let mut finished = None;
        while let Some((job, key)) = self.next(finished.take()) {
            let line = job.line();
            if catch_unwind(AssertUnwindSafe(|| job.run())).is_err() {
                tracing::error!("a disk operation panicked; its connection is closed");
                line.sever();
            }
            finished = Some(key);
        }
    }

    /// Wait for a job that may run. The end of one lets at most one other run, which is for the
    /// caller to take: nobody else needs to be woken.
    fn next(&self, finished: Option<Key>) -> Option<(Job, Key)> {
        let mut state = self.state();
        if let Some(key) = finished {
            state.lanes.finish(&key);
        }
        loop {
            if let Some(started) = state.lanes.start() {
                return Some(started);
            }
            // What waits for a running job of its lane is for the worker that runs that one.
            if state.closed {
                return None;
            }
            state.idle = state.idle.saturating_add(1);
            state = self
                .filled
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.idle = state.idle.saturating_sub(1);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
