//! Page faults that are answered here.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};
use vmferry_ram::{
    BlockIndex, PAGE_BYTES, Placed, RamBlock, Userfault, UserfaultError, check_postcopy,
};

use crate::{HUGE_BYTES, KINDS, Kind, Memory, permitted, rounds, seeded};

struct Stop(OwnedFd);

impl Stop {
    fn new() -> Self {
        Self(eventfd(0, EventfdFlags::CLOEXEC).unwrap())
    }

    fn fire(&self) {
        rustix::io::write(&self.0, &1u64.to_ne_bytes()).unwrap();
    }
}

/// What the page at `offset` is to hold.
fn content(block: &RamBlock, offset: u64) -> Vec<u8> {
    let words = offset / 8..(offset + block.page_bytes()) / 8;
    words.flat_map(|word| (word + 1).to_ne_bytes()).collect()
}

/// Answer faults until `stop`; gives the pages that were asked for.
fn serve(userfault: &Userfault, memory: &Memory, stop: &Stop) -> BTreeSet<u64> {
    let mut asked = BTreeSet::new();
    let mut faults = Vec::new();
    while userfault.wait(stop.0.as_fd(), &mut faults).unwrap() {
        for fault in &faults {
            let (index, offset) = fault.locate(&memory.ram).unwrap();
            assert_eq!(index, BlockIndex(0));
            assert!(!fault.is_protected);
            let block = memory.block();
            let placed = userfault.place(block, offset, &content(block, offset));
            assert_eq!(placed.unwrap() == Placed::Now, asked.insert(offset));
        }
    }
    assert_eq!(faults, []);
    asked
}

#[test]
fn whoever_touches_a_missing_page_gets_it() {
    for kind in KINDS {
        let Some(userfault) = permitted("postcopy", Userfault::open_missing()) else {
            return;
        };
        let bytes = 4 * HUGE_BYTES;
        let Some(memory) = Memory::new(kind, bytes, bytes) else {
            continue;
        };
        let block = memory.block();
        // Something was there, half of it in use.
        for page in (0..bytes / 2).step_by(4096) {
            memory.set_word(page, 7);
        }
        check_postcopy(&memory.ram).unwrap();
        block.forget(0, bytes).unwrap();
        assert_eq!(memory.word(0), 0, "{kind:?}");
        block.forget(0, bytes).unwrap();
        userfault.register(block).unwrap();

        let page_bytes = block.page_bytes();
        let last = bytes - page_bytes;
        assert_eq!(userfault.place_zero(block, last).unwrap(), Placed::Now);
        assert_eq!(
            userfault.place_zero(block, last).unwrap(),
            Placed::AlreadyThere
        );
        let stop = Stop::new();
        let asked = thread::scope(|scope| {
            let server = scope.spawn(|| serve(&userfault, &memory, &stop));
            let readers = (0..4u64).map(|reader| {
                let memory = &memory;
                scope.spawn(move || {
                    for page in (0..last).step_by(4096) {
                        let offset = page + reader * 8;
                        assert_eq!(memory.word(offset), offset / 8 + 1, "{kind:?}");
                    }
                    assert_eq!(memory.word(last), 0);
                })
            });
            let readers: Vec<_> = readers.collect();
            let ends: Vec<_> = readers
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect();
            stop.fire();
            let asked = server.join();
            ends.into_iter().for_each(Result::unwrap);
            asked.unwrap()
        });
        let all: BTreeSet<_> = (0..last)
            .step_by(usize::try_from(page_bytes).unwrap())
            .collect();
        assert_eq!(asked, all, "{kind:?}");
    }
}

#[test]
fn system_calls_wait_for_pages_too() {
    let Some(userfault) = permitted("postcopy", Userfault::open_missing()) else {
        return;
    };
    let memory = Memory::new(Kind::Private, 16 << 12, 16 << 12).unwrap();
    userfault.register(memory.block()).unwrap();
    let stop = Stop::new();
    let (asked, written) = thread::scope(|scope| {
        let server = scope.spawn(|| serve(&userfault, &memory, &stop));
        let file = tempfile::tempfile().unwrap();
        // SAFETY: it reads memory that is mapped, or waits for it.
        let written = unsafe {
            libc::write(
                file.as_raw_fd(),
                memory.block().start().as_ptr().add(4096).cast(),
                8192,
            )
        };
        stop.fire();
        (server.join().unwrap(), written)
    });
    assert_eq!(written, 8192);
    assert_eq!(asked, BTreeSet::from([4096, 8192]));
}

#[test]
fn a_forgotten_page_is_missing_again() {
    for kind in KINDS {
        let Some(userfault) = permitted("postcopy", Userfault::open_missing()) else {
            return;
        };
        let Some(memory) = Memory::new(kind, 2 * HUGE_BYTES, 2 * HUGE_BYTES) else {
            continue;
        };
        let block = memory.block();
        let page_bytes = block.page_bytes();
        userfault.register(block).unwrap();
        userfault.place_zero(block, page_bytes).unwrap();
        block.forget(page_bytes, page_bytes).unwrap();
        let page = content(block, page_bytes);
        assert_eq!(
            userfault.place(block, page_bytes, &page).unwrap(),
            Placed::Now
        );
        assert_eq!(memory.word(page_bytes), page_bytes / 8 + 1, "{kind:?}");
    }
}

#[test]
fn the_end_of_a_registration_lets_everybody_go_on() {
    let Some(userfault) = permitted("postcopy", Userfault::open_missing()) else {
        return;
    };
    let memory = Memory::new(Kind::Private, 4096, 4096).unwrap();
    for way in 0..2 {
        userfault.register(memory.block()).unwrap();
        let (stop, mut faults) = (Stop::new(), Vec::new());
        thread::scope(|scope| {
            let reader = scope.spawn(|| memory.word(0));
            assert!(userfault.wait(stop.0.as_fd(), &mut faults).unwrap());
            // Waking alone makes it fault again.
            userfault.wake(memory.block(), 0, 4096).unwrap();
            assert!(userfault.wait(stop.0.as_fd(), &mut faults).unwrap());
            match way {
                0 => userfault.unregister(memory.block()).unwrap(),
                _ => drop(userfault.place_zero(memory.block(), 0).unwrap()),
            }
            assert_eq!(reader.join().unwrap(), 0);
        });
        stop.fire();
        assert!(!userfault.wait(stop.0.as_fd(), &mut faults).unwrap());
        assert_eq!(faults, []);
        memory.block().forget(0, 4096).unwrap();
    }
}

#[test]
fn only_whole_host_pages_in_use_can_be_meant() {
    let Some(userfault) = permitted("postcopy", Userfault::open_missing()) else {
        return;
    };
    for (kind, used_bytes) in [(Kind::Private, 3 << 12), (Kind::Huge, HUGE_BYTES - 4096)] {
        let Some(memory) = Memory::new(kind, used_bytes, 2 * HUGE_BYTES) else {
            continue;
        };
        let block = memory.block();
        let page = vec![1; usize::try_from(block.page_bytes()).unwrap()];
        let whole = used_bytes.next_multiple_of(block.page_bytes());
        userfault.register(block).unwrap();
        // The last page in use, and all of it, even where half of it is not.
        let last = whole - block.page_bytes();
        assert_eq!(userfault.place(block, last, &page).unwrap(), Placed::Now);
        let wrong = |result: Result<(), UserfaultError>| {
            assert!(
                matches!(result, Err(UserfaultError::NoPages { .. })),
                "{result:?}"
            );
        };
        wrong(userfault.place(block, whole, &page).map(drop));
        wrong(userfault.place(block, 2 * HUGE_BYTES, &page).map(drop));
        let far = u64::MAX - block.page_bytes() + 1;
        wrong(userfault.place(block, far, &page).map(drop));
        wrong(userfault.place(block, 8, &page).map(drop));
        wrong(userfault.place(block, last, &page[8..]).map(drop));
        wrong(userfault.place(block, last, &[]).map(drop));
        wrong(userfault.place_zero(block, whole).map(drop));
        wrong(userfault.place_zero(block, 8).map(drop));
        wrong(userfault.wake(block, 8, block.page_bytes()));
        wrong(userfault.wake(block, 0, whole + block.page_bytes()));
        wrong(userfault.protect(block, 0, 8));
        wrong(userfault.protect(block, 0, 4 * HUGE_BYTES));
        wrong(block.forget(0, whole + block.page_bytes()));
        wrong(block.forget(far, block.page_bytes()));
        wrong(block.forget(0, 8));
        block.forget(last, 0).unwrap();
        assert_eq!(memory.word(last), u64::from_ne_bytes([1; 8]));
        userfault.unregister(block).unwrap();
    }
}

#[test]
fn a_block_belongs_to_one_userfaultfd() {
    let Some(first) = permitted("postcopy", Userfault::open_missing()) else {
        return;
    };
    let second = Userfault::open_missing().unwrap();
    let memory = Memory::new(Kind::Private, 4096, 4096).unwrap();
    first.register(memory.block()).unwrap();
    let error = second.register(memory.block()).unwrap_err().to_string();
    assert_eq!(
        error,
        "userfaultfd: register RAM block 'pc.ram': its memory is registered with another userfaultfd"
    );
    assert!(check_postcopy(&memory.ram).is_err());
    drop(first);
    second.register(memory.block()).unwrap();
    drop(second);
    check_postcopy(&memory.ram).unwrap();
}

/// The thread becomes another user, without capabilities. False if it may not.
fn become_nobody() -> bool {
    const NOBODY: libc::uid_t = 65534;
    // SAFETY: changes the credentials of this thread only, as the bare system call does.
    unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) == 0 }
}

#[test]
fn says_how_to_get_permission() {
    let allowed = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if allowed.is_ok_and(|value| value.trim() == "1") {
        println!("left out: every user may use userfaultfd here");
        return;
    }
    let as_nobody = thread::spawn(|| {
        become_nobody().then(|| {
            let memory = Memory::new(Kind::Private, 4096, 4096).unwrap();
            (
                check_postcopy(&memory.ram),
                Userfault::open_write_protect().map(drop),
                Userfault::open_write_protect_async().map(drop),
            )
        })
    });
    let Some((postcopy, snapshot, log)) = as_nobody.join().unwrap() else {
        println!("left out: the tests run as a user who cannot become another");
        return;
    };
    for refused in [postcopy, snapshot] {
        let Err(error @ UserfaultError::NotPermitted) = refused else {
            panic!("{refused:?}");
        };
        let message = error.to_string();
        for way in ["root", "vm.unprivileged_userfaultfd=1", "/dev/userfaultfd"] {
            assert!(message.contains(way), "{message}");
        }
    }
    // Nobody has to wait for anybody: everybody may.
    assert!(
        matches!(log, Ok(()) | Err(UserfaultError::Lacking { .. })),
        "{log:?}"
    );
}

/// A background snapshot: memory as it was when it was protected, while threads go on writing.
#[test]
fn a_protected_page_can_be_copied_before_it_is_written() {
    let mut rng = seeded();
    for kind in KINDS {
        let Some(userfault) = permitted("snapshot", Userfault::open_write_protect()) else {
            return;
        };
        let bytes = 4 * HUGE_BYTES;
        let Some(memory) = Memory::new(kind, bytes, bytes) else {
            continue;
        };
        let block = memory.block();
        // Not by reading: pages that nobody has touched yet shall be among them.
        let mut expected = vec![0; usize::try_from(bytes).unwrap()];
        for _ in 0..bytes / PAGE_BYTES / 2 {
            let (offset, value) = (rng.u64(0..bytes / 8) * 8, rng.u64(1..));
            memory.set_word(offset, value);
            expected[usize::try_from(offset).unwrap()..][..8].copy_from_slice(&value.to_ne_bytes());
        }

        userfault.register(block).unwrap();
        userfault.protect(block, 0, bytes).unwrap();
        let mut snapshot = vec![0; usize::try_from(bytes).unwrap()];
        let stop = Stop::new();
        thread::scope(|scope| {
            let writers: Vec<_> = (0..3)
                .map(|_| {
                    let (seed, memory) = (rng.u64(..), &memory);
                    scope.spawn(move || {
                        let mut rng = fastrand::Rng::with_seed(seed);
                        for _ in 0..rounds(3000) {
                            memory.set_word(rng.u64(0..bytes / 8) * 8, rng.u64(1..));
                        }
                    })
                })
                .collect();
            let copier =
                scope.spawn(|| copy_before_writes(&userfault, &memory, &stop, &mut snapshot));
            let ends: Vec<_> = writers
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect();
            stop.fire();
            copier.join().unwrap();
            ends.into_iter().for_each(Result::unwrap);
        });
        assert!(
            snapshot == expected,
            "{kind:?}: the snapshot has later writes"
        );
        block.read(0, &mut expected).unwrap();
        assert!(snapshot != expected, "{kind:?}: nothing was written");
    }
}

/// Copy each page before the first write to it goes on, and the rest at the end.
fn copy_before_writes(userfault: &Userfault, memory: &Memory, stop: &Stop, snapshot: &mut [u8]) {
    let block = memory.block();
    let page_bytes = usize::try_from(block.page_bytes()).unwrap();
    let pages = snapshot.len() / page_bytes;
    let mut copied = vec![false; pages];
    let mut copy = |page: usize| {
        let offset = (page * page_bytes) as u64;
        if !std::mem::replace(&mut copied[page], true) {
            let into = &mut snapshot[page * page_bytes..][..page_bytes];
            block.read(offset, into).unwrap();
            userfault
                .unprotect(block, offset, block.page_bytes())
                .unwrap();
        }
    };
    let mut faults = Vec::new();
    let mut next = 0;
    while userfault.wait(stop.0.as_fd(), &mut faults).unwrap() {
        for fault in &faults {
            assert!(fault.is_protected);
            let (_, offset) = fault.locate(&memory.ram).unwrap();
            copy(usize::try_from(offset).unwrap() / page_bytes);
        }
        // The background goes on beside it.
        copy(next);
        next = (next + 1) % pages;
    }
    (0..pages).for_each(copy);
}
