//! The only way in to a disk that a guest uses.
//!
//! A [`Node`] guards a [`BlockDevice`]. Guests come in with permits, migrations with a lease:
//!
//! ```text
//!             begin_read / begin_write                lease("migration")
//!   guest ────────────────────────────▶ Node ◀──────────────────────────── migration
//!           Refusal::Held: wait for the          Lease ── hold, drain, claim, read
//!           notice, then ask again                 │ leave()
//!                                                  ▼
//!                                               Leaving ── serve_on | give_up
//! ```
//!
//! Three rules make a migration lose nothing:
//!
//! 1. Asking whether writes are held and counting a write as in flight is one atomic step, so
//!    after [`Lease::hold`] and [`Lease::drain`] nothing writes any more.
//! 2. A [`WritePermit`] marks its range dirty when it is dropped: after the data is in place,
//!    before the guest can be told, and on every outcome (error, partial write, client gone).
//! 3. A migration reads, or asks what is allocated, only through a [`Claim`], and making a claim
//!    clears the dirty bits first. Every write is marked at all times, so tracking needs no start:
//!    a write that a claim's read has missed is marked after the claim.
//!
//! Dropping a [`Lease`] lifts its holds; dropping [`Leaving`] does not: from the moment a disk may
//! live elsewhere, only a decision lets guests back in.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::device::{Allocation, BlockDevice, Cached, DiskError, Extent, Limits, Unmap};
use crate::dirty::{Chunk, DirtyBitmap};

/// What guests have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hold {
    /// Nothing: requests run.
    Nothing,
    /// Writes, zero-writes and discards wait; reads and flushes run.
    Writes,
    /// Reads wait too: the disk may be live elsewhere.
    Everything,
}

/// Why a request may not run now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Ask again after the notice of [`Node::subscribe`].
    #[error("requests are held")]
    Held,
    /// The disk was given up; it lives elsewhere.
    #[error("the disk has moved away")]
    Departed,
    /// The range does not lie on the disk.
    #[error("the range reaches past the end of the disk")]
    PastEnd,
    /// A write to a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
}

/// A second user wanted what only one may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("in use by {user}")]
pub struct InUse {
    /// Who has it.
    pub user: &'static str,
}

/// Where a disk stands; the top bits of the gate.
const LEVEL_SHIFT: u32 = 62;
const LEVEL_DEPARTED: u64 = 3;
/// The rest of the gate counts writes in flight.
const WRITES_MASK: u64 = (1 << LEVEL_SHIFT) - 1;

impl Hold {
    fn level(self) -> u64 {
        match self {
            Self::Nothing => 0,
            Self::Writes => 1,
            Self::Everything => 2,
        }
    }
}

struct Occupancy {
    user: Option<&'static str>,
    /// The hold outside any lease: [`Hold::Writes`] while a disk waits for its migration.
    resting: Hold,
}

type Observer = Arc<dyn Fn() + Send + Sync>;

/// A disk with everything that guests and migrations need to share it.
pub struct Node {
    name: String,
    device: Box<dyn BlockDevice>,
    limits: Limits,
    gate: AtomicU64,
    dirty: DirtyBitmap,
    occupancy: Mutex<Occupancy>,
    drained: Condvar,
    drained_lock: Mutex<()>,
    observers: Mutex<(u64, Vec<(u64, Observer)>)>,
}

impl Node {
    /// Guard `device` under `name`. Guests start with `resting` held.
    #[must_use]
    pub fn new(name: impl Into<String>, device: Box<dyn BlockDevice>, resting: Hold) -> Arc<Self> {
        let limits = device.limits();
        Arc::new(Self {
            name: name.into(),
            limits,
            gate: AtomicU64::new(resting.level() << LEVEL_SHIFT),
            dirty: DirtyBitmap::new(limits.length),
            device,
            occupancy: Mutex::new(Occupancy {
                user: None,
                resting,
            }),
            drained: Condvar::new(),
            drained_lock: Mutex::new(()),
            observers: Mutex::new((0, Vec::new())),
        })
    }

    /// The name under which the disk is exported and migrated.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length and capabilities of the device.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What guests wait for now; `None` once the disk was given up.
    #[must_use]
    pub fn held(&self) -> Option<Hold> {
        match self.gate.load(Ordering::SeqCst) >> LEVEL_SHIFT {
            0 => Some(Hold::Nothing),
            1 => Some(Hold::Writes),
            2 => Some(Hold::Everything),
            _ => None,
        }
    }

    /// Who has the lease.
    #[must_use]
    pub fn user(&self) -> Option<&'static str> {
        lock(&self.occupancy).user
    }

    /// Chunks written since a migration last claimed them, and how often one became dirty.
    #[must_use]
    pub fn dirty(&self) -> &DirtyBitmap {
        &self.dirty
    }

    /// Ask to read, or to ask for the status of, a range.
    pub fn begin_read(self: &Arc<Self>, offset: u64, length: u64) -> Result<ReadPermit, Refusal> {
        self.check_range(offset, length)?;
        match self.gate.load(Ordering::SeqCst) >> LEVEL_SHIFT {
            0 | 1 => Ok(ReadPermit {
                node: Arc::clone(self),
                offset,
                length,
            }),
            LEVEL_DEPARTED => Err(Refusal::Departed),
            _ => Err(Refusal::Held),
        }
    }

    /// Ask to write, zero or discard a range. The write counts as in flight until the permit is
    /// used up or dropped.
    pub fn begin_write(self: &Arc<Self>, offset: u64, length: u64) -> Result<WritePermit, Refusal> {
        if self.limits.read_only {
            return Err(Refusal::ReadOnly);
        }
        self.check_range(offset, length)?;
        self.gate
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |gate| {
                (gate >> LEVEL_SHIFT == 0).then_some(gate + 1)
            })
            .map(|_| WritePermit {
                node: Arc::clone(self),
                offset,
                length,
            })
            .map_err(|gate| match gate >> LEVEL_SHIFT {
                LEVEL_DEPARTED => Refusal::Departed,
                _ => Refusal::Held,
            })
    }

    /// Make everything written so far durable. Never held.
    pub fn flush(&self) -> Result<(), DiskError> {
        self.device.flush()
    }

    /// Have `notice` called whenever holds change or the disk is given up, until the subscription
    /// is dropped. It must not block, and may come for nothing. Subscribe before you ask: a notice
    /// between a refusal and the subscription would be missed.
    pub fn subscribe(self: &Arc<Self>, notice: impl Fn() + Send + Sync + 'static) -> Subscription {
        let mut observers = lock(&self.observers);
        observers.0 += 1;
        let id = observers.0;
        observers.1.push((id, Arc::new(notice)));
        Subscription {
            node: Arc::clone(self),
            id,
        }
    }

    /// Take the disk for one migration. While the lease lives nobody else gets one, and nobody
    /// gets one for a disk that was given up.
    pub fn lease(self: &Arc<Self>, user: &'static str) -> Result<Lease, InUse> {
        let mut occupancy = lock(&self.occupancy);
        if let Some(user) = occupancy.user {
            return Err(InUse { user });
        }
        if self.held().is_none() {
            let user = "another host";
            return Err(InUse { user });
        }
        occupancy.user = Some(user);
        Ok(Lease {
            node: Arc::clone(self),
            lift_on_drop: true,
        })
    }

    fn check_range(&self, offset: u64, length: u64) -> Result<(), Refusal> {
        match offset.checked_add(length) {
            Some(end) if end <= self.limits.length => Ok(()),
            _ => Err(Refusal::PastEnd),
        }
    }

    /// Change what is held. A disk that was given up stays given up.
    fn set_level(&self, level: u64) {
        let _ = self
            .gate
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |gate| {
                let departed = gate >> LEVEL_SHIFT == LEVEL_DEPARTED;
                (!departed).then_some(gate & WRITES_MASK | level << LEVEL_SHIFT)
            });
    }

    fn notify(&self) {
        let observers: Vec<Observer> = lock(&self.observers)
            .1
            .iter()
            .map(|(_, observer)| Arc::clone(observer))
            .collect();
        for observer in observers {
            observer();
        }
    }

    fn writes_in_flight(&self) -> u64 {
        self.gate.load(Ordering::SeqCst) & WRITES_MASK
    }

    fn end_write(&self, offset: u64, length: u64) {
        self.dirty.mark(offset, length);
        let before = self.gate.fetch_sub(1, Ordering::SeqCst);
        if before & WRITES_MASK == 1 && before >> LEVEL_SHIFT != 0 {
            drop(lock(&self.drained_lock));
            self.drained.notify_all();
        }
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name)
            .field("limits", &self.limits)
            .field("held", &self.held())
            .field("user", &self.user())
            .finish_non_exhaustive()
    }
}

/// Leave to read one range.
#[derive(Debug)]
pub struct ReadPermit {
    node: Arc<Node>,
    offset: u64,
    length: u64,
}

impl ReadPermit {
    /// Read the range. `buf` has the permitted length.
    pub fn read(self, buf: &mut [u8]) -> Result<(), DiskError> {
        debug_assert_eq!(buf.len() as u64, self.length);
        self.node.device.read_at(buf, self.offset)
    }

    /// Read what is in memory from `skip` bytes into the range on.
    pub fn read_cached(&self, skip: u64, buf: &mut [u8]) -> Result<Cached, DiskError> {
        debug_assert!(skip + buf.len() as u64 <= self.length);
        self.node.device.read_cached_at(buf, self.offset + skip)
    }

    /// Read the rest of the range, from `skip` bytes into it on.
    pub fn read_rest(self, skip: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        debug_assert_eq!(skip + buf.len() as u64, self.length);
        self.node.device.read_at(buf, self.offset + skip)
    }

    /// What the `length` bytes from `skip` bytes into the range on are.
    pub fn status(&self, skip: u64, length: u64) -> Result<Extent, DiskError> {
        debug_assert!(skip + length <= self.length);
        self.node.device.status(self.offset + skip, length)
    }
}

/// Leave to write one range, once. Whatever becomes of it, the range is dirty afterwards.
#[derive(Debug)]
pub struct WritePermit {
    node: Arc<Node>,
    offset: u64,
    length: u64,
}

impl WritePermit {
    /// Write the range.
    ///
    /// # Panics
    ///
    /// If `buf` has not the permitted length: what lies outside of it would not be marked dirty.
    pub fn write(self, buf: &[u8]) -> Result<(), DiskError> {
        assert_eq!(buf.len() as u64, self.length);
        self.node.device.write_at(buf, self.offset)
    }

    /// Make the range zero.
    pub fn write_zeroes(self, unmap: Unmap, fast_only: bool) -> Result<(), DiskError> {
        self.node
            .device
            .write_zeroes(self.offset, self.length, unmap, fast_only)
    }

    /// Discard the range.
    pub fn discard(self) -> Result<(), DiskError> {
        self.node.device.discard(self.offset, self.length)
    }
}

impl Drop for WritePermit {
    fn drop(&mut self) {
        self.node.end_write(self.offset, self.length);
    }
}

/// Keeps a notice of [`Node::subscribe`] in place.
pub struct Subscription {
    node: Arc<Node>,
    id: u64,
}

impl std::fmt::Debug for Subscription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscription")
            .field("disk", &self.node.name)
            .finish_non_exhaustive()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        lock(&self.node.observers)
            .1
            .retain(|(id, _)| *id != self.id);
    }
}

/// A migration's hold on a disk. Dropping it puts everything back as it was.
#[derive(Debug)]
pub struct Lease {
    node: Arc<Node>,
    lift_on_drop: bool,
}

impl Lease {
    /// The disk.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Let no new write (or no new request at all) begin.
    pub fn hold(&self, hold: Hold) {
        self.node.set_level(hold.level());
        self.node.notify();
    }

    /// Wait at most `patience` for the writes in flight; true when there are none.
    #[must_use]
    pub fn drain(&self, patience: Duration) -> bool {
        let guard = lock(&self.node.drained_lock);
        let (_guard, _) = self
            .node
            .drained
            .wait_timeout_while(guard, patience, |()| self.node.writes_in_flight() != 0)
            .unwrap_or_else(PoisonError::into_inner);
        self.node.writes_in_flight() == 0
    }

    /// Number of chunks of the disk.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.node.dirty.chunks()
    }

    /// Clear the dirty bits of these chunks and be allowed to look at them.
    pub fn claim(&self, chunks: Range<u64>) -> Claim {
        self.claimer().claim(chunks)
    }

    /// A handle that can claim chunks, for the thread that reads them.
    #[must_use]
    pub fn claimer(&self) -> Claimer {
        Claimer {
            node: Arc::clone(&self.node),
        }
    }

    /// A handle that can fill the disk, for the thread that applies what arrives.
    #[must_use]
    pub fn filler(&self) -> Filler {
        Filler {
            node: Arc::clone(&self.node),
        }
    }

    /// A migration has filled the disk: it is live here from now on.
    pub fn arrive(self) {
        lock(&self.node.occupancy).resting = Hold::Nothing;
    }

    /// From here on the disk may live elsewhere: hold everything until somebody decides.
    pub fn leave(mut self) -> Leaving {
        self.lift_on_drop = false;
        self.hold(Hold::Everything);
        Leaving { lease: self }
    }

    /// Let the next lease come. Level and user change under one lock: a level that is set after
    /// the next user came would lift that user's holds.
    fn vacate(&self, level: impl FnOnce(Hold) -> u64) {
        let mut occupancy = lock(&self.node.occupancy);
        self.node.set_level(level(occupancy.resting));
        occupancy.user = None;
        drop(occupancy);
        self.node.notify();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.lift_on_drop {
            self.vacate(Hold::level);
        }
    }
}

/// A disk between two hosts. Dropping it leaves it held, for good.
#[derive(Debug)]
#[must_use = "a dropped `Leaving` holds its disk for good"]
pub struct Leaving {
    lease: Lease,
}

impl Leaving {
    /// The disk.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.lease.node
    }

    /// It did not leave: the disk lives here.
    pub fn serve_on(mut self) {
        lock(&self.lease.node.occupancy).resting = Hold::Nothing;
        self.lease.lift_on_drop = true;
    }

    /// It has left: requests fail from now on, here.
    pub fn give_up(self) {
        self.lease.vacate(|_| LEVEL_DEPARTED);
    }
}

/// The part of a lease that looks at the disk.
#[derive(Debug)]
pub struct Claimer {
    node: Arc<Node>,
}

impl Claimer {
    /// The disk.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Clear the dirty bits of these chunks and be allowed to look at them.
    pub fn claim(&self, chunks: Range<u64>) -> Claim {
        self.claim_with_lead(chunks, 0)
    }

    /// Like [`Claimer::claim`], and be allowed to read `lead_bytes` before the chunks too.
    ///
    /// The bits of the chunks before are not cleared: they are still sent by themselves. Whoever
    /// sends what was read in the order of the claims sends nothing stale: a write to the lead that
    /// the read has missed came after this claim, so its chunk's bit was set after it and the chunk
    /// is claimed again later.
    pub fn claim_with_lead(&self, chunks: Range<u64>, lead_bytes: u64) -> Claim {
        let chunks = chunks.start..chunks.end.min(self.node.dirty.chunks());
        self.node.dirty.clear(chunks.clone());
        Claim {
            node: Arc::clone(&self.node),
            chunks,
            lead_bytes,
        }
    }
}

/// The part of a lease that fills a disk while guests are held.
#[derive(Clone, Debug)]
pub struct Filler {
    node: Arc<Node>,
}

impl Filler {
    /// The disk.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &dyn BlockDevice {
        &*self.node.device
    }
}

/// Chunks whose dirty bits were cleared and that may now be looked at.
///
/// A write that the look misses marks its chunks again.
#[derive(Debug)]
#[must_use = "the dirty bits of a claim were cleared: its chunks must be read or reported"]
pub struct Claim {
    node: Arc<Node>,
    chunks: Range<u64>,
    lead_bytes: u64,
}

impl Claim {
    /// The claimed chunks.
    #[must_use]
    pub fn chunks(&self) -> Range<u64> {
        self.chunks.clone()
    }

    /// The disk.
    #[must_use]
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Bytes of the disk that may be looked at: the chunks, and the lead before them.
    #[must_use]
    pub fn bytes(&self) -> Range<u64> {
        let length = self.node.limits.length;
        let start = Chunk(self.chunks.start).start_bytes().min(length);
        start.saturating_sub(self.lead_bytes)..Chunk(self.chunks.end).start_bytes().min(length)
    }

    /// The run of bytes that starts at `offset`, which lies in the claim.
    pub fn extent(&self, offset: u64) -> Result<Extent, DiskError> {
        debug_assert!(self.bytes().contains(&offset));
        let left = self.bytes().end - offset;
        let extent = self.node.device.status(offset, left)?;
        Ok(Extent {
            // A cursor that follows extents must move on and stay inside, whatever a backend says.
            length: extent.length.min(left).max(1),
            ..extent
        })
    }

    /// Whose the run of bytes is that starts at `offset`, which lies in the claim.
    pub fn allocation(&self, offset: u64) -> Result<Allocation, DiskError> {
        debug_assert!(self.bytes().contains(&offset));
        let left = self.bytes().end - offset;
        let allocation = self.node.device.allocation(offset, left)?;
        Ok(Allocation {
            length: allocation.length.min(left).max(1),
            ..allocation
        })
    }

    /// Split the first `count` chunks off.
    pub fn split_front(&mut self, count: u64) -> Claim {
        let middle = self.chunks.start.saturating_add(count).min(self.chunks.end);
        let front = self.chunks.start..middle;
        self.chunks.start = middle;
        Claim {
            node: Arc::clone(&self.node),
            chunks: front,
            lead_bytes: std::mem::take(&mut self.lead_bytes),
        }
    }

    /// Read the claim; `buf` is as long as [`Claim::bytes`].
    pub fn read(&self, buf: &mut [u8]) -> Result<(), DiskError> {
        debug_assert_eq!(buf.len() as u64, self.bytes().end - self.bytes().start);
        self.node.device.read_at(buf, self.bytes().start)
    }

    /// Read what is in memory, from `skip` bytes into the claim on.
    pub fn read_cached(&self, skip: u64, buf: &mut [u8]) -> Result<Cached, DiskError> {
        debug_assert!(skip + buf.len() as u64 <= self.bytes().end - self.bytes().start);
        self.node
            .device
            .read_cached_at(buf, self.bytes().start + skip)
    }

    /// Give the chunks back unread: they are dirty.
    pub fn put_back(self) {
        self.node.dirty.put_back(self.chunks);
    }
}

/// A poisoned lock is taken all the same: what it guards is whole between statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
