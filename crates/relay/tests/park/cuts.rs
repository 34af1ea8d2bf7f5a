//! Streams that end too early.

use crate::contents::{capture, park, records, seeded};
use vmferry_relay::park::{ParkError, ParkOptions, Parker};
use vmferry_stream::Record;

/// Parking of what there is of a stream up to `cut`.
fn cut_at(stream: &[u8], cut: usize) -> Result<Vec<u8>, ParkError> {
    park(&stream[..cut])
}

/// Where a stream may end: behind EOF, and at its end.
fn ends(stream: &[u8]) -> Vec<usize> {
    let eof = |(_, record, end): &(usize, Record, usize)| (*record == Record::Eof).then_some(*end);
    let mut ends: Vec<_> = records(stream).iter().filter_map(eof).collect();
    ends.push(stream.len());
    ends
}

#[test]
fn a_stream_that_is_cut_anywhere_is_not_whole() {
    let mut rng = seeded();
    for name in [
        "none-100",
        "pc-72",
        "pc-100",
        "postcopy-72.fwd",
        "postcopy-100.fwd",
        "bgsnap-100",
    ] {
        let stream = capture(name);
        let ends = ends(&stream);
        let is_postcopy = name.starts_with("postcopy");
        let interesting = records(&stream)
            .into_iter()
            .flat_map(|(start, _, end)| [start, end]);
        let step = stream.len() / 300;
        let chosen = (0..300).map(|at| at * step + rng.usize(0..=step));
        let tail = stream.len().saturating_sub(40)..stream.len();
        for cut in interesting.step_by(7).chain(chosen).chain(tail) {
            let cut = cut.min(stream.len() - 1);
            if !is_postcopy && ends.contains(&cut) {
                continue;
            }
            let Err(error) = cut_at(&stream, cut) else {
                panic!("{name} is whole although it is cut at byte {cut}");
            };
            // It says where.
            let text = error.to_string();
            let offset = text.split("byte ").nth(1).and_then(|rest| {
                let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
                digits.parse::<usize>().ok()
            });
            assert!(
                offset.is_some_and(|offset| offset <= cut),
                "{name} at {cut}: {text}"
            );
        }
    }
}

#[test]
fn nothing_can_be_pushed_behind_a_failure() {
    let file = tempfile::tempfile().unwrap();
    let mut parker = Parker::new(file, ParkOptions::default()).unwrap();
    assert!(parker.push(b"QEVM\0\0\0\x02").is_err());
    assert!(matches!(parker.push(b"QEVM"), Err(ParkError::FailedBefore)));
    assert!(parker.interrupted().is_err());
    assert!(matches!(parker.finish(), Err(ParkError::FailedBefore)));
}

#[test]
fn what_follows_the_end_is_ignored() {
    for name in ["pc-2.3-72", "pc-7.2-100", "postcopy-72.fwd"] {
        let mut stream = capture(name);
        let expected = park(&stream).unwrap();
        let file = tempfile::tempfile().unwrap();
        let mut parker = Parker::new(file, ParkOptions::default()).unwrap();
        parker.push(&stream).unwrap();
        assert!(parker.is_over(), "{name}");
        if !name.starts_with("pc-") {
            stream.extend(b"something");
            assert!(park(&stream).unwrap() == expected);
        }
    }
}
