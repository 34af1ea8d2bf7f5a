//! Announcing guests: `announce-self`, and what happens when a migration has arrived.

use vmferry_qmp::types::{AnnounceParameters, MigrationParameters};
use vmferry_relay::announce::{Announcement, Occasion, OutOfRange, Parameters, STEP_MS_MAX};

use crate::error::DaemonError;
use crate::hub::Hub;

impl Hub {
    /// `announce-self`. Like QEMU's it says nothing of NICs that it does not know; unlike QEMU's it
    /// refuses what would announce for ever.
    pub(crate) fn announce_self(&self, arguments: AnnounceParameters) -> Result<(), DaemonError> {
        let AnnounceParameters {
            initial,
            max,
            rounds,
            step,
            interfaces,
            id,
        } = arguments;
        // What is negative is as far out of range as can be.
        let [initial, max, rounds, step] =
            [initial, max, rounds, step].map(|value| u64::try_from(value).unwrap_or(u64::MAX));
        let parameters = Parameters::new(initial, max, rounds, step)
            .map_err(|error| DaemonError::Argument(format!("Parameter {error}")))?;
        let announcement = Announcement {
            parameters,
            nics: interfaces,
        };
        let occasion = Occasion::Asked(id.unwrap_or_default());
        Ok(self.announcements.begin(occasion, announcement)?)
    }

    /// The guests of these disks run here from now on.
    pub(crate) fn announce_arrival(&self) {
        let announcement = Announcement {
            parameters: self.state().announce,
            nics: None,
        };
        if let Err(error) = self.announcements.begin(Occasion::Arrival, announcement) {
            tracing::warn!(%error, "the guest that has arrived is not announced");
        }
    }
}

/// What `migrate-set-parameters` makes of the parameters of announcements.
pub(crate) fn changed(
    now: Parameters,
    new: &MigrationParameters,
) -> Result<Parameters, DaemonError> {
    if new.announce_step == Some(0) {
        // A step of 0 is for `announce-self` alone, in QEMU too.
        return Err(out_of_range(OutOfRange {
            parameter: "step",
            max: STEP_MS_MAX,
        }));
    }
    Parameters::new(
        new.announce_initial.unwrap_or(now.initial_ms()),
        new.announce_max.unwrap_or(now.max_ms()),
        new.announce_rounds.unwrap_or(now.rounds()),
        new.announce_step.unwrap_or(now.step_ms()),
    )
    .map_err(out_of_range)
}

/// In the words of QEMU.
fn out_of_range(OutOfRange { parameter, max }: OutOfRange) -> DaemonError {
    DaemonError::Argument(format!(
        "Parameter 'announce_{parameter}' expects a value between 0 and {max}"
    ))
}
