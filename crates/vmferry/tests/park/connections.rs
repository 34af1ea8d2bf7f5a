//! `multifd`: machines that come and go over several connections.

use serde_json::json;

use crate::checker::Checker;
use crate::contents::{assert_same_memory, memory_of};
use crate::host::Host;
use crate::interruptions::settings;
use crate::need;
use crate::peers::long;
use crate::peers::qemu::Version;
use crate::peers::vmferry::Vmferry;
use crate::ways::{FAST, Park, Restore, postcopy};

const CHANNELS: &str = "3";

fn several(host: &mut Host, compression: &str) {
    host.enable(&["multifd"]);
    host.set(&json!({"multifd-channels": 3, "multifd-compression": compression}));
}

/// What both versions send, compressed or not, is one file that starts in both, over several connections or one. The
/// machine type decides how the connections keep step.
#[test]
fn machines_come_and_go_over_several_connections() {
    use Version::{V7_2, V10_0};
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    let old = "pc-i440fx-7.2";
    let mut cases = vec![
        (old, V10_0, "none"),
        (old, V7_2, "zlib"),
        ("pc-i440fx-10.0", V10_0, "zstd"),
        (old, V7_2, "none"),
    ];
    if long() {
        cases.extend([
            (old, V10_0, "zlib"),
            (old, V10_0, "zstd"),
            (old, V7_2, "zstd"),
            ("pc-i440fx-10.0", V10_0, "none"),
            ("pc-i440fx-10.0", V10_0, "zlib"),
            ("pc-q35-10.0", V10_0, "zstd"),
        ]);
    }
    for (number, (machine, from, compression)) in cases.into_iter().enumerate() {
        let image = dir.path().join(format!("image-{number}"));
        let mut checker = Checker::on(machine);
        let mut source = Host::running(need!(checker.host(from)));
        checker.goes_on(2);
        if from == V7_2 {
            source.stop();
        }
        let file = image.display().to_string();
        let mut receive = Vmferry::start([
            "receive",
            "tcp:127.0.0.1:0",
            "--save",
            &*file,
            "--multifd-channels",
            CHANNELS,
            "--multifd-compression",
            compression,
        ]);
        let uri = receive.address();
        several(&mut source, compression);
        source.set(&json!({"max-bandwidth": FAST, "downtime-limit": 60_000}));
        source.qemu.qmp.execute("migrate", &json!({"uri": uri}));
        println!(
            "{machine} {from:?} {compression}: {}",
            receive.event("completed")
        );
        receive.succeeds();
        source.qemu.migrated();
        let before = memory_of(&mut source.qemu);
        drop(source);

        let versions = if machine == old {
            &[V7_2, V10_0][..]
        } else {
            &[V10_0]
        };
        for (step, to) in versions.iter().enumerate() {
            // Over one connection.
            let restore = Restore::ALL[(number + step) % Restore::ALL.len()];
            let mut branch = checker.clone();
            let mut host = Host::waiting(need!(branch.host(*to)).args(["-S"]));
            println!("{to:?} {restore:?}: {}", restore.restore(&image, &mut host));
            assert_same_memory("restored", &before, &memory_of(&mut host.qemu));

            // Over several.
            let compression = ["zlib", "none", "zstd"][(number + step) % 3];
            let mut host = Host::waiting(need!(branch.host(*to)).args(["-S"]));
            let vm = (number + step) % 2 == 0;
            if !vm {
                several(&mut host, compression);
            }
            let restore = Restore {
                postcopy: false,
                vm,
            };
            let found = settings(&mut host);
            let more = [
                "--multifd-channels",
                CHANNELS,
                "--multifd-compression",
                compression,
            ];
            let report = restore.restore_with(&image, &mut host, &more);
            println!("{to:?} {restore:?} {compression}: {report}");
            assert_eq!(settings(&mut host), found);
            assert_same_memory("restored", &before, &memory_of(&mut host.qemu));
            host.cont();
            branch.goes_on(2);
        }
    }
}

/// `migrate --vm` sets a source up for several connections, and leaves it as it was.
#[test]
fn a_source_is_told_to_use_several_connections() {
    use Version::{V7_2, V10_0};
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (from, to, compression) in [(V10_0, V7_2, "zstd"), (V7_2, V10_0, "none")] {
        let image = dir.path().join(format!("image-{compression}"));
        let mut checker = Checker::new();
        let mut source = Host::running(need!(checker.host(from)));
        checker.goes_on(2);
        if from == V7_2 {
            source.stop();
        }
        let before = settings(&mut source);
        let more = [
            "--multifd-channels",
            CHANNELS,
            "--multifd-compression",
            compression,
        ];
        Park::Migrate.park_with(&mut source, &image, &more);
        assert_eq!(settings(&mut source), before);
        let before = memory_of(&mut source.qemu);
        drop(source);
        let mut host = Host::waiting(need!(checker.host(to)).args(["-S"]));
        Restore::PRECOPY.restore(&image, &mut host);
        assert_same_memory("restored", &before, &memory_of(&mut host.qemu));
        host.cont();
        checker.goes_on(2);
    }
}
