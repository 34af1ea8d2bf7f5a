//! XBZRLE against a simple encoder, and on the records of real QEMUs.

use std::collections::HashMap;

use vmferry_stream::xbzrle::{apply, check};
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

/// The encoding of what changed from `old` to `new`.
fn encode(old: &[u8], new: &[u8]) -> Vec<u8> {
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
        let encoded = encode(&old, &new);
        if encoded.len() > page_bytes {
            continue;
        }
        assert_eq!(check(&encoded, page_bytes), Ok(()));
        apply(&mut old, &encoded).expect("right");
        assert!(old == new);
    }
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
        let mut encoded = encode(&old, &new);
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
                    let changed = encode(&before, page);
                    assert_ne!(changed, b"", "a record changes something");
                    applied += 1;
                }
                _ => {}
            }
        }
        assert_eq!(applied, records, "{capture_name}");
    }
}
