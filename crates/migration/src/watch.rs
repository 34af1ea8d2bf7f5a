//! Measures what a forecast needs, while a migration runs.

use std::time::{Duration, Instant};

use vmferry_disk::Lease;
use vmferry_savevm::{DirtyTotal, Progress};

use crate::convergence::{Forecast, Meter, StallDetector};
use crate::engine::{Leases, TICK};

/// Measures what a forecast needs.
pub(crate) struct Watch {
    wire: Meter,
    dirtied: Meter,
    pub(crate) bandwidth: u64,
    pub(crate) dirty_rate: u64,
    ping: Option<(u32, Instant)>,
    pings: u32,
    /// From a PING behind a pass to its PONG.
    sync: Option<Duration>,
    answered_at: Option<Instant>,
    stall: StallDetector,
    passes: u64,
}

impl Watch {
    pub(crate) fn new(leases: &Leases, wire_bytes: u64) -> Self {
        let now = Instant::now();
        Self {
            wire: Meter::new(now, wire_bytes),
            dirtied: Meter::new(now, dirtied_bytes(leases)),
            bandwidth: 0,
            dirty_rate: 0,
            ping: None,
            pings: 0,
            sync: None,
            answered_at: None,
            stall: StallDetector::default(),
            passes: 0,
        }
    }

    pub(crate) fn measure(&mut self, leases: &Leases, wire_bytes: u64) {
        let now = Instant::now();
        self.wire.update(now, wire_bytes);
        let dirtied = dirtied_bytes(leases);
        self.dirtied.update(now, dirtied);
        self.dirty_rate = self.dirtied.bytes_per_second(now, dirtied);
        // The speed of an idle channel says nothing of what it could do: the best is remembered.
        self.bandwidth = self
            .bandwidth
            .max(self.wire.bytes_per_second(now, wire_bytes));
    }

    pub(crate) fn pong(&mut self, pong: Option<(u32, Instant)>) {
        if let (Some((value, at)), Some((asked, since))) = (pong, self.ping)
            && value == asked
        {
            self.sync = Some(at.saturating_duration_since(since));
            self.answered_at = Some(at);
            self.ping = None;
        }
    }

    /// One is sent when the bulk phase has ended, and then whenever the last one was answered and
    /// something was sent since. Where nothing is, it is still asked now and then: the sync that was
    /// measured may have been that of the whole bulk phase, which is over.
    pub(crate) fn wants_ping(&self, progress: Progress) -> bool {
        let is_stale = || self.answered_at.is_none_or(|at| at.elapsed() >= TICK);
        self.ping.is_none() && (progress != Progress::Finished || is_stale())
    }

    pub(crate) fn next_ping(&mut self) -> u32 {
        self.pings = self.pings % 0x1000_0000 + 1;
        self.ping = Some((self.pings, Instant::now()));
        self.pings
    }

    pub(crate) fn forecast(&self, dirty: &DirtyTotal, two_way: bool) -> Option<Forecast> {
        let sync = if two_way { self.sync? } else { Duration::ZERO };
        Some(Forecast::new(
            dirty.bytes,
            dirty.read_time,
            self.bandwidth,
            sync,
        ))
    }

    pub(crate) fn pass_ended(&mut self, passes: u64, dirty_bytes: u64) -> bool {
        if passes != self.passes {
            self.passes = passes;
            self.stall.pass_ended(dirty_bytes);
        }
        self.stall.is_stalled()
    }
}

fn dirtied_bytes(leases: &Leases) -> u64 {
    let marked = |lease: &Lease| lease.node().dirty().marked();
    leases.iter().map(|(lease, _)| marked(lease)).sum::<u64>() * vmferry_disk::CHUNK_BYTES
}
