//! A QEMU sends over multifd; what is joined is loaded by another.

use serde_json::json;
use vmferry_channel::{Channel, Listener, Stop, Uri};
use vmferry_multifd::{Compression, JoinOptions, accept};

use crate::machine::{COMPRESSIONS, Files, NEW, OLD, assert_equal, load, memory, set_up};
use crate::need;
use crate::peers::PATIENCE;
use crate::peers::qemu::{Qemu, Version};

const CHANNELS: u8 = 3;

/// Lets a QEMU migrate to us; the plain stream goes to `path`.
fn receive(qemu: &mut Qemu, compression: Compression, path: &std::path::Path) {
    set_up(qemu, CHANNELS, compression);
    let stop = Stop::new().expect("a descriptor");
    let listener = Listener::bind(&Uri::Unix(qemu.path("vmferry"))).expect("a socket");
    let uri = listener.local().to_string();
    qemu.qmp.execute("migrate", &json!({"uri": uri}));
    let joined = accept(&listener, &JoinOptions::new(CHANNELS, compression), &stop);
    let joined = joined.unwrap_or_else(|error| panic!("{error}"));
    let Channel::TwoWay(mut reader, _writer) = joined.channel else {
        panic!("the channel goes both ways");
    };
    let deadline = Some(std::time::Instant::now() + PATIENCE);
    let (mut stream, mut piece) = (Vec::new(), vec![0; 1 << 20]);
    loop {
        let got = reader.read_until(&mut piece, deadline).expect("it comes");
        if got == 0 {
            break;
        }
        stream.extend(&piece[..got]);
    }
    joined
        .joining
        .finish()
        .unwrap_or_else(|error| panic!("{error}"));
    qemu.migrated();
    std::fs::write(path, stream).expect("a file in the temporary folder");
}

fn from_each(version: Version, kind: &str, destinations: &[Version], is_running: bool) {
    let files = Files::new();
    let stream = files.path("stream");
    for compression in COMPRESSIONS {
        let mut source = need!(files.source(version, kind));
        if is_running {
            source.limits((100 << 20, 50));
            source.qmp.execute("cont", &json!({}));
        }
        receive(&mut source, compression, &stream);
        let expected = memory(&mut source);
        drop(source);
        for destination in destinations {
            let what = format!("{version:?} to {destination:?}, {compression}");
            let found = need!(load(&files, *destination, kind, &stream));
            assert_equal(&found, &expected, &what);
        }
    }
}

const BOTH: [Version; 2] = [Version::V7_2, Version::V10_0];

#[test]
fn from_7_2() {
    from_each(Version::V7_2, OLD, &BOTH, false);
}

#[test]
fn from_10_0_with_an_old_machine() {
    from_each(Version::V10_0, OLD, &BOTH, false);
}

#[test]
fn from_10_0_with_an_old_machine_that_runs() {
    from_each(Version::V10_0, OLD, &BOTH, true);
}

#[test]
fn from_10_0_with_a_new_machine() {
    from_each(Version::V10_0, NEW, &[Version::V10_0], false);
}

#[test]
fn from_10_0_with_a_new_machine_that_runs() {
    from_each(Version::V10_0, NEW, &[Version::V10_0], true);
}
