//! `mapped-ram` files, which only QEMU 10.0 knows, and what becomes of them.

use std::path::Path;

use serde_json::json;

use crate::checker::Checker;
use crate::contents::{assert_same_memory, memory_of};
use crate::host::Host;
use crate::need;
use crate::peers::qemu::Version;
use crate::peers::vmferry::run_well;
use crate::ways::{FAST, Park, Restore, postcopy};

fn convert(from: &Path, to: &Path, kind: &str) {
    let [from, to] = [from, to].map(|path| path.display().to_string());
    run_well(["convert", &from, "-o", &to, "--to", kind]);
}

/// Lets a QEMU read a file itself.
fn load(host: &mut Host, uri: &str, capabilities: &[&str]) {
    host.enable(capabilities);
    host.qemu
        .qmp
        .execute("migrate-incoming", &json!({"uri": uri}));
    host.qemu.migrated();
}

/// Written by one writer or several, such a file starts by every way in both versions, as it is or as a plain stream.
#[test]
fn mapped_ram_files_start_in_both_versions() {
    use Version::{V7_2, V10_0};
    need!(postcopy());
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (number, capabilities) in [&["mapped-ram"][..], &["mapped-ram", "multifd"]]
        .into_iter()
        .enumerate()
    {
        let [mapped, stream, again] =
            ["mapped", "stream", "again"].map(|name| dir.path().join(format!("{name}-{number}")));
        let mut checker = Checker::new();
        let mut source = Host::running(need!(checker.host(V10_0)));
        checker.goes_on(2);
        source.enable(capabilities);
        source.set(&json!({"max-bandwidth": FAST, "downtime-limit": 60_000}));
        let uri = format!("file:{}", mapped.display());
        source.qemu.qmp.execute("migrate", &json!({"uri": uri}));
        source.qemu.migrated();
        let before = memory_of(&mut source.qemu);
        drop(source);

        for step in 0..4 {
            let restore = Restore::ALL[step];
            let to = [V7_2, V10_0][(step + number) % 2];
            let mut branch = checker.clone();
            let mut host = Host::waiting(need!(branch.host(to)).args(["-S"]));
            println!(
                "{to:?} {restore:?}: {}",
                restore.restore(&mapped, &mut host)
            );
            assert_same_memory("restored", &before, &memory_of(&mut host.qemu));
            host.cont();
            branch.goes_on(1);
        }
        convert(&mapped, &stream, "stream");
        convert(&stream, &again, "mapped-ram");
        for (to, file, capabilities) in [
            (V7_2, &stream, &[][..]),
            (V10_0, &stream, &[]),
            (V10_0, &again, &["mapped-ram"]),
        ] {
            println!("{to:?} {}", file.display());
            let uri = match capabilities {
                [] => format!("exec:cat {}", file.display()),
                _ => format!("file:{}", file.display()),
            };
            let mut branch = checker.clone();
            let mut host = Host::waiting(need!(branch.host(to)).args(["-S"]));
            load(&mut host, &uri, capabilities);
            assert_same_memory("loaded", &before, &memory_of(&mut host.qemu));
            host.cont();
            branch.goes_on(1);
        }
    }
}

/// What was parked as a stream becomes a file from which QEMU 10.0 starts by itself, alone or with several readers, on
/// old and on new machines.
#[test]
fn a_parked_machine_becomes_a_mapped_ram_file() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for machine in ["pc-i440fx-7.2", "pc-q35-10.0"] {
        let [parked, mapped] =
            ["parked", "mapped"].map(|name| dir.path().join(format!("{name}-{machine}")));
        let mut checker = Checker::on(machine);
        let mut source = Host::running(need!(checker.host(Version::V10_0)));
        checker.goes_on(2);
        Park::Migrate.park(&mut source, &parked);
        let before = memory_of(&mut source.qemu);
        drop(source);
        convert(&parked, &mapped, "mapped-ram");
        let uri = format!("file:{}", mapped.display());
        for capabilities in [&["mapped-ram"][..], &["mapped-ram", "multifd"]] {
            let mut branch = checker.clone();
            let mut host = Host::waiting(need!(branch.host(Version::V10_0)).args(["-S"]));
            load(&mut host, &uri, capabilities);
            assert_same_memory("loaded", &before, &memory_of(&mut host.qemu));
            host.cont();
            branch.goes_on(1);
        }
    }
}
