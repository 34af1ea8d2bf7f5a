//! Streams of real QEMUs, in pieces of any length.

use vmferry_relay::park::Parked;
use vmferry_stream::Ending;

use crate::contents::{captures, park_in_pieces, read, seeded};

/// What is refused; see `refusals.rs`. Requested pages of a `preempt` went over another connection.
fn is_refused(name: &str) -> bool {
    ["blk-", "mapped-ram-", "multifd-", "preempt-"]
        .iter()
        .any(|start| name.starts_with(start))
}

fn is_postcopy(name: &str) -> bool {
    name.starts_with("postcopy-") && !name.contains("advised-only")
}

#[test]
fn every_capture_becomes_a_precopy_stream_with_the_same_contents() {
    let mut rng = seeded();
    let mut postcopies = 0;
    for name in captures() {
        if is_refused(&name) {
            continue;
        }
        let stream = crate::contents::capture(&name);
        let (expected, _, finish) = read(&stream).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut first: Option<Vec<u8>> = None;
        for max in [1 << 20, 100_000, 5000, 70] {
            let parked = park_in_pieces(&stream, || rng.usize(1..=max));
            let (bytes, parked) = parked.unwrap_or_else(|error| panic!("{name}, {max}: {error}"));
            match &first {
                Some(first) => assert!(*first == bytes, "{name}: pieces up to {max} differ"),
                None => first = Some(bytes),
            }
            postcopies += u32::from(parked.was_postcopy);
            assert_eq!(parked.was_postcopy, is_postcopy(&name), "{name}");
            check_ending(&name, &parked, finish.ending);
        }
        let bytes = first.expect("a file");
        let (mut found, commands, finish) =
            read(&bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(finish.bytes, bytes.len() as u64, "{name}");
        assert!(!finish.is_followed, "{name}");
        assert!(
            commands.iter().all(|name| name == "SWITCHOVER_START"),
            "{name}: {commands:?}"
        );
        if is_postcopy(&name) {
            assert_eq!(found.description.take().as_deref(), Some(&b"{}"[..]));
        }
        assert!(found == expected, "{name}");
    }
    assert!(postcopies >= 5 * 4);
}

fn check_ending(name: &str, parked: &Parked, ending: Ending) {
    if is_postcopy(name) {
        assert_eq!(parked.ending, Ending::WithDescription, "{name}");
    } else {
        assert_eq!(parked.ending, ending, "{name}");
    }
}
