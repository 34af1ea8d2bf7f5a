//! The threads that wait for disks, so that connections need not.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::job::Job;

/// A fixed number of threads and a queue that can be closed. Dropping it runs what is queued and
/// ends the threads.
#[derive(Debug)]
pub(crate) struct Workers {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
    closed: bool,
}

impl Workers {
    pub(crate) fn start(count: usize) -> io::Result<Self> {
        let mut workers = Self {
            queue: Arc::default(),
            threads: Vec::new(),
        };
        for number in 0..count.max(1) {
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
            state.jobs.extend(jobs.drain(..));
            state.idle.min(state.jobs.len())
        };
        for _ in 0..wake {
            self.filled.notify_one();
        }
    }

    fn work(&self) {
        while let Some(job) = self.next() {
            let line = job.line();
            if catch_unwind(AssertUnwindSafe(|| job.run())).is_err() {
                tracing::error!("a disk operation panicked; its connection is closed");
                line.sever();
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
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
