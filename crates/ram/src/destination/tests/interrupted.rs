//! A guest of several threads, a source that answers them while it sends everything else, and a
//! connection that breaks.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::testing::{long, rng};

/// Pages of the blocks, and of their host pages.
const BLOCKS: [(&str, u64, u64); 3] = [("pc.ram", 96, 1), ("m0", 64, 4), ("pc.bios", 8, 1)];
const THREADS: usize = 4;

/// What a page holds at the source; every eleventh is zero.
fn content(block: usize, page: u64) -> Vec<u8> {
    if page % 11 == 3 {
        return vec![0; PAGE];
    }
    let mut rng = fastrand::Rng::with_seed((block as u64) << 32 | page);
    std::iter::repeat_with(|| rng.u8(..)).take(PAGE).collect()
}

/// The last word of a page belongs to one thread of the guest, which writes it once.
fn owned_word(page: u64) -> u64 {
    0x5a5a_0000_0000_0000 | page
}

fn machine() -> Arc<TestRam> {
    let blocks = BLOCKS.iter().map(|(block, pages, host)| BlockLayout {
        page_bytes: host * PAGE_BYTES,
        ..layout(block, *pages)
    });
    TestRam::new(blocks.collect())
}

/// Reads pages in any order, checks them, and writes its own word into some.
fn guest(ram: &TestRam, thread: usize, mut rng: fastrand::Rng, stop: &AtomicBool) {
    let mut written = [const { Vec::new() }; BLOCKS.len()];
    while !stop.load(Ordering::Relaxed) {
        let block = rng.usize(..BLOCKS.len());
        let page = rng.u64(..BLOCKS[block].1);
        let offset = page * PAGE_BYTES;
        let is_mine = page as usize % THREADS == thread;
        if is_mine && rng.u8(..4) == 0 && !written[block].contains(&page) {
            let word = owned_word(page).to_ne_bytes();
            ram.blocks[block]
                .write(offset + PAGE_BYTES - 8, &word)
                .unwrap();
            written[block].push(page);
        }
        let mut seen = vec![0; PAGE];
        ram.blocks[block].read(offset, &mut seen).unwrap();
        let expected = content(block, page);
        assert!(seen[..PAGE - 8] == expected[..PAGE - 8], "{block} {page}");
        if is_mine {
            let word = match written[block].contains(&page) {
                true => owned_word(page).to_ne_bytes().to_vec(),
                false => expected[PAGE - 8..].to_vec(),
            };
            assert!(seen[PAGE - 8..] == word, "{block} {page}: a write was lost");
        }
    }
}

/// Ends the guest.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The records of a host page.
fn records(block: usize, host_page: u64) -> Vec<(RamRecord, Vec<u8>)> {
    let (name, _, pages) = BLOCKS[block];
    let pages = host_page * pages..(host_page + 1) * pages;
    pages
        .map(|page| {
            let bytes = content(block, page);
            match bytes.iter().all(|byte| *byte == 0) {
                true => zero(name, page * PAGE_BYTES, 0),
                false => plain(name, page * PAGE_BYTES, &bytes),
            }
        })
        .collect()
}

/// What the source has to send: everything of which a bit is clear.
fn complement(incoming: &IncomingRam, rng: &mut fastrand::Rng) -> VecDeque<(usize, u64)> {
    let mut missing = Vec::new();
    for (block, (block_name, pages, host)) in BLOCKS.iter().enumerate() {
        let bitmap = incoming.received(&name(block_name)).unwrap();
        let has = |page: u64| bitmap[page as usize / 8] >> (page % 8) & 1 == 1;
        for host_page in 0..pages / host {
            let mut of_it = (host_page * host..(host_page + 1) * host).map(has);
            let first = of_it.next().unwrap();
            assert!(of_it.all(|bit| bit == first), "part of a host page");
            if !first {
                missing.push((block, host_page));
            }
        }
    }
    rng.shuffle(&mut missing);
    missing.into()
}

/// Send what is missing until the connection breaks, or all has come.
fn connection(
    handler: &mut RamDestination,
    incoming: &IncomingRam,
    rng: &mut fastrand::Rng,
    records_left: Option<usize>,
) {
    let mut missing = complement(incoming, rng);
    let mut left = records_left.unwrap_or(usize::MAX);
    while !missing.is_empty() {
        let asked = match rng.bool() {
            true => incoming.next_request(Instant::now()),
            false => incoming.next_request(Instant::now() + Duration::from_micros(200)),
        };
        let next = match asked {
            Some(PageRequest {
                block,
                start,
                bytes,
            }) => {
                let block = BLOCKS.iter().position(|(name, ..)| block == *name).unwrap();
                assert_eq!(u64::from(bytes), BLOCKS[block].2 * PAGE_BYTES);
                let page = (block, start / u64::from(bytes));
                // It was sent while it was asked for.
                match missing.iter().position(|other| *other == page) {
                    Some(at) => missing.remove(at).unwrap(),
                    None => continue,
                }
            }
            None => missing.pop_front().unwrap(),
        };
        let mut records = records(next.0, next.1);
        records.truncate(left);
        left -= records.len();
        feed(handler, &records).unwrap();
        if left == 0 {
            incoming.pause();
            return;
        }
    }
}

fn run(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let ram = machine();
    let mut handler = with_postcopy(&ram);
    let incoming = handler.incoming();
    incoming.advise().unwrap();
    let list = BLOCKS.iter().map(|(block, pages, host)| RamRecord::Block {
        name: name(block),
        used_bytes: pages * PAGE_BYTES,
        page_bytes: (*host > 1).then_some(host * PAGE_BYTES),
        guest_address: None,
        mapped: None,
    });
    feed(&mut handler, &list_of(list.collect())).unwrap();
    // Some pages come before, in an older state or as they are.
    for (block, (block_name, pages, host)) in BLOCKS.iter().enumerate() {
        for host_page in 0..pages / host {
            let start = host_page * host * PAGE_BYTES;
            match rng.u8(..4) {
                0 => feed(&mut handler, &records(block, host_page)).unwrap(),
                1 => {
                    let old = (0..*host).map(|page| start + page * PAGE_BYTES);
                    let old: Vec<_> = old.map(|at| plain(block_name, at, &[1; PAGE])).collect();
                    feed(&mut handler, &old).unwrap();
                    let range = range(start, host * PAGE_BYTES);
                    incoming.discard(&name(block_name), range).unwrap();
                }
                _ => {}
            }
        }
    }
    incoming.listen().unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let _give_up = GiveUp(&incoming);
        let _stop = Stop(&stop);
        for thread in 0..THREADS {
            let (ram, stop, rng) = (&ram, &stop, rng.fork());
            scope.spawn(move || guest(ram, thread, rng, stop));
        }
        for _ in 0..rng.usize(..6) {
            let records = rng.usize(1..60);
            connection(&mut handler, &incoming, &mut rng, Some(records));
        }
        connection(&mut handler, &incoming, &mut rng, None);
        incoming.finish().unwrap();
    });
    let stats = incoming.stats();
    assert!(stats.fault_latency.count() <= stats.faults.load(Ordering::Relaxed));
    for (block, (block_name, pages, _)) in BLOCKS.iter().enumerate() {
        for page in 0..*pages {
            let seen = ram.content_of(block, page..page + 1);
            let expected = content(block, page);
            assert!(
                seen[..PAGE - 8] == expected[..PAGE - 8],
                "{block_name} {page}"
            );
        }
    }
}

#[test]
fn no_page_is_lost_when_the_connection_breaks() {
    if !can_postcopy() {
        return;
    }
    let mut rng = rng();
    for _ in 0..long(40, 2000) {
        let seed = rng.u64(..);
        println!("round {seed}");
        run(seed);
    }
}
