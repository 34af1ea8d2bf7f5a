//! Reading chunks: at once where the page cache has them, in threads where not.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_buffer::Buffer;
use vmferry_disk::{Cached, Claim, DiskError};

use crate::schedule::{READS_MAX, Ticket};

/// A read that has ended.
#[derive(Debug)]
pub struct Finished {
    /// Which read.
    pub ticket: Ticket,
    /// The chunk, padded with zeroes, or why not.
    pub result: Result<Buffer, DiskError>,
}

/// Who carries out the reads that the schedule asks for.
pub trait Reads {
    /// Fill `buffer` if that needs no waiting; `None` if it would.
    fn read_now(&mut self, claim: &Claim, buffer: &mut Buffer) -> Option<Result<(), DiskError>>;

    /// Start a read.
    fn submit(&mut self, ticket: Ticket, claim: Claim, buffer: Buffer);

    /// The next read that has ended, waiting at most `patience`.
    fn finished(&mut self, patience: Duration) -> Option<Finished>;

    /// Measured speed in bytes per second; `None` as long as nothing was read.
    fn bytes_per_second(&self) -> Option<u64>;
}

struct Job {
    ticket: Ticket,
    claim: Claim,
    buffer: Buffer,
}

/// Reads by up to [`READS_MAX`] threads, which are started when a read first has to wait.
#[derive(Debug)]
pub struct ThreadReads {
    jobs: Option<Sender<Job>>,
    queue: Arc<Mutex<Receiver<Job>>>,
    done: Sender<Finished>,
    finished: Receiver<Finished>,
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
    speed: Speed,
}

impl ThreadReads {
    /// No threads yet.
    #[must_use]
    pub fn new() -> Self {
        let (jobs, queue) = channel();
        let (done, finished) = channel();
        Self {
            jobs: Some(jobs),
            queue: Arc::new(Mutex::new(queue)),
            done,
            finished,
            threads: Vec::new(),
            in_flight: 0,
            speed: Speed::default(),
        }
    }

    fn start_thread(&mut self) {
        let queue = Arc::clone(&self.queue);
        let done = self.done.clone();
        let work = move || {
            loop {
                let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(Job {
                    ticket,
                    claim,
                    mut buffer,
                }) = job
                else {
                    return;
                };
                // A panic must end the migration, which waits for this read.
                let read = catch_unwind(AssertUnwindSafe(|| read_padded(&claim, &mut buffer)));
                let result = read.unwrap_or_else(|_| Err(panicked(&claim)));
                let result = result.map(|()| buffer);
                if done.send(Finished { ticket, result }).is_err() {
                    return;
                }
            }
        };
        let name = format!("migrate-read-{}", self.threads.len());
        if let Ok(thread) = std::thread::Builder::new().name(name).spawn(work) {
            self.threads.push(thread);
        }
    }
}

impl Default for ThreadReads {
    fn default() -> Self {
        Self::new()
    }
}

impl Reads for ThreadReads {
    fn read_now(&mut self, claim: &Claim, buffer: &mut Buffer) -> Option<Result<(), DiskError>> {
        let begun = Instant::now();
        let length = claim_length(claim);
        let mut filled = 0;
        while filled < length {
            match claim.read_cached(filled as u64, &mut buffer[filled..length]) {
                Ok(Cached::Hit(n)) => filled += n,
                Ok(Cached::Miss | Cached::Unsupported) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
        buffer[length..].fill(0);
        self.speed.count(length, begun.elapsed());
        Some(Ok(()))
    }

    fn submit(&mut self, ticket: Ticket, claim: Claim, buffer: Buffer) {
        if self.threads.len() < READS_MAX && self.threads.len() <= self.in_flight {
            self.start_thread();
        }
        if self.in_flight == 0 {
            self.speed.busy_since = Some(Instant::now());
        }
        self.in_flight += 1;
        let job = Job {
            ticket,
            claim,
            buffer,
        };
        let orphan = match &self.jobs {
            Some(jobs) if !self.threads.is_empty() => jobs.send(job).err().map(|e| e.0),
            _ => Some(job),
        };
        // No thread could be started: read here.
        if let Some(Job {
            ticket,
            claim,
            mut buffer,
        }) = orphan
        {
            let result = read_padded(&claim, &mut buffer).map(|()| buffer);
            let _ = self.done.send(Finished { ticket, result });
        }
    }

    fn finished(&mut self, patience: Duration) -> Option<Finished> {
        if self.in_flight == 0 {
            return None;
        }
        let finished = match self.finished.recv_timeout(patience) {
            Ok(finished) => finished,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
        };
        self.in_flight -= 1;
        self.speed.ended(
            finished.result.as_ref().map_or(0, |b| b.len()),
            self.in_flight == 0,
        );
        Some(finished)
    }

    fn bytes_per_second(&self) -> Option<u64> {
        self.speed.bytes_per_second()
    }
}

impl Drop for ThreadReads {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Bytes read while at least one read was in flight.
#[derive(Debug, Default)]
struct Speed {
    bytes: u64,
    busy: Duration,
    busy_since: Option<Instant>,
}

/// The speed is that of about the last 64 to 128 MiB.
const SPEED_WINDOW_BYTES: u64 = 128 << 20;

impl Speed {
    fn count(&mut self, bytes: usize, took: Duration) {
        self.bytes += bytes as u64;
        self.busy += took;
        if self.bytes > SPEED_WINDOW_BYTES {
            self.bytes /= 2;
            self.busy /= 2;
        }
    }

    fn ended(&mut self, bytes: usize, idle: bool) {
        let now = Instant::now();
        let took = self.busy_since.map_or(Duration::ZERO, |since| now - since);
        self.busy_since = (!idle).then_some(now);
        self.count(bytes, took);
    }

    fn bytes_per_second(&self) -> Option<u64> {
        let nanoseconds = self.busy.as_nanos().max(1);
        let rate = u128::from(self.bytes) * 1_000_000_000 / nanoseconds;
        (self.bytes > 0).then(|| u64::try_from(rate).unwrap_or(u64::MAX))
    }
}

fn panicked(claim: &Claim) -> DiskError {
    let bytes = claim.bytes();
    DiskError {
        operation: "read",
        offset: bytes.start,
        length: bytes.end - bytes.start,
        source: std::io::Error::other("internal error: the disk's backend panicked"),
    }
}

fn claim_length(claim: &Claim) -> usize {
    let bytes = claim.bytes();
    usize::try_from(bytes.end - bytes.start).unwrap_or(usize::MAX)
}

/// Read a claim of one chunk; what lies past the end of the disk is zero, for it goes on the wire.
pub(crate) fn read_padded(claim: &Claim, buffer: &mut [u8]) -> Result<(), DiskError> {
    let (data, padding) = buffer.split_at_mut(claim_length(claim));
    padding.fill(0);
    claim.read(data)
}

#[cfg(test)]
mod tests;
