//! Precopy from and into real QEMUs.

use serde_json::json;

use crate::checker::{Checker, UNUSED};
use crate::contents::{assert_same_memory, memory_of};
use crate::halfway::{self, Fresh, Halfway, Way, capabilities};
use crate::layout::Layout;
use crate::need;
use crate::peers::qemu::Version;

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
        // Changes, and a switch to postcopy when pages that went before have been written again.
        for (xbzrle, postcopy) in [(false, false), (true, false), (true, true)] {
            if postcopy {
                need!(halfway::postcopy());
            }
            let mut checker = Checker::new();
            let layout = Layout::of(need!(checker.host(version)));
            let mut source = need!(checker.host(version)).start();
            checker.goes_on(3);
            source.qmp.execute("stop", &json!({}));
            let (here, _) = Halfway::take(&mut source, &layout, &Way::precopy());
            drop(source);

            // A guest that comes by postcopy is let run, even if it stood still at its source, but not with `-S`.
            let host = need!(checker.host(version)).args(["-S"]);
            let mut fresh = Fresh::start(host);
            here.write_to(UNUSED);
            let way = Way {
                postcopy,
                passes: 4,
                xbzrle_cache_bytes: xbzrle.then_some(16 << 20),
                ..Way::precopy()
            };
            let went = here.put(&mut fresh, &way);
            let ram = went.status.ram.expect("memory went");
            println!("{version:?}: {ram:?}");
            assert_eq!(ram.xbzrle_pages > 0, xbzrle, "{ram:?}");
            let there = memory_of(&mut fresh.qemu);
            assert_same_memory("sent", &here.bytes("pc.ram"), &there);
            fresh.qemu.qmp.execute("cont", &json!({}));
            checker.goes_on(3);
        }
    }
}
