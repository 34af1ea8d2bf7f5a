//! Streams of every kind that QEMU makes, besides the plain one.

use serde_json::{Value, json};
use vmferry_inspect::{DescriptionSource, DeviceState, Found, ItemKind, Report};

use super::recorder::{Recorder, socket};
use super::streams::{Stream, is_understood, migrate_to, saved, shows_everything};
use crate::need;
use crate::peers::guest::Guest;
use crate::peers::qemu::{Machine, Qemu, Version};
use crate::peers::{disk, until};

const BOTH: [Version; 2] = [Version::V7_2, Version::V10_0];

fn capabilities(qemu: &mut Qemu, names: &[&str]) {
    let all: Vec<_> = names
        .iter()
        .map(|name| json!({ "capability": name, "state": true }))
        .collect();
    qemu.qmp
        .execute("migrate-set-capabilities", &json!({ "capabilities": all }));
}

fn parameter(qemu: &mut Qemu, name: &str, value: impl Into<Value>) {
    qemu.qmp
        .execute("migrate-set-parameters", &json!({ name: value.into() }));
}

/// A stream without a description: whole, with all these devices, which were found like this.
fn is_whole(stream: &Stream, devices: &[String], found: Found) -> Report {
    let name = &stream.name;
    let report = Report::of(&stream.bytes[..]);
    assert!(
        report.is_clean(),
        "{name}: {:?}, {:?}",
        report.end,
        report.problems
    );
    assert_eq!(report.description_is, DescriptionSource::Nowhere, "{name}");
    assert_eq!(names(&report), devices, "{name}");
    assert!(
        report.devices.iter().all(|device| device.found == found),
        "{name}"
    );
    let output = stream.inspect(&["--json"]);
    assert!(
        output.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(stream.inspect_piped(&["--json"]) == output, "{name}");
    report
}

fn names(report: &Report) -> Vec<String> {
    let names = report
        .devices
        .iter()
        .map(|device| device.section.name.to_string());
    names.collect()
}

/// With the description of a stream of the same machine everything is decoded.
fn is_described_by(stream: &Stream, other: &Stream) {
    let mut report = Report::of(&stream.bytes[..]);
    let described = Report::of(&other.bytes[..]).description;
    report.describe_by(described.expect("the other stream has a description"));
    for device in &report.devices {
        let state = report.state(device);
        if let DeviceState::Broken(_, error) = &state {
            panic!("{}: {}: {error}", stream.name, device.section.name);
        }
        assert!(matches!(state, DeviceState::Decoded(_)), "{}", stream.name);
    }
    let path = other.path.to_str().expect("test paths are UTF-8");
    let output = stream.inspect(&["--json", "--description", path]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let object: Value = serde_json::from_slice(&output.stdout).expect("it is JSON");
    assert_eq!(object["description"], "other");
    let items = object["items"].as_array().expect("items is an array");
    let mut devices = items.iter().filter(|item| item["kind"] == "device");
    assert!(devices.all(|item| item["state"].is_object()));
}

/// The devices of the machine that [`Machine::new`] is, and a stream that describes them.
fn plain(version: Version) -> Option<(Vec<String>, Stream)> {
    let stream = Stream::fresh("plain", Machine::new(version)?);
    Some((names(&Report::of(&stream.bytes[..])), stream))
}

#[test]
fn postcopy_with_its_package() {
    for version in BOTH {
        let (devices, plain) = need!(plain(version));
        let mut source = need!(Machine::new(version)).args(["-S"]).start();
        let mut destination = need!(Machine::new(version))
            .args(["-S", "-incoming", "defer"])
            .start();
        for qemu in [&mut source, &mut destination] {
            capabilities(qemu, &["postcopy-ram"]);
        }
        let recorder = Recorder::to(socket(&destination.listen()), 1);
        // So slow that it does not end by itself.
        parameter(&mut source, "max-bandwidth", 100_000);
        source
            .qmp
            .execute("migrate", &json!({ "uri": recorder.uri() }));
        until("pages", || {
            let answer = source.qmp.execute("query-migrate", &json!({}));
            (answer["ram"]["duplicate"].as_u64()? > 0).then_some(())
        });
        source.qmp.execute("migrate-start-postcopy", &json!({}));
        source.migrated();
        destination.migrated();
        source.quit();
        let bytes = recorder.finish().pop().expect("a connection");
        let stream = Stream::of(&format!("postcopy of {version:?}"), bytes);
        let report = is_whole(&stream, &devices, Found::ByFooter);
        let mut items = report.items.iter();
        let package = items.find(|item| item.kind == ItemKind::Package);
        let package = package.expect("a package");
        let inside = package.offset..package.offset + package.bytes;
        assert!(
            report
                .devices
                .iter()
                .all(|device| inside.contains(&device.offset))
        );
        is_described_by(&stream, &plain);
    }
}

#[test]
fn the_main_channel_of_multifd() {
    for version in BOTH {
        let mut source = need!(Machine::new(version)).args(["-S"]).start();
        let mut destination = need!(Machine::new(version))
            .args(["-S", "-incoming", "defer"])
            .start();
        for qemu in [&mut source, &mut destination] {
            capabilities(qemu, &["multifd"]);
            parameter(qemu, "multifd-channels", 2);
        }
        let recorder = Recorder::to(socket(&destination.listen()), 3);
        source
            .qmp
            .execute("migrate", &json!({ "uri": recorder.uri() }));
        source.migrated();
        destination.migrated();
        source.quit();
        let (main, others): (Vec<_>, Vec<_>) = recorder
            .finish()
            .into_iter()
            .partition(|said| said.starts_with(b"QEVM"));
        let [main] = main.try_into().expect("one main channel");
        let stream = Stream::of(&format!("multifd of {version:?}"), main);
        is_understood(&stream);
        let report = Report::of(&stream.bytes[..]);
        // Pages with content are elsewhere.
        assert!(report.ram.blocks.iter().all(|block| block.pages.data == 0));
        assert_eq!(others.len(), 2);
        for channel in others {
            let output = Stream::of("channel", channel).inspect(&[]);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{errors}");
            assert!(
                errors.contains("multifd channel") && errors.lines().count() == 1,
                "{errors}"
            );
        }
    }
}

#[test]
fn a_background_snapshot() {
    for version in BOTH {
        let mut qemu = need!(Machine::new(version)).start();
        capabilities(&mut qemu, &["background-snapshot"]);
        let stream = saved(&format!("background snapshot of {version:?}"), &mut qemu);
        is_understood(&stream);
    }
}

#[test]
fn mapped_ram_in_a_file() {
    for extra in [&[][..], &["multifd"]] {
        let mut qemu = need!(Machine::new(Version::V10_0)).args(["-S"]).start();
        capabilities(&mut qemu, &[&["mapped-ram"], extra].concat());
        let path = qemu.path("mapped");
        let uri = format!("file:{}", path.display());
        qemu.qmp.execute("migrate", &json!({ "uri": uri }));
        qemu.migrated();
        let bytes = std::fs::read(path).expect("the stream can be read");
        let stream = Stream::of(&format!("mapped-ram {extra:?}"), bytes);
        is_understood(&stream);
        let report = Report::of(&stream.bytes[..]);
        let mut mapped = report.ram.blocks.iter().filter_map(|block| block.mapped);
        assert!(mapped.any(|mapped| mapped.pages > 0));
    }
}

#[test]
fn without_footers() {
    for version in BOTH {
        let machine = need!(Machine::new(version));
        let machine = machine.args(["-global", "migration.send-section-footer=off"]);
        let stream = Stream::fresh(&format!("{version:?} without footers"), machine);
        is_understood(&stream);
        assert_eq!(Report::of(&stream.bytes[..]).footers, Some(false));
    }
}

#[test]
fn without_a_configuration() {
    let machine = need!(Machine::new(Version::V7_2));
    let machine = machine.args(["-global", "migration.send-configuration=off"]);
    let stream = Stream::fresh("without a configuration", machine);
    is_understood(&stream);
    assert!(Report::of(&stream.bytes[..]).configuration.is_none());
}

#[test]
fn without_a_description() {
    for version in BOTH {
        let (devices, plain) = need!(plain(version));
        for (footers, found) in [("on", Found::ByFooter), ("off", Found::ByNextHeader)] {
            let machine = need!(Machine::new(version)).args(["-M", "suppress-vmdesc=on"]);
            let footers = format!("migration.send-section-footer={footers}");
            let machine = machine.args(["-global", &footers]);
            let name = format!("{version:?} without description, {footers}");
            let stream = Stream::fresh(&name, machine);
            is_whole(&stream, &devices, found);
            is_described_by(&stream, &plain);
        }
    }
}

#[test]
fn dirty_bitmaps() {
    for version in BOTH {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("disk");
        disk::sparse(&path, 64 << 20, &[], &mut fastrand::Rng::with_seed(0));
        let mut qemu = need!(Machine::new(version))
            .args(["-S"])
            .disk("disk0", &path)
            .start();
        for name in ["one", "two"] {
            let bitmap = json!({ "node": "disk0", "name": name });
            qemu.qmp.execute("block-dirty-bitmap-add", &bitmap);
        }
        qemu.qmp.execute(
            "human-monitor-command",
            &json!({ "command-line": "qemu-io disk0 \"write 1M 192k\"" }),
        );
        capabilities(&mut qemu, &["dirty-bitmaps"]);
        let stream = saved(&format!("bitmaps of {version:?}"), &mut qemu);
        is_understood(&stream);
        let report = Report::of(&stream.bytes[..]);
        let mut bitmaps: Vec<_> = report
            .bitmaps
            .iter()
            .map(|bitmap| {
                assert!(bitmap.is_complete);
                (bitmap.name.to_string(), bitmap.bits_set)
            })
            .collect();
        bitmaps.sort();
        // 64 KiB of disk for each bit.
        assert_eq!(bitmaps, [("one".to_owned(), 3), ("two".to_owned(), 3)]);
    }
}

#[test]
fn compressed_pages() {
    let mut qemu = need!(Machine::new(Version::V7_2)).args(["-S"]).start();
    capabilities(&mut qemu, &["compress"]);
    let stream = saved("compress", &mut qemu);
    is_understood(&stream);
    let report = Report::of(&stream.bytes[..]);
    let compressed: u64 = report
        .ram
        .blocks
        .iter()
        .map(|block| block.pages.compressed)
        .sum();
    assert!(compressed > 0);
}

/// A guest that is at work changes pages while they are sent.
#[test]
fn a_linux_guest_with_xbzrle() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("disk");
    disk::sparse(&path, 64 << 20, &[], &mut fastrand::Rng::with_seed(0));
    for version in BOTH {
        let mut guest = Guest::new();
        let mut qemu = need!(guest.host(version, &path, true)).start();
        guest.wait_more_ticks(3);
        capabilities(&mut qemu, &["xbzrle"]);
        parameter(&mut qemu, "xbzrle-cache-size", 256 << 20);
        // It must not end before a page has changed twice.
        parameter(&mut qemu, "downtime-limit", 1);
        parameter(&mut qemu, "max-bandwidth", 40_000_000);
        let saved = qemu.path("saved");
        let uri = format!("exec:cat > {}", saved.display());
        qemu.qmp.execute("migrate", &json!({ "uri": uri }));
        until("changes of pages", || {
            let answer = qemu.qmp.execute("query-migrate", &json!({}));
            (answer["xbzrle-cache"]["pages"].as_u64()? > 10).then_some(())
        });
        parameter(&mut qemu, "max-bandwidth", 1_u64 << 40);
        parameter(&mut qemu, "downtime-limit", 10_000);
        qemu.migrated();
        let bytes = std::fs::read(saved).expect("the stream can be read");
        let stream = Stream::of(&format!("a Linux guest of {version:?}"), bytes);
        is_understood(&stream);
        let report = Report::of(&stream.bytes[..]);
        let pages = |count: fn(&vmferry_inspect::PageCounts) -> u64| -> u64 {
            report
                .ram
                .blocks
                .iter()
                .map(|block| count(&block.pages))
                .sum()
        };
        let (xbzrle, repeated) = (pages(|p| p.xbzrle), pages(|p| p.repeated.unwrap_or(0)));
        println!("{xbzrle} changes of pages, {repeated} pages again");
        assert!(xbzrle > 0 && repeated >= xbzrle);
        qemu.quit();
    }
}

/// `virsh save` puts a header and the domain's XML before the stream.
#[test]
fn behind_a_header_of_libvirt() {
    let (_, plain) = need!(plain(Version::V10_0));
    let xml = b"<domain type='qemu'><name>demo</name></domain>\0";
    for (magic, running) in [(b"LibvirtQemudSave", 1_u32), (b"LibvirtQemudPart", 0)] {
        let mut bytes = magic.to_vec();
        let length = 4096 - 92;
        for word in [2, length, running, 0, 0] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.resize(92, 0);
        bytes.extend(xml);
        bytes.resize(4096, 0);
        bytes.extend(&plain.bytes);
        let stream = Stream::of("behind a header of libvirt", bytes);
        let report = Report::of(&stream.bytes[..]);
        assert!(
            report.is_clean() && report.start == 4096,
            "{:?}",
            report.end
        );
        shows_everything(&stream, &report);
        let object: Value =
            serde_json::from_slice(&stream.inspect(&["--json"]).stdout).expect("JSON");
        assert_eq!(object["container"]["type"], "libvirt");
        assert_eq!(object["container"]["was_running"], running == 1);
        assert_eq!(
            object["container"]["is_unfinished"],
            magic.ends_with(b"Part")
        );
        assert_eq!(object["items"][0]["offset"], 4096);
    }
}

/// A guest that was stopped in the middle of its work.
#[test]
fn a_stopped_linux_guest() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("disk");
    disk::sparse(&path, 64 << 20, &[], &mut fastrand::Rng::with_seed(0));
    for version in BOTH {
        let mut guest = Guest::new();
        let mut qemu = need!(guest.host(version, &path, false)).start();
        guest.wait_more_ticks(2);
        qemu.qmp.execute("stop", &json!({}));
        let path = qemu.path("saved");
        migrate_to(&mut qemu, &path);
        let bytes = std::fs::read(path).expect("the stream can be read");
        is_understood(&Stream::of(&format!("a Linux guest of {version:?}"), bytes));
        qemu.quit();
    }
}
