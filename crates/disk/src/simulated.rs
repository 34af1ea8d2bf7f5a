//! A disk in memory for tests: it fails, blocks and crashes when the test says so.
//!
//! A [`MemoryDisk`] has two images. Guests see the *volatile* one; a flush copies what was written
//! since the last one to the *durable* one, and [`MemoryDisk::crash`] throws the difference away.
//! Every clone is a handle to the same disk: one goes into a [`crate::Node`], the test keeps
//! another and looks inside.
//!
//! ```
//! # use vmferry_disk::{BlockDevice, simulated::{MemoryDisk, Operation}};
//! let disk = MemoryDisk::new(1 << 20);
//! disk.fail(Operation::Flush, 2, 5); // the second flush from now says EIO
//! disk.write_at(b"kept", 0).unwrap();
//! disk.flush().unwrap();
//! disk.write_at(b"lost", 0).unwrap();
//! assert!(disk.flush().is_err());
//! disk.crash();
//! assert_eq!(&disk.snapshot()[..4], b"kept");
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::device::{
    Allocation, BlockDevice, Cached, DiskError, Extent, ExtentKind, Limits, Unmap,
};

/// Granularity of holes.
pub const PAGE_BYTES: u64 = 4096;

/// So many operations are remembered; older ones are forgotten.
pub const LOG_ENTRIES_MAX: usize = 1 << 16;

/// A gate that nothing reaches for so long fails its test instead of hanging it.
const GATE_PATIENCE: Duration = Duration::from_secs(60);

/// What can be done to a disk. Reads from the cache count as reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Operation {
    /// [`BlockDevice::read_at`] and hits of [`BlockDevice::read_cached_at`].
    Read,
    /// [`BlockDevice::write_at`].
    Write,
    /// [`BlockDevice::write_zeroes`].
    WriteZeroes,
    /// [`BlockDevice::discard`].
    Discard,
    /// [`BlockDevice::status`].
    Status,
    /// [`BlockDevice::allocation`].
    Allocation,
    /// [`BlockDevice::start_writeback`].
    StartWriteback,
    /// [`BlockDevice::flush`].
    Flush,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::WriteZeroes => "write zeroes",
            Self::Discard => "discard",
            Self::Status => "status",
            Self::Allocation => "allocation",
            Self::StartWriteback => "write back",
            Self::Flush => "flush",
        }
    }
}

/// An operation that was asked for, whatever became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// What.
    pub operation: Operation,
    /// First byte; 0 for a flush.
    pub offset: u64,
    /// Number of bytes; 0 for a flush.
    pub length: u64,
}

/// How [`BlockDevice::read_cached_at`] answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMode {
    /// Everything is in memory.
    Hit,
    /// At most so many bytes from the start of a read are in memory; 0 is always a miss.
    Partial(usize),
    /// The disk cannot tell.
    Unsupported,
}

/// A sparse disk in memory; a clone is another handle to it.
#[derive(Clone, Debug)]
pub struct MemoryDisk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limits: Limits,
    state: Mutex<State>,
    gates_changed: Condvar,
}

#[derive(Debug)]
struct State {
    volatile: Image,
    durable: Image,
    unflushed: BTreeSet<u64>,
    faults: Vec<Fault>,
    gates: BTreeMap<u64, GateState>,
    gates_made: u64,
    cache: CacheMode,
    quick_zeroes: bool,
    log: VecDeque<Logged>,
    counts: BTreeMap<Operation, usize>,
}

#[derive(Clone, Debug)]
enum Page {
    Data(Box<[u8; PAGE_BYTES as usize]>),
    /// Allocated and zero.
    Zero,
}

/// Pages that are missing are holes.
type Image = BTreeMap<u64, Page>;

#[derive(Debug)]
struct Fault {
    operation: Operation,
    /// 1 is the next one.
    nth: u64,
    for_ever: bool,
    errno: i32,
    /// So many bytes get through before the error.
    partial: u64,
}

#[derive(Debug)]
struct GateState {
    operation: Operation,
    range: Range<u64>,
    after: bool,
    waiting: usize,
}

impl MemoryDisk {
    /// A disk of this length, all holes, both images alike.
    #[must_use]
    pub fn new(length: u64) -> Self {
        Self::with_limits(Limits {
            length,
            preferred_bytes: PAGE_BYTES as u32,
            cluster_bytes: None,
            read_only: false,
        })
    }

    /// A disk with these limits, all holes. `read_only` is for callers to heed: the disk itself
    /// refuses no write for it.
    #[must_use]
    pub fn with_limits(limits: Limits) -> Self {
        let state = State {
            volatile: Image::new(),
            durable: Image::new(),
            unflushed: BTreeSet::new(),
            faults: Vec::new(),
            gates: BTreeMap::new(),
            gates_made: 0,
            cache: CacheMode::Hit,
            quick_zeroes: true,
            log: VecDeque::new(),
            counts: BTreeMap::new(),
        };
        Self {
            shared: Arc::new(Shared {
                limits,
                state: Mutex::new(state),
                gates_changed: Condvar::new(),
            }),
        }
    }

    /// A disk that holds `bytes`, durably.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let disk = Self::new(bytes.len() as u64);
        disk.fill(0, bytes);
        disk
    }

    /// Put `bytes` into both images behind everybody's back: not logged, never failing.
    pub fn fill(&self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.shared.limits.length);
        let mut state = self.state();
        put(&mut state.volatile, offset, bytes);
        put(&mut state.durable, offset, bytes);
    }

    /// What reads see.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.bytes_of(&self.state().volatile)
    }

    /// What would survive a crash.
    #[must_use]
    pub fn durable_snapshot(&self) -> Vec<u8> {
        self.bytes_of(&self.state().durable)
    }

    /// Lose everything that was not flushed.
    pub fn crash(&self) {
        self.crash_keeping(|_| false);
    }

    /// Lose those unflushed pages of [`PAGE_BYTES`] for which `survives` says false to their
    /// number: a real disk may have written any of them back by itself.
    pub fn crash_keeping(&self, mut survives: impl FnMut(u64) -> bool) {
        let mut state = self.state();
        let state = &mut *state;
        for page in std::mem::take(&mut state.unflushed) {
            if survives(page) {
                copy_page(&state.volatile, &mut state.durable, page);
            }
        }
        state.volatile = state.durable.clone();
    }

    /// Let the `nth` operation of this kind from now on (1 is the next) fail with `errno`, with no
    /// effect on the disk.
    pub fn fail(&self, operation: Operation, nth: u64, errno: i32) {
        self.plan(operation, nth, errno, 0, false);
    }

    /// Let the `nth` operation of this kind from now on and all later ones fail.
    pub fn fail_from(&self, operation: Operation, nth: u64, errno: i32) {
        self.plan(operation, nth, errno, 0, true);
    }

    /// Let the `nth` write or zero-write from now on fail after its first `bytes` are in place.
    pub fn fail_after_bytes(&self, operation: Operation, nth: u64, errno: i32, bytes: u64) {
        assert!(matches!(
            operation,
            Operation::Write | Operation::WriteZeroes
        ));
        self.plan(operation, nth, errno, bytes, false);
    }

    /// Forget all planned faults.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// Block every operation of this kind before it has any effect, until the gate is dropped.
    #[must_use]
    pub fn gate(&self, operation: Operation) -> Gate {
        self.add_gate(operation, 0..u64::MAX, false)
    }

    /// Like [`MemoryDisk::gate`], for operations that touch `bytes` only.
    #[must_use]
    pub fn gate_range(&self, operation: Operation, bytes: Range<u64>) -> Gate {
        self.add_gate(operation, bytes, false)
    }

    /// Like [`MemoryDisk::gate`], but the operation has had its effect and only can't return.
    #[must_use]
    pub fn gate_after(&self, operation: Operation) -> Gate {
        self.add_gate(operation, 0..u64::MAX, true)
    }

    /// How reads from the cache are answered; at first [`CacheMode::Hit`]. A read that a fault or a
    /// gate waits for is never answered from the cache.
    pub fn set_cache(&self, mode: CacheMode) {
        self.state().cache = mode;
    }

    /// Can the disk zero a range faster than by writing? At first it can.
    pub fn set_quick_zeroes(&self, quick: bool) {
        self.state().quick_zeroes = quick;
    }

    /// The last [`LOG_ENTRIES_MAX`] operations in the order in which they were asked for.
    #[must_use]
    pub fn log(&self) -> Vec<Logged> {
        self.state().log.iter().copied().collect()
    }

    /// How many operations of this kind were asked for since the log was cleared, or ever.
    #[must_use]
    pub fn count(&self, operation: Operation) -> usize {
        self.state().counts.get(&operation).copied().unwrap_or(0)
    }

    /// Forget the log and the counts.
    pub fn clear_log(&self) {
        let mut state = self.state();
        state.log.clear();
        state.counts.clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    fn bytes_of(&self, image: &Image) -> Vec<u8> {
        let length = usize::try_from(self.shared.limits.length).expect("a disk that fits memory");
        let mut bytes = vec![0; length];
        get(image, 0, &mut bytes);
        bytes
    }

    fn plan(&self, operation: Operation, nth: u64, errno: i32, partial: u64, for_ever: bool) {
        assert!(nth >= 1, "the next operation is number 1");
        self.state().faults.push(Fault {
            operation,
            nth,
            for_ever,
            errno,
            partial,
        });
    }

    fn add_gate(&self, operation: Operation, range: Range<u64>, after: bool) -> Gate {
        let mut state = self.state();
        state.gates_made += 1;
        let id = state.gates_made;
        let gate = GateState {
            operation,
            range,
            after,
            waiting: 0,
        };
        state.gates.insert(id, gate);
        Gate {
            shared: Arc::clone(&self.shared),
            id,
        }
    }

    /// Log an operation, wait at its gates, let a planned fault have its way, carry it out, wait at
    /// the gates behind it. `work` gets the number of bytes that it may touch.
    fn carry_out<T>(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
        work: impl FnOnce(&mut State, u64) -> io::Result<T>,
    ) -> Result<T, DiskError> {
        let failed = |source| DiskError {
            operation: operation.name(),
            offset,
            length,
            source,
        };
        let within = offset
            .checked_add(length)
            .is_some_and(|end| end <= self.shared.limits.length);
        assert!(
            within,
            "{operation:?} at {offset} of {length} bytes: past the end"
        );
        let mut state = self.state();
        *state.counts.entry(operation).or_default() += 1;
        if state.log.len() == LOG_ENTRIES_MAX {
            state.log.pop_front();
        }
        state.log.push_back(Logged {
            operation,
            offset,
            length,
        });
        // Decided on arrival, so that "the n-th" means the n-th that was asked for.
        let fault = take_fault(&mut state.faults, operation);
        let bytes = offset..offset + length;
        let mut state = self.pass_gates(state, operation, &bytes, false);
        let result = match fault {
            Some((errno, partial)) => {
                let partial = partial.min(length);
                let lost = operation == Operation::Flush;
                if partial > 0 {
                    let _ = work(&mut state, partial);
                } else if lost {
                    // As the kernel's page cache does it: a failed flush leaves pages that count
                    // as clean and are nowhere.
                    state.unflushed.clear();
                }
                Err(io::Error::from_raw_os_error(errno))
            }
            None => work(&mut state, length),
        };
        drop(self.pass_gates(state, operation, &bytes, true));
        result.map_err(failed)
    }

    fn pass_gates<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        operation: Operation,
        bytes: &Range<u64>,
        after: bool,
    ) -> MutexGuard<'a, State> {
        loop {
            let stopping = state
                .gates
                .iter_mut()
                .find(|(_, gate)| gate.after == after && gate.stops(operation, bytes));
            let Some((&id, gate)) = stopping else {
                return state;
            };
            gate.waiting += 1;
            self.shared.gates_changed.notify_all();
            state = self
                .shared
                .gates_changed
                .wait_while(state, |state| state.gates.contains_key(&id))
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl GateState {
    fn stops(&self, operation: Operation, bytes: &Range<u64>) -> bool {
        let touches = bytes.start < self.range.end && self.range.start < bytes.end;
        let everything = self.range == (0..u64::MAX);
        self.operation == operation && (touches || everything)
    }
}

impl BlockDevice for MemoryDisk {
    fn limits(&self) -> Limits {
        self.shared.limits
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let length = buf.len() as u64;
        self.carry_out(Operation::Read, offset, length, |state, _| {
            get(&state.volatile, offset, buf);
            Ok(())
        })
    }

    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError> {
        let bytes = offset..offset + buf.len() as u64;
        let ready = {
            let state = self.state();
            let due = |fault: &Fault| fault.operation == Operation::Read && fault.nth == 1;
            let stopped = |gate: &GateState| gate.stops(Operation::Read, &bytes);
            if state.faults.iter().any(due) || state.gates.values().any(stopped) {
                return Ok(Cached::Miss);
            }
            match state.cache {
                CacheMode::Hit => buf.len(),
                CacheMode::Partial(ready) => ready.min(buf.len()),
                CacheMode::Unsupported => return Ok(Cached::Unsupported),
            }
        };
        if ready == 0 {
            return Ok(Cached::Miss);
        }
        self.read_at(&mut buf[..ready], offset)?;
        Ok(Cached::Hit(ready))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        let length = buf.len() as u64;
        self.carry_out(Operation::Write, offset, length, |state, allowed| {
            let buf = &buf[..usize::try_from(allowed).unwrap_or(buf.len())];
            put(&mut state.volatile, offset, buf);
            state.unflushed.extend(pages(offset, allowed));
            Ok(())
        })
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: Unmap,
        fast_only: bool,
    ) -> Result<(), DiskError> {
        self.carry_out(Operation::WriteZeroes, offset, length, |state, allowed| {
            if fast_only && !state.quick_zeroes {
                return Err(io::ErrorKind::Unsupported.into());
            }
            let bytes = offset..offset + allowed;
            zero(
                &mut state.volatile,
                &bytes,
                self.shared.limits.length,
                unmap,
            );
            state.unflushed.extend(pages(offset, allowed));
            Ok(())
        })
    }

    /// Whole pages become holes.
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.carry_out(Operation::Discard, offset, length, |state, _| {
            for page in pages(offset, length) {
                let whole = page_bytes(page, self.shared.limits.length);
                if offset <= whole.start && whole.end <= offset + length {
                    state.volatile.remove(&page);
                    state.unflushed.insert(page);
                }
            }
            Ok(())
        })
    }

    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        self.carry_out(Operation::Status, offset, length, |state, _| {
            let kind_of = |page| match state.volatile.get(&page) {
                None => ExtentKind::Hole,
                Some(Page::Zero) => ExtentKind::Zero,
                Some(Page::Data(_)) => ExtentKind::Data,
            };
            let all = pages(offset, length);
            let kind = kind_of(all.start);
            let end = all.clone().find(|&page| kind_of(page) != kind);
            let end = end.unwrap_or(all.end).saturating_mul(PAGE_BYTES);
            Ok(Extent {
                length: end.min(offset + length) - offset,
                kind,
            })
        })
    }

    fn allocation(&self, offset: u64, length: u64) -> Result<Allocation, DiskError> {
        self.carry_out(Operation::Allocation, offset, length, |_, length| {
            Ok(Allocation {
                length,
                is_own: true,
            })
        })
    }

    fn below(&self) -> Option<&dyn BlockDevice> {
        None
    }

    fn start_writeback(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.carry_out(Operation::StartWriteback, offset, length, |_, _| Ok(()))
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.carry_out(Operation::Flush, 0, 0, |state, _| {
            for page in std::mem::take(&mut state.unflushed) {
                copy_page(&state.volatile, &mut state.durable, page);
            }
            Ok(())
        })
    }
}

/// Stops operations of a [`MemoryDisk`] until it is opened or dropped.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    id: u64,
}

impl Gate {
    /// Wait until `count` operations stand at the gate.
    ///
    /// # Panics
    ///
    /// After a minute in which they did not come.
    pub fn wait_reached(&self, count: usize) {
        let state = lock(&self.shared.state);
        let (state, _) = self
            .shared
            .gates_changed
            .wait_timeout_while(state, GATE_PATIENCE, |state| {
                state.gates[&self.id].waiting < count
            })
            .unwrap_or_else(PoisonError::into_inner);
        let waiting = state.gates[&self.id].waiting;
        drop(state);
        assert!(
            waiting >= count,
            "{waiting} of {count} operations reached the gate"
        );
    }

    /// How many operations stand at the gate.
    #[must_use]
    pub fn waiting(&self) -> usize {
        lock(&self.shared.state).gates[&self.id].waiting
    }

    /// Let everything through.
    pub fn open(self) {
        drop(self);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        lock(&self.shared.state).gates.remove(&self.id);
        self.shared.gates_changed.notify_all();
    }
}

/// Count an operation against the plans; the fault that is due: its number and its partial length.
fn take_fault(faults: &mut Vec<Fault>, operation: Operation) -> Option<(i32, u64)> {
    let mut due = None;
    faults.retain_mut(|fault| {
        if fault.operation != operation {
            return true;
        }
        if fault.nth > 1 {
            fault.nth -= 1;
            return true;
        }
        due.get_or_insert((fault.errno, fault.partial));
        fault.for_ever
    });
    due
}

fn pages(offset: u64, length: u64) -> Range<u64> {
    match length {
        0 => offset / PAGE_BYTES..offset / PAGE_BYTES,
        _ => offset / PAGE_BYTES..(offset + length).div_ceil(PAGE_BYTES),
    }
}

fn page_bytes(page: u64, disk_bytes: u64) -> Range<u64> {
    page * PAGE_BYTES..((page + 1) * PAGE_BYTES).min(disk_bytes)
}

/// The parts of a byte range that lie in one page each: page, where in it, where in the range.
fn parts(offset: u64, length: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    const PAGE: usize = PAGE_BYTES as usize;
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let skip = usize::try_from(at % PAGE_BYTES).expect("less than a page");
        let take = (PAGE - skip).min(length - done);
        let part = (at / PAGE_BYTES, skip..skip + take, done..done + take);
        done += take;
        (take > 0).then_some(part)
    })
}

fn get(image: &Image, offset: u64, buf: &mut [u8]) {
    for (page, inside, outside) in parts(offset, buf.len()) {
        match image.get(&page) {
            Some(Page::Data(data)) => buf[outside].copy_from_slice(&data[inside]),
            Some(Page::Zero) | None => buf[outside].fill(0),
        }
    }
}

fn put(image: &mut Image, offset: u64, buf: &[u8]) {
    for (page, inside, outside) in parts(offset, buf.len()) {
        let slot = image.entry(page).or_insert(Page::Zero);
        if let Page::Zero = slot {
            *slot = Page::Data(Box::new([0; PAGE_BYTES as usize]));
        }
        if let Page::Data(data) = slot {
            data[inside].copy_from_slice(&buf[outside]);
        }
    }
}

fn zero(image: &mut Image, bytes: &Range<u64>, disk_bytes: u64, unmap: Unmap) {
    for page in pages(bytes.start, bytes.end - bytes.start) {
        let all = page_bytes(page, disk_bytes);
        let from = all.start.max(bytes.start);
        let to = all.end.min(bytes.end);
        if (from, to) != (all.start, all.end) {
            let zeroes = [0; PAGE_BYTES as usize];
            let length = usize::try_from(to - from).expect("at most a page");
            put(image, from, &zeroes[..length]);
        } else if unmap == Unmap::May {
            image.remove(&page);
        } else {
            image.insert(page, Page::Zero);
        }
    }
}

fn copy_page(from: &Image, to: &mut Image, page: u64) {
    match from.get(&page) {
        Some(data) => to.insert(page, data.clone()),
        None => to.remove(&page),
    };
}

/// A poisoned lock is taken all the same: a test that failed must not fail its other threads.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
