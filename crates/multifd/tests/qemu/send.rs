//! A plain stream goes to a QEMU over multifd.

use serde_json::json;
use vmferry_channel::{Channel, Stop, Uri};
use vmferry_multifd::{Compression, SplitOptions, connect};

use crate::machine::{COMPRESSIONS, Files, NEW, OLD, UUID_BYTES, assert_equal, memory, set_up};
use crate::need;
use crate::peers::PATIENCE;
use crate::peers::qemu::{Qemu, Version};

const CHANNELS: u8 = 3;

/// Sends a stream to a QEMU that waits for it.
fn send(qemu: &mut Qemu, compression: Compression, stream: &[u8]) {
    set_up(qemu, CHANNELS, compression);
    let uri: Uri = qemu.listen().parse().expect("an address");
    let stop = Stop::new().expect("a descriptor");
    let options = SplitOptions {
        uuid: Some(UUID_BYTES),
        ..SplitOptions::new(CHANNELS, compression)
    };
    let split = connect(&uri, options, &stop, PATIENCE).unwrap_or_else(|error| panic!("{error}"));
    let Channel::TwoWay(_reader, mut writer) = split.channel else {
        panic!("the channel goes both ways");
    };
    let deadline = Some(std::time::Instant::now() + PATIENCE);
    let written = writer.write_all_until(stream, deadline);
    drop(writer);
    let outcome = split.splitting.finish();
    outcome.unwrap_or_else(|error| panic!("{error}; {}", qemu.errors()));
    written.expect("it was taken");
    qemu.migrated();
}

/// A plain stream of a machine that was stopped after its migration had begun, and its memory.
fn plain_stream(files: &Files, version: Version, kind: &str) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut source = files.source(version, kind)?;
    if version == Version::V10_0 {
        // Slow enough for several rounds.
        source.limits((100 << 20, 50));
        source.qmp.execute("cont", &json!({}));
    }
    let path = files.path("plain");
    let uri = format!("exec:cat>{}", path.display());
    source.qmp.execute("migrate", &json!({"uri": uri}));
    source.migrated();
    let memory = memory(&mut source);
    let stream = std::fs::read(path).expect("it was written");
    Some((stream, memory))
}

fn to_each(version: Version, kind: &str, destinations: &[Version]) {
    let files = Files::new();
    let (stream, expected) = need!(plain_stream(&files, version, kind));
    for destination in destinations {
        for compression in COMPRESSIONS {
            let what = format!("{version:?} to {destination:?}, {compression}");
            let mut qemu = need!(files.destination(*destination, kind));
            send(&mut qemu, compression, &stream);
            assert_equal(&memory(&mut qemu), &expected, &what);
        }
    }
}

const BOTH: [Version; 2] = [Version::V7_2, Version::V10_0];

#[test]
fn a_stream_of_7_2() {
    to_each(Version::V7_2, OLD, &BOTH);
}

#[test]
fn a_stream_of_10_0_with_an_old_machine() {
    to_each(Version::V10_0, OLD, &BOTH);
}

#[test]
fn a_stream_of_10_0_with_a_new_machine() {
    to_each(Version::V10_0, NEW, &[Version::V10_0]);
}
