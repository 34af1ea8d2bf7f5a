//! Postcopy: orders in their order, pages once, faults answered.

use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// Host pages of two guest pages.
const HUGE: u64 = 2 * PAGE_BYTES;

fn far() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

/// Text of an error.
fn refused<T>(result: Result<T, impl ToString>) -> String {
    result.err().expect("refused").to_string()
}

/// A destination with the list of [`two`], advised.
fn advised(ram: &Arc<TestRam>) -> (RamDestination, IncomingRam) {
    let mut handler = with_postcopy(ram);
    let incoming = handler.incoming();
    incoming.advise().unwrap();
    feed(&mut handler, &list()).unwrap();
    (handler, incoming)
}

/// One where every page is missing.
fn listening(ram: &Arc<TestRam>) -> (RamDestination, IncomingRam) {
    let (handler, incoming) = advised(ram);
    incoming.listen().unwrap();
    (handler, incoming)
}

/// One with host pages of two guest pages: 8 of a block, all missing.
fn listening_huge() -> (Arc<TestRam>, RamDestination, IncomingRam) {
    let huge = BlockLayout {
        page_bytes: HUGE,
        ..layout("m0", 16)
    };
    let ram = TestRam::new(vec![huge, layout("pc.bios", 4)]);
    let mut handler = with_postcopy(&ram);
    let incoming = handler.incoming();
    assert_eq!(incoming.page_sizes().all_bytes, PAGE_BYTES | HUGE);
    incoming.advise().unwrap();
    let entry = RamRecord::Block {
        name: name("m0"),
        used_bytes: 16 * PAGE_BYTES,
        page_bytes: Some(HUGE),
        guest_address: None,
        mapped: None,
    };
    feed(&mut handler, &list_of(vec![entry, listed("pc.bios", 4)])).unwrap();
    incoming.listen().unwrap();
    (ram, handler, incoming)
}

fn request(block: &str, start: u64) -> PageRequest {
    PageRequest {
        block: name(block),
        start,
        bytes: 4096,
    }
}

/// All pages from `first` on.
fn rest(block: &str, first: u64, pages: u64) -> Vec<(RamRecord, Vec<u8>)> {
    (first..pages)
        .map(|page| {
            plain(
                block,
                page * PAGE_BYTES,
                &[(page as u8).wrapping_add(1); PAGE],
            )
        })
        .collect()
}

/// The first eight bytes of a page; waits for them.
fn touch(ram: &TestRam, block: usize, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    ram.blocks[block].read(offset, &mut bytes).unwrap();
    u64::from_ne_bytes(bytes)
}

#[test]
fn advice_empties_memory() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    ram.blocks[1].write(0x1000, &[9; PAGE]).unwrap();
    let (mut handler, incoming) = advised(&ram);
    assert!(ram.content(1).iter().all(|byte| *byte == 0));
    // It may be a precopy after all, with everything that one knows.
    let pages = [
        plain("pc.ram", 0, &[1; PAGE]),
        xbzrle("pc.ram", 0, b"\0\x01\x07"),
    ];
    feed(&mut handler, &pages).unwrap();
    handler.end().unwrap();
    incoming.finish().unwrap();
    handler.cleanup();
    assert_eq!(ram.content(0)[..2], [7, 1]);
}

#[test]
fn memory_that_a_block_grows_by_is_emptied_too() {
    if !can_postcopy() {
        return;
    }
    let ram = TestRam::new(vec![BlockLayout {
        max_bytes: 4 * PAGE_BYTES,
        ..layout("rom", 4)
    }]);
    ram.blocks[0].write(0x3000, &[9; PAGE]).unwrap();
    ram.blocks[0].set_used_bytes(PAGE_BYTES).unwrap();
    let mut handler = with_postcopy(&ram);
    handler.incoming().advise().unwrap();
    feed(&mut handler, &list_of(vec![listed("rom", 4)])).unwrap();
    assert!(ram.content(0).iter().all(|byte| *byte == 0));
}

#[test]
fn orders_come_in_their_order() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    let off = destination(&ram).incoming();
    assert_eq!(refused(off.advise()), "postcopy is off here");

    let mut handler = with_postcopy(&ram);
    let incoming = handler.incoming();
    let discard = |incoming: &IncomingRam| incoming.discard(&name("pc.ram"), range(0, PAGE_BYTES));
    assert_eq!(
        refused(discard(&incoming)),
        "POSTCOPY_RAM_DISCARD must not come before POSTCOPY_ADVISE"
    );
    assert_eq!(
        refused(incoming.listen()),
        "POSTCOPY_LISTEN must not come before POSTCOPY_ADVISE"
    );
    incoming.advise().unwrap();
    assert_eq!(
        refused(incoming.advise()),
        "POSTCOPY_ADVISE must not come before POSTCOPY_LISTEN"
    );
    assert_eq!(
        refused(incoming.listen()),
        "POSTCOPY_LISTEN before the list of RAM blocks"
    );
    assert_eq!(
        refused(discard(&incoming)),
        "POSTCOPY_RAM_DISCARD before the list of RAM blocks"
    );
    feed(&mut handler, &list()).unwrap();
    discard(&incoming).unwrap();
    incoming.listen().unwrap();
    assert_eq!(
        refused(discard(&incoming)),
        "POSTCOPY_RAM_DISCARD must not come after POSTCOPY_LISTEN"
    );
    assert_eq!(
        refused(incoming.listen()),
        "POSTCOPY_LISTEN must not come after POSTCOPY_LISTEN"
    );
    incoming.abandon();
    assert_eq!(
        refused(incoming.listen()),
        "POSTCOPY_LISTEN must not come after the end"
    );

    let mut late = with_postcopy(&ram);
    feed(&mut late, &list()).unwrap();
    feed(&mut late, &[zero("pc.bios", 0, 0)]).unwrap();
    assert_eq!(
        refused(late.incoming().advise()),
        "POSTCOPY_ADVISE after the first pages"
    );
}

/// The source may be a process here, with the same file, that does not send what both have.
#[test]
fn advice_leaves_shared_memory_to_the_source() {
    if !can_postcopy() {
        return;
    }
    let shared = |sharing| BlockLayout {
        sharing,
        ..layout("m0", 4)
    };
    let source = AnonymousRam::with_layouts(vec![shared(Sharing::Shared)]).unwrap();
    let bytes = [7; 4 * PAGE_BYTES as usize];
    source.blocks()[0].write(0, &bytes).unwrap();
    let file = source.file(BlockIndex(0)).unwrap();
    let file = file.try_clone_to_owned().unwrap();
    let target = AnonymousRam::with_files(vec![(shared(Sharing::Shared), Some(file))]).unwrap();
    let options = RamDestinationOptions {
        postcopy: true,
        ignore_shared: false,
    };
    let mut handler = RamDestination::new(Arc::new(target), options).unwrap();
    handler.incoming().advise().unwrap();
    let entry = |guest_address| RamRecord::Block {
        name: name("m0"),
        used_bytes: 4 * PAGE_BYTES,
        page_bytes: None,
        guest_address,
        mapped: None,
    };
    let is_there = || source.blocks()[0].is_filled(0, bytes.len(), 7).unwrap();
    feed(&mut handler, &list_of(vec![entry(Some(0))])).expect_err("ignored at the source");
    assert!(is_there(), "its memory is gone");

    let target = AnonymousRam::with_layouts(vec![shared(Sharing::Shared)]).unwrap();
    target.blocks()[0].write(0, &bytes).unwrap();
    let target = Arc::new(target);
    let ram: Arc<AnonymousRam> = Arc::clone(&target);
    let mut handler = RamDestination::new(ram, options).unwrap();
    handler.incoming().advise().unwrap();
    feed(&mut handler, &list_of(vec![entry(None)])).unwrap();
    let is_empty = target.blocks()[0].is_filled(0, bytes.len(), 0);
    assert!(is_empty.unwrap(), "it travels, so nothing of it is left");
}

#[test]
fn only_pages_of_a_block_can_be_discarded() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    let (mut handler, incoming) = advised(&ram);
    feed(&mut handler, &rest("pc.ram", 0, 16)).unwrap();
    let discard = |block, start, length| incoming.discard(&name(block), range(start, length));
    assert_eq!(
        refused(discard("pc.rom", 0, 0x1000)),
        "RAM block 'pc.rom' is not here"
    );
    for (start, length, reason) in [
        (0x800, 0x1000, "these are no whole host pages"),
        (0, 0x1800, "these are no whole host pages"),
        (0xf000, 0x2000, "it reaches past the block's end"),
        (0x20_0000, 0, "it reaches past the block's end"),
        (u64::MAX - 0xfff, 0x1000, "it reaches past the block's end"),
        (0x1000, u64::MAX - 0xfff, "it reaches past the block's end"),
    ] {
        assert_eq!(
            refused(discard("pc.ram", start, length)),
            format!("RAM block 'pc.ram': cannot discard {length:#x} bytes at {start:#x}: {reason}")
        );
    }
    assert_eq!(
        incoming.received(&name("pc.ram")).unwrap()[..2],
        [0xff, 0xff]
    );
    discard("pc.ram", 0x3000, 0).unwrap();
    discard("pc.ram", 0x1_0000, 0).unwrap();
    discard("pc.ram", 0x2000, 0x3000).unwrap();
    discard("pc.ram", 0x4000, 0x1000).unwrap();
    assert_eq!(
        incoming.received(&name("pc.ram")).unwrap()[..3],
        [0xe3, 0xff, 0]
    );
    assert_eq!(incoming.received(&name("pc.rom")), None);
    assert!(ram.content(0)[0x2000..0x5000].iter().all(|byte| *byte == 0));
    assert!(ram.content(0)[0x5000..0x6000].iter().all(|byte| *byte == 6));
}

#[test]
fn a_shared_block_that_stays_is_left_alone() {
    if !can_postcopy() {
        return;
    }
    let shared = BlockLayout {
        sharing: Sharing::Shared,
        page_bytes: HUGE,
        ..layout("m0", 2)
    };
    let ram = TestRam::new(vec![shared, layout("pc.bios", 1)]);
    ram.blocks[0].write(0, &[9; PAGE]).unwrap();
    let options = RamDestinationOptions {
        postcopy: true,
        ignore_shared: true,
    };
    let mut handler = RamDestination::new(ram.clone(), options).unwrap();
    let incoming = handler.incoming();
    assert_eq!(incoming.page_sizes().all_bytes, PAGE_BYTES);
    incoming.advise().unwrap();
    let entry = |block, pages, page_bytes| RamRecord::Block {
        name: name(block),
        used_bytes: pages * PAGE_BYTES,
        page_bytes,
        guest_address: Some(0x1000),
        mapped: None,
    };
    feed(
        &mut handler,
        &list_of(vec![entry("m0", 2, Some(HUGE)), entry("pc.bios", 1, None)]),
    )
    .unwrap();
    let discarded = incoming.discard(&name("m0"), range(0, HUGE));
    assert!(refused(discarded).ends_with("the block is shared and does not travel"));
    incoming.listen().unwrap();
    assert_eq!(touch(&ram, 0, 0), u64::from_ne_bytes([9; 8]));
    assert_eq!(
        incoming.received(&name("m0")).unwrap(),
        [3, 0, 0, 0, 0, 0, 0, 0]
    );
    feed(&mut handler, &[zero("pc.bios", 0, 0)]).unwrap();
    incoming.finish().unwrap();
}

#[test]
fn pages_come_once_and_plain() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    let (mut handler, incoming) = advised(&ram);
    feed(
        &mut handler,
        &[zero("pc.ram", 0, 0), plain("pc.ram", 0x1000, &[7; PAGE])],
    )
    .unwrap();
    feed(&mut handler, &[plain("pc.ram", 0x2000, &[7; PAGE])]).unwrap();
    incoming
        .discard(&name("pc.ram"), range(0x2000, 0x1000))
        .unwrap();
    incoming.listen().unwrap();
    feed(
        &mut handler,
        &[
            zero("pc.ram", 0x3000, 0),
            plain("pc.ram", 0x2000, &[8; PAGE]),
        ],
    )
    .unwrap();
    let before = ram.content_of(0, 0..4);
    let packed = zlib(&[5; PAGE]);
    let cases = [
        (zero("pc.ram", 0, 0), "offset 0x0: sent twice in postcopy"),
        (
            plain("pc.ram", 0x1000, &[1; PAGE]),
            "offset 0x1000: sent twice in postcopy",
        ),
        (
            plain("pc.ram", 0x2000, &[1; PAGE]),
            "offset 0x2000: sent twice in postcopy",
        ),
        (
            zero("pc.ram", 0x3000, 0),
            "offset 0x3000: sent twice in postcopy",
        ),
        (
            zero("pc.ram", 0x4000, 1),
            "offset 0x4000: a page filled with 0x01 in postcopy",
        ),
        (
            xbzrle("pc.ram", 0x1000, b"\0\x01\x07"),
            "offset 0x1000: a changed (XBZRLE) page in postcopy",
        ),
        (
            xbzrle("pc.ram", 0x4000, b""),
            "offset 0x4000: a changed (XBZRLE) page in postcopy",
        ),
        (
            compressed("pc.ram", 0x4000, &packed),
            "offset 0x4000: a compressed page in postcopy",
        ),
        (
            zero("pc.ram", 0x10_000, 0),
            "offset 0x10000: the block ends at 0x10000",
        ),
        (
            zero("pc.ram", 0x4800, 0),
            "offset 0x4800: no page begins there",
        ),
    ];
    for (record, expected) in cases {
        let error = refused(feed(&mut handler, &[record]));
        assert_eq!(error, format!("RAM block 'pc.ram', {expected}"));
    }
    assert_eq!(
        refused(feed(&mut handler, &[zero("pc.rom", 0, 0)])),
        "RAM block 'pc.rom', offset 0x0: no such block is here"
    );
    assert_eq!(
        refused(feed(&mut handler, &list())),
        "a second list of RAM blocks"
    );
    assert_eq!(
        refused(feed(&mut handler, &[(RamRecord::MultifdFlush, vec![])])),
        "a record of multifd, which is not supported here"
    );
    assert_eq!(ram.content_of(0, 0..4), before);
    // None of that has made a page of another one.
    assert_eq!(incoming.received(&name("pc.ram")).unwrap()[..2], [0x0f, 0]);
    feed(&mut handler, &rest("pc.ram", 4, 16)).unwrap();
    feed(&mut handler, &rest("pc.bios", 0, 4)).unwrap();
    incoming.finish().unwrap();
    assert_eq!(ram.content_of(0, 0..4), before);
}

#[test]
fn the_end_comes_when_nothing_is_missing() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    let (mut handler, incoming) = listening(&ram);
    let missing = |block, pages| MissingPages {
        block: name(block),
        pages,
    };
    assert_eq!(incoming.finish(), Err(missing("pc.ram", 16)));
    assert!(!incoming.is_whole());
    feed(&mut handler, &rest("pc.ram", 0, 16)).unwrap();
    handler.end().unwrap();
    assert_eq!(
        refused(incoming.finish()),
        "4 pages of RAM block 'pc.bios' are missing"
    );
    feed(&mut handler, &rest("pc.bios", 1, 4)).unwrap();
    assert_eq!(incoming.finish(), Err(missing("pc.bios", 1)));
    feed(&mut handler, &[zero("pc.bios", 0, 0)]).unwrap();
    assert!(incoming.is_whole());
    incoming.finish().unwrap();
    incoming.finish().unwrap();
    handler.cleanup();
    // Nothing is left of it: memory that is given back is not missing.
    ram.blocks[0].forget(0, PAGE_BYTES).unwrap();
    assert_eq!(touch(&ram, 0, 0), 0);
    assert_eq!(incoming.next_request(far()), None);
}

#[test]
fn whoever_waits_gets_the_page() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    let (mut handler, incoming) = listening(&ram);
    let expected = u64::from_ne_bytes([7; 8]);
    let (read, write) = rustix::pipe::pipe().unwrap();
    thread::scope(|scope| {
        let _give_up = GiveUp(&incoming);
        let readers: Vec<_> = (0..3)
            .map(|_| scope.spawn(|| touch(&ram, 0, 0x5000)))
            .collect();
        assert_eq!(
            incoming.next_request(far()),
            Some(request("pc.ram", 0x5000))
        );
        // A system call waits too.
        let by_kernel = scope.spawn(|| {
            let start = ram.blocks[1].start().as_ptr();
            // SAFETY: a page that is mapped while the block lives.
            let page = unsafe { std::slice::from_raw_parts(start, PAGE) };
            rustix::io::write(&write, page).unwrap()
        });
        assert_eq!(incoming.next_request(far()), Some(request("pc.bios", 0)));
        // Writes do.
        let writer = scope.spawn(|| ram.blocks[0].write(0x6008, &[1; 8]).unwrap());
        assert_eq!(
            incoming.next_request(far()),
            Some(request("pc.ram", 0x6000))
        );
        let pages = [
            plain("pc.ram", 0x6000, &[7; PAGE]),
            plain("pc.bios", 0, &[8; PAGE]),
            plain("pc.ram", 0x5000, &[7; PAGE]),
        ];
        feed(&mut handler, &pages).unwrap();
        for reader in readers {
            assert_eq!(reader.join().unwrap(), expected);
        }
        writer.join().unwrap();
        assert_eq!(by_kernel.join().unwrap(), PAGE);
        let mut copied = [0; PAGE];
        rustix::io::read(&read, &mut copied).unwrap();
        assert_eq!(copied, [8; PAGE]);
    });
    assert_eq!(touch(&ram, 0, 0x6000), expected);
    assert_eq!(touch(&ram, 0, 0x6008), u64::from_ne_bytes([1; 8]));
    let stats = incoming.stats();
    assert_eq!(stats.fault_latency.count(), 3);
    assert_eq!(stats.faults.load(std::sync::atomic::Ordering::Relaxed), 3);
    assert_eq!(incoming.next_request(Instant::now()), None);
}

#[test]
fn after_a_break_what_did_not_come_is_asked_for_again() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    let (mut handler, incoming) = listening(&ram);
    thread::scope(|scope| {
        let _give_up = GiveUp(&incoming);
        let ask = |offset| {
            scope.spawn({
                let ram = &ram;
                move || touch(ram, 0, offset)
            });
            assert_eq!(
                incoming.next_request(far()),
                Some(request("pc.ram", offset))
            );
        };
        [0x3000, 0x1000, 0x8000].into_iter().for_each(ask);
        feed(&mut handler, &[zero("pc.ram", 0x1000, 0)]).unwrap();
        incoming.pause();
        assert_eq!(incoming.received(&name("pc.ram")).unwrap()[..3], [2, 0, 0]);
        let again = || incoming.next_request(Instant::now());
        assert_eq!(again(), Some(request("pc.ram", 0x3000)));
        assert_eq!(again(), Some(request("pc.ram", 0x8000)));
        assert_eq!(again(), None);
        feed(
            &mut handler,
            &[zero("pc.ram", 0x8000, 0), zero("pc.ram", 0x3000, 0)],
        )
        .unwrap();
    });
}

#[test]
fn host_pages_come_whole() {
    if !can_postcopy() {
        return;
    }
    let first = plain("m0", 0x2000, &[1; PAGE]);
    let cases = [
        (
            plain("m0", 0x5000, &[1; PAGE]),
            "'m0', offset 0x5000: the host page before it is not whole, whose next guest page is 0x3000",
        ),
        (
            plain("m0", 0x2000, &[1; PAGE]),
            "'m0', offset 0x2000: the host page before it is not whole, whose next guest page is 0x3000",
        ),
        (
            zero("pc.bios", 0x3000, 0),
            "'pc.bios', offset 0x3000: the host page before it is not whole, whose next guest page \
             is 0x3000 of another block",
        ),
    ];
    for (second, expected) in cases {
        let (_ram, mut handler, incoming) = listening_huge();
        let error = refused(feed(&mut handler, &[first.clone(), second]));
        assert_eq!(error, format!("RAM block {expected}"));
        assert_eq!(incoming.received(&name("m0")).unwrap(), [0; 8]);
    }
    let (ram, mut handler, incoming) = listening_huge();
    assert_eq!(
        refused(feed(&mut handler, &[zero("m0", 0x3000, 0)])),
        "RAM block 'm0', offset 0x3000: it lies inside a host page of 0x2000 bytes that did not come \
         from its beginning"
    );
    thread::scope(|scope| {
        let _give_up = GiveUp(&incoming);
        let reader = scope.spawn(|| touch(&ram, 0, 0x3000));
        let asked = incoming.next_request(far()).unwrap();
        assert_eq!((asked.start, asked.bytes), (0x2000, 0x2000));
        // Half of it, and the connection breaks.
        feed(&mut handler, std::slice::from_ref(&first)).unwrap();
        incoming.pause();
        assert_eq!(incoming.received(&name("m0")).unwrap(), [0; 8]);
        assert_eq!(incoming.next_request(far()), Some(asked));
        // Zeroes are no remains of what came before.
        feed(
            &mut handler,
            &[plain("m0", 0, &[3; PAGE]), plain("m0", 0x1000, &[3; PAGE])],
        )
        .unwrap();
        feed(&mut handler, &[first.clone(), zero("m0", 0x3000, 0)]).unwrap();
        assert_eq!(reader.join().unwrap(), 0);
    });
    assert_eq!(touch(&ram, 0, 0x2000), u64::from_ne_bytes([1; 8]));
    assert_eq!(
        incoming.received(&name("m0")).unwrap(),
        [0xf, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(
        refused(feed(&mut handler, &[first])),
        "RAM block 'm0', offset 0x2000: sent twice in postcopy"
    );
    // Ordinary pages of another block come in between.
    feed(&mut handler, &rest("pc.bios", 0, 4)).unwrap();
    feed(&mut handler, &rest("m0", 4, 16)).unwrap();
    incoming.finish().unwrap();
}

#[test]
fn half_a_host_page_at_the_end_is_missing() {
    if !can_postcopy() {
        return;
    }
    let (_ram, mut handler, incoming) = listening_huge();
    feed(&mut handler, &rest("pc.bios", 0, 4)).unwrap();
    feed(&mut handler, &rest("m0", 0, 15)).unwrap();
    assert_eq!(
        refused(incoming.finish()),
        "2 pages of RAM block 'm0' are missing"
    );
    feed(&mut handler, &rest("m0", 15, 16)).unwrap();
    incoming.finish().unwrap();
}

#[test]
fn a_host_page_cannot_be_missing_in_part() {
    if !can_postcopy() {
        return;
    }
    let huge = |pages| BlockLayout {
        page_bytes: HUGE,
        max_bytes: 4 * PAGE_BYTES,
        ..layout("m0", pages)
    };
    let list = |pages, page_bytes| {
        list_of(vec![RamRecord::Block {
            name: name("m0"),
            used_bytes: pages * PAGE_BYTES,
            page_bytes,
            guest_address: None,
            mapped: None,
        }])
    };
    let advised = |pages| {
        let handler = with_postcopy(&TestRam::new(vec![huge(pages)]));
        handler.incoming().advise().unwrap();
        handler
    };
    let mut handler = advised(4);
    feed(&mut handler, &list(4, Some(HUGE))).unwrap();
    feed(&mut handler, &[zero("m0", 0x3000, 0)]).unwrap();
    let expected = |offset| {
        format!(
            "RAM block 'm0': of the host page at {offset:#x} only a part was discarded, or the block \
             ends in it"
        )
    };
    assert_eq!(refused(handler.incoming().listen()), expected(0x2000));
    let mut handler = advised(3);
    feed(&mut handler, &list(3, Some(HUGE))).unwrap();
    assert_eq!(refused(handler.incoming().listen()), expected(0x2000));

    // The sizes themselves are compared before.
    let sizes = "RAM block 'm0': host pages of 0x1000 bytes at the source, 0x2000 here";
    assert_eq!(refused(feed(&mut advised(4), &list(4, None))), sizes);
    let sizes = "RAM block 'm0': host pages of 0x4000 bytes at the source, 0x2000 here";
    assert_eq!(
        refused(feed(&mut advised(4), &list(4, Some(0x4000)))),
        sizes
    );
}

#[test]
fn memory_that_somebody_has_used_is_not_overwritten() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    let (mut handler, incoming) = advised(&ram);
    ram.blocks[0].write(0x2000, &[1; 8]).unwrap();
    incoming.listen().unwrap();
    assert_eq!(
        refused(feed(&mut handler, &[plain("pc.ram", 0x2000, &[2; PAGE])])),
        "RAM block 'pc.ram', offset 0x2000: its memory is in use, although it never came"
    );
    assert_eq!(touch(&ram, 0, 0x2000), u64::from_ne_bytes([1; 8]));
    assert_eq!(incoming.received(&name("pc.ram")).unwrap(), [0; 8]);
}

/// A balloon gives pages back, whether they came before POSTCOPY_LISTEN or after.
#[test]
fn a_page_that_came_and_was_given_back_is_zero() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    let (mut handler, incoming) = advised(&ram);
    feed(&mut handler, &[plain("pc.ram", 0, &[1; PAGE])]).unwrap();
    incoming.listen().unwrap();
    feed(&mut handler, &[plain("pc.ram", 0x1000, &[1; PAGE])]).unwrap();
    for offset in [0, 0x1000] {
        ram.blocks[0].forget(offset, PAGE_BYTES).unwrap();
        assert_eq!(touch(&ram, 0, offset), 0);
    }
    assert_eq!(incoming.next_request(Instant::now()), None);
}

/// Memory of every kind that a VMM may have, with a guest that waits for its last page.
#[test]
fn shared_memory_and_huge_pages_arrive() {
    if !can_postcopy() {
        return;
    }
    let kinds = [
        ("shared memory", Sharing::Shared, PAGE_BYTES),
        ("huge pages", Sharing::Private, 2 << 20),
        ("shared huge pages", Sharing::Shared, 2 << 20),
    ];
    for (what, sharing, page_bytes) in kinds {
        let bytes = 2 * page_bytes;
        let layout = BlockLayout {
            sharing,
            page_bytes,
            ..layout("m0", bytes / PAGE_BYTES)
        };
        let ram = match AnonymousRam::with_layouts(vec![layout]) {
            Ok(ram) => Arc::new(ram),
            Err(error) => {
                println!("left out, {what}: {error}");
                continue;
            }
        };
        let block = &ram.blocks()[0];
        block.write(0, &[9; PAGE]).unwrap();
        let options = RamDestinationOptions {
            postcopy: true,
            ..RamDestinationOptions::default()
        };
        let mut handler = RamDestination::new(ram.clone(), options).unwrap();
        let incoming = handler.incoming();
        incoming.advise().unwrap();
        let list = list_of(vec![RamRecord::Block {
            name: name("m0"),
            used_bytes: bytes,
            page_bytes: (page_bytes > PAGE_BYTES).then_some(page_bytes),
            guest_address: None,
            mapped: None,
        }]);
        feed(&mut handler, &list).unwrap();
        let pages = rest("m0", 0, bytes / PAGE_BYTES);
        let (first, last) = pages.split_at((page_bytes / PAGE_BYTES) as usize);
        feed(&mut handler, first).unwrap();
        incoming.discard(&name("m0"), range(0, page_bytes)).unwrap();
        incoming.listen().unwrap();
        thread::scope(|scope| {
            let _give_up = GiveUp(&incoming);
            let at = bytes - PAGE_BYTES;
            let reader = scope.spawn(move || {
                let mut seen = vec![0; PAGE];
                block.read(at, &mut seen).unwrap();
                seen
            });
            let asked = incoming.next_request(far()).unwrap();
            assert_eq!(
                (asked.start, u64::from(asked.bytes)),
                (page_bytes, page_bytes)
            );
            feed(&mut handler, last).unwrap();
            assert!(reader.join().unwrap() == last[last.len() - 1].1, "{what}");
        });
        feed(&mut handler, first).unwrap();
        incoming.finish().unwrap();
        let mut seen = vec![0; page_bytes as usize];
        block.read(0, &mut seen).unwrap();
        let expected: Vec<_> = first.iter().flat_map(|(_, bytes)| bytes).copied().collect();
        assert!(seen == expected, "{what}");
    }
}

#[test]
fn nobody_waits_for_ever_for_what_was_given_up() {
    if !can_postcopy() {
        return;
    }
    let ram = two();
    let (mut handler, incoming) = listening(&ram);
    thread::scope(|scope| {
        let reader = scope.spawn(|| touch(&ram, 0, 0x5000));
        assert!(incoming.next_request(far()).is_some());
        handler.cleanup();
        let waiting = scope.spawn(|| incoming.next_request(far()));
        incoming.abandon();
        assert_eq!(reader.join().unwrap(), 0);
        assert_eq!(waiting.join().unwrap(), None);
    });

    let (handler, incoming) = listening(&ram);
    thread::scope(|scope| {
        let reader = scope.spawn(|| touch(&ram, 0, 0x5000));
        assert!(incoming.next_request(far()).is_some());
        drop(handler);
        drop(incoming);
        assert_eq!(reader.join().unwrap(), 0);
    });
}
