//! Source and destination against one another, in one thread, on a virtual clock.
//!
//! ```text
//!   vCPUs ─ write ─▶ MarkedLog ─▶ RamSource ─▶ Iterating, Switching, … ─▶ link ─▶ LoadMachine ─▶ RamDestination
//!                                     ▲                            │ ear                             │ kernel
//!                                     └── requests, bitmaps ◀──────┴───── link ◀── faults ◀── vCPUs, devices
//! ```
//!
//! Everything is the shipped code but the link, the guests, the clock, and the kernel that places
//! pages. The guest writes between any two accesses of the source to its memory, inside a look at the
//! dirty log, and between a store and the mark of it. The link has a rate, a latency and a window, and
//! breaks at any byte, also while a broken postcopy is being taken up again.
//!
//! | invariant | where |
//! |---|---|
//! | a page that was sent and is not known to be dirty is at the destination as it is here | [`world::World::check_precopy`] |
//! | discarded is exactly what was never sent or was dirtied since, in whole host pages | [`ear::Ear`] |
//! | after the switch, and on each new connection, exactly what is missing is sent, each page once | [`ear::Ear`] |
//! | a request goes first; no page is asked for twice on a connection, or when it is there | [`world`], [`target`] |
//! | whoever touches memory at the destination finds what must be there | [`target`] |
//! | before the package nothing is lost at the source, after it nothing at the destination | [`migration`] |
//! | everything ends: no wait without an event, bounded steps, bounded time | [`world::World::step`] |
//!
//! `VMFERRY_SEED=n VMFERRY_RUN=1` runs schedule `n` alone; `VMFERRY_LONG=1` runs 50,000.

mod ear;
mod geometry;
mod kernel;
mod link;
mod migration;
mod source;
mod target;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use fastrand::Rng;

use migration::Outcome;

const SCHEDULES: u64 = 3_000;
const SCHEDULES_LONG: u64 = 50_000;

#[test]
fn every_schedule_ends_well() {
    let seed = std::env::var("VMFERRY_SEED").ok();
    let seed = seed.and_then(|seed| seed.parse::<u64>().ok());
    let base = seed.unwrap_or_else(|| fastrand::u64(..u64::MAX / 2));
    println!("VMFERRY_SEED={base}: schedules from this number on");
    if std::env::var_os("VMFERRY_RUN").is_some() {
        println!("{:#?}", schedule(base));
        return;
    }
    let schedules = match std::env::var_os("VMFERRY_LONG") {
        Some(_) => SCHEDULES_LONG,
        None => SCHEDULES,
    };
    let begun = std::time::Instant::now();
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let totals = std::thread::scope(|scope| {
        let run =
            |first| move || run_all((base + first..base + schedules).step_by(workers as usize));
        let workers: Vec<_> = (0..workers).map(|first| scope.spawn(run(first))).collect();
        let joined = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        joined.reduce(Totals::plus).expect("a worker")
    });
    println!(
        "{schedules} schedules in {:?}: {totals:#?}",
        begun.elapsed()
    );
    for outcome in Outcome::ALL {
        let count = totals.outcomes.get(&outcome);
        assert!(count.is_some(), "{outcome:?} never happened");
    }
    let Figures {
        breaks,
        requests,
        xbzrle_pages,
        throttled,
        revived,
        torn_host_pages,
        ..
    } = totals.figures;
    for figure in [
        breaks,
        requests,
        xbzrle_pages,
        throttled,
        revived,
        torn_host_pages,
    ] {
        assert!(figure > 0, "something never happened");
    }
}

/// What happened, to see that it does happen.
#[derive(Clone, Copy, Debug, Default)]
struct Figures {
    events: u64,
    virtual_seconds: u64,
    guest_writes: u64,
    /// Writes between two accesses of the source, or inside a look at the log.
    interleaved_writes: u64,
    pages: u64,
    xbzrle_pages: u64,
    throttled: u64,
    breaks: u64,
    recoveries: u64,
    requests: u64,
    faults: u64,
    /// Pages that were given back and touched again.
    revived: u64,
    /// Connections that broke inside a host page.
    torn_host_pages: u64,
}

#[derive(Debug, Default)]
struct Totals {
    outcomes: BTreeMap<Outcome, u64>,
    figures: Figures,
}

impl Totals {
    fn plus(mut self, other: Self) -> Self {
        for (outcome, count) in other.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
        self.figures.add(&other.figures);
        self
    }
}

impl Figures {
    fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.virtual_seconds += other.virtual_seconds;
        self.guest_writes += other.guest_writes;
        self.interleaved_writes += other.interleaved_writes;
        self.pages += other.pages;
        self.xbzrle_pages += other.xbzrle_pages;
        self.throttled += other.throttled;
        self.breaks += other.breaks;
        self.recoveries += other.recoveries;
        self.requests += other.requests;
        self.faults += other.faults;
        self.revived += other.revived;
        self.torn_host_pages += other.torn_host_pages;
    }
}

/// Up to the first that fails, whose number is said.
fn run_all(seeds: impl Iterator<Item = u64>) -> Totals {
    let mut totals = Totals::default();
    for (index, seed) in seeds.enumerate() {
        match catch_unwind(AssertUnwindSafe(|| schedule(seed))) {
            Ok((outcomes, figures)) => {
                for outcome in outcomes {
                    *totals.outcomes.entry(outcome).or_default() += 1;
                }
                totals.figures.add(&figures);
            }
            Err(panic) => {
                eprintln!(
                    "schedule {index} of its thread has failed: VMFERRY_SEED={seed} VMFERRY_RUN=1"
                );
                resume_unwind(panic);
            }
        }
    }
    totals
}

/// One migration in which anything may go wrong, and if the guest is here still, another that must
/// succeed.
fn schedule(seed: u64) -> (Vec<Outcome>, Figures) {
    migration::Machine::new(Rng::with_seed(seed)).run()
}
