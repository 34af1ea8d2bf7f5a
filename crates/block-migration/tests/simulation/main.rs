//! The schedule and both machines against one another, in one thread, on a virtual clock: a seeded
//! link that delivers in pieces and may break at any byte, seeded guests that write, fail and give
//! up, reads that end in any order. The invariants of `block-migration.md` §5 of the wire format
//! notes are checked after each step.
//!
//! `VMFERRY_SEED=n` runs schedule `n` alone; `VMFERRY_LONG=1` runs ten times as many.

mod checks;
mod disk;
mod migration;
mod target;
mod wire;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use fastrand::Rng;

use migration::{Faults, Outcome, migrate};
use target::{State, Targets};
use world::{World, lock};

const SCHEDULES: u64 = 10_000;

#[test]
fn ten_thousand_schedules() {
    if let Some(seed) = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
    {
        println!("{:?}", schedule(seed));
        return;
    }
    let schedules = match std::env::var_os("VMFERRY_LONG") {
        Some(_) => 10 * SCHEDULES,
        None => SCHEDULES,
    };
    let base = fastrand::u64(..u64::MAX / 2);
    println!("seeds from {base} on");
    let begun = std::time::Instant::now();
    let workers = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let totals = std::thread::scope(|scope| {
        let work =
            |first| move || run_seeds((base + first..base + schedules).step_by(workers as usize));
        let workers: Vec<_> = (0..workers).map(|first| scope.spawn(work(first))).collect();
        let joined = workers
            .into_iter()
            .map(|worker| worker.join().unwrap_or_else(|p| resume_unwind(p)));
        joined.reduce(Totals::plus).expect("a worker")
    });
    let Totals {
        outcomes,
        ticks,
        frames,
    } = totals;
    let rate = schedules as f64 / begun.elapsed().as_secs_f64();
    println!(
        "{schedules} schedules, {rate:.0} in a second, {ticks} steps, {frames} frames: {outcomes:?}"
    );
    for outcome in [
        Outcome::Completed,
        Outcome::Failed,
        Outcome::LostButArrived,
        Outcome::LostAndServedHere,
    ] {
        assert!(
            outcomes.contains_key(&outcome),
            "{outcome:?} never happened"
        );
    }
}

#[derive(Default)]
struct Totals {
    outcomes: BTreeMap<Outcome, u64>,
    ticks: u64,
    frames: u64,
}

impl Totals {
    fn plus(mut self, other: Self) -> Self {
        for (outcome, count) in other.outcomes {
            *self.outcomes.entry(outcome).or_default() += count;
        }
        self.ticks += other.ticks;
        self.frames += other.frames;
        self
    }
}

/// Up to the first that fails, whose seed is said.
fn run_seeds(seeds: impl Iterator<Item = u64>) -> Totals {
    let mut totals = Totals::default();
    for (index, seed) in seeds.enumerate() {
        match catch_unwind(AssertUnwindSafe(|| schedule(seed))) {
            Ok(report) => {
                *totals.outcomes.entry(report.outcome).or_default() += 1;
                totals.ticks += report.ticks;
                totals.frames += report.frames;
            }
            Err(panic) => {
                eprintln!("schedule {index} of its thread has failed: VMFERRY_SEED={seed}");
                resume_unwind(panic);
            }
        }
    }
    totals
}

#[derive(Debug)]
struct Report {
    outcome: Outcome,
    ticks: u64,
    frames: u64,
}

/// One migration that may fail, and if it has, another that must not.
fn schedule(seed: u64) -> Report {
    let mut rng = Rng::with_seed(seed);
    let world = World::new(rng.fork());
    let disks: Vec<_> = lock(&world).sides.iter().map(|s| s.disk.clone()).collect();
    let targets = Targets::new(&disks, &mut rng);
    let disk_bytes = disks.iter().map(|disk| disk.length).sum();
    let faults = Faults::seeded(&mut rng, disk_bytes);
    let (outcome, state) = migrate(&world, &targets, &faults, &mut rng);
    match outcome {
        Outcome::Completed | Outcome::LostButArrived => assert_eq!(state, State::Arrived),
        Outcome::Failed | Outcome::LostAndServedHere => {
            assert!(matches!(state, State::Failed(_)), "{state:?}");
            targets.disks.iter().for_each(|disk| disk.heal());
            lock(&world).writes_left += 10;
            lock(&world).read_fails_in = None;
            let (outcome, _) = migrate(&world, &targets, &Faults::default(), &mut rng);
            assert_eq!(outcome, Outcome::Completed, "the second try");
        }
    }
    let world = lock(&world);
    Report {
        outcome,
        ticks: world.figures.ticks,
        frames: world.figures.frames,
    }
}
