//! The decoder and encoder against streams of real QEMUs, streams that we made, and broken ones.

mod captures;
mod drive;
mod limits;
mod malformed;
mod mapped_ram;
mod return_path;
mod roundtrip;
mod split;
mod truncation;
mod xbzrle;

use std::io::Read;
use std::path::{Path, PathBuf};

fn captures_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/captures")
}

/// The bytes of a captured stream.
fn capture(name: &str) -> Vec<u8> {
    let path = captures_folder().join(format!("{name}.xz"));
    let file =
        std::fs::File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    xz2::read::XzDecoder::new(file)
        .read_to_end(&mut bytes)
        .expect("capture is whole");
    bytes
}

/// A generator whose seed is printed; `VMFERRY_SEED` repeats a run.
fn seeded() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED").map_or_else(
        |_| fastrand::u64(..),
        |seed| seed.parse().expect("VMFERRY_SEED is a number"),
    );
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// More rounds with `VMFERRY_LONG=1`.
fn rounds(usual: usize) -> usize {
    if std::env::var_os("VMFERRY_LONG").is_some() {
        usual * 50
    } else {
        usual
    }
}

fn name(text: &str) -> vmferry_stream::Name {
    vmferry_stream::Name::new(text).expect("name is short")
}

/// The smallest stream with a disk, as a real QEMU 7.2 accepts it.
fn block_stream() -> Vec<u8> {
    let mut stream = b"QEVM\0\0\0\x03\x07\0\0\0\x0dpc-i440fx-7.2".to_vec();
    stream.extend(b"\x01\0\0\0\x01\x05block\0\0\0\0\0\0\0\x01");
    stream.extend(b"\0\0\0\0\0\0\0\x02\x7e\0\0\0\x01");
    stream.extend(b"\x02\0\0\0\x01");
    stream.extend(b"\0\0\0\0\0\0\0\x09\x05disk0");
    stream.extend(b"\0\0\0\0\0\x10\0\x01\x05disk0");
    stream.extend((0..1 << 20).map(|byte: u32| byte.to_be_bytes()[2] ^ 0x5a));
    stream.extend(b"\0\0\0\0\0\0\0\x02\x7e\0\0\0\x01");
    stream.extend(b"\x03\0\0\0\x01");
    stream.extend(b"\0\0\0\0\0\0\xc8\x04");
    stream.extend(b"\0\0\0\0\0\0\0\x02\x7e\0\0\0\x01");
    stream.extend(b"\0\x06\0\0\0\x02{}");
    stream
}
