//! A stream that is cut anywhere is truncated, and the error says where.

use vmferry_stream::{Ending, Fault, Options, Record, Section};

use crate::drive::{Run, Split, find_footer, pass_rest, run, without_footers};
use crate::{block_stream, capture};

/// Cut `input` at each of these bytes; `whole_at` are the cuts after which a stream without a
/// description is whole.
fn check(
    input: &[u8],
    cuts: impl Iterator<Item = usize>,
    options: Options,
    devices: crate::drive::Devices<'_>,
    whole_at: &[usize],
) {
    for cut in cuts {
        let Run { ending, .. } = run(&input[..cut], options, Split::Whole, devices);
        if whole_at.contains(&cut) {
            assert_eq!(ending, Ok(Ending::WithoutDescription), "cut at {cut}");
            continue;
        }
        let error = match ending {
            Err(error) => error,
            Ok(ending) => panic!("cut at {cut} is {ending:?}"),
        };
        assert!(
            matches!(error.fault, Fault::Truncated(_)),
            "cut at {cut}: {error}"
        );
        assert_eq!(error.offset, cut as u64, "{error}");
    }
}

/// The byte after EOF.
fn end_of_state(input: &[u8]) -> usize {
    let run = run(input, Options::default(), Split::Whole, &find_footer);
    let Some((Record::Description { bytes }, _)) = run.records.last() else {
        panic!("no description");
    };
    input.len() - *bytes as usize - 5
}

#[test]
fn at_every_byte_of_the_smallest_stream() {
    let input = capture("none-72");
    let whole = end_of_state(&input);
    // Where to cut a device's body is found in the whole stream.
    let lengths = |section: &Section, _: &[u8]| find_footer(section, body(&input, section));
    check(
        &input,
        0..input.len(),
        Options::default(),
        &lengths,
        &[whole],
    );
}

/// The whole stream from the body of a device section on.
fn body<'a>(input: &'a [u8], section: &Section) -> &'a [u8] {
    let name_bytes = section.name.len() as u8;
    let mut header = [&[4], &section.id.0.to_be_bytes()[..], &[name_bytes]].concat();
    header.extend(section.name.bytes());
    let at = input
        .windows(header.len())
        .position(|window| window == header)
        .expect("section is in the stream");
    &input[at + header.len() + 8..]
}

#[test]
fn at_every_byte_of_the_rest_that_is_passed_on() {
    let input = capture("none-72");
    let whole = end_of_state(&input);
    check(
        &input,
        0..input.len(),
        Options::default(),
        &pass_rest,
        &[whole],
    );
}

#[test]
fn around_every_record_of_the_block_stream() {
    let input = block_stream();
    let headers = 140;
    let payload_end = input.len() - 60;
    let cuts = (0..headers)
        .chain((headers..payload_end).step_by(10_007))
        .chain(payload_end..input.len());
    let whole = end_of_state(&input);
    check(&input, cuts, Options::default(), &pass_rest, &[whole]);
}

#[test]
fn without_footers_the_end_is_one_zero_byte() {
    let input = b"QEVM\0\0\0\x03\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x10\0";
    for options in [Options::default(), without_footers()] {
        check(input, 0..input.len(), options, &pass_rest, &[]);
        let whole = run(input, options, Split::Whole, &pass_rest);
        assert_eq!(whole.ending, Ok(Ending::WithoutDescription));
    }
}

#[test]
fn the_error_says_where_and_in_what() {
    let input = block_stream();
    let message = |cut: usize| {
        let run = run(&input[..cut], Options::default(), Split::Whole, &pass_rest);
        run.ending.expect_err("truncated").to_string()
    };
    assert_eq!(
        message(3),
        "stream truncated inside the header (byte 3, magic)"
    );
    assert_eq!(
        message(20),
        "stream truncated inside the configuration (byte 20, machine name)"
    );
    assert_eq!(
        message(50),
        "stream truncated inside section 'block' (0x1) (byte 50, block record)"
    );
    assert_eq!(
        message(100_000),
        "stream truncated inside section 'block' (0x1) (byte 100000, payload)"
    );
    let none = capture("none-72");
    let passed = run(
        &none[..none.len() - 1],
        Options::default(),
        Split::Whole,
        &pass_rest,
    );
    assert_eq!(
        passed.ending.expect_err("truncated").to_string(),
        "stream truncated inside what was passed on from section 'timer' on (byte 746, payload)"
    );
    assert_eq!(
        message(input.len() - 1),
        "stream truncated inside the description (byte 1048713, payload)"
    );
}
