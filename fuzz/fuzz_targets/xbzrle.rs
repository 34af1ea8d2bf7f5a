//! XBZRLE encodings, applied to a page.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmferry_stream::xbzrle::{apply, check};

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
        }
        Err(error) => {
            assert_eq!(page, old, "the page is as it was");
            assert!(error.at <= encoded.len());
        }
    }
});
