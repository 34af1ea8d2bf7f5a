//! XBZRLE encodings, applied to a page, and pages, encoded.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_stream::xbzrle::{Encoded, apply, check, encode};

fuzz_target!(|data: &[u8]| {
    let Some((&first, encoded)) = data.split_first() else {
        return;
    };
    let page_bytes = 1 << (first & 15);
    let mut rng = fastrand::Rng::with_seed(u64::from(first));
    let old: Vec<u8> = (0..page_bytes).map(|_| rng.u8(..)).collect();
    let mut page = old.clone();
    let applied = apply(&mut page, encoded);
    assert_eq!(applied, check(encoded, page_bytes));
    match applied {
        Ok(()) => {
            // Every byte that changed was written by a literal, which is in the encoding.
            let changed = old.iter().zip(&page).filter(|(old, new)| old != new);
            assert!(changed.count() < encoded.len().max(1));
            let once = page.clone();
            assert_eq!(apply(&mut page, encoded), Ok(()));
            assert_eq!(page, once, "again is no other");
            assert_eq!(check(encoded, 2 * page_bytes), Ok(()));
            round_trip(&old, &page);
        }
        Err(error) => {
            assert_eq!(page, old, "the page is as it was");
            assert!(error.at <= encoded.len());
        }
    }
    let (old, new) = encoded.split_at(encoded.len() / 2);
    round_trip(old, &new[..old.len()]);
});

/// What changed from `old` to `new`, applied, makes one of the other.
fn round_trip(old: &[u8], new: &[u8]) {
    let mut encoded = vec![first_byte(old)];
    let result = encode(old, new, &mut encoded);
    let (before, encoded) = encoded.split_at(1);
    assert_eq!(before, [first_byte(old)], "it is appended");
    match result {
        Encoded::Unchanged => assert!(old == new && encoded.is_empty()),
        Encoded::TooLong => assert!(encoded.is_empty()),
        Encoded::Changed => {
            let mut page = old.to_vec();
            assert_eq!(apply(&mut page, encoded), Ok(()));
            assert!(page == new && old != new);
            assert!(encoded.len() <= new.len());
        }
    }
}

fn first_byte(page: &[u8]) -> u8 {
    page.first().copied().unwrap_or_default()
}
