//! Streams of the real `zstd` are in the interop tests; these are of `ruzstd`, and damaged ones.

use ruzstd::encoding::{CompressionLevel, compress};

use super::*;

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    compress(bytes, &mut out, CompressionLevel::Fastest);
    out
}

/// Unpack packets; each is a blob and how many bytes it holds.
fn unpack(packets: &[(&[u8], usize)]) -> Result<Vec<u8>, Wrong> {
    let mut zstd = Zstd::default();
    let mut out = Vec::new();
    for (blob, bytes) in packets {
        let mut pages = vec![0; *bytes];
        zstd.unpack(blob, &mut pages)?;
        out.extend(pages);
    }
    Ok(out)
}

/// A frame without a content size, with this window descriptor.
fn frame(window: u8, blocks: &[&[u8]]) -> Vec<u8> {
    let head = [0x28, 0xb5, 0x2f, 0xfd, 0, window];
    [&head[..], &blocks.concat()].concat()
}

fn block(kind: u32, is_last: bool, size: u32, content: &[u8]) -> Vec<u8> {
    let head = (size << 3 | kind << 1 | u32::from(is_last)).to_le_bytes();
    [&head[..3], content].concat()
}

#[test]
fn blocks_of_one_frame_may_come_in_many_packets() {
    let first = frame(0x50, &[&block(0, false, 3, b"abc")]);
    let second = block(1, false, 5, b"x");
    let third = [
        block(0, true, 1, b"!"),
        frame(0, &[&block(1, true, 2, b"?")]),
    ]
    .concat();
    let packets = [(&first[..], 3), (&second, 5), (&third, 3)];
    assert_eq!(unpack(&packets), Ok(b"abcxxxxx!??".to_vec()));
}

#[test]
fn skippable_frames_are_skipped() {
    let skipped = [
        &[0x5a, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..],
        &packed(b"data"),
    ]
    .concat();
    assert_eq!(unpack(&[(&skipped, 4)]), Ok(b"data".to_vec()));
    assert_eq!(unpack(&[(&skipped[..9], 4)]), Err(CUT));
}

#[test]
fn windows_are_held_to_their_maximum() {
    // 32 MiB, and an eighth more.
    let most = frame(15 << 3, &[&block(1, true, 2, b"?")]);
    let more = frame(15 << 3 | 1, &[&block(1, true, 2, b"?")]);
    assert_eq!(unpack(&[(&most, 2)]), Ok(b"??".to_vec()));
    assert!(unpack(&[(&more, 2)]).is_err());
}

#[test]
fn blocks_are_held_to_their_maximum() {
    let most = frame(0x50, &[&block(1, true, 128 << 10, b"?")]);
    assert!(unpack(&[(&most, 128 << 10)]).is_ok());
    let more = frame(0x50, &[&block(1, true, (128 << 10) + 1, b"?")]);
    assert!(unpack(&[(&more, (128 << 10) + 1)]).is_err());
}

#[test]
fn history_is_forgotten_but_not_the_window() {
    let mut zstd = Zstd::default();
    // A window of 1 KiB.
    let mut blob = frame(0, &[&block(1, false, 128 << 10, b"a")]);
    for _ in 0..20 {
        zstd.unpack(&blob, &mut vec![0; 128 << 10]).unwrap();
        assert!((1024..=(129 << 10)).contains(&zstd.history.len()));
        blob = block(1, false, 128 << 10, b"b");
    }
}

/// No copy reaches behind the beginning, and a block that copies for ever is refused at its packet's end.
#[test]
fn copies_stay_in_bounds() {
    let end = 10;
    let mut history = b"ab".to_vec();
    assert_eq!(copy(&mut history, 3, 1, end), Err(TOO_FAR));
    assert_eq!(copy(&mut history, 2, 9, end), Err(TOO_LONG));
    assert_eq!(copy(&mut history, 2, 7, end), Ok(()));
    assert_eq!(history, b"ababababa");
}

#[test]
fn any_bytes_are_refused_or_fill_their_pages() {
    let mut rng = crate::test_rng();
    let text: Vec<u8> = (0..40_000u32)
        .map(|at| (at % 251) as u8 ^ (at / 3000) as u8)
        .collect();
    let good = packed(&text);
    assert_eq!(unpack(&[(&good, text.len())]), Ok(text.clone()));
    let rounds = match std::env::var_os("VMFERRY_LONG") {
        Some(_) => 200_000,
        None => 3_000,
    };
    for _ in 0..rounds {
        let mut bad = good.clone();
        for _ in 0..rng.usize(1..6) {
            let place = rng.usize(4..bad.len());
            bad[place] = rng.u8(..);
        }
        bad.truncate(rng.usize(bad.len() / 2..=bad.len()));
        let _ = unpack(&[(&bad, text.len())]);
    }
}

/// Streams that libzstd made, at each level that QEMU has, flushed every now and then.
#[test]
fn streams_of_the_reference_unpack() {
    let Some(program) = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .map(|folder| folder.join("zstd"))
        .find(|program| program.exists())
    else {
        println!("left out: needs zstd");
        return;
    };
    let mut rng = crate::test_rng();
    for level in 1..=19 {
        let mut bytes = Vec::new();
        while bytes.len() < 700_000 {
            let from = rng.usize(..bytes.len().max(1));
            let count = rng.usize(1..3000);
            match rng.u8(..4) {
                0 => bytes.extend((0..count).map(|_| rng.u8(..))),
                1 => bytes.extend((0..count).map(|_| rng.u8(b'a'..b'f'))),
                2 => bytes.extend(vec![rng.u8(..); count]),
                _ => bytes.extend(
                    bytes
                        .iter()
                        .skip(from)
                        .take(count)
                        .copied()
                        .collect::<Vec<_>>(),
                ),
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        std::fs::write(&path, &bytes).unwrap();
        let output = std::process::Command::new(&program)
            .args(["-q", "-c", &format!("-{level}")])
            .arg(&path)
            .output()
            .unwrap();
        assert!(output.status.success());
        assert!(
            unpack(&[(&output.stdout, bytes.len())]).as_ref() == Ok(&bytes),
            "{level}"
        );
    }
}
