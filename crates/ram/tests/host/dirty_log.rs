//! No write is ever lost.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::thread;

use vmferry_ram::{BlockIndex, DirtyLog, GuestRam, MarkedLog, PAGE_BYTES, UserfaultLog};

use crate::{HUGE_BYTES, KINDS, Kind, Memory, rounds, seeded};

/// `None`, and a line that says so, if this kernel cannot.
pub(crate) fn userfault_log() -> Option<UserfaultLog> {
    UserfaultLog::new()
        .inspect_err(|error| println!("left out: {error}"))
        .ok()
}

pub(crate) fn collect(log: &mut dyn DirtyLog, memory: &Memory) -> BTreeSet<u64> {
    let mut all = BTreeSet::new();
    log.collect(&memory.ram, &mut |block, pages| {
        assert_eq!(block, BlockIndex(0));
        assert!(pages.start < pages.end && pages.end <= memory.block().pages());
        all.extend(pages);
    })
    .unwrap();
    all
}

/// The destination: what a precopy would have there.
pub(crate) struct Copy(Vec<u8>);

impl Copy {
    pub(crate) fn of(memory: &Memory) -> Self {
        let mut copy = vec![0; usize::try_from(memory.block().used_bytes()).unwrap()];
        memory.block().read(0, &mut copy).unwrap();
        Self(copy)
    }

    pub(crate) fn update(&mut self, memory: &Memory, pages: &BTreeSet<u64>) {
        for page in pages {
            let offset = page * PAGE_BYTES;
            let into = &mut self.0[usize::try_from(offset).unwrap()..][..4096];
            memory.block().read(offset, into).unwrap();
        }
    }

    pub(crate) fn first_difference(&self, memory: &Memory) -> Option<usize> {
        let now = Self::of(memory);
        (0..now.0.len() / 4096)
            .find(|page| now.0[page * 4096..][..4096] != self.0[page * 4096..][..4096])
    }
}

#[test]
fn reports_each_written_page_once() {
    let mut rng = seeded();
    for kind in KINDS {
        let Some(mut log) = userfault_log() else {
            return;
        };
        let bytes = 4 * HUGE_BYTES;
        let Some(memory) = Memory::new(kind, bytes, bytes) else {
            continue;
        };
        // Half of it is there before.
        for page in (0..bytes / 2).step_by(4096) {
            memory.set_word(page, 7);
        }
        log.start(&memory.ram).unwrap();
        assert_eq!(collect(&mut log, &memory), BTreeSet::new(), "{kind:?}");
        for _ in 0..rounds(20) {
            let pages = bytes / PAGE_BYTES;
            let most = if rng.bool() { 10 } else { pages };
            let count = rng.u64(0..most);
            let written: BTreeSet<_> = (0..count).map(|_| rng.u64(0..pages)).collect();
            for page in &written {
                memory.set_word(page * PAGE_BYTES + rng.u64(0..512) * 8, rng.u64(..));
            }
            // Reading is no writing.
            memory.word(rng.u64(0..pages) * PAGE_BYTES);
            let reported = collect(&mut log, &memory);
            if kind.page_bytes() == PAGE_BYTES {
                assert_eq!(reported, written, "{kind:?}");
            } else {
                let per_page = kind.page_bytes() / PAGE_BYTES;
                let whole = written.iter().flat_map(|page| {
                    let first = page - page % per_page;
                    first..first + per_page
                });
                assert_eq!(reported, whole.collect(), "{kind:?}");
            }
        }
    }
}

#[test]
fn loses_no_write_of_threads() {
    let mut rng = seeded();
    for kind in KINDS {
        let Some(mut log) = userfault_log() else {
            return;
        };
        let bytes = 4 * HUGE_BYTES;
        let Some(memory) = Memory::new(kind, bytes, bytes) else {
            continue;
        };
        for page in (0..bytes).step_by(3 * 4096) {
            memory.set_word(page, 7);
        }
        log.start(&memory.ram).unwrap();
        let mut copy = Copy::of(&memory);
        // Short ones, with a look after each: a page whose write was lost is soon written again.
        for sequence in 1..=rounds(40) {
            thread::scope(|scope| {
                let writers: Vec<_> = (0..3u64)
                    .map(|writer| {
                        let (seed, memory) = (rng.u64(..), &memory);
                        scope.spawn(move || {
                            let mut rng = fastrand::Rng::with_seed(seed);
                            for _ in 0..200 {
                                // A word of its own: what it wrote last must arrive.
                                let page = rng.u64(0..bytes / PAGE_BYTES);
                                memory.set_word(page * PAGE_BYTES + writer * 8, sequence);
                            }
                        })
                    })
                    .collect();
                while writers.iter().any(|writer| !writer.is_finished()) {
                    let dirty = collect(&mut log, &memory);
                    copy.update(&memory, &dirty);
                }
            });
            let dirty = collect(&mut log, &memory);
            copy.update(&memory, &dirty);
            assert_eq!(copy.first_difference(&memory), None, "{kind:?}");
        }
        assert_eq!(collect(&mut log, &memory), BTreeSet::new(), "{kind:?}");
    }
}

#[test]
fn sees_what_system_calls_write() {
    let Some(mut log) = userfault_log() else {
        return;
    };
    for kind in [Kind::Private, Kind::Shared] {
        let memory = Memory::new(kind, 16 << 12, 16 << 12).unwrap();
        log.start(&memory.ram).unwrap();
        let zero = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: it writes to memory that is mapped, and to which there is no reference.
        let read = unsafe {
            let start = memory.block().start().as_ptr().add(3 << 12);
            libc::read(zero.as_raw_fd(), start.cast(), 4097)
        };
        assert_eq!(read, 4097);
        assert_eq!(collect(&mut log, &memory), BTreeSet::from([3, 4]));
    }
}

#[test]
fn a_page_that_was_given_back_and_written_is_reported() {
    let Some(mut log) = userfault_log() else {
        return;
    };
    for kind in KINDS {
        let Some(memory) = Memory::new(kind, 2 * HUGE_BYTES, 2 * HUGE_BYTES) else {
            continue;
        };
        for page in 0..1024 {
            memory.set_word(page << 12, 7);
        }
        let mut marked = MarkedLog::new(&memory.ram);
        let marker = marked.marker();
        log.start(&memory.ram).unwrap();
        marked.start(&memory.ram).unwrap();
        let mut copy = Copy::of(&memory);
        memory.block().forget(0, HUGE_BYTES).unwrap();
        marker.mark(BlockIndex(0), 0, HUGE_BYTES);
        // Whether the log saw that or not, the mark tells.
        let mut dirty = collect(&mut log, &memory);
        dirty.extend(collect(&mut marked, &memory));
        copy.update(&memory, &dirty);
        assert_eq!(copy.first_difference(&memory), None, "{kind:?}");
        memory.word(5 << 12);
        memory.set_word(7 << 12, 1);
        let dirty = collect(&mut log, &memory);
        assert!(dirty.contains(&7), "{kind:?}");
        copy.update(&memory, &dirty);
        assert_eq!(copy.first_difference(&memory), None, "{kind:?}");
    }
}

#[test]
fn begins_anew_and_covers_what_a_block_grows_to() {
    let Some(mut log) = userfault_log() else {
        return;
    };
    let memory = Memory::new(Kind::Private, 4 << 12, 16 << 12).unwrap();
    let nothing = BTreeSet::new();
    let error = log.collect(&memory.ram, &mut |_, _| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "dirty log: scan RAM block 'pc.ram': the log was not started"
    );
    log.start(&memory.ram).unwrap();
    memory.set_word(0, 1);
    log.stop(&memory.ram);
    memory.set_word(4096, 1);
    assert!(log.collect(&memory.ram, &mut |_, _| ()).is_err());
    log.start(&memory.ram).unwrap();
    assert_eq!(collect(&mut log, &memory), nothing);
    memory.set_word(8192, 1);
    // Started again without a stop: from now on.
    log.start(&memory.ram).unwrap();
    assert_eq!(collect(&mut log, &memory), nothing);
    memory.set_word(0, 2);
    memory.ram.resize(BlockIndex(0), 16 << 12).unwrap();
    memory.set_word(15 << 12, 2);
    assert_eq!(collect(&mut log, &memory), BTreeSet::from([0, 15]));
    drop(log);
    memory.set_word(0, 3);
}
