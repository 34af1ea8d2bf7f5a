//! What can go wrong at the source, and what an operator can do meanwhile.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use vmferry_channel::{Channel, Direction, Stop};
use vmferry_disk::simulated::{CacheMode, MemoryDisk, Operation};
use vmferry_disk::{
    Allocation, BlockDevice, Cached, DiskError, Extent, Hold, Limits, Node, Refusal, Unmap,
};
use vmferry_migration::{
    Capabilities, Parameters, Published, RequestError, Residence, RunningSource, SourceDisk,
    SourceFailure, SourceJob, State, Target,
};

use crate::ends::{
    Host, migrate_undisturbed, rng, source_disks, start_destination, start_source, start_watched,
    wait, wait_for,
};

const MIB: usize = 1 << 20;

fn is_served(host: &Host) {
    assert!(host.all_held(Some(Hold::Nothing)));
    assert!(host.nodes.iter().all(|node| node.user().is_none()));
    assert!(host.says().iter().all(Option::is_none));
}

/// A source with disks of these lengths, its migration, and the thread that receives it.
struct Pair {
    source: Host,
    target: Host,
    running: RunningSource,
    destination: thread::JoinHandle<crate::ends::Received>,
}

fn begin(source: Host, lengths: &[usize], parameters: Parameters, caps: Capabilities) -> Pair {
    let target = Host::target(lengths);
    let (here, there) = UnixStream::pair().expect("a pair");
    let destination = start_destination(&target, there);
    let running = start_source(&source, here, parameters, caps);
    Pair {
        source,
        target,
        running,
        destination,
    }
}

impl Pair {
    /// It has failed or was cancelled: guests are served here, and the next one succeeds.
    fn try_again(self) {
        drop(self.running);
        assert!(self.destination.join().expect("no panic").is_err());
        assert!(self.target.all_held(Some(Hold::Writes)));
        is_served(&self.source);
        migrate_undisturbed(&self.source, &self.target);
        for (here, there) in self.source.memories.iter().zip(&self.target.memories) {
            assert!(here.snapshot() == there.durable_snapshot());
        }
    }
}

fn full_disk(length: usize, rng: &mut fastrand::Rng) -> MemoryDisk {
    let mut bytes = vec![0; length];
    rng.fill(&mut bytes);
    MemoryDisk::from_bytes(&bytes)
}

#[test]
fn cancelled_at_any_moment() {
    let mut rng = rng();
    let lengths = [3 * MIB, MIB / 2];
    let mut cancelled = 0;
    for _ in 0..50 {
        let disks = lengths.iter().map(|length| full_disk(*length, &mut rng));
        let source = Host::new(disks.collect(), Hold::Nothing);
        let pair = begin(
            source,
            &lengths,
            Parameters::default(),
            Capabilities::default(),
        );
        let moment = rng.u64(..4 * MIB as u64);
        let reached = |s: &vmferry_migration::Status| {
            s.wire_bytes >= moment || s.state.is_over() || s.state == State::Device
        };
        wait_for(&pair.running, reached);
        match pair.running.cancel() {
            Ok(()) if wait(&pair.running).state == State::Cancelled => {
                cancelled += 1;
                pair.try_again();
            }
            Ok(()) | Err(RequestError::TooLate) => {
                let status = wait(&pair.running);
                assert_eq!(status.state, State::Completed, "{status:?}");
                assert!(pair.destination.join().expect("no panic").is_ok());
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(cancelled > 0, "never in time");
}

#[test]
fn a_read_error_is_the_migrations_not_the_guests() {
    let mut rng = rng();
    for cache in [
        CacheMode::Hit,
        CacheMode::Unsupported,
        CacheMode::Partial(5000),
    ] {
        for nth in [1, 3] {
            let source = Host::new(vec![full_disk(3 * MIB, &mut rng)], Hold::Nothing);
            source.memories[0].set_cache(cache);
            source.memories[0].fail_from(Operation::Read, nth, 5);
            let lengths = [3 * MIB];
            let pair = begin(
                source,
                &lengths,
                Parameters::default(),
                Capabilities::default(),
            );
            let status = wait(&pair.running);
            assert_eq!(status.state, State::Failed, "{cache:?}");
            let error = status.error.expect("a reason");
            assert!(error.contains("disk 'disk0': read at byte "), "{error}");
            assert!(error.contains("Input/output error"), "{error}");
            pair.source.memories[0].heal();
            pair.try_again();
        }
    }
}

/// What cannot be asked is read.
#[test]
fn a_failing_query_is_no_failure() {
    let mut rng = rng();
    let source = Host::new(vec![full_disk(2 * MIB, &mut rng)], Hold::Nothing);
    source.memories[0].fail_from(Operation::Status, 1, 5);
    let target = Host::target(&[2 * MIB]);
    migrate_undisturbed(&source, &target);
    assert!(source.memories[0].snapshot() == target.memories[0].durable_snapshot());
}

#[test]
fn a_stuck_write_can_be_waited_for_or_cancelled() {
    let mut rng = rng();
    for cancel in [true, false] {
        let source = Host::new(vec![full_disk(MIB, &mut rng)], Hold::Nothing);
        let stuck = source.nodes[0].begin_write(0, 4).expect("served");
        let lengths = [MIB];
        let pair = begin(
            source,
            &lengths,
            Parameters::default(),
            Capabilities::default(),
        );
        wait_until_held(&pair.source.nodes[0]);
        assert_eq!(
            pair.source.nodes[0].begin_write(9, 1).expect_err("held"),
            Refusal::Held
        );
        assert!(pair.source.nodes[0].begin_read(9, 1).is_ok());
        if cancel {
            pair.running.cancel().expect("in time");
            assert_eq!(wait(&pair.running).state, State::Cancelled);
            stuck.write(b"late").expect("written");
            pair.try_again();
        } else {
            stuck.write(b"late").expect("written");
            assert_eq!(wait(&pair.running).state, State::Completed);
            assert_eq!(&pair.target.memories[0].durable_snapshot()[..4], b"late");
        }
    }
}

fn wait_until_held(node: &Arc<Node>) {
    wait_until(node, Hold::Writes);
}

fn wait_until_served(node: &Arc<Node>) {
    wait_until(node, Hold::Nothing);
}

fn wait_until(node: &Arc<Node>, hold: Hold) {
    let (tell, changed) = std::sync::mpsc::channel();
    let _subscription = node.subscribe(move || {
        let _ = tell.send(());
    });
    while node.held() != Some(hold) {
        changed.recv_timeout(crate::ends::PATIENCE).expect("a hold");
    }
}

/// A chunk that would take hours under the old limit leaves at once under the new one.
#[test]
fn a_raised_limit_counts_at_once() {
    let mut rng = rng();
    let source = Host::new(vec![full_disk(2 * MIB, &mut rng)], Hold::Nothing);
    let slow = Parameters {
        max_bandwidth: Some(100),
        ..Parameters::default()
    };
    let pair = begin(source, &[2 * MIB], slow, Capabilities::default());
    wait_for(&pair.running, |status| status.state == State::Active);
    pair.running.set(Parameters::default());
    assert_eq!(wait(&pair.running).state, State::Completed);
    assert!(pair.destination.join().expect("no panic").is_ok());
}

/// Never more than the slices that have begun allow, however slow the machine is.
#[test]
fn the_limit_is_kept() {
    const BYTES_PER_SECOND: u64 = 4 << 20;
    let mut rng = rng();
    let source = Host::new(vec![full_disk(2 * MIB, &mut rng)], Hold::Nothing);
    let (here, mut there) = UnixStream::pair().expect("a pair");
    let arrived = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&arrived);
    let begun = Instant::now();
    let slow = Parameters {
        max_bandwidth: Some(BYTES_PER_SECOND),
        ..Parameters::default()
    };
    let running = start_source(&source, here, slow, Capabilities::default());
    let reader = thread::spawn(move || {
        let mut piece = vec![0; 64 << 10];
        while let Ok(length @ 1..) = there.read(&mut piece) {
            count.fetch_add(length as u64, Ordering::SeqCst);
            let bytes = count.load(Ordering::SeqCst);
            let slices = begun.elapsed().as_millis() as u64 / 100 + 2;
            assert!(
                bytes <= slices * (BYTES_PER_SECOND / 10),
                "{bytes} in {slices} slices"
            );
        }
    });
    wait_for(&running, |status| status.bulk_over);
    running.cancel().expect("in time");
    drop(running);
    reader.join().expect("the limit is kept");
    assert!(arrived.load(Ordering::SeqCst) > 2 * MIB as u64);
}

#[test]
fn pause_before_switchover_waits_for_leave() {
    let mut rng = rng();
    let lengths = [MIB, 1536];
    for go_on in [true, false] {
        let capabilities = Capabilities {
            pause_before_switchover: true,
            ..Capabilities::default()
        };
        let source = Host::source(&lengths, &mut rng);
        let pair = begin(source, &lengths, Parameters::default(), capabilities);
        wait_for(&pair.running, |s| s.state == State::PreSwitchover);
        assert!(pair.source.all_held(Some(Hold::Writes)));
        if go_on {
            pair.running.go_on().expect("paused");
            let status = wait(&pair.running);
            assert_eq!(status.state, State::Completed, "{status:?}");
            assert_eq!(pair.running.go_on(), Err(RequestError::NotPaused));
            assert!(pair.destination.join().expect("no panic").is_ok());
        } else {
            pair.running.cancel().expect("in time");
            assert_eq!(wait(&pair.running).state, State::Cancelled);
            pair.try_again();
        }
    }
}

#[test]
fn one_way_must_be_asked_for() {
    let mut rng = rng();
    let source = Host::source(&[MIB, 100], &mut rng);
    let one_way = |return_path| {
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let stop = Stop::new().expect("an event");
        let fd = OwnedFd::from(writer);
        let channel = Channel::from_fd(fd, Direction::Outgoing, "a pipe", &stop);
        let job = SourceJob {
            disks: source_disks(&source),
            target: Target::Channel(channel.expect("a pipe")),
            parameters: Parameters::default(),
            capabilities: Capabilities {
                return_path,
                ..Capabilities::default()
            },
            stop,
        };
        let drain = thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).map(|_| bytes)
        });
        let running = RunningSource::start(job, Published::default()).expect("a migration");
        let status = wait(&running);
        drop(running);
        (status, drain.join().expect("no panic").expect("readable"))
    };
    let (status, bytes) = one_way(true);
    assert_eq!(status.state, State::Failed);
    assert!(status.error.expect("a reason").contains("one-way"));
    assert!(bytes.is_empty(), "nothing was sent");
    is_served(&source);
    let (status, bytes) = one_way(false);
    assert_eq!(
        (status.state, status.durable),
        (State::Completed, Some(false))
    );
    assert!(bytes.ends_with(b"{}"));
    assert!(source.all_held(None));
}

#[test]
fn a_migration_of_nothing_is_refused() {
    let (here, _there) = UnixStream::pair().expect("a pair");
    let stop = Stop::new().expect("an event");
    let job = |disks, socket: UnixStream| SourceJob {
        disks,
        target: Target::Channel(crate::ends::channel(socket, Direction::Outgoing, &stop)),
        parameters: Parameters::default(),
        capabilities: Capabilities::default(),
        stop: stop.clone(),
    };
    let nothing = job(Vec::new(), here.try_clone().expect("a descriptor"));
    let error = RunningSource::start(nothing, Published::default()).expect_err("refused");
    assert!(matches!(error, SourceFailure::NoDisks));

    let empty = Host::new(
        vec![MemoryDisk::new(MIB as u64), MemoryDisk::new(0)],
        Hold::Nothing,
    );
    let sockets = here.try_clone().expect("a descriptor");
    let refused = RunningSource::start(job(source_disks(&empty), sockets), Published::default());
    let error = refused.expect_err("refused").to_string();
    assert_eq!(error, "disk 'disk1' has length 0");
    is_served(&empty);

    let mut rng = rng();
    let busy = Host::source(&[MIB, MIB], &mut rng);
    let lease = busy.nodes[1].lease("a backup").expect("free");
    let refused = RunningSource::start(job(source_disks(&busy), here), Published::default());
    let error = refused.expect_err("refused").to_string();
    assert_eq!(error, "disk 'disk1' is in use by a backup");
    drop(lease);
    is_served(&busy);
}

/// A record that cannot be written keeps its disk here.
#[test]
fn a_record_that_cannot_be_written_stops_the_hand_over() {
    let mut rng = rng();
    let mut source = Host::source(&[MIB, MIB], &mut rng);
    let nowhere = std::path::Path::new("/nonexistent/folder");
    source.records[1] = vmferry_migration::RecordFile::new("disk1", nowhere, Some(nowhere));
    let lengths = [MIB, MIB];
    let pair = begin(
        source,
        &lengths,
        Parameters::default(),
        Capabilities::default(),
    );
    let status = wait(&pair.running);
    assert_eq!(status.state, State::Failed);
    let error = status.error.expect("a reason");
    assert!(error.contains("/nonexistent/folder"), "{error}");
    drop(pair.running);
    assert!(pair.destination.join().expect("no panic").is_err());
    is_served(&pair.source);
}

/// Panics where a test says so.
struct Fragile {
    disk: MemoryDisk,
    panics_at: PanicsAt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PanicsAt {
    /// In the engine's thread.
    CachedRead,
    /// In a thread that reads.
    Read,
    /// In the thread that writes.
    Write,
    Flush,
}

impl BlockDevice for Fragile {
    fn limits(&self) -> Limits {
        self.disk.limits()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        assert!(self.panics_at != PanicsAt::Read, "a bug in a backend");
        self.disk.read_at(buf, offset)
    }
    fn read_cached_at(&self, buf: &mut [u8], offset: u64) -> Result<Cached, DiskError> {
        assert!(self.panics_at != PanicsAt::CachedRead, "a bug in a backend");
        let _ = (buf, offset);
        Ok(Cached::Miss)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        assert!(self.panics_at != PanicsAt::Write, "a bug in a backend");
        self.disk.write_at(buf, offset)
    }
    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        unmap: Unmap,
        fast_only: bool,
    ) -> Result<(), DiskError> {
        self.disk.write_zeroes(offset, length, unmap, fast_only)
    }
    fn discard(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.disk.discard(offset, length)
    }
    fn status(&self, offset: u64, length: u64) -> Result<Extent, DiskError> {
        self.disk.status(offset, length)
    }
    fn allocation(&self, offset: u64, length: u64) -> Result<Allocation, DiskError> {
        self.disk.allocation(offset, length)
    }
    fn below(&self) -> Option<&dyn BlockDevice> {
        None
    }

    fn start_writeback(&self, offset: u64, length: u64) -> Result<(), DiskError> {
        self.disk.start_writeback(offset, length)
    }
    fn flush(&self) -> Result<(), DiskError> {
        assert!(self.panics_at != PanicsAt::Flush, "a bug in a backend");
        self.disk.flush()
    }
}

#[test]
fn a_panic_before_the_hand_over_lets_guests_go_on() {
    let mut rng = rng();
    for panics_at in [PanicsAt::CachedRead, PanicsAt::Read] {
        let disk = full_disk(2 * MIB, &mut rng);
        let node = Node::new(
            "disk0",
            Box::new(Fragile { disk, panics_at }),
            Hold::Nothing,
        );
        let target = Host::target(&[2 * MIB]);
        let (here, there) = UnixStream::pair().expect("a pair");
        let destination = start_destination(&target, there);
        let stop = Stop::new().expect("an event");
        let job = SourceJob {
            disks: vec![SourceDisk {
                node: Arc::clone(&node),
                record: None,
            }],
            target: Target::Channel(crate::ends::channel(here, Direction::Outgoing, &stop)),
            parameters: Parameters::default(),
            capabilities: Capabilities::default(),
            stop,
        };
        let running = RunningSource::start(job, Published::default()).expect("a migration");
        let status = wait(&running);
        assert_eq!(status.state, State::Failed, "{panics_at:?}");
        assert!(status.error.expect("a reason").contains("panic"));
        drop(running);
        assert!(destination.join().expect("no panic there").is_err());
        assert_eq!(node.held(), Some(Hold::Nothing));
        assert_eq!(node.user(), None);
    }
}

/// Nobody may let guests in by accident once the destination may have taken over.
#[test]
fn a_panic_after_the_hand_over_keeps_guests_out() {
    let mut rng = rng();
    let source = Host::source(&[MIB, 100], &mut rng);
    let target = Host::target(&[MIB, 100]);
    let once = Arc::new(AtomicBool::new(false));
    // The observer is called by the engine's thread: when it says `undecided`, EOF has gone.
    let bug = Arc::clone(&once);
    let published = Published::new(move |status| {
        if status.undecided {
            assert!(bug.swap(true, Ordering::SeqCst), "a bug in an observer");
        }
    });
    let (here, there, relay) = crate::link::relay(crate::link::Cut::AfterDisks(14), |_| {});
    let destination = start_destination(&target, there);
    let (parameters, capabilities) = (Parameters::default(), Capabilities::default());
    let mut running = start_watched(&source, here, parameters, capabilities, published);
    let status = wait(&running);
    assert!(status.undecided, "{status:?}");
    running.shut_down();
    assert!(once.load(Ordering::SeqCst));
    assert!(source.all_held(Some(Hold::Everything)));
    assert_eq!(source.says(), [Some(Residence::Leaving); 2]);
    assert!(running.published().get().undecided);
    assert!(destination.join().expect("no panic there").is_err());
    relay
        .into_iter()
        .for_each(|thread| thread.join().expect("no panic"));
}

#[test]
fn a_stuck_read_can_be_cancelled() {
    let mut rng = rng();
    let source = Host::new(vec![full_disk(2 * MIB, &mut rng)], Hold::Nothing);
    let gate = source.memories[0].gate(Operation::Read);
    let lengths = [2 * MIB];
    let pair = begin(
        source,
        &lengths,
        Parameters::default(),
        Capabilities::default(),
    );
    gate.wait_reached(1);
    pair.running.cancel().expect("in time");
    drop(gate);
    assert_eq!(wait(&pair.running).state, State::Cancelled);
    pair.try_again();
}

/// Guests are held for the last chunks, and one of those cannot be read: a cancel lets them go on
/// although the read has not ended.
#[test]
fn a_stuck_read_does_not_keep_guests_held_after_a_cancel() {
    let mut rng = rng();
    let lengths = [MIB, MIB];
    let source = Host::source(&lengths, &mut rng);
    let last_write = source.nodes[0].begin_write(0, 1).expect("served");
    let pair = begin(
        source,
        &lengths,
        Parameters::default(),
        Capabilities::default(),
    );
    wait_until_held(&pair.source.nodes[0]);
    let gate = pair.source.memories[0].gate(Operation::Read);
    last_write.write(b"x").expect("written");
    gate.wait_reached(1);
    pair.running.cancel().expect("in time");
    for node in &pair.source.nodes {
        wait_until_served(node);
    }
    drop(gate);
    assert_eq!(wait(&pair.running).state, State::Cancelled);
    pair.try_again();
}

/// More than the buffers hold is on its way when the thread dies.
#[test]
fn a_panic_of_the_writing_thread_fails_the_migration_on_both_sides() {
    const LENGTH: usize = 40 * MIB;
    let mut rng = rng();
    for panics_at in [PanicsAt::Write, PanicsAt::Flush] {
        let source = Host::new(vec![full_disk(LENGTH, &mut rng)], Hold::Nothing);
        let mut target = Host::target(&[LENGTH]);
        let fragile = Fragile {
            disk: target.memories[0].clone(),
            panics_at,
        };
        target.nodes[0] = Node::new("disk0", Box::new(fragile), Hold::Writes);
        let (here, there) = UnixStream::pair().expect("a pair");
        let destination = start_destination(&target, there);
        let (parameters, capabilities) = (Parameters::default(), Capabilities::default());
        let running = start_source(&source, here, parameters, capabilities);
        let status = wait(&running);
        assert_eq!(status.state, State::Failed, "{panics_at:?}: {status:?}");
        drop(running);
        let error = destination.join().expect("contained").expect_err("failed");
        assert!(
            error
                .to_string()
                .contains("the thread that writes the disks"),
            "{error}"
        );
        assert!(target.all_held(Some(Hold::Writes)));
        assert_eq!(target.says(), [Some(Residence::Incoming)]);
        is_served(&source);
    }
}
