//! A machine between two QEMUs: its memory is here, its devices are bytes, and no vCPU is there to run it.

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::json;
use vmferry_channel::{Channel, Direction, Stop};
use vmferry_migration::{
    Arrived, Capabilities, Coverage, Decision, DestinationFailure, DestinationJob,
    DestinationMachine, Guest, Parameters, Published, Reconnections, RunningSource, SourceJob,
    SourceMachine, SourceMemory, State, Status, Target, receive_machine,
};
use vmferry_ram::{
    AnonymousRam, GuestRam, RamBlock, RamDestinationOptions, RamSourceOptions, UserfaultLog,
    check_postcopy,
};
use vmferry_savevm::{HandlerError, Machine, Name, Opening};

use crate::layout::{Layout, RawDevice};
use crate::link::Link;
use crate::monitor::Monitor;
use crate::peers::qemu::{self, Qemu};
use crate::peers::{PATIENCE, until};

/// Slow enough for a postcopy to begin with most of the memory unsent.
const SLOW: u64 = 4 << 20;
/// So slow that what a guest writes meanwhile takes a while.
const BUSY: u64 = 16 << 20;
/// No limit.
const FAST: u64 = 1 << 40;
/// However slow this host is, what is left fits.
const DOWNTIME: Duration = Duration::from_secs(60);

/// Says that postcopy cannot be tested here, if so.
pub(crate) fn postcopy() -> Option<()> {
    let ram = AnonymousRam::new(&[("some", 4096)]).expect("memory");
    match check_postcopy(&ram) {
        Ok(()) => Some(()),
        Err(error) => {
            assert!(!crate::peers::required(), "{error}");
            println!("left out: {error}");
            None
        }
    }
}

/// How a machine goes from here to there.
#[derive(Debug)]
pub(crate) struct Way {
    /// Its guest runs there before its memory has come.
    pub(crate) postcopy: bool,
    /// After the switch, the connections break, each after so many bytes.
    pub(crate) cuts: Vec<u64>,
    /// Threads that touch its memory while it comes.
    pub(crate) probes: u64,
    /// The precopy, that before a postcopy too, goes on for so many passes.
    pub(crate) passes: u64,
    /// The connections that go on break, each after so many bytes from its beginning.
    pub(crate) cuts_again: Vec<u64>,
    /// Room for the old versions of pages.
    pub(crate) xbzrle_cache_bytes: Option<u64>,
}

impl Way {
    pub(crate) fn precopy() -> Self {
        Self {
            postcopy: false,
            cuts: Vec::new(),
            probes: 0,
            passes: 0,
            cuts_again: Vec::new(),
            xbzrle_cache_bytes: None,
        }
    }

    /// One that breaks each time after so many bytes.
    pub(crate) fn postcopy(cuts: Vec<u64>) -> Self {
        Self {
            postcopy: true,
            cuts,
            ..Self::precopy()
        }
    }
}

/// What became of a way.
#[derive(Debug)]
pub(crate) struct Went {
    pub(crate) status: Status,
    /// How often its connection broke.
    pub(crate) breaks: usize,
}

/// A machine that has come.
pub(crate) struct Halfway {
    machine: Name,
    switchover_start: bool,
    pub(crate) ram: Arc<AnonymousRam>,
    devices: Vec<RawDevice>,
    vcpus: Arc<Vcpus>,
}

/// What a guest would do.
#[derive(Default)]
struct Vcpus {
    /// How often they were let run.
    runs: AtomicU64,
    /// They write to memory meanwhile.
    writer: Mutex<Option<Writer>>,
}

/// A thread that writes to memory until it is stopped.
struct Writer {
    running: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

struct Handle(Arc<Vcpus>);

impl Guest for Handle {
    fn stop(&mut self) -> Result<(), HandlerError> {
        if let Some(writer) = self.0.writer.lock().expect("no panic").take() {
            writer.running.store(false, Ordering::SeqCst);
            writer.thread.join().expect("no panic");
        }
        Ok(())
    }

    fn run(&mut self) {
        self.0.runs.fetch_add(1, Ordering::SeqCst);
    }
}

/// What is sent in the second pass may go as what changed.
const FEWEST_PASSES: u64 = 3;

impl Halfway {
    fn new(layout: &Layout) -> Self {
        Self {
            machine: layout.machine.clone(),
            switchover_start: layout.switchover_start,
            ram: Arc::new(layout.memory()),
            devices: layout.devices(),
            vcpus: Arc::default(),
        }
    }

    /// A block of its memory.
    pub(crate) fn block(&self, name: &str) -> &RamBlock {
        let mut blocks = self.ram.blocks().iter();
        blocks
            .find(|block| **block.idstr() == *name)
            .expect("it has such a block")
    }

    /// What lies in a block.
    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        let block = self.block(name);
        let mut bytes = vec![0; usize::try_from(block.used_bytes()).expect("small")];
        block.read(0, &mut bytes).expect("in it");
        bytes
    }

    /// Counts in words of these pages of `pc.ram`, from now on until it is stopped.
    pub(crate) fn write_to(&self, place: std::ops::Range<u64>) {
        let running = Arc::new(AtomicBool::new(true));
        let (ram, goes_on) = (Arc::clone(&self.ram), Arc::clone(&running));
        let thread = thread::spawn(move || {
            let mut blocks = ram.blocks().iter();
            let block = blocks.find(|block| **block.idstr() == *"pc.ram");
            let block = block.expect("it has memory");
            for step in 0_u64.. {
                for offset in place.clone().step_by(4096) {
                    let words = block.words(offset + step % 512 * 8, 8).expect("in it");
                    words[0].store(step + offset, Ordering::Relaxed);
                    if !goes_on.load(Ordering::SeqCst) {
                        return;
                    }
                }
                // A guest that writes as fast as it can leaves nothing to compare with.
                thread::sleep(Duration::from_millis(5));
            }
        });
        *self.vcpus.writer.lock().expect("no panic") = Some(Writer { running, thread });
    }

    /// Take a machine of this layout out of a QEMU. If its connection breaks while it writes the end of its memory, a
    /// QEMU takes the migration for failed, and nobody can go on with it: it is left interrupted.
    pub(crate) fn take(qemu: &mut Qemu, layout: &Layout, way: &Way) -> (Self, Went) {
        let here = Self::new(layout);
        let path = qemu.path("outgoing");
        let listener = UnixListener::bind(&path).expect("a socket");
        let uri = format!("unix:{}", path.display());
        let downtime = u64::try_from(DOWNTIME.as_millis()).expect("short");
        qemu.limits(match (way.postcopy, way.passes) {
            (true, 0) => (SLOW, 1),
            (false, 0) => (FAST, downtime),
            // With 0, QEMU 10.0 completes after the first pass without looking for what was written since.
            _ => (BUSY, 1),
        });
        capabilities(qemu, &[("postcopy-ram", way.postcopy)]);
        qemu.qmp.execute("migrate", &json!({"uri": uri}));

        let (link, channel) = accept(&listener);
        let line = Line::new(link, way);
        let (reconnections, published) = (Reconnections::default(), line.published());
        let probes = Probes::new(&here.ram, &published, way.probes);
        let receiver = here.receive(channel, way.postcopy, &reconnections, &published);
        until("enough passes", || {
            let answer = qemu.qmp.execute("query-migrate", &json!({}));
            let passes = answer["ram"]["dirty-sync-count"].as_u64();
            let enough = passes > Some(way.passes) && line.carried() > 64 << 10;
            // A guest that is given little time to write lets its precopy complete, in fewer passes.
            let is_over = receiver.is_finished();
            let complete = is_over && !way.postcopy && passes >= Some(FEWEST_PASSES);
            assert!(enough || complete || !is_over, "{answer}");
            (enough || complete).then_some(())
        });
        match way.postcopy {
            true => drop(qemu.qmp.execute("migrate-start-postcopy", &json!({}))),
            false => qemu.limits((FAST, downtime)),
        }
        let mut breaks = 0;
        loop {
            let status = settled(&published);
            if status.state != State::PostcopyPaused {
                break;
            }
            breaks += 1;
            println!("break {breaks}: {:?}", status.error);
            let there = until("the source to be paused", || {
                let answer = qemu.qmp.execute("query-migrate", &json!({}));
                let status = answer["status"].as_str().expect("it has a status");
                ["postcopy-paused", "failed"]
                    .contains(&status)
                    .then(|| status.to_owned())
            });
            if there == "failed" {
                println!(
                    "the source has failed, and is {}: {}",
                    qemu.run_state(),
                    qemu.errors()
                );
                reconnections.close();
                break;
            }
            let resume = json!({"uri": uri, "resume": true});
            qemu.qmp.execute("migrate", &resume);
            let (link, channel) = accept(&listener);
            line.renew(link);
            if let Err(error) = reconnections.offer(channel) {
                panic!("{error}; {:?}", receiver.join().expect("no panic"));
            }
            until("the next connection to be taken", || {
                (line.recoveries() >= breaks).then_some(())
            });
        }
        let arrived = receiver.join().expect("no panic");
        // If not all has come, nobody waits for it any more.
        probes.end();
        assert_eq!(here.vcpus.runs.load(Ordering::SeqCst), 1);
        let status = published.get();
        if let Err(DestinationFailure::Interrupted { .. }) = &arrived {
            return (here, Went { status, breaks });
        }
        let arrived = arrived.unwrap_or_else(|error| panic!("{error}; {}", qemu.errors()));
        // In a precopy it listens only with the capability `return-path`.
        assert_eq!(arrived.source_told, way.postcopy);
        qemu.migrated();
        (here, Went { status, breaks })
    }

    fn receive(
        &self,
        channel: Channel,
        postcopy: bool,
        reconnections: &Reconnections,
        published: &Published,
    ) -> JoinHandle<Result<Arrived, DestinationFailure>> {
        let devices = self.devices.iter().map(RawDevice::registration).collect();
        let machine = DestinationMachine {
            machine: Machine::named(self.machine.clone()),
            ram: Arc::<AnonymousRam>::clone(&self.ram),
            ram_options: RamDestinationOptions {
                postcopy,
                ..RamDestinationOptions::default()
            },
            devices,
            guest: Box::new(Handle(Arc::clone(&self.vcpus))),
        };
        let (reconnections, published) = (reconnections.clone(), published.clone());
        thread::spawn(move || {
            let job = DestinationJob {
                disks: Vec::new(),
                coverage: Coverage::Whole,
                rest: None,
                any_machine: false,
                keep_records: false,
            };
            receive_machine(channel, job, machine, &reconnections, &published)
        })
    }

    /// Put it into a QEMU. If that ends before the guest runs in it, the machine is here as before.
    pub(crate) fn put(&self, fresh: &mut Fresh, way: &Way) -> Went {
        let Fresh { qemu, monitor } = fresh;
        let before = self.vcpus.runs.load(Ordering::SeqCst);
        capabilities(qemu, &[("postcopy-ram", way.postcopy)]);
        qemu.listen();
        let (link, channel, stop) = connect(qemu, "incoming");
        let line = Line::new(link, way);
        let job = SourceJob {
            disks: Vec::new(),
            target: Target::Channel(channel),
            parameters: match (way.postcopy, way.passes) {
                (true, 0) => parameters(DOWNTIME, Some(SLOW)),
                (false, 0) => parameters(DOWNTIME, None),
                _ => parameters(Duration::ZERO, Some(BUSY)),
            },
            capabilities: Capabilities::default(),
            stop,
        };
        let machine = self.source(way);
        let mut source =
            RunningSource::start_machine(job, machine, line.published()).expect("it can be sent");
        until("enough passes", || {
            let status = source.published().get();
            let passes = status.ram.map(|ram| ram.passes);
            let enough = passes > Some(way.passes) && line.carried() > 64 << 10;
            (enough || status.state.is_over()).then_some(())
        });
        match way.postcopy {
            true => source.start_postcopy().expect("it can"),
            false => source.set(parameters(DOWNTIME, None)),
        }
        let mut breaks = 0;
        let status = loop {
            let status = settled(source.published());
            if status.state != State::PostcopyPaused {
                break status;
            }
            breaks += 1;
            println!("break {breaks}: {:?}", status.error);
            let name = format!("incoming-{breaks}");
            if !monitor.recover(&format!("unix:{}", qemu.path(&name).display())) {
                let decided = source.decide(Decision::Serve);
                decided.expect("it was not running there");
                let over = |status: &Status| status.state.is_over();
                break source.published().wait_until(PATIENCE, over);
            }
            let (link, channel, stop) = connect(qemu, &name);
            line.renew(link);
            let resumed = source.resume(Target::Channel(channel), stop);
            resumed.expect("it is paused");
        };
        source.shut_down();
        match status.state {
            State::Completed => {
                qemu.migrated();
                assert_eq!(self.vcpus.runs.load(Ordering::SeqCst), before);
            }
            _ => {
                println!("it stays here: {:?}; {}", status.error, qemu.errors());
                assert!(breaks > 0);
                assert_eq!(self.vcpus.runs.load(Ordering::SeqCst), before + 1);
            }
        }
        Went { status, breaks }
    }

    /// Put it into a QEMU, and into another one if the first ends before its guest runs: one whose connection breaks
    /// between POSTCOPY_LISTEN and POSTCOPY_RUN does.
    pub(crate) fn put_somewhere(
        &self,
        mut host: impl FnMut() -> Option<qemu::Machine>,
        way: &Way,
    ) -> Option<(Fresh, Went)> {
        let mut fresh = Fresh::start(host()?);
        let went = self.put(&mut fresh, way);
        if went.status.state == State::Completed {
            return Some((fresh, went));
        }
        let mut fresh = Fresh::start(host()?);
        let unbroken = Way::postcopy(Vec::new());
        let Went { status, .. } = self.put(&mut fresh, &unbroken);
        let breaks = went.breaks;
        Some((fresh, Went { status, breaks }))
    }

    fn source(&self, way: &Way) -> SourceMachine {
        SourceMachine {
            opening: Opening {
                machine: Machine::named(self.machine.clone()),
                switchover_start: self.switchover_start,
                ..Opening::default()
            },
            memory: SourceMemory::Live {
                ram: Arc::<AnonymousRam>::clone(&self.ram),
                dirty_log: Box::new(UserfaultLog::new().expect("userfaultfd")),
                cpu_throttle: None,
            },
            ram_options: RamSourceOptions {
                postcopy: way.postcopy,
                xbzrle_cache_bytes: way.xbzrle_cache_bytes,
                ..RamSourceOptions::default()
            },
            devices: self.devices.iter().map(RawDevice::registration).collect(),
            guest: Box::new(Handle(Arc::clone(&self.vcpus))),
        }
    }
}

/// A QEMU that waits for a machine; see [`Halfway::put`].
pub(crate) struct Fresh {
    pub(crate) qemu: Qemu,
    monitor: Monitor,
}

impl Fresh {
    pub(crate) fn start(machine: qemu::Machine) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let socket = dir.path().join("monitor");
        let server = format!("unix:{},server=on,wait=off", socket.display());
        let qemu = machine.args(["-incoming", "defer", "-qmp", &server]);
        Self {
            qemu: qemu.start(),
            monitor: Monitor::connect(&socket),
        }
    }
}

/// Switches capabilities of the next migration.
pub(crate) fn capabilities(qemu: &mut Qemu, switches: &[(&str, bool)]) {
    let list: Vec<_> = switches
        .iter()
        .map(|(name, on)| json!({"capability": name, "state": on}))
        .collect();
    let arguments = json!({"capabilities": list});
    qemu.qmp.execute("migrate-set-capabilities", &arguments);
}

fn parameters(downtime_limit: Duration, max_bandwidth: Option<u64>) -> Parameters {
    Parameters {
        downtime_limit,
        max_bandwidth,
    }
}

/// Waits until nothing goes on by itself.
fn settled(published: &Published) -> Status {
    let is_settled = |status: &Status| {
        status.state == State::PostcopyPaused
            || (status.state.is_over() && status.state != State::None)
    };
    let status = published.wait_until(PATIENCE, is_settled);
    assert!(is_settled(&status), "it hangs: {status:?}");
    status
}

/// A connection of a source that was told to make one.
fn accept(listener: &UnixListener) -> (Link, Channel) {
    let (source, _) = listener.accept().expect("the source connects");
    let (far, near) = UnixStream::pair().expect("a pair");
    let (channel, _) = channel(near, Direction::Incoming);
    (Link::new(source, far), channel)
}

/// A connection to a destination that listens.
fn connect(qemu: &Qemu, name: &str) -> (Link, Channel, Stop) {
    let path = qemu.path(name);
    let destination = until("the destination to listen", || {
        UnixStream::connect(&path).ok()
    });
    let (near, far) = UnixStream::pair().expect("a pair");
    let (channel, stop) = channel(near, Direction::Outgoing);
    (Link::new(far, destination), channel, stop)
}

fn channel(socket: UnixStream, direction: Direction) -> (Channel, Stop) {
    let stop = Stop::new().expect("an event");
    let channel = Channel::from_fd(OwnedFd::from(socket), direction, "a QEMU", &stop);
    (channel.expect("a socket"), stop)
}

/// The connections of one migration, one after the other, and where they will break.
#[derive(Clone)]
struct Line(Arc<Mutex<Cuts>>);

struct Cuts {
    link: Link,
    /// See [`Way`].
    left: Vec<u64>,
    again: Vec<u64>,
    /// How often another connection was taken.
    recoveries: usize,
}

impl Line {
    fn new(link: Link, way: &Way) -> Self {
        let left = way.cuts.clone();
        if !left.is_empty() {
            // Else all would be there before the guest runs.
            link.slow_down();
        }
        Self(Arc::new(Mutex::new(Cuts {
            link,
            left,
            again: way.cuts_again.clone(),
            recoveries: 0,
        })))
    }

    fn carried(&self) -> u64 {
        self.0.lock().expect("no panic").link.carried()
    }

    fn renew(&self, link: Link) {
        let mut cuts = self.0.lock().expect("no panic");
        if let Some(bytes) = cuts.again.pop() {
            link.cut_after(bytes);
        }
        if !cuts.left.is_empty() {
            link.slow_down();
        }
        cuts.link = link;
    }

    fn recoveries(&self) -> usize {
        self.0.lock().expect("no panic").recoveries
    }

    /// Whenever the guest has been switched over, or its memory goes on coming, the connection gets its end.
    fn published(&self) -> Published {
        let (line, last) = (self.clone(), Mutex::new(State::None));
        Published::new(move |status| {
            let mut last = last.lock().expect("no panic");
            let before = std::mem::replace(&mut *last, status.state);
            if before == status.state {
                return;
            }
            let mut cuts = line.0.lock().expect("no panic");
            if status.state == State::PostcopyRecover {
                cuts.recoveries += 1;
            } else if status.state == State::PostcopyActive
                && let Some(bytes) = cuts.left.pop()
            {
                cuts.link.cut_after(bytes);
            }
        })
    }
}

/// Threads that touch memory as a guest would.
struct Probes {
    running: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Probes {
    fn new(ram: &Arc<AnonymousRam>, published: &Published, count: u64) -> Self {
        let running = Arc::new(AtomicBool::new(true));
        let probe = |seed| {
            let (ram, published, running) =
                (Arc::clone(ram), published.clone(), Arc::clone(&running));
            thread::spawn(move || {
                // Before that nothing is missing: it would only be made by looking at it.
                let may_begin = |status: &Status| {
                    status.state == State::PostcopyActive || status.state.is_over()
                };
                published.wait_until(PATIENCE, |status| {
                    status.state != State::None && may_begin(status)
                });
                let mut rng = fastrand::Rng::with_seed(seed);
                while running.load(Ordering::SeqCst) {
                    let block = &ram.blocks()[rng.usize(..ram.blocks().len())];
                    let mut bytes = [0; 8];
                    let page = rng.u64(..block.pages());
                    block.read(page * 4096, &mut bytes).expect("in it");
                }
            })
        };
        let threads = (0..count).map(probe).collect();
        Self { running, threads }
    }

    fn end(self) {
        self.running.store(false, Ordering::SeqCst);
        for thread in self.threads {
            thread.join().expect("no panic");
        }
    }
}
