//! Measures what a forecast needs, while a migration runs.

use std::time::{Duration, Instant};

use vmferry_disk::Lease;
use vmferry_savevm::{DirtyTotal, Progress};

use crate::convergence::{BusySpeed, Forecast, Meter, StallDetector};
use crate::engine::{Leases, TICK};

/// Measures what a forecast needs.
pub(crate) struct Watch {
    wire: BusySpeed,
    dirtied: Meter,
    pub(crate) dirty_rate: u64,
    ping: Option<Ping>,
    pings: u32,
    /// From a PING behind a pass to its PONG.
    sync: Option<Duration>,
    /// That PING had nothing before it to be written: it cannot be had any quicker.
    sync_is_best: bool,
    answered_at: Option<Instant>,
    stall: StallDetector,
    passes: u64,
}

struct Ping {
    value: u32,
    sent_at: Instant,
    /// Nothing was dirty, and nothing had been sent since the last answer.
    alone: bool,
}

impl Watch {
    pub(crate) fn new(leases: &Leases) -> Self {
        let now = Instant::now();
        Self {
            wire: BusySpeed::default(),
            dirtied: Meter::new(now, dirtied_bytes(leases)),
            dirty_rate: 0,
            ping: None,
            pings: 0,
            sync: None,
            sync_is_best: false,
            answered_at: None,
            stall: StallDetector::default(),
            passes: 0,
        }
    }

    /// An iteration has given so many bytes to the channel.
    pub(crate) fn iterated(&mut self, leases: &Leases, wire_bytes: u64, took: Duration) {
        self.wire.count(wire_bytes, took);
        let (now, dirtied) = (Instant::now(), dirtied_bytes(leases));
        self.dirtied.update(now, dirtied);
        self.dirty_rate = self.dirtied.bytes_per_second(now, dirtied);
    }

    pub(crate) fn bandwidth(&self) -> u64 {
        self.wire.bytes_per_second()
    }

    pub(crate) fn pong(&mut self, pong: Option<(u32, Instant)>) {
        let answered = |ping: &mut Ping| pong.is_some_and(|(value, _)| value == ping.value);
        if let Some(Ping { sent_at, alone, .. }) = self.ping.take_if(answered)
            && let Some((_, at)) = pong
        {
            self.sync = Some(at.saturating_duration_since(sent_at));
            self.sync_is_best = alone;
            self.answered_at = Some(at);
        }
    }

    /// One is sent when the bulk phase has ended, and then whenever the last one was answered and
    /// something was sent since. Where nothing is, it is still asked now and then: the sync that was
    /// measured may have been that of the whole bulk phase, which is over.
    pub(crate) fn wants_ping(&self, progress: Progress) -> bool {
        let is_stale = || self.answered_at.is_none_or(|at| at.elapsed() >= TICK);
        self.ping.is_none() && (progress != Progress::Finished || is_stale())
    }

    pub(crate) fn next_ping(&mut self, progress: Progress, dirty: &DirtyTotal) -> u32 {
        self.pings = self.pings % 0x1000_0000 + 1;
        self.ping = Some(Ping {
            value: self.pings,
            sent_at: Instant::now(),
            alone: self.sync.is_some() && is_idle(progress, dirty),
        });
        self.pings
    }

    pub(crate) fn forecast(&self, dirty: &DirtyTotal, two_way: bool) -> Option<Forecast> {
        let sync = if two_way { self.sync? } else { Duration::ZERO };
        Some(Forecast::new(
            dirty.bytes,
            dirty.read_time,
            self.bandwidth(),
            sync,
        ))
    }

    /// Waiting any longer cannot make the downtime shorter, whatever its limit is.
    pub(crate) fn is_at_best(&self, progress: Progress, dirty: &DirtyTotal) -> bool {
        self.sync_is_best && is_idle(progress, dirty)
    }

    pub(crate) fn pass_ended(&mut self, passes: u64, dirty_bytes: u64) -> bool {
        if passes != self.passes {
            self.passes = passes;
            self.stall.pass_ended(dirty_bytes);
        }
        self.stall.is_stalled()
    }
}

fn is_idle(progress: Progress, dirty: &DirtyTotal) -> bool {
    progress == Progress::Finished && dirty.bytes == 0
}

fn dirtied_bytes(leases: &Leases) -> u64 {
    let marked = |lease: &Lease| lease.node().dirty().marked();
    leases.iter().map(|(lease, _)| marked(lease)).sum::<u64>() * vmferry_disk::CHUNK_BYTES
}
