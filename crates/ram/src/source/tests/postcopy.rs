use super::*;
use crate::testing::{long, rng};

const POSTCOPY: RamSourceOptions = RamSourceOptions {
    postcopy: true,
    xbzrle_cache_bytes: None,
    ignore_shared: false,
    background_snapshot: false,
    throttle: ThrottleParameters {
        throttle_trigger_threshold: 50,
        cpu_throttle_initial: 20,
        cpu_throttle_increment: 10,
        max_cpu_throttle: 99,
    },
};

/// Ask for a page, or some, which may have been sent.
fn ask(outgoing: &OutgoingRam, ram: &AnonymousRam, rng: &mut fastrand::Rng) {
    let block = &ram.blocks()[rng.usize(..ram.blocks().len())];
    let start = rng.u64(..block.pages());
    let pages = rng.u64(1..4).min(block.pages() - start);
    let request = outgoing.request(Some(block.idstr()), start << 12, pages << 12);
    request.expect("a right request");
}

/// Through switches, requests, cut connections: every page once, and all of them right.
#[test]
fn memory_is_the_same_at_the_end() {
    let mut rng = rng();
    for _ in 0..long(60, 3_000) {
        let ram = random_ram(
            &[("a", 300 << 12), ("b", 1 << 12), ("c", 7 << 12)],
            &mut rng,
        );
        let options = RamSourceOptions {
            xbzrle_cache_bytes: [None, Some(1 << 20)][rng.usize(..2)],
            ..POSTCOPY
        };
        let (mut source, marker) = any_source(&ram, options, &mut rng);
        let outgoing = source.outgoing();
        let guest = Guest::run(&ram, &marker, &mut rng);
        let mut stream = Stream::begin(&mut source);
        (0..rng.u32(..4)).for_each(|_| {
            stream.part(&mut source);
        });
        guest.stop();
        assert!(stream.discard(&mut source) > 0);
        loop {
            (0..rng.u32(..5)).for_each(|_| ask(&outgoing, &ram, &mut rng));
            match rng.u8(..8) {
                0 => {
                    let cut = |bytes| rng.usize(..bytes);
                    stream.part_cut(&mut source, cut);
                    for block in outgoing.blocks() {
                        let received = stream.destination.received(&block);
                        outgoing.received(&block, &received).expect("right");
                    }
                    outgoing.resume().expect("everything was told");
                }
                1 => break stream.end_postcopy(&mut source),
                _ if stream.part(&mut source) == Progress::Finished => {
                    break stream.end_postcopy(&mut source);
                }
                _ => {}
            }
        }
        assert!(stream.destination.missing.is_empty());
        stream.destination.assert_equals(&ram);
        source.cleanup();
    }
}

/// A source of four random pages in two blocks, all of them discarded.
fn switched(rng: &mut fastrand::Rng) -> (Arc<AnonymousRam>, RamSource, OutgoingRam, Stream) {
    let ram = random_ram(&[("a", 40 << 12), ("b", 40 << 12)], rng);
    let (mut source, _) = source(&ram, POSTCOPY);
    let outgoing = source.outgoing();
    let mut stream = Stream::begin(&mut source);
    assert_eq!(stream.discard(&mut source), 2);
    (ram, source, outgoing, stream)
}

fn name(name: &str) -> Name {
    Name::new(name).expect("short")
}

#[test]
fn requests_go_first_in_their_order() {
    let (_, mut source, outgoing, mut stream) = switched(&mut rng());
    outgoing
        .request(Some(&name("b")), 8 << 12, 4096)
        .expect("right");
    outgoing.request(None, 3 << 12, 2 << 12).expect("right");
    outgoing.request(None, 8 << 12, 4096).expect("right");
    outgoing
        .request(Some(&name("a")), 39 << 12, 4096)
        .expect("right");
    assert_eq!(outgoing.stats().postcopy_requests.load(Relaxed), 4);
    assert!(outgoing.wait_for_request(Instant::now()));
    assert_eq!(stream.part(&mut source), Progress::Unfinished);
    assert!(!outgoing.wait_for_request(Instant::now()));
    let pages = |stream: &Stream| -> Vec<(String, u64)> {
        let records = stream.destination.records.iter();
        records
            .map(|(block, page, ..)| (block.to_string(), *page))
            .collect()
    };
    let at = |block: &str, page| (block.to_owned(), page);
    // Somebody waits for these, so nothing else is in this PART.
    assert_eq!(
        pages(&stream),
        [at("b", 8), at("b", 3), at("b", 4), at("a", 39)]
    );
    // The rest, from there on and round.
    stream.end_postcopy(&mut source);
    let pages = pages(&stream);
    assert_eq!(pages[4..7], [at("b", 0), at("b", 1), at("b", 2)]);
    assert_eq!(pages[7], at("b", 5));
    assert_eq!(pages[79], at("a", 38));
    assert_eq!(pages.len(), 80);
}

#[test]
fn a_request_wakes_who_waits() {
    let (_, _source, outgoing, _) = switched(&mut rng());
    let deadline = Instant::now() + Duration::from_secs(60);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| outgoing.wait_for_request(deadline));
        outgoing.request(Some(&name("a")), 0, 4096).expect("right");
        assert!(waiting.join().expect("it waits"));
    });
}

#[test]
fn wrong_requests_are_refused() {
    let ram = random_ram(&[("a", 4 << 12)], &mut rng());
    let (mut source, _) = source(&ram, POSTCOPY);
    let outgoing = source.outgoing();
    let error = |block: Option<&str>, start, bytes| {
        let block = block.map(name);
        let error = outgoing.request(block.as_ref(), start, bytes);
        error.expect_err("wrong").to_string()
    };
    let early = "pages were requested, but there is no postcopy";
    assert_eq!(error(Some("a"), 0, 4096), early);
    let mut stream = Stream::begin(&mut source);
    assert_eq!(error(Some("a"), 0, 4096), early);
    stream.discard(&mut source);
    assert_eq!(
        error(None, 0, 4096),
        "the first request for pages names no RAM block"
    );
    assert_eq!(
        error(Some("b\n"), 0, 4096),
        "pages of RAM block 'b\\n' were requested, which there is not"
    );
    for (start, bytes) in [(0, 0), (1, 4096), (0, 4095), (4096, 1 << 13 | 8)] {
        assert_eq!(
            error(Some("a"), start, bytes),
            format!(
                "RAM block 'a': {bytes:#x} bytes at {start:#x} were requested, \
                 which are no whole pages of 0x1000 bytes"
            )
        );
    }
    for (start, bytes) in [
        (0x4000, 0x1000),
        (0, 0x5000),
        (0x3000, 0x2000),
        (u64::MAX - 4095, 0x1000),
        (0x1000, u64::MAX - 4095),
    ] {
        assert_eq!(
            error(Some("a"), start, bytes),
            format!("RAM block 'a' has 0x4000 bytes; {bytes:#x} at {start:#x} were requested")
        );
    }
    assert_eq!(
        error(None, 0, 4096),
        "the first request for pages names no RAM block"
    );
    assert_eq!(outgoing.stats().postcopy_requests.load(Relaxed), 0);
    outgoing
        .request(Some(&name("a")), 0, 0x4000)
        .expect("right");
    outgoing.request(None, 0, 0x4000).expect("right");
}

/// However many requests come, what waits is bounded; and every page is sent once.
#[test]
fn a_flood_of_requests_takes_no_memory() {
    let pages = 2 * outgoing::REQUESTS_MAX as u64 + 2;
    let ram = Arc::new(AnonymousRam::new(&[("a", pages << 12)]).expect("memory"));
    let (mut source, _) = source(&ram, POSTCOPY);
    let outgoing = source.outgoing();
    let mut stream = Stream::begin(&mut source);
    stream.discard(&mut source);
    let ask = |page: u64| outgoing.request(Some(&name("a")), page << 12, 4096);
    for _ in 0..100_000 {
        ask(7).expect("right");
    }
    assert_eq!(outgoing.0.queued_requests(), 1);
    // No two of them are one run.
    for page in (0..pages).step_by(2) {
        ask(page).expect("right");
    }
    assert_eq!(outgoing.0.queued_requests(), outgoing::REQUESTS_MAX);
    stream.end_postcopy(&mut source);
    assert_eq!(stream.destination.records.len() as u64, pages);
    assert!(stream.destination.missing.is_empty());
}

#[test]
fn something_is_always_discarded() {
    let ram = random_ram(&[("a", 4 << 12), ("b", 4 << 12)], &mut rng());
    let (mut source, _) = source(&ram, POSTCOPY);
    let mut stream = Stream::begin(&mut source);
    assert_eq!(stream.part(&mut source), Progress::Finished);
    let mut told = Vec::new();
    let mut tell = |block: &Name, ranges: &[vmferry_stream::DiscardRange]| {
        let ranges = ranges
            .iter()
            .map(|range| (range.start_bytes, range.length_bytes));
        told.push((block.to_string(), ranges.collect::<Vec<_>>()));
        Ok(())
    };
    source.discard(&mut tell).expect("it can");
    assert_eq!(told, [("a".to_owned(), vec![(0, 0)])]);
    let everything = Pending::Dirty {
        bytes: 0,
        later_bytes: 0,
        read_time: Duration::ZERO,
    };
    assert_eq!(source.pending(), everything);
    assert_eq!(stream.part(&mut source), Progress::Finished);
}

#[test]
fn what_is_left_may_come_later() {
    let ram = random_ram(&[("a", 40 << 12)], &mut rng());
    let (mut source, marker) = source(&ram, POSTCOPY);
    let mut stream = Stream::begin(&mut source);
    stream.part(&mut source);
    marker.mark(BlockIndex(0), 4096, 8192);
    source.collect().expect("the log works");
    match source.pending() {
        Pending::Dirty {
            bytes: 0,
            later_bytes,
            ..
        } => assert!(later_bytes >= 8192),
        other => panic!("{other:?}"),
    }
    assert_eq!(stream.discard(&mut source), 1);
    let later_bytes = 8192;
    let pending = source.pending();
    assert!(
        matches!(pending, Pending::Dirty { bytes: 0, later_bytes: left, .. } if left == later_bytes)
    );
    assert!(SaveHandler::postcopy(&mut source).is_some());
    let (mut other, _) = self::source(&ram, RamSourceOptions::default());
    assert!(SaveHandler::postcopy(&mut other).is_none());
}

#[test]
fn the_first_page_after_the_switch_names_its_block() {
    let ram = random_ram(&[("a", 4 << 12)], &mut rng());
    let (mut source, marker) = source(&ram, POSTCOPY);
    let mut bytes = Vec::new();
    source.setup(&mut bytes).expect("it starts");
    source.iterate(&mut bytes).expect("it goes on");
    marker.mark(BlockIndex(0), 2 << 12, 2 << 12);
    source.discard(&mut |_, _| Ok(())).expect("it can");
    bytes.clear();
    source.iterate(&mut bytes).expect("it goes on");
    assert_eq!(bytes[..7], *b"\0\0\0\0\0\0\x20");
    assert_eq!(bytes[7] & 0x20, 0);
    assert_eq!(bytes[8..10], *b"\x01a");
}

#[test]
fn recovery_needs_to_know_every_block() {
    let (_, mut source, outgoing, mut stream) = switched(&mut rng());
    stream.part(&mut source);
    let told = |block: &str, bytes: usize| {
        let told = outgoing.received(&name(block), &vec![0xff; bytes]);
        told.map_err(|error| error.to_string())
    };
    assert_eq!(
        told("x", 8).expect_err("unknown"),
        "the destination tells what it has of RAM block 'x', which it was not asked about"
    );
    for bytes in [0, 5, 7, 9, 16] {
        assert_eq!(
            told("a", bytes).expect_err("wrong"),
            format!("RAM block 'a': the bitmap of received pages has {bytes} bytes, not 8")
        );
    }
    assert_eq!(told("a", 8), Ok(()));
    assert_eq!(outgoing.resume(), Err(RecoverError::Missing(name("b"))));
    assert_eq!(
        outgoing.resume().expect_err("not all").to_string(),
        "RAM block 'b': the destination did not tell what it has of it"
    );
    outgoing
        .received(&name("b"), &[0xff, 0xfe, 0, 0, 0xff, 0, 0, 0])
        .expect("right");
    outgoing.request(Some(&name("b")), 0, 4096).expect("right");
    assert_eq!(outgoing.resume(), Ok(()));
    assert!(
        !outgoing.wait_for_request(Instant::now()),
        "requests are forgotten"
    );
    // A destination that has not noticed yet that its connection is another one.
    assert_eq!(outgoing.request(None, 0, 4096), Ok(()));
    assert!(!outgoing.wait_for_request(Instant::now()));
    let mut bytes = Vec::new();
    PostcopyHandler::complete(&mut source, &mut bytes).expect("it goes on");
    // Page 8, in whatever form, of a block that is named again.
    assert_eq!(bytes[..7], *b"\0\0\0\0\0\0\x80");
    assert_eq!(bytes[7] & 0x20, 0);
    assert_eq!(bytes[8..10], *b"\x01b");
    assert_eq!(outgoing.stats().remaining_bytes.load(Relaxed), 0);
    assert_eq!(
        outgoing.resume(),
        Err(RecoverError::Missing(name("a"))),
        "ask again"
    );
    let (other, _) = source_of_nothing();
    let outgoing = other.outgoing();
    assert_eq!(outgoing.resume(), Err(RecoverError::NoPostcopy));
    let early = outgoing.received(&name("a"), &[0; 8]);
    assert_eq!(early, Err(RecoverError::NoPostcopy));
}

fn source_of_nothing() -> (RamSource, Marker) {
    let ram = Arc::new(AnonymousRam::new(&[("a", 4096)]).expect("memory"));
    source(&ram, POSTCOPY)
}
