//! Disks that travel along with a parked machine.

use std::path::Path;

use serde_json::json;

use crate::host::Host;
use crate::need;
use crate::peers::guest::Guest;
use crate::peers::image::{self, Format};
use crate::peers::qemu::Version;
use crate::peers::vmferry::Vmferry;
use crate::peers::{disk, seeded};
use crate::ways::{Park, Restore};

const MIB: u64 = 1 << 20;

/// The disk of a parked Linux guest goes with it into QEMU 7.2, and into a `receive` of ours, whose rest of the stream
/// starts in 10.0: each has every record that the guest was told is on its disk.
#[test]
fn disks_go_along_with_a_parked_guest() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let [from, to, parked, rest] =
        ["from", "to", "parked", "rest"].map(|name| dir.path().join(name));
    disk::random(&from, 64 * MIB, &mut seeded());
    let mut guest = Guest::new();
    let mut source = Host::running(need!(guest.host(Version::V10_0, &from, false)));
    guest.wait_more_ticks(3);
    Park::Migrate.park(&mut source, &parked);
    source.qemu.quit();
    let flag = format!("disk0={},readonly=on", from.display());
    let with_disk = ["--disk", &*flag];
    let save = rest.display().to_string();
    let file = parked.display().to_string();
    let receive = |to: &Path, with_disk: [&str; 2], more: &[&str]| {
        let made = format!("disk0={},create=on,size={}", to.display(), 64 * MIB);
        let words = ["receive", "tcp:127.0.0.1:0", "--disk", &*made];
        let mut receive = Vmferry::start(words.into_iter().chain(more.iter().copied()));
        let uri = receive.address();
        let mut send = Vmferry::start(["send", &*file, &*uri].into_iter().chain(with_disk));
        println!("{}", send.event("completed"));
        send.succeeds();
        println!("{}", receive.event("completed"));
        receive.succeeds();
        disk::assert_same(&from, to);
    };
    receive(&to, with_disk, &["--save", &save]);
    guest.assert_records(&to);
    let overlay = dir.path().join("overlay");
    if image::overlay(&overlay, &from, Format::Raw).is_some() {
        let flag = format!("disk0={},format=qcow2", overlay.display());
        let (again, rest) = (dir.path().join("again"), dir.path().join("rest-again"));
        receive(
            &again,
            ["--disk", &flag],
            &["--save", &rest.display().to_string()],
        );
    }

    // Into QEMU 7.2, which writes the disk itself.
    let there = dir.path().join("there");
    disk::sparse(&there, 64 * MIB, &[], &mut seeded());
    let mut host = Host::waiting(need!(guest.host(Version::V7_2, &there, false)).args(["-S"]));
    let report = Restore::PRECOPY.restore_with(&parked, &mut host, &with_disk);
    println!("{report}");
    host.qemu.quit();
    disk::assert_same(&from, &there);

    // The rest of the stream, with the disk that came with it.
    let mut host = Host::waiting(need!(guest.host(Version::V10_0, &to, false)));
    let uri = format!("exec:cat {save}");
    host.qemu
        .qmp
        .execute("migrate-incoming", &json!({"uri": uri}));
    host.qemu.migrated();
    host.qemu.wait_run_state("running");
    guest.wait_more_ticks(5);
    host.stop();
    host.qemu.quit();
    guest.assert_records(&to);
}
