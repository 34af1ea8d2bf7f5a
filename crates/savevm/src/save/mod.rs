//! The machine that writes a stream: begin, iterate, complete.
//!
//! ```text
//!            header, configuration, commands, STARTs          ENDs                FULLs             EOF, description
//!   begin ──▶ Iterating ── try_complete ──▶ Completing ── end_live ──▶ LiveEnded ── save_devices ──▶ Ended ── finish
//!               ▲    │  └──── NotYet ────┐
//!               └────┼───────────────────┘
//!                    │                        ENDs, discards                  LISTEN, FULLs, RUN   PARTs        ENDs, EOF
//!                    └─ try_postcopy ──▶ Switching ── end_live ──▶ Packing ── pack ──▶ Packed ── send ──▶ Postcopy ── complete
//! ```
//!
//! Each step consumes the one before, so that no END can be written before every bulk phase is
//! over, and no EOF before every END and every device. The machine borrows the [`Registry`] step by
//! step: a failed step leaves the handlers to [`cleanup`].

mod flow;
mod postcopy;

use std::sync::Arc;
use std::time::Duration;

use vmferry_stream::{Command, InstanceId, Name, SectionKind};
use vmferry_vmstate::{DeviceError, Dialect};

use crate::handler::{GuestStopped, HandlerError, Progress, Sink};
use crate::machine::Machine;
use crate::registry::{Blocked, Registry};

use flow::Flow;
pub use postcopy::{Packed, Packing, Postcopy, Switching};

/// A stream could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Something registered cannot be saved, or must not be now.
    #[error(transparent)]
    Blocked(#[from] Blocked),
    /// A live section's owner failed.
    #[error("section '{section}' instance {}: {source}", instance.0)]
    Section {
        /// Its name.
        section: Name,
        /// Its instance.
        instance: InstanceId,
        /// What the owner said.
        source: HandlerError,
    },
    /// A device could not say its state.
    #[error("device '{device}' instance {}: {source}", instance.0)]
    Device {
        /// Its section's name.
        device: Name,
        /// Its section's instance.
        instance: InstanceId,
        /// What it said.
        source: DeviceError,
    },
    /// The devices of a postcopy have more state than a destination reads.
    #[error("the state of all devices has {bytes} bytes, which may be {max} bytes in a postcopy")]
    PackageTooLarge {
        /// Its length.
        bytes: usize,
        /// The maximum.
        max: u32,
    },
    /// The destination was not told that it would be a postcopy.
    #[error("postcopy cannot start: the stream did not begin with POSTCOPY_ADVISE")]
    NotAdvised,
    /// Real destinations refuse to run a guest if nothing was discarded.
    #[error("postcopy cannot start: no handler said what the destination must discard")]
    NothingDiscarded,
    /// The channel failed between sections.
    #[error("{0}")]
    Channel(HandlerError),
}

/// What a stream begins with, and how it is written.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The machine that is saved.
    pub machine: Machine,
    /// Send the configuration section. Machine types up to 2.3 leave it out.
    pub configuration: bool,
    /// End sections in footers. Machine types up to 2.3 leave them out.
    pub footers: bool,
    /// Tell the destination when the guest has stopped. Machine types since 10.0; older
    /// destinations than QEMU 10.0 refuse it.
    pub switchover_start: bool,
    /// How devices are described at the end. A postcopy never describes them.
    pub describe: Describe,
    /// Commands before the first section.
    pub commands: Vec<Command>,
}

impl Default for Opening {
    /// A machine without a name, in a stream as QEMU 7.2 writes it, without commands.
    fn default() -> Self {
        Self {
            machine: Machine::default(),
            configuration: true,
            footers: true,
            switchover_start: false,
            describe: Describe::As(Dialect::Qemu7),
            commands: Vec::new(),
        }
    }
}

/// What comes after the EOF of a precopy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Describe {
    /// A description of every device section, in that dialect.
    As(Dialect),
    /// This text: that of the stream which the devices' states come from.
    Text(Arc<[u8]>),
    /// An empty description, `{}`. A destination that gets none says it failed.
    Empty,
    /// Nothing, as from machine types 2.0 to 2.2. The sender must close its connection then.
    Suppressed,
}

/// Sum over all sections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TotalPending {
    /// A bulk phase runs: nothing can complete.
    Bulk {
        /// Estimate of the bytes that are left.
        bytes: u64,
    },
    /// Every bulk phase is over.
    Dirty(DirtyTotal),
}

/// What must be read and sent to complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyTotal {
    /// Bytes to send while the guest stands still.
    pub bytes: u64,
    /// Bytes that may be sent after that; always 0 in a precopy.
    pub later_bytes: u64,
    /// Time to read what must be sent while the guest stands still.
    pub read_time: Duration,
}

/// Sections are being sent while guests run.
#[derive(Debug)]
pub struct Iterating {
    flow: Box<Flow>,
}

/// Answer of [`Iterating::try_complete`] and [`Iterating::try_postcopy`].
#[derive(Debug)]
pub enum Ready<S = Completing> {
    /// The rest is small enough: stop the guests.
    Go(S),
    /// Go on iterating.
    NotYet(Iterating, TotalPending),
}

/// Guests are being stopped.
#[derive(Debug)]
pub struct Completing {
    flow: Box<Flow>,
}

/// Every live section has ended; devices are to be saved.
#[derive(Debug)]
pub struct LiveEnded {
    flow: Box<Flow>,
}

/// Everything was sent but EOF.
#[derive(Debug)]
pub struct Ended {
    flow: Box<Flow>,
}

/// Write header, configuration, commands, and the START of every active live section; among those,
/// the devices that are registered as early.
///
/// # Errors
/// Something cannot be saved; a section's owner or the channel failed.
pub fn begin(
    opening: &Opening,
    registry: &mut Registry<'_>,
    sink: &mut dyn Sink,
) -> Result<Iterating, SaveError> {
    registry.check_saving()?;
    let mut flow = Flow::new(opening);
    flow.open(opening, sink)?;
    flow.start(registry, sink)?;
    Ok(Iterating {
        flow: Box::new(flow),
    })
}

/// Write the state of all devices and nothing else: header, FULL sections, EOF. No configuration, no
/// live section, no description. For whoever moves memory and disks by other means, as Xen does.
///
/// # Errors
/// Something cannot be saved; a device or the channel failed.
pub fn save_device_state(
    footers: bool,
    _stopped: &GuestStopped,
    registry: &mut Registry<'_>,
    sink: &mut dyn Sink,
) -> Result<(), SaveError> {
    registry.check_saving()?;
    let opening = Opening {
        configuration: false,
        footers,
        describe: Describe::Suppressed,
        ..Opening::default()
    };
    let mut flow = Flow::new(&opening);
    flow.open(&opening, sink)?;
    flow.devices(registry, sink)?;
    flow.finish(sink)
}

/// End what runs for the handlers that save, whatever happened before.
pub fn cleanup(registry: &mut Registry<'_>) {
    for entry in registry.entries_mut() {
        if let Some(saver) = entry.saver() {
            saver.cleanup();
        }
    }
}

impl Iterating {
    /// Write one PART of each section in turn, up to the first that is in its bulk phase and not
    /// finished: what changes fast is not sent again and again meanwhile. Where the rate limit leaves
    /// nothing for a section, the next round begins with it.
    ///
    /// # Errors
    /// A section's owner or the channel failed.
    pub fn iterate(
        &mut self,
        registry: &mut Registry<'_>,
        sink: &mut dyn Sink,
    ) -> Result<Progress, SaveError> {
        self.flow.iterate(registry, sink, |_| true)
    }

    /// Send a command between sections.
    ///
    /// # Errors
    /// The channel failed.
    pub fn command(&mut self, command: Command, sink: &mut dyn Sink) -> Result<(), SaveError> {
        self.flow.command(command, sink)
    }

    /// What is left to send before a precopy completes.
    pub fn pending(&self, registry: &mut Registry<'_>) -> TotalPending {
        self.flow.pending(registry, |_| false)
    }

    /// What is left to send before a postcopy starts the guest: a bulk phase may go on after that,
    /// if its handler can.
    pub fn pending_postcopy(&self, registry: &mut Registry<'_>) -> TotalPending {
        self.flow
            .pending(registry, |saver| saver.postcopy().is_some())
    }

    /// Complete if every bulk phase is over and `fits` accepts what is left.
    pub fn try_complete(
        self,
        registry: &mut Registry<'_>,
        fits: impl FnOnce(&DirtyTotal) -> bool,
    ) -> Ready {
        match self.pending(registry) {
            TotalPending::Dirty(dirty) if fits(&dirty) => Ready::Go(Completing { flow: self.flow }),
            pending => Ready::NotYet(self, pending),
        }
    }

    /// Switch to postcopy if every bulk phase that cannot go on after the switch is over, and `fits`
    /// accepts what must be sent before.
    ///
    /// # Errors
    /// The destination does not expect it.
    pub fn try_postcopy(
        self,
        registry: &mut Registry<'_>,
        fits: impl FnOnce(&DirtyTotal) -> bool,
    ) -> Result<Ready<Switching>, SaveError> {
        if self.flow.advised().is_none() {
            return Err(SaveError::NotAdvised);
        }
        Ok(match self.pending_postcopy(registry) {
            TotalPending::Dirty(dirty) if fits(&dirty) => Ready::Go(Switching::new(self.flow)),
            pending => Ready::NotYet(self, pending),
        })
    }
}

impl Completing {
    /// Write the END of every live section, and a PING behind them where one is wanted: its PONG
    /// says that the destination has got that far.
    ///
    /// # Errors
    /// A section's owner or the channel failed.
    pub fn end_live(
        mut self,
        stopped: &GuestStopped,
        registry: &mut Registry<'_>,
        barrier: Option<u32>,
        sink: &mut dyn Sink,
    ) -> Result<LiveEnded, SaveError> {
        self.flow.announce_switchover(sink)?;
        for entry in registry.entries_mut() {
            self.flow
                .live(entry, SectionKind::End, sink, |saver, sink| {
                    saver.complete(stopped, sink)
                })?;
        }
        if let Some(value) = barrier {
            self.flow.command(Command::Ping(value), sink)?;
        }
        Ok(LiveEnded { flow: self.flow })
    }
}

impl LiveEnded {
    /// Write the state of every device that needs it.
    ///
    /// # Errors
    /// A device or the channel failed.
    pub fn save_devices(
        mut self,
        _stopped: &GuestStopped,
        registry: &mut Registry<'_>,
        sink: &mut dyn Sink,
    ) -> Result<Ended, SaveError> {
        self.flow.devices(registry, sink)?;
        Ok(Ended { flow: self.flow })
    }
}

impl Ended {
    /// Write EOF and the description, as one piece.
    ///
    /// # Errors
    /// The channel failed.
    pub fn finish(self, sink: &mut dyn Sink) -> Result<(), SaveError> {
        self.flow.finish(sink)
    }
}
