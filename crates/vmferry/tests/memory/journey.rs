//! A Linux guest, with its disk, that travels from QEMU to QEMU through here.

use std::fs::File;

use crate::halfway::{Halfway, Way, postcopy};
use crate::layout::Layout;
use crate::need;
use crate::peers::guest::Guest;
use crate::peers::qemu::Version;
use crate::peers::{long, seeded};

const DISK_BYTES: u64 = 64 << 20;
/// What its memory takes on the wire, more or less.
const STREAM_BYTES: u64 = 60 << 20;

/// It checks its memory, writes to its disk, and misses nothing, by precopy and postcopy, with connections that break.
#[test]
fn a_linux_guest_travels_through_here() {
    need!(postcopy());
    let mut rng = seeded();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let disk = dir.path().join("disk");
    let file = File::create(&disk).expect("a disk");
    file.set_len(DISK_BYTES).expect("a disk of that length");
    let mut guest = Guest::new();
    let version = Version::V10_0;
    let layout = Layout::of(need!(guest.host(version, &disk, true)));
    let mut qemu = need!(guest.host(version, &disk, true)).start();
    guest.wait_more_ticks(2);
    for hop in 0..if long() { 30 } else { 2 } {
        let way = |rng: &mut fastrand::Rng| match hop % 3 {
            2 => Way::precopy(),
            1 => Way::postcopy(vec![rng.u64(..STREAM_BYTES)]),
            _ => Way::postcopy(Vec::new()),
        };
        let (here, came) = Halfway::take(&mut qemu, &layout, &way(&mut rng));
        drop(qemu);
        let host = || guest.host(version, &disk, true);
        let (fresh, went) = need!(here.put_somewhere(host, &way(&mut rng)));
        println!(
            "hop {hop}: came {:?}, {} breaks; went {:?}, {} breaks",
            came.status.ram, came.breaks, went.status.ram, went.breaks
        );
        qemu = fresh.qemu;
        qemu.wait_run_state("running");
        guest.wait_more_ticks(2);
    }
    qemu.quit();
    guest.assert_records(&disk);
}
