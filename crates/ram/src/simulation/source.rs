//! The guest at the source, and what the source does with its world: the log, the sink, the throttle.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fastrand::Rng;
use vmferry_savevm::{HandlerError, Sink};

use super::geometry::{Contents, End, Geometry, PAGE, Page, PageMap, SimRam};
use super::world::{World, lock};
use crate::{
    BlockIndex, DirtyLog, DirtyLogError, GuestRam, MarkedLog, Marker, PAGE_BYTES, RamBlock,
    Throttle,
};

/// Two periods of a second with too much written come before each change.
const THROTTLE_PERIODS_NS: u64 = 2_000_000_000;

/// The guest, and what is known of the migration without asking the source.
pub(super) struct Source {
    pub(super) ram: Arc<SimRam>,
    /// What memory holds.
    pub(super) truth: Contents,
    marker: Marker,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) runs: bool,
    interval_ns: u64,
    /// Pages are chosen from the first so many of a block, mostly.
    hot_pages: u64,
    throttle_percent: u8,
    throttled_at_ns: u64,
    /// Marked in the log, and not reported.
    pub(super) logged: PageMap<bool>,
    /// Never read by the source, or reported by the log since.
    pub(super) to_send: PageMap<bool>,
    pub(super) was_read: PageMap<bool>,
    last_read: Option<Page>,
    pub(super) writes: u64,
    pub(super) throttled: u64,
}

/// A vCPU does one thing at a time: a store, then maybe later the mark of it.
pub(super) struct Vcpu {
    pub(super) next_ns: u64,
    unmarked: Option<Page>,
}

impl Source {
    pub(super) fn new(geometry: &Geometry, interval_ns: u64, rng: &mut Rng) -> (Self, MarkedLog) {
        let ram = geometry.ram(End::Source);
        let log = MarkedLog::new(&*ram);
        let vcpus = (0..rng.u64(0..5)).map(|at| Vcpu {
            next_ns: at * 1000,
            unmarked: None,
        });
        let mut source = Self {
            marker: log.marker(),
            truth: Contents::zeroes(geometry),
            vcpus: vcpus.collect(),
            runs: true,
            interval_ns,
            hot_pages: rng.u64(1..8),
            throttle_percent: 0,
            throttled_at_ns: 0,
            logged: geometry.map(&false),
            to_send: geometry.map(&true),
            was_read: geometry.map(&false),
            last_read: None,
            writes: 0,
            throttled: 0,
            ram,
        };
        for (block, shape) in geometry.shapes.iter().enumerate() {
            for page in 0..shape.pages {
                if rng.bool() {
                    rng.fill(source.truth.page_mut((block, page)));
                    source.store((block, page), 0..PAGE);
                }
            }
        }
        (source, log)
    }

    /// The log was emptied: everything that travels must be sent.
    pub(super) fn migration_begins(&mut self, geometry: &Geometry) {
        self.logged = geometry.map(&false);
        self.to_send = geometry.map(&false);
        for page in geometry.pages() {
            self.to_send[page] = true;
        }
        self.was_read = geometry.map(&false);
        self.last_read = None;
    }

    pub(super) fn act(&mut self, vcpu: usize, now_ns: u64, geometry: &Geometry, rng: &mut Rng) {
        match self.vcpus[vcpu].unmarked.take() {
            Some(page) => self.mark(page),
            None => {
                let page = self.any_page(geometry, rng);
                self.write(Some(vcpu), page, rng);
            }
        }
        let interval_ns = self.interval_ns * 100 / u64::from(100 - self.throttle_percent);
        self.vcpus[vcpu].next_ns = now_ns + rng.u64(1..2 * interval_ns);
    }

    fn any_page(&self, geometry: &Geometry, rng: &mut Rng) -> Page {
        let block = rng.usize(..geometry.shapes.len());
        let pages = geometry.shapes[block].pages;
        match rng.u8(..4) {
            0 => (block, rng.u64(..pages)),
            _ => (block, rng.u64(..pages.min(self.hot_pages))),
        }
    }

    /// A store of any size; what is left of it is the mark, which `vcpu` may do later.
    pub(super) fn write(&mut self, vcpu: Option<usize>, page: Page, rng: &mut Rng) {
        self.writes += 1;
        let content = self.truth.page_mut(page);
        let word = rng.usize(..PAGE / 8) * 8;
        let changed = match rng.u8(..8) {
            0 => {
                rng.fill(content);
                0..PAGE
            }
            1 | 2 => {
                content.fill(0);
                0..PAGE
            }
            3 => word..word + 8,
            // Some values come again, as those of a lock or a counter do.
            5 | 6 => {
                let word = word % 32;
                content[word..word + 8].fill(1 + rng.u8(..2));
                word..word + 8
            }
            4 => {
                let end = (word + 8 * rng.usize(1..32)).min(PAGE);
                rng.fill(&mut content[word..end]);
                word..end
            }
            _ => {
                rng.fill(&mut content[word..word + 8]);
                word..word + 8
            }
        };
        self.store(page, changed);
        match vcpu {
            Some(vcpu) if rng.u8(..4) == 0 => self.vcpus[vcpu].unmarked = Some(page),
            _ => self.mark(page),
        }
    }

    fn store(&self, page: Page, bytes: Range<usize>) {
        let block = &self.ram.blocks()[page.0];
        let stored = block.write(
            page.1 * PAGE_BYTES + bytes.start as u64,
            &self.truth.page(page)[bytes],
        );
        stored.expect("in use");
    }

    fn mark(&mut self, page: Page) {
        let (block, offset) = (BlockIndex(page.0), page.1 * PAGE_BYTES);
        self.marker.mark(block, offset, PAGE_BYTES);
        self.logged[page] = true;
    }

    pub(super) fn is_unmarked(&self, page: Page) -> bool {
        self.vcpus.iter().any(|vcpu| vcpu.unmarked == Some(page))
    }

    /// Every vCPU ends what it does.
    pub(super) fn stop(&mut self) {
        self.runs = false;
        for vcpu in 0..self.vcpus.len() {
            if let Some(page) = self.vcpus[vcpu].unmarked.take() {
                self.mark(page);
            }
        }
    }

    pub(super) fn go_on(&mut self, now_ns: u64) {
        self.runs = true;
        for vcpu in &mut self.vcpus {
            vcpu.next_ns = now_ns + 1;
        }
    }

    /// The source is about to read a page, for whatever reason.
    pub(super) fn is_read(&mut self, page: Page) {
        assert!(
            self.to_send[page] || self.last_read == Some(page),
            "page {page:?} is sent, although it is not known to be dirty"
        );
        self.to_send[page] = false;
        self.was_read[page] = true;
        self.last_read = Some(page);
    }

    /// The log reports it.
    fn reported(&mut self, page: Page, geometry: &Geometry) {
        self.logged[page] = false;
        self.to_send[page] |= geometry.shapes[page.0].travels;
        self.last_read = None;
    }

    /// Nothing but the guest writes its memory.
    pub(super) fn check_memory(&self, geometry: &Geometry) {
        for (block, shape) in geometry.shapes.iter().enumerate() {
            for page in 0..shape.pages {
                let page = (block, page);
                assert!(
                    self.ram.page(page) == self.truth.page(page),
                    "{page:?} has changed"
                );
            }
        }
    }

    pub(super) fn throttle_percent(&self) -> u8 {
        self.throttle_percent
    }
}

/// The log of writes, in which more is written while it is read.
pub(super) struct SimLog {
    pub(super) inner: MarkedLog,
    pub(super) world: Arc<Mutex<World>>,
}

impl DirtyLog for SimLog {
    fn start(&mut self, ram: &dyn GuestRam) -> Result<(), DirtyLogError> {
        self.inner.start(ram)?;
        let world = &mut *lock(&self.world);
        world.source.migration_begins(&world.geometry);
        Ok(())
    }

    fn collect(
        &mut self,
        ram: &dyn GuestRam,
        dirty: &mut dyn FnMut(BlockIndex, Range<u64>),
    ) -> Result<(), DirtyLogError> {
        lock(&self.world).pass_a_moment();
        let world = Arc::clone(&self.world);
        self.inner.collect(ram, &mut |block, pages| {
            let world = &mut *lock(&world);
            for page in pages.clone() {
                world.source.reported((block.0, page), &world.geometry);
            }
            if world.rng.u8(..4) == 0 {
                let page = world.rng.u64(pages.clone());
                world.guest_writes_now((block.0, page));
            }
            dirty(block, pages);
        })?;
        lock(&self.world).pass_a_moment();
        Ok(())
    }

    fn stop(&mut self, ram: &dyn GuestRam) {
        self.inner.stop(ram);
    }
}

pub(super) struct SimSink(pub(super) Arc<Mutex<World>>);

impl Sink for SimSink {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        let mut world = lock(&self.0);
        for part in parts {
            world.put(part)?;
        }
        Ok(())
    }

    fn allowance(&self) -> u64 {
        let mut world = lock(&self.0);
        match world.rng.u8(..8) {
            0 => 0,
            1 => 1,
            2 => world.rng.u64(..100_000),
            _ => u64::MAX,
        }
    }

    fn check(&self) -> Result<(), HandlerError> {
        match lock(&self.0).link.is_cut {
            true => Err("cut".into()),
            false => Ok(()),
        }
    }
}

pub(super) struct SimThrottle(pub(super) Arc<Mutex<World>>);

impl Throttle for SimThrottle {
    fn set(&mut self, percent: u8) {
        let mut world = lock(&self.0);
        let now_ns = world.now_ns;
        let source = &mut world.source;
        if percent > 0 {
            assert!(
                percent > source.throttle_percent && percent <= 99,
                "{percent}"
            );
            let since_ns = now_ns - source.throttled_at_ns;
            assert!(
                since_ns >= THROTTLE_PERIODS_NS,
                "throttled again after {since_ns} ns"
            );
            source.throttled += 1;
        }
        (source.throttle_percent, source.throttled_at_ns) = (percent, now_ns);
    }
}

/// What time it is.
pub(super) fn clock(world: Arc<Mutex<World>>) -> impl Fn() -> Instant + Send {
    move || lock(&world).instant()
}

/// Told of an access of the source to its memory.
pub(super) fn hear(world: Arc<Mutex<World>>) -> impl Fn(&RamBlock, u64) {
    move |block, offset| {
        // What happens while the world is busy is done by the world.
        if let Ok(mut world) = world.try_lock()
            && let Some(block) = world.source.ram.index(block)
        {
            world.source_reads((block, offset / PAGE_BYTES));
        }
    }
}

pub(super) fn nanoseconds(ns: u64) -> Duration {
    Duration::from_nanos(ns)
}
