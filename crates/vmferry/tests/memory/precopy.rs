//! Precopy from and into real QEMUs.

use std::fs;

use serde_json::json;

use crate::checker::{Checker, UNUSED};
use crate::halfway::{Fresh, Halfway, Way, capabilities};
use crate::layout::Layout;
use crate::need;
use crate::peers::qemu::{Qemu, Version};

/// Where the guest sees no memory: the screen, and firmware.
const NO_MEMORY: std::ops::Range<usize> = 0xa_0000..0x10_0000;
const MEMORY_BYTES: usize = 64 << 20;

/// The memory of a guest that stands still, as its QEMU has it.
fn memory_of(qemu: &mut Qemu) -> Vec<u8> {
    let path = qemu.path("memory");
    let arguments = json!({"val": 0, "size": MEMORY_BYTES, "filename": path});
    qemu.qmp.execute("pmemsave", &arguments);
    fs::read(path).expect("it was saved")
}

fn assert_same_memory(what: &str, left: &[u8], right: &[u8]) {
    assert_eq!((left.len(), right.len()), (MEMORY_BYTES, MEMORY_BYTES));
    let pages = left.chunks(4096).zip(right.chunks(4096)).enumerate();
    let differs = |(page, (left, right)): &(usize, (&[u8], &[u8]))| {
        !NO_MEMORY.contains(&(page * 4096)) && left != right
    };
    let pages: Vec<usize> = pages.filter(differs).map(|(page, _)| page).collect();
    assert!(pages.is_empty(), "{what}: pages {pages:x?} differ");
}

/// A guest that stands still has the same memory in one QEMU, here, and in the other; there it goes on.
#[test]
fn memory_stays_the_same_from_qemu_to_qemu() {
    use Version::{V7_2, V10_0};
    for (from, to) in [(V7_2, V10_0), (V10_0, V7_2)] {
        let mut checker = Checker::new();
        let layout = Layout::of(need!(checker.host(from)));
        let mut source = need!(checker.host(from)).start();
        checker.goes_on(3);
        source.qmp.execute("stop", &json!({}));
        let before = memory_of(&mut source);
        let (here, went) = Halfway::take(&mut source, &layout, &Way::precopy());
        println!("{:?}", went.status.ram);
        assert_same_memory("received", &before, &here.bytes("pc.ram"));
        drop(source);

        let mut fresh = Fresh::start(need!(checker.host(to)));
        let went = here.put(&mut fresh, &Way::precopy());
        println!("{:?}", went.status.ram);
        assert_eq!(fresh.qemu.run_state(), "paused");
        assert_same_memory("sent", &before, &memory_of(&mut fresh.qemu));
        fresh.qemu.qmp.execute("cont", &json!({}));
        checker.goes_on(3);
    }
}

/// Memory that its guest writes all the time comes as it was when the guest stopped, changes and compressed pages
/// included.
#[test]
fn memory_of_a_running_guest_comes_from_qemu() {
    use Version::{V7_2, V10_0};
    for (version, capability) in [(V10_0, "xbzrle"), (V7_2, "xbzrle"), (V7_2, "compress")] {
        println!("{version:?}: {capability}");
        let mut checker = Checker::new();
        let layout = Layout::of(need!(checker.host(version)));
        let mut source = need!(checker.host(version)).start();
        checker.goes_on(3);
        capabilities(&mut source, &[(capability, true)]);
        let way = Way {
            passes: 4,
            ..Way::precopy()
        };
        let (here, went) = Halfway::take(&mut source, &layout, &way);
        let ram = went.status.ram.expect("memory came");
        println!("{ram:?}");
        match capability {
            "xbzrle" => assert!(ram.xbzrle_pages > 0, "{ram:?}"),
            // The first page of each block comes as it is.
            _ => assert!(ram.normal_pages < 100, "{ram:?}"),
        }
        assert_same_memory("received", &memory_of(&mut source), &here.bytes("pc.ram"));
        drop(source);

        let mut fresh = Fresh::start(need!(checker.host(version)));
        here.put(&mut fresh, &Way::precopy());
        checker.goes_on(3);
    }
}

/// Memory that is written here all the time comes into a QEMU as it was when that ended.
#[test]
fn memory_that_changes_here_comes_into_qemu() {
    for version in [Version::V7_2, Version::V10_0] {
        for xbzrle_cache_bytes in [None, Some(16 << 20)] {
            let mut checker = Checker::new();
            let layout = Layout::of(need!(checker.host(version)));
            let mut source = need!(checker.host(version)).start();
            checker.goes_on(3);
            source.qmp.execute("stop", &json!({}));
            let (here, _) = Halfway::take(&mut source, &layout, &Way::precopy());
            drop(source);

            let mut fresh = Fresh::start(need!(checker.host(version)));
            here.write_to(UNUSED);
            let way = Way {
                passes: 4,
                xbzrle_cache_bytes,
                ..Way::precopy()
            };
            let went = here.put(&mut fresh, &way);
            let ram = went.status.ram.expect("memory went");
            println!("{version:?}: {ram:?}");
            assert_eq!(
                ram.xbzrle_pages > 0,
                xbzrle_cache_bytes.is_some(),
                "{ram:?}"
            );
            let there = memory_of(&mut fresh.qemu);
            assert_same_memory("sent", &here.bytes("pc.ram"), &there);
            fresh.qemu.qmp.execute("cont", &json!({}));
            checker.goes_on(3);
        }
    }
}
