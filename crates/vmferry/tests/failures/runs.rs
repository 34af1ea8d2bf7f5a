//! Many runs, each with a seed of its own.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::peers::{long, seeded};

/// Runs at the same time.
const AT_ONCE: usize = 2;

/// Runs of a long test.
const LONG: u64 = 2000;

/// Does `run` so many times (more in long tests), or only the one that `VMFERRY_RUN` names by its seed. How often it
/// ended how is printed and returned.
pub(crate) fn many<K: Ord + Debug + Send>(
    count: u64,
    run: impl Fn(&mut fastrand::Rng) -> K + Sync,
) -> BTreeMap<K, u64> {
    let only = std::env::var("VMFERRY_RUN").ok();
    if let Some(seed) = only.and_then(|seed| seed.parse().ok()) {
        return BTreeMap::from([(run(&mut fastrand::Rng::with_seed(seed)), 1)]);
    }
    let begun = Instant::now();
    let seeds = Mutex::new(seeded());
    let left = AtomicU64::new(if long() { LONG } else { count });
    let ends = Mutex::new(BTreeMap::new());
    let work = || {
        let take = |left: u64| left.checked_sub(1);
        while left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, take)
            .is_ok()
        {
            let seed = seeds.lock().expect("nobody panics with it").u64(..);
            let mut rng = fastrand::Rng::with_seed(seed);
            match catch_unwind(AssertUnwindSafe(|| run(&mut rng))) {
                Ok(end) => {
                    let mut ends = ends.lock().expect("nobody panics with it");
                    *ends.entry(end).or_insert(0) += 1;
                }
                Err(panic) => {
                    eprintln!("this was VMFERRY_RUN={seed}");
                    left.store(0, Ordering::SeqCst);
                    resume_unwind(panic);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                resume_unwind(panic);
            }
        }
    });
    let ends = ends.into_inner().expect("nobody panicked with it");
    println!(
        "{} runs in {:.0?}",
        ends.values().sum::<u64>(),
        begun.elapsed()
    );
    for (end, count) in &ends {
        println!("{count:5} {end:?}");
    }
    ends
}
