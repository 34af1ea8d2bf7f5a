//! Daemons in one process, driven like users drive them: through NBD and QMP.

mod announce;
mod commands;
mod cuts;
mod faults;
mod host;
mod snapshots;
