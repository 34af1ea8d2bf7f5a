//! An image that somebody broke: looked at, checked, mended, worked with.

#![no_main]

#[path = "qcow2/file.rs"]
mod file;
#[path = "qcow2/images.rs"]
mod images;
#[path = "qcow2/work.rs"]
mod work;

use std::alloc::System;

use cap::Cap;
use libfuzzer_sys::fuzz_target;
use vmferry_qcow2::{Repair, Storage, check};

use file::MemoryFile;
use images::{Input, wanted};
use work::{Work, open, read_ends, read_states};

/// Who asks for more than the limit is ended.
#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

/// Caches and buffers, however short the file is.
const MEMORY_BYTES: usize = 48 << 20;
/// Tables are no longer than the file; a check needs some bytes for each cluster of 512 bytes.
const MEMORY_FOR_EACH_BYTE: usize = 8;

/// What is clean once mended stays clean, and what can not be mended is known at once.
fn check_and_mend(file: &MemoryFile) {
    let before = check(file, Repair::None);
    let mended = file.copy();
    let report = check(&mended, Repair::Leaks);
    assert!(before.is_ok() || report.is_err());
    let Ok(report) = check(&mended, Repair::All) else {
        return;
    };
    let again = check(&mended, Repair::None).expect("it could be checked just now");
    let (first, then) = (report.findings.first(), again.findings.first());
    assert_eq!(
        report.is_clean(),
        again.is_clean(),
        "{first:?} …, then {then:?} …"
    );
    assert_eq!(
        report.total() - report.repaired,
        again.total(),
        "{first:?} …, then {then:?} …"
    );
    if let (true, Ok(disk)) = (again.is_clean(), open(&mended, false, false)) {
        // Guest data is what it was.
        if let Ok(unmended) = open(file, true, false) {
            assert!(read_ends(&unmended) == read_ends(&disk));
        }
    }
}

/// A panic needs memory to tell where it was.
fn lift_limit_in_panics() {
    let told = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let _ = MEMORY.set_limit(usize::MAX);
        told(panic);
    }));
}

fuzz_target!(init: lift_limit_in_panics(), |data: &[u8]| {
    let mut input = Input(data);
    let wanted = wanted(&mut input);
    let length = wanted.file.length().expect("it is in memory") as usize;
    let limit = MEMORY_BYTES + length * MEMORY_FOR_EACH_BYTE;
    MEMORY
        .set_limit(MEMORY.allocated() + limit)
        .expect("it is more than there is");
    check_and_mend(&wanted.file);
    if let Ok(disk) = open(&wanted.file, true, false) {
        read_ends(&disk);
        read_states(&disk);
        assert!(!wanted.is_good || !disk.snapshots().iter().any(|known| known.id.is_empty()));
    }
    let small = wanted.options & 1 != 0;
    match open(&wanted.file, false, small) {
        Ok(disk) => Work::new(&wanted.file, disk, wanted.is_good, small).run(&mut input),
        Err(error) => assert!(!wanted.is_good, "{error}"),
    }
    MEMORY.set_limit(usize::MAX).expect("it is the most");
});
