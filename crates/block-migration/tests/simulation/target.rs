//! The other end.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fastrand::Rng;
use vmferry_block_migration::{Coverage, Destination, SECTION_NAME, SECTION_VERSION, Syncer};
use vmferry_disk::{Hold, Lease, Node};
use vmferry_savevm::{LoadMachine, LoadOptions, LoadStep, Owner, Registration, Registry};
use vmferry_stream::{BLOCK_BYTES, Command, Ending, Record};

use crate::disk::{Handle, SimDisk};
use crate::wire::{Link, Piece};

/// Disks to be filled, over one or more attempts.
pub(crate) struct Targets {
    pub(crate) disks: Vec<Arc<SimDisk>>,
    pub(crate) nodes: Vec<Arc<Node>>,
    coverage: Coverage,
}

impl Targets {
    /// Disks like these, with something old on them; or empty ones over the same bases.
    pub(crate) fn new(sources: &[Arc<SimDisk>], rng: &mut Rng) -> Self {
        let like = |source: &Arc<SimDisk>| SimDisk::over(source.length, source.base.clone());
        let disks: Vec<_> = sources.iter().map(like).collect();
        let is_over_bases = |disk: &Arc<SimDisk>| disk.base.is_some();
        let coverage = match disks.iter().any(is_over_bases) {
            true => Coverage::Incremental,
            false => Coverage::Whole,
        };
        let mut nodes = Vec::new();
        for (index, disk) in disks.iter().enumerate() {
            for cell in 0..disk.cells.len() {
                if coverage == Coverage::Whole {
                    disk.place(cell, rng.u8(..));
                }
            }
            let name = format!("disk{index}");
            nodes.push(Node::new(
                name,
                Box::new(Handle(Arc::clone(disk))),
                Hold::Writes,
            ));
        }
        Self {
            disks,
            nodes,
            coverage,
        }
    }
}

/// One attempt to receive.
pub(crate) struct Target {
    machine: LoadMachine,
    registry: Registry<'static>,
    syncer: Syncer,
    leases: Vec<Lease>,
    window: Vec<u8>,
    /// Payload that was announced, and whose.
    awaited: Option<(u32, Owner)>,
    /// Where earlier blocks have left something in a buffer.
    offsets: BTreeSet<usize>,
    pub(crate) state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Loading,
    /// Whole and durable; guests are let in.
    Arrived,
    Failed(String),
}

impl Target {
    pub(crate) fn new(targets: &Targets) -> Self {
        let lease = |node: &Arc<Node>| node.lease("an incoming migration").expect("free");
        let leases: Vec<Lease> = targets.nodes.iter().map(lease).collect();
        let fillers = leases.iter().map(Lease::filler).collect();
        let destination = Destination::without_thread(fillers, targets.coverage);
        let destination = destination.expect("good disks");
        let stats = destination.stats();
        stats.source_is_ours.store(true, Ordering::Relaxed);
        let syncer = destination.syncer();
        let mut registry = Registry::new();
        registry
            .register(Registration::loading(
                SECTION_NAME,
                SECTION_VERSION..=SECTION_VERSION,
                Box::new(destination),
            ))
            .expect("the first");
        Self {
            machine: LoadMachine::new(LoadOptions::default()),
            registry,
            syncer,
            leases,
            window: Vec::new(),
            awaited: None,
            offsets: BTreeSet::new(),
            state: State::Loading,
        }
    }

    /// Let up to `bytes` bytes come over the link.
    pub(crate) fn receive(&mut self, link: &mut Link, bytes: u32) {
        let mut left = bytes;
        while left > 0 && self.state == State::Loading {
            match link.pieces.front_mut() {
                None => {
                    if link.is_cut {
                        let end = self.machine.finish_at(self.machine.offset());
                        self.fail(end.map_or_else(|e| e.to_string(), |_| "cut".to_owned()));
                    }
                    return;
                }
                Some(Piece::Bytes(bytes)) => {
                    let count = bytes.len().min(left as usize);
                    self.window.extend(bytes.drain(..count));
                    left -= u32::try_from(count).expect("counted");
                    if bytes.is_empty() {
                        link.pieces.pop_front();
                    }
                    self.work(&mut link.pongs);
                }
                Some(Piece::Block(done, cells)) => {
                    let count = left.min(BLOCK_BYTES - *done);
                    *done += count;
                    left -= count;
                    if *done == BLOCK_BYTES {
                        let cells = std::mem::take(cells);
                        link.pieces.pop_front();
                        self.fill(&cells);
                        self.work(&mut link.pongs);
                    }
                }
            }
        }
    }

    fn work(&mut self, pongs: &mut VecDeque<u32>) {
        if let Err(reason) = self.try_to_work(pongs) {
            self.fail(reason);
        }
    }

    fn fill(&mut self, cells: &[(u32, u8)]) {
        assert_eq!(self.awaited.take(), Some((BLOCK_BYTES, Owner::Handler)));
        assert!(self.window.is_empty());
        let filled = self
            .machine
            .payload(&mut self.registry, BLOCK_BYTES as usize)
            .map(|room| {
                for offset in &self.offsets {
                    room[*offset] = 0;
                }
                for (offset, byte) in cells {
                    room[*offset as usize] = *byte;
                    self.offsets.insert(*offset as usize);
                }
            })
            .and_then(|()| self.machine.payload_filled(&mut self.registry));
        if let Err(error) = filled {
            self.fail(error.to_string());
        }
    }

    fn try_to_work(&mut self, pongs: &mut VecDeque<u32>) -> Result<(), String> {
        while self.state == State::Loading {
            if let Some((bytes, Owner::Rest)) = self.awaited {
                if self.window.len() < bytes as usize {
                    return Ok(());
                }
                self.window.drain(..bytes as usize);
                self.awaited = None;
                if self.machine.ending() == Some(Ending::WithDescription) {
                    return self.arrive();
                }
            }
            let step = self.machine.step(&self.window, &mut self.registry);
            match step.map_err(|error| error.to_string())? {
                LoadStep::NeedMore(_) | LoadStep::End => return Ok(()),
                LoadStep::Payload { bytes, owner } => {
                    self.awaited = Some((bytes, owner));
                    if owner == Owner::Handler {
                        return Ok(());
                    }
                }
                LoadStep::Device { used } => drop(self.window.drain(..used)),
                LoadStep::Record { record, used, .. } => {
                    self.window.drain(..used);
                    if let Record::Command(Command::Ping(value)) = record {
                        self.syncer.sync().map_err(|error| error.to_string())?;
                        pongs.push_back(value);
                    }
                }
            }
        }
        Ok(())
    }

    fn arrive(&mut self) -> Result<(), String> {
        self.syncer.sync().map_err(|error| error.to_string())?;
        self.leases.drain(..).for_each(Lease::arrive);
        self.state = State::Arrived;
        Ok(())
    }

    fn fail(&mut self, reason: String) {
        self.leases.clear();
        self.state = State::Failed(reason);
    }
}
