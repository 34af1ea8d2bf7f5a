//! Whole machines, at both ends, in one process.

mod disks;
mod recovery;
mod refusals;
mod switches;
mod vm;
