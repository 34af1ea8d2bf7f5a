//! A machine: memory that its vCPU fills and checks, a device, and how both move.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmferry_channel::{Channel, Direction, Stop};
use vmferry_disk::Node;
use vmferry_migration::{
    Arrived, Capabilities, Coverage, DestinationDisk, DestinationFailure, DestinationJob,
    DestinationMachine, Guest, Parameters, Published, Reconnections, RunningSource, SourceDisk,
    SourceJob, SourceMachine, SourceMemory, State, Status, Target, receive_machine,
};
use vmferry_ram::{
    AnonymousRam, DirtyLog, GuestRam, RamDestinationOptions, RamSourceOptions, UserfaultLog,
};
use vmferry_savevm::{HandlerError, Machine, Name, Opening, Registration};
use vmferry_vmstate::VmState;

/// Only ever waited out by a test that fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A generator with the seed of `VMFERRY_SEED`, or a random one; it is printed.
pub(crate) fn rng() -> fastrand::Rng {
    let seed = std::env::var("VMFERRY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| fastrand::u64(..));
    println!("VMFERRY_SEED={seed}");
    fastrand::Rng::with_seed(seed)
}

/// Pages of memory that nobody writes after the start.
pub(crate) const STILL_PAGES: u64 = 1000;
/// Words that the vCPU counts in, each on a page of its own.
const COUNTERS: u64 = 200;
const RAM: &str = "pc.ram";

/// How far the vCPU has come.
#[derive(Clone, Debug, Default, VmState)]
#[vmstate(name = "vcpu", version = 1, post_load = Self::check)]
pub(crate) struct Registers {
    #[vmstate(uint64)]
    steps: u64,
    /// Cannot be loaded.
    #[vmstate(bool)]
    poisoned: bool,
}

impl Registers {
    pub(crate) fn steps(&self) -> u64 {
        self.steps
    }

    fn check(&mut self, _version: u32) -> Result<(), String> {
        match self.poisoned {
            true => Err("poisoned".to_owned()),
            false => Ok(()),
        }
    }
}

/// A machine.
pub(crate) struct Vm {
    pub(crate) ram: Arc<AnonymousRam>,
    pub(crate) registers: Arc<Mutex<Registers>>,
    vcpu: Arc<Vcpu>,
}

#[derive(Default)]
struct Vcpu {
    running: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// What a self-check found.
    wrong: Mutex<Option<String>>,
    runs: AtomicU64,
}

impl Vm {
    /// One that waits for a migration.
    pub(crate) fn empty() -> Self {
        Self::with_pages(STILL_PAGES + COUNTERS)
    }

    /// One that has less memory than others.
    pub(crate) fn smaller() -> Self {
        Self::with_pages(STILL_PAGES)
    }

    fn with_pages(pages: u64) -> Self {
        let ram = AnonymousRam::new(&[(RAM, pages * 4096), ("pc.rom", 4096 * 3)]);
        Self {
            ram: Arc::new(ram.expect("memory")),
            registers: Arc::default(),
            vcpu: Arc::default(),
        }
    }

    /// One that runs.
    pub(crate) fn running(rng: &mut fastrand::Rng) -> Self {
        let vm = Self::empty();
        for block in vm.ram.blocks() {
            for page in 0..block.pages().min(STILL_PAGES) {
                let mut bytes = [0; 4096];
                if rng.u8(..4) > 0 {
                    rng.fill(&mut bytes);
                }
                block.write(page * 4096, &bytes).expect("in it");
            }
        }
        vm.guest().run();
        vm
    }

    /// Its device can be saved, but not loaded.
    pub(crate) fn poison(&self) {
        self.registers.lock().expect("no panic").poisoned = true;
    }

    pub(crate) fn guest(&self) -> Box<dyn Guest> {
        Box::new(Handle {
            ram: Arc::clone(&self.ram),
            registers: Arc::clone(&self.registers),
            vcpu: Arc::clone(&self.vcpu),
        })
    }

    pub(crate) fn devices(&self) -> Vec<Registration<'static>> {
        vec![Registration::device(
            "vcpu",
            Box::new(Arc::clone(&self.registers)),
        )]
    }

    pub(crate) fn is_running(&self) -> bool {
        self.vcpu.running.load(Ordering::SeqCst)
    }

    /// How often it was let run.
    pub(crate) fn runs(&self) -> u64 {
        self.vcpu.runs.load(Ordering::SeqCst)
    }

    pub(crate) fn steps(&self) -> u64 {
        self.registers.lock().expect("no panic").steps
    }

    /// Wait until the vCPU has gone on for so many steps.
    pub(crate) fn goes_on(&self, steps: u64) {
        let (from, begun) = (self.steps(), std::time::Instant::now());
        while self.steps() < from + steps {
            assert!(self.is_running(), "it stands still: {:?}", self.wrong());
            assert!(
                begun.elapsed() < PATIENCE,
                "it hangs at step {}",
                self.steps()
            );
            thread::yield_now();
        }
    }

    pub(crate) fn stop(&self) {
        self.guest().stop().expect("stopped");
        assert_eq!(self.wrong(), None);
    }

    pub(crate) fn wrong(&self) -> Option<String> {
        self.vcpu.wrong.lock().expect("no panic").clone()
    }

    /// All of its memory.
    pub(crate) fn memory(&self) -> Vec<Vec<u8>> {
        let read = |block: &vmferry_ram::RamBlock| {
            let mut bytes = vec![0; usize::try_from(block.used_bytes()).expect("small")];
            block.read(0, &mut bytes).expect("in it");
            bytes
        };
        self.ram.blocks().iter().map(read).collect()
    }

    pub(crate) fn source(&self, postcopy: bool) -> SourceMachine {
        SourceMachine {
            opening: Opening {
                machine: machine(),
                ..Opening::default()
            },
            memory: SourceMemory::Live {
                ram: Arc::<AnonymousRam>::clone(&self.ram),
                dirty_log: dirty_log(),
                cpu_throttle: None,
            },
            ram_options: RamSourceOptions {
                postcopy,
                ..RamSourceOptions::default()
            },
            devices: self.devices(),
            guest: self.guest(),
        }
    }

    pub(crate) fn destination(&self, postcopy: bool) -> DestinationMachine {
        DestinationMachine {
            machine: machine(),
            ram: Arc::<AnonymousRam>::clone(&self.ram),
            ram_options: RamDestinationOptions {
                postcopy,
                ..RamDestinationOptions::default()
            },
            devices: self.devices(),
            guest: self.guest(),
        }
    }
}

fn dirty_log() -> Box<dyn DirtyLog> {
    Box::new(UserfaultLog::new().expect("userfaultfd"))
}

fn machine() -> Machine {
    Machine::named(Name::new("test-machine").expect("short"))
}

/// Runs and stops the vCPU.
struct Handle {
    ram: Arc<AnonymousRam>,
    registers: Arc<Mutex<Registers>>,
    vcpu: Arc<Vcpu>,
}

impl Guest for Handle {
    fn stop(&mut self) -> Result<(), HandlerError> {
        self.vcpu.running.store(false, Ordering::SeqCst);
        if let Some(thread) = self.vcpu.thread.lock().expect("no panic").take() {
            thread.join().expect("no panic");
        }
        Ok(())
    }

    fn run(&mut self) {
        self.vcpu.runs.fetch_add(1, Ordering::SeqCst);
        assert!(
            !self.vcpu.running.swap(true, Ordering::SeqCst),
            "it runs already"
        );
        let (ram, registers) = (Arc::clone(&self.ram), Arc::clone(&self.registers));
        let vcpu = Arc::clone(&self.vcpu);
        let thread = thread::spawn(move || {
            while vcpu.running.load(Ordering::SeqCst) {
                if let Err(wrong) = step(&ram, &registers) {
                    *vcpu.wrong.lock().expect("no panic") = Some(wrong);
                    vcpu.running.store(false, Ordering::SeqCst);
                }
            }
        });
        *self.vcpu.thread.lock().expect("no panic") = Some(thread);
    }
}

/// Check a counter and count on.
fn step(ram: &AnonymousRam, registers: &Mutex<Registers>) -> Result<(), String> {
    let steps = registers.lock().expect("no panic").steps;
    let (round, counter) = (steps / COUNTERS, steps % COUNTERS);
    let offset = (STILL_PAGES + counter) * 4096 + 8 * (round % 512);
    let block = &ram.blocks()[0];
    let words = block.words(offset, 8).map_err(|error| error.to_string())?;
    // What the round wrote that used this word before; nothing, or nothing yet.
    let expected = if round >= 512 { round - 512 + 1 } else { 0 };
    let found = words[0].load(Ordering::Relaxed);
    if found != expected {
        return Err(format!(
            "step {steps}: at {offset:#x} is {found}, not {expected}"
        ));
    }
    words[0].store(round + 1, Ordering::Relaxed);
    registers.lock().expect("no panic").steps = steps + 1;
    Ok(())
}

pub(crate) type Received = Result<Arrived, DestinationFailure>;

/// One at each end, or none.
type Disks = (Option<Arc<Node>>, Option<Arc<Node>>);

/// A migration from one machine to another.
pub(crate) struct Pair {
    pub(crate) source: RunningSource,
    destination: Option<JoinHandle<Received>>,
    pub(crate) reconnections: Reconnections,
    pub(crate) published: Published,
}

impl Pair {
    pub(crate) fn begin(
        from: &Vm,
        to: &Vm,
        postcopy: bool,
        ends: (UnixStream, UnixStream),
    ) -> Self {
        Self::with_disks(from, to, postcopy, ends, (None, None))
    }

    /// The source may turn it into a postcopy, and the destination does not expect that.
    pub(crate) fn begin_unlike(from: &Vm, to: &Vm, ends: (UnixStream, UnixStream)) -> Self {
        Self::between(from.source(true), to.destination(false), ends, (None, None))
    }

    /// A disk at each end moves with the machine.
    pub(crate) fn with_disks(
        from: &Vm,
        to: &Vm,
        postcopy: bool,
        ends: (UnixStream, UnixStream),
        disks: Disks,
    ) -> Self {
        Self::between(from.source(postcopy), to.destination(postcopy), ends, disks)
    }

    pub(crate) fn between(
        from: SourceMachine,
        to: DestinationMachine,
        ends: (UnixStream, UnixStream),
        disks: Disks,
    ) -> Self {
        Self::watched(from, to, ends, disks, Published::default())
    }

    /// `published` tells how it goes there.
    pub(crate) fn watched(
        from: SourceMachine,
        to: DestinationMachine,
        ends: (UnixStream, UnixStream),
        disks: Disks,
        published: Published,
    ) -> Self {
        let (here, there) = ends;
        let postcopy = from.ram_options.postcopy;
        let reconnections = Reconnections::default();
        let destination = {
            let (reconnections, published) = (reconnections.clone(), published.clone());
            let disk = disks.1.map(|node| DestinationDisk { node, record: None });
            thread::spawn(move || {
                let job = DestinationJob {
                    disks: Vec::from_iter(disk),
                    coverage: Coverage::Whole,
                    rest: None,
                    any_machine: false,
                    keep_records: false,
                };
                let (channel, _) = channel(there, Direction::Incoming);
                receive_machine(channel, job, to, &reconnections, &published)
            })
        };
        let (channel, stop) = channel(here, Direction::Outgoing);
        let disk = disks.0.map(|node| SourceDisk { node, record: None });
        let job = SourceJob {
            disks: Vec::from_iter(disk),
            target: Target::Channel(channel),
            parameters: Parameters {
                // It converges however slow this host is.
                downtime_limit: Duration::from_secs(30),
                // A postcopy begins long before all memory was sent.
                max_bandwidth: postcopy.then_some(4 << 20),
            },
            capabilities: Capabilities::default(),
            stop,
        };
        let source = RunningSource::start_machine(job, from, Published::default());
        Self {
            source: source.expect("a migration"),
            destination: Some(destination),
            reconnections,
            published,
        }
    }

    /// It has ended there, within [`PATIENCE`].
    pub(crate) fn has_ended(&self) -> bool {
        let begun = std::time::Instant::now();
        let thread = self.destination.as_ref().expect("not asked yet");
        while !thread.is_finished() && begun.elapsed() < PATIENCE {
            thread::yield_now();
        }
        thread.is_finished()
    }

    /// How it ended there.
    pub(crate) fn received(&mut self) -> Received {
        let thread = self.destination.take().expect("asked once");
        thread.join().expect("no panic")
    }

    pub(crate) fn wait(&self) -> Status {
        self.wait_for(|status| status.state.is_over())
    }

    pub(crate) fn wait_for(&self, done: impl Fn(&Status) -> bool) -> Status {
        let status = self.source.published().wait_until(PATIENCE, &done);
        assert!(
            done(&status),
            "never happened: {status:?}, {:?}",
            self.published.get()
        );
        status
    }

    pub(crate) fn wait_there(&self, done: impl Fn(&Status) -> bool) -> Status {
        let status = self.published.wait_until(PATIENCE, &done);
        assert!(done(&status), "never happened: {status:?}");
        status
    }

    /// Both ends got another connection.
    pub(crate) fn reconnect(&self, ends: (UnixStream, UnixStream)) {
        let paused = |status: &Status| status.state == State::PostcopyPaused;
        self.wait_for(paused);
        self.wait_there(paused);
        let (there, _) = channel(ends.1, Direction::Incoming);
        let offered = self.reconnections.offer(there);
        offered.expect("it waits");
        assert!(!paused(&self.published.get()));
        let (here, stop) = channel(ends.0, Direction::Outgoing);
        let resumed = self.source.resume(Target::Channel(here), stop);
        resumed.expect("it is paused");
    }
}

pub(crate) fn channel(socket: UnixStream, direction: Direction) -> (Channel, Stop) {
    let stop = Stop::new().expect("an event");
    let channel = Channel::from_fd(OwnedFd::from(socket), direction, "the test", &stop);
    (channel.expect("a socket"), stop)
}

/// What no vCPU has written since is the same at both ends.
pub(crate) fn same_memory(from: &Vm, to: &Vm) {
    let still = usize::try_from(STILL_PAGES * 4096).expect("small");
    let (left, right) = (from.memory(), to.memory());
    assert!(left[1] == right[1], "pc.rom differs");
    let differs = (0..still).find(|at| left[0][*at] != right[0][*at]);
    assert_eq!(differs, None, "pc.ram differs there");
}
