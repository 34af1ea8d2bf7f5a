//! Machines that are parked in every way, and come out in every way.

use crate::checker::Checker;
use crate::contents::{assert_same_memory, memory_of};
use crate::guest::{Guest, PIECES};
use crate::host::Host;
use crate::need;
use crate::peers::long;
use crate::peers::qemu::Version;
use crate::ways::{Park, Restore, postcopy};

/// A Linux guest that runs is parked again and again, in each way, and wherever it comes out of a file, all of its memory
/// is right and no tick is missing.
#[test]
fn a_linux_guest_goes_on_after_each_time_it_was_parked() {
    use Version::{V7_2, V10_0};
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut guest = Guest::new();
    let mut host = Host::running(need!(guest.host(V10_0)));
    guest.goes_on(PIECES);
    let parks = [
        Park::Precopy { return_path: true },
        Park::Migrate,
        Park::Postcopy,
    ];
    for (number, park) in parks.into_iter().enumerate() {
        let image = dir.path().join(format!("image-{number}"));
        println!("{park:?}: {}", park.park(&mut host, &image));
        drop(host);
        let ways = [0, 1].map(|step| Restore::ALL[(number + step) % Restore::ALL.len()]);
        let mut other = guest.clone();
        let mut elsewhere = Host::waiting(need!(other.host(V7_2)));
        println!("{:?}: {}", ways[0], ways[0].restore(&image, &mut elsewhere));
        elsewhere.qemu.wait_run_state("running");
        other.goes_on(PIECES + 1);
        drop(elsewhere);

        host = Host::waiting(need!(guest.host(V10_0)));
        println!("{:?}: {}", ways[1], ways[1].restore(&image, &mut host));
        host.qemu.wait_run_state("running");
        guest.goes_on(PIECES + 1);
    }
}

/// Every way in and every way out leave the memory of a machine as it is, between both QEMUs. One that stood still stands
/// still afterwards, one that ran runs.
#[test]
fn memory_stays_the_same_in_a_file() {
    use Version::{V7_2, V10_0};
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    let with = |return_path| Park::Precopy { return_path };
    let parks = [
        (V10_0, with(false)),
        (V7_2, Park::Postcopy),
        (V10_0, Park::Migrate),
        (V7_2, with(true)),
        (V10_0, Park::Postcopy),
        (V7_2, Park::Migrate),
    ];
    for (number, (from, park)) in parks.into_iter().enumerate() {
        let mut checker = Checker::new();
        let mut source = Host::running(need!(checker.host(from)));
        checker.goes_on(2);
        if from == V7_2 {
            // That version loses what a running guest writes.
            source.stop();
        }
        let image = dir.path().join(format!("image-{number}"));
        println!("{from:?} {park:?}: {}", park.park(&mut source, &image));
        let before = memory_of(&mut source.qemu);
        drop(source);
        let ways = Restore::ALL.len() * 2;
        let steps = if long() { 0..ways } else { number..number + 2 };
        for step in steps {
            let restore = Restore::ALL[step / 2 % Restore::ALL.len()];
            let to = [V7_2, V10_0][(step + number / 2) % 2];
            let mut branch = checker.clone();
            let machine = need!(branch.host(to)).args(["-S"]);
            let mut host = Host::waiting(machine);
            println!("{restore:?} {to:?}: {}", restore.restore(&image, &mut host));
            assert_same_memory("restored", &before, &memory_of(&mut host.qemu));
            host.cont();
            branch.goes_on(2);
        }
    }
}

/// Machine types of 10.0 say in their streams when the guest stopped; their memory has more than one block.
#[test]
fn newer_machines_are_parked_too() {
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (number, park) in [Park::Migrate, Park::Postcopy].into_iter().enumerate() {
        let mut checker = Checker::on("pc-q35-10.0");
        let mut source = Host::running(need!(checker.host(Version::V10_0)));
        checker.goes_on(2);
        let image = dir.path().join(format!("image-{number}"));
        park.park(&mut source, &image);
        drop(source);
        for restore in [Restore::PRECOPY, Restore::POSTCOPY] {
            let mut branch = checker.clone();
            let mut host = Host::waiting(need!(branch.host(Version::V10_0)));
            restore.restore(&image, &mut host);
            host.qemu.wait_run_state("running");
            branch.goes_on(2);
        }
    }
}
