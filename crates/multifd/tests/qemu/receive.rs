//! A QEMU sends over multifd; what is joined is loaded by another.

use serde_json::json;
use vmferry_channel::{Channel, Listener, Stop, Uri};
use vmferry_multifd::{Compression, JoinOptions, accept};
use vmferry_stream::{Ending, Tail};

use crate::machine::{
    COMPRESSIONS, Files, NEW, OLD, UUID_BYTES, assert_equal, load, memory, set_up,
};
use crate::need;
use crate::peers::PATIENCE;
use crate::peers::qemu::{Qemu, Version};

const CHANNELS: u8 = 3;

const SHUT_0: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// Lets a QEMU migrate to us; the plain stream goes to `path`. With the return path, which is used when nothing is
/// compressed, the source waits for an answer.
fn receive(
    qemu: &mut Qemu,
    compression: Compression,
    has_large_window: bool,
    path: &std::path::Path,
) {
    set_up(qemu, CHANNELS, compression);
    let answers = compression == Compression::None;
    if answers {
        let capability = json!([{"capability": "return-path", "state": true}]);
        let capabilities = json!({"capabilities": capability});
        qemu.qmp.execute("migrate-set-capabilities", &capabilities);
    }
    if compression == Compression::Zstd && has_large_window {
        let level = json!({"multifd-zstd-level": 20});
        qemu.qmp.execute("migrate-set-parameters", &level);
    }
    let stop = Stop::new().expect("a descriptor");
    let listener = Listener::bind(&Uri::Unix(qemu.path("vmferry"))).expect("a socket");
    let uri = listener.local().to_string();
    qemu.qmp.execute("migrate", &json!({"uri": uri}));
    let options = JoinOptions {
        uuid: Some(UUID_BYTES),
        ..JoinOptions::new(CHANNELS, compression)
    };
    let joined = accept(&listener, &options, &stop);
    let joined = joined.unwrap_or_else(|error| panic!("{error}"));
    let Channel::TwoWay(mut reader, mut writer) = joined.channel else {
        panic!("the channel goes both ways");
    };
    let deadline = Some(std::time::Instant::now() + PATIENCE);
    let (mut stream, mut piece) = (Vec::new(), vec![0; 1 << 20]);
    let mut tail = Tail::new(true);
    loop {
        let got = reader.read_until(&mut piece, deadline).expect("it comes");
        if got == 0 {
            break;
        }
        stream.extend(&piece[..got]);
        tail.push(&piece[..got]);
        if answers && tail.ending() == Some(Ending::WithDescription) {
            writer.write_all(&SHUT_0).expect("the source waits for it");
        }
    }
    let outcome = joined.joining.finish();
    outcome.unwrap_or_else(|error| panic!("{error}; {}", qemu.errors()));
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
        // Slow: once is enough.
        let has_large_window = kind == NEW && !is_running;
        receive(&mut source, compression, has_large_window, &stream);
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
