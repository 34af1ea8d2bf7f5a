//! Lets the guest's threads run, and stops them.
//!
//! Each thread does its work in steps, and each step in two halves:
//!
//! ```text
//!   look ─▶ begin ─▶ act ─▶ look …
//!    │        └ None: the guest was stopped since; look again when it runs
//!    └ changes nothing; may wait for a page that is still at the source, or for a disk that is held
//! ```
//!
//! Stopping waits for threads that act, never for one that looks. So it takes a moment, whatever a
//! page fault or a migration of disks has to wait for, and nothing changes once it is done.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What a thread of the guest does: a vCPU, or a device.
pub(crate) trait Work: Send + 'static {
    /// What was decided by looking.
    type Deed;

    /// Find out what to do next. Changes nothing.
    ///
    /// # Errors
    /// A self-check has failed. That counts only if the guest was not stopped meanwhile: then
    /// somebody may have loaded another state.
    fn look(&mut self) -> Result<Next<Self::Deed>, Broken>;

    /// Do it. Waits for nothing but the host's disks.
    fn act(&mut self, deed: Self::Deed);
}

/// What there is to do.
pub(crate) enum Next<D> {
    Do(D),
    /// Nothing before the next [`Station::notify`], or before so much time has passed.
    Wait(Option<Duration>),
}

/// The guest has found something that must not be: says what, where.
#[derive(Debug, PartialEq)]
pub(crate) struct Broken(pub(crate) String);

/// All threads of a guest.
#[derive(Default)]
pub(crate) struct Gate {
    threads: Mutex<Vec<Thread>>,
}

struct Thread {
    station: Arc<Station>,
    handle: JoinHandle<()>,
}

/// Where one thread waits.
#[derive(Default)]
pub(crate) struct Station {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    runs: bool,
    ended: bool,
    acting: bool,
    /// Counts how often the guest was stopped: what was seen before is not true any more.
    stops: u64,
    /// Counts reasons to look again.
    notices: u64,
    /// Steps in each [`SLICE`]; `None` is as fast as it goes.
    pace: Option<u32>,
    throttle_percent: u8,
}

/// A thread's pace is kept over such a time.
const SLICE: Duration = Duration::from_millis(10);
/// What a step costs: with so many percent a vCPU does all its steps.
const STEP_CREDIT: u32 = 100;

impl Gate {
    /// Start a thread that does `work` at `station` whenever the guest runs.
    pub(crate) fn start<W: Work>(
        &self,
        name: String,
        station: Arc<Station>,
        mut work: W,
    ) -> std::io::Result<()> {
        let here = Arc::clone(&station);
        let mut credit = 0;
        let run = move || while here.slice(&name, &mut work, &mut credit) {};
        let handle = std::thread::Builder::new().spawn(run)?;
        lock(&self.threads).push(Thread { station, handle });
        Ok(())
    }

    pub(crate) fn run(&self) {
        for Thread { station, .. } in &*lock(&self.threads) {
            station.change(|state| state.runs = true);
        }
    }

    /// When this returns nothing changes any more.
    pub(crate) fn stop(&self) {
        let threads = lock(&self.threads);
        for Thread { station, .. } in &*threads {
            station.change(|state| {
                state.runs = false;
                state.stops += 1;
            });
        }
        for Thread { station, .. } in &*threads {
            drop(station.wait_while(|state| state.acting));
        }
    }

    /// Let vCPUs stand still for so much of the time.
    pub(crate) fn throttle(&self, percent: u8) {
        for Thread { station, .. } in &*lock(&self.threads) {
            station.change(|state| state.throttle_percent = percent);
        }
    }
}

/// Ends all threads.
impl Drop for Gate {
    fn drop(&mut self) {
        let threads = std::mem::take(&mut *lock(&self.threads));
        for Thread { station, .. } in &threads {
            station.change(|state| state.ended = true);
        }
        for Thread { handle, .. } in threads {
            // One that has panicked has ended, too.
            let _ = handle.join();
        }
    }
}

impl Station {
    /// A place for a vCPU, which does so many steps a second, and can be throttled.
    pub(crate) fn with_speed(steps_per_second: u32) -> Self {
        let station = Self::default();
        let slices_per_second = 1000 / SLICE.as_millis() as u32;
        lock(&station.state).pace = Some((steps_per_second / slices_per_second).max(1));
        station
    }

    /// There may be something to do.
    pub(crate) fn notify(&self) {
        self.change(|state| state.notices += 1);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    fn wait_while(&self, condition: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let state = lock(&self.state);
        let waited = self.changed.wait_while(state, |state| condition(state));
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Self::wait_while`], at most so long.
    fn wait_while_for(&self, patience: Option<Duration>, condition: impl Fn(&State) -> bool) {
        let Some(patience) = patience else {
            return drop(self.wait_while(condition));
        };
        let state = lock(&self.state);
        drop(
            self.changed
                .wait_timeout_while(state, patience, |state| condition(state)),
        );
    }

    /// Work for the time of a slice; false if there shall be no other. `credit` is what the pace still
    /// allows, in hundredths of a step.
    fn slice(&self, name: &str, work: &mut impl Work, credit: &mut u32) -> bool {
        let slice_end = Instant::now() + SLICE;
        let mut is_paid = false;
        loop {
            let (stops, notices, pace, percent) = {
                let state = self.wait_while(|state| !state.runs && !state.ended);
                if state.ended {
                    return false;
                }
                (
                    state.stops,
                    state.notices,
                    state.pace,
                    u32::from(state.throttle_percent),
                )
            };
            if let Some(pace) = pace {
                if !std::mem::replace(&mut is_paid, true) {
                    *credit = (*credit % STEP_CREDIT) + pace * (STEP_CREDIT - percent);
                }
                if *credit < STEP_CREDIT {
                    let rest = slice_end.saturating_duration_since(Instant::now());
                    self.wait_while_for(Some(rest), |state| state.runs && !state.ended);
                    return true;
                }
                *credit -= STEP_CREDIT;
            }
            let next = work.look();
            if let Ok(Next::Wait(patience)) = next {
                let is_idle =
                    |state: &State| state.runs && !state.ended && state.notices == notices;
                self.wait_while_for(patience, is_idle);
                continue;
            }
            let Some(acting) = self.begin(stops) else {
                continue;
            };
            match next {
                Ok(Next::Do(deed)) => work.act(deed),
                Ok(Next::Wait(_)) => {}
                Err(Broken(what)) => die(name, &what),
            }
            drop(acting);
        }
    }

    fn begin(&self, stops: u64) -> Option<Acting<'_>> {
        let mut state = lock(&self.state);
        (state.runs && state.stops == stops).then(|| {
            state.acting = true;
            Acting(self)
        })
    }
}

/// The guest is not stopped while this lives.
struct Acting<'a>(&'a Station);

impl Drop for Acting<'_> {
    fn drop(&mut self) {
        self.0.change(|state| state.acting = false);
    }
}

/// The guest is broken, and with it whatever migrated it. Nothing that could hide it may follow.
pub(crate) fn die(name: &str, what: &str) -> ! {
    eprintln!("{name}: self-check failed: {what}");
    std::process::abort()
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
