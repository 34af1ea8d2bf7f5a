//! Everything that leaves in one migration, as long as it may still stay.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmferry_block_migration::{Source, SourceOptions, SourceStats, ThreadReads};
use vmferry_ram::{OutgoingRam, PAGE_BYTES};
use vmferry_savevm::{Describe, Opening, Priority, Registration, Registry, cleanup};
use vmferry_stream::Command;

use crate::engine::Leases;
use crate::guest::{SourceMachine, Vcpus};
use crate::parameters::Capabilities;
use crate::source::SourceFailure;
use crate::status::{RamStatus, Status};

/// Before memory: of a guest that runs there is always some left to send.
const DISKS: Priority = Priority(1);

/// Disks, and perhaps a machine, before the point of no return.
pub(crate) struct Moving {
    pub(crate) leases: Leases,
    pub(crate) vcpus: Vcpus,
    pub(crate) sections: Sections,
    pub(crate) opening: Opening,
}

/// What is sent of it.
pub(crate) struct Sections {
    pub(crate) registry: Registry<'static>,
    pub(crate) figures: Figures,
    pub(crate) ram: Option<OutgoingRam>,
    /// May become a postcopy.
    pub(crate) can_postcopy: bool,
}

/// What the handlers count.
pub(crate) struct Figures {
    disks: Option<Arc<SourceStats>>,
    ram: Option<OutgoingRam>,
}

impl Moving {
    pub(crate) fn new(
        leases: Leases,
        machine: Option<SourceMachine>,
        capabilities: &Capabilities,
        taken_up: bool,
    ) -> Result<Self, SourceFailure> {
        let mut registry = Registry::new();
        let mut opening = Opening {
            describe: Describe::Empty,
            ..Opening::default()
        };
        let (mut ram, mut guest, mut can_postcopy) = (None, None, false);
        if let Some(machine) = machine {
            can_postcopy = machine.ram_options.postcopy;
            let mut source = machine.memory.source(machine.ram_options)?;
            if taken_up {
                source.take_up()?;
            }
            ram = Some(source.outgoing());
            // The first of all, so that its number is the same if a postcopy is taken up again.
            registry.register(Registration::saving(
                vmferry_ram::SECTION_NAME,
                vmferry_ram::SECTION_VERSION,
                Box::new(source),
            ))?;
            for device in machine.devices {
                registry.register(device)?;
            }
            guest = Some(machine.guest);
            opening = machine.opening;
        }
        let disks = match leases.is_empty() {
            true => None,
            false => {
                let claimers = leases.iter().map(|(lease, _)| lease.claimer()).collect();
                let options = SourceOptions {
                    zero_blocks: capabilities.zero_blocks,
                    incremental: capabilities.incremental,
                    ..SourceOptions::default()
                };
                let source = Source::new(claimers, ThreadReads::new(), options)?;
                let stats = source.stats();
                let disks = Registration::saving(
                    vmferry_block_migration::SECTION_NAME,
                    vmferry_block_migration::SECTION_VERSION,
                    Box::new(source),
                );
                registry.register(disks.priority(DISKS))?;
                Some(stats)
            }
        };
        Ok(Self {
            leases,
            vcpus: Vcpus::new(guest),
            sections: Sections {
                registry,
                figures: Figures {
                    disks,
                    ram: ram.clone(),
                },
                ram,
                can_postcopy,
            },
            opening,
        })
    }

    /// It stays: guests go on at once. Ending the handlers waits for reads, which may be stuck.
    pub(crate) fn stay(self) {
        drop(self.leases);
        drop(self.vcpus);
        self.sections.end();
    }
}

impl Sections {
    /// POSTCOPY_ADVISE, if it may become one.
    pub(crate) fn advice(&self) -> Option<Command> {
        let ram = self.ram.as_ref().filter(|_| self.can_postcopy)?;
        Some(Command::PostcopyAdvise(Some(ram.page_sizes())))
    }

    /// End what runs for the handlers.
    pub(crate) fn end(mut self) {
        cleanup(&mut self.registry);
    }
}

impl Figures {
    /// Passes over what is dirty, of disks and of memory.
    pub(crate) fn passes(&self) -> u64 {
        let disks = self
            .disks
            .as_ref()
            .map_or(0, |it| it.passes.load(Ordering::Relaxed));
        disks + self.ram().map_or(0, |ram| ram.passes.saturating_sub(1))
    }

    /// Bytes per second of memory that the guest dirties.
    pub(crate) fn ram_dirty_rate(&self) -> u64 {
        self.ram().map_or(0, |ram| ram.dirty_rate)
    }

    fn ram(&self) -> Option<RamStatus> {
        let stats = self.ram.as_ref()?.stats();
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Some(RamStatus {
            total_bytes: load(&stats.total_bytes),
            remaining_bytes: load(&stats.remaining_bytes),
            normal_pages: load(&stats.normal_pages),
            zero_pages: load(&stats.zero_pages),
            xbzrle_pages: load(&stats.xbzrle_pages),
            dirty_rate: load(&stats.dirty_pages_per_second).saturating_mul(PAGE_BYTES),
            passes: load(&stats.passes),
            throttle_percent: stats.throttle_percent.load(Ordering::Relaxed),
            postcopy_requests: load(&stats.postcopy_requests),
            fault_latency: None,
        })
    }

    pub(crate) fn publish(&self, status: &mut Status, wire_bytes: u64) {
        status.wire_bytes = wire_bytes;
        status.ram = self.ram();
        status.bulk_over = status.ram.is_none_or(|ram| ram.passes > 1);
        if let Some(disks) = &self.disks {
            status.bulk_bytes = disks.bulk_bytes.load(Ordering::Relaxed);
            status.bulk_over &= disks.bulk_over.load(Ordering::Relaxed);
            status.moved_bytes = disks.sent_bytes.load(Ordering::Relaxed);
            status.zero_bytes = disks.zero_bytes.load(Ordering::Relaxed);
            status.remaining_bytes = status.total_bytes.saturating_sub(status.bulk_bytes);
        }
        if status.bulk_over {
            status.pass = 2 + self.passes();
        }
    }
}
