//! Dirty bitmaps of disks are parked with the machine, also where they come behind the package of a postcopy.

use std::path::Path;

use serde_json::json;

use crate::checker::Checker;
use crate::journeys::goes_on;
use crate::need;
use crate::parking::{Way, capability, park};
use crate::peers::qemu::{Machine, Qemu, Version};

fn with_disk(host: Machine) -> Machine {
    host.args([
        "-blockdev",
        "null-co,node-name=dd,size=16777216,read-zeroes=on",
    ])
}

/// Bytes that the bitmap of the disk says are dirty, if it has one.
fn dirty_bytes(qemu: &mut Qemu) -> Option<u64> {
    let nodes = qemu.qmp.execute("query-named-block-nodes", &json!({}));
    let nodes = nodes.as_array().expect("a list of nodes");
    let disk = nodes.iter().find(|node| node["node-name"] == "dd");
    let bitmaps = disk.expect("the disk")["dirty-bitmaps"].as_array()?;
    let bitmap = bitmaps.iter().find(|bitmap| bitmap["name"] == "marks");
    bitmap?["count"].as_u64()
}

fn mark(qemu: &mut Qemu) {
    let bitmap = json!({"node": "dd", "name": "marks", "granularity": 65536});
    qemu.qmp.execute("block-dirty-bitmap-add", &bitmap);
    for offset in ["0", "5M", "11M"] {
        let line = format!("qemu-io dd \"write {offset} 64k\"");
        let command = json!({"command-line": line});
        qemu.qmp.execute("human-monitor-command", &command);
    }
}

fn load(host: Machine, file: &Path) -> Qemu {
    let mut qemu = with_disk(host).args(["-S", "-incoming", "defer"]).start();
    capability(&mut qemu, "dirty-bitmaps", true);
    let uri = format!("exec:cat {}", file.display());
    qemu.qmp.execute("migrate-incoming", &json!({"uri": uri}));
    qemu.migrated();
    qemu
}

#[test]
fn bitmaps_are_parked() {
    let versions = [Version::V10_0, Version::V7_2];
    for from in versions {
        for way in [Way::precopy(true), Way::postcopy(Vec::new())] {
            println!("{from:?} {way:?}");
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("parked.vm");
            let mut checker = Checker::new();
            let mut source = with_disk(need!(checker.host(from))).start();
            checker.goes_on(3);
            mark(&mut source);
            let marked = dirty_bytes(&mut source);
            assert_eq!(marked, Some(3 << 16));
            capability(&mut source, "dirty-bitmaps", true);
            park(&mut source, &file, &way).0.unwrap();
            source.migrated();
            drop(source);
            for to in versions {
                let mut twin = checker.clone();
                let mut fresh = load(need!(twin.host(to)), &file);
                assert_eq!(dirty_bytes(&mut fresh), marked, "{from:?} {way:?} {to:?}");
                goes_on(&twin, &mut fresh);
            }
        }
    }
}
