//! Streams that are cut or changed: never a panic, and nothing that was not there.

use vmferry_inspect::{CoreImage, CoreOptions, DiskImage, walk};

use crate::{capture, ram};

fn seeded() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

fn runs() -> usize {
    if std::env::var_os("VMFERRY_LONG").is_some() {
        4000
    } else {
        150
    }
}

/// Everything that can be taken out of a stream.
fn take_all(stream: &[u8]) -> Result<(), String> {
    let mut core = CoreImage::new(tempfile::tempfile().unwrap(), CoreOptions::default());
    let walked = walk(stream, &mut core);
    let taken = core.finish().map(|_| ());
    let mut disk = DiskImage::new(tempfile::tempfile().unwrap(), None, None);
    // Its errors are the first walk's.
    let _ = walk(stream, &mut disk);
    let _ = disk.finish();
    walked.map_err(|error| error.to_string())?;
    taken.map_err(|error| error.to_string())
}

#[test]
fn a_stream_that_is_cut_anywhere_leaves_what_was_before() {
    let stream = capture("xbzrle-100");
    let (whole, _) = ram(&stream, "microvm.ram").unwrap();
    let mut random = seeded();
    for _ in 0..runs() / 4 {
        let end = random.usize(..stream.len() - 1);
        let error = take_all(&stream[..end]).unwrap_err();
        assert!(error.contains("byte"), "{end}: {error}");
    }
    assert!(take_all(&stream).is_ok());
    assert_eq!(ram(&stream, "microvm.ram").unwrap().0, whole);
}

#[test]
fn a_stream_that_is_changed_anywhere_does_no_harm() {
    let mut random = seeded();
    for name in ["xbzrle-72", "compress-72", "postcopy-72.fwd", "pc-2.2-72"] {
        let stream = capture(name);
        for _ in 0..runs() / 4 {
            let mut changed = stream.clone();
            for _ in 0..random.usize(1..8) {
                let at = random.usize(..changed.len());
                changed[at] ^= 1 << random.u8(..8);
            }
            // Either way; most changes are in pages.
            let _ = take_all(&changed);
        }
    }
}

/// Changes in the lists of blocks, where lengths and names are.
#[test]
fn wrong_lengths_and_names_do_no_harm() {
    let mut random = seeded();
    for name in ["pc-100", "mapped-ram-100", "blk-72"] {
        let stream = capture(name);
        for _ in 0..runs() / 4 {
            let mut changed = stream.clone();
            let at = random.usize(..600.min(changed.len()));
            changed[at] = random.u8(..);
            let _ = take_all(&changed);
        }
    }
}
