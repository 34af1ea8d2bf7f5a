//! A machine that moves: what its VMM hands over, and how its guest is stopped and let go on.

use std::fmt;
use std::sync::Arc;

use vmferry_ram::{
    DirtyLog, GuestRam, RamDestinationOptions, RamSource, RamSourceError, RamSourceOptions,
    StoredRam, Throttle as CpuThrottle,
};
use vmferry_savevm::{HandlerError, Machine, Opening, Registration};

/// The vCPUs and devices of a machine. Called by the migration's thread.
pub trait Guest: Send {
    /// Stop. When it returns no vCPU runs, no device works, and requests to disks have ended.
    ///
    /// # Errors
    /// It could not be stopped; it runs on.
    fn stop(&mut self) -> Result<(), HandlerError>;

    /// Run, here: after a migration into here, or because one out of here came to nothing.
    fn run(&mut self);
}

/// A machine that leaves.
pub struct SourceMachine {
    /// What its stream begins with. Commands are added as they are needed.
    pub opening: Opening,
    /// Its memory.
    pub memory: SourceMemory,
    /// How memory is sent; whether the migration may become a postcopy.
    pub ram_options: RamSourceOptions,
    /// Its devices, and live sections besides disks and memory.
    pub devices: Vec<Registration<'static>>,
    /// Its vCPUs.
    pub guest: Box<dyn Guest>,
}

/// Memory of a machine that leaves.
pub enum SourceMemory {
    /// A guest writes it meanwhile.
    Live {
        /// The memory.
        ram: Arc<dyn GuestRam>,
        /// Tells what the guest writes.
        dirty_log: Box<dyn DirtyLog>,
        /// Slows vCPUs down where a migration would not converge.
        cpu_throttle: Option<Box<dyn CpuThrottle>>,
    },
    /// It is that of a parked machine.
    Stored(Arc<dyn StoredRam>),
}

impl SourceMemory {
    pub(crate) fn is_stored(&self) -> bool {
        matches!(self, Self::Stored(_))
    }

    pub(crate) fn source(self, options: RamSourceOptions) -> Result<RamSource, RamSourceError> {
        match self {
            Self::Live {
                ram,
                dirty_log,
                cpu_throttle,
            } => RamSource::new(ram, dirty_log, cpu_throttle, options),
            Self::Stored(ram) => RamSource::stored(ram, options),
        }
    }
}

/// A machine that is to be filled. Its guest does not run.
pub struct DestinationMachine {
    /// What the stream's configuration must fit.
    pub machine: Machine,
    /// Its memory.
    pub ram: Arc<dyn GuestRam>,
    /// What is accepted.
    pub ram_options: RamDestinationOptions,
    /// Its devices.
    pub devices: Vec<Registration<'static>>,
    /// Its vCPUs.
    pub guest: Box<dyn Guest>,
}

/// vCPUs of a machine that may leave. Those that were stopped run again when this is dropped.
pub(crate) struct Vcpus {
    guest: Option<Box<dyn Guest>>,
    stopped: bool,
}

impl Vcpus {
    pub(crate) fn new(guest: Option<Box<dyn Guest>>) -> Self {
        Self {
            guest,
            stopped: false,
        }
    }

    pub(crate) fn stop(&mut self) -> Result<(), HandlerError> {
        if let Some(guest) = &mut self.guest {
            guest.stop()?;
            self.stopped = true;
        }
        Ok(())
    }

    /// They may run elsewhere from now on: only a decision lets them run here.
    pub(crate) fn leave(mut self) -> Option<Box<dyn Guest>> {
        self.guest.take()
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        if let Some(guest) = self.guest.as_mut().filter(|_| self.stopped) {
            guest.run();
        }
    }
}

impl fmt::Debug for SourceMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceMachine")
            .field("opening", &self.opening)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for DestinationMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DestinationMachine")
            .field("machine", &self.machine)
            .finish_non_exhaustive()
    }
}
