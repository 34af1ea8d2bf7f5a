//! What the tests of this crate share.

use std::cell::RefCell;

use crate::block::RamBlock;

/// Is told of accesses to guest memory, before they happen.
type Heard = Box<dyn Fn(&RamBlock, u64)>;

thread_local! {
    static HEARD: RefCell<Option<Heard>> = const { RefCell::new(None) };
}

/// Until this is dropped, a test hears of this thread's accesses to guest memory: what others do between
/// two of them can then be done in one thread.
pub(crate) struct HearAccesses(());

impl HearAccesses {
    pub(crate) fn begin(heard: impl Fn(&RamBlock, u64) + 'static) -> Self {
        HEARD.set(Some(Box::new(heard)));
        Self(())
    }
}

impl Drop for HearAccesses {
    fn drop(&mut self) {
        HEARD.set(None);
    }
}

/// Memory from `offset` on is about to be accessed. What is done meanwhile is not told.
pub(crate) fn accessed(block: &RamBlock, offset: u64) {
    HEARD.with(|heard| {
        if let Ok(heard) = heard.try_borrow_mut()
            && let Some(heard) = &*heard
        {
            heard(block, offset);
        }
    });
}

/// A generator with the seed of `VMFERRY_SEED`, or a random one; it is printed.
pub(crate) fn rng() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// How many rounds: so few, or with `VMFERRY_LONG=1` so many.
pub(crate) fn long(few: u32, many: u32) -> u32 {
    match std::env::var_os("VMFERRY_LONG") {
        Some(_) => many,
        None => few,
    }
}
