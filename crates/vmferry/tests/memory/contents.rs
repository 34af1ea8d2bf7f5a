//! What lies in the memory of a guest that stands still.

use std::fs;

use serde_json::json;

use crate::peers::qemu::Qemu;

/// Where the guest sees no memory: the screen, and firmware.
const NO_MEMORY: std::ops::Range<usize> = 0xa_0000..0x10_0000;
const MEMORY_BYTES: usize = 64 << 20;

/// The memory of a guest that stands still, as its QEMU has it.
pub(crate) fn memory_of(qemu: &mut Qemu) -> Vec<u8> {
    let path = qemu.path("memory");
    let arguments = json!({"val": 0, "size": MEMORY_BYTES, "filename": path});
    qemu.qmp.execute("pmemsave", &arguments);
    fs::read(path).expect("it was saved")
}

pub(crate) fn assert_same_memory(what: &str, left: &[u8], right: &[u8]) {
    assert_eq!((left.len(), right.len()), (MEMORY_BYTES, MEMORY_BYTES));
    let pages = left.chunks(4096).zip(right.chunks(4096)).enumerate();
    let differs = |(page, (left, right)): &(usize, (&[u8], &[u8]))| {
        !NO_MEMORY.contains(&(page * 4096)) && left != right
    };
    let pages: Vec<usize> = pages.filter(differs).map(|(page, _)| page).collect();
    assert!(pages.is_empty(), "{what}: pages {pages:x?} differ");
}
