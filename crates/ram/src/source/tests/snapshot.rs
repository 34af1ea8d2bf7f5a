use super::*;
use crate::source::snapshot::COPIES_BYTES_MAX;
use crate::testing::{long, rng};
use crate::{Userfault, UserfaultError};

const SNAPSHOT: RamSourceOptions = RamSourceOptions {
    postcopy: false,
    xbzrle_cache_bytes: None,
    ignore_shared: false,
    background_snapshot: true,
    throttle: ThrottleParameters {
        throttle_trigger_threshold: 50,
        cpu_throttle_initial: 20,
        cpu_throttle_increment: 10,
        max_cpu_throttle: 99,
    },
};

/// Says so if this user may not.
fn is_left_out() -> bool {
    match Userfault::open_write_protect() {
        Ok(_) => false,
        Err(error @ (UserfaultError::NotPermitted | UserfaultError::Lacking { .. })) => {
            eprintln!("left out: {error}");
            true
        }
        Err(error) => panic!("{error}"),
    }
}

/// Whatever two threads write, the stream has what was there before, and each page once.
#[test]
fn memory_is_that_of_the_beginning() {
    if is_left_out() {
        return;
    }
    let mut rng = rng();
    for _ in 0..long(10, 300) {
        let blocks = [
            ("pc.ram", rng.u64(1..600) << 12),
            ("pc.bios", 0x20000),
            ("/rom@etc/acpi/rsdp", 0x1000),
        ];
        let ram = random_ram(&blocks, &mut rng);
        let (mut source, marker) = source(&ram, SNAPSHOT);
        let mut stream = Stream::begin(&mut source);
        let before: Vec<Vec<u8>> = ram.blocks().iter().map(content).collect();
        let guest = Guest::run(&ram, &marker, &mut rng);
        let wants_end = rng.bool();
        loop {
            let pending = source.pending();
            match stream.part(&mut source) {
                Progress::Finished => break,
                _ if wants_end => {
                    stream.end(&mut source, &GuestStopped::assert_drained());
                    break;
                }
                _ => assert!(matches!(pending, Pending::Bulk { .. }), "{pending:?}"),
            }
        }
        let done = Pending::Dirty {
            bytes: 0,
            later_bytes: 0,
            read_time: Duration::ZERO,
        };
        assert_eq!(source.pending(), done);
        source.cleanup();
        guest.stop();
        let pages: u64 = ram.blocks().iter().map(RamBlock::pages).sum();
        assert_eq!(
            stream.destination.records.len() as u64,
            pages,
            "each page once"
        );
        for (block, before) in ram.blocks().iter().zip(before) {
            assert!(
                stream.destination.blocks[block.idstr()] == before,
                "{}",
                block.idstr()
            );
        }
    }
}

/// The guest writes more than there is room for copies while nothing is sent, and waits; whoever ends
/// the snapshot lets it go on.
#[test]
fn a_snapshot_that_is_given_up_lets_the_guest_go_on() {
    if is_left_out() {
        return;
    }
    let pages = COPIES_BYTES_MAX as u64 / PAGE_BYTES + 100;
    let ram = Arc::new(AnonymousRam::new(&[("a", pages << 12)]).expect("memory"));
    for page in 0..pages {
        ram.blocks()[0].write(page << 12, &[1; 8]).expect("in it");
    }
    let (mut source, _) = source(&ram, SNAPSHOT);
    source.setup(&mut Vec::new()).expect("it begins");
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            for page in 0..pages {
                ram.blocks()[0].write(page << 12, &[2; 8]).expect("in it");
            }
        });
        // It is stuck when there is no room.
        let full = || source.snapshot.as_ref().expect("one").copied_bytes();
        while full() < COPIES_BYTES_MAX {
            assert!(!guest.is_finished());
            std::thread::yield_now();
        }
        assert!(!guest.is_finished());
        assert_eq!(full(), COPIES_BYTES_MAX);
        source.cleanup();
        guest.join().expect("it goes on");
    });
}

#[test]
fn a_snapshot_goes_with_little_else() {
    let build = |options: RamSourceOptions, throttle: Option<Box<dyn Throttle>>| {
        let ram = AnonymousRam::new(&[("a", 4096)]).expect("memory");
        let log = Box::new(MarkedLog::new(&ram));
        let built = RamSource::new(Arc::new(ram), log, throttle, options);
        built.map(drop).map_err(|error| error.to_string())
    };
    let with_postcopy = RamSourceOptions {
        postcopy: true,
        ..SNAPSHOT
    };
    let with_xbzrle = RamSourceOptions {
        xbzrle_cache_bytes: Some(1 << 20),
        ..SNAPSHOT
    };
    let refused = |what| {
        Err(format!(
            "a background snapshot cannot be combined with {what}"
        ))
    };
    struct Brake;
    impl Throttle for Brake {
        fn set(&mut self, _: u8) {}
    }
    assert_eq!(build(SNAPSHOT, None), Ok(()));
    assert_eq!(build(with_postcopy, None), refused("postcopy"));
    assert_eq!(build(with_xbzrle, None), refused("XBZRLE"));
    let throttled = build(SNAPSHOT, Some(Box::new(Brake)));
    assert_eq!(throttled, refused("slowing the guest down"));
}
