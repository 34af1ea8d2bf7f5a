//! What drives a migration: the steps of an engine, without its threads.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fastrand::Rng;
use vmferry_block_migration::{SECTION_NAME, SECTION_VERSION, Source, SourceOptions};
use vmferry_disk::{CHUNK_BYTES, Hold, Lease, Leaving};
use vmferry_savevm::{
    Completing, Describe, Ended, GuestStopped, Iterating, Opening, Ready, Registration, Registry,
    SaveError, begin, cleanup,
};
use vmferry_stream::Command;

use crate::checks;
use crate::target::{State, Target, Targets};
use crate::wire::{Ear, Link, SimSink};
use crate::world::{SimReads, World, lock};

/// The PING whose PONG allows the hand-over.
const BARRIER: u32 = u32::MAX;
/// After so many rounds the guests are stopped, whatever is dirty.
const ROUNDS_MAX: u32 = 200;

/// What goes wrong, and when.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// The connection breaks at this byte.
    cut_at: Option<u64>,
    /// Somebody cancels at this step.
    cancel_at: Option<u32>,
    /// The n-th read of a disk fails.
    read: Option<u32>,
    /// The n-th change or flush of the first target fails.
    target: Option<u32>,
    /// The connection breaks after EOF has gone, before anything has come back.
    after_eof: bool,
}

impl Faults {
    pub(crate) fn seeded(rng: &mut Rng, disk_bytes: u64) -> Self {
        let mut faults = Self::default();
        match rng.u8(..12) {
            0 => faults.cut_at = Some(rng.u64(..2 * disk_bytes + 200)),
            1 => faults.cut_at = Some(rng.u64(..2000)),
            2 => faults.cancel_at = Some(rng.u32(..40)),
            3 => faults.read = Some(rng.u32(1..10)),
            4 => faults.target = Some(rng.u32(1..15)),
            5 => faults.after_eof = true,
            _ => {}
        }
        faults
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// The destination has said that everything is whole and durable.
    Completed,
    /// Before EOF was given away: the source is as before.
    Failed,
    /// Afterwards: the destination has taken over, its answer was lost.
    LostButArrived,
    /// Afterwards: the destination has not.
    LostAndServedHere,
}

/// How far the source is.
enum Sender {
    Iterating(Iterating),
    Stopping(Completing),
    /// Waits for the PONG.
    AtBarrier(Ended),
    Over,
}

struct Run<'a> {
    world: &'a Arc<Mutex<World>>,
    registry: Registry<'static>,
    sink: SimSink,
    link: Rc<RefCell<Link>>,
    rng: Rng,
    rounds: u32,
    leases: Vec<Lease>,
    leaving: Vec<Leaving>,
    /// What may be dirty when the guests are stopped.
    limit_bytes: u64,
}

pub(crate) fn migrate(
    world: &Arc<Mutex<World>>,
    targets: &Targets,
    faults: &Faults,
    rng: &mut Rng,
) -> (Outcome, State) {
    let mut run = Run::new(world, faults, rng.fork());
    if let Some(nth) = faults.target {
        targets.disks[0].fail(nth);
    }
    let mut target = Target::new(targets);
    let sent = run.send_all(&mut target, faults);
    cleanup(&mut run.registry);
    assert_eq!(lock(world).reads_in_flight(), 0, "cleanup waits for reads");
    let outcome = match sent {
        Err(reason) => {
            run.close(&mut target);
            assert!(!reason.is_empty());
            assert!(run.leaving.is_empty());
            run.leases.clear();
            checks::is_as_before(&mut lock(world));
            Outcome::Failed
        }
        Ok(()) => {
            checks::is_held(&lock(world));
            run.hand_over(&mut target, targets)
        }
    };
    (outcome, target.state)
}

impl<'a> Run<'a> {
    fn new(world: &'a Arc<Mutex<World>>, faults: &Faults, mut rng: Rng) -> Self {
        let buffers = rng.usize(1..6);
        let options = SourceOptions {
            zero_blocks: rng.u8(..4) > 0,
            incremental: lock(world).incremental,
            buffer_budget_bytes: buffers * CHUNK_BYTES as usize,
        };
        let leases: Vec<Lease> = {
            let mut world = lock(world);
            world.new_migration();
            world.buffers_max = buffers;
            world.zero_blocks = options.zero_blocks;
            world.read_fails_in = faults.read;
            let lease = |side: &crate::world::Side| side.node.lease("a migration").expect("free");
            world.sides.iter().map(lease).collect()
        };
        let claimers = leases.iter().map(Lease::claimer).collect();
        let source = Source::new(claimers, SimReads(Arc::clone(world)), options);
        let mut registry = Registry::new();
        registry
            .register(Registration::saving(
                SECTION_NAME,
                SECTION_VERSION,
                Box::new(source.expect("good disks")),
            ))
            .expect("the first");
        let link = Rc::new(RefCell::new(Link {
            cut_at: faults.cut_at,
            ..Link::default()
        }));
        let sink = SimSink {
            world: Arc::clone(world),
            link: Rc::clone(&link),
            rng: rng.fork(),
            ear: Ear::new(rng.u8(..32) == 0),
        };
        Self {
            world,
            registry,
            sink,
            link,
            rounds: 0,
            leases,
            leaving: Vec::new(),
            limit_bytes: rng.u64(..4) * CHUNK_BYTES,
            rng,
        }
    }

    /// Everything up to EOF, which is on the link when this returns.
    fn send_all(&mut self, target: &mut Target, faults: &Faults) -> Result<(), String> {
        let opening = Opening {
            describe: Describe::Empty,
            commands: vec![Command::OpenReturnPath],
            ..Opening::default()
        };
        let begun = begin(&opening, &mut self.registry, &mut self.sink);
        let mut sender = Sender::Iterating(begun.map_err(|error| error.to_string())?);
        let mut steps = 0;
        while !matches!(sender, Sender::Over) {
            steps += 1;
            if faults.cancel_at == Some(steps) {
                return Err("cancelled".to_owned());
            }
            World::pass_time(self.world);
            match self.rng.u8(..3) {
                0 => target.receive(&mut self.link.borrow_mut(), self.piece()),
                _ => sender = self.step(sender).map_err(|error| error.to_string())?,
            }
            if let State::Failed(reason) = &target.state {
                return Err(reason.clone());
            }
        }
        self.link.borrow_mut().is_cut |= faults.after_eof;
        Ok(())
    }

    fn piece(&self) -> u32 {
        let mut rng = self.rng.clone();
        match rng.u8(..3) {
            0 => rng.u32(1..40),
            1 => rng.u32(1..CHUNK_BYTES as u32),
            _ => rng.u32(1..8 * CHUNK_BYTES as u32),
        }
    }

    fn step(&mut self, sender: Sender) -> Result<Sender, SaveError> {
        match sender {
            Sender::Iterating(iterating) => self.iterate(iterating),
            Sender::Stopping(completing) => self.stop(completing),
            Sender::AtBarrier(ended) => self.commit(ended),
            Sender::Over => Ok(Sender::Over),
        }
    }

    fn iterate(&mut self, mut iterating: Iterating) -> Result<Sender, SaveError> {
        self.rounds += 1;
        self.sink.rng = self.rng.fork();
        iterating.iterate(&mut self.registry, &mut self.sink)?;
        let limit = match self.rounds {
            ..ROUNDS_MAX => self.limit_bytes,
            _ => u64::MAX,
        };
        // Sometimes whatever is dirty is little enough: the bulk phase alone must prevent an end.
        let anything = self.rng.u8(..8) == 0;
        let ready =
            iterating.try_complete(&mut self.registry, |dirty| anything || dirty.bytes <= limit);
        Ok(match ready {
            Ready::NotYet(iterating, _) => Sender::Iterating(iterating),
            Ready::Go(completing) => {
                checks::bulk_is_over(&lock(self.world));
                for lease in &self.leases {
                    lease.hold(Hold::Writes);
                }
                Sender::Stopping(completing)
            }
        })
    }

    fn stop(&mut self, completing: Completing) -> Result<Sender, SaveError> {
        if !self.leases.iter().all(|lease| lease.drain(Duration::ZERO)) {
            return Ok(Sender::Stopping(completing));
        }
        let stopped = GuestStopped::assert_drained();
        let (registry, sink) = (&mut self.registry, &mut self.sink);
        let ended = completing.end_live(&stopped, registry, Some(BARRIER), sink)?;
        let ended = ended.save_devices(&stopped, registry, sink)?;
        checks::nothing_is_left(&lock(self.world));
        Ok(Sender::AtBarrier(ended))
    }

    fn commit(&mut self, ended: Ended) -> Result<Sender, SaveError> {
        if self.link.borrow_mut().pongs.pop_front() != Some(BARRIER) {
            let link = self.link.borrow();
            return match link.is_cut && link.pieces.is_empty() {
                true => Err(SaveError::Channel("cut".into())),
                false => Ok(Sender::AtBarrier(ended)),
            };
        }
        self.leaving = self.leases.drain(..).map(Lease::leave).collect();
        let before = self.link.borrow().accepted_bytes;
        match ended.finish(&mut self.sink) {
            Err(error) if self.link.borrow().accepted_bytes == before => {
                for leaving in self.leaving.drain(..) {
                    leaving.serve_on();
                }
                Err(error)
            }
            Ok(()) | Err(_) => Ok(Sender::Over),
        }
    }

    /// The connection is closed; the destination reads what is on its way.
    fn close(&mut self, target: &mut Target) {
        self.link.borrow_mut().is_cut = true;
        while target.state == State::Loading {
            target.receive(&mut self.link.borrow_mut(), u32::MAX);
        }
    }

    fn hand_over(mut self, target: &mut Target, targets: &Targets) -> Outcome {
        let was_cut = self.link.borrow().is_cut;
        while target.state == State::Loading {
            World::pass_time(self.world);
            target.receive(&mut self.link.borrow_mut(), self.rng.u32(1..20));
        }
        let arrived = target.state == State::Arrived;
        let mut world = lock(self.world);
        if arrived {
            for (side, disk) in world.sides.iter().zip(&targets.disks) {
                checks::is_durable(side, disk);
            }
            for node in &targets.nodes {
                assert_eq!(node.held(), Some(Hold::Nothing), "live there");
            }
            checks::is_held(&world);
            self.leaving.into_iter().for_each(Leaving::give_up);
            checks::has_departed(&world);
        } else {
            for node in &targets.nodes {
                assert_eq!(node.held(), Some(Hold::Writes), "not live there");
            }
            checks::is_held(&world);
            self.leaving.into_iter().for_each(Leaving::serve_on);
            checks::is_as_before(&mut world);
        }
        match (arrived, was_cut) {
            (true, false) => Outcome::Completed,
            (true, true) => Outcome::LostButArrived,
            (false, _) => Outcome::LostAndServedHere,
        }
    }
}
