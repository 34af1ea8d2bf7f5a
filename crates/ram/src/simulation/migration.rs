//! What drives a migration: the steps of an engine, without its threads.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use fastrand::Rng;
use vmferry_savevm::{
    Completing, Describe, GuestStopped, Iterating, Machine as Described, Opening, Postcopy, Ready,
    Registration, Registry, Switching, begin, cleanup,
};
use vmferry_stream::{Command, Name};

use super::Figures;
use super::geometry::{Geometry, Page};
use super::link::{Cut, Line, Link};
use super::source::{SimLog, SimSink, SimThrottle, Source, clock, hear};
use super::target::{State, Target};
use super::world::{World, lock};
use crate::testing::HearAccesses;
use crate::{
    OutgoingRam, PAGE_BYTES, RamSource, RamSourceOptions, SECTION_NAME, SECTION_VERSION, Throttle,
};

/// The PING behind the devices.
const PACKAGE_LOADED: u32 = 3;
/// What small waits may take together.
const MOMENTS_NS: u64 = 1_000_000_000;
/// Connections of one postcopy that may break.
const BREAKS_MAX: u32 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Outcome {
    Precopy,
    Postcopy,
    /// A postcopy that was taken up again.
    Recovered,
    /// Before EOF or the package: the guest runs on here.
    Cancelled,
    Broken,
    /// The package, or EOF, was given away and did not come.
    LostAndServedHere,
    /// Everything has come; its answer was lost.
    LostButArrived,
}

impl Outcome {
    pub(super) const ALL: [Self; 7] = [
        Self::Precopy,
        Self::Postcopy,
        Self::Recovered,
        Self::Cancelled,
        Self::Broken,
        Self::LostAndServedHere,
        Self::LostButArrived,
    ];

    fn is_here(self) -> bool {
        match self {
            Self::Cancelled | Self::Broken | Self::LostAndServedHere => true,
            Self::Precopy | Self::Postcopy | Self::Recovered | Self::LostButArrived => false,
        }
    }
}

/// What happens in a migration besides.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    cut: Cut,
    /// Somebody cancels before this step.
    cancel_at: Option<u32>,
    /// From this step on postcopy is tried.
    postcopy_at: Option<u32>,
    breaks_max: u32,
}

/// A machine at the source, with memory and a way to send it.
pub(super) struct Machine {
    rng: Rng,
    line: Line,
    geometry: Arc<Geometry>,
    options: RamSourceOptions,
    interval_ns: u64,
    /// In so many steps nobody looks whether a precopy can complete.
    steps_min: u32,
    /// After so many steps the guest is stopped, whatever is dirty.
    steps_max: u32,
    /// What may be dirty when it is stopped.
    limit_bytes: u64,
    world: Arc<Mutex<World>>,
    outgoing: OutgoingRam,
    registry: Registry<'static>,
    sink: SimSink,
    _hearing: HearAccesses,
}

impl Machine {
    pub(super) fn new(mut rng: Rng) -> Self {
        let geometry = Arc::new(Geometry::seeded(&mut rng));
        let line = Line::seeded(&mut rng);
        let options = RamSourceOptions {
            postcopy: rng.u8(..4) > 0,
            xbzrle_cache_bytes: (rng.u8(..3) > 0).then(|| 5000 << rng.u32(..7)),
            ignore_shared: geometry.ignore_shared,
            ..RamSourceOptions::default()
        };
        // From several pages written in the time that it takes to send one, to few in a pass.
        let page_ns = line.takes_ns(PAGE_BYTES);
        let interval_ns = (page_ns << rng.u32(..5)) / 4;
        let (source, log) = Source::new(&geometry, interval_ns, &mut rng);
        let described = described(&geometry);
        let target = Target::new(
            &geometry,
            options.postcopy,
            described,
            interval_ns,
            &mut rng,
        );
        let link = Link::new(line, Cut::Never);
        let world = World::new(rng.fork(), Arc::clone(&geometry), source, link, target);
        let world = Arc::new(Mutex::new(world));
        let ram = lock(&world).source.ram.clone();
        let log = Box::new(SimLog {
            inner: log,
            world: Arc::clone(&world),
        });
        let throttle: Option<Box<dyn Throttle>> = match rng.bool() {
            true => Some(Box::new(SimThrottle(Arc::clone(&world)))),
            false => None,
        };
        let mut handler = RamSource::new(ram, log, throttle, options).expect("right blocks");
        handler.set_clock(clock(Arc::clone(&world)));
        let outgoing = handler.outgoing();
        lock(&world).outgoing = Some(outgoing.clone());
        let mut registry = Registry::new();
        let saving = Registration::saving(SECTION_NAME, SECTION_VERSION, Box::new(handler));
        registry.register(saving).expect("the first");
        Self {
            line,
            options,
            interval_ns,
            steps_min: if rng.bool() { 0 } else { rng.u32(..20) },
            steps_max: if rng.u8(..8) == 0 {
                100
            } else {
                rng.u32(3..20)
            },
            limit_bytes: rng.u64(..4) * PAGE_BYTES,
            sink: SimSink(Arc::clone(&world)),
            _hearing: HearAccesses::begin(hear(Arc::clone(&world))),
            geometry,
            world,
            outgoing,
            registry,
            rng,
        }
    }

    pub(super) fn run(mut self) -> (Vec<Outcome>, Figures) {
        let plan = Plan::seeded(
            &mut self.rng,
            self.geometry.total_bytes(),
            self.options.postcopy,
        );
        let mut outcomes = vec![self.migrate(&plan)];
        if outcomes[0].is_here() {
            let plan = Plan {
                postcopy_at: Plan::postcopy_at(&mut self.rng, self.options.postcopy),
                ..Plan::default()
            };
            outcomes.push(self.migrate(&plan));
            assert!(!outcomes[1].is_here(), "the second try: {:?}", outcomes[1]);
        }
        let mut world = self.world();
        world.take_figures();
        world.figures.guest_writes = world.source.writes;
        world.figures.throttled = world.source.throttled;
        world.figures.virtual_seconds = world.now_ns / 1_000_000_000;
        (outcomes, world.figures)
    }

    fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }

    fn target_state(&self) -> State {
        self.world().target.state
    }

    fn shut(&self) -> Option<u32> {
        self.world().heard.shut
    }

    fn migrate(&mut self, plan: &Plan) -> Outcome {
        self.begin(plan);
        let outcome = self.send(plan);
        cleanup(&mut self.registry);
        let mut world = self.world();
        assert_eq!(
            world.source.throttle_percent(),
            0,
            "the guest is slow for ever"
        );
        world.source.check_memory(&self.geometry);
        if outcome.is_here() {
            assert!(!world.target.guest_runs, "two guests run");
            let now_ns = world.now_ns;
            world.source.go_on(now_ns);
            let until_ns = now_ns + 10 * self.interval_ns;
            world.run_until(until_ns);
            return outcome;
        }
        assert_eq!(world.target.state, State::Arrived);
        // Whoever waits goes on, and touches something.
        let until_ns = world.now_ns + 20 * self.interval_ns;
        world.run_until(until_ns);
        world.target.check_nobody_waits();
        world.target.check_memory();
        outcome
    }

    fn begin(&mut self, plan: &Plan) {
        let link = Link::new(self.line, plan.cut);
        let postcopy = self.options.postcopy;
        let described = described(&self.geometry);
        // Memory is touched faster than it comes.
        let (geometry, interval_ns) = (&self.geometry, self.line.takes_ns(PAGE_BYTES) / 4);
        let target = Target::new(geometry, postcopy, described, interval_ns, &mut self.rng);
        let pass_ns = self.line.takes_ns(geometry.total_bytes());
        let patience_ns = pass_ns * 200 + self.line.latency_ns * 1000 + self.interval_ns * 2000;
        let patience_ns = patience_ns + MOMENTS_NS;
        self.world().begin(link, target, patience_ns);
    }

    fn send(&mut self, plan: &Plan) -> Outcome {
        let Ok(mut iterating) = begin(&self.opening(), &mut self.registry, &mut self.sink) else {
            return Outcome::Broken;
        };
        self.world().sections_ended();
        let mut steps = 0;
        loop {
            steps += 1;
            if plan.cancel_at == Some(steps) {
                return self.cancel();
            }
            self.wait_a_little();
            if self.world().link.is_cut {
                return Outcome::Broken;
            }
            if plan.postcopy_at.is_some_and(|at| at <= steps) {
                let ready = iterating.try_postcopy(&mut self.registry, |dirty| {
                    assert_eq!(dirty.bytes, 0, "it can be sent later");
                    true
                });
                match ready.expect("it was advised") {
                    Ready::Go(switching) => return self.switch(switching, plan),
                    Ready::NotYet(..) => panic!("nothing has to come before"),
                }
            }
            if plan.postcopy_at.is_some() || steps <= self.steps_min {
                if self.iterate(&mut iterating).is_err() {
                    return Outcome::Broken;
                }
                continue;
            }
            let limit_bytes = match steps {
                steps if steps < self.steps_max => self.limit_bytes,
                _ => u64::MAX,
            };
            let fits = |bytes: u64| bytes <= limit_bytes;
            match iterating.try_complete(&mut self.registry, |dirty| fits(dirty.bytes)) {
                Ready::Go(completing) => return self.complete(completing, plan),
                Ready::NotYet(next, _) => iterating = next,
            }
            if self.iterate(&mut iterating).is_err() {
                return Outcome::Broken;
            }
        }
    }

    /// The engine has other things to do; guests write meanwhile.
    fn wait_a_little(&mut self) {
        let intervals = self.rng.u64(..4);
        let mut world = self.world();
        let until_ns = world.now_ns + intervals * self.interval_ns;
        world.run_until(until_ns);
        world.pass_a_moment();
    }

    fn iterate(&mut self, iterating: &mut Iterating) -> Result<(), ()> {
        let sent = iterating.iterate(&mut self.registry, &mut self.sink);
        sent.map_err(|_| ())?;
        self.world().sections_ended();
        Ok(())
    }

    fn opening(&self) -> Opening {
        let mut commands = vec![Command::OpenReturnPath, Command::Ping(1)];
        if self.options.postcopy {
            let sizes = self.outgoing.page_sizes();
            assert_eq!(sizes, self.world().target.incoming.page_sizes());
            commands.push(Command::PostcopyAdvise(Some(sizes)));
        }
        Opening {
            machine: described(&self.geometry),
            describe: Describe::Empty,
            commands,
            ..Opening::default()
        }
    }

    /// Nobody listens any more, at either end.
    fn cancel(&self) -> Outcome {
        let mut world = self.world();
        world.link.cut();
        world.with_target(Target::hang_up);
        Outcome::Cancelled
    }

    /// The guest has been told to stop; it takes a while.
    fn stop_guest(&self, may_miss: bool) -> GuestStopped {
        let mut world = self.world();
        for page in self.geometry.pages() {
            assert!(
                may_miss || world.source.was_read[page],
                "the bulk phase is not over"
            );
        }
        world.pass_a_moment();
        world.source.stop();
        GuestStopped::assert_drained()
    }

    fn complete(&mut self, completing: Completing, plan: &Plan) -> Outcome {
        let stopped = self.stop_guest(false);
        let (registry, sink) = (&mut self.registry, &mut self.sink);
        let ended = completing
            .end_live(&stopped, registry, None, sink)
            .and_then(|ended| ended.save_devices(&stopped, registry, sink));
        let Ok(ended) = ended else {
            return Outcome::Broken;
        };
        if plan.cancel_at.is_some_and(|at| at > self.steps_max) {
            return self.cancel();
        }
        self.world().link.end_begins();
        if ended.finish(&mut self.sink).is_err() {
            // A part of EOF and what follows may have gone.
            return self.lost();
        }
        self.wait_for(|world| world.heard.shut.is_some());
        match self.shut() {
            Some(0) => Outcome::Precopy,
            Some(status) => panic!("SHUT {status}"),
            None => self.lost(),
        }
    }

    /// Until that has happened, or the connection broke.
    fn wait_for(&self, has_happened: impl Fn(&World) -> bool) {
        let mut world = self.world();
        while !has_happened(&world) && !world.link.is_cut {
            world.step();
        }
    }

    /// The connection broke before the destination could say that it has everything.
    fn lost(&self) -> Outcome {
        match self.target_state() {
            State::Arrived => Outcome::LostButArrived,
            State::Failed => Outcome::LostAndServedHere,
            state => panic!("{state:?}, without a connection"),
        }
    }

    fn switch(&mut self, switching: Switching, plan: &Plan) -> Outcome {
        let stopped = self.stop_guest(true);
        let (registry, sink) = (&mut self.registry, &mut self.sink);
        let Ok(packing) = switching.end_live(&stopped, registry, sink) else {
            return Outcome::Broken;
        };
        if plan.cancel_at.is_some_and(|at| at > self.steps_max) {
            return self.cancel();
        }
        let sent = packing
            .pack(&stopped, registry, Some(PACKAGE_LOADED))
            .and_then(|packed| packed.send(sink));
        let Ok(mut postcopy) = sent else {
            // Not all of the package was accepted: it cannot have come.
            assert_ne!(self.target_state(), State::Listening);
            return Outcome::Broken;
        };
        let mut breaks = 0;
        loop {
            if self.send_pages(&mut postcopy).is_ok() {
                return match breaks {
                    0 => Outcome::Postcopy,
                    _ => Outcome::Recovered,
                };
            }
            match self.target_state() {
                State::Listening => {}
                State::Loading | State::Failed => return Outcome::LostAndServedHere,
                State::Arrived => return Outcome::LostButArrived,
            }
            // Nobody is in a hurry to mend it, and the connection may break again.
            breaks += 1;
            loop {
                self.rest();
                if self.target_state() == State::Arrived {
                    return Outcome::LostButArrived;
                }
                let cut = match breaks < plan.breaks_max {
                    true => Cut::At(self.next_cut()),
                    false => Cut::Never,
                };
                if self.recover(&mut postcopy, cut).is_ok() {
                    break;
                }
                breaks += 1;
            }
        }
    }

    /// Time goes by without a connection: devices are loaded, the guest runs and waits.
    fn rest(&mut self) {
        let intervals = self.rng.u64(..20);
        let mut world = self.world();
        let until_ns = world.now_ns + intervals * self.interval_ns;
        world.run_until(until_ns);
    }

    fn next_cut(&mut self) -> u64 {
        match self.rng.u8(..4) {
            0 => self.rng.u64(..100),
            1 => self.rng.u64(..10_000),
            _ => self.rng.u64(..self.geometry.total_bytes()),
        }
    }

    /// Send what is left and wait for the destination's word. Fails when the connection breaks.
    fn send_pages(&mut self, postcopy: &mut Postcopy) -> Result<(), ()> {
        loop {
            if self.rng.u8(..4) == 0 {
                self.world().pass_a_moment();
            }
            self.world().section_begins();
            let progress = postcopy.iterate(&mut self.registry, &mut self.sink);
            let progress = progress.map_err(|_| ())?;
            self.world().sections_ended();
            // Whether nothing is left, or the limit left no time for it.
            if progress == vmferry_savevm::Progress::Finished || self.rng.u8(..32) == 0 {
                break;
            }
        }
        self.world().section_begins();
        let ended = postcopy.complete(&mut self.registry, &mut self.sink);
        ended.map_err(|_| ())?;
        self.wait_for(|world| world.heard.shut.is_some());
        match self.shut() {
            Some(0) => Ok(()),
            Some(status) => panic!("SHUT {status}"),
            None => Err(()),
        }
    }

    /// Find out, over a new connection, what is still to be sent.
    fn recover(&mut self, postcopy: &mut Postcopy, cut: Cut) -> Result<(), ()> {
        let missing = {
            let mut world = self.world();
            world.figures.recoveries += 1;
            world.connect(Link::new(self.line, cut));
            world.target.reconnect();
            let host_pages = world.target.missing.iter();
            let pages = host_pages.flat_map(|page| self.geometry.host_page_pages(*page));
            let missing: BTreeSet<Page> = pages.collect();
            world.must_send(missing.clone());
            missing
        };
        let blocks: Vec<Name> = self.outgoing.blocks();
        for block in &blocks {
            let command = Command::ReceivedBitmap(block.clone());
            postcopy.command(command, &mut self.sink).map_err(|_| ())?;
        }
        self.wait_for(|world| world.heard.bitmaps.len() == blocks.len());
        let bitmaps = std::mem::take(&mut self.world().heard.bitmaps);
        if bitmaps.len() < blocks.len() {
            return Err(());
        }
        for (block, bitmap) in &bitmaps {
            self.outgoing
                .received(block, bitmap)
                .expect("a right bitmap");
        }
        self.outgoing.resume().expect("all bitmaps");
        postcopy
            .command(Command::PostcopyResume, &mut self.sink)
            .map_err(|_| ())?;
        self.wait_for(|world| world.heard.resume_ack.is_some());
        let world = self.world();
        assert_eq!(world.ear.expected, missing, "nothing goes before RESUME");
        match world.heard.resume_ack {
            Some(1) => Ok(()),
            Some(other) => panic!("RESUME_ACK {other}"),
            None => Err(()),
        }
    }
}

impl Plan {
    fn postcopy_at(rng: &mut Rng, can_postcopy: bool) -> Option<u32> {
        (can_postcopy && rng.u8(..4) > 0).then(|| rng.u32(1..8))
    }

    fn seeded(rng: &mut Rng, total_bytes: u64, postcopy: bool) -> Self {
        let mut plan = Self {
            breaks_max: rng.u32(..=BREAKS_MAX),
            postcopy_at: Self::postcopy_at(rng, postcopy),
            ..Self::default()
        };
        match rng.u8(..16) {
            0 => plan.cut = Cut::At(rng.u64(..400)),
            1 => plan.cut = Cut::At(rng.u64(..3 * total_bytes)),
            2 => plan.cancel_at = Some(rng.u32(1..10)),
            3 => plan.cancel_at = Some(u32::MAX),
            4 => plan.cut = Cut::AfterPackage(rng.u64(..60)),
            5 => plan.cut = Cut::BeforeEof(rng.u64(..12)),
            6 => plan.cut = Cut::AfterAll,
            7 => plan.cut = Cut::AfterRun(rng.u64(..100)),
            8..13 => plan.cut = Cut::AfterRun(rng.u64(..total_bytes)),
            _ => {}
        }
        plan
    }
}

/// The same machine at both ends.
fn described(geometry: &Geometry) -> Described {
    let name = Name::new("x-ignore-shared").expect("short");
    Described {
        capabilities: Some(match geometry.ignore_shared {
            true => vec![name],
            false => Vec::new(),
        }),
        ..Described::default()
    }
}
