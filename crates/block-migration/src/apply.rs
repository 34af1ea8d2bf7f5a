//! The thread that writes what has arrived, in the order of the stream.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use vmferry_buffer::{Buffer, is_zero};
use vmferry_disk::{DiskError, Filler, Unmap};

/// Operations that wait at most; the buffers' budget bounds the data among them.
const QUEUE_MAX: usize = 256;

/// Write-back of a disk is started whenever this much was written to it.
const WRITEBACK_BYTES: u64 = 8 << 20;

/// What has arrived.
pub(crate) enum Operation {
    Write {
        disk: usize,
        offset: u64,
        length: usize,
        buffer: Buffer,
    },
    Zero {
        disk: usize,
        offset: u64,
        length: u64,
    },
    Sync {
        done: SyncSender<()>,
    },
    End,
}

/// A disk could not be written.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ApplyError {
    /// What the disk said.
    #[error("disk '{disk}': {source}")]
    Disk {
        /// The disk's name.
        disk: String,
        /// What it said.
        source: Arc<DiskError>,
    },
    /// The thread cannot be started, or died.
    #[error("the thread that writes the disks has ended: {reason}")]
    Thread {
        /// Why.
        reason: String,
    },
}

/// Feeds the thread; dropping it ends the thread after the operation in hand.
pub(crate) struct Applier {
    queue: SyncSender<Operation>,
    failure: Arc<OnceLock<ApplyError>>,
    thread: Option<JoinHandle<()>>,
}

/// Asks for everything that has arrived so far to be durable.
#[derive(Clone, Debug)]
pub struct Syncer {
    queue: SyncSender<Operation>,
    failure: Arc<OnceLock<ApplyError>>,
}

impl Syncer {
    /// Returns when everything that arrived before the call is written and synced.
    ///
    /// # Errors
    /// A disk that could not be written or synced, now or before.
    pub fn sync(&self) -> Result<(), ApplyError> {
        let (done, wait) = sync_channel(1);
        let sent = self.queue.send(Operation::Sync { done });
        let ended = sent.is_err() || wait.recv().is_err();
        match self.failure.get() {
            Some(failure) => Err(failure.clone()),
            None if ended => Err(ApplyError::Thread {
                reason: "it was stopped".to_owned(),
            }),
            None => Ok(()),
        }
    }
}

impl Applier {
    pub(crate) fn start(fillers: Vec<Filler>) -> Result<Self, ApplyError> {
        let (queue, operations) = sync_channel(QUEUE_MAX);
        let failure = Arc::new(OnceLock::new());
        let report = Arc::clone(&failure);
        let thread = std::thread::Builder::new()
            .name("migrate-write".to_owned())
            .spawn(move || run(&fillers, &operations, &report))
            .map_err(|error| ApplyError::Thread {
                reason: error.to_string(),
            })?;
        Ok(Self {
            queue,
            failure,
            thread: Some(thread),
        })
    }

    pub(crate) fn apply(&self, operation: Operation) -> Result<(), ApplyError> {
        self.check()?;
        if self.queue.send(operation).is_ok() {
            return Ok(());
        }
        self.check()?;
        Err(ApplyError::Thread {
            reason: "it panicked".to_owned(),
        })
    }

    pub(crate) fn check(&self) -> Result<(), ApplyError> {
        self.failure
            .get()
            .map_or(Ok(()), |failure| Err(failure.clone()))
    }

    pub(crate) fn syncer(&self) -> Syncer {
        Syncer {
            queue: self.queue.clone(),
            failure: Arc::clone(&self.failure),
        }
    }
}

impl Drop for Applier {
    fn drop(&mut self) {
        let _ = self.queue.send(Operation::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(fillers: &[Filler], operations: &Receiver<Operation>, failure: &OnceLock<ApplyError>) {
    let mut written: Vec<Written> = fillers.iter().map(|_| Written::default()).collect();
    for operation in operations {
        // After a failure nothing is written any more, but buffers go back to their pool and
        // waiters are let go.
        let failed = failure.get().is_some();
        let result = match operation {
            Operation::End => return,
            _ if failed => Ok(()),
            Operation::Write {
                disk,
                offset,
                length,
                buffer,
            } => {
                let filler = &fillers[disk];
                write(filler, offset, &buffer[..length])
                    .and_then(|()| written[disk].count(filler, offset, length))
                    .map_err(|error| (filler, error))
            }
            Operation::Zero {
                disk,
                offset,
                length,
            } => {
                let filler = &fillers[disk];
                let zeroed = filler
                    .device()
                    .write_zeroes(offset, length, Unmap::May, false);
                zeroed.map_err(|error| (filler, error))
            }
            Operation::Sync { done } => sync(fillers).map(|()| {
                let _ = done.send(());
            }),
        };
        if let Err((filler, source)) = result {
            let disk = filler.node().name().to_owned();
            let _ = failure.set(ApplyError::Disk {
                disk,
                source: Arc::new(source),
            });
        }
    }
}

fn sync(fillers: &[Filler]) -> Result<(), (&Filler, DiskError)> {
    fillers
        .iter()
        .try_for_each(|filler| filler.device().flush().map_err(|error| (filler, error)))
}

/// All-zero parts become holes where the format has a granularity; else the whole block counts.
fn write(filler: &Filler, offset: u64, data: &[u8]) -> Result<(), DiskError> {
    if is_zero(data) {
        let device = filler.device();
        return device.write_zeroes(offset, data.len() as u64, Unmap::May, false);
    }
    filler.device().write_at(data, offset)
}

/// What was written since write-back was last started.
#[derive(Default)]
struct Written {
    start: u64,
    end: u64,
}

impl Written {
    fn count(&mut self, filler: &Filler, offset: u64, length: usize) -> Result<(), DiskError> {
        if self.end != offset || self.start == self.end {
            self.flush(filler)?;
            *self = Self {
                start: offset,
                end: offset,
            };
        }
        self.end = offset + length as u64;
        if self.end - self.start >= WRITEBACK_BYTES {
            self.flush(filler)?;
        }
        Ok(())
    }

    fn flush(&mut self, filler: &Filler) -> Result<(), DiskError> {
        let (start, end) = (self.start, self.end);
        self.start = end;
        if start == end {
            Ok(())
        } else {
            filler.device().start_writeback(start, end - start)
        }
    }
}
