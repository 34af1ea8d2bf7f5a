//! The storage daemon as a library: exports, QMP commands, migrations out and in.
//!
//! ```text
//!   NBD clients ──▶ vmferry_nbd::Server ──▶ Exports ──▶ Node ◀── lease ── RunningSource, receive
//!   QMP clients ──▶ vmferry_qmp::Server ──▶ Commands ──▶ Hub ──────────────────┘
//!                          ▲ events                       │
//!                          └───────── Announcer ◀─────────┤ Published
//!                          │  snapshot-… ───────────▶│ leases on all disks of the snapshot
//!   switches  ◀── NICs ◀──── vmferry_relay::Announcements ◀┘ arrived
//! ```
//!
//! [`Daemon::start`] takes open disks and bound listeners, so that whoever calls it can report
//! addresses and errors first. [`Daemon::run`] returns once `quit` or an [`Ender`] has asked for the
//! end, and after everything has ended in order. A panic in a migration's thread fails that
//! migration; one in a command fails that command.
#![forbid(unsafe_code)]

mod announce;
mod announcer;
mod commands;
mod config;
mod daemon;
mod error;
mod exports;
mod hub;
mod incoming;
mod jobs;
mod outgoing;
mod report;
mod snapshots;

pub use config::{Config, Disk, Incoming, version};
pub use daemon::{Daemon, Ender, RunError, StartError};
pub use error::DaemonError;
