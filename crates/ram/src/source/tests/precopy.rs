use std::sync::Mutex;

use super::model::Kind;
use super::*;
use crate::Sharing;
use crate::testing::{long, rng};

const MIB: u64 = 1 << 20;

/// Whatever two threads write meanwhile, the destination has it in the end.
#[test]
fn memory_is_the_same_at_the_end() {
    let mut rng = rng();
    for _ in 0..long(12, 500) {
        let blocks = [
            ("pc.ram", rng.u64(1..3) * MIB),
            ("pc.bios", 0x20000),
            ("/rom@etc/acpi/rsdp", 0x1000),
        ];
        let ram = random_ram(&blocks, &mut rng);
        let options = RamSourceOptions {
            xbzrle_cache_bytes: [None, Some(20 << 10), Some(MIB), Some(16 * MIB)][rng.usize(..4)],
            ..RamSourceOptions::default()
        };
        let (mut source, marker) = any_source(&ram, options, &mut rng);
        // The log is not read before it runs.
        scribble(&ram, &marker, &mut rng);
        let guest = Guest::run(&ram, &marker, &mut rng);
        let mut stream = Stream::begin(&mut source);
        for _ in 0..rng.u32(1..30) {
            stream.part(&mut source);
            source.pending();
        }
        let stopped = guest.stop();
        stream.end(&mut source, &stopped);
        source.cleanup();
        stream.destination.assert_equals(&ram);
    }
}

/// One thread, so that a failure can be repeated.
#[test]
fn memory_is_the_same_step_by_step() {
    let mut rng = rng();
    for _ in 0..long(100, 5_000) {
        let ram = random_ram(&[("a", 40 << 12), ("b", 1 << 12), ("c", 7 << 12)], &mut rng);
        let options = RamSourceOptions {
            xbzrle_cache_bytes: [None, Some(20 << 10), Some(MIB)][rng.usize(..3)],
            ..RamSourceOptions::default()
        };
        let (mut source, marker) = source(&ram, options);
        let mut stream = Stream::begin(&mut source);
        for _ in 0..rng.u32(..10) {
            for _ in 0..rng.u32(..20) {
                scribble(&ram, &marker, &mut rng);
            }
            match rng.u8(..3) {
                0 => source.look_again(),
                _ => {
                    stream.part(&mut source);
                }
            }
        }
        stream.end(&mut source, &GuestStopped::assert_drained());
        stream.destination.assert_equals(&ram);
    }
}

#[test]
fn lists_its_blocks() {
    let mut rng = rng();
    let ram = random_ram(&[("pc.ram", 4 << 12), ("pc.bios", 1 << 12)], &mut rng);
    let (mut source, _) = source(&ram, RamSourceOptions::default());
    let mut bytes = Vec::new();
    source.setup(&mut bytes).expect("it lists them");
    let expected = [
        &0x5004_u64.to_be_bytes()[..],
        b"\x06pc.ram",
        &0x4000_u64.to_be_bytes(),
        b"\x07pc.bios",
        &0x1000_u64.to_be_bytes(),
        &0x10_u64.to_be_bytes(),
    ];
    assert_eq!(bytes, expected.concat());
}

#[test]
fn first_pages_as_qemu_sends_them() {
    let ram = Arc::new(AnonymousRam::new(&[("m", 2 << 12), ("n", 1 << 12)]).expect("memory"));
    ram.blocks()[0].write(0, &[7; 4096]).expect("in it");
    let (mut source, _) = source(&ram, RamSourceOptions::default());
    source.setup(&mut Vec::new()).expect("it starts");
    let mut bytes = Vec::new();
    let progress = source.iterate(&mut bytes).expect("it goes on");
    assert_eq!(progress, Progress::Finished);
    let expected = [
        b"\0\0\0\0\0\0\0\x08\x01m",
        &[7; 4096][..],
        b"\0\0\0\0\0\0\x10\x22\0",
        b"\0\0\0\0\0\0\0\x02\x01n\0",
        b"\0\0\0\0\0\0\0\x10",
    ];
    assert_eq!(bytes, expected.concat());
    // Nothing was written: an empty PART.
    let mut bytes = Vec::new();
    source.iterate(&mut bytes).expect("it goes on");
    assert_eq!(bytes, b"\0\0\0\0\0\0\0\x10");
}

/// Blocks of all kinds, in memory that another one owns.
struct Borrowed {
    blocks: Vec<RamBlock>,
    _memory: AnonymousRam,
}

impl Borrowed {
    fn new(layouts: Vec<crate::BlockLayout>) -> Self {
        let memory = AnonymousRam::new(&[("all", 8 * MIB)]).expect("memory");
        let start = memory.blocks()[0].start();
        let aligned = start.addr().get().next_multiple_of(2 << 20) - start.addr().get();
        let mut at = aligned;
        let blocks = layouts.into_iter().map(|layout| {
            // SAFETY: it lies in `memory`, which lives as long.
            let start = unsafe { start.add(at) };
            at += layout.max_bytes as usize;
            assert!(at as u64 <= 8 * MIB);
            // SAFETY: as above.
            unsafe { RamBlock::new(layout, start) }.expect("a block")
        });
        Self {
            blocks: blocks.collect(),
            _memory: memory,
        }
    }
}

impl GuestRam for Borrowed {
    fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    fn resize(&self, block: BlockIndex, used_bytes: u64) -> Result<(), crate::LayoutError> {
        self.blocks[block.0].set_used_bytes(used_bytes)
    }
}

fn layout(idstr: &str, bytes: u64, page_bytes: u64, sharing: Sharing) -> crate::BlockLayout {
    crate::BlockLayout {
        idstr: Name::new(idstr).expect("short"),
        used_bytes: bytes,
        max_bytes: bytes.next_multiple_of(page_bytes),
        page_bytes,
        guest_address: (idstr != "rom").then_some(0x1_0000_0000),
        sharing,
    }
}

fn borrowed() -> Arc<Borrowed> {
    Arc::new(Borrowed::new(vec![
        layout("huge", 2 * MIB, 2 * MIB, Sharing::Private),
        layout("file", 3 << 12, 1 << 12, Sharing::Shared),
        layout("rom", 1 << 12, 1 << 12, Sharing::Private),
    ]))
}

fn borrowed_source(ram: &Arc<Borrowed>, options: RamSourceOptions) -> RamSource {
    let log = Box::new(MarkedLog::new(&**ram));
    RamSource::new(Arc::clone(ram) as _, log, None, options).expect("a source")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn lists_page_sizes_and_addresses_where_they_are_expected() {
    let ram = borrowed();
    let listed = |postcopy, ignore_shared| {
        let options = RamSourceOptions {
            postcopy,
            ignore_shared,
            ..RamSourceOptions::default()
        };
        let mut bytes = Vec::new();
        let mut source = borrowed_source(&ram, options);
        source.setup(&mut bytes).expect("it lists them");
        hex(&bytes)
    };
    let (huge, file, rom) = ("0468756765", "0466696c65", "03726f6d");
    let (total, end) = ("0000000000204004", "0000000000000010");
    let (of_huge, of_file, of_rom) = ("0000000000200000", "0000000000003000", "0000000000001000");
    let (size, address, none) = ("0000000000200000", "0000000100000000", "0000000000000000");
    assert_eq!(
        listed(false, false),
        format!("{total}{huge}{of_huge}{file}{of_file}{rom}{of_rom}{end}")
    );
    assert_eq!(
        listed(true, false),
        format!("{total}{huge}{of_huge}{size}{file}{of_file}{rom}{of_rom}{end}")
    );
    assert_eq!(
        listed(true, true),
        format!(
            "{total}{huge}{of_huge}{size}{address}{file}{of_file}{address}{rom}{of_rom}{none}{end}"
        )
    );
}

#[test]
fn shared_blocks_stay_where_they_are() {
    let ram = borrowed();
    ram.blocks[1].write(0, &[1; 4096]).expect("in it");
    let options = RamSourceOptions {
        ignore_shared: true,
        postcopy: true,
        ..RamSourceOptions::default()
    };
    let mut source = borrowed_source(&ram, options);
    let outgoing = source.outgoing();
    assert_eq!(outgoing.page_sizes().all_bytes, 0x20_1000);
    let mut bytes = Vec::new();
    source.setup(&mut bytes).expect("it starts");
    assert_eq!(outgoing.blocks(), ["huge", "rom"]);
    bytes.clear();
    while source.iterate(&mut bytes).expect("it goes on") != Progress::Finished {}
    // 512 pages of one block and one of another, all of them zero.
    assert_eq!(bytes.len(), 513 * 9 + "\x04huge\x03rom".len() + 8);
    let left = outgoing.stats().remaining_bytes.load(Relaxed);
    assert_eq!(left, 0);
}

#[test]
fn a_block_must_keep_its_length() {
    let mut layout = layout("blob", 2 << 12, 1 << 12, Sharing::Private);
    layout.max_bytes = 4 << 12;
    let ram = Arc::new(Borrowed::new(vec![layout]));
    let mut source = borrowed_source(&ram, RamSourceOptions::default());
    source.setup(&mut Vec::new()).expect("it starts");
    ram.resize(BlockIndex(0), 3 << 12).expect("it can grow");
    let mut bytes = Vec::new();
    let error = source.iterate(&mut bytes).expect_err("resized");
    assert_eq!(
        error.to_string(),
        "RAM block 'blob' was resized from 0x2000 to 0x3000 bytes while it was sent"
    );
    let stopped = GuestStopped::assert_drained();
    SaveHandler::complete(&mut source, &stopped, &mut bytes).expect_err("resized");
}

#[test]
fn what_cannot_be_sent_is_refused() {
    let build = |ram: AnonymousRam, cache| {
        let log = Box::new(MarkedLog::new(&ram));
        let options = RamSourceOptions {
            xbzrle_cache_bytes: cache,
            ..RamSourceOptions::default()
        };
        let built = RamSource::new(Arc::new(ram), log, None, options);
        built.err().map(|error| error.to_string())
    };
    let blocks = |blocks: &[(&str, u64)]| AnonymousRam::new(blocks).expect("memory");
    let twice = blocks(&[("a", 4096), ("b", 4096), ("a", 4096)]);
    assert_eq!(
        build(twice, None).as_deref(),
        Some("there are two RAM blocks 'a'")
    );
    assert_eq!(
        build(blocks(&[("a", 4096)]), Some(4096)).as_deref(),
        Some("an XBZRLE cache of 4096 bytes has no room for a page")
    );
    let names: Vec<String> = (0..=4096).map(|n| n.to_string()).collect();
    let many: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 4096)).collect();
    assert_eq!(
        build(blocks(&many), None).as_deref(),
        Some("there are 4097 RAM blocks, of which 4096 can be sent")
    );
    assert_eq!(build(blocks(&many[..4096]), Some(8192)), None);
}

/// What is told of is what the guest dirtied up to now, though the log was read before.
#[test]
fn nothing_is_pending_unless_it_is_known() {
    let mut rng = rng();
    let ram = random_ram(&[("a", 4 * MIB)], &mut rng);
    let (mut source, marker) = source(&ram, RamSourceOptions::default());
    source.setup(&mut Vec::new()).expect("it starts");
    assert_eq!(source.pending(), Pending::Bulk { bytes: 4 * MIB });
    let iterate = |source: &mut RamSource| source.iterate(&mut Vec::new()).expect("it goes on");
    while iterate(&mut source) != Progress::Finished {}
    assert!(matches!(source.pending(), Pending::Dirty { bytes: 0, .. }));
    // Between the end of a pass and the question, the guest writes a lot.
    marker.mark(BlockIndex(0), 0, 4096);
    iterate(&mut source);
    marker.mark(BlockIndex(0), 0, 3 * MIB);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !matches!(source.pending(), Pending::Dirty { bytes, .. } if bytes >= 3 * MIB) {
        assert!(Instant::now() < deadline, "{:?}", source.pending());
        std::thread::yield_now();
    }
    assert!(
        source.schedule.left() * PAGE_BYTES >= 3 * MIB,
        "not by guessing"
    );
}

#[derive(Clone, Default)]
struct Brake(Arc<Mutex<Vec<u8>>>);

impl Throttle for Brake {
    fn set(&mut self, percent: u8) {
        self.0.lock().expect("nobody fails").push(percent);
    }
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_and_let_go() {
    let ram = Arc::new(AnonymousRam::new(&[("a", 4 * MIB)]).expect("memory"));
    let log = MarkedLog::new(&*ram);
    let (marker, brake) = (log.marker(), Brake::default());
    let throttle = Box::new(brake.clone());
    let options = RamSourceOptions::default();
    let source = RamSource::new(
        Arc::clone(&ram) as _,
        Box::new(log),
        Some(throttle),
        options,
    );
    let mut source = source.expect("a source");
    source.setup(&mut Vec::new()).expect("it starts");
    source.iterate(&mut Vec::new()).expect("it goes on");
    let slow = |source: &mut RamSource, seconds: u64| {
        // As if the log was read so long ago.
        source.watch = Watch::new(Instant::now() - Duration::from_secs(seconds));
        marker.mark(BlockIndex(0), 0, MIB);
        source.iterate(&mut Vec::new()).expect("it goes on");
    };
    (0..4).for_each(|_| slow(&mut source, 2));
    assert_eq!(*brake.0.lock().expect("nobody fails"), [20, 30]);
    assert_eq!(source.outgoing().stats().throttle_percent.load(Relaxed), 30);
    source.cleanup();
    source.cleanup();
    assert_eq!(*brake.0.lock().expect("nobody fails"), [20, 30, 0]);
}

/// Only what changed is sent from the third time on, and nothing of what did not.
#[test]
fn changes_are_sent_from_the_second_pass_on() {
    let ram = Arc::new(AnonymousRam::new(&[("a", 4 << 12)]).expect("memory"));
    let block = &ram.blocks()[0];
    block.write(0, &[1; 4096]).expect("in it");
    let options = RamSourceOptions {
        xbzrle_cache_bytes: Some(MIB),
        ..RamSourceOptions::default()
    };
    let (mut source, marker) = source(&ram, options);
    let mut stream = Stream::begin(&mut source);
    let mut pass = |source: &mut RamSource, written: &[u64]| {
        for page in written {
            marker.mark(BlockIndex(0), page << 12, 4096);
        }
        let before = stream.destination.records.len();
        stream.part(source);
        let records = &stream.destination.records[before..];
        let kinds = records
            .iter()
            .map(|(_, page, kind, bytes)| (*page, *kind, *bytes));
        kinds.collect::<Vec<_>>()
    };
    use Kind::{Changes, Page, Zero};
    let first = pass(&mut source, &[]);
    assert_eq!(
        first,
        [(0, Page, 4096), (1, Zero, 0), (2, Zero, 0), (3, Zero, 0)]
    );
    block.write(8, &[2; 8]).expect("in it");
    assert_eq!(pass(&mut source, &[0, 1]), [(0, Page, 4096), (1, Zero, 0)]);
    block.write(16, &[3; 8]).expect("in it");
    block.write(4096, &[3; 8]).expect("in it");
    assert_eq!(
        pass(&mut source, &[0, 1]),
        [(0, Changes, 10), (1, Changes, 10)]
    );
    assert_eq!(pass(&mut source, &[0, 1]), []);
    block.fill(0, 4096, 0).expect("in it");
    assert_eq!(pass(&mut source, &[0]), [(0, Zero, 0)]);
    block.write(0, &[4; 4096]).expect("in it");
    assert_eq!(pass(&mut source, &[0]), [(0, Page, 4096)]);
    block.write(0, &[5; 8]).expect("in it");
    assert_eq!(pass(&mut source, &[0]), [(0, Changes, 10)]);
    let stats = source.outgoing().stats();
    assert_eq!(stats.xbzrle_pages.load(Relaxed), 3);
    assert_eq!(stats.xbzrle_unchanged_pages.load(Relaxed), 2);
    assert_eq!(stats.xbzrle_overflows.load(Relaxed), 1);
    stream.destination.assert_equals(&ram);
}

/// Takes little at once.
struct Slow {
    bytes: Vec<u8>,
    allowance: u64,
}

impl Sink for Slow {
    fn put(&mut self, parts: &[&[u8]]) -> Result<(), HandlerError> {
        let bytes: usize = parts.iter().map(|part| part.len()).sum();
        assert!(bytes <= writer::BATCH_BYTES);
        self.bytes.put(parts)
    }

    fn allowance(&self) -> u64 {
        self.allowance
    }

    fn check(&self) -> Result<(), HandlerError> {
        Ok(())
    }
}

#[test]
fn a_part_ends_in_time() {
    let mut rng = rng();
    let ram = random_ram(&[("a", 16 * MIB)], &mut rng);
    let (mut source, _) = source(&ram, RamSourceOptions::default());
    let mut sink = Slow {
        bytes: Vec::new(),
        allowance: u64::MAX,
    };
    source.setup(&mut sink).expect("it starts");
    sink.bytes.clear();
    let run_bytes = RUN_PAGES * (PAGE_BYTES + 8);
    for (allowance, least) in [(u64::MAX, PART_BYTES_MAX), (100_000, 100_000), (0, 1)] {
        sink.allowance = allowance;
        let progress = source.iterate(&mut sink).expect("it goes on");
        assert_eq!(progress, Progress::Unfinished);
        let sent = sink.bytes.len() as u64;
        assert!((least..least + run_bytes + 20).contains(&sent), "{sent}");
        sink.bytes.clear();
    }
    // Zeroes are short.
    sink.allowance = u64::MAX;
    let zeroes = (PART_PAGES_MAX + 1) << 12;
    let ram = Arc::new(AnonymousRam::new(&[("a", zeroes)]).expect("memory"));
    let (mut source, _) = self::source(&ram, RamSourceOptions::default());
    source.setup(&mut sink).expect("it starts");
    let progress = source.iterate(&mut sink).expect("it goes on");
    assert_eq!(progress, Progress::Unfinished);
    let left = source.outgoing().stats().remaining_bytes.load(Relaxed);
    assert_eq!(left, PAGE_BYTES);
}

/// A source can be used for another migration after one that failed.
#[test]
fn it_begins_anew() {
    let mut rng = rng();
    let ram = random_ram(&[("a", MIB)], &mut rng);
    let options = RamSourceOptions {
        postcopy: true,
        xbzrle_cache_bytes: Some(MIB),
        ..RamSourceOptions::default()
    };
    let (mut source, marker) = source(&ram, options);
    let mut stream = Stream::begin(&mut source);
    (0..3).for_each(|_| {
        stream.part(&mut source);
        scribble(&ram, &marker, &mut rng);
    });
    stream.discard(&mut source);
    source.cleanup();
    let mut stream = Stream::begin(&mut source);
    (0..50).for_each(|_| scribble(&ram, &marker, &mut rng));
    stream.part(&mut source);
    stream.end(&mut source, &GuestStopped::assert_drained());
    stream.destination.assert_equals(&ram);
    let refused = source.outgoing().request(None, 0, 4096);
    assert_eq!(refused, Err(RequestError::NoPostcopy));
}

/// A guest that writes the same page all the time, and counts how often its log is read.
struct Busy(Arc<std::sync::atomic::AtomicU32>);

impl DirtyLog for Busy {
    fn start(&mut self, _: &dyn GuestRam) -> Result<(), DirtyLogError> {
        Ok(())
    }

    fn collect(
        &mut self,
        _: &dyn GuestRam,
        dirty: &mut dyn FnMut(BlockIndex, std::ops::Range<u64>),
    ) -> Result<(), DirtyLogError> {
        self.0.fetch_add(1, SeqCst);
        dirty(BlockIndex(0), 0..1);
        Ok(())
    }

    fn stop(&mut self, _: &dyn GuestRam) {}
}

#[test]
fn a_part_begins_one_pass() {
    let ram = Arc::new(AnonymousRam::new(&[("a", 4 << 12)]).expect("memory"));
    let asked = Arc::default();
    let log = Box::new(Busy(Arc::clone(&asked)));
    let source = RamSource::new(ram, log, None, RamSourceOptions::default());
    let mut source = source.expect("a source");
    source.setup(&mut Vec::new()).expect("it starts");
    let passes = &source.outgoing().stats();
    for part in 1..4 {
        let progress = source.iterate(&mut Vec::new()).expect("it goes on");
        assert_eq!(progress, Progress::Unfinished);
        assert_eq!(asked.load(SeqCst), part);
        assert_eq!(passes.passes.load(Relaxed), u64::from(part) + 1);
    }
}

/// Once the log has failed nothing completes.
#[test]
fn a_log_that_fails_ends_the_migration() {
    struct Broken;
    impl DirtyLog for Broken {
        fn start(&mut self, _: &dyn GuestRam) -> Result<(), DirtyLogError> {
            Ok(())
        }
        fn collect(
            &mut self,
            _: &dyn GuestRam,
            _: &mut dyn FnMut(BlockIndex, std::ops::Range<u64>),
        ) -> Result<(), DirtyLogError> {
            let source = std::io::ErrorKind::Other.into();
            let what = "scan".into();
            Err(DirtyLogError { what, source })
        }
        fn stop(&mut self, _: &dyn GuestRam) {}
    }
    let ram = Arc::new(AnonymousRam::new(&[("a", 4 << 12)]).expect("memory"));
    let options = RamSourceOptions {
        postcopy: true,
        ..RamSourceOptions::default()
    };
    let source = RamSource::new(ram, Box::new(Broken), None, options);
    let mut source = source.expect("a source");
    source.setup(&mut Vec::new()).expect("it starts");
    let mut bytes = Vec::new();
    let expected = "dirty log: scan: other error";
    let error = source.iterate(&mut bytes).expect_err("it fails");
    assert_eq!(error.to_string(), expected);
    assert!(matches!(source.pending(), Pending::Bulk { .. }));
    let stopped = GuestStopped::assert_drained();
    let error = SaveHandler::complete(&mut source, &stopped, &mut bytes).expect_err("it fails");
    assert_eq!(error.to_string(), expected);
    let error = source.discard(&mut |_, _| Ok(())).expect_err("it fails");
    assert_eq!(error.to_string(), expected);
    // Where it cannot be said at once.
    source.schedule.begin_pass();
    source.watch = Watch::new(Instant::now() - Duration::from_secs(9));
    assert!(matches!(source.pending(), Pending::Bulk { .. }));
    let error = source.discard(&mut |_, _| Ok(())).expect_err("it fails");
    assert_eq!(error.to_string(), expected);
}
