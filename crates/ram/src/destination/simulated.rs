//! A destination whose kernel is played by a test.

use std::sync::Arc;
use std::time::Instant;

use super::faults::{Faults, Kernel};
use super::requests::HostPage;
use super::{IncomingRam, RamDestinationError};

impl IncomingRam {
    /// [`IncomingRam::advise`], with `kernel` instead of the kernel.
    pub(crate) fn advise_simulated(&self, kernel: impl Kernel) -> Result<(), RamDestinationError> {
        self.advise_with(|| Ok(kernel))
    }

    /// [`IncomingRam::listen`], with `kernel` instead of the kernel, and without a thread.
    pub(crate) fn listen_simulated(
        &self,
        kernel: Arc<dyn Kernel>,
    ) -> Result<(), RamDestinationError> {
        self.listen_with(|memory, requests, stats| {
            Faults::simulated(kernel, memory, requests, stats)
        })
    }

    /// What the thread does that is not there, about a fault of a host page.
    pub(crate) fn touched(&self, block: usize, offset: u64, seen: Instant) {
        if let Some(faults) = self.shared.faults() {
            faults.touched(HostPage { block, offset }, seen);
        }
    }

    /// Entries of requests that take memory.
    pub(crate) fn request_entries(&self) -> usize {
        self.shared.requests.entries()
    }
}
