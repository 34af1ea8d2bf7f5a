//! What a guest asked for first is sent first the next time.

use serde_json::Value;

use crate::guest::Guest;
use crate::host::Host;
use crate::need;
use crate::peers::qemu::Version;
use crate::ways::{Park, Restore, postcopy};

fn requests(report: &Value) -> u64 {
    report["ram"]["postcopy-requests"]
        .as_u64()
        .unwrap_or_else(|| panic!("nothing about requests: {report}"))
}

/// After one instant restore that learns, the next guest asks for less.
#[test]
fn the_second_restore_asks_for_fewer_pages() {
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    let image = dir.path().join("image");
    let mut guest = Guest::with_memory([128, 2]);
    let mut host = Host::running(need!(guest.host(Version::V10_0)));
    guest.goes_on(2);
    Park::Migrate.park(&mut host, &image);
    drop(host);
    let mut asked = Vec::new();
    for options in [&["--learn"][..], &[]] {
        let mut branch = guest.clone();
        let mut host = Host::waiting(need!(branch.host(Version::V10_0)));
        let (mut send, _) = Restore::POSTCOPY.start_slowly(&image, &mut host, options);
        let report = send.event("completed");
        send.succeeds();
        println!("{options:?}: {report}");
        asked.push(requests(&report));
        branch.goes_on(2);
    }
    println!("pages asked for: {asked:?}");
    assert!(asked[1] < asked[0], "{asked:?}");
}
