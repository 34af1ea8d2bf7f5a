//! The migration engine: parameters, status, source, destination, hand-over.
//!
//! [`RunningSource`] sends disks away, [`receive`] takes them in. Both tell their course through
//! [`Published`]; [`RecordFile`] remembers across crashes where a disk lives.

mod convergence;
mod destination;
mod engine;
mod guest;
mod hand_over;
mod line;
mod moving;
mod pace;
mod parameters;
mod postcopy;
mod record;
mod residence;
mod return_path;
mod sink;
mod source;
mod status;
mod watch;

pub use destination::{
    Arrived, DestinationDisk, DestinationFailure, DestinationJob, NotPaused, Reconnections, Rest,
    receive, receive_machine,
};
pub use guest::{DestinationMachine, Guest, SourceMachine, SourceMemory};
pub use hand_over::{Committed, Decision, SourceDisk};
pub use parameters::{Capabilities, DOWNTIME_LIMIT_MAX, Parameters};
pub use record::{Record, RecordError, RecordFile, Residence};
pub use residence::{Standing, Start, StartError, start};
pub use source::{RequestError, RunningSource, SourceFailure, SourceJob, Target};
pub use status::{Published, RamStatus, State, Status};
pub use vmferry_block_migration::Coverage;
