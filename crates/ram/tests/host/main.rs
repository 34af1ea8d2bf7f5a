//! Guest memory with this host's kernel: page faults, dirty logs, huge pages.
//!
//! What this host does not permit is left out, which the test says.

mod dirty_log;
mod kvm;
mod userfault;

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmferry_ram::{
    AnonymousRam, BlockLayout, GuestRam, PAGE_BYTES, RamBlock, Sharing, UserfaultError,
};
use vmferry_stream::Name;

const HUGE_BYTES: u64 = 2 << 20;
const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

/// What memory a block is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Private,
    /// Private, and the kernel may put huge pages under it.
    Transparent,
    Shared,
    Huge,
    SharedHuge,
}

const KINDS: [Kind; 5] = [
    Kind::Private,
    Kind::Transparent,
    Kind::Shared,
    Kind::Huge,
    Kind::SharedHuge,
];

impl Kind {
    fn page_bytes(self) -> u64 {
        match self {
            Self::Private | Self::Transparent | Self::Shared => PAGE_BYTES,
            Self::Huge | Self::SharedHuge => HUGE_BYTES,
        }
    }
}

/// Memory of one block, and the huge pages that were reserved for it.
struct Memory {
    ram: AnonymousRam,
    _reserved: Option<Reserved>,
}

impl Memory {
    /// `None`, and a line that says so, if this host has no such memory.
    fn new(kind: Kind, used_bytes: u64, max_bytes: u64) -> Option<Self> {
        let mut reserved = None;
        if kind.page_bytes() == HUGE_BYTES {
            reserved = Reserved::new(max_bytes / HUGE_BYTES);
            if reserved.is_none() {
                println!("left out: {kind:?}, no huge pages can be reserved in {RESERVED}");
                return None;
            }
        }
        let layout = BlockLayout {
            idstr: Name::new("pc.ram").unwrap(),
            used_bytes,
            max_bytes,
            page_bytes: kind.page_bytes(),
            guest_address: Some(0),
            sharing: match kind {
                Kind::Shared | Kind::SharedHuge => Sharing::Shared,
                Kind::Private | Kind::Transparent | Kind::Huge => Sharing::Private,
            },
        };
        let ram = AnonymousRam::with_layouts(vec![layout]).unwrap();
        let memory = Self {
            ram,
            _reserved: reserved,
        };
        match kind {
            Kind::Transparent => memory.block().allow_huge_pages(),
            _ => memory.block().forbid_huge_pages(),
        }
        Some(memory)
    }

    fn block(&self) -> &RamBlock {
        &self.ram.blocks()[0]
    }

    fn word(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.block().read(offset, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    fn set_word(&self, offset: u64, value: u64) {
        self.block().write(offset, &value.to_ne_bytes()).unwrap();
    }
}

/// Huge pages that were reserved; given back when dropped. One test at a time has some.
struct Reserved {
    pages: u64,
    _alone: MutexGuard<'static, ()>,
}

impl Reserved {
    fn new(pages: u64) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let before = reserved()?;
        fs::write(RESERVED, (before + pages).to_string()).ok()?;
        let this = Self {
            pages,
            _alone: alone,
        };
        (reserved()? >= before + pages).then_some(this)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let now = reserved().unwrap_or_default();
        let _ = fs::write(RESERVED, now.saturating_sub(self.pages).to_string());
    }
}

fn reserved() -> Option<u64> {
    fs::read_to_string(RESERVED).ok()?.trim().parse().ok()
}

/// `None`, and a line that says so, if this user may not, or the kernel cannot.
fn permitted<T>(what: &str, result: Result<T, UserfaultError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error @ (UserfaultError::NotPermitted | UserfaultError::Lacking { .. })) => {
            println!("left out: {what}: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// A random number generator whose seed is printed, or given by `VMFERRY_SEED`.
fn seeded() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED").map(|seed| seed.parse().expect("a number"));
    let seed = seed.unwrap_or_else(|_| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// Times as many in the long mode.
fn rounds(normal: u64) -> u64 {
    match std::env::var_os("VMFERRY_LONG") {
        Some(_) => normal * 20,
        None => normal,
    }
}
