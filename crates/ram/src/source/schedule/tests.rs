use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::testing::{long, rng};

const RAM: BlockIndex = BlockIndex(0);

fn small(pages: u64) -> BlockPages {
    BlockPages {
        pages,
        host_pages: 1,
        travels: true,
    }
}

fn run(block: usize, pages: Range<u64>) -> Run {
    Run {
        block: BlockIndex(block),
        pages,
    }
}

#[test]
fn a_pass_goes_over_the_blocks_in_their_order() {
    let mut schedule = Schedule::new(&[small(5), small(1), small(3)]);
    assert!(schedule.is_bulk());
    assert_eq!((schedule.left(), schedule.total()), (9, 9));
    let runs: Vec<Run> = std::iter::from_fn(|| schedule.next(4)).collect();
    assert_eq!(
        runs,
        [run(0, 0..4), run(0, 4..5), run(1, 0..1), run(2, 0..3)]
    );
    assert!(schedule.is_bulk(), "nobody has looked at the log");
    assert!(!schedule.begin_pass());
    assert!(!schedule.is_bulk());
    assert_eq!((schedule.left(), schedule.passes()), (0, 1));
}

#[test]
fn a_pass_sends_a_page_once() {
    let mut schedule = Schedule::new(&[small(4)]);
    assert_eq!(schedule.next(2), Some(run(0, 0..2)));
    // One is behind the cursor, the other still to come.
    assert_eq!(schedule.mark(RAM, 1..3), 1);
    assert_eq!(schedule.next(9), Some(run(0, 2..4)));
    assert_eq!(schedule.next(9), None);
    assert!(schedule.begin_pass());
    assert_eq!(schedule.passes(), 2);
    assert_eq!(schedule.next(9), Some(run(0, 1..2)));
    assert_eq!(schedule.next(9), None);
}

#[test]
fn what_does_not_travel_is_never_sent() {
    let shared = BlockPages {
        travels: false,
        ..small(3)
    };
    let mut schedule = Schedule::new(&[shared, small(1)]);
    assert_eq!(schedule.mark(RAM, 0..3), 0);
    assert_eq!(schedule.mark(BlockIndex(7), 0..3), 0);
    assert_eq!(schedule.next(9), Some(run(1, 0..1)));
    assert_eq!(schedule.next(9), None);
    schedule.send_once();
    schedule.serve(run(0, 0..3));
    assert_eq!(schedule.next(9), None);
}

#[test]
fn a_request_goes_first_and_the_sweep_goes_on_behind_it() {
    let mut schedule = Schedule::new(&[small(4), small(6)]);
    schedule.send_once();
    assert_eq!(schedule.next(1), Some(run(0, 0..1)));
    schedule.serve(run(1, 2..5));
    assert_eq!(schedule.next(2), Some(run(1, 2..4)));
    assert!(schedule.is_serving());
    assert_eq!(schedule.next(2), Some(run(1, 4..5)));
    assert!(!schedule.is_serving());
    assert_eq!(schedule.next(2), Some(run(1, 5..6)));
    // Round, to what was left out.
    schedule.serve(run(1, 2..5));
    assert_eq!(schedule.next(9), Some(run(0, 1..4)));
    assert!(!schedule.is_serving(), "it was served before");
    assert_eq!(schedule.next(9), Some(run(1, 0..2)));
    assert_eq!(schedule.next(9), None);
    assert_eq!(schedule.left(), 0);
}

#[test]
fn nothing_is_served_of_what_was_sent() {
    let mut schedule = Schedule::new(&[small(6)]);
    schedule.send_once();
    assert_eq!(schedule.next(3), Some(run(0, 0..3)));
    schedule.serve(run(0, 1..3));
    assert!(!schedule.is_serving(), "the next request has its turn");
    schedule.serve(run(0, 2..4));
    assert!(schedule.is_serving());
    assert_eq!(schedule.next(9), Some(run(0, 3..4)));
    schedule.serve(run(7, 0..1));
    assert!(!schedule.is_serving());
}

#[test]
fn host_pages_go_whole() {
    let huge = BlockPages {
        pages: 20,
        host_pages: 8,
        travels: true,
    };
    let mut schedule = Schedule::new(&[huge]);
    while schedule.next(64).is_some() {}
    schedule.begin_pass();
    schedule.mark(RAM, 3..4);
    schedule.mark(RAM, 17..18);
    schedule.send_once();
    assert_eq!(
        schedule.left_of(RAM).collect::<Vec<_>>(),
        [0..8, 16..20],
        "the last one is cut off"
    );
    assert_eq!(schedule.left(), 12);
    // What is written now is written by nobody.
    assert_eq!(schedule.mark(RAM, 8..9), 0);
    assert_eq!(schedule.next(1), Some(run(0, 0..8)));
    assert_eq!(schedule.next(1), Some(run(0, 16..20)));
    assert_eq!(schedule.next(1), None);
}

#[test]
fn only_what_is_missing_is_sent_again() {
    let mut schedule = Schedule::new(&[small(9), small(3)]);
    schedule.send_once();
    schedule.serve(run(0, 0..9));
    schedule.next(5);
    let (first, second) = (PageBitmap::new(9), PageBitmap::new(3));
    first.set_range(2..4);
    second.set(2);
    schedule.resume(vec![first, second]);
    assert!(!schedule.is_serving());
    assert_eq!(schedule.left(), 3);
    let runs: BTreeSet<(usize, u64, u64)> = std::iter::from_fn(|| schedule.next(9))
        .map(|run| (run.block.0, run.pages.start, run.pages.end))
        .collect();
    assert_eq!(runs, BTreeSet::from([(0, 2, 4), (1, 2, 3)]));
}

/// A guest that writes, a log, and a destination that knows versions of pages.
struct Model {
    blocks: Vec<BlockPages>,
    /// The version of each page: how often it was written.
    written: BTreeMap<(usize, u64), u64>,
    /// The version that the destination has.
    sent: BTreeMap<(usize, u64), u64>,
    /// What the log will tell.
    log: BTreeSet<(usize, u64)>,
    schedule: Schedule,
}

impl Model {
    fn new(rng: &mut fastrand::Rng) -> Self {
        let block = |rng: &mut fastrand::Rng| {
            let host_pages = [1, 1, 4, 16][rng.usize(..4)];
            BlockPages {
                pages: match rng.u8(..4) {
                    0 => 1,
                    _ => rng.u64(1..200),
                },
                host_pages,
                travels: rng.u8(..6) > 0,
            }
        };
        let blocks: Vec<BlockPages> = (0..rng.usize(1..5)).map(|_| block(rng)).collect();
        Self {
            schedule: Schedule::new(&blocks),
            blocks,
            written: BTreeMap::new(),
            sent: BTreeMap::new(),
            log: BTreeSet::new(),
        }
    }

    fn write(&mut self, rng: &mut fastrand::Rng) {
        for _ in 0..rng.u32(..6) {
            let block = rng.usize(..self.blocks.len());
            let page = rng.u64(..self.blocks[block].pages);
            *self.written.entry((block, page)).or_default() += 1;
            self.log.insert((block, page));
        }
    }

    fn collect(&mut self) {
        for (block, page) in std::mem::take(&mut self.log) {
            self.schedule.mark(BlockIndex(block), page..page + 1);
        }
    }

    fn version(&self, at: (usize, u64)) -> u64 {
        self.written.get(&at).copied().unwrap_or(0)
    }

    /// Its pages, which have now been read.
    fn send(&mut self, run: &Run) -> Vec<(usize, u64)> {
        let at: Vec<_> = run.pages.clone().map(|page| (run.block.0, page)).collect();
        assert!(!at.is_empty());
        for at in &at {
            assert!(at.1 < self.blocks[at.0].pages && self.blocks[at.0].travels);
            self.sent.insert(*at, self.version(*at));
        }
        at
    }

    fn travelling(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        let blocks = self.blocks.iter().enumerate();
        blocks
            .filter(|(_, block)| block.travels)
            .flat_map(|(index, block)| (0..block.pages).map(move |page| (index, page)))
    }

    fn is_whole(&self) -> bool {
        self.travelling()
            .all(|at| self.sent.get(&at) == Some(&self.version(at)))
    }

    /// Passes over memory that is written all the time, looking at the log whenever it likes.
    fn precopy(&mut self, rng: &mut fastrand::Rng, passes: u32) {
        for _ in 0..passes {
            let mut in_pass = BTreeSet::new();
            while let Some(run) = self.schedule.next(rng.u64(1..70)) {
                for at in self.send(&run) {
                    assert!(in_pass.insert(at), "{at:?} twice in a pass");
                }
                self.write(rng);
                if rng.u8(..4) == 0 {
                    self.collect();
                }
                if rng.u8(..100) == 0 {
                    return;
                }
            }
            self.collect();
            self.schedule.begin_pass();
        }
    }

    /// Serve requests and sweep until nothing is left, or until the connection breaks.
    fn postcopy(&mut self, rng: &mut fastrand::Rng, missing: &mut BTreeSet<(usize, u64)>) -> bool {
        loop {
            let wanted = (rng.u8(..3) == 0 && !self.schedule.is_serving()).then(|| self.ask(rng));
            let pages_max = rng.u64(1..40);
            let served = wanted.as_ref().and_then(|request| {
                let range = request.pages.clone().map(|page| (request.block.0, page));
                range.into_iter().find(|at| missing.contains(at))
            });
            let Some(run) = self.schedule.next(pages_max) else {
                return true;
            };
            let at = self.send(&run);
            assert!(
                served.is_none_or(|first| at.first() == Some(&first)),
                "not first"
            );
            let host_pages = self.blocks[run.block.0].host_pages;
            let is_end = run.pages.end == self.blocks[run.block.0].pages;
            assert!(run.pages.start.is_multiple_of(host_pages));
            assert!(run.pages.end.is_multiple_of(host_pages) || is_end);
            for at in at {
                assert!(missing.remove(&at), "{at:?} is not missing");
            }
            if rng.u8(..60) == 0 {
                return false;
            }
        }
    }

    fn ask(&mut self, rng: &mut fastrand::Rng) -> Run {
        let block = rng.usize(..self.blocks.len());
        let BlockPages {
            pages, host_pages, ..
        } = self.blocks[block];
        let start = rng.u64(..pages.div_ceil(host_pages)) * host_pages;
        let end = (start + rng.u64(1..4) * host_pages).min(pages);
        let request = run(block, start..end);
        self.schedule.serve(request.clone());
        request
    }
}

#[test]
fn the_last_pass_makes_it_whole() {
    let mut rng = rng();
    for _ in 0..long(300, 20_000) {
        let mut model = Model::new(&mut rng);
        let passes = rng.u32(..5);
        model.precopy(&mut rng, passes);
        // The guest has stopped.
        model.collect();
        while model.schedule.left() > 0 {
            match model.schedule.next(64) {
                Some(run) => {
                    model.send(&run);
                }
                None => {
                    model.schedule.begin_pass();
                }
            }
        }
        assert!(model.is_whole());
    }
}

#[test]
fn a_postcopy_sends_what_it_discarded_once() {
    let mut rng = rng();
    for _ in 0..long(300, 20_000) {
        let mut model = Model::new(&mut rng);
        let passes = rng.u32(..4);
        model.precopy(&mut rng, passes);
        model.collect();
        let old: BTreeSet<_> = model
            .travelling()
            .filter(|at| model.sent.get(at) != Some(&model.version(*at)))
            .collect();
        model.schedule.send_once();
        let mut missing: BTreeSet<(usize, u64)> = (0..model.blocks.len())
            .flat_map(|block| {
                let left = model.schedule.left_of(BlockIndex(block));
                left.flatten()
                    .map(move |page| (block, page))
                    .collect::<Vec<_>>()
            })
            .collect();
        assert!(missing.is_superset(&old));
        assert_eq!(missing.len() as u64, model.schedule.left());
        while !model.postcopy(&mut rng, &mut missing) {
            // The last pages may have been lost on the way.
            let lost: Vec<_> = model.travelling().filter(|_| rng.u8(..20) == 0).collect();
            for (block, page) in lost {
                let BlockPages {
                    host_pages, pages, ..
                } = model.blocks[block];
                let first = page - page % host_pages;
                missing.extend((first..(first + host_pages).min(pages)).map(|page| (block, page)));
            }
            let bitmap = |(index, block): (usize, &BlockPages)| {
                let bitmap = PageBitmap::new(block.pages);
                let of_block = missing.iter().filter(|at| at.0 == index);
                of_block.for_each(|at| {
                    bitmap.set(at.1);
                });
                bitmap
            };
            let to_send = model.blocks.iter().enumerate().map(bitmap).collect();
            model.schedule.resume(to_send);
        }
        assert_eq!(missing, BTreeSet::new());
        assert!(model.is_whole());
    }
}

fn range(first_page: u64, pages: u64) -> StoredRange {
    StoredRange {
        block: RAM,
        first_page,
        pages,
    }
}

#[test]
fn what_is_preferred_goes_between_requests_and_the_sweep() {
    let mut schedule = Schedule::new(&[small(20), small(2)]);
    schedule.send_once();
    schedule.prefer([range(9, 3), range(4, 1), range(10, 2)]);
    assert_eq!(schedule.next(2), Some(run(0, 9..11)));
    schedule.serve(run(1, 1..2));
    assert_eq!(schedule.next(2), Some(run(1, 1..2)));
    assert_eq!(schedule.next(2), Some(run(0, 11..12)));
    assert_eq!(schedule.next(2), Some(run(0, 4..5)));
    // Behind the last request, and round.
    assert_eq!(schedule.next(99), Some(run(0, 0..4)));
    assert_eq!(schedule.next(99), Some(run(0, 5..9)));
    assert_eq!(schedule.next(99), Some(run(0, 12..20)));
    assert_eq!(schedule.next(99), Some(run(1, 0..1)));
    assert_eq!(schedule.next(99), None);
    assert_eq!(schedule.left(), 0);
}

/// It comes from a file that anybody may have written.
#[test]
fn what_is_preferred_need_not_make_sense() {
    let huge = BlockPages {
        host_pages: 4,
        ..small(12)
    };
    let mut schedule = Schedule::new(&[huge]);
    schedule.send_once();
    let nowhere = StoredRange {
        block: BlockIndex(7),
        ..range(0, 1)
    };
    let ranges = [
        nowhere,
        range(5, 1),
        range(50, 9),
        range(u64::MAX, 2),
        range(3, 0),
    ];
    schedule.prefer(ranges);
    // Whole host pages all the same.
    assert_eq!(schedule.next(1), Some(run(0, 4..8)));
    assert_eq!(schedule.next(1), Some(run(0, 0..4)));
    assert_eq!(schedule.next(1), Some(run(0, 8..12)));
    assert_eq!(schedule.next(1), None);
}
