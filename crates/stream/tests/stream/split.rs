//! Records and payload do not depend on how the input is cut into windows.

use vmferry_stream::{Decoder, Options, Record, Step};

use crate::drive::{Split, find_footer, pass_rest, run, without_footers};
use crate::{block_stream, capture, rounds, seeded};

#[test]
fn any_split_gives_the_same() {
    let mut rng = seeded();
    for name in [
        "none-72",
        "none-100",
        "blk-72",
        "pc-72",
        "compress-72",
        "ignore-shared-100",
        "advise0-72",
        "no-vmdesc-72",
        "return-path-100.fwd",
        "postcopy-72.fwd",
        "postcopy-hugepages-100.fwd",
        "multifd-100.conn0.fwd",
    ] {
        let input = capture(name);
        for devices in [&pass_rest as crate::drive::Devices<'_>, &find_footer] {
            let whole = run(&input, Options::default(), Split::Whole, devices);
            for _ in 0..rounds(4) {
                let cut = run(&input, Options::default(), Split::Random(&mut rng), devices);
                assert!(whole == cut, "{name}");
            }
        }
    }
}

#[test]
fn any_split_of_a_broken_stream_gives_the_same_error() {
    let mut rng = seeded();
    let streams = [
        (capture("none-72"), Options::default()),
        (capture("compress-72"), Options::default()),
        (capture("postcopy-72.fwd"), Options::default()),
        (capture("pc-2.2-72"), without_footers()),
        (block_stream(), Options::default()),
    ];
    let mut broken = 0;
    for (input, options) in &streams {
        for _ in 0..rounds(60) {
            let mut input = input.clone();
            let limit = input.len().min(250);
            for _ in 0..rng.usize(1..4) {
                let at = rng.usize(..limit);
                input[at] = rng.u8(..);
            }
            let whole = run(&input, *options, Split::Whole, &find_footer);
            let cut = run(&input, *options, Split::Random(&mut rng), &find_footer);
            assert!(whole == cut, "{:?} and {:?}", whole.ending, cut.ending);
            broken += usize::from(whole.ending.is_err());
        }
    }
    assert!(broken > 50, "only {broken} streams were broken");
}

/// Found by the fuzzer: the field that an error names depended on an earlier, too short window.
#[test]
fn the_end_of_what_is_passed_on_does_not_depend_on_windows() {
    let mut rng = seeded();
    let input = b"QEVM\0\0\0\x03\x01\0\0\0\x01\x04vfio\0\0\0\0\0\0\0\x01";
    let whole = run(input, Options::default(), Split::Whole, &pass_rest);
    assert!(whole.ending.is_err());
    for _ in 0..50 {
        let cut = run(
            input,
            Options::default(),
            Split::Random(&mut rng),
            &pass_rest,
        );
        assert_eq!(whole, cut);
    }
}

/// Found by the fuzzer, too: the same where the caller looks for the end of a device's body.
#[test]
fn the_end_inside_a_device_does_not_depend_on_windows() {
    let input = b"QEVM\0\0\0\x03\x07\0\0\0\x04none\x01\0\0\0\x01\x04vfio\0\0\0\0\0\0\0\x01state";
    for first_bytes in [input.len(), 1] {
        let mut decoder = Decoder::new(Options::default());
        let (mut at, mut window_bytes) = (0, first_bytes);
        loop {
            let end = input.len().min(at + window_bytes);
            match decoder.step(&input[at..end]).expect("right so far") {
                Step::NeedMore(bytes) => window_bytes = bytes,
                Step::Record { record, used } => {
                    at += used;
                    window_bytes = first_bytes;
                    if matches!(record, Record::Section(_)) {
                        break;
                    }
                }
                step => panic!("{step:?}"),
            }
        }
        let error = decoder
            .finish_at(input.len() as u64)
            .expect_err("truncated");
        assert_eq!(
            error.to_string(),
            "stream truncated inside section 'vfio' (0x1) (byte 40, payload)"
        );
    }
}
