//! XBZRLE, both ways: against a simple encoder, and on the records of real QEMUs.

use std::collections::HashMap;

use vmferry_stream::xbzrle::{Encoded, apply, check, encode};
use vmferry_stream::{Name, Options, RamRecord, Record};

use crate::drive::{Split, find_footer, run};
use crate::{capture, rounds, seeded};

fn length(mut bytes: usize, out: &mut Vec<u8>) {
    if bytes > 0x7f {
        out.push(bytes as u8 | 0x80);
        bytes >>= 7;
    }
    out.push(bytes as u8);
}

/// The encoding of what changed from `old` to `new`, a literal for each run of changed bytes.
fn encode_simply(old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < new.len() {
        let same = (at..new.len())
            .take_while(|at| old[*at] == new[*at])
            .count();
        let start = at + same;
        let changed = (start..new.len())
            .take_while(|at| old[*at] != new[*at])
            .count();
        if changed > 0 {
            length(same, &mut out);
            length(changed, &mut out);
            out.extend(&new[start..start + changed]);
        }
        at = start + changed;
    }
    out
}

/// What ours makes of it, behind bytes that stay; `None` if it is too long. Applied, it makes `new`.
fn encoded(old: &[u8], new: &[u8]) -> Option<Vec<u8>> {
    let mut out = b"before".to_vec();
    let result = encode(old, new, &mut out);
    let encoded = out.strip_prefix(b"before").expect("it is appended");
    match result {
        Encoded::TooLong => {
            assert_eq!(encoded, b"");
            return None;
        }
        Encoded::Unchanged => assert!(encoded.is_empty() && old == new),
        Encoded::Changed => assert_ne!(encoded, b""),
    }
    let mut page = old.to_vec();
    apply(&mut page, encoded).expect("right");
    assert!(page == new, "{old:x?} {new:x?} {encoded:x?}");
    Some(encoded.to_vec())
}

fn change(page: &mut [u8], rng: &mut fastrand::Rng) {
    for _ in 0..rng.usize(..20) {
        let start = rng.usize(..page.len());
        let longest = [2, 10, 1000][rng.usize(..3)];
        let end = page.len().min(start + rng.usize(1..longest));
        rng.fill(&mut page[start..end]);
    }
}

#[test]
fn what_was_encoded_is_applied() {
    let mut rng = seeded();
    for _ in 0..rounds(500) {
        // Runs of longer pages may not fit into a length.
        let page_bytes = 1 << rng.u32(10..=13);
        let mut old = vec![0; page_bytes];
        change(&mut old, &mut rng);
        let mut new = old.clone();
        change(&mut new, &mut rng);
        let encoded = encode_simply(&old, &new);
        if encoded.len() > page_bytes {
            continue;
        }
        assert_eq!(check(&encoded, page_bytes), Ok(()));
        apply(&mut old, &encoded).expect("right");
        assert!(old == new);
    }
}

#[test]
fn what_we_encode_is_applied() {
    let mut rng = seeded();
    let mut too_long = 0;
    for _ in 0..rounds(2000) {
        let page_bytes = match rng.bool() {
            true => 4096,
            false => rng.usize(1..300),
        };
        let mut old = vec![0; page_bytes];
        change(&mut old, &mut rng);
        let mut new = old.clone();
        match rng.bool() {
            true => change(&mut new, &mut rng),
            // Bytes here and there, close together.
            false => {
                let one_in = rng.u32(1..20);
                new.iter_mut()
                    .for_each(|byte| *byte ^= u8::from(rng.u32(..one_in) == 0));
            }
        }
        let simple = encode_simply(&old, &new);
        // A literal that took in a gap may be the first whose length needs two bytes.
        let longer_max = simple.len() / 127;
        match encoded(&old, &new) {
            Some(ours) => {
                assert!(ours.len() <= page_bytes);
                assert!(ours.len() <= simple.len() + longer_max);
            }
            None => {
                assert!(simple.len() + longer_max > page_bytes, "{}", simple.len());
                too_long += 1;
            }
        }
    }
    assert!(too_long > 0);
}

/// A skip and a literal of every length around the places where lengths become longer.
#[test]
fn runs_of_every_length() {
    let lengths = [
        0, 1, 2, 3, 7, 8, 9, 126, 127, 128, 129, 255, 256, 4094, 4095,
    ];
    for skip in lengths {
        for literal in lengths.into_iter().filter(|literal| *literal > 0) {
            let rest = 4096_usize.saturating_sub(skip + literal);
            let mut new = vec![1; skip + literal + rest];
            new[skip..skip + literal].fill(2);
            let old = vec![1; new.len()];
            let bytes = |run: usize| 1 + usize::from(run > 127);
            let expected = bytes(skip) + bytes(literal) + literal;
            let expected = (expected <= new.len()).then_some(expected);
            assert_eq!(
                encoded(&old, &new).map(|encoded| encoded.len()),
                expected,
                "skip {skip}, literal {literal}"
            );
        }
    }
}

/// Pages can have 64 KiB; a length says at most 16383.
#[test]
fn runs_that_no_length_can_say() {
    let page = |skip: usize, literal: usize| {
        let old = vec![1; 1 << 16];
        let mut new = old.clone();
        new[skip..skip + literal].fill(2);
        encoded(&old, &new).map(|encoded| encoded.len())
    };
    assert_eq!(page(16383, 16383), Some(4 + 16383));
    assert_eq!(page(16384, 1), None);
    assert_eq!(page(1, 16384), None);
    assert_eq!(page(0, 16383), Some(3 + 16383));
}

/// A skip of two bytes costs as much as what it skips, one of three less.
#[test]
fn short_gaps_are_sent_along() {
    let old = [0; 64];
    let with = |changed: &[usize]| {
        let mut new = old;
        changed.iter().for_each(|at| new[*at] = 7);
        encoded(&old, &new).expect("short")
    };
    assert_eq!(with(&[0, 2]), b"\0\x03\x07\0\x07");
    assert_eq!(with(&[6, 9]), b"\x06\x04\x07\0\0\x07");
    assert_eq!(with(&[6, 10]), b"\x06\x01\x07\x03\x01\x07");
    assert_eq!(with(&[63]), b"\x3f\x01\x07");
    assert_eq!(with(&[]), b"");
}

/// `check` and `apply` agree about anything, and a page is changed whole or not at all.
#[test]
fn a_broken_encoding_changes_nothing() {
    let mut rng = seeded();
    let mut refused = 0;
    for _ in 0..rounds(2000) {
        let old: Vec<u8> = (0..512).map(|_| rng.u8(..3)).collect();
        let mut new = old.clone();
        change(&mut new, &mut rng);
        let mut encoded = encode_simply(&old, &new);
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(..=encoded.len());
            match rng.u8(..3) {
                0 => encoded.insert(at, rng.u8(..)),
                1 => encoded.truncate(at),
                _ if at < encoded.len() => encoded[at] = rng.u8(..),
                _ => {}
            }
        }
        let mut page = old.clone();
        let applied = apply(&mut page, &encoded);
        assert_eq!(applied, check(&encoded, 512));
        if let Err(error) = applied {
            assert!(page == old, "{error}");
            assert!(error.at <= encoded.len(), "{error}");
            refused += 1;
        }
    }
    assert!(refused > 100, "only {refused} were refused");
}

/// Applied to the pages before, every record of a real QEMU changes its page.
#[test]
fn records_of_qemu() {
    for (capture_name, records) in [("xbzrle-72", 112), ("xbzrle-100", 104)] {
        let run = run(
            &capture(capture_name),
            Options::default(),
            Split::Whole,
            &find_footer,
        );
        let mut pages: HashMap<(Name, u64), Vec<u8>> = HashMap::new();
        let mut applied = 0;
        for (record, payload) in run.records {
            let Record::Ram(record) = record else {
                continue;
            };
            match record {
                RamRecord::Page { page, .. } => {
                    pages.insert((page.block, page.offset_bytes), payload);
                }
                RamRecord::Zero { page, .. } => {
                    pages.insert((page.block, page.offset_bytes), vec![0; 4096]);
                }
                RamRecord::Xbzrle { page, .. } => {
                    let page = pages
                        .get_mut(&(page.block, page.offset_bytes))
                        .expect("the page was sent before");
                    let before = page.clone();
                    apply(page, &payload).expect("a real encoding");
                    let ours = encoded(&before, page).expect("shorter than a page");
                    assert_ne!(ours, b"", "a record changes something");
                    assert!(ours.len() <= payload.len(), "{ours:x?} {payload:x?}");
                    applied += 1;
                }
                _ => {}
            }
        }
        assert_eq!(applied, records, "{capture_name}");
    }
}
