//! Machines in internal snapshots, as `savevm` leaves them.

use std::path::Path;

use crate::checker::Checker;
use crate::contents::{assert_same_memory, memory_of};
use crate::host::Host;
use crate::need;
use crate::peers::image::{self, Format};
use crate::peers::nbd::run_tool;
use crate::peers::qemu::{Machine, Version};
use crate::peers::seeded;
use crate::ways::{Restore, postcopy};

const MIB: u64 = 1 << 20;

fn with_disk(machine: Machine, disk: &Path) -> Machine {
    machine.disk_in(Format::Qcow2, "disk0", disk)
}

/// What `savevm` of either version saved starts in both, from the image itself, while nobody writes to it; the guest has
/// its disk as it was then.
#[test]
fn snapshots_of_both_versions_start_in_both() {
    use Version::{V7_2, V10_0};
    need!(postcopy());
    let mut rng = seeded();
    for (number, from) in [V10_0, V7_2].into_iter().enumerate() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let disk = dir.path().join("disk.qcow2");
        need!(image::create(
            &disk,
            Format::Qcow2,
            32 * MIB,
            &[(0, 3 * MIB)],
            &mut rng
        ));
        let mut checker = Checker::new();
        let mut source = Host::running(with_disk(need!(checker.host(from)), &disk));
        checker.goes_on(2);
        assert_eq!(source.human("savevm early"), "");
        checker.goes_on(2);
        source.stop();
        let before = memory_of(&mut source.qemu);
        assert_eq!(source.human("savevm parked"), "");
        source.qemu.quit();

        let then = dir.path().join("then.qcow2");
        let [from_path, to_path] = [&disk, &then].map(|path| path.display().to_string());
        let convert = [
            "convert",
            "-f",
            "qcow2",
            "-O",
            "qcow2",
            "-l",
            "snapshot.name=parked",
        ];
        need!(run_tool(
            "qemu-img",
            convert.into_iter().chain([&*from_path, &*to_path])
        ));
        for (step, to) in [V10_0, V7_2, V10_0, V7_2].into_iter().enumerate() {
            let restore = Restore::ALL[(step + number) % Restore::ALL.len()];
            let mut branch = checker.clone();
            let machine = with_disk(need!(branch.host(to)), &then).args(["-S"]);
            let mut host = Host::waiting(machine);
            let report = restore.restore_with(&disk, &mut host, &["--snapshot", "parked"]);
            println!("{from:?} {to:?} {restore:?}: {report}");
            assert_same_memory("restored", &before, &memory_of(&mut host.qemu));
            host.cont();
            branch.goes_on(2);
            host.qemu.quit();
        }
        let wrong = dir.path().join("no-socket");
        let uri = format!("unix:{}", wrong.display());
        let mut send = crate::peers::vmferry::Vmferry::start([
            "send",
            &*from_path,
            &*uri,
            "--snapshot",
            "nothing",
        ]);
        let status = send.wait();
        let line = send.fails(status.code().expect("no signal"));
        assert!(line.contains("nothing"), "{line}");
    }
}
