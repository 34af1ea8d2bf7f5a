//! How a migration ended.

use std::time::Duration;

use serde_json::{Value, json};
use vmferry_qmp::types::{HandOver, MigrationInfo, MigrationStatus};

use super::units;
use crate::exit::{Exit, Failure};

/// The end of a migration, as the source has it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// The destination has the disks.
    Completed(Summary),
    /// By request; the source serves on.
    Cancelled,
    /// The source serves on.
    Failed(String),
    /// Nobody knows who has the disks.
    Undecided(String),
}

/// Figures of a migration that completed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) total_bytes: u64,
    /// Of an incoming migration: bytes of the stream.
    pub(crate) sent_bytes: u64,
    /// It came in; else it went out.
    pub(crate) incoming: bool,
    pub(crate) elapsed: Duration,
    pub(crate) downtime: Option<Duration>,
    pub(crate) passes: u64,
    /// What the destination says about stable storage; `None` if it cannot answer.
    pub(crate) durable: Option<bool>,
}

impl Outcome {
    /// `None` while it goes on, or if there was none.
    pub(crate) fn of(info: &MigrationInfo) -> Option<Self> {
        let why = || {
            info.error_desc
                .clone()
                .unwrap_or_else(|| "no reason was given".to_owned())
        };
        if info.x_hand_over == Some(HandOver::Undecided) {
            return Some(Self::Undecided(why()));
        }
        match info.status.as_ref()? {
            MigrationStatus::Completed => Some(Self::Completed(Summary::of(info))),
            MigrationStatus::Cancelled => Some(Self::Cancelled),
            MigrationStatus::Failed => Some(Self::Failed(why())),
            _ => None,
        }
    }

    /// A success, or what to tell.
    pub(crate) fn into_result(self) -> Result<Exit, Failure> {
        match self {
            Self::Completed(_) => Ok(Exit::Whole),
            Self::Cancelled => Err(Failure::new(
                Exit::Cancelled,
                "the migration was cancelled; the source serves on",
            )),
            Self::Failed(why) => Err(Failure::new(
                Exit::Failed,
                format!("the migration failed: {why}"),
            )
            .hint("the source serves on; the migration can be tried again")),
            Self::Undecided(why) => {
                let message = format!("undecided which side has the disks, they are held: {why}");
                Err(Failure::new(Exit::Undecided, message).hint(
                    "look at the destination, then say vmferry resolve serve, or give-up \
                     (see vmferry help resolve)",
                ))
            }
        }
    }

    /// The last object of `--json`.
    pub(crate) fn object(&self) -> Value {
        match self {
            Self::Completed(summary) => summary.object(),
            Self::Cancelled => json!({"event": "cancelled"}),
            Self::Failed(why) => json!({"event": "failed", "error": why}),
            Self::Undecided(why) => json!({"event": "undecided", "error": why}),
        }
    }
}

impl Summary {
    fn of(info: &MigrationInfo) -> Self {
        let disk = info.disk.clone().unwrap_or_default();
        // Only a source has disks to hand over.
        let incoming = info.x_hand_over.is_none();
        Self {
            total_bytes: disk.total,
            sent_bytes: if incoming {
                disk.precopy_bytes
            } else {
                disk.transferred
            },
            incoming,
            elapsed: Duration::from_millis(info.total_time.unwrap_or(0)),
            downtime: info.downtime.map(Duration::from_millis),
            passes: info.x_pass.unwrap_or(0),
            durable: info.x_durable,
        }
    }

    fn object(&self) -> Value {
        json!({
            "event": "completed",
            "total-bytes": self.total_bytes,
            "sent-bytes": self.sent_bytes,
            "elapsed-ms": self.elapsed.as_millis() as u64,
            "downtime-ms": self.downtime.map(|downtime| downtime.as_millis() as u64),
            "passes": self.passes,
            "durable": self.durable,
        })
    }

    /// Bytes of disk for each second.
    pub(crate) fn bytes_per_second(&self) -> u64 {
        let nanos = self.elapsed.as_nanos().max(1);
        let rate = u128::from(self.sent_bytes) * 1_000_000_000 / nanos;
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    /// One line for a person.
    pub(crate) fn line(&self) -> String {
        if self.incoming {
            return self.line_of_incoming();
        }
        let mut line = format!(
            "{} of disks, {} sent in {} ({}), {}",
            units::bytes(self.total_bytes),
            units::bytes(self.sent_bytes),
            units::time(self.elapsed),
            units::rate(self.bytes_per_second()),
            units::count(self.passes, "pass"),
        );
        if let Some(downtime) = self.downtime {
            line += &format!(", downtime {}", units::time(downtime));
        }
        line += match self.durable {
            Some(true) => "; whole, and on stable storage at the destination",
            Some(false) => "; whole, but the destination does not say that it is on stable storage",
            None => "; one-way: nobody confirms that it arrived",
        };
        line
    }

    fn line_of_incoming(&self) -> String {
        format!(
            "{} of disks received, a stream of {} in {}; whole{}",
            units::bytes(self.total_bytes),
            units::bytes(self.sent_bytes),
            units::time(self.elapsed),
            match self.durable {
                Some(true) => ", and on stable storage",
                _ => "",
            }
        )
    }
}

#[cfg(test)]
mod tests {
    use vmferry_qmp::types::MigrationStats;

    use super::*;

    fn info(status: MigrationStatus) -> MigrationInfo {
        MigrationInfo {
            status: Some(status),
            ..MigrationInfo::default()
        }
    }

    #[test]
    fn each_end_has_its_exit_status() {
        use MigrationStatus as S;
        let undecided = MigrationInfo {
            x_hand_over: Some(HandOver::Undecided),
            error_desc: Some("no answer within 10 s".into()),
            ..info(S::Device)
        };
        let ends = [
            (info(S::Completed), Exit::Whole),
            (info(S::Cancelled), Exit::Cancelled),
            (info(S::Failed), Exit::Failed),
            (undecided, Exit::Undecided),
        ];
        for (info, exit) in ends {
            let outcome = Outcome::of(&info).unwrap();
            let end = outcome.into_result().unwrap_or_else(|failure| failure.exit);
            assert_eq!(end, exit, "{info:?}");
        }
        for status in [S::None, S::Setup, S::Active, S::Device, S::Cancelling] {
            assert_eq!(Outcome::of(&info(status)), None);
        }
        assert_eq!(Outcome::of(&MigrationInfo::default()), None);
    }

    #[test]
    fn a_summary_says_what_happened_and_how_sure_it_is() {
        let mut info = MigrationInfo {
            disk: Some(MigrationStats {
                total: 3 << 30,
                transferred: 4 << 30,
                ..MigrationStats::default()
            }),
            total_time: Some(4000),
            downtime: Some(23),
            x_pass: Some(3),
            x_durable: Some(true),
            x_hand_over: Some(HandOver::GivenUp),
            ..info(MigrationStatus::Completed)
        };
        let Some(Outcome::Completed(summary)) = Outcome::of(&info) else {
            panic!()
        };
        assert_eq!(
            summary.line(),
            "3.00 GiB of disks, 4.00 GiB sent in 4.0 s (1.00 GiB/s), 3 passes, downtime 23 ms; \
             whole, and on stable storage at the destination"
        );
        assert_eq!(summary.object()["durable"], true);
        assert_eq!(summary.object()["downtime-ms"], 23);

        let arrived = MigrationInfo {
            disk: Some(MigrationStats {
                total: 3 << 30,
                transferred: 4 << 30,
                precopy_bytes: 5 << 30,
                ..MigrationStats::default()
            }),
            x_hand_over: None,
            ..info.clone()
        };
        let Some(Outcome::Completed(summary)) = Outcome::of(&arrived) else {
            panic!()
        };
        assert_eq!(
            summary.line(),
            "3.00 GiB of disks received, a stream of 5.00 GiB in 4.0 s; whole, and on stable storage"
        );

        info.x_durable = None;
        let object = Outcome::of(&info).unwrap().object();
        assert!(object["durable"].is_null());
    }
}
