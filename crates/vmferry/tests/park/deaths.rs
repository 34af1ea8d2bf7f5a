//! Destinations that die on the way.

use std::path::Path;

use crate::checker::Checker;
use crate::host::Host;
use crate::need;
use crate::peers::qemu::Version;
use crate::peers::until;
use crate::ways::{Park, Restore, postcopy};

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).expect("the image is there")
}

/// One clear line says so, the image is what it was, and the machine starts from it elsewhere.
#[test]
fn a_destination_that_dies_leaves_the_image_as_it_was() {
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    let mut checker = Checker::new();
    let mut source = Host::running(need!(checker.host(Version::V10_0)));
    checker.goes_on(2);
    Park::Precopy { return_path: true }.park(&mut source, &image);
    drop(source);
    let parked = bytes(&image);
    let ways = [
        Restore::ALL[0],
        Restore::ALL[1],
        Restore::ALL[0],
        Restore::ALL[3],
    ];
    for (round, restore) in ways.into_iter().enumerate() {
        let to = [Version::V7_2, Version::V7_2, Version::V10_0, Version::V10_0][round];
        let mut host = Host::waiting(need!(checker.clone().host(to)));
        let mut send = if restore.postcopy {
            let (send, _) = restore.start_slowly(&image, &mut host, &[]);
            host.qemu.wait_run_state("running");
            send
        } else {
            let send = restore.start(&image, &mut host, &["--bandwidth", "4MiB/s"]);
            host.wait_migration("active");
            send
        };
        drop(host);
        let status = send.wait();
        let line = send.fails(status.code().expect("no signal"));
        println!("{restore:?} {to:?}: {status}: {line}");
        // Nobody can tell from here whether a guest that ran is lost, or waits for its memory.
        let expected = if restore.postcopy { 3 } else { 1 };
        assert_eq!(status.code(), Some(expected));
        assert!(bytes(&image) == parked, "the image has changed");

        let mut branch = checker.clone();
        let mut host = Host::waiting(need!(branch.host(to)));
        restore.restore(&image, &mut host);
        host.qemu.wait_run_state("running");
        branch.goes_on(2);
        assert!(bytes(&image) == parked, "the image has changed");
    }
}

/// Nobody listens, or a machine of another kind does: refused in one line, and the right one takes it.
#[test]
fn a_destination_that_is_another_machine_says_no() {
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    let mut checker = Checker::new();
    let mut source = Host::running(need!(checker.host(Version::V10_0)));
    checker.goes_on(2);
    Park::Migrate.park(&mut source, &image);
    drop(source);
    let parked = bytes(&image);
    for restore in [Restore::PRECOPY, Restore::POSTCOPY] {
        let machine = need!(checker.clone().host(Version::V10_0)).args(["-m", "96"]);
        let mut host = Host::waiting(machine);
        let mut send = restore.start(&image, &mut host, &[]);
        let line = send.fails(1);
        println!("{restore:?}: {line}");
        until("its QEMU to say why", || {
            host.qemu.errors().contains("pc.ram").then_some(())
        });
    }
    let mut branch = checker.clone();
    let mut host = Host::waiting(need!(branch.host(Version::V7_2)));
    Restore::POSTCOPY.restore(&image, &mut host);
    branch.goes_on(2);
    assert!(bytes(&image) == parked, "the image has changed");
}
