//! What goes wrong between two daemons, as processes: cut connections, killed processes, bad input.
//!
//! In every run a guest on each side writes to the disk of its side all the time, as fast as it is let. The blocks of
//! both are told apart, so one rule says it all: at the end the disk that is live holds every write that was
//! acknowledged, wherever. A lost write breaks it, and so does a disk that was live on two sides at once.

#[path = "../peers/mod.rs"]
#[expect(dead_code, reason = "other tests use the rest of it")]
mod peers;

mod bad_input;
mod control;
mod cuts;
mod guest;
mod kills;
mod link;
mod live_snapshots;
mod load;
mod log;
mod pair;
mod qcow2;
mod runs;
mod serve;
mod strangers;
