//! Memory of a machine that stands still.

use super::*;
use crate::{Sharing, StoredPages};

/// Every third page is of zeroes, every third was never stored.
struct Parked(Vec<BlockLayout>);

const PAGES: u64 = 200;

impl StoredRam for Parked {
    fn blocks(&self) -> &[BlockLayout] {
        &self.0
    }

    fn read(
        &self,
        _block: BlockIndex,
        first_page: u64,
        into: &mut [u8],
    ) -> Result<StoredPages, HandlerError> {
        let mut kinds = StoredPages::default();
        for (page, (bit, into)) in (first_page..).zip((0..).zip(into.chunks_mut(4096))) {
            match page % 3 {
                0 => kinds.zero |= 1 << bit,
                1 => kinds.absent |= 1 << bit,
                _ => into.fill(page as u8 | 1),
            }
        }
        Ok(kinds)
    }

    fn working_set(&self) -> Vec<StoredRange> {
        vec![StoredRange {
            block: BlockIndex(0),
            first_page: 30,
            pages: 9,
        }]
    }
}

fn parked(postcopy: bool) -> RamSource {
    let layout = BlockLayout {
        idstr: Name::new("pc.ram").expect("short"),
        used_bytes: PAGES * PAGE_BYTES,
        max_bytes: PAGES * PAGE_BYTES,
        page_bytes: PAGE_BYTES,
        guest_address: None,
        sharing: Sharing::Private,
    };
    let options = RamSourceOptions {
        postcopy,
        ..RamSourceOptions::default()
    };
    RamSource::stored(Arc::new(Parked(vec![layout])), options).expect("a source")
}

fn sent(stream: &Stream) -> Vec<u64> {
    let records = stream.destination.records.iter();
    let mut pages: Vec<u64> = records.map(|(_, page, ..)| *page).collect();
    pages.sort_unstable();
    pages
}

/// A destination keeps its own there.
#[test]
fn a_precopy_leaves_out_what_was_not_stored() {
    let mut source = parked(false);
    let mut stream = Stream::begin(&mut source);
    while stream.part(&mut source) != Progress::Finished {}
    stream.end(&mut source, &GuestStopped::assert_drained());
    let stored = (0..PAGES).filter(|page| page % 3 != 1);
    assert_eq!(sent(&stream), Vec::from_iter(stored));
}

/// A destination has given up its own, and would wait: whether it goes before the guest runs, or behind.
#[test]
fn a_postcopy_sends_zeroes_for_what_was_not_stored() {
    let mut source = parked(true);
    let mut stream = Stream::begin(&mut source);
    assert_eq!(stream.part(&mut source), Progress::Finished);
    assert_eq!(
        sent(&stream),
        Vec::from_iter(30..39),
        "the head of the working set"
    );
    stream.discard(&mut source);
    stream.end_postcopy(&mut source);
    assert_eq!(sent(&stream), Vec::from_iter(0..PAGES));
    assert!(stream.destination.missing.is_empty());
    for (page, content) in stream.destination.blocks["pc.ram"].chunks(4096).enumerate() {
        let expected = if page % 3 == 2 { page as u8 | 1 } else { 0 };
        assert!(content.iter().all(|byte| *byte == expected), "page {page}");
    }
}
