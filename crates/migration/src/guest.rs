//! A machine that moves: what its VMM hands over, and how its guest is stopped and let go on.

use std::fmt;
use std::sync::Arc;

use vmferry_ram::{
    DirtyLog, GuestRam, RamDestinationOptions, RamSourceOptions, Throttle as CpuThrottle,
};
use vmferry_savevm::{Describe, HandlerError, Machine, Registration};

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
    /// How the stream's configuration shows it.
    pub machine: Machine,
    /// Its memory.
    pub ram: Arc<dyn GuestRam>,
    /// Tells what the guest writes.
    pub dirty_log: Box<dyn DirtyLog>,
    /// Slows vCPUs down where a migration would not converge.
    pub cpu_throttle: Option<Box<dyn CpuThrottle>>,
    /// How memory is sent; whether the migration may become a postcopy.
    pub ram_options: RamSourceOptions,
    /// Its devices.
    pub devices: Vec<Registration<'static>>,
    /// Its vCPUs.
    pub guest: Box<dyn Guest>,
    /// What comes after the end of a precopy.
    pub describe: Describe,
    /// Tell the destination when the guest has stopped; see [`vmferry_savevm::Opening`].
    pub switchover_start: bool,
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
            .field("machine", &self.machine)
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
