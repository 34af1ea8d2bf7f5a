//! Whole machines, at both ends, in one process.

mod recovery;
mod switches;
mod vm;
