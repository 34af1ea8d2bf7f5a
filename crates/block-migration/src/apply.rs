//! Writes what has arrived, in the order of the stream: in a thread of its own, or at once.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use vmferry_buffer::{Buffer, is_zero};
use vmferry_disk::{CHUNK_BYTES, DiskError, Filler, Unmap};

/// Operations that wait at most; the buffers' budget bounds the data among them.
const QUEUE_MAX: usize = 256;

/// Write-back of a disk is started whenever this much was written to it.
pub(crate) const WRITEBACK_BYTES: u64 = 64 << 20;

/// What has arrived.
#[derive(Debug)]
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

/// Feeds the thread, if there is one; dropping it ends the thread after the operation in hand.
pub(crate) struct Applier {
    queue: Queue,
    failure: Arc<OnceLock<ApplyError>>,
    thread: Option<JoinHandle<()>>,
}

/// Asks for everything that has arrived so far to be durable.
#[derive(Clone, Debug)]
pub struct Syncer {
    queue: Queue,
    failure: Arc<OnceLock<ApplyError>>,
}

/// Where operations go.
#[derive(Clone, Debug)]
enum Queue {
    Thread(SyncSender<Operation>),
    Here(Arc<Mutex<Disks>>),
}

impl Queue {
    /// False if nobody takes operations any more.
    fn send(&self, operation: Operation) -> bool {
        match self {
            Self::Thread(thread) => thread.send(operation).is_ok(),
            Self::Here(disks) => {
                let mut disks = disks.lock().unwrap_or_else(PoisonError::into_inner);
                disks.carry_out(&operation);
                true
            }
        }
    }
}

impl Syncer {
    /// Returns when everything that arrived before the call is written and synced.
    ///
    /// # Errors
    /// A disk that could not be written or synced, now or before.
    pub fn sync(&self) -> Result<(), ApplyError> {
        let (done, wait) = sync_channel(1);
        let sent = self.queue.send(Operation::Sync { done });
        let ended = !sent || wait.recv().is_err();
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
        let mut disks = Disks::new(fillers);
        let failure = Arc::clone(&disks.failure);
        let thread = std::thread::Builder::new()
            .name("migrate-write".to_owned())
            .spawn(move || run(&mut disks, &operations))
            .map_err(|error| ApplyError::Thread {
                reason: error.to_string(),
            })?;
        Ok(Self {
            queue: Queue::Thread(queue),
            failure,
            thread: Some(thread),
        })
    }

    /// Carries everything out before [`Applier::apply`] returns.
    pub(crate) fn without_thread(fillers: Vec<Filler>) -> Self {
        let disks = Disks::new(fillers);
        Self {
            failure: Arc::clone(&disks.failure),
            queue: Queue::Here(Arc::new(Mutex::new(disks))),
            thread: None,
        }
    }

    pub(crate) fn apply(&self, operation: Operation) -> Result<(), ApplyError> {
        self.check()?;
        let sent = self.queue.send(operation);
        self.check()?;
        if sent {
            return Ok(());
        }
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
        if let Some(thread) = self.thread.take() {
            self.queue.send(Operation::End);
            let _ = thread.join();
        }
    }
}

fn run(disks: &mut Disks, operations: &Receiver<Operation>) {
    for operation in operations {
        if matches!(operation, Operation::End) {
            return;
        }
        disks.carry_out(&operation);
    }
}

/// Carries operations out, up to the first that fails.
#[derive(Debug)]
struct Disks {
    fillers: Vec<Filler>,
    written: Vec<Written>,
    failure: Arc<OnceLock<ApplyError>>,
}

impl Disks {
    fn new(fillers: Vec<Filler>) -> Self {
        Self {
            written: fillers.iter().map(|_| Written::default()).collect(),
            fillers,
            failure: Arc::default(),
        }
    }

    /// After a failure nothing is written any more, but buffers go back to their pool and waiters
    /// are let go when the caller drops the operation: after the reason is known.
    fn carry_out(&mut self, operation: &Operation) {
        if self.failure.get().is_some() {
            return;
        }
        if let Err((disk, source)) = self.try_to(operation) {
            let _ = self.failure.set(ApplyError::Disk {
                disk: self.fillers[disk].node().name().to_owned(),
                source: Arc::new(source),
            });
        }
    }

    /// On failure says which disk it was.
    fn try_to(&mut self, operation: &Operation) -> Result<(), (usize, DiskError)> {
        match operation {
            &Operation::Write {
                disk,
                offset,
                length,
                ref buffer,
            } => {
                let filler = &self.fillers[disk];
                write(filler, offset, &buffer[..length])
                    .and_then(|()| self.written[disk].count(filler, offset, length))
                    .map_err(|error| (disk, error))
            }
            &Operation::Zero {
                disk,
                offset,
                length,
            } => self.fillers[disk]
                .device()
                .write_zeroes(offset, length, Unmap::May, false)
                .map_err(|error| (disk, error)),
            Operation::Sync { done } => {
                for (disk, filler) in self.fillers.iter().enumerate() {
                    filler.device().flush().map_err(|error| (disk, error))?;
                }
                let _ = done.send(());
                Ok(())
            }
            Operation::End => Ok(()),
        }
    }
}

/// All-zero clusters stay unallocated where the format has clusters that a block is made of; else
/// the whole block counts.
fn write(filler: &Filler, offset: u64, data: &[u8]) -> Result<(), DiskError> {
    let device = filler.device();
    let cluster_bytes = filler.node().limits().cluster_bytes.map(u64::from);
    let cluster_bytes = cluster_bytes.filter(|bytes| CHUNK_BYTES.is_multiple_of(*bytes));
    for (part, is_zero) in runs(offset, data, cluster_bytes) {
        let start = offset + part.start as u64;
        match is_zero {
            true => device.write_zeroes(start, part.len() as u64, Unmap::May, false)?,
            false => device.write_at(&data[part], start)?,
        }
    }
    Ok(())
}

/// Split what is to be written at `offset` into runs of clusters that are all zero and runs of
/// clusters that are not. The first and the last cluster may be there in part.
fn runs(
    offset: u64,
    data: &[u8],
    cluster_bytes: Option<u64>,
) -> impl Iterator<Item = (Range<usize>, bool)> {
    let cluster_end = move |start: usize| {
        let left = cluster_bytes.map(|bytes| bytes - (offset + start as u64) % bytes);
        let length = left.and_then(|bytes| usize::try_from(bytes).ok());
        length.map_or(data.len(), |length| data.len().min(start + length))
    };
    let mut at = 0;
    let mut next = None;
    let mut test = move || {
        let part = at..cluster_end(at);
        at = part.end;
        let zero = is_zero(&data[part.clone()]);
        (!part.is_empty()).then_some((part, zero))
    };
    std::iter::from_fn(move || {
        let (mut run, zero) = next.take().or_else(&mut test)?;
        loop {
            match test() {
                Some((part, same)) if same == zero => run.end = part.end,
                other => {
                    next = other;
                    return Some((run, zero));
                }
            }
        }
    })
}

/// What was written since write-back was last started.
#[derive(Debug, Default)]
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

#[cfg(test)]
mod tests;
