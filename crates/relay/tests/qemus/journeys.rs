//! Parked by one QEMU's machine, loaded by another.

use std::path::Path;

use serde_json::json;

use crate::checker::Checker;
use crate::contents::{assert_same_memory, memory_of};
use crate::need;
use crate::parking::{Way, park};
use crate::peers::qemu::{Machine, Qemu, Version};

const VERSIONS: [Version; 2] = [Version::V10_0, Version::V7_2];

/// Load a file, as `-incoming exec:` does; the guest waits.
pub(crate) fn load(host: Machine, file: &Path) -> Qemu {
    let command = format!("exec:cat {}", file.display());
    let mut qemu = host.args(["-S", "-incoming", &command]).start();
    qemu.migrated();
    qemu
}

/// The guest that was loaded goes on, with every page right.
pub(crate) fn goes_on(checker: &Checker, qemu: &mut Qemu) {
    qemu.qmp.execute("cont", &json!({}));
    qemu.wait_run_state("running");
    checker.goes_on(3);
}

fn travels(from: Version, way: &Way) {
    travels_as(Checker::new(), |host| host, from, &VERSIONS, way);
}

/// The machine is one with more devices.
fn travels_as(
    mut checker: Checker,
    with: impl Fn(Machine) -> Machine,
    from: Version,
    to: &[Version],
    way: &Way,
) {
    println!("{from:?} {way:?}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("parked.vm");
    let mut source = with(need!(checker.host(from))).start();
    checker.goes_on(3);
    let (parked, status) = park(&mut source, &file, way);
    let parked = parked.unwrap_or_else(|error| panic!("{from:?} {way:?}: {error}"));
    assert_eq!(
        (parked.was_postcopy, parked.source_told),
        (way.postcopy, way.two_way.then_some(true))
    );
    println!("{} bytes, {:?}", parked.bytes, status.total_time);
    source.migrated();
    let memory = memory_of(&mut source);
    drop(source);
    for to in to {
        let mut twin = checker.clone();
        let mut fresh = load(with(need!(twin.host(*to))), &file);
        let what = format!("{from:?} to {to:?}, {way:?}");
        assert_same_memory(&what, &memory, &memory_of(&mut fresh));
        goes_on(&twin, &mut fresh);
    }
}

#[test]
fn by_precopy() {
    for from in VERSIONS {
        for two_way in [false, true] {
            travels(from, &Way::precopy(two_way));
        }
    }
}

#[test]
fn by_postcopy() {
    for from in VERSIONS {
        travels(from, &Way::postcopy(Vec::new()));
    }
}

/// A second connection waits at the door, and nothing comes over it, for nothing is asked for.
#[test]
fn by_postcopy_with_a_connection_for_what_is_asked_for() {
    for from in VERSIONS {
        let way = Way {
            preempt: true,
            ..Way::postcopy(Vec::new())
        };
        travels(from, &way);
    }
}

/// A machine with memory that is not plugged in.
pub(crate) fn with_more(host: Machine) -> Machine {
    host.args([
        "-m",
        "64,maxmem=1G",
        "-object",
        "memory-backend-ram,id=more,size=256M",
        "-device",
        "virtio-mem-pci,memdev=more,requested-size=0",
    ])
}

/// Such a device has a part that comes before all memory, and memory that never comes.
#[test]
fn with_memory_that_is_not_plugged_in() {
    for way in [Way::precopy(false), Way::postcopy(Vec::new())] {
        let checker = Checker::on("pc-i440fx-10.0");
        travels_as(checker, with_more, Version::V10_0, &[Version::V10_0], &way);
    }
}
