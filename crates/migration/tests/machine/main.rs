//! Whole machines, at both ends, in one process.

mod breaks;
mod disks;
mod liars;
mod recovery;
mod refusals;
mod stored;
mod switches;
mod vm;
