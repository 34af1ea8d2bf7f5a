//! Machines that come from a source go into a file: real streams, streams that break, streams that lie.

mod answers;
mod captures;
mod contents;
mod cuts;
mod index;
mod lies;
mod ours;
mod recovery;
mod refusals;
